//! Many texts at once: requests are admitted, batched step by step, and finished.

use super::{Sampler, SessionError, Stop};
use crate::plan::Output;
use crate::runtime::{BatchError, Executor, Part, SequenceId, Sequences, Wanted};
use std::collections::VecDeque;

/// A text to generate.
pub struct Request {
    pub prompt: Vec<u32>,
    /// Tokens to generate at most.
    pub count: usize,
    pub sampler: Sampler,
}

/// The number of a request, in the order they were submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u64);

/// What a step gave.
#[derive(Debug)]
pub enum Event {
    /// The next token of a text.
    Token { request: RequestId, token: u32 },
    /// A text that goes on no further.
    Finished { request: RequestId, stop: Stop },
    /// A text that cannot go on.
    Failed { request: RequestId, why: SessionError },
}

/// A request that runs.
struct Running {
    request: RequestId,
    sequence: SequenceId,
    /// Prompt and generated tokens.
    text: Vec<u32>,
    /// Those of them that are in the caches.
    read: usize,
    /// Tokens still to generate.
    left: usize,
    sampler: Sampler,
    /// Pages that it may come to need.
    pages: u64,
}

/// Sequences and the requests that they serve.
///
/// A step takes one token of every text that is being generated, and fills what is left of it with chunks of prompts, in
/// the order they came. A request is admitted when the pages that it may come to need are free, so that none that runs ever
/// has to wait for pages.
pub struct Scheduler {
    sequences: Sequences,
    waiting: VecDeque<(RequestId, Request)>,
    running: Vec<Running>,
    next: u64,
}

impl Scheduler {
    /// # Errors
    /// If the plan's kernels do not agree on the pages of the caches.
    pub fn new(executor: Executor) -> Result<Scheduler, BatchError> {
        let sequences = Sequences::new(executor)?;
        Ok(Scheduler { sequences, waiting: VecDeque::new(), running: vec![], next: 0 })
    }

    /// The sequences underneath.
    pub fn sequences(&self) -> &Sequences {
        &self.sequences
    }

    /// For tests that look at pages.
    #[doc(hidden)]
    pub fn sequences_mut(&mut self) -> &mut Sequences {
        &mut self.sequences
    }

    /// Requests that wait or run.
    pub fn pending(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    /// Takes a request, to be admitted as soon as there is room.
    ///
    /// # Errors
    /// An empty prompt, one that does not fit the context or has a token that is none, a text that would need more pages than there are, or a sampler
    /// that needs logits which the plan does not return.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, SessionError> {
        if request.prompt.is_empty() {
            return Err(SessionError::Empty);
        }
        let (tokens, context) = (request.prompt.len() as u64, self.sequences.context());
        if tokens > context {
            return Err(SessionError::TooLong { tokens, context });
        }
        // A step that refuses one text would refuse those beside it, again and again.
        let below = self.sequences.executor().plan().vocabulary().unwrap_or(0);
        if let Some(&token) = request.prompt.iter().find(|&&token| u64::from(token) >= below) {
            return Err(SessionError::Token { token, below });
        }
        if self.output() == Output::Token && !request.sampler.is_greedy() {
            return Err(SessionError::GreedyPlan);
        }
        let needed = self.pages_of(&request);
        if let Some(paging) = self.sequences.paging().filter(|paging| needed > paging.pages) {
            let (page, all) = (paging.page, paging.pages);
            return Err(BatchError::Pages { needed, page, free: self.sequences.free_pages(), all }.into());
        }
        let id = RequestId(self.next);
        self.next += 1;
        self.waiting.push_back((id, request));
        Ok(id)
    }

    /// Takes a request back, whether it waits or runs. Tells whether there was one.
    ///
    /// # Errors
    /// If the device fails.
    pub fn cancel(&mut self, id: RequestId) -> Result<bool, SessionError> {
        let pending = self.pending();
        self.waiting.retain(|(waiting, _)| *waiting != id);
        if let Some(i) = self.running.iter().position(|r| r.request == id) {
            let running = self.running.remove(i);
            self.sequences.end(running.sequence)?;
        }
        Ok(self.pending() < pending)
    }

    /// Pages that a request may come to need. Its last token is never read.
    fn pages_of(&self, request: &Request) -> u64 {
        let longest = (request.prompt.len() as u64).saturating_add(request.count.saturating_sub(1) as u64);
        self.sequences.pages_of(longest.min(self.sequences.context()))
    }

    fn output(&self) -> Output {
        self.sequences.executor().plan().output()
    }

    /// Begins what waits, as long as there is room.
    fn admit(&mut self) -> Result<(), SessionError> {
        while let Some((_, request)) = self.waiting.front() {
            let pages = self.pages_of(request);
            let taken: u64 = self.running.iter().map(|r| r.pages).sum();
            let all = self.sequences.paging().map_or(u64::MAX, |paging| paging.pages);
            if self.running.len() >= self.sequences.most() || taken.saturating_add(pages) > all {
                return Ok(());
            }
            let sequence = self.sequences.begin()?;
            let Some((id, request)) = self.waiting.pop_front() else { return Ok(()) };
            let Request { prompt, count, sampler } = request;
            let running =
                Running { request: id, sequence, text: prompt, read: 0, left: count, sampler, pages };
            self.running.push(running);
        }
        Ok(())
    }

    /// Makes one step, if there is anything to do. `is_end` tells which tokens end a text; they are not handed over.
    ///
    /// # Errors
    /// If the device fails; every text is as before then. What is wrong with one text is an [`Event`].
    pub fn step(&mut self, is_end: impl Fn(u32) -> bool) -> Result<Vec<Event>, SessionError> {
        self.admit()?;
        let output = self.output();
        let most = self.sequences.executor().plan().largest(output);
        let takes = takes(&self.running, most.t as usize, most.r as usize);
        if takes.is_empty() {
            return Ok(vec![]);
        }
        let part = |&(i, tokens): &(usize, usize)| {
            let Running { sequence, text, read, .. } = &self.running[i];
            let wanted = if read + tokens == text.len() { Wanted::Last } else { Wanted::None };
            Part { sequence: *sequence, tokens: &text[*read..read + tokens], wanted }
        };
        let parts: Vec<Part<'_>> = takes.iter().map(part).collect();
        self.sequences.step(&parts, output)?;
        let mut events = vec![];
        let mut row = 0;
        for (i, tokens) in takes {
            self.running[i].read += tokens;
            if self.running[i].read == self.running[i].text.len() {
                events.extend(self.choose(i, row, output, &is_end)?);
                row += 1;
            }
        }
        for event in &events {
            if let Event::Finished { request, .. } | Event::Failed { request, .. } = event {
                self.cancel(*request)?;
            }
        }
        Ok(events)
    }

    /// The next token of a text, from the result of the wanted row of this number, and whether it ends.
    fn choose(
        &mut self,
        i: usize,
        row: usize,
        output: Output,
        is_end: &impl Fn(u32) -> bool,
    ) -> Result<Vec<Event>, SessionError> {
        let context = self.sequences.context();
        let Running { request, text, left, sampler, .. } = &mut self.running[i];
        let request = *request;
        let finished = |stop| Event::Finished { request, stop };
        if *left == 0 {
            return Ok(vec![finished(Stop::Count)]);
        }
        let chosen = match output {
            Output::Token => {
                let best = self.sequences.best_tokens()?.get(row).copied().unwrap_or(-1);
                u32::try_from(best).map_err(|_| SessionError::Nan)
            }
            Output::Logits => {
                let logits = self.sequences.view_logits(row..row + 1)?;
                Ok(sampler.sample(logits, text)?)
            }
        };
        let token = match chosen {
            Ok(token) if is_end(token) => return Ok(vec![finished(Stop::End)]),
            Ok(token) => token,
            Err(why) => return Ok(vec![Event::Failed { request, why }]),
        };
        text.push(token);
        *left -= 1;
        let mut events = vec![Event::Token { request, token }];
        if *left == 0 {
            events.push(finished(Stop::Count));
        } else if text.len() as u64 > context {
            events.push(finished(Stop::Context));
        }
        Ok(events)
    }
}

/// Which texts go on in a step, and by how many tokens: those that are being generated first, then prompts.
fn takes(running: &[Running], tokens: usize, wanted: usize) -> Vec<(usize, usize)> {
    let unread = |r: &Running| r.text.len() - r.read;
    let mut order: Vec<usize> = (0..running.len()).collect();
    order.sort_by_key(|&i| unread(&running[i]) > 1);
    let (mut room, mut results) = (tokens, wanted);
    let mut takes = vec![];
    for i in order {
        let mut n = unread(&running[i]).min(room);
        // The end of a prompt has a result, for which there may be no room any more.
        if n == unread(&running[i]) && n > 0 {
            if results > 0 {
                results -= 1;
            } else {
                n -= 1;
            }
        }
        if n > 0 {
            takes.push((i, n));
            room -= n;
        }
    }
    takes
}
