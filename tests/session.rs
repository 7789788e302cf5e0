//! Sessions against the oracle: prompts in chunks, texts in turns, what fits a context, where a text ends.

mod support;

use sinter::compile::{self, Options, Purpose};
use sinter::generate::{Perplexity, Sampler, Sampling, Session, SessionError, Stop};
use sinter::gguf::GgufFile;
use sinter::model;
use sinter::plan::{LoadedPlan, Parts, Plan};
use sinter::runtime::{DeviceOptions, Executor, Progress, Stage};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use support::*;

/// What float32 arithmetic in another order may change.
const SAME: f64 = 1e-5;

/// A session that generates and scores, in one cache.
fn session(file: &Arc<GgufFile>, options: &Options) -> Session {
    let plan = model::plan(file, None, options, Purpose::Generate).unwrap();
    let programs = [Purpose::Generate, Purpose::Score]
        .into_iter()
        .flat_map(|purpose| compile::compile(file.gguf(), options, purpose).unwrap())
        .map(|compiled| (compiled.program, compiled.report))
        .collect();
    let parts = Parts { model: plan.model, target: plan.target, options: plan.options, programs };
    let plan = LoadedPlan::from_bytes(&Plan::build(parts).unwrap().to_bytes().unwrap()).unwrap();
    Session::new(Executor::new(plan, Arc::clone(file), &DeviceOptions::default()).unwrap()).unwrap()
}

fn sampler() -> Sampler {
    Sampler::new(Sampling::greedy()).unwrap()
}

/// What is generated greedily, and why it stopped.
fn generate(session: &mut Session, prompt: &[u32], count: usize) -> (Vec<u32>, Stop) {
    let mut found = vec![];
    let keep = |id| {
        found.push(id);
        ControlFlow::Continue(())
    };
    let stop = session.generate(prompt, count, &mut sampler(), |_| false, keep).unwrap();
    (found, stop)
}

/// The oracle's prompt and its greedy continuation, in tokens.
fn greedy_text(name: &str) -> (Vec<u32>, Vec<u32>) {
    let wanted = &oracle().models[name];
    let tokenizer = sinter::generate::Tokenizer::from_gguf(open(name).gguf()).unwrap();
    (tokenizer.encode(&wanted.greedy_prompt, Default::default()), wanted.greedy_tokens.clone())
}

#[test]
fn a_prompt_in_chunks_is_the_prompt_at_once() {
    let tokens = oracle().tokens;
    for name in MODELS {
        let file = open(name);
        let expected = oracle_logits(name);
        for chunk in [1, 7, 32, 512] {
            let mut session = session(&file, &Options { chunk, ..exact() });
            // A prompt has no logits but its last; what follows it depends on all of it.
            let (prompt, rest) = tokens.split_at(40);
            session.prompt(prompt).unwrap();
            assert_eq!((session.filled(), session.text()), (40, prompt));
            let found = rows(&mut session, rest);
            assert_close(&format!("{name}, chunks of {chunk}"), &found, &expected[40..], SAME);
        }
    }
}

/// Loading and long prompts are told: never less than before, and all of it at the end.
#[test]
fn how_far_things_are_is_told() {
    let file = Arc::new(model::embedded().unwrap());
    let told = Arc::new(Mutex::new(vec![]));
    let progress = {
        let told = Arc::clone(&told);
        Progress::to(move |stage, done, all| told.lock().unwrap().push((stage, done, all)))
    };
    let options = Options { chunk: 8, ..Options::new(sinter::target::Target::cpu()) };
    let device = DeviceOptions { progress, ..DeviceOptions::default() };
    let plan = model::plan(&file, None, &options, Purpose::Generate).unwrap();
    let mut session = model::session(&file, None, &options, Purpose::Generate, &device).unwrap();
    let all = plan.repacked_bytes();
    let loading = std::mem::take(&mut *told.lock().unwrap());
    assert!(loading.len() > 10 && loading.iter().all(|told| (told.0, told.2) == (Stage::Weights, all)));
    assert!(loading.is_sorted_by_key(|told| told.1), "{loading:?}");
    assert_eq!(loading.iter().position(|told| told.1 >= all), Some(loading.len() - 1), "{loading:?}");

    session.prompt(&(0..8).collect::<Vec<u32>>()).unwrap();
    assert_eq!(*told.lock().unwrap(), []);
    session.prompt(&(0..20).collect::<Vec<u32>>()).unwrap();
    assert_eq!(*told.lock().unwrap(), [8, 16, 20].map(|read| (Stage::Prompt, read, 20)));
}

#[test]
fn what_follows_a_prompt_in_chunks_is_that_of_the_oracle() {
    for name in MODELS {
        let file = open(name);
        let (prompt, wanted) = greedy_text(name);
        assert!(prompt.len() > 3);
        for chunk in [1, 2, 3] {
            let mut session = session(&file, &Options { chunk, ..exact() });
            let found = generate(&mut session, &prompt, wanted.len());
            assert_eq!(found, (wanted.clone(), Stop::Count), "{name}, chunks of {chunk}");
        }
    }
}

#[test]
fn rows_are_numbered_in_order_whatever_the_chunks() {
    let tokens = &oracle().tokens[..20];
    let file = open("q4_k_m");
    let expected = &oracle_logits("q4_k_m")[..20];
    for chunk in [1, 7, 20] {
        let mut session = session(&file, &Options { chunk, ..exact() });
        let (mut numbers, mut found) = (vec![], vec![]);
        session
            .score(tokens, |row, logits| {
                numbers.push(row);
                found.push(logits.to_vec());
            })
            .unwrap();
        assert_eq!(numbers, (0..20).collect::<Vec<_>>(), "chunks of {chunk}");
        assert_close(&format!("chunks of {chunk}"), &found, expected, SAME);
        assert_eq!((session.filled(), session.text()), (20, tokens));
    }
}

#[test]
fn a_text_in_turns_is_the_text_at_once() {
    let tokens = oracle().tokens;
    let file = open("q4_k_m");
    let (first, second) = (&tokens[..9], &tokens[20..31]);
    for chunk in [4, 512] {
        let options = Options { chunk, ..exact() };
        let mut turns = session(&file, &options);
        let (said, _) = generate(&mut turns, first, 6);
        let text = [first, &said, second].concat();
        assert_eq!((turns.filled(), turns.text().len()), (14, 15), "the last token is not read yet");
        assert_eq!(turns.text(), &text[..15]);
        let found = rows(&mut turns, second);
        assert_eq!((turns.filled(), turns.text()), (26, &text[..]));
        let at_once = score(&file, &options, &text);
        assert_close("the second turn", &found, &at_once[15..], SAME);

        // And what is generated in each turn, whoever ended the one before.
        for caller in [false, true] {
            turns.reset().unwrap();
            let (count, mut left) = if caller { (usize::MAX, 6) } else { (6, usize::MAX) };
            let enough = |_| {
                left -= 1;
                if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let stop = turns.generate(first, count, &mut sampler(), |_| false, enough).unwrap();
            assert_eq!(stop, if caller { Stop::Caller } else { Stop::Count });
            let expected = generate(&mut session(&file, &options), &text, 8);
            assert_eq!(generate(&mut turns, second, 8), expected, "chunks of {chunk}");
        }
    }
}

#[test]
fn a_turn_may_bring_nothing_new() {
    let file = open("q4_k_m");
    let (prompt, wanted) = greedy_text("q4_k_m");
    for options in [exact(), Options { greedy: true, ..exact() }] {
        let mut session =
            model::session(&file, None, &options, Purpose::Generate, &DeviceOptions::default()).unwrap();
        let mut found = generate(&mut session, &prompt, 5).0;
        for count in [1, 9] {
            found.extend(generate(&mut session, &[], count).0);
        }
        assert_eq!(found, wanted[..15]);
        // Asked for no token it reads the one that waits, and then there is nothing to read.
        assert_eq!(generate(&mut session, &[], 0), (vec![], Stop::Count));
        assert_eq!(session.filled(), session.text().len() as u64);
        assert!(matches!(session.prompt(&[]), Err(SessionError::Empty)));

        generate(&mut session, &prompt, 1);
        session.reset().unwrap();
        assert_eq!((session.filled(), session.text().len()), (0, 0));
        assert!(matches!(session.prompt(&[]), Err(SessionError::Empty)), "what waits is forgotten too");
    }
}

#[test]
fn the_last_token_that_fits_is_followed_by_one_more() {
    let file = open("q4_k_m");
    let (prompt, wanted) = greedy_text("q4_k_m");
    let read = prompt.len();
    for chunk in [1, 512] {
        for room in [0, 1, 5] {
            let context = read + room;
            let options = Options { context: Some(context as u64), chunk, ..exact() };
            let mut session = session(&file, &options);
            assert_eq!(session.context(), context as u64);
            let all = (wanted[..=room].to_vec(), Stop::Context);
            assert_eq!(generate(&mut session, &prompt, usize::MAX), all, "room for {room}");
            assert_eq!((session.filled(), session.text().len()), (context as u64, context + 1));

            // The one that waits does not fit, alone or with others; nothing changes then.
            for more in [&[][..], &[280]] {
                let tokens = (context + 1 + more.len()) as u64;
                let is_full = |e: &SessionError| {
                    matches!(e, SessionError::TooLong { tokens: t, context: c }
                        if (*t, *c) == (tokens, context as u64))
                };
                assert!(session.prompt(more).is_err_and(|e| is_full(&e)));
                assert!(session.score(more, |_, _| panic!("no row")).is_err_and(|e| is_full(&e)));
            }
            assert_eq!((session.filled(), session.text().len()), (context as u64, context + 1));

            session.reset().unwrap();
            let exactly = (wanted[..=room].to_vec(), Stop::Count);
            assert_eq!(generate(&mut session, &prompt, room + 1), exactly, "room for {room}");
        }
    }
}

#[test]
fn a_second_turn_fills_what_the_first_left() {
    let tokens = oracle().tokens;
    let file = open("q4_k_m");
    let options = Options { context: Some(16), ..exact() };
    // The first turn reads 5 and hands over 3, of which the last waits: there is room for 8 more.
    let first = |session: &mut Session| {
        session.reset().unwrap();
        assert_eq!(generate(session, &tokens[..5], 3).1, Stop::Count);
        assert_eq!(session.filled(), 7);
    };
    let mut session = session(&file, &options);
    first(&mut session);
    let text = session.text().to_vec();
    assert!(matches!(session.prompt(&tokens[..9]), Err(SessionError::TooLong { tokens: 17, context: 16 })));
    assert_eq!((session.filled(), session.text()), (7, &text[..]));
    let (found, stop) = generate(&mut session, &tokens[..8], 5);
    assert_eq!((found.len(), stop, session.filled()), (1, Stop::Context, 16));
    first(&mut session);
    let (found, stop) = generate(&mut session, &tokens[..6], 5);
    assert_eq!((found.len(), stop, session.filled()), (3, Stop::Context, 16));
    first(&mut session);
    assert_eq!(rows(&mut session, &tokens[..8]).len(), 8);
    assert_eq!(session.filled(), 16);
}

#[test]
fn exactly_a_context_can_be_scored() {
    let tokens = oracle().tokens;
    let file = open("q4_k_m");
    let options = Options { context: Some(16), chunk: 5, ..exact() };
    let mut session =
        model::session(&file, None, &options, Purpose::Score, &DeviceOptions::default()).unwrap();
    let refused = session.score(&tokens[..17], |_, _| panic!("no row"));
    assert!(matches!(refused, Err(SessionError::TooLong { tokens: 17, context: 16 })));
    assert_eq!(session.filled(), 0);
    assert_eq!(rows(&mut session, &tokens[..16]).len(), 16);
    assert_eq!(session.filled(), 16);
}

#[test]
fn a_text_ends_where_the_model_ends_it() {
    let file = open("q4_k_m");
    let (prompt, wanted) = greedy_text("q4_k_m");
    let end = 6;
    assert!(!wanted[..end].contains(&wanted[end]));
    for options in [exact(), Options { greedy: true, ..exact() }] {
        let mut session =
            model::session(&file, None, &options, Purpose::Generate, &DeviceOptions::default()).unwrap();
        let mut found = vec![];
        let keep = |id| {
            found.push(id);
            ControlFlow::Continue(())
        };
        let is_end = |id| id == wanted[end];
        let stop = session.generate(&prompt, wanted.len(), &mut sampler(), is_end, keep).unwrap();
        assert_eq!((&found[..], stop), (&wanted[..end], Stop::End));
        // What ended it is no part of it, so another may follow in its place.
        assert_eq!(session.text(), [&prompt[..], &wanted[..end]].concat());
        assert_eq!(session.filled(), session.text().len() as u64);
        let next = generate(&mut session, &wanted[end..=end], 5);
        assert_eq!(next.0, wanted[end + 1..end + 6]);
    }
}

#[test]
fn the_caller_has_enough_after_the_token_that_it_was_handed() {
    let file = open("q4_k_m");
    let (prompt, wanted) = greedy_text("q4_k_m");
    let mut session = session(&file, &exact());
    let mut found = vec![];
    let one = |id| {
        found.push(id);
        ControlFlow::Break(())
    };
    let stop = session.generate(&prompt, 8, &mut sampler(), |_| false, one).unwrap();
    assert_eq!((found, stop), (wanted[..1].to_vec(), Stop::Caller));
    assert_eq!(session.text(), [&prompt[..], &wanted[..1]].concat());
}

#[test]
fn the_penalty_knows_the_whole_text() {
    let tokens = oracle().tokens;
    let file = open("q4_k_m");
    let turns = [&tokens[..12], &tokens[20..26]];
    let mut texts = vec![];
    for last_n in [0, 3, usize::MAX] {
        let sampling = Sampling { repeat_penalty: 2.0, repeat_last_n: last_n, ..Sampling::greedy() };
        let mut sampler = Sampler::new(sampling).unwrap();
        let mut session = session(&file, &exact());
        for turn in turns {
            session.generate(turn, 8, &mut sampler, |_| false, |_| ControlFlow::Continue(())).unwrap();
        }
        // Each token again, from the logits of all before it at once.
        let text = session.text().to_vec();
        let logits = score(&file, &exact(), &text);
        for at in (12..20).chain(26..34) {
            let chosen = sampler.sample(&mut logits[at - 1].clone(), &text[..at]).unwrap();
            assert_eq!(chosen, text[at], "the token at {at}, the last {last_n} penalised");
        }
        texts.push(text);
    }
    for (i, text) in texts.iter().enumerate() {
        assert!(!texts[..i].contains(text), "how many are penalised makes no difference");
    }
}

#[test]
fn a_window_in_chunks_has_the_perplexity_of_the_window() {
    let tokens = &oracle().tokens[..32];
    let file = open("q4_k_m");
    let of = |chunk| {
        let mut session = session(&file, &Options { chunk, ..exact() });
        let mut perplexity = Perplexity::default();
        // Whatever was read before is forgotten.
        generate(&mut session, &tokens[..3], 2);
        perplexity.window(&mut session, tokens, Some(0)).unwrap();
        perplexity.estimate()
    };
    // Tokens 17 to 31, each from the row before.
    let rows = oracle_logits("q4_k_m");
    let nll = |row: usize| {
        let logits: Vec<f64> = rows[row].iter().map(|&x| x.into()).collect();
        logits.iter().map(|x| x.exp()).sum::<f64>().ln() - logits[tokens[row + 1] as usize]
    };
    let expected = ((16..31).map(nll).sum::<f64>() / 15.0).exp();
    for chunk in [5, 16, 32] {
        assert!((of(chunk) / expected - 1.0).abs() < 1e-4, "chunks of {chunk}: {} of {expected}", of(chunk));
    }
}
