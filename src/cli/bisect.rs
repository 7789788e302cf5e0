//! `sinter opt --bisect`: a command judges graphs until the one rewrite is found that breaks it.

use super::say;
use sinter::ir::Graph;
use sinter::passes::Pipeline;
use sinter::passes::bisect::{Culprit, bisect};
use sinter::target::Target;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

/// Lines of a difference that are shown; whole graphs can be had by their fuel.
const SHOWN: usize = 40;

pub fn run(graph: &Graph, pipeline: &Pipeline, target: &Target, command: &str) -> super::Outcome {
    if command.trim().is_empty() {
        return Err("--bisect takes a command".into());
    }
    let dir = tempfile::tempdir().map_err(|e| format!("no folder for the graphs: {e}"))?;
    let file = dir.path().join("graph.sir");
    let mut runs = 0;
    let found = bisect(graph, pipeline, target, &mut |rewrites, graph| {
        runs += 1;
        is_good(rewrites, graph, command, &file)
    })?;
    std::io::stdout().lock().write_all(told(&found, runs).as_bytes())?;
    Ok(())
}

/// Runs the command on a graph.
fn is_good(rewrites: u64, graph: &Graph, command: &str, file: &Path) -> Result<bool, String> {
    let cannot = |e| format!("cannot hand a graph over in {}: {e}", file.display());
    std::fs::write(file, format!("{graph}\n")).map_err(cannot)?;
    let path = file.to_str().ok_or_else(|| format!("{} is no UTF-8", file.display()))?;
    let line = command.replace("{}", &quoted(path));
    let status = Command::new("sh")
        .args(["-c", &line])
        .env("SINTER_FUEL", rewrites.to_string())
        // A file, so that a command need not read it.
        .stdin(File::open(file).map_err(cannot)?)
        .stdout(std::io::stderr())
        .status()
        .map_err(|e| format!("cannot start sh, which runs the command: {e}"))?;
    // By these sh says that it found nothing to run.
    if let Some(code @ (126 | 127)) = status.code() {
        return Err(format!("sh cannot run the command (exit status {code}): {line}"));
    }
    let verdict = if status.success() { "good".into() } else { format!("bad ({status})") };
    say!("--fuel {rewrites}: {verdict}");
    Ok(status.success())
}

/// A path as one word of sh.
fn quoted(path: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
    if path.chars().all(plain) { path.into() } else { format!("'{}'", path.replace('\'', "'\\''")) }
}

fn told(found: &Culprit, runs: u64) -> String {
    let Culprit { number, of, pass, at, .. } = found;
    let good = number - 1;
    let mut text = format!("rewrite {number} of {of} breaks it: {pass} at {at}\n");
    let list = |ops: &[String]| if ops.is_empty() { "nothing".into() } else { ops.join(", ") };
    if found.dropped.is_empty() && found.added.is_empty() {
        text += "  takes out and adds nothing, but moves uses\n";
    } else {
        text += &format!("  {} -> {}\n", list(&found.dropped), list(&found.added));
    }
    text += &format!("  good: --fuel {good}, bad: --fuel {number}; the command ran {runs} times\n\n");
    for line in found.diff.iter().take(SHOWN) {
        text += &format!("{line}\n");
    }
    if found.diff.len() > SHOWN {
        text += &format!("… and {} lines more\n", found.diff.len() - SHOWN);
    }
    if let Some(broken) = &found.broken {
        text += &format!("\nthe graph itself is broken: {broken}\n");
    }
    text
}
