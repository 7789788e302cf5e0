//! The profilers of GPUs' makers: how to run this profile under them, and how to read what they wrote.

use sinter::target::{Target, TargetKind};
use std::borrow::Cow;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Options that say what becomes of a profile, and whether a value follows.
const OUTPUT: [(&str, bool); 6] = [
    ("--commands", false),
    ("--json", false),
    ("--nodes", false),
    ("--trace", true),
    ("--roofline", true),
    ("--import", true),
];

/// Lines to run, for a plan of this target, and what reads their files; `given` is the command line of this profile.
pub fn commands(given: &[String], target: &Target) -> Result<String, Error> {
    let again = without(given, &OUTPUT);
    // The GPU says which target it is, and which of a plan's.
    let mut run = without(&again, &[("--target", true)]);
    for (flag, value) in [("--device", Some("hip")), ("--no-graph", None)] {
        if !has(&run, flag) {
            run.extend([Some(flag), value].into_iter().flatten().map(String::from));
        }
    }
    let mut read =
        without(&again, &[("--device", true), ("--no-graph", false), ("-t", true), ("--threads", true)]);
    if !has(&read, "--target") {
        read.extend(["--target".into(), target.name.clone()]);
    }
    let once = if has(&run, "-r") || has(&run, "--repetitions") { "" } else { " -r 1" };
    let (run, read) = (line(&run), line(&read));
    let reads = |file: &str| format!("{read} --import {file}\n");
    match target.kind {
        TargetKind::Cpu => Err(not_a_gpu(&target.name)),
        TargetKind::HipAmd => Ok(format!(
            "# ROCm 6.2 and later\n\
             rocprofv3 --kernel-trace --output-format csv -d . -o sinter -- {run}\n{}\n\
             # before\n\
             rocprof --timestamp on -o sinter.csv {run}\n{}",
            reads("sinter_kernel_trace.csv"),
            reads("sinter.csv"),
        )),
        TargetKind::HipNvidia => Ok(format!(
            "ncu --csv --page raw --metrics gpu__time_duration.sum --clock-control none --log-file sinter.csv {run}{once}\n{}",
            reads("sinter.csv"),
        )),
    }
}

/// Where there is nothing that they see.
pub fn not_a_gpu(target: &str) -> Error {
    format!(
        "the target is {target}, and rocprofv3, rocprof and ncu see kernels of GPUs; give --target gfx1100 or sm_90, say, or a plan for one"
    )
    .into()
}

/// The words of a command line but these options.
fn without(words: &[String], options: &[(&str, bool)]) -> Vec<String> {
    let (mut kept, mut skip) = (vec![], false);
    for word in words {
        if std::mem::take(&mut skip) {
            continue;
        }
        match options.iter().find(|(flag, _)| word == flag) {
            Some((_, value)) => skip = *value,
            None if options.iter().any(|(flag, value)| *value && is_value_of(word, flag)) => {}
            None => kept.push(word.clone()),
        }
    }
    kept
}

fn has(words: &[String], flag: &str) -> bool {
    words.iter().any(|word| word == flag || is_value_of(word, flag))
}

/// Whether a word is an option with its value: `--trace=x`, `-r5`.
fn is_value_of(word: &str, flag: &str) -> bool {
    let rest = word.strip_prefix(flag).unwrap_or_default();
    if flag.starts_with("--") { rest.starts_with('=') } else { !rest.is_empty() }
}

/// Words as a shell takes them.
fn line(words: &[String]) -> String {
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into();
    }
    format!("'{}'", word.replace('\'', r"'\''")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &[&str]) -> Vec<String> {
        text.iter().map(|word| word.to_string()).collect()
    }

    #[test]
    fn a_line_is_this_one_under_a_profiler() {
        let given = words(&[
            "sinter",
            "profile",
            "my model's.gguf",
            "-p",
            "0",
            "--target",
            "gfx1100",
            "--commands",
            "--trace=x",
        ]);
        let said = commands(&given, &Target::gpu("gfx1100").unwrap()).unwrap();
        let run = r"sinter profile 'my model'\''s.gguf' -p 0 --device hip --no-graph";
        assert!(
            said.contains(&format!("rocprofv3 --kernel-trace --output-format csv -d . -o sinter -- {run}\n")),
            "{said}"
        );
        assert!(said.contains(&format!("rocprof --timestamp on -o sinter.csv {run}\n")), "{said}");
        let read = r"sinter profile 'my model'\''s.gguf' -p 0 --target gfx1100 --import sinter.csv";
        assert!(said.ends_with(&format!("{read}\n")), "{said}");

        let given =
            words(&["sinter", "profile", "a.plan", "--commands", "--nodes", "--device", "hip:1", "--json"]);
        let said = commands(&given, &Target::gpu("sm_90").unwrap()).unwrap();
        assert!(
            said.contains("--log-file sinter.csv sinter profile a.plan --device hip:1 --no-graph -r 1\n"),
            "{said}"
        );
        assert!(said.ends_with("\nsinter profile a.plan --target sm_90 --import sinter.csv\n"), "{said}");
        let given = words(&["sinter", "profile", "-r5", "--trace", "t.json"]);
        let said = commands(&given, &Target::gpu("sm_90").unwrap()).unwrap();
        assert!(said.contains(" sinter profile -r5 --device hip --no-graph\n"), "{said}");
        assert!(commands(&given, &Target::cpu()).unwrap_err().to_string().contains("the target is cpu"));
    }
}
