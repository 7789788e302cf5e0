//! `--diff`: two compilations beside each other.

use super::super::units;
use super::Explanation;
use sinter::explain::{Difference, difference};
use sinter::ir::Micros;
use std::io::Write;

pub fn show(a: &Explanation, b: &Explanation, names: [&String; 2], json: bool) -> super::super::Outcome {
    let difference = difference(&a.steps, &b.steps);
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, &difference)?;
        writeln!(out)?;
        return Ok(());
    }
    let [name_a, name_b] = names;
    writeln!(out, "A: {name_a}, {} on {}\nB: {name_b}, {} on {}", a.model, a.target, b.model, b.target)?;
    if a.model != b.model {
        writeln!(
            out,
            "these are of different models, so that layers and kernels need not have a counterpart"
        )?;
    }
    out.write_all(text(&difference).as_bytes())?;
    Ok(())
}

fn text(difference: &Difference) -> String {
    let mut text = String::new();
    for (name, only) in [("A", &difference.only_a), ("B", &difference.only_b)] {
        if !only.is_empty() {
            text += &format!("only {name} has {}\n", only.join(", "));
        }
    }
    for step in &difference.steps {
        let [a, b] = step.us;
        text += &format!(
            "\n{}: {} launches in A, {} in B; {} moved, {}; {} estimated, {} ({:.2} times A)\n",
            step.graph,
            step.launches[0],
            step.launches[1],
            units::bytes(step.bytes[0] as i64),
            units::bytes(step.bytes[1] as i64),
            Micros(a),
            Micros(b),
            b / a
        );
        if step.kernels.is_empty() && step.decisions.is_empty() {
            text += "  the same\n";
            continue;
        }
        text += &format!(
            "\n  {:>10} {:>10} {:>10} {:>10}  {:16} {}\n",
            "launches A", "B", "time A", "B", "kernel", "of"
        );
        for k in &step.kernels {
            let cell = |side: usize| match k.launches[side] {
                0 => ["-".to_string(), "-".into()],
                n => [n.to_string(), Micros(k.us[side]).to_string()],
            };
            let ([launches_a, a], [launches_b, b]) = (cell(0), cell(1));
            text +=
                &format!("  {launches_a:>10} {launches_b:>10} {a:>10} {b:>10}  {:16} {}\n", k.kernel, k.of);
        }
        if !step.decisions.is_empty() {
            text += "\n";
        }
        for decision in &step.decisions {
            text += &format!("  {decision}\n");
        }
    }
    text
}
