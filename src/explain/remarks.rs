//! Remarks as LLVM's compilers write them (`-fsave-optimization-record`), for the tools that read those.

use crate::ir::{Micros, Outcome, Report};

/// A YAML stream of remarks: `!Passed` for each fusion, `!Missed` for each that was not made, `!Analysis` for each final kernel.
///
/// Format: `llvm/lib/Remarks/YAMLRemarkSerializer.cpp`: `Pass`, `Name`, `DebugLoc`, `Function`, then `Args`, of which each is one key and
/// a string. LLVM's viewers leave out what has no place in a source, so that is the graph by name, and as its line the number of the node
/// (see [`crate::ir::Graph::number`]).
pub fn remarks(reports: &[Report]) -> String {
    let mut yaml = String::new();
    for report in reports {
        for d in &report.decisions {
            let (kind, name, args) = match &d.outcome {
                Outcome::Fired { kernel, replaced, gain } => (
                    "Passed",
                    "Fused",
                    vec![
                        ("String", "fused ".to_string()),
                        ("Replaced", replaced.join(", ")),
                        ("String", " into ".into()),
                        ("Kernel", kernel.name().into()),
                        ("String", ", in ".into()),
                        ("FusedTime", Micros(gain.fused_us).to_string()),
                        ("String", " instead of ".into()),
                        ("UnfusedTime", Micros(gain.unfused_us).to_string()),
                    ],
                ),
                Outcome::Rewritten { replaced, added } => (
                    "Passed",
                    "Rewritten",
                    vec![
                        ("Replaced", replaced.join(", ")),
                        ("String", " became ".to_string()),
                        ("Added", if added.is_empty() { "nothing".into() } else { added.join(", ") }),
                    ],
                ),
                Outcome::Rejected { why } => (
                    "Missed",
                    why.name(),
                    vec![("String", "not fused: ".to_string()), ("Why", why.to_string())],
                ),
            };
            let line = d.makes.first().or(d.takes.first()).copied().unwrap_or_default();
            entry(&mut yaml, [kind, &d.pass, name, &report.graph, &d.at], line, &args);
        }
        for kernel in &report.kernels {
            let args = [
                ("Kernel", kernel.kernel.clone()),
                ("String", ": ".into()),
                ("Time", Micros(kernel.us).to_string()),
                ("String", ", ".into()),
                ("Bytes", kernel.bytes.to_string()),
                ("String", " bytes, limited by ".into()),
                ("Limit", kernel.limit.to_string()),
            ];
            let words = ["Analysis", "cost", "Kernel", &report.graph, &kernel.at];
            entry(&mut yaml, words, kernel.number, &args);
        }
    }
    yaml
}

fn entry(yaml: &mut String, [kind, pass, name, graph, node]: [&str; 5], line: u64, args: &[(&str, String)]) {
    *yaml += &format!("--- !{kind}\n");
    let line = format!("{{ File: {}, Line: {line}, Column: 0 }}", quoted(graph));
    let texts =
        [("Pass", quoted(pass)), ("Name", quoted(name)), ("DebugLoc", line), ("Function", quoted(graph))];
    for (key, value) in texts {
        *yaml += &format!("{:17}{value}\n", format!("{key}:"));
    }
    *yaml += "Args:\n";
    let node = [("Node", node.to_string()), ("String", ": ".into())];
    for (key, value) in node.iter().chain(args) {
        *yaml += &format!("  - {:17}{}\n", format!("{key}:"), quoted(value));
    }
    *yaml += "...\n";
}

/// A scalar in single quotes; in double quotes where it holds what those cannot.
fn quoted(text: &str) -> String {
    match text.chars().any(char::is_control) {
        false => format!("'{}'", text.replace('\'', "''")),
        // Strings of JSON are scalars of YAML.
        true => serde_json::Value::from(text).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_are_quoted() {
        assert_eq!(quoted("it's: #1"), "'it''s: #1'");
        assert_eq!(quoted("a\nb\u{1}"), "\"a\\nb\\u0001\"");
    }
}
