//! Bars on stderr while something takes long: where that is a terminal, and gone when it is done.

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use sinter::runtime::{Progress, Stage};
use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};

/// A bar for each stage, after the other; nothing if stderr is no terminal.
pub fn bars() -> Progress {
    if !std::io::stderr().is_terminal() {
        return Progress::default();
    }
    let shown: Mutex<Option<(Stage, ProgressBar)>> = Mutex::new(None);
    Progress::to(move |stage, done, all| {
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        if done >= all {
            // A bar that goes is taken off the screen, as it is where a stage fails.
            *shown = None;
            return;
        }
        match &*shown {
            Some((of, bar)) if *of == stage => bar.set_position(done),
            _ => *shown = Some((stage, bar(stage, all))),
        }
    })
}

fn bar(stage: Stage, all: u64) -> ProgressBar {
    let (what, count) = match stage {
        Stage::Kernels => ("compiling kernels", "{pos} of {len}"),
        Stage::Weights => ("loading weights", "{decimal_bytes} of {decimal_total_bytes}"),
        Stage::Interpreted => ("interpreting the unfused graph", "{pos} of {len} operations"),
        Stage::Checked => ("checking kernels", "{pos} of {len} nodes"),
        Stage::LeftOut => ("timing steps without each pass", "{pos} of {len} passes"),
        Stage::Prompt => ("reading the prompt", "{pos} of {len} tokens"),
    };
    let style = ProgressStyle::with_template(&format!("{what} [{{bar:30}}] {count}"));
    // The templates are well-formed, and the usual style does where they are not.
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
    ProgressBar::new(all).with_style(style).with_finish(ProgressFinish::AndClear)
}
