//! One sequence and its text: prompts, generation and scoring.

use super::{Sampler, SamplingError};
use crate::plan::Output;
use crate::runtime::{BatchError, Executor, Part, SequenceId, Sequences, Stage, Wanted};
use std::ops::ControlFlow;

/// What can go wrong while generating.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Batch(#[from] BatchError),
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    #[error("the prompt has no tokens, and the model has no start token")]
    Empty,
    #[error(
        "{tokens} tokens do not fit a context of {context}; give a larger one with -c, or a shorter prompt"
    )]
    TooLong { tokens: u64, context: u64 },
    #[error("token {token} is not below {below}, the size of the vocabulary")]
    Token { token: u32, below: u64 },
    #[error(
        "the plan was compiled for greedy decoding, which returns no logits; use --temp 0 or compile it again"
    )]
    GreedyPlan,
    #[error(
        "the model's logits are not numbers (NaN); --kv f32 helps if values are too large for an f16 cache"
    )]
    Nan,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model ended its text.
    End,
    /// As many tokens as were asked for.
    Count,
    /// The context is full.
    Context,
    /// The caller had enough.
    Caller,
}

/// One sequence over an executor, and its text.
///
/// A text grows from call to call, until [`Session::reset`]. The last token that [`Session::generate`] handed over is not in the
/// cache yet, for a step is wasted on it if nothing follows; whatever is read next, it is read first. So a text in turns is the
/// same as the text at once:
///
/// ```
/// # use sinter::compile::{Options, Purpose};
/// # use sinter::generate::{Sampler, Sampling};
/// # use sinter::{model, target::Target};
/// # use std::ops::ControlFlow;
/// # let file = std::sync::Arc::new(model::embedded()?);
/// # let options = Options::new(Target::cpu());
/// # let mut session = model::session(&file, None, &options, Purpose::Generate, &Default::default())?;
/// # let mut sampler = Sampler::new(Sampling::greedy())?;
/// session.generate(&[0, 33], 3, &mut sampler, |_| false, |_| ControlFlow::Continue(()))?;
/// assert_eq!((session.text().len(), session.filled()), (5, 4));
/// session.generate(&[280], 2, &mut sampler, |_| false, |_| ControlFlow::Continue(()))?;
/// assert_eq!((session.text().len(), session.filled()), (8, 7));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Session {
    sequences: Sequences,
    sequence: SequenceId,
    /// What is in the cache, then the token that is not yet, if there is one.
    text: Vec<u32>,
    filled: usize,
}

impl Session {
    /// An empty text.
    ///
    /// # Errors
    /// If the plan has no room for a sequence.
    pub fn new(executor: Executor) -> Result<Session, SessionError> {
        let mut sequences = Sequences::new(executor)?;
        let sequence = sequences.begin()?;
        Ok(Session { sequences, sequence, text: vec![], filled: 0 })
    }

    /// The executor underneath.
    pub fn executor(&self) -> &Executor {
        self.sequences.executor()
    }

    /// All tokens that were read or handed over, in order. A token that ended the text is not among them.
    pub fn text(&self) -> &[u32] {
        &self.text
    }

    /// Tokens in the cache: those of [`Session::text`], but for a last one that was handed over and not read yet.
    pub fn filled(&self) -> u64 {
        self.filled as u64
    }

    /// Tokens that fit the cache.
    pub fn context(&self) -> u64 {
        self.sequences.context()
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// If the device fails.
    pub fn reset(&mut self) -> Result<(), SessionError> {
        self.truncate(0)
    }

    /// Forgets all tokens but the first `to`, if there are more.
    ///
    /// # Errors
    /// If the model's states keep nothing of what they were, its window has left behind what the rest would see, or the device
    /// fails.
    pub fn truncate(&mut self, to: usize) -> Result<(), SessionError> {
        self.sequences.truncate(self.sequence, to.min(self.filled) as u64)?;
        self.text.truncate(to);
        self.filled = self.filled.min(to);
        Ok(())
    }

    /// Reads tokens that follow those in the cache.
    fn step(&mut self, tokens: &[u32], wanted: Wanted, output: Output) -> Result<(), SessionError> {
        let part = Part { sequence: self.sequence, tokens, wanted };
        self.sequences.step(&[part], output)?;
        self.text.truncate(self.filled);
        self.text.extend_from_slice(tokens);
        self.filled = self.text.len();
        Ok(())
    }

    /// Tells how much is read of a prompt of several chunks, of which the last had so many tokens. What is told is done, so it is
    /// waited for if somebody is told.
    fn tell(&mut self, read: usize, chunk: usize, all: usize) -> Result<(), SessionError> {
        let progress = self.executor().progress().clone();
        if progress.is_watched() && chunk < all {
            self.sequences.wait()?;
            progress.tell(Stage::Prompt, read as u64, all as u64);
        }
        Ok(())
    }

    /// What is to be read when `tokens` follow the text, if it fits.
    fn unread(&self, tokens: &[u32]) -> Result<Vec<u32>, SessionError> {
        let unread = [&self.text[self.filled..], tokens].concat();
        let (tokens, context) = ((self.filled + unread.len()) as u64, self.context());
        if tokens > context { Err(SessionError::TooLong { tokens, context }) } else { Ok(unread) }
    }

    /// Reads a prompt in chunks; the head is computed for its last token only.
    ///
    /// # Errors
    /// Nothing to read, or more than fits the context, of which nothing is read then.
    pub fn prompt(&mut self, tokens: &[u32]) -> Result<(), SessionError> {
        let unread = self.unread(tokens)?;
        let output = self.executor().plan().output();
        let chunk = self.executor().plan().largest(output).t.max(1) as usize;
        let mut chunks = unread.chunks(chunk).peekable();
        if chunks.peek().is_none() {
            return Err(SessionError::Empty);
        }
        let mut read = 0;
        while let Some(chunk) = chunks.next() {
            let wanted = if chunks.peek().is_some() { Wanted::None } else { Wanted::Last };
            self.step(chunk, wanted, output)?;
            read += chunk.len();
            self.tell(read, chunk.len(), unread.len())?;
        }
        Ok(())
    }

    /// The token after those read so far: the plan's own choice, or the sampler's from the logits.
    fn choose(&mut self, sampler: &mut Sampler) -> Result<u32, SessionError> {
        if self.executor().plan().output() == Output::Token {
            if !sampler.is_greedy() {
                return Err(SessionError::GreedyPlan);
            }
            let token = self.sequences.best_tokens()?.last().copied().unwrap_or(0);
            return u32::try_from(token).map_err(|_| SessionError::Nan);
        }
        let wanted = self.sequences.last_rows().wanted.len();
        let logits = self.sequences.view_logits(wanted.saturating_sub(1)..wanted)?;
        Ok(sampler.sample(logits, &self.text)?)
    }

    /// Reads `prompt`, then generates up to `count` tokens and hands each to `on_token`. When the context is full, one token
    /// more is handed over, since what follows the last token that fits needs no room.
    ///
    /// `is_end` tells which tokens end a text; they are not handed over.
    ///
    /// # Errors
    /// See [`SessionError`]; what was handed over until then stands.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        count: usize,
        sampler: &mut Sampler,
        is_end: impl Fn(u32) -> bool,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Stop, SessionError> {
        self.prompt(prompt)?;
        for n in 0..count {
            if n > 0 {
                if self.filled() >= self.context() {
                    return Ok(Stop::Context);
                }
                let last = self.unread(&[])?;
                self.step(&last, Wanted::Last, self.executor().plan().output())?;
            }
            let token = self.choose(sampler)?;
            if is_end(token) {
                return Ok(Stop::End);
            }
            self.text.push(token);
            if on_token(token).is_break() {
                return Ok(Stop::Caller);
            }
        }
        Ok(Stop::Count)
    }

    /// Reads `tokens` and hands over the logits of each, `[vocabulary]`, in order.
    ///
    /// # Errors
    /// More tokens than fit the context, of which none is read then; a plan that returns no logits.
    pub fn score(
        &mut self,
        tokens: &[u32],
        mut on_row: impl FnMut(usize, &[f32]),
    ) -> Result<(), SessionError> {
        let unread = self.unread(tokens)?;
        let before = unread.len() - tokens.len();
        let mut read = 0;
        // As many rows as a step may take and give.
        let most = self.executor().plan().largest(Output::Logits);
        if most.r == 0 {
            return Err(SessionError::GreedyPlan);
        }
        for chunk in unread.chunks(most.t.min(most.r).max(1) as usize) {
            self.step(chunk, Wanted::All, Output::Logits)?;
            for row in 0..chunk.len() {
                if read >= before {
                    on_row(read - before, self.sequences.view_logits(row..row + 1)?);
                }
                read += 1;
            }
            self.tell(read, chunk.len(), unread.len())?;
        }
        Ok(())
    }
}
