//! What few architectures or none have: a recurrence that replaces its row at each token, a window that bounds the pages of a
//! cache, experts that the device chooses. Small graphs with weights of their own, fused and not, against arithmetic in double precision.

mod support;

use sinter::codegen::spec::IndexSource;
use sinter::codegen::{self, Layouts};
use sinter::gguf::{GgmlType, GgufFile, GgufWriter};
use sinter::ir::{DType, Dim, Graph, KvTypes, Report, verify};
use sinter::passes::Pipeline;
use sinter::plan::{LoadedPlan, Model, Options, Output, Parts, Plan};
use sinter::runtime::{BatchError, DeviceOptions, Executor, Part, SequenceId, Sequences, Wanted};
use std::sync::Arc;
use support::{distance, everywhere};

const VOCABULARY: usize = 16;

/// Weights by name: shape, and numbers of about this size.
type Weights = [(&'static str, &'static [usize], f32)];

fn numbers(name: &str, n: usize, scale: f32) -> Vec<f32> {
    let mut bytes = vec![0; 2 * n];
    blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes.chunks(2).map(|b| scale * (f32::from(i16::from_le_bytes([b[0], b[1]])) / 32768.0)).collect()
}

fn file(weights: &Weights) -> Arc<GgufFile> {
    let mut writer = GgufWriter::new();
    for &(name, shape, scale) in weights {
        let bytes = bytemuck::cast_slice(&numbers(name, shape.iter().product(), scale)).to_vec();
        let shape: Vec<u64> = shape.iter().map(|n| *n as u64).collect();
        writer.tensor(name, GgmlType::of(DType::F32).unwrap(), &shape, bytes).unwrap();
    }
    let mut bytes = vec![];
    writer.write_to(&mut bytes).unwrap();
    Arc::new(GgufFile::from_bytes(bytes).unwrap())
}

/// `x · wᵀ` of one row, with the weight of this name.
fn project(x: &[f64], weights: &Weights, name: &str) -> Vec<f64> {
    let &(_, shape, scale) = weights.iter().find(|w| w.0 == name).unwrap();
    let w = numbers(name, shape.iter().product(), scale);
    w.chunks(shape[shape.len() - 1]).map(|w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
}

fn embedding(token: u32, weights: &Weights) -> Vec<f64> {
    let &(name, shape, scale) = &weights[0];
    let (table, columns) = (numbers(name, shape.iter().product(), scale), shape[1]);
    table[token as usize * columns..][..columns].iter().map(|x| f64::from(*x)).collect()
}

/// A plan of one graph for steps of up to 8 tokens.
fn sequences(text: &str, file: &Arc<GgufFile>, fused: bool, context: u64, most: u64) -> Sequences {
    let mut graph = Graph::parse(text).unwrap_or_else(|e| panic!("{e}"));
    let target = support::target();
    let pipeline = Pipeline::standard(true);
    let pipeline = if fused { pipeline } else { pipeline.without_fusions() };
    pipeline.run(&mut graph, &target).unwrap();
    let program = codegen::generate(&verify(graph).unwrap(), &target, &Layouts::default()).unwrap();
    let kv = KvTypes::both(DType::F32);
    let parts = Parts {
        model: Model {
            source: None,
            identity: file.identity(),
            full_hash: None,
            architecture: "none".into(),
            name: "none".into(),
        },
        target,
        options: Options { exact: true, kv, context, sequences: most, chunk: 8, greedy: false },
        programs: vec![(program, Report::default())],
    };
    let plan = LoadedPlan::from_bytes(&Plan::build(parts).unwrap().to_bytes().unwrap()).unwrap();
    let executor = Executor::new(plan, Arc::clone(file), &DeviceOptions::default()).unwrap();
    let mut sequences = Sequences::new(executor).unwrap();
    sequences.poison_free_pages().unwrap();
    sequences
}

fn part(sequence: SequenceId, tokens: &[u32]) -> Part<'_> {
    Part { sequence, tokens, wanted: Wanted::All }
}

/// Tokens of a sequence, and the logits that are expected of them.
type Read<'a> = (SequenceId, &'a [u32], &'a [Vec<f32>]);

/// Reads these parts and holds the logits to what is expected.
#[track_caller]
fn reads(sequences: &mut Sequences, parts: &[Read<'_>]) {
    let steps: Vec<Part<'_>> = parts.iter().map(|&(id, tokens, _)| part(id, tokens)).collect();
    sequences.step(&steps, Output::Logits).unwrap();
    let found = sequences.logits().unwrap().to_vec();
    let expected: Vec<f32> = parts.iter().flat_map(|(.., rows)| rows.concat()).collect();
    let error = distance(&found, &expected);
    assert!(error < 2e-6, "{error:e}");
}

const N: usize = 40;
const RECURRENT: &Weights = &[
    ("table", &[VOCABULARY, N], 1.0),
    ("decay", &[N, N], 0.15),
    ("gate", &[N, N], 0.5),
    ("head", &[VOCABULARY, N], 1.0),
];

const RECURRENCE: &str = r#"graph @t8(%tokens: i32[T], %positions: i32[T], %sequences: i32[T], %wanted: i32[R]) sym T<=8, R<=8 {
  %w0 = weight "table" : f32[16,40]
  %0 = get_rows %w0, %tokens : f32[T,40]
  %w1 = weight "decay" : f32[40,40]
  %1 = matmul %0, %w1 : f32[T,40]
  %w2 = weight "gate" : f32[40,40]
  %2 = matmul %0, %w2 : f32[T,40]
  %3 = silu %2 : f32[T,40]
  %4 = mul %3, %0 : f32[T,40]
  %s0 = state "h" : f32[3,40] replaced
  %5, %6 = gated_scan %s0, %1, %4, %sequences, %positions : f32[T,40], f32[3,40]
  %7 = get_rows %5, %wanted : f32[R,40]
  %w3 = weight "head" : f32[16,40]
  %8 = matmul %7, %w3 : f32[R,16]
  return %8, %6
}"#;

/// The logits of each token of a text.
fn recurrent(tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut h = vec![0.0; N];
    let mut rows = vec![];
    for &token in tokens {
        let x = embedding(token, RECURRENT);
        let (decay, gate) = (project(&x, RECURRENT, "decay"), project(&x, RECURRENT, "gate"));
        for i in 0..N {
            h[i] = decay[i] * h[i] + gate[i] / (1.0 + (-gate[i]).exp()) * x[i];
        }
        rows.push(project(&h, RECURRENT, "head").iter().map(|x| *x as f32).collect());
    }
    rows
}

#[test]
fn a_recurrence_runs_fused_and_unfused() {
    everywhere(|| {
        let file = file(RECURRENT);
        for fused in [true, false] {
            let mut sequences = sequences(RECURRENCE, &file, fused, 100, 3);
            let text: Vec<u32> = (0..40).map(|i| (i * i + 3 * i) % 16).collect();
            let other: Vec<u32> = (0..40).map(|i| (7 * i + 5) % 16).collect();
            let (expected, of_other) = (recurrent(&text), recurrent(&other));
            let (a, b) = (sequences.begin().unwrap(), sequences.begin().unwrap());
            reads(&mut sequences, &[(a, &text[..5], &expected[..5]), (b, &other[..1], &of_other[..1])]);
            reads(&mut sequences, &[(b, &other[1..4], &of_other[1..4]), (a, &text[5..6], &expected[5..6])]);

            // A fork goes on from where it is, and what it reads does not reach the other.
            let fork = sequences.fork(a).unwrap();
            let forked = [&text[..6], &other[..4]].concat();
            reads(&mut sequences, &[(fork, &forked[6..10], &recurrent(&forked)[6..])]);
            reads(&mut sequences, &[(a, &text[6..12], &expected[6..12])]);

            // What such a state was is gone, but for nothing at all.
            for to in [1, 11] {
                let says = sequences.truncate(a, to).unwrap_err().to_string();
                assert!(says.ends_with("its recurrent states keep nothing of what they were"), "{says}");
            }
            assert_eq!(sequences.length(a).unwrap(), 12);
            reads(&mut sequences, &[(a, &text[12..20], &expected[12..20])]);
            sequences.truncate(a, 0).unwrap();
            reads(&mut sequences, &[(a, &other[..3], &of_other[..3])]);
            // A sequence in the place of another begins afresh.
            sequences.end(b).unwrap();
            let c = sequences.begin().unwrap();
            reads(&mut sequences, &[(c, &text[..8], &expected[..8])]);
            assert!(matches!(sequences.begin(), Err(BatchError::Sequences { most: 3 })));
            // The gate is part of the fused recurrence.
            let counts = sequences.executor().launch_counts();
            assert!(counts.contains_key("gated_scan") && counts.contains_key("silu") != fused, "{counts:?}");
        }
    });
}

const W: usize = 16;
const WINDOWED: &Weights = &[
    ("table", &[VOCABULARY, W], 1.0),
    ("q", &[W, W], 1.0),
    ("k", &[8, W], 1.0),
    ("v", &[8, W], 1.0),
    ("head", &[VOCABULARY, W], 1.0),
];

/// Tokens that a token sees, itself included.
const WINDOW: usize = 40;

/// Two sequences of up to 1000 tokens over 8 pages of 32 rows.
const WINDOWS: &str = r#"graph @t8(%tokens: i32[T], %positions: i32[T], %sequences: i32[T], %rows: i32[T], %tables: i32[2,32], %lengths: i32[2], %wanted: i32[R]) sym T<=8, R<=8 {
  %w0 = weight "table" : f32[16,16]
  %0 = get_rows %w0, %tokens : f32[T,16]
  %w1 = weight "q" : f32[16,16]
  %1 = matmul %0, %w1 : f32[T,16]
  %2 = reshape %1 : f32[T,2,8]
  %w2 = weight "k" : f32[8,16]
  %3 = matmul %0, %w2 : f32[T,8]
  %4 = reshape %3 : f32[T,1,8]
  %w3 = weight "v" : f32[8,16]
  %5 = matmul %0, %w3 : f32[T,8]
  %6 = reshape %5 : f32[T,1,8]
  %s0 = state "k" : f32[256,1,8] appended
  %7 = kv_append %s0, %4, %rows : f32[256,1,8]
  %8 = kv_read %7, %tables, %lengths {page=32} : f32[2,1024,1,8]
  %s1 = state "v" : f32[256,1,8] appended
  %9 = kv_append %s1, %6, %rows : f32[256,1,8]
  %10 = kv_read %9, %tables, %lengths {page=32} : f32[2,1024,1,8]
  %11 = scores %2, %8, %sequences {scale=0.5} : f32[2,T,1024]
  %12 = causal_mask %11, %positions {window=40} : f32[2,T,1024]
  %13 = softmax %12 : f32[2,T,1024]
  %14 = weighted_sum %13, %10, %sequences : f32[T,2,8]
  %15 = reshape %14 : f32[T,16]
  %16 = get_rows %15, %wanted : f32[R,16]
  %w4 = weight "head" : f32[16,16]
  %17 = matmul %16, %w4 : f32[R,16]
  return %17, %7, %9
}"#;

fn windowed(tokens: &[u32]) -> Vec<Vec<f32>> {
    let rows: Vec<[Vec<f64>; 3]> = tokens
        .iter()
        .map(|&token| {
            let x = embedding(token, WINDOWED);
            ["q", "k", "v"].map(|name| project(&x, WINDOWED, name))
        })
        .collect();
    let mut logits = vec![];
    for t in 0..tokens.len() {
        let seen = &rows[(t + 1).saturating_sub(WINDOW)..=t];
        let mut mixed = vec![];
        for head in rows[t][0].chunks(8) {
            let score = |k: &[f64]| (0.5 * k.iter().zip(head).map(|(k, q)| k * q).sum::<f64>()).exp();
            let weights: Vec<f64> = seen.iter().map(|row| score(&row[1])).collect();
            let total: f64 = weights.iter().sum();
            mixed.extend(
                (0..8).map(|i| seen.iter().zip(&weights).map(|(row, w)| w / total * row[2][i]).sum::<f64>()),
            );
        }
        logits.push(project(&mixed, WINDOWED, "head").iter().map(|x| *x as f32).collect());
    }
    logits
}

#[test]
fn a_window_bounds_the_pages_that_a_sequence_keeps() {
    everywhere(|| {
        let file = file(WINDOWED);
        for fused in [true, false] {
            let mut sequences = sequences(WINDOWS, &file, fused, 1000, 2);
            assert_eq!(sequences.paging().unwrap().window, Some(WINDOW as u64));
            let text: Vec<u32> = (0..600).map(|i| (i * i + 3 * i + i / 7) % 16).collect();
            let other: Vec<u32> = (0..600).map(|i| (7 * i + 5 + i / 11) % 16).collect();
            let (expected, of_other) = (windowed(&text), windowed(&other));
            let (a, b) = (sequences.begin().unwrap(), sequences.begin().unwrap());
            // Together they are far longer than all pages.
            let mut least = sequences.free_pages();
            for (i, n) in [5usize, 3, 7, 1].into_iter().cycle().enumerate() {
                let at = sequences.length(a).unwrap() as usize;
                if at + 8 > 560 {
                    break;
                }
                let drafts = at..at + n;
                reads(
                    &mut sequences,
                    &[
                        (a, &text[drafts.clone()], &expected[drafts.clone()]),
                        (b, &other[at..at + 1], &of_other[at..at + 1]),
                    ],
                );
                // Drafts are taken back, and read again one by one.
                if i % 3 == 0 {
                    sequences.truncate(a, at as u64).unwrap();
                    for t in drafts.clone() {
                        reads(&mut sequences, &[(a, &text[t..t + 1], &expected[t..t + 1])]);
                    }
                }
                if n > 1 {
                    reads(&mut sequences, &[(b, &other[at + 1..at + n], &of_other[at + 1..at + n])]);
                }
                least = least.min(sequences.free_pages());
            }
            assert!(least >= 8 - 2 * sequences.pages_of(600), "{least} pages are free at least");
            assert!(sequences.pages_of(600) <= 4);
            // Far back there is nothing to go on from.
            let length = sequences.length(a).unwrap();
            let says = sequences.truncate(a, length - 100).unwrap_err().to_string();
            assert!(says.ends_with("the window has left behind what it would see"), "{says}");
            let at = length as usize;
            let fork = {
                sequences.end(b).unwrap();
                sequences.fork(a).unwrap()
            };
            reads(&mut sequences, &[(fork, &text[at..at + 8], &expected[at..at + 8])]);
            reads(&mut sequences, &[(a, &text[at..at + 3], &expected[at..at + 3])]);
            sequences.end(a).unwrap();
            sequences.end(fork).unwrap();
            assert_eq!(sequences.free_pages(), 8);
        }
    });
}

const EXPERTS: &Weights = &[
    ("table", &[VOCABULARY, 24], 1.0),
    ("router", &[5, 24], 1.0),
    ("experts", &[5, 20, 24], 1.0),
    ("head", &[VOCABULARY, 20], 1.0),
];

const CHOSEN: &str = r#"graph @t8(%tokens: i32[T], %positions: i32[T], %sequences: i32[T], %wanted: i32[R]) sym T<=8, R<=8 {
  %w0 = weight "table" : f32[16,24]
  %0 = get_rows %w0, %tokens : f32[T,24]
  %w1 = weight "router" : f32[5,24]
  %1 = matmul %0, %w1 : f32[T,5]
  %2 = argmax %1 : i32[T]
  %w2 = weight "experts" : f32[5,20,24]
  %3 = matmul_id %0, %w2, %2 : f32[T,20]
  %4 = get_rows %3, %wanted : f32[R,20]
  %w3 = weight "head" : f32[16,20]
  %5 = matmul %4, %w3 : f32[R,16]
  return %5
}"#;

/// Matrices of one tensor, of which the device chooses one for each token.
#[test]
fn experts_that_the_device_chose() {
    everywhere(|| {
        let file = file(EXPERTS);
        let mut chosen = std::collections::BTreeSet::new();
        let logits = |token: u32, chosen: &mut std::collections::BTreeSet<usize>| -> Vec<f32> {
            let x = embedding(token, EXPERTS);
            let scores = project(&x, EXPERTS, "router");
            let best = (0..5).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap();
            chosen.insert(best);
            let y = project(&x, EXPERTS, "experts")[best * 20..][..20].to_vec();
            project(&y, EXPERTS, "head").iter().map(|x| *x as f32).collect()
        };
        for fused in [true, false] {
            let mut sequences = sequences(CHOSEN, &file, fused, 100, 1);
            let text: Vec<u32> = (0..16).collect();
            let expected: Vec<Vec<f32>> = text.iter().map(|token| logits(*token, &mut chosen)).collect();
            let id = sequences.begin().unwrap();
            for at in [0..8, 8..9, 9..16] {
                reads(&mut sequences, &[(id, &text[at.clone()], &expected[at])]);
            }
            // What is followed is no input, so the executor cannot check it and the kernel clamps it.
            let plan = sequences.executor().plan();
            let kernel = plan.kernels.iter().find(|k| k.spec.name() == "matmul_id").unwrap();
            let index = kernel.spec.args[2].index.unwrap();
            assert_eq!((index.below, index.source), (Dim::n(5), IndexSource::Device));
        }
        assert!(chosen.len() > 2, "{chosen:?}");
    });
}

const SQUARE: &Weights =
    &[("table", &[VOCABULARY, 8], 1.0), ("w", &[8, 8], 1.0), ("head", &[VOCABULARY, 8], 1.0)];

/// The residual is what is multiplied: its rows are read until the last of the matmul's work items.
const TWICE: &str = r#"graph @t8(%tokens: i32[T], %positions: i32[T], %sequences: i32[T], %wanted: i32[R]) sym T<=8, R<=8 {
  %w0 = weight "table" : f32[16,8]
  %0 = get_rows %w0, %tokens : f32[T,8]
  %1 = mul %0, %0 : f32[T,8]
  %w1 = weight "w" : f32[8,8]
  %2 = matmul %1, %w1 : f32[T,8]
  %3 = add %1, %2 : f32[T,8]
  %4 = silu %3 : f32[T,8]
  %5 = get_rows %4, %wanted : f32[R,8]
  %w2 = weight "head" : f32[16,8]
  %6 = matmul %5, %w2 : f32[R,16]
  return %6
}"#;

#[test]
fn a_residual_that_is_multiplied_too_is_not_overwritten() {
    everywhere(|| {
        let file = file(SQUARE);
        let logits = |token: u32| -> Vec<f32> {
            let x: Vec<f64> = embedding(token, SQUARE).iter().map(|x| x * x).collect();
            let y = project(&x, SQUARE, "w").into_iter().zip(&x).map(|(y, x)| y + x);
            let y: Vec<f64> = y.map(|y| y / (1.0 + (-y).exp())).collect();
            project(&y, SQUARE, "head").iter().map(|x| *x as f32).collect()
        };
        for fused in [true, false] {
            let mut sequences = sequences(TWICE, &file, fused, 100, 1);
            let text: Vec<u32> = (0..8).collect();
            let expected: Vec<Vec<f32>> = text.iter().map(|token| logits(*token)).collect();
            let id = sequences.begin().unwrap();
            reads(&mut sequences, &[(id, &text, &expected)]);
            let kernels = sequences.executor().launch_counts();
            assert_eq!(kernels.contains_key("add"), !fused, "{kernels:?}");
        }
    });
}
