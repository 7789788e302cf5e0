//! The `sinter` command as people run it.

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};

pub fn sinter() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sinter"));
    command
        .env_remove("SINTER_LOG")
        .env("SINTER_TUNED", "off")
        .stdin(Stdio::null())
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

pub fn run<S: AsRef<OsStr>>(args: &[S]) -> Output {
    sinter().args(args).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What a command that succeeded printed to stdout and to stderr.
#[track_caller]
pub fn said(output: &Output) -> (String, String) {
    assert!(output.status.success(), "{}", text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

/// What a command prints that succeeds.
#[track_caller]
pub fn stdout<S: AsRef<OsStr>>(args: &[S]) -> String {
    said(&run(args)).0
}

/// What a command said that failed: one report, and no panic.
#[track_caller]
pub fn report(output: &Output) -> String {
    let said = text(&output.stderr);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{:?}: {said}", output.status);
    assert_eq!(said.matches("error:").count(), 1, "{said}");
    assert!(said.starts_with("error: "), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

#[track_caller]
pub fn fails<S: AsRef<OsStr>>(args: &[S], with: &str) {
    let said = report(&run(args));
    assert!(said.contains(with), "{said}");
}
