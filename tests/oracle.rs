//! Whole models against exact answers (`tests/data/oracle`), and against themselves compiled in other ways.

mod support;

use sinter::check::{Caches, check_step};
use sinter::compile::{Options, Purpose};
use sinter::generate::{EncodeOptions, Perplexity, Sampler, Sampling, Stop, Tokenizer};
use sinter::gguf::GgufFile;
use sinter::ir::DType;
use sinter::lower::{Config, Step};
use sinter::model;
use sinter::passes::{NOT_FUSIONS, names};
use sinter::runtime::DeviceOptions;
use sinter::runtime::interp::Tensor;
use std::ops::ControlFlow;
use std::sync::Arc;
use support::everywhere::cases;
use support::*;

/// What float32 arithmetic in another order may change.
const SAME: f64 = 1e-5;

fn ids(tokens: &[u32]) -> Vec<i32> {
    tokens.iter().map(|&id| id as i32).collect()
}

/// The tokens that a session generates greedily from the oracle's prompt.
fn greedy(file: &Arc<GgufFile>, options: &Options, prompt: &str, count: usize) -> Vec<u32> {
    let prompt = Tokenizer::from_gguf(file.gguf()).unwrap().encode(prompt, EncodeOptions::default());
    let mut session =
        model::session(file, None, options, Purpose::Generate, &DeviceOptions::default()).unwrap();
    let mut sampler = Sampler::new(Sampling::greedy()).unwrap();
    let mut found = vec![];
    let keep = |id| {
        found.push(id);
        ControlFlow::Continue(())
    };
    let stop = session.generate(&prompt, count, &mut sampler, |_| false, keep).unwrap();
    assert_eq!(stop, Stop::Count);
    found
}

#[test]
fn logits_are_those_of_the_oracle() {
    everywhere(|| {
        let tokens = oracle().tokens;
        for name in MODELS {
            let file = open(name);
            let expected = oracle_logits(name);
            assert_eq!(expected.len(), tokens.len());
            for (path, options, tolerance) in [
                ("exact", exact(), 2e-6),
                ("f16 cache", float_activations(defaults()), 1e-3),
                ("default", defaults(), 2.5e-2),
            ] {
                for (level, device) in levels() {
                    let found = score_on(&file, &options, &tokens, &device);
                    assert_close(&format!("{name} {path}, {level}"), &found, &expected, tolerance);
                }
            }
        }
    });
}

#[test]
fn another_epsilon_is_seen() {
    // What shows that the comparison with the oracle can fail.
    let file = open("q4_k_m");
    let mut plan = model::plan(&file, None, &exact(), Purpose::Score).unwrap();
    for kernel in &mut plan.kernels {
        if let sinter::codegen::spec::Computation::Norm(norm) = &mut kernel.spec.computes {
            norm.eps *= 2.0;
        }
    }
    let plan = sinter::plan::LoadedPlan::from_bytes(&plan.to_bytes().unwrap()).unwrap();
    let executor = sinter::runtime::Executor::new(plan, file, &Default::default()).unwrap();
    let found = rows(&mut sinter::generate::Session::new(executor).unwrap(), &oracle().tokens);
    let error = worst(&found, &oracle_logits("q4_k_m"));
    assert!(error > SAME, "{error:e}");
}

#[test]
fn every_subset_of_the_fusions_computes_the_same() {
    everywhere(|| {
        let tokens = oracle().tokens;
        for name in MODELS.into_iter().take(cases(MODELS.len())) {
            let file = open(name);
            let fused = score(&file, &exact(), &tokens);
            let plain = score(&file, &unfused(exact()), &tokens);
            assert_close(&format!("{name} --no-fuse"), &plain, &fused, SAME);
            for pass in names().into_iter().filter(|pass| !NOT_FUSIONS.contains(pass)) {
                let partly = score(&file, &without(pass, exact()), &tokens);
                assert_close(&format!("{name} without {pass}"), &partly, &fused, SAME);
            }
        }
    });
}

#[test]
fn quantised_activations_are_no_fusion() {
    everywhere(|| {
        // With quantise_acts in both, fusing must not change the numbers either; a rounding may fall the other way.
        let tokens = oracle().tokens;
        let file = open("q4_k_m");
        for (level, device) in levels() {
            let fused = score_on(&file, &defaults(), &tokens, &device);
            let plain = score_on(&file, &unfused(defaults()), &tokens, &device);
            assert_close(&format!("8-bit activations, --no-fuse, {level}"), &plain, &fused, 2e-2);
        }
    });
}

#[test]
fn chunks_of_a_prompt_compute_the_same() {
    everywhere(|| {
        let tokens = oracle().tokens;
        for name in MODELS {
            let file = open(name);
            let expected = oracle_logits(name);
            for chunk in [1, 7, 32, 512] {
                let options = Options { chunk, ..exact() };
                let what = format!("{name}, chunks of {chunk}");
                let scored = score(&file, &options, &tokens);
                assert_close(&what, &scored, &expected, SAME);

                // The way that generation takes: chunks without a head, then the last with the head of its last row.
                let mut reader = Reader::new(executor(&file, &options, Purpose::Generate));
                let (before, last) = tokens.split_at((tokens.len() - 1) / chunk as usize * chunk as usize);
                before.chunks(chunk as usize).for_each(|part| reader.skip(part));
                let last = vec![reader.last(last)];
                assert_close(&format!("{what}, last row"), &last, &scored[scored.len() - 1..], SAME);
            }
        }
    });
}

#[test]
fn token_by_token_equals_at_once() {
    everywhere(|| {
        let tokens = oracle().tokens;
        for name in MODELS {
            let file = open(name);
            let mut reader = Reader::new(executor(&file, &exact(), Purpose::Generate));
            let rows: Vec<Vec<f32>> = tokens.iter().map(|&id| reader.last(&[id])).collect();
            assert_close(&format!("{name} token by token"), &rows, &score(&file, &exact(), &tokens), SAME);
        }
    });
}

#[test]
fn greedy_text_is_that_of_the_oracle() {
    everywhere(|| {
        let oracle = oracle();
        for name in MODELS {
            let (file, wanted) = (open(name), &oracle.models[name]);
            let count = wanted.greedy_tokens.len();
            let found = greedy(&file, &exact(), &wanted.greedy_prompt, count);
            assert_eq!(found, wanted.greedy_tokens, "{name} exact");
            let tokenizer = Tokenizer::from_gguf(file.gguf()).unwrap();
            let text = format!("{}{}", wanted.greedy_prompt, tokenizer.decode(&found));
            assert_eq!(text, wanted.greedy_text, "{name}");

            // Where two tokens are nearly as good, 8-bit activations may take the other.
            let sure = wanted.margins.iter().position(|&margin| margin < 0.3).unwrap_or(count);
            assert!(sure >= 4, "the oracle says nothing about the default path");
            let found = greedy(&file, &defaults(), &wanted.greedy_prompt, sure);
            assert_eq!(found, wanted.greedy_tokens[..sure], "{name} by default");
        }
    });
}

#[test]
fn the_greedy_plan_takes_the_best_of_the_logits() {
    everywhere(|| {
        let oracle = oracle();
        for name in MODELS {
            let file = open(name);
            for (path, options) in [("exact", exact()), ("default", defaults())] {
                let prompt = &oracle.models[name].greedy_prompt;
                let of_logits = greedy(&file, &options, prompt, 24);
                let of_plan = greedy(&file, &Options { greedy: true, ..options }, prompt, 24);
                assert_eq!(of_plan, of_logits, "{name} {path}");
            }
        }
    });
}

#[test]
fn perplexity_is_that_of_the_oracle() {
    everywhere(|| {
        const WINDOW: usize = 512;
        let json = std::fs::read_to_string(path("tests/data/oracle/perplexity.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["window_tokens"], WINDOW);
        let windows = json["windows"].as_u64().unwrap() as usize;
        let text = std::fs::read_to_string(path("tests/data/oracle/held_out.txt")).unwrap();
        // Where arithmetic is checked, each takes most of a minute.
        for name in MODELS.into_iter().take(if cfg!(debug_assertions) { 1 } else { 2 }) {
            let file = open(name);
            let tokenizer = Tokenizer::from_gguf(file.gguf()).unwrap();
            let tokens = tokenizer.encode(&text, EncodeOptions::default());
            let options = Options { context: Some(WINDOW as u64), ..exact() };
            let mut session =
                model::session(&file, None, &options, Purpose::Score, &DeviceOptions::default()).unwrap();
            let mut perplexity = Perplexity::default();
            for window in tokens.chunks_exact(WINDOW).take(windows) {
                perplexity.window(&mut session, window, tokenizer.bos()).unwrap();
            }
            let (found, wanted) = (perplexity.estimate(), json["perplexity"][name].as_f64().unwrap());
            println!("{name}: {found} of {wanted}");
            assert!((found / wanted - 1.0).abs() <= 5e-4, "{name}: perplexity {found}, not {wanted}");
        }
    });
}

#[test]
fn threads_and_repetition_change_no_bit() {
    let tokens = oracle().tokens;
    let bits = |rows: Vec<Vec<f32>>| -> Vec<u32> { rows.concat().into_iter().map(f32::to_bits).collect() };
    for (name, options) in [("q4_k_m", defaults()), ("q4_k_m", exact()), ("q8_0", defaults())] {
        let file = open(name);
        let on = |threads| {
            let device = DeviceOptions { threads: Some(threads), ..DeviceOptions::default() };
            bits(score_on(&file, &options, &tokens, &device))
        };
        let one = on(1);
        for threads in [1, 2, 5] {
            let found = on(threads);
            assert!(found == one, "{name}: {threads} threads give other logits");
        }
    }
}

#[test]
fn a_reset_session_starts_afresh() {
    everywhere(|| {
        let tokens = &oracle().tokens[..16];
        let file = open("q4_k_m");
        let mut session =
            model::session(&file, None, &defaults(), Purpose::Score, &DeviceOptions::default()).unwrap();
        let first = rows(&mut session, tokens);
        let next = rows(&mut session, tokens);
        assert_ne!(first, next, "the second time they follow the first");
        session.reset().unwrap();
        assert_eq!(session.filled(), 0);
        assert_eq!(rows(&mut session, tokens), first);
    });
}

fn step(options: &Options, config: &Config, tokens: u64) -> Step {
    let Options { greedy, kv, sequences, .. } = *options;
    Step { tokens, wanted: tokens, greedy, kv, context: options.context_of(config), sequences }
}

#[test]
fn every_kernel_computes_its_body() {
    everywhere(|| {
        let tokens = ids(&oracle().tokens[..6]);
        let (last, first) = tokens.split_last().unwrap();
        for name in MODELS {
            let file = open(name);
            let config = Config::from_gguf(file.gguf()).unwrap();
            for (path, options) in [
                ("exact", exact()),
                ("default", defaults()),
                ("greedy", Options { greedy: true, ..defaults() }),
            ] {
                let options = Options { context: Some(8), ..options };
                let mut caches = Caches::new();
                for (tokens, cached) in [(first, 0), (std::slice::from_ref(last), first.len() as u64)] {
                    let step = step(&options, &config, tokens.len() as u64);
                    let outcome = check_step(
                        &file,
                        &options,
                        &DeviceOptions::default(),
                        &step,
                        tokens,
                        cached,
                        &mut caches,
                    )
                    .unwrap();
                    let what = format!("{name} {path} {}", step.name());
                    assert!(outcome.nodes.len() > 6 * config.layers.len(), "{what}: too few nodes compared");
                    assert!(
                        outcome.passes(),
                        "{what}: {:?}, whole {:e}",
                        outcome.first_divergence(),
                        outcome.whole
                    );
                }
            }
        }
    });
}

#[test]
fn a_cache_that_is_no_number_fails_the_check() {
    let file = open("q4_k_m");
    let config = Config::from_gguf(file.gguf()).unwrap();
    let options = Options { context: Some(8), ..exact() };
    let step = step(&options, &config, 1);
    let dims = vec![32, config.layers[0].kv_heads as usize, config.layers[0].head_dim as usize];
    let nan = vec![0xff; 4 * dims.iter().product::<usize>()];
    let broken = Tensor::new(DType::F32, dims, nan).unwrap();
    let mut caches = Caches::from_iter([("blk.0.v".to_string(), broken)]);
    let outcome =
        check_step(&file, &options, &DeviceOptions::default(), &step, &[33], 2, &mut caches).unwrap();
    assert!(!outcome.passes());
    let first = outcome.first_divergence().expect("a node that diverges");
    assert_eq!(first.kernel, "rope_kv", "the first that hands the cache on");
    assert!(first.error.is_nan() && outcome.whole.is_nan());
}
