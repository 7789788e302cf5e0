//! A loaded plan with its position in the cache: prompts, generation and scoring.

use super::{Sampler, SamplingError};
use crate::runtime::{ExecError, Executor};
use std::ops::ControlFlow;

/// What can go wrong while generating.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    #[error("the prompt has no tokens, and the model has no start token")]
    Empty,
    #[error(
        "{tokens} tokens do not fit a context of {context}; give a larger one with -c, or a shorter prompt"
    )]
    TooLong { tokens: u64, context: u64 },
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

/// An executor and how much of its cache is filled.
pub struct Session {
    executor: Executor,
    filled: u64,
    /// The sampler changes its logits; kept between tokens for its allocation.
    logits: Vec<f32>,
}

impl Session {
    pub fn new(executor: Executor) -> Session {
        Session { executor, filled: 0, logits: vec![] }
    }

    /// The executor underneath.
    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    /// Tokens in the cache.
    pub fn filled(&self) -> u64 {
        self.filled
    }

    /// Tokens that fit the cache.
    pub fn context(&self) -> u64 {
        self.executor.plan().options.context
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// If the device fails.
    pub fn reset(&mut self) -> Result<(), SessionError> {
        self.filled = 0;
        Ok(self.executor.reset()?)
    }

    fn step(&mut self, program: &str, tokens: &[u32]) -> Result<(), SessionError> {
        let ids: Vec<i32> = tokens.iter().map(|&id| i32::try_from(id).unwrap_or(i32::MAX)).collect();
        self.executor.forward(program, &ids, self.filled)?;
        self.filled += tokens.len() as u64;
        Ok(())
    }

    fn fits(&self, tokens: usize) -> Result<(), SessionError> {
        let tokens = self.filled.saturating_add(tokens as u64);
        let context = self.context();
        if tokens > context { Err(SessionError::TooLong { tokens, context }) } else { Ok(()) }
    }

    fn chunk(&self) -> usize {
        usize::try_from(self.executor.plan().options.chunk).unwrap_or(usize::MAX).max(1)
    }

    /// Reads a prompt in chunks; the head is computed for its last token only.
    ///
    /// # Errors
    /// An empty prompt, or one that does not fit the context.
    pub fn prompt(&mut self, tokens: &[u32]) -> Result<(), SessionError> {
        self.fits(tokens.len())?;
        let mut chunks = tokens.chunks(self.chunk()).peekable();
        if chunks.peek().is_none() {
            return Err(SessionError::Empty);
        }
        while let Some(chunk) = chunks.next() {
            self.step(if chunks.peek().is_some() { "chunk" } else { "prefill" }, chunk)?;
        }
        Ok(())
    }

    /// The token after those read so far: the plan's own choice, or the sampler's from the logits.
    fn choose(&mut self, sampler: &mut Sampler, history: &[u32]) -> Result<u32, SessionError> {
        if self.executor.plan().options.greedy {
            if !sampler.is_greedy() {
                return Err(SessionError::GreedyPlan);
            }
            let token = self.executor.result_i32(0)?.last().copied().unwrap_or(0);
            return u32::try_from(token).map_err(|_| SessionError::Nan);
        }
        self.logits.clear();
        self.logits.extend_from_slice(self.executor.result_f32(0)?);
        Ok(sampler.sample(&mut self.logits, history)?)
    }

    /// Reads `prompt`, then generates up to `count` tokens and hands each to `on_token`.
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
        let mut history = prompt.to_vec();
        for n in 0..count {
            if n > 0 {
                if self.filled >= self.context() {
                    return Ok(Stop::Context);
                }
                let last = [history[history.len() - 1]];
                self.step("decode", &last)?;
            }
            let token = self.choose(sampler, &history)?;
            if is_end(token) {
                return Ok(Stop::End);
            }
            history.push(token);
            if on_token(token).is_break() {
                return Ok(Stop::Caller);
            }
        }
        Ok(Stop::Count)
    }

    /// Reads `tokens` and hands over the logits of each, `[vocabulary]`, in order.
    ///
    /// # Errors
    /// More tokens than fit the context.
    pub fn score(
        &mut self,
        tokens: &[u32],
        mut on_row: impl FnMut(usize, &[f32]),
    ) -> Result<(), SessionError> {
        self.fits(tokens.len())?;
        let mut row = 0;
        for chunk in tokens.chunks(self.chunk()) {
            self.step("score", chunk)?;
            let logits = self.executor.result_f32(0)?;
            for logits in logits.chunks_exact(logits.len() / chunk.len()) {
                on_row(row, logits);
                row += 1;
            }
        }
        Ok(())
    }
}
