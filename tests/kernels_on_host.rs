//! The kernels of GPUs, compiled for the CPU under AddressSanitizer and UndefinedBehaviorSanitizer, against the interpreter: what they
//! compute, and that they touch nothing but their arguments, read nothing that nobody wrote, and miss no barrier. Needs clang-19.

#[path = "support/host_cases.rs"]
mod host_cases;
#[path = "support/kinds.rs"]
mod kinds;
#[allow(dead_code)]
#[path = "support/lanes.rs"]
mod lanes;
#[allow(dead_code)]
#[path = "support/synthetic.rs"]
mod synthetic;

use half::{bf16, f16};
use host_cases::Case;
use lanes::{LaneDevice, Lanes};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sinter::check::{Caches, Open, check_step_on};
use sinter::codegen::spec::HipCode;
use sinter::target::{AMD, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

/// Says something that is seen where tests that pass keep what they print to themselves.
fn say(what: &str) {
    _ = writeln!(std::io::stderr(), "{what}");
}

/// Names an architecture and a seed in the environment of a process of this test that has the sanitizers' library.
const LANES: &str = "SINTER_TEST_LANES";

/// Runs `cases` in a process with sanitizers.
fn under_sanitizers(cases: &str, arch: &str, seed: u64) {
    let library = match lanes::sanitizers() {
        Ok(library) => library,
        Err(why) => return say(&format!("skipped: {why}")),
    };
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", cases, "--ignored", "--nocapture"])
        .env(LANES, format!("{arch} {seed}"))
        .env("LD_PRELOAD", library)
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .env("UBSAN_OPTIONS", "print_stacktrace=1")
        .output()
        .unwrap();
    let said = format!("{}\n{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && said.contains("1 passed"), "{arch}, seed {seed}: {said}");
}

/// The lanes of a process that was begun so.
fn lanes() -> Option<(Arc<Lanes>, Target)> {
    let told = std::env::var(LANES).ok()?;
    let (arch, seed) = told.split_once(' ').unwrap();
    Some((Arc::new(Lanes::new(arch, seed.parse().unwrap())), Target::gpu(arch).unwrap()))
}

/// Kernels against their bodies: those of a prompt, which is no whole number of tiles, of a few tokens and of a single one
/// after it.
fn check(lanes: &Arc<Lanes>, cases: &[Case]) {
    // All are compiled at once, before the first runs.
    let start = Instant::now();
    let codes: Vec<HipCode> = cases.iter().flat_map(Case::codes).collect();
    let collected = start.elapsed();
    lanes.compile(&codes);
    let compiled = start.elapsed();
    for case in cases {
        let (mut caches, mut cached) = (Caches::new(), 0);
        for (step, tokens) in case.runs() {
            let open: Open<'_> = &|plan, model| LaneDevice::open(lanes, plan, &model);
            let step = check_step_on(open, &case.file, &case.options, &step, &tokens, cached, &mut caches);
            let step = step.unwrap_or_else(|e| panic!("{}: {e}", case.name));
            cached += tokens.len() as u64;
            for node in &step.nodes {
                assert!(node.passes(), "{}: {} of {}: {}", case.name, node.kernel, node.at, node.error);
            }
        }
    }
    println!(
        "sources {collected:.1?}, compiled {:.1?}, ran {:.1?}",
        compiled - collected,
        start.elapsed() - compiled
    );
}

#[test]
#[ignore = "run by others in a process with sanitizers"]
fn some() {
    let Some((lanes, target)) = lanes() else { return };
    check(&lanes, &host_cases::some(&target));
}

/// What a model is compiled to and no case of those that run each time runs, by template, formats, layouts, activations, tokens and rows at once
/// ([`kinds`]): for all architectures, each kind in waves of 32 or of 64.
#[test]
#[cfg_attr(debug_assertions, ignore = "kernels are the same as in an optimised build")]
fn every_kind_of_kernel_of_a_model_runs_on_the_host() {
    let target = |arch: &str| Target::gpu(arch).unwrap();
    let run: BTreeSet<String> = ["gfx1100", "gfx942"]
        .into_iter()
        .flat_map(|arch| host_cases::kinds_of_cases(&host_cases::some(&target(arch))))
        .collect();
    let mut models = BTreeMap::new();
    for arch in AMD {
        // Of all formats in both waves.
        let kinds = host_cases::kinds_of_models(&target(arch), ["gfx1100", "gfx942"].contains(&arch));
        kinds.into_iter().for_each(|(kind, place)| _ = models.entry(kind).or_insert(place));
    }
    assert!(models.len() > 500, "{} kinds", models.len());
    models.retain(|kind, _| !run.contains(kind));
    let missing: Vec<String> = models.iter().map(|(kind, place)| format!("{place}: {kind}")).collect();
    assert!(missing.is_empty(), "{} kinds run nowhere here:\n{}", missing.len(), missing.join("\n"));
}

/// Each of two warps multiplies sixteen rows by sixteen others: of 16 bytes, of 32 and of 16 halves, which it adds to what is there; sums the
/// rows of these results, as a softmax does; and multiplies rows of 16 floats without their lower halves, and twice of 16 halves that may be small.
const FRAGMENTS: &str = r#"#include "reduce.h"

template <int K>
DEVICE void rows(const u8* left, const u8* right, float* out) {
    Left<K> a;
    Right<K> b;
    a.load(left, 80), b.load(right, 80);
    float sums[SUMS];
    multiply_rows<K>(a, b, sums);
    for (int i = 0; i < SUMS; i++) out[16 * left_row(i) + right_row(i)] = sums[i];
}

KERNEL(fragments, 2 * WARP, 1)(const u8* left, const u8* right, float* narrow, float* wide, float* halves, float* of_rows,
                                const u8* left_numbers, const u8* right_numbers, float* bfloats, float* small) {
    left += warp() * 16 * 80, right += warp() * 16 * 80, halves += warp() * 256;
    rows<16>(left, right, narrow + warp() * 256);
    rows<32>(left, right, wide + warp() * 256);
    Left<32> a;
    Right<32> b;
    a.load(left + 32, 80), b.load(right + 32, 80);
    float sums[SUMS], total[LEFT_OF_LANE] = {};
    for (int i = 0; i < SUMS; i++) sums[i] = halves[16 * left_row(i) + right_row(i)];
    multiply_halves(a, b, sums);
    for (int i = 0; i < SUMS; i++) halves[16 * left_row(i) + right_row(i)] = sums[i], total[left_of_sum(i)] += sums[i];
    for (int l = 0; l < LEFT_OF_LANE; l++) total[l] = sum_of_lanes<LANES_OF_LEFT>(total[l]);
    for (int i = 0; i < SUMS; i++) of_rows[16 * warp() + left_row(i)] = total[left_of_sum(i)];

    left_numbers += warp() * 16 * 112, right_numbers += warp() * 16 * 112, bfloats += warp() * 256, small += warp() * 256;
    Left<32> rest;
    float others[SUMS] = {};
    // One as the other side, vector by vector.
    a.load(left_numbers, 112), b.load([&](int row, int vector) { return right_numbers + 112 * row + 16 * vector; });
    multiply_bfloats(a, b, others);
    for (int i = 0; i < SUMS; i++) bfloats[16 * left_row(i) + right_row(i)] = others[i], others[i] = 0;
    a.load([&](int row, int vector) { return left_numbers + 32 + 112 * row + 16 * vector; });
    rest.load(left_numbers + 64, 112), b.load(right_numbers + 32, 112);
    multiply_any_halves(a, b, others), multiply_any_halves(rest, b, others);
    for (int i = 0; i < SUMS; i++) small[16 * left_row(i) + right_row(i)] = others[i];
}
"#;

#[test]
#[ignore = "run by others in a process with sanitizers"]
fn fragments() {
    /// Rows are of 32 bytes and then 16 halves, and as far apart as those of a tile.
    const STRIDE: usize = 80;
    let Some((lanes, target)) = lanes() else { return };
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    // Halves are whole numbers, of which sums are exact in any order.
    let mut rows = || {
        let mut rows: Vec<u8> = (0..32 * STRIDE).map(|_| rng.random()).collect();
        for half in rows.chunks_mut(STRIDE).flat_map(|row| row[32..64].chunks_mut(2)) {
            half.copy_from_slice(&f16::from_f32(rng.random_range(-99..100) as f32).to_le_bytes());
        }
        rows
    };
    let (left, right) = (rows(), rows());
    // The left and the right row of a sum: of each warp, 16 of each.
    let rows_of = |at: usize| {
        [&left[at / 16 * STRIDE..][..STRIDE], &right[(at / 256 * 16 + at % 16) * STRIDE..][..STRIDE]]
    };
    let of_bytes = |at: usize, count: usize| {
        let [left, right] = rows_of(at);
        let products = left.iter().zip(right).map(|(x, y)| i32::from(*x as i8) * i32::from(*y as i8));
        products.take(count).sum::<i32>() as f32
    };
    let before: Vec<f32> = (0..512).map(|at| 1000.0 * at as f32).collect();
    let of_halves = |at: usize| {
        let [left, right] = rows_of(at).map(|row| {
            row[32..64].chunks(2).map(|half| f16::from_le_bytes(half.try_into().unwrap()).to_f32())
        });
        before[at] + left.zip(right).map(|(x, y)| x * y).sum::<f32>()
    };
    let halves: Vec<f32> = (0..512).map(of_halves).collect();
    // Whole numbers times a unit, of which sums are exact, though halves of some have no bit to spare.
    let mut numbers = |units: [f32; 3]| -> Vec<f32> {
        let unit_of = |i: usize| units[i % 48 / 16];
        (0..32 * 48).map(|i| rng.random_range(-99..100) as f32 * unit_of(i)).collect()
    };
    let left_numbers = numbers([1.0, 2f32.powi(-18), 2f32.powi(-24)]);
    let right_numbers = numbers([1.0; 3]);
    let rows_of_numbers = |numbers: &[f32]| -> Vec<u8> {
        let row = |row: &[f32]| {
            let bits = |i: usize| match i {
                0..16 => bf16::from_f32(row[i]).to_bits(),
                _ => f16::from_f32(row[i]).to_bits(),
            };
            let bytes = (0..48).flat_map(|i| bits(i).to_le_bytes());
            bytes.chain([0; 16]).collect::<Vec<u8>>()
        };
        numbers.chunks(48).flat_map(row).collect()
    };
    // Of 16 columns of the left rows and of the right ones.
    let of_numbers = |at: usize, left: usize, right: usize| -> f32 {
        let left = &left_numbers[at / 16 * 48 + left..][..16];
        let right = &right_numbers[(at / 256 * 16 + at % 16) * 48 + right..][..16];
        left.iter().zip(right).map(|(x, y)| x * y).sum()
    };
    let expected: [(&str, Vec<f32>); 6] = [
        ("16 bytes", (0..512).map(|at| of_bytes(at, 16)).collect()),
        ("32 bytes", (0..512).map(|at| of_bytes(at, 32)).collect()),
        ("halves", halves.clone()),
        ("rows of halves", halves.chunks(16).map(|row| row.iter().sum()).collect()),
        ("bfloats", (0..512).map(|at| of_numbers(at, 0, 0)).collect()),
        ("small halves", (0..512).map(|at| of_numbers(at, 16, 16) + of_numbers(at, 32, 16)).collect()),
    ];

    let bytes = |floats: &[f32]| floats.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    // What nobody writes is no number.
    let room = |count: usize| bytes(&vec![f32::NAN; count]);
    let mut buffers = [
        left.clone(),
        right.clone(),
        room(512),
        room(512),
        bytes(&before),
        room(32),
        rows_of_numbers(&left_numbers),
        rows_of_numbers(&right_numbers),
        room(512),
        room(512),
    ];
    let code = HipCode { source: FRAGMENTS.into(), entry: "fragments".into(), threads: 2 * target.wave };
    lanes.run_block(&code, &mut buffers);
    for (found, (name, expected)) in buffers[2..6].iter().chain(&buffers[8..]).zip(expected) {
        let found = found.chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()));
        let wrong: Vec<_> = found.zip(expected).enumerate().filter(|(_, (x, y))| x != y).take(3).collect();
        assert!(wrong.is_empty(), "{name}: {wrong:?}");
    }
}

/// Rounds eight rows of 32 activations, to halves and to numbers of BF16.
const ROUNDED: &str = r#"#include "matmul_halves.h"

KERNEL(rounded, 256, 1)(const u8* x, u8* halves, float* scales, u8* bfloats) {
    __shared__ float room[256 / WARP];
    for (int token = 0; token < 8; token++) {
        round_row<F16, 256>(room, Floats<32>{(const float*)x}, Rounded<F16, 32>{halves, scales}, token);
        round_row<BF16, 256>(room, Floats<32>{(const float*)x}, Rounded<BF16, 32>{bfloats, nullptr}, token);
        barrier();
    }
}
"#;

#[test]
#[ignore = "run by others in a process with sanitizers"]
fn rounded() {
    let Some((lanes, _)) = lanes() else { return };
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let mut row =
        |most: f32| -> Vec<f32> { (0..32).map(|_| most * rng.random_range(-1.0..1.0f32)).collect() };
    let with = |mut row: Vec<f32>, x: f32| {
        row[9] = x;
        row
    };
    let rows: [Vec<f32>; 8] = [
        vec![0.0; 32],
        row(1.0),
        row(1e-6),
        row(1e6),
        row(1e-30),
        with(row(1.0), -2e4),
        with(row(1.0), f32::NEG_INFINITY),
        with(row(1.0), f32::NAN),
    ];
    let x = rows.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
    let mut buffers = [x, vec![0xff; 8 * 64], vec![0xff; 32], vec![0xff; 8 * 64]];
    lanes.run_block(&HipCode { source: ROUNDED.into(), entry: "rounded".into(), threads: 256 }, &mut buffers);
    for (t, row) in rows.iter().enumerate() {
        let scale = f32::from_le_bytes(buffers[2][4 * t..][..4].try_into().unwrap());
        let most = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        assert!(scale.is_normal() && scale.to_bits() << 9 == 0, "row {t}: {scale:e} is no power of two");
        // Halves are as good as they can be, and none is too large.
        let near = most / scale;
        let is_zero = most == 0.0 || most < 1e-29;
        assert!(is_zero || !most.is_finite() || (16384.0..32768.0).contains(&near), "row {t}: {near:e}");
        for (k, &x) in row.iter().enumerate() {
            let number =
                |at: usize| u16::from_le_bytes(buffers[at][64 * t + 2 * k..][..2].try_into().unwrap());
            let (half, bfloat) = (f16::from_bits(number(1)), bf16::from_bits(number(3)));
            let same = |found: f32, wanted: f32| found == wanted || found.is_nan() && wanted.is_nan();
            assert!(same(half.to_f32(), f16::from_f32(x / scale).to_f32()), "row {t}: {x:e} is {half:e}");
            assert!(same(bfloat.to_f32(), bf16::from_f32(x).to_f32()), "row {t}: {x:e} is {bfloat:e}");
        }
    }
}

/// In waves of 32 and of 64.
#[test]
#[cfg_attr(debug_assertions, ignore = "kernels are the same as in an optimised build")]
fn activations_are_rounded_to_the_nearest() {
    for (seed, arch) in ["gfx1100", "gfx942"].iter().enumerate() {
        under_sanitizers("rounded", arch, 5 + seed as u64);
    }
}

#[test]
#[ignore = "run by others in a process with sanitizers"]
fn all() {
    let Some((lanes, target)) = lanes() else { return };
    check(&lanes, &host_cases::all(&target));
}

#[test]
#[cfg_attr(debug_assertions, ignore = "kernels are the same as in an optimised build")]
fn kernels_compute_what_their_bodies_say_in_waves_of_32() {
    under_sanitizers("some", "gfx1100", 1);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "kernels are the same as in an optimised build")]
fn kernels_compute_what_their_bodies_say_in_waves_of_64() {
    under_sanitizers("some", "gfx942", 2);
}

#[test]
#[ignore = "run by others in a process with sanitizers"]
fn otherwise() {
    let Some((lanes, target)) = lanes() else { return };
    check(&lanes, &host_cases::otherwise(&target));
}

/// On those that have no matrix unit, of both waves, and on one that has no dot product either.
#[test]
#[cfg_attr(debug_assertions, ignore = "kernels are the same as in an optimised build")]
fn kernels_compute_what_their_bodies_say_without_a_matrix_unit() {
    for (seed, arch) in ["gfx1030", "gfx906", "gfx900"].iter().enumerate() {
        under_sanitizers("otherwise", arch, 4 + seed as u64);
    }
}

/// On each architecture: which lane has what of a square of 16 by 16, on its matrix unit or without one.
#[test]
#[cfg_attr(debug_assertions, ignore = "kernels are the same as in an optimised build")]
fn fragments_multiply_as_plain_sums_on_each_architecture() {
    for (seed, arch) in AMD.iter().enumerate() {
        under_sanitizers("fragments", arch, seed as u64);
    }
}

#[test]
#[ignore = "takes minutes"]
fn all_kernels_compute_what_their_bodies_say_in_any_order_of_lanes() {
    for (seed, arch) in AMD.iter().enumerate() {
        under_sanitizers("all", arch, 3 + seed as u64);
    }
}
