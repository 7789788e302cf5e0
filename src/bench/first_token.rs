//! The way to the first token of an answer, part by part.

use super::{Bench, BenchError};
use crate::generate::greedy;
use crate::plan::Output;
use crate::runtime::{Part, Transfer, Wanted};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// What passed from a prompt to the first token after it. The parts do not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstToken {
    /// In which the prompt was read.
    pub steps: u64,
    /// The inputs of those.
    pub upload: Transfer,
    /// Until the last was over, but for the upload.
    pub prefill: Duration,
    /// The logits of the last token.
    pub download: Transfer,
    /// Finding the best of them.
    pub choose: Duration,
}

impl Bench {
    /// Reads a prompt into a new sequence, and finds the token after it. Right after loading it is cold, as where a person waits for it.
    ///
    /// # Errors
    /// If the prompt is empty or does not fit, the plan returns no logits, or the device fails.
    pub fn first_token(&mut self, prompt: &[u32]) -> Result<FirstToken, BenchError> {
        let before = self.executor().uploads();
        let start = Instant::now();
        let sequence = self.sequences.begin()?;
        let mut chunks = prompt.chunks(self.chunk()).peekable();
        let mut steps = 0;
        while let Some(tokens) = chunks.next() {
            let wanted = if chunks.peek().is_some() { Wanted::None } else { Wanted::Last };
            self.sequences.step(&[Part { sequence, tokens, wanted }], Output::Logits)?;
            steps += 1;
        }
        self.sequences.wait()?;
        let read = start.elapsed();
        let after = self.executor().uploads();
        let upload = Transfer { bytes: after.bytes - before.bytes, time: after.time - before.time };
        let start = Instant::now();
        let logits = self.sequences.view_logits(0..1)?;
        let download = Transfer { bytes: size_of_val(logits) as u64, time: start.elapsed() };
        let start = Instant::now();
        // Of weights that are no model's there may be none.
        black_box(greedy(logits));
        let choose = start.elapsed();
        self.sequences.end(sequence)?;
        Ok(FirstToken { steps, upload, prefill: read.saturating_sub(upload.time), download, choose })
    }
}
