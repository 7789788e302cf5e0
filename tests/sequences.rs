//! Several sequences over one executor: each is as if it ran alone, whatever runs beside it, shares its pages, or had its
//! pages before.

mod support;

use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sinter::compile::{Options, Purpose};
use sinter::generate::{
    Event, Request, RequestId, Sampler, Sampling, Scheduler, Session, SessionError, Stop,
};
use sinter::gguf::GgufFile;
use sinter::ir::DType;
use sinter::plan::Output;
use sinter::runtime::{BatchError, Part, SequenceId, Sequences, Wanted};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use support::everywhere::cases;
use support::synthetic::{Model, Shape, TINY, shape, uniform};
use support::*;

const EXACT: f64 = 1e-5;
/// Activations are quantised to 8 bits, and caches to 16.
const DEFAULT: f64 = 4e-2;

/// Eight sequences of up to 150 tokens.
fn eight(options: Options) -> Options {
    Options { context: Some(150), sequences: 8, chunk: 40, ..options }
}

/// A family with little arithmetic.
fn small(base: Shape) -> Shape {
    Shape { vocab: 61, ffn: 96, ..base }
}

/// Fused; and unfused, which takes long, where `all`.
fn paths(all: bool) -> Vec<(&'static str, Options, f64)> {
    let fused = [("exact", eight(exact()), EXACT), ("default", eight(defaults()), DEFAULT)];
    let unfused = all.then(|| ("exact --no-fuse", eight(unfused(exact())), EXACT));
    fused.into_iter().chain(unfused).collect()
}

/// Sequences with every free page full of NaN.
fn sequences(file: &Arc<GgufFile>, options: &Options, purpose: Purpose) -> Sequences {
    let mut sequences = Sequences::new(executor(file, options, purpose)).unwrap();
    sequences.poison_free_pages().unwrap();
    sequences
}

fn random_text(rng: &mut ChaCha8Rng, length: usize) -> Vec<u32> {
    (0..length).map(|_| rng.random_range(0..61)).collect()
}

/// A text that is read, bit by bit, and the logits of its tokens when it is read alone.
struct Text {
    id: SequenceId,
    tokens: Vec<u32>,
    alone: Arc<Vec<Vec<f32>>>,
}

impl Text {
    fn read(&self, sequences: &Sequences) -> usize {
        sequences.length(self.id).unwrap() as usize
    }
}

/// The logits of texts read alone, as [`Purpose::Score`] has them.
struct Alone {
    session: Session,
}

impl Alone {
    fn new(file: &Arc<GgufFile>, options: &Options) -> Alone {
        let options = Options { sequences: 1, ..options.clone() };
        Alone { session: Session::new(executor(file, &options, Purpose::Score)).unwrap() }
    }

    fn rows(&mut self, tokens: &[u32]) -> Arc<Vec<Vec<f32>>> {
        self.session.reset().unwrap();
        Arc::new(rows(&mut self.session, tokens))
    }
}

/// Makes a step of these parts, and holds each wanted row to what the text gives alone.
fn step(what: &str, sequences: &mut Sequences, parts: &[(&Text, usize, Wanted)], tolerance: f64) {
    let at: Vec<usize> = parts.iter().map(|(text, ..)| text.read(sequences)).collect();
    let steps: Vec<Part<'_>> = parts
        .iter()
        .zip(&at)
        .map(|((text, n, wanted), at)| Part {
            sequence: text.id,
            tokens: &text.tokens[*at..at + n],
            wanted: *wanted,
        })
        .collect();
    sequences.step(&steps, Output::Logits).unwrap();
    let mut expected = vec![];
    for ((text, n, wanted), at) in parts.iter().zip(at) {
        let first = match wanted {
            Wanted::None => *n,
            Wanted::Last => n - 1,
            Wanted::All => 0,
        };
        expected.extend(text.alone[at + first..at + n].iter().cloned());
    }
    let wanted = sequences.last_rows().wanted.len();
    assert_eq!(wanted, expected.len(), "{what}");
    let logits = if wanted == 0 { vec![] } else { sequences.logits().unwrap().to_vec() };
    let vocabulary = (logits.len() / wanted.max(1)).max(1);
    let found: Vec<Vec<f32>> = logits.chunks(vocabulary).map(<[f32]>::to_vec).collect();
    let worst = worst(&found, &expected);
    assert!(worst <= tolerance, "{what}: {worst:e}");
}

/// Texts come and go at random, prompts in chunks beside single tokens. The first step has some tokens of as many as there may be.
#[test]
fn sequences_at_random_are_as_each_alone() {
    everywhere(|| {
        for (seed, base) in (0..).zip(TINY.map(small)).take(cases(TINY.len())) {
            let file = Model::new(&base, uniform(DType::F16)).file();
            for (path, options, tolerance) in paths(seed == 0) {
                let what = format!("{} {path}", base.name);
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                let mut alone = Alone::new(&file, &options);
                let mut sequences = sequences(&file, &options, Purpose::Score);
                let all = sequences.free_pages();
                let (mut texts, mut finished, mut most): (Vec<Text>, u32, usize) = (vec![], 0, 0);
                while finished < 11 {
                    let is_first = most == 0;
                    while texts.len() < sequences.most() && (is_first || rng.random_bool(0.4)) {
                        let length = rng.random_range(1..=150);
                        let tokens = random_text(&mut rng, length);
                        let alone = alone.rows(&tokens);
                        texts.push(Text { id: sequences.begin().unwrap(), tokens, alone });
                    }
                    let (mut room, mut parts) = (40, vec![]);
                    for text in &texts {
                        let left = text.tokens.len() - text.read(&sequences);
                        let n = if rng.random_bool(0.5) { 1 } else { rng.random_range(1..=40) }
                            .min(left)
                            .min(if is_first { 5 } else { room });
                        if n > 0 && (is_first || rng.random_bool(0.8)) {
                            let wanted = *[Wanted::None, Wanted::Last, Wanted::All].choose(&mut rng).unwrap();
                            parts.push((text, n, wanted));
                            room -= n;
                        }
                    }
                    most = most.max(parts.len());
                    if !parts.is_empty() {
                        step(&what, &mut sequences, &parts, tolerance);
                    }
                    let (done, rest) =
                        texts.into_iter().partition(|text: &Text| text.read(&sequences) == text.tokens.len());
                    texts = rest;
                    for text in done {
                        sequences.end(text.id).unwrap();
                        finished += 1;
                    }
                }
                texts.into_iter().for_each(|text| sequences.end(text.id).unwrap());
                assert_eq!(sequences.free_pages(), all, "{what}: pages are lost");
                assert_eq!(most, 8, "{what}: sequences in a step, at most");
            }
        }
    });
}

/// Forks, truncations and ends at random: nobody sees what another wrote.
#[test]
fn forks_and_truncations_at_random_are_as_each_text_alone() {
    everywhere(|| {
        let base = small(shape("tiny-qwen3"));
        let file = Model::new(&base, uniform(DType::Q8_0)).file();
        for (path, options, tolerance) in paths(false) {
            let mut rng = ChaCha8Rng::seed_from_u64(7);
            let mut alone = Alone::new(&file, &options);
            let mut sequences = sequences(&file, &options, Purpose::Score);
            let all = sequences.free_pages();
            let (mut texts, mut forks, mut truncations): (Vec<Text>, u32, u32) = (vec![], 0, 0);
            let longer = |rng: &mut ChaCha8Rng, alone: &mut Alone, before: &[u32]| {
                let more = rng.random_range(1..=(150 - before.len()).min(50));
                let tokens = [before.to_vec(), random_text(rng, more)].concat();
                let alone = alone.rows(&tokens);
                (tokens, alone)
            };
            for round in 0..120 {
                let what = format!("{path}, round {round}");
                let i = rng.random_range(0..texts.len().max(1));
                match rng.random_range(0..10) {
                    0 if texts.len() < 8 => {
                        let (tokens, alone) = longer(&mut rng, &mut alone, &[]);
                        texts.push(Text { id: sequences.begin().unwrap(), tokens, alone });
                    }
                    1..3 if !texts.is_empty() && texts.len() < 8 && texts[i].read(&sequences) < 150 => {
                        let read = texts[i].read(&sequences);
                        let (tokens, alone) = longer(&mut rng, &mut alone, &texts[i].tokens[..read]);
                        let id = sequences.fork(texts[i].id).unwrap();
                        texts.push(Text { id, tokens, alone });
                        forks += 1;
                    }
                    3..5 if !texts.is_empty() => {
                        let to = rng.random_range(0..=texts[i].read(&sequences).min(149));
                        sequences.truncate(texts[i].id, to as u64).unwrap();
                        let (tokens, alone) = longer(&mut rng, &mut alone, &texts[i].tokens[..to]);
                        texts[i] = Text { id: texts[i].id, tokens, alone };
                        truncations += 1;
                    }
                    5 if !texts.is_empty() => sequences.end(texts.swap_remove(i).id).unwrap(),
                    _ => {
                        let mut parts = vec![];
                        for text in &texts {
                            let left = text.tokens.len() - text.read(&sequences);
                            if left > 0 && rng.random_bool(0.7) {
                                parts.push((text, left.min(5), Wanted::All));
                            }
                        }
                        if !parts.is_empty() {
                            step(&what, &mut sequences, &parts, tolerance);
                        }
                    }
                }
            }
            texts.into_iter().for_each(|text| sequences.end(text.id).unwrap());
            assert_eq!(sequences.free_pages(), all, "{path}: pages are lost");
            assert!(forks >= 5 && truncations >= 5, "{path}: {forks} forks, {truncations} truncations");
        }
    });
}

/// Drafted tokens at once are those tokens one by one, and what is left of them after a truncation is what was read.
#[test]
fn drafts_at_once_are_drafts_one_by_one() {
    everywhere(|| {
        for name in ["tiny-llama", "tiny-qwen2"].into_iter().take(cases(2)) {
            let file = Model::new(&small(shape(name)), uniform(DType::Q8_0)).file();
            for (path, options, tolerance) in paths(false) {
                let mut rng = ChaCha8Rng::seed_from_u64(3);
                let mut alone = Alone::new(&file, &options);
                let mut sequences = sequences(&file, &options, Purpose::Generate);
                for drafts in (2..=8usize).rev().take(cases(7)) {
                    for kept in [0, 1, drafts / 2, drafts] {
                        let what = format!("{name} {path}, {kept} of {drafts}");
                        // The drafts cross the border of a page, or not.
                        let before = rng.random_range(20..33);
                        let tokens = random_text(&mut rng, before + drafts);
                        let rejected =
                            Text { id: sequences.begin().unwrap(), alone: alone.rows(&tokens), tokens };
                        step(&what, &mut sequences, &[(&rejected, before, Wanted::None)], tolerance);
                        step(&what, &mut sequences, &[(&rejected, drafts, Wanted::All)], tolerance);
                        sequences.truncate(rejected.id, (before + kept) as u64).unwrap();
                        let others = random_text(&mut rng, 6);
                        let tokens = [&rejected.tokens[..before + kept], &others].concat();
                        let text = Text { id: rejected.id, alone: alone.rows(&tokens), tokens };
                        for _ in 0..3 {
                            step(&what, &mut sequences, &[(&text, 1, Wanted::Last)], tolerance);
                        }
                        sequences.end(text.id).unwrap();
                    }
                }
            }
        }
    });
}

/// A step that has no room changes nothing, and says what it needs.
#[test]
fn pages_that_run_out_are_told_and_nothing_is_lost() {
    let file = Model::new(&small(shape("tiny-llama")), uniform(DType::F16)).file();
    // Five pages for each of two sequences; forks share theirs, so that more can be asked for than there is.
    let options = Options { sequences: 2, chunk: 160, ..eight(exact()) };
    let mut alone = Alone::new(&file, &options);
    let mut sequences = sequences(&file, &options, Purpose::Score);
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    assert_eq!((sequences.free_pages(), sequences.context()), (10, 150));
    let mut text = |sequences: &mut Sequences, length| {
        let tokens = random_text(&mut rng, length);
        Text { id: sequences.begin().unwrap(), alone: alone.rows(&tokens), tokens }
    };
    let (a, b) = (text(&mut sequences, 150), text(&mut sequences, 150));
    step("a", &mut sequences, &[(&a, 100, Wanted::Last)], EXACT);
    step("b", &mut sequences, &[(&b, 140, Wanted::Last)], EXACT);
    assert_eq!(sequences.free_pages(), 1);
    assert!(matches!(sequences.begin(), Err(BatchError::Sequences { most: 2 })));
    let over = |text: &Text, at: usize, n: usize, sequences: &mut Sequences| {
        let part =
            Part { sequence: text.id, tokens: &text.tokens.repeat(2)[at..at + n], wanted: Wanted::Last };
        sequences.step(&[part], Output::Logits).unwrap_err().to_string()
    };
    let says = over(&b, 140, 11, &mut sequences);
    assert_eq!(says, "140 cached tokens and 11 new ones exceed the context of 150; use a larger one (-c)");
    // Both at once need one page, which there is; then a longer context would need another.
    step("both", &mut sequences, &[(&a, 29, Wanted::All), (&b, 10, Wanted::All)], EXACT);
    assert_eq!(sequences.free_pages(), 0);
    sequences.end(b.id).unwrap();
    let fork = sequences.fork(a.id).unwrap();
    let (a_pages, free) = (5, sequences.free_pages());
    assert_eq!(free, 10 - a_pages);
    step("after", &mut sequences, &[(&a, 21, Wanted::All)], EXACT);
    let c = Text { id: fork, tokens: a.tokens.clone(), alone: Arc::clone(&a.alone) };
    step("fork", &mut sequences, &[(&c, 21, Wanted::All)], EXACT);

    // An id that is none, tokens that are none, a sequence that ended, and one twice.
    let mut refused = |parts: &[Part<'_>]| sequences.step(parts, Output::Logits).unwrap_err().to_string();
    let part = |sequence, tokens| Part { sequence, tokens, wanted: Wanted::Last };
    assert_eq!(refused(&[part(b.id, &[1])]), "there is no such sequence (any more)");
    assert_eq!(refused(&[]), "a step takes each sequence once, and at least one token of it");
    assert_eq!(refused(&[part(a.id, &[])]), refused(&[]));
    assert!(refused(&[part(a.id, &[1])]).contains("exceed the context"));
    sequences.truncate(a.id, 30).unwrap();
    let mut refused = |parts: &[Part<'_>]| sequences.step(parts, Output::Logits).unwrap_err().to_string();
    assert_eq!(refused(&[part(a.id, &[1]), part(a.id, &[2])]), refused(&[]));
    let says = refused(&[part(a.id, &[1, 2, 600, 3])]);
    assert_eq!(says, "input \"tokens\" must lie in 0..61, not 600");
    let says = sequences.truncate(a.id, 31).unwrap_err().to_string();
    assert_eq!(says, "a sequence of 30 tokens cannot be truncated to 31: it has fewer");
    // The step that was refused took no page, and shared pages are still shared.
    step("again", &mut sequences, &[(&a, 50, Wanted::All)], EXACT);
    sequences.truncate(fork, 149).unwrap();
    step("fork again", &mut sequences, &[(&c, 1, Wanted::All)], EXACT);
    sequences.end(a.id).unwrap();
    sequences.end(fork).unwrap();
    assert_eq!(sequences.free_pages(), 10);
    assert!(matches!(sequences.end(fork), Err(BatchError::Ended)));
}

/// A context's worth of forks that all write needs more pages than there are.
#[test]
fn the_error_says_how_many_pages_are_needed() {
    let file = Model::new(&small(shape("tiny-llama")), uniform(DType::F16)).file();
    let mut options = eight(exact());
    options.sequences = 3;
    let mut sequences = sequences(&file, &options, Purpose::Score);
    let ids: Vec<SequenceId> = (0..3).map(|_| sequences.begin().unwrap()).collect();
    let tokens: Vec<u32> = (0..150).map(|i| i % 61).collect();
    // Fill 15 pages to the last.
    for &id in &ids {
        for chunk in tokens[..128].chunks(40) {
            sequences
                .step(&[Part { sequence: id, tokens: chunk, wanted: Wanted::None }], Output::Logits)
                .unwrap();
        }
    }
    sequences.end(ids[2]).unwrap();
    let fork = sequences.fork(ids[0]).unwrap();
    assert_eq!(sequences.free_pages(), 15 - 8);
    // Takes the pages that are free, as another owner would.
    let taken: u64 = sequences.take_pages(6);
    assert_eq!((taken, sequences.free_pages()), (6, 1));
    let parts = [ids[0], ids[1], fork].map(|sequence| Part { sequence, tokens: &[1], wanted: Wanted::Last });
    let says = sequences.step(&parts, Output::Logits).unwrap_err().to_string();
    assert_eq!(says, "3 pages of 32 rows are needed, but 1 of 15 are free; end or truncate a sequence");
    assert_eq!(ids[..2].iter().map(|&id| sequences.length(id).unwrap()).collect::<Vec<_>>(), [128, 128]);
    sequences.step(&parts[..1], Output::Logits).unwrap();
}

/// What a request gives in a session of its own.
fn alone(
    file: &Arc<GgufFile>,
    options: &Options,
    prompt: &[u32],
    count: usize,
    sampling: &Sampling,
    end: u32,
) -> (Vec<u32>, Stop) {
    let options = Options { sequences: 1, ..options.clone() };
    let mut session = Session::new(executor(file, &options, Purpose::Generate)).unwrap();
    let mut sampler = Sampler::new(sampling.clone()).unwrap();
    let mut found = vec![];
    let keep = |token| {
        found.push(token);
        ControlFlow::Continue(())
    };
    let stop = session.generate(prompt, count, &mut sampler, |id| id == end, keep).unwrap();
    (found, stop)
}

/// Requests of random lengths, submitted at random times, each with a sampler of its own.
#[test]
fn scheduled_texts_are_those_of_sessions() {
    everywhere(|| {
        let end = 17;
        for (path, options) in [
            ("logits", eight(exact())),
            ("greedy", Options { greedy: true, ..eight(exact()) }),
            ("few sequences", Options { sequences: 3, ..eight(exact()) }),
        ]
        .into_iter()
        .take(cases(3))
        {
            let file = Model::new(&small(shape("tiny-llama3")), uniform(DType::F32)).file();
            let mut rng = ChaCha8Rng::seed_from_u64(11);
            let mut scheduler = Scheduler::new(executor(&file, &options, Purpose::Generate)).unwrap();
            scheduler.sequences_mut().poison_free_pages().unwrap();
            let mut wanted: BTreeMap<RequestId, (Vec<u32>, Stop)> = BTreeMap::new();
            let mut found: BTreeMap<RequestId, (Vec<u32>, Option<Stop>)> = BTreeMap::new();
            let (mut submitted, mut mixed) = (0, 0);
            while submitted < 20 || scheduler.pending() > 0 {
                while submitted < 20 && rng.random_bool(0.3) {
                    let length = rng.random_range(1..=150);
                    let prompt = random_text(&mut rng, length);
                    let count = rng.random_range(0..=40);
                    let seeded = Sampling { temperature: 5.0, seed: Some(submitted), ..Sampling::default() };
                    let sampling = if options.greedy { Sampling::greedy() } else { seeded };
                    let expected = alone(&file, &options, &prompt, count, &sampling, end);
                    let sampler = Sampler::new(sampling).unwrap();
                    let id = scheduler.submit(Request { prompt, count, sampler }).unwrap();
                    wanted.insert(id, expected);
                    found.insert(id, (vec![], None));
                    submitted += 1;
                }
                for event in scheduler.step(|token| token == end).unwrap() {
                    match event {
                        Event::Token { request, token } => found.get_mut(&request).unwrap().0.push(token),
                        Event::Finished { request, stop } => found.get_mut(&request).unwrap().1 = Some(stop),
                        Event::Failed { request, why } => panic!("{request:?}: {why}"),
                    }
                }
                let rows = scheduler.sequences().last_rows();
                let of_each = rows
                    .lengths
                    .iter()
                    .enumerate()
                    .map(|(b, _)| rows.sequences.iter().filter(|s| **s == b as i32).count());
                let of_each: Vec<usize> = of_each.collect();
                mixed += u32::from(of_each.contains(&1) && of_each.iter().any(|n| *n > 1));
            }
            for (id, (tokens, stop)) in wanted {
                assert_eq!(found[&id], (tokens, Some(stop)), "{path}: {id:?}");
            }
            let all = scheduler.sequences().paging().unwrap().pages;
            assert_eq!(scheduler.sequences().free_pages(), all, "{path}: pages are lost");
            assert!(mixed > 5, "{path}: prompts and single tokens came together in {mixed} steps");
        }
    });
}

/// A prompt takes what room the texts that are being generated leave, so that they go on at every step.
#[test]
fn a_long_prompt_does_not_hold_up_the_others() {
    let file = Model::new(&small(shape("tiny-llama3")), uniform(DType::F32)).file();
    let mut scheduler = Scheduler::new(executor(&file, &eight(exact()), Purpose::Generate)).unwrap();
    let mut submit = |prompt: Vec<u32>, count| {
        let sampler = Sampler::new(Sampling::greedy()).unwrap();
        scheduler.submit(Request { prompt, count, sampler }).unwrap()
    };
    // First the prompt, of four steps.
    let (_, short) = (submit(vec![5; 140], 1), submit(vec![7], 4));
    for step in 0..3 {
        let events = scheduler.step(|_| false).unwrap();
        let goes_on = |event: &Event| matches!(event, Event::Token { request, .. } if *request == short);
        assert!(events.iter().any(goes_on), "step {step}: {events:?}");
    }
}

#[test]
fn requests_that_cannot_be_served_are_refused_at_once() {
    let file = Model::new(&small(shape("tiny-llama")), uniform(DType::F16)).file();
    let options = Options { greedy: true, sequences: 2, ..eight(defaults()) };
    let mut scheduler = Scheduler::new(executor(&file, &options, Purpose::Generate)).unwrap();
    let greedy = || Sampler::new(Sampling::greedy()).unwrap();
    let mut submit = |prompt: &[u32], count, sampler| {
        scheduler.submit(Request { prompt: prompt.to_vec(), count, sampler }).map_err(|e| e.to_string())
    };
    assert!(submit(&[], 3, greedy()).unwrap_err().contains("no tokens"));
    assert!(submit(&[1; 151], 3, greedy()).unwrap_err().contains("do not fit a context of 150"));
    assert_eq!(
        submit(&[1, 61], 3, greedy()).unwrap_err(),
        "token 61 is not below 61, the size of the vocabulary"
    );
    let random = Sampler::new(Sampling::default()).unwrap();
    assert_eq!(submit(&[1], 3, random).unwrap_err(), SessionError::GreedyPlan.to_string());
    let id = submit(&[1, 2], 1000, greedy()).unwrap();
    let other = submit(&[3], 5, greedy()).unwrap();
    scheduler.step(|_| false).unwrap();
    assert_eq!(scheduler.pending(), 2);
    assert!(scheduler.cancel(id).unwrap() && !scheduler.cancel(id).unwrap());
    let mut events = vec![];
    while scheduler.pending() > 0 {
        events.extend(scheduler.step(|_| false).unwrap());
    }
    assert!(
        matches!(events.last(), Some(Event::Finished { request, stop: Stop::Count }) if *request == other)
    );
    assert!(scheduler.step(|_| false).unwrap().is_empty());
}
