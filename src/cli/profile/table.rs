//! A report as people read it.

use super::report::{FirstToken, Load, Memory, Report, Step};
use sinter::ir::Micros;
use sinter::runtime::Size;

/// The whole report; of each step its nodes, if they are wanted, in place of its kernels.
pub fn table(report: &Report, nodes: bool) -> String {
    let Report { model, target, isa, .. } = report;
    let mut text = format!(
        "{} on {target} ({isa}), which reads {:.0} GB/s ({})\n",
        model.escape_debug(),
        report.read_bandwidth / 1e9,
        report.read_bandwidth_is,
    );
    if let Some(tool) = &report.recorded_by {
        text += &format!("times recorded by {tool}\n");
    }
    text += &memory(&report.memory);
    if let Some(load) = &report.load {
        text += &until_ready(load, report.first_token.as_ref());
    }
    for step in &report.steps {
        text += &head(step);
        text += &if nodes { of_nodes(step) } else { of_kernels(step) };
    }
    text
}

fn size(bytes: u64) -> String {
    Size(bytes).to_string()
}

fn memory(memory: &Memory) -> String {
    let repacked = match memory.repacked {
        0 => String::new(),
        bytes => format!(" ({} repacked)", size(bytes)),
    };
    let mut text = format!(
        "memory: weights {}{repacked}, cache {} ({} a token), activations {}",
        size(memory.weights),
        size(memory.cache),
        size(memory.cache_per_token),
        size(memory.activations),
    );
    if let Some(peak) = memory.peak {
        text += &format!("; the process had {} at most", size(peak));
    }
    if let Some((used, all)) = memory.device_used.zip(memory.device_all) {
        text += &format!("; of the GPU's {} are {} in use", size(all), size(used));
    }
    text + "\n"
}

/// Where the time goes until there is a token, or, without a prompt, until a step can be made.
fn until_ready(load: &Load, first: Option<&FirstToken>) -> String {
    let (mut parts, all) = (load.parts(), first.map_or(load.all_ms, |first| first.all_ms));
    parts.extend(first.map(FirstToken::parts).unwrap_or_default());
    let mut text = match first {
        Some(FirstToken { prompt_tokens, prompt_steps, .. }) => {
            let tokens = if *prompt_tokens == 1 { "token" } else { "tokens" };
            let steps = if *prompt_steps == 1 { "step" } else { "steps" };
            format!(
                "\ntime to first token: {}, of a prompt of {prompt_tokens} {tokens} in {prompt_steps} {steps}\n\n",
                millis(all)
            )
        }
        None => format!("\nready in {}\n\n", millis(all)),
    };
    for (name, ms, about) in parts {
        let share = ms / all.max(f64::MIN_POSITIVE);
        text += &format!("{:>10} {:>5.1}% {:10}  {name:9} {about}\n", millis(ms), 100.0 * share, bar(share));
    }
    text
}

fn millis(ms: f64) -> String {
    Micros(1e3 * ms).to_string()
}

fn bar(share: f64) -> String {
    "█".repeat((10.0 * share).round() as usize)
}

fn head(step: &Step) -> String {
    let outside = step.step_us.map(|us| format!("{} a step; ", Micros(us))).unwrap_or_default();
    format!(
        "\n{} (program {}, T={} R={}): {outside}its kernels, timed one by one, {} (medians of {})\n\n",
        step.test,
        step.program,
        step.t,
        step.r,
        Micros(step.kernels_us),
        step.steps,
    )
}

fn of_kernels(step: &Step) -> String {
    let mut text = format!(
        "{:>10} {:>6} {:10} {:>5} {:>8} {:>10} {:>9} {:>5} {:>9} {:>5}  {:16} {}\n",
        "time", "share", "", "calls", "launches", "moves", "GB/s", "of it", "Gop/s", "roof", "kernel", "of"
    );
    for k in &step.kernels {
        text += &format!(
            "{:>10} {:>5.1}% {:10} {:>5} {:>8} {:>10} {:>9.1} {:>4.0}% {:>9} {:>4.0}%  {:16} {}\n{:>18} {}: {}\n",
            Micros(k.us),
            100.0 * k.share,
            bar(k.share),
            k.calls,
            k.launches,
            size(k.bytes),
            k.gbs,
            100.0 * k.bandwidth_share,
            if k.operations > 0 { format!("{:.0}", k.gops) } else { String::new() },
            100.0 * k.roofline_share,
            k.kernel,
            k.node,
            "",
            k.limit,
            k.verdict,
        );
    }
    text
}

fn of_nodes(step: &Step) -> String {
    let mut text = format!(
        "{:>6} {:>6} {:>10} {:>6} {:>8} {:>10} {:>9}  {:16} {}\n",
        "call", "stream", "time", "share", "launches", "moves", "GB/s", "kernel", "of"
    );
    let all: f64 = step.nodes.iter().map(|node| node.us).sum();
    for n in &step.nodes {
        text += &format!(
            "{:>6} {:>6} {:>10} {:>5.1}% {:>8} {:>10} {:>9.1}  {:16} {}\n",
            n.call,
            n.stream,
            Micros(n.us),
            100.0 * n.us / all.max(f64::MIN_POSITIVE),
            n.launches,
            size(n.bytes),
            n.gbs,
            n.kernel,
            n.node,
        );
    }
    text
}
