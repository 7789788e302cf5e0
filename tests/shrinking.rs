//! A model file that shrinks while it is mapped: the process ends in a sentence, not in a SIGBUS.
#![cfg(unix)]

mod support;

use sinter::gguf::{GgufFile, exit_when_a_file_shrinks};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use support::model_path;
use tempfile::TempDir;

/// Set in a process that a test starts of itself: the model that it works with.
const MODEL: &str = "SINTER_TEST_MODEL";

/// A copy of the model in a folder of its own.
fn copy() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::copy(model_path("q4_k_m"), &path).unwrap();
    (dir, path)
}

fn truncate(path: &Path) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap();
}

fn sentence(path: &Path) -> String {
    let why = "the file became shorter while it was in use, or its disk failed";
    format!("error: {}: {why}; leave a model as it is while it runs\n", path.display())
}

fn sinter(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sinter"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// How the command ends, and the last line that it says, if `model` is truncated once it has decoded a token.
///
/// It logs every step to a pipe that holds some hundred of them and is read only afterwards, so it cannot end before.
fn truncated(model: &Path, args: &[&str]) -> (ExitStatus, String) {
    let mut child = sinter(args).env("SINTER_LOG", "sinter::runtime=trace").spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !(said.contains("step{") && said.contains("t=1 r=1")) {
        said.clear();
        assert_ne!(lines.read_line(&mut said).unwrap(), 0, "it ended before it decoded");
    }
    truncate(model);
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    let last = rest.split_inclusive('\n').next_back().unwrap_or_default();
    (child.wait().unwrap(), last.to_string())
}

#[test]
fn a_model_that_shrinks_while_it_runs_ends_in_a_sentence() {
    let (_dir, model) = copy();
    let path = model.to_str().unwrap();
    let (status, said) =
        truncated(&model, &["bench", path, "-p", "0", "-n", "1500", "-r", "1", "--no-bandwidth"]);
    assert_eq!((status.code(), said), (Some(1), sentence(&model)));

    let (_dir, model) = copy();
    let args = ["run", model.to_str().unwrap(), "--temp", "0", "-n", "-1", "-c", "2048"];
    let (status, said) = truncated(&model, &args);
    assert_eq!((status.code(), said), (Some(1), sentence(&model)));
}

#[test]
fn a_plan_whose_model_shrinks_ends_in_a_sentence() {
    let (dir, model) = copy();
    let plan = dir.path().join("model.plan");
    let (path, plan) = (model.to_str().unwrap(), plan.to_str().unwrap());
    assert!(sinter(&["compile", path, "-c", "2048", "-o", plan]).status().unwrap().success());
    let (status, said) = truncated(&model, &["run", plan, "--temp", "0", "-n", "-1"]);
    assert_eq!((status.code(), said), (Some(1), sentence(&model)));
}

/// How a process of its own ends that does `work` with a model, what it says, and the model. The process runs the test of
/// this name once more, and finds itself here.
fn alone(test: &str, work: fn(&Path)) -> (ExitStatus, String, PathBuf) {
    if let Some(model) = std::env::var_os(MODEL) {
        work(model.as_ref());
        std::process::exit(0);
    }
    let (_dir, model) = copy();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", test, "--nocapture"]).env(MODEL, &model).output().unwrap();
    (output.status, String::from_utf8(output.stderr).unwrap(), model)
}

/// Truncates a file and reads what was its first byte.
fn read_truncated(bytes: &[u8], path: &Path) {
    truncate(path);
    std::hint::black_box(std::hint::black_box(bytes)[0]);
}

#[test]
fn a_program_that_asks_for_it_has_the_sentence_too() {
    let (status, said, model) = alone("a_program_that_asks_for_it_has_the_sentence_too", |model| {
        exit_when_a_file_shrinks().unwrap();
        // A map that is gone, and two that are there.
        drop(GgufFile::open(model).unwrap());
        let _first = GgufFile::open(model).unwrap();
        read_truncated(GgufFile::open(model).unwrap().bytes(), model);
    });
    assert_eq!((status.code(), said), (Some(1), sentence(&model)));
}

#[test]
fn a_program_that_does_not_ask_is_left_alone() {
    let (status, said, _) = alone("a_program_that_does_not_ask_is_left_alone", |model| {
        read_truncated(GgufFile::open(model).unwrap().bytes(), model);
    });
    assert_eq!((status.signal(), said.as_str()), (Some(libc::SIGBUS), ""));
}

/// Has a handler of the program's own, then ours, and a model open that nobody touches.
fn own_handler(model: &Path) -> GgufFile {
    extern "C" fn own(_: libc::c_int) {
        // SAFETY: it takes any status and does not return.
        unsafe { libc::_exit(33) }
    }
    // SAFETY: the handler has the signature that `signal` wants, and does nothing but exit.
    unsafe { libc::signal(libc::SIGBUS, own as extern "C" fn(_) as libc::sighandler_t) };
    exit_when_a_file_shrinks().unwrap();
    GgufFile::open(model).unwrap()
}

#[test]
fn the_loss_of_another_file_goes_where_it_went_before() {
    let (status, said, _) = alone("the_loss_of_another_file_goes_where_it_went_before", |model| {
        let _model = own_handler(model);
        let other = model.with_file_name("other");
        fs::copy(model, &other).unwrap();
        // It is mapped where another model was.
        drop(GgufFile::open(model).unwrap());
        // SAFETY: read as bytes only, and that it shrinks is the point.
        let map = unsafe { memmap2::Mmap::map(&File::open(&other).unwrap()) }.unwrap();
        read_truncated(&map, &other);
    });
    assert_eq!((status.code(), said.as_str()), (Some(33), ""), "{status}");
}

#[test]
fn a_sigbus_that_is_sent_goes_where_it_went_before() {
    let (status, said, _) = alone("a_sigbus_that_is_sent_goes_where_it_went_before", |model| {
        let _model = own_handler(model);
        // SAFETY: a signal to this thread, for which there is a handler.
        unsafe { libc::raise(libc::SIGBUS) };
    });
    assert_eq!((status.code(), said.as_str()), (Some(33), ""), "{status}");
}
