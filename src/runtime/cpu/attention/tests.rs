use super::super::testing::*;
use super::super::{Features, bind};
use super::*;
use crate::codegen::spec::{Alias, Computation};
use rand::RngExt;
use rand::seq::SliceRandom;

/// What the tests vary.
#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: u64,
    kv_heads: u64,
    d: u64,
    cache: DType,
    out: DType,
    page: u32,
    window: Option<u32>,
}

/// Of one head.
const SMALL: Shape =
    Shape { heads: 1, kv_heads: 1, d: 32, cache: DType::F32, out: DType::F32, page: 32, window: None };

/// How much of each sequence is filled, and the sequence and position of each token.
#[derive(Clone, Debug)]
struct Step {
    lengths: Vec<i32>,
    tokens: Vec<(i32, i32)>,
}

/// `t` tokens of one sequence after `past`.
fn one(t: u64, past: u64) -> Step {
    let end = (past + t) as i32;
    Step { lengths: vec![end], tokens: (past as i32..end).map(|position| (0, position)).collect() }
}

/// Arguments: queries, keys, values, block tables, lengths, sequences, positions, result. There are two pages more than the
/// sequences need, and each may have one more.
fn attention(shape: &Shape, step: &Step) -> Implementation {
    let Shape { heads, kv_heads, d, cache, out, page, window } = *shape;
    let needed = || step.lengths.iter().map(|n| (*n as u64).div_ceil(page.into()));
    let (pages, b, m) = (needed().sum::<u64>() + 2, step.lengths.len() as u64, needed().max().unwrap() + 1);
    let rows = |access, dtype| arg(access, dtype, [Dim::T, n(heads * d)]);
    let cache = || arg(Access::Read, cache, [pages * u64::from(page), kv_heads, d]);
    let spec_of = AttentionSpec {
        q: 0,
        k: 1,
        v: 2,
        tables: 3,
        lengths: 4,
        sequences: 5,
        positions: 6,
        out: 7,
        heads,
        kv_heads,
        head_dim: d,
        scale: 1.0 / (d as f32).sqrt(),
        page,
        window,
    };
    let args = vec![
        rows(Access::Read, DType::F32),
        cache(),
        cache(),
        index([b, m], pages),
        index([b], m * u64::from(page) + 1),
        index([Dim::T], b),
        arg(Access::Read, DType::I32, [Dim::T]),
        rows(Access::Write, out),
    ];
    kernel(Computation::Attention(spec_of), args, grid(heads, 1, 8))
}

fn template(kernel: &Implementation) -> &AttentionSpec {
    match &kernel.spec.computes {
        Computation::Attention(m) => m,
        _ => unreachable!(),
    }
}

/// Items of `a` heads and `b` tokens.
fn grid(heads: u64, a: u32, b: u32) -> Vec<Extent> {
    vec![Extent { dim: n(heads), per: a }, Extent { dim: Dim::T, per: b }]
}

/// Grids of few and of many queries an item.
fn grids(m: &AttentionSpec) -> [Vec<Extent>; 4] {
    let group = (m.heads / m.kv_heads) as u32;
    [(1, 1), (1, 32), (group, 32 / group), (group, 1)].map(|(a, b)| grid(m.heads, a, b))
}

fn at(step: &Step) -> Syms {
    syms(step.tokens.len() as u64, 0)
}

/// Random queries and caches, in pages anywhere. What no sequence has filled is NaN, and what no sequence needs of its table means
/// nothing.
fn inputs(kernel: &Implementation, step: &Step, seed: u64) -> Vec<Option<Vec<u8>>> {
    let (m, mut rng) = (template(kernel), rng(seed));
    let page = m.page as usize;
    let mut inputs: Vec<_> = kernel.spec.args[..3]
        .iter()
        .map(|a| Some(random(&mut rng, a.ty.dtype, a.ty.elements(&at(step)) as usize)))
        .collect();
    let pages = kernel.spec.args[1].ty.shape[0].c as usize / page;
    let each = kernel.spec.args[3].ty.shape[1].c as usize;
    let mut free: Vec<i32> = (0..pages as i32).collect();
    free.shuffle(&mut rng);
    let (mut tables, mut filled) = (vec![], vec![false; pages * page]);
    for length in &step.lengths {
        for first in (0..each).map(|i| i * page) {
            if first >= *length as usize {
                tables.push(if first % 2 == 0 { i32::MAX } else { free[0] });
                continue;
            }
            let at = free.pop().unwrap();
            filled[at as usize * page..][..page.min(*length as usize - first)].fill(true);
            tables.push(at);
        }
    }
    let nan = if kernel.spec.args[1].ty.dtype == DType::F16 { vec![0, 0x7e] } else { f32_bytes(&[f32::NAN]) };
    for cache in inputs[1..].iter_mut().flatten() {
        let bytes = cache.len() / filled.len();
        for (row, _) in cache.chunks_mut(bytes).zip(&filled).filter(|(_, filled)| !**filled) {
            row.copy_from_slice(&nan.repeat(bytes / nan.len()));
        }
    }
    let (sequences, positions): (Vec<_>, Vec<_>) = step.tokens.iter().copied().unzip();
    let indices = [tables, step.lengths.clone(), sequences, positions];
    inputs.extend(indices.map(|x| Some(i32_bytes(&x))));
    inputs.push(None);
    inputs
}

/// In double precision, of any values.
fn reference(kernel: &Implementation, inputs: &[Option<Vec<u8>>]) -> Vec<f64> {
    let m = template(kernel);
    let get = |i: usize| values(kernel.spec.args[i].ty.dtype, inputs[i].as_ref().unwrap());
    let indices = |i: usize| {
        let most = kernel.spec.args[i].index.map_or(i64::MAX, |index| index.below.c as i64 - 1);
        let least = if kernel.spec.args[i].index.is_some() { 0 } else { i64::MIN };
        let held = move |x: i32| i64::from(x).clamp(least, most);
        to_i32s(inputs[i].as_ref().unwrap()).into_iter().map(held).collect::<Vec<_>>()
    };
    let (q, k, v, d) = (get(0), get(1), get(2), m.head_dim as usize);
    let (tables, lengths, sequences, positions) = (indices(3), indices(4), indices(5), indices(6));
    let (h, g, page) = (m.heads as usize, m.kv_heads as usize, i64::from(m.page));
    let mut out = vec![0.0; q.len()];
    for (i, q) in q.chunks(d).enumerate() {
        let (t, head) = (i / h, i % h);
        let table = &tables[sequences[t] as usize * (tables.len() / lengths.len())..];
        let row = |l: i64| ((table[(l / page) as usize] * page + l % page) as usize * g + head * g / h) * d;
        let first = m.window.map_or(0, |window| (positions[t] - i64::from(window) + 1).max(0));
        let seen = first..(positions[t] + 1).min(lengths[sequences[t] as usize]);
        let score = |l: i64| {
            let dot: f64 = q.iter().zip(&k[row(l)..]).map(|(q, k)| q * k).sum();
            dot * f64::from(m.scale)
        };
        let scores: Vec<f64> = seen.clone().map(score).collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
        let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        for (l, s) in seen.zip(&scores) {
            for (y, v) in out[i * d..(i + 1) * d].iter_mut().zip(&v[row(l)..]) {
                *y += (s - max).exp() / total * v;
            }
        }
    }
    out
}

/// Checks the result in items of all kinds, with every instruction set.
#[track_caller]
fn check(kernel: &Implementation, at: &Syms, inputs: &[Option<Vec<u8>>], tolerance: f64) {
    let (mut kernel, want) = (kernel.clone(), reference(kernel, inputs));
    for grid in grids(template(&kernel)) {
        kernel.launches[0].grid = grid;
        let have = values(kernel.spec.args[7].ty.dtype, &launch_all(&kernel, at, inputs, 7));
        assert_close(&have.iter().map(|x| *x as f32).collect::<Vec<_>>(), &want, tolerance);
    }
}

#[test]
fn agrees_with_softmax_in_double_precision() {
    for (t, past, d, heads, kv_heads, cache, out, tolerance) in [
        (1, 0, 64, 2, 2, DType::F32, DType::F32, 1e-6),
        (1, 40, 80, 8, 1, DType::F32, DType::F32, 1e-6),
        (5, 3, 2, 12, 2, DType::F16, DType::F32, 1e-6),
        (1, 500, 64, 4, 2, DType::F16, DType::F32, 1e-6),
        (7, 31, 32, 6, 2, DType::F16, DType::Q8Act, 5e-3),
        (33, 40, 128, 2, 1, DType::F32, DType::F32, 1e-6),
        (33, 0, 13, 3, 3, DType::F16, DType::F32, 1e-6),
        (2, 70, 256, 2, 1, DType::F16, DType::F32, 1e-6),
        (1, 3, 1024, 1, 1, DType::F32, DType::F32, 1e-6),
        // Many queries of wide heads, and a cache whose last block is not whole.
        (33, 5, 192, 2, 1, DType::F16, DType::F32, 1e-6),
        (10, 601, 160, 2, 2, DType::F32, DType::F32, 2e-6),
        (1, 777, 128, 4, 1, DType::F16, DType::F32, 2e-6),
        (9, 31, 1024, 2, 1, DType::F16, DType::Q8Act, 5e-3),
    ] {
        let shape = Shape { heads, kv_heads, d, cache, out, page: 32 * (1 + t as u32 % 3), window: None };
        let step = one(t, past);
        let kernel = attention(&shape, &step);
        check(&kernel, &at(&step), &inputs(&kernel, &step, t), tolerance);
    }
}

/// Sequences of any lengths, in any order, at any of their positions, some of which see but the last few.
#[test]
fn sequences_do_not_mix() {
    let mut rng = rng(12);
    for seed in 0..40 {
        let kv_heads = rng.random_range(1..3);
        let shape = Shape {
            heads: kv_heads * rng.random_range(1..5),
            kv_heads,
            d: [8, 32, 96, 130][rng.random_range(0..4)],
            cache: [DType::F16, DType::F32][rng.random_range(0..2)],
            page: [32, 64, 96][rng.random_range(0..3)],
            window: [None, Some(1), Some(31), Some(40), Some(200)][rng.random_range(0..5)],
            ..SMALL
        };
        let lengths: Vec<i32> = (0..rng.random_range(1..6))
            .map(|_| rng.random_range(1i32..150).max(rng.random_range(1..40)))
            .collect();
        let mut tokens = vec![];
        while tokens.len() < 45 {
            let sequence = rng.random_range(0..lengths.len());
            let run = rng.random_range(1..=20i32.min(lengths[sequence]));
            let first = rng.random_range(0..=lengths[sequence] - run);
            let mut run: Vec<_> = (first..first + run).map(|position| (sequence as i32, position)).collect();
            match rng.random_range(0..3) {
                0 => run.reverse(),
                1 => run.shuffle(&mut rng),
                _ => {}
            }
            tokens.append(&mut run);
        }
        let step = Step { lengths, tokens };
        let kernel = attention(&shape, &step);
        check(&kernel, &at(&step), &inputs(&kernel, &step, seed), 1e-6);
    }
}

/// Many queries of a run, some of which see nothing of a whole block, before and after what they see.
#[test]
fn blocks_may_be_hidden_from_some() {
    for window in [None, Some(3), Some(40)] {
        for cache in [DType::F16, DType::F32] {
            for positions in [[0, 100, 50, 190], [190, 100, 50, 0], [199, 0, 199, 64], [31, 32, 33, 96]] {
                let tokens = positions.iter().cycle().take(16).map(|position| (0, *position)).collect();
                let step = Step { lengths: vec![200], tokens };
                let kernel = attention(&Shape { heads: 2, cache, window, ..SMALL }, &step);
                check(&kernel, &at(&step), &inputs(&kernel, &step, 4), 1e-6);
            }
        }
    }
}

#[test]
fn chunks_change_little_and_the_result_may_lie_on_the_queries() {
    let step = one(41, 0);
    let shape = Shape { heads: 4, kv_heads: 2, d: 64, cache: DType::F16, ..SMALL };
    let mut kernel = attention(&shape, &step);
    kernel.launches[0].grid = grid(4, 2, 16);
    kernel.may_alias.push(Alias { write: 7, read: 0 });
    let whole = inputs(&kernel, &step, 5);
    for features in Features::available() {
        let want = to_f32s(&launch(&kernel, &features, &at(&step), &whole, None)[7]);
        let want: Vec<f64> = want.into_iter().map(f64::from).collect();
        for chunk in [1, 7, 32] {
            let mut have = vec![];
            for (i, q) in whole[0].as_ref().unwrap().chunks(chunk * 1024).enumerate() {
                let part = one(q.len() as u64 / 1024, (i * chunk) as u64);
                let mut inputs = whole.clone();
                inputs[0] = Some(q.to_vec());
                inputs[4] = Some(i32_bytes(&part.lengths));
                inputs[5] = Some(i32_bytes(&vec![0; part.tokens.len()]));
                inputs[6] = Some(i32_bytes(&part.tokens.iter().map(|(_, p)| *p).collect::<Vec<_>>()));
                have.extend(launch(&kernel, &features, &at(&part), &inputs, Some((7, 0))).swap_remove(7));
            }
            assert_close(&to_f32s(&have), &want, 1e-6);
        }
    }
}

#[test]
fn large_scores_and_numbers_that_are_none() {
    let step = one(2, 60);
    let mut kernel = attention(&SMALL, &step);
    let Computation::Attention(m) = &mut kernel.spec.computes else { unreachable!() };
    m.scale = 300.0;
    let mut inputs = inputs(&kernel, &step, 6);
    check(&kernel, &at(&step), &inputs, 1e-2);
    let first = to_i32s(inputs[3].as_ref().unwrap())[0] as usize * 32 * 32 * 4;
    inputs[1].as_mut().unwrap()[first..first + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let have = to_f32s(&launch(&kernel, &Features::detect(), &at(&step), &inputs, None)[7]);
    assert!(have.iter().all(|x| x.is_nan()), "a NaN among the keys is not lost");
}

/// A value that but some tokens see, as it lies ahead of others or before their window.
#[test]
fn what_a_token_does_not_see_does_not_reach_it() {
    for (t, past, position, cache, window) in [
        (40, 0, 37, DType::F32, None),
        (9, 30, 36, DType::F16, None),
        (40, 20, 34, DType::F32, Some(20)),
        (12, 90, 93, DType::F16, Some(5)),
    ] {
        let step = one(t, past);
        let mut kernel = attention(&Shape { heads: 2, cache, window, ..SMALL }, &step);
        let mut inputs = inputs(&kernel, &step, 7);
        let page = to_i32s(inputs[3].as_ref().unwrap())[position / 32] as usize;
        let place = (page * 32 + position % 32) * 32 * cache.block_bytes();
        let infinite = if cache == DType::F32 { vec![0, 0, 0x80, 0x7f] } else { vec![0, 0x7c] };
        for argument in [1, 2] {
            let bytes = inputs[argument].as_mut().unwrap();
            let before = bytes.clone();
            bytes[place..place + infinite.len()].copy_from_slice(&infinite);
            let all = grids(template(&kernel));
            for (features, grid) in
                Features::available().iter().flat_map(|f| all.clone().map(|grid| (f, grid)))
            {
                kernel.launches[0].grid = grid;
                let have = to_f32s(&launch(&kernel, features, &at(&step), &inputs, None)[7]);
                for (i, x) in have.iter().enumerate() {
                    let (token, column) = (step.tokens[i / 64].1, i % 32);
                    let sees = seen(token, window.map(|w| w as usize)).contains(&position);
                    // Of keys, no more is known than that nothing else reaches what does not see them.
                    let touched = sees && (column == 0 || argument == 1);
                    assert!(touched || x.is_finite(), "position {token}, column {column}: {x}");
                    if sees && column == 0 && argument == 2 {
                        assert!(!x.is_finite(), "position {token}: {x}");
                    }
                }
            }
            inputs[argument] = Some(before);
        }
    }
}

/// Whatever the indices are, memory beside the arguments is not looked at, and who sees nothing gets nothing.
#[test]
fn any_values_of_indices_are_borne() {
    let wild = [i32::MIN, -65, -1, 0, 1, 2, 31, 32, 33, 95, 96, 97, 1000, i32::MAX - 1, i32::MAX];
    let mut rng = rng(3);
    for seed in 0..60 {
        let (lengths, tokens) = (vec![40, 1, 60], vec![(0, 39); 21]);
        let step = Step { lengths, tokens };
        let window = [None, Some(1), Some(33), Some(u32::MAX)][rng.random_range(0..4)];
        let d = if seed % 2 == 0 { 64 } else { 32 };
        let shape = Shape { heads: 4, kv_heads: 2, d, cache: DType::F16, window, ..SMALL };
        let kernel = attention(&shape, &step);
        let mut inputs = inputs(&kernel, &step, seed);
        for cache in [1, 2] {
            let elements = kernel.spec.args[cache].ty.elements(&at(&step)) as usize;
            inputs[cache] = Some(random(&mut rng, DType::F16, elements));
        }
        for indices in &mut inputs[3..7] {
            let (mut x, share) = (to_i32s(indices.as_ref().unwrap()), rng.random_range(0.0..1.0));
            for x in &mut x {
                if rng.random_bool(share) {
                    *x = wild[rng.random_range(0..wild.len())];
                }
            }
            *indices = Some(i32_bytes(&x));
        }
        check(&kernel, &at(&step), &inputs, 1e-6);
    }
    let step = Step { lengths: vec![40], tokens: vec![(0, -1); 9] };
    let kernel = attention(&SMALL, &step);
    let have = launch_all(&kernel, &at(&step), &inputs(&kernel, &step, 1), 7);
    assert!(to_f32s(&have).iter().all(|x| *x == 0.0));
}

#[test]
fn refuses_what_does_not_fit() {
    let step = one(4, 60);
    let good = Shape { heads: 4, kv_heads: 2, d: 64, cache: DType::F16, ..SMALL };
    let refuse = |name: &str, change: &dyn Fn(&mut Implementation, &mut AttentionSpec)| {
        let mut kernel = attention(&good, &step);
        assert!(bind(&kernel, &Features::baseline()).is_ok());
        let mut m = template(&kernel).clone();
        change(&mut kernel, &mut m);
        kernel.spec.computes = Computation::Attention(m);
        assert!(bind(&kernel, &Features::baseline()).is_err(), "{name}");
    };
    refuse("no heads", &|_, m| m.heads = 0);
    refuse("no KV heads", &|_, m| m.kv_heads = 0);
    refuse("KV heads", &|s, m| {
        m.kv_heads = 3;
        s.spec.args[1].ty.shape[1] = n(3);
        s.spec.args[2].ty.shape[1] = n(3);
    });
    refuse("head dimension", &|_, m| m.head_dim = 32);
    refuse("wide heads", &|s, m| {
        m.head_dim = 2048;
        [0, 1, 2, 7].into_iter().for_each(|i| *s.spec.args[i].ty.shape.last_mut().unwrap() = n(2048));
    });
    refuse("scale", &|_, m| m.scale = f32::INFINITY);
    refuse("queries of one token", &|s, _| s.spec.args[0].ty.shape[0] = n(1));
    refuse("queries in f16", &|s, _| s.spec.args[0].ty.dtype = DType::F16);
    refuse("keys of few rows", &|s, _| s.spec.args[1].ty.shape[0] = n(32));
    refuse("keys of tokens", &|s, _| s.spec.args[1].ty.shape[0] = Dim::T);
    refuse("quantised values", &|s, _| s.spec.args[2].ty.dtype = DType::Q8_0);
    refuse("keys written", &|s, _| s.spec.args[1].access = Access::Update);
    refuse("result", &|s, _| s.spec.args[7].ty.shape[1] = n(64));
    refuse("a quantised result on the queries", &|s, _| {
        s.spec.args[7].ty.dtype = DType::Q8Act;
        s.may_alias.push(Alias { write: 7, read: 0 });
    });
    refuse("a result on the keys", &|s, _| s.may_alias.push(Alias { write: 7, read: 1 }));
    refuse("grid", &|s, _| s.launches[0].grid.swap(0, 1));
    refuse("an item without heads", &|s, _| s.launches[0].grid = grid(4, 0, 8));
    refuse("an item across KV heads", &|s, _| s.launches[0].grid = grid(4, 4, 8));
    refuse("more queries than lanes", &|s, _| s.launches[0].grid = grid(4, 2, 17));
    // Pages: with the bounds that fit them, so that nothing else is wrong.
    let pages = |s: &mut Implementation, m: &mut AttentionSpec, page: u32, rows: u64, each: u64| {
        m.page = page;
        [1, 2].into_iter().for_each(|i| s.spec.args[i].ty.shape[0] = n(rows));
        s.spec.args[3] = index([1, each], rows / u64::from(page.max(1)));
        s.spec.args[4] = index([1u64], each * u64::from(page) + 1);
    };
    let mut longer = attention(&good, &step);
    let mut m = template(&longer).clone();
    pages(&mut longer, &mut m, 64, 192, 2);
    longer.spec.computes = Computation::Attention(m);
    assert!(bind(&longer, &Features::baseline()).is_ok());
    refuse("no pages", &|s, m| pages(s, m, 0, 128, 3));
    refuse("small pages", &|s, m| pages(s, m, 16, 128, 3));
    refuse("pages across blocks", &|s, m| pages(s, m, 48, 96, 3));
    refuse("part of a page", &|s, m| pages(s, m, 64, 160, 3));
    refuse("no rows", &|s, m| pages(s, m, 32, 0, 3));
    refuse("no positions", &|s, m| pages(s, m, 32, 128, 0));
    refuse("too many positions", &|s, m| pages(s, m, 32, 128, 1 << 40));
    refuse("no sequences", &|s, _| {
        s.spec.args[3] = index([0, 3], 4);
        s.spec.args[4] = index([0u64], 97);
        s.spec.args[5] = index([Dim::T], 0);
    });
    refuse("window", &|_, m| m.window = Some(0));
    refuse("lengths of other sequences", &|s, _| s.spec.args[4].ty.shape[0] = n(2));
    refuse("sequences of other tokens", &|s, _| s.spec.args[5].ty.shape[0] = Dim::R);
    refuse("tables of floats", &|s, _| s.spec.args[3].ty.dtype = DType::F32);
    refuse("positions of other tokens", &|s, _| s.spec.args[6].ty.shape[0] = Dim::R);
    // Another part may follow the positions, as one that writes by them.
    let mut kernel = attention(&good, &step);
    kernel.spec.args[6].index = kernel.spec.args[5].index;
    bind(&kernel, &Features::baseline()).unwrap();
    for (i, right) in
        attention(&good, &step).spec.args.iter().enumerate().filter_map(|(i, a)| Some((i, a.index?)))
    {
        for wrong in wrong_indices(right) {
            refuse("what indices are held to", &|s, _| s.spec.args[i].index = wrong);
        }
    }
    let odd = attention(&Shape { heads: 8, kv_heads: 8, d: 20, out: DType::Q8Act, ..SMALL }, &step);
    assert!(bind(&odd, &Features::baseline()).is_err(), "blocks across heads");
}
