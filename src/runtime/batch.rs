//! Sequences over one executor: a step takes token rows of any mix of them.
//!
//! A sequence is its length and its pages; everything else is in the caches. Forks share pages until one of them writes;
//! truncating gives rows back. One sequence is the simple case, not another path.

mod pages;
#[cfg(test)]
mod tests;

use super::exec::{ExecError, Executor, StepRows};
use crate::ir::{StateRole, Syms};
use crate::plan::{Output, Paging, PlanError};
use pages::{Page, Pages};
use std::ops::Range;

/// A sequence of [`Sequences`]. It is told from one that had its place before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    slot: u32,
    serial: u64,
}

/// What one sequence contributes to a step.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    pub sequence: SequenceId,
    /// What follows the tokens that it has, at least one.
    pub tokens: &'a [u32],
    pub wanted: Wanted,
}

/// Which rows of a part have results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    None,
    Last,
    All,
}

impl Wanted {
    /// The rows, of `tokens`.
    fn rows(self, tokens: usize) -> std::ops::Range<usize> {
        match self {
            Wanted::None => tokens..tokens,
            Wanted::Last => tokens.saturating_sub(1)..tokens,
            Wanted::All => 0..tokens,
        }
    }
}

/// Why a step or a change of sequences cannot be made. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("the plan was compiled for {most} sequences at once, and there are as many")]
    Sequences { most: u64 },
    #[error("there is no such sequence (any more)")]
    Ended,
    #[error("a step takes each sequence once, and at least one token of it")]
    Part,
    #[error(
        "{cached} cached tokens and {tokens} new ones exceed the context of {context}; use a larger one (-c)"
    )]
    Context { cached: u64, tokens: u64, context: u64 },
    #[error("a step takes at most {} tokens, of which at most {} with results, not {} of which {}", most.t, most.r, at.t, at.r)]
    Sizes { most: Syms, at: Syms },
    #[error(
        "{needed} pages of {page} rows are needed, but {free} of {all} are free; end or truncate a sequence"
    )]
    Pages { needed: u64, page: u64, free: u64, all: u64 },
    #[error("a sequence of {length} tokens cannot be truncated to {to}: {why}")]
    Truncate { length: u64, to: u64, why: &'static str },
}

type Result<T> = std::result::Result<T, BatchError>;

#[derive(Clone, Debug)]
struct Sequence {
    serial: u64,
    length: u64,
    /// By position; none for those that the window has left behind.
    pages: Vec<Option<Page>>,
}

/// An executor and the sequences in its caches.
pub struct Sequences {
    executor: Executor,
    paging: Option<Paging>,
    pages: Pages,
    /// By their place in block tables.
    slots: Vec<Option<Sequence>>,
    next_serial: u64,
    rows: StepRows,
    /// Fills pages with NaN as they become free, to show that nothing reads them.
    poison: bool,
}

impl Sequences {
    /// No sequences yet.
    ///
    /// # Errors
    /// If the plan's kernels do not agree on the pages of the caches.
    pub fn new(executor: Executor) -> Result<Sequences> {
        let plan = executor.plan();
        let paging = plan.paging()?;
        let most = paging.map_or(plan.options.sequences, |p| p.sequences);
        let slots = vec![None; usize::try_from(most).unwrap_or(0)];
        let pages = Pages::new(paging.map_or(0, |p| p.pages));
        let rows = StepRows::default();
        Ok(Sequences { executor, paging, pages, slots, next_serial: 0, rows, poison: false })
    }

    /// The executor underneath.
    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    /// The same, for who leaves its caches alone.
    pub(crate) fn executor_mut(&mut self) -> &mut Executor {
        &mut self.executor
    }

    /// The pages of the caches; none if the plan's kernels go over none.
    pub fn paging(&self) -> Option<&Paging> {
        self.paging.as_ref()
    }

    /// The most tokens of a sequence.
    pub fn context(&self) -> u64 {
        let plan = self.executor.plan().options.context;
        self.paging.map_or(plan, |p| plan.min(p.table.saturating_mul(p.page)))
    }

    /// Sequences at once.
    pub fn most(&self) -> usize {
        self.slots.len()
    }

    /// Pages that no sequence has.
    pub fn free_pages(&self) -> u64 {
        self.pages.free()
    }

    /// Pages that a sequence of `tokens` needs, of those that the window leaves it.
    pub fn pages_of(&self, tokens: u64) -> u64 {
        let Some(paging) = self.paging else { return 0 };
        let all = tokens.div_ceil(paging.page);
        let chunk = self.executor.plan().options.chunk;
        // As many as a step can write while those that the window still shows are kept.
        let kept = paging.window.map(|w| w.saturating_add(chunk).div_ceil(paging.page).saturating_add(2));
        all.min(kept.unwrap_or(all))
    }

    /// An empty sequence.
    ///
    /// # Errors
    /// If there are as many as the plan was compiled for.
    pub fn begin(&mut self) -> Result<SequenceId> {
        self.add(Sequence { serial: self.next_serial, length: 0, pages: vec![] })
    }

    fn add(&mut self, sequence: Sequence) -> Result<SequenceId> {
        let most = self.slots.len() as u64;
        let slot = self.slots.iter().position(Option::is_none).ok_or(BatchError::Sequences { most })?;
        let serial = sequence.serial;
        self.slots[slot] = Some(sequence);
        self.next_serial += 1;
        Ok(SequenceId { slot: slot as u32, serial })
    }

    fn get(&self, id: SequenceId) -> Result<&Sequence> {
        let found = self.slots.get(id.slot as usize).and_then(Option::as_ref);
        found.filter(|s| s.serial == id.serial).ok_or(BatchError::Ended)
    }

    fn get_mut(&mut self, id: SequenceId) -> Result<&mut Sequence> {
        let found = self.slots.get_mut(id.slot as usize).and_then(Option::as_mut);
        found.filter(|s| s.serial == id.serial).ok_or(BatchError::Ended)
    }

    /// The tokens of a sequence that are in the caches.
    ///
    /// # Errors
    /// If it has ended.
    pub fn length(&self, id: SequenceId) -> Result<u64> {
        Ok(self.get(id)?.length)
    }

    /// A sequence that goes on from where this one is. The two share their pages until one of them writes there.
    ///
    /// # Errors
    /// If it has ended, there are as many sequences as the plan was compiled for, or the device fails.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let twin = Sequence { serial: self.next_serial, ..self.get(id)?.clone() };
        let pages = twin.pages.clone();
        let fork = self.add(twin)?;
        let copied =
            self.executor.copy_rows(StateRole::Replaced, u64::from(id.slot), u64::from(fork.slot), 1);
        if let Err(e) = copied {
            self.slots[fork.slot as usize] = None;
            return Err(e.into());
        }
        pages.into_iter().flatten().for_each(|page| self.pages.share(page));
        Ok(fork)
    }

    /// Forgets all tokens of a sequence but the first `to`.
    ///
    /// # Errors
    /// If it has ended or has fewer, if its window has left behind what the rest would see, or if it has states that keep
    /// nothing of what they were (and `to` is not 0).
    pub fn truncate(&mut self, id: SequenceId, to: u64) -> Result<()> {
        let (paging, replaced) = (self.paging, self.has_replaced());
        let sequence = self.get_mut(id)?;
        let length = sequence.length;
        let refuse = |why| Err(BatchError::Truncate { length, to, why });
        if to > length {
            return refuse("it has fewer");
        }
        if to < length && to > 0 && replaced {
            return refuse("its recurrent states keep nothing of what they were");
        }
        sequence.length = to;
        let Some(paging) = paging else { return Ok(()) };
        let first = first_seen(&paging, to);
        let seen = sequence
            .pages
            .iter()
            .take(to.div_ceil(paging.page) as usize)
            .skip((first / paging.page) as usize);
        if seen.into_iter().any(Option::is_none) {
            sequence.length = length;
            return refuse("the window has left behind what it would see");
        }
        let given_back = sequence.pages.split_off(to.div_ceil(paging.page) as usize);
        self.release(given_back.into_iter().flatten())
    }

    /// Ends a sequence.
    ///
    /// # Errors
    /// If it has ended already.
    pub fn end(&mut self, id: SequenceId) -> Result<()> {
        self.get(id)?;
        let ended = self.slots[id.slot as usize].take();
        self.release(ended.into_iter().flat_map(|s| s.pages).flatten())
    }

    fn has_replaced(&self) -> bool {
        self.executor.plan().states.iter().any(|s| s.role == StateRole::Replaced)
    }

    fn release(&mut self, pages: impl Iterator<Item = Page>) -> Result<()> {
        let freed: Vec<Page> = pages.filter(|&page| self.pages.release(page)).collect();
        if self.poison {
            freed.into_iter().try_for_each(|page| self.poison_page(page))?;
        }
        Ok(())
    }

    /// From now on, pages are filled with NaN while nobody has them: a test's way to see that nothing reads them.
    ///
    /// # Errors
    /// If the device fails.
    #[doc(hidden)]
    pub fn poison_free_pages(&mut self) -> Result<()> {
        self.poison = true;
        self.pages.all_free().into_iter().try_for_each(|page| self.poison_page(page))
    }

    /// Takes pages that nobody gives back: a test's way to run out of them. Tells how many there were.
    #[doc(hidden)]
    pub fn take_pages(&mut self, most: u64) -> u64 {
        (0..most).map_while(|_| self.pages.take()).count() as u64
    }

    fn poison_page(&mut self, page: Page) -> Result<()> {
        let rows = self.paging.map_or(0, |p| p.page);
        Ok(self.executor.fill_rows(StateRole::Appended, u64::from(page) * rows, rows, 0xff)?)
    }

    /// Runs one step: each part's tokens follow those of its sequence.
    ///
    /// # Errors
    /// See [`BatchError`]; every sequence is as before then.
    pub fn step(&mut self, parts: &[Part<'_>], output: Output) -> Result<()> {
        let at = self.check(parts)?;
        let (plan, most) = (self.executor.plan(), self.executor.plan().largest(output));
        let program = plan.program_for(at.t, at.r, output).ok_or(BatchError::Sizes { most, at })?;
        let changes = self.reserve(parts)?;
        let ran = self.copy_shared(&changes).and_then(|()| {
            self.fill(parts);
            Ok(self.executor.forward(program, &self.rows)?)
        });
        if let Err(e) = ran {
            self.undo(changes)?;
            return Err(e);
        }
        let replaced: Vec<Page> = changes.into_iter().filter_map(|change| change.before).collect();
        self.release(replaced.into_iter())?;
        for part in parts {
            self.advance(part)?;
        }
        Ok(())
    }

    /// The sizes of a step, if its parts make sense.
    fn check(&self, parts: &[Part<'_>]) -> Result<Syms> {
        let context = self.context();
        let mut at = Syms { t: 0, r: 0 };
        for (i, part) in parts.iter().enumerate() {
            let cached = self.get(part.sequence)?.length;
            if part.tokens.is_empty() || parts[..i].iter().any(|p| p.sequence == part.sequence) {
                return Err(BatchError::Part);
            }
            let tokens = part.tokens.len() as u64;
            if cached.saturating_add(tokens) > context {
                return Err(BatchError::Context { cached, tokens, context });
            }
            at.t += tokens;
            at.r += part.wanted.rows(part.tokens.len()).len() as u64;
        }
        if parts.is_empty() { Err(BatchError::Part) } else { Ok(at) }
    }

    /// Takes the pages that the parts write to: new ones, and ones in place of those that are shared.
    fn reserve(&mut self, parts: &[Part<'_>]) -> Result<Vec<Change>> {
        let Some(paging) = self.paging else { return Ok(vec![]) };
        let mut changes = vec![];
        for part in parts {
            let sequence = self.get(part.sequence)?;
            let written = sequence.length..sequence.length + part.tokens.len() as u64;
            for index in written.start / paging.page..written.end.div_ceil(paging.page) {
                let before = sequence.pages.get(index as usize).copied().flatten();
                if before.is_none_or(|page| self.pages.is_shared(page)) {
                    let filled = if before.is_some() { written.start % paging.page } else { 0 };
                    changes.push(Change { slot: part.sequence.slot, index: index as usize, before, filled });
                }
            }
        }
        let (needed, free) = (changes.len() as u64, self.pages.free());
        if needed > free {
            return Err(BatchError::Pages { needed, page: paging.page, free, all: paging.pages });
        }
        for change in &changes {
            let page = self.pages.take();
            if let Some(sequence) = &mut self.slots[change.slot as usize] {
                sequence.pages.resize(sequence.pages.len().max(change.index + 1), None);
                sequence.pages[change.index] = page;
            }
        }
        Ok(changes)
    }

    /// Copies what is in the shared pages that are replaced.
    fn copy_shared(&mut self, changes: &[Change]) -> Result<()> {
        let rows = self.paging.map_or(0, |p| p.page);
        for change in changes.iter().filter(|change| change.filled > 0) {
            let now = self.slots[change.slot as usize].as_ref().and_then(|s| s.pages[change.index]);
            if let (Some(from), Some(to)) = (change.before, now) {
                let (from, to) = (u64::from(from) * rows, u64::from(to) * rows);
                self.executor.copy_rows(StateRole::Appended, from, to, change.filled)?;
            }
        }
        Ok(())
    }

    /// Gives back the pages of a step that did not run.
    fn undo(&mut self, changes: Vec<Change>) -> Result<()> {
        let mut given_back = vec![];
        for change in changes.into_iter().rev() {
            if let Some(sequence) = &mut self.slots[change.slot as usize] {
                given_back.extend(std::mem::replace(&mut sequence.pages[change.index], change.before));
                while sequence.pages.last() == Some(&None) {
                    sequence.pages.pop();
                }
            }
        }
        self.release(given_back.into_iter())
    }

    /// The inputs of a step.
    fn fill(&mut self, parts: &[Part<'_>]) {
        let Sequences { rows, slots, paging, .. } = self;
        let (page_rows, table) = paging.map_or((1, 0), |p| (p.page, p.table as usize));
        for list in
            [&mut rows.tokens, &mut rows.positions, &mut rows.sequences, &mut rows.rows, &mut rows.wanted]
        {
            list.clear();
        }
        rows.lengths.clear();
        rows.lengths.extend(slots.iter().map(|s| s.as_ref().map_or(0, |s| s.length as i32)));
        rows.tables.clear();
        rows.tables.resize(slots.len() * table, 0);
        for (slot, to) in slots.iter().zip(rows.tables.chunks_mut(table.max(1))) {
            let pages = slot.iter().flat_map(|s| &s.pages);
            to.iter_mut().zip(pages).for_each(|(to, page)| *to = page.map_or(0, |page| page as i32));
        }
        for part in parts {
            let slot = part.sequence.slot;
            let Some(sequence) = &slots[slot as usize] else { continue };
            let before = rows.tokens.len();
            for (position, token) in (sequence.length..).zip(part.tokens) {
                let page = sequence.pages.get((position / page_rows) as usize).copied().flatten();
                let row = u64::from(page.unwrap_or(0)) * page_rows + position % page_rows;
                // What is no token is refused by the executor.
                rows.tokens.push(i32::try_from(*token).unwrap_or(i32::MAX));
                rows.positions.push(position as i32);
                rows.sequences.push(slot as i32);
                rows.rows.push(row as i32);
            }
            rows.lengths[slot as usize] = (sequence.length + part.tokens.len() as u64) as i32;
            rows.wanted.extend(part.wanted.rows(part.tokens.len()).map(|row| (before + row) as i32));
        }
    }

    /// Counts the tokens of a step that ran, and gives back the pages that nothing sees any more.
    fn advance(&mut self, part: &Part<'_>) -> Result<()> {
        let paging = self.paging;
        let sequence = self.get_mut(part.sequence)?;
        sequence.length += part.tokens.len() as u64;
        let Some(paging) = paging.filter(|p| p.window.is_some()) else { return Ok(()) };
        // A page more than is seen, so that drafts can be taken back.
        let behind = (first_seen(&paging, sequence.length) / paging.page).saturating_sub(1);
        let left: Vec<Page> =
            sequence.pages.iter_mut().take(behind as usize).filter_map(Option::take).collect();
        self.release(left.into_iter())
    }

    /// The inputs of the last step.
    pub fn last_rows(&self) -> &StepRows {
        &self.rows
    }

    /// Waits until the last step is over.
    ///
    /// # Errors
    /// If the device fails.
    pub fn wait(&mut self) -> Result<()> {
        Ok(self.executor.wait()?)
    }

    /// The logits of some of the last step's wanted rows, in order, `[vocabulary]` each, in place of what `to` holds.
    ///
    /// # Errors
    /// If nothing ran, its output was another, or there are no such rows.
    pub fn read_logits(&mut self, rows: Range<usize>, to: &mut Vec<f32>) -> Result<()> {
        Ok(self.executor.read_f32(0, rows.start as u64..rows.end as u64, to)?)
    }

    /// The logits of some of the last step's wanted rows, in order, `[vocabulary]` each, without a copy of one's own: good until the
    /// next call. What is changed there is changed nowhere else.
    ///
    /// # Errors
    /// As [`Self::read_logits`].
    pub fn view_logits(&mut self, rows: Range<usize>) -> Result<&mut [f32]> {
        Ok(self.executor.view_f32(0, rows.start as u64..rows.end as u64)?)
    }

    /// The logits of all of the last step's wanted rows.
    ///
    /// # Errors
    /// If nothing ran, or its output was another.
    pub fn logits(&mut self) -> Result<Vec<f32>> {
        let mut logits = vec![];
        self.read_logits(0..self.rows.wanted.len(), &mut logits)?;
        Ok(logits)
    }

    /// The best token of each of the last step's wanted rows; -1 where logits were NaN.
    ///
    /// # Errors
    /// If nothing ran, or its output was another.
    pub fn best_tokens(&mut self) -> Result<Vec<i32>> {
        let mut tokens = vec![];
        self.executor.read_i32(0, 0..self.rows.wanted.len() as u64, &mut tokens)?;
        Ok(tokens)
    }
}

/// The first position that the next token of a sequence of `length` tokens sees.
fn first_seen(paging: &Paging, length: u64) -> u64 {
    paging.window.map_or(0, |window| (length + 1).saturating_sub(window))
}

/// A page that a step puts in place `index` of a sequence.
struct Change {
    slot: u32,
    index: usize,
    /// What was there: a page that is shared.
    before: Option<Page>,
    /// How many of its rows are to be copied.
    filled: u64,
}
