use super::super::bind;
use super::super::isa::Features;
use super::super::testing::*;
use super::*;
use crate::codegen::spec::{Alias, Arg, Computation, MatmulPart};
use crate::runtime::cpu::math::LANES;

const T: Dim = Dim::T;

/// A matmul of weights with these formats and rows; each with a bias and a residual if `adds`.
fn stored(x: DType, k: u64, tile: u32, weights: &[(DType, u64)], adds: bool) -> Implementation {
    let mut args = vec![arg(Access::Read, x, [T, n(k)])];
    let mut push = |a: Arg| {
        args.push(a);
        (args.len() - 1) as ArgId
    };
    let mut items = 0;
    let mut parts = vec![];
    for &(format, rows) in weights {
        items += rows.div_ceil(tile.into());
        parts.push(MatmulPart {
            weight: push(arg(Access::Read, format, [rows, k])),
            format,
            rows,
            round: None,
            bias: adds.then(|| push(arg(Access::Read, DType::F32, [rows]))),
            residual: adds.then(|| push(arg(Access::Read, DType::F32, [T, n(rows)]))),
            out: Some(push(arg(Access::Write, DType::F32, [T, n(rows)]))),
        });
    }
    let m = MatmulSpec { x: 0, k, parts, epilogue: Epilogue::Store };
    let mut kernel = kernel(Computation::Matmul(m), args, vec![Extent::each(items)]);
    kernel.launches[0].code = Code::Cpu(CpuCode::Matmul { tile });
    kernel
}

fn inputs(kernel: &Implementation, at: &Syms, seed: u64) -> Vec<Option<Vec<u8>>> {
    let mut rng = rng(seed);
    let fill = |a: &Arg| {
        (a.access == Access::Read).then(|| random(&mut rng, a.ty.dtype, a.ty.elements(at) as usize))
    };
    kernel.args().map(fill).collect()
}

/// `x · wᵀ` and what is added, in double precision.
fn reference(
    kernel: &Implementation,
    m: &MatmulSpec,
    part: &MatmulPart,
    inputs: &[Option<Vec<u8>>],
) -> Vec<f64> {
    let get = |id: ArgId| {
        let i = usize::from(id);
        values(kernel.spec.args[i].ty.dtype, inputs[i].as_ref().unwrap())
    };
    let (x, w, k) = (get(m.x), get(part.weight), m.k as usize);
    let (bias, residual) = (part.bias.map(get), part.residual.map(get));
    let mut out = vec![];
    for (t, x) in x.chunks(k).enumerate() {
        for (r, w) in w.chunks(k).enumerate() {
            let dot: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            let add = bias.as_ref().map_or(0.0, |b| b[r]);
            out.push(dot + add + residual.as_ref().map_or(0.0, |y| y[t * part.rows as usize + r]));
        }
    }
    out
}

fn template(kernel: &Implementation) -> MatmulSpec {
    match &kernel.spec.computes {
        Computation::Matmul(m) => m.clone(),
        _ => unreachable!(),
    }
}

#[test]
fn every_format_meets_every_activation() {
    for format in WEIGHTS.iter().copied() {
        for x in [DType::F32, DType::Q8Act] {
            // A whole number of blocks, but not of groups where the format allows it.
            let k = if format.block_len() == 256 { 768 } else { 608 };
            for t in [1, 2, 7, 33] {
                let kernel = stored(x, k, 32, &[(format, 45)], t == 7);
                let at = syms(t, 0);
                let m = template(&kernel);
                let inputs = inputs(&kernel, &at, t);
                let out = m.parts[0].out.unwrap();
                let have = to_f32s(&launch_all(&kernel, &at, &inputs, out));
                assert_close(&have, &reference(&kernel, &m, &m.parts[0], &inputs), 1e-6);
            }
        }
    }
}

/// Many groups, and part of one where the format allows it.
#[test]
fn long_rows_are_whole() {
    for format in WEIGHTS.iter().copied() {
        let k = if format.block_len() == 256 { 2304 } else { 2336 };
        for t in [1, 7] {
            let kernel = stored(DType::Q8Act, k, 32, &[(format, 5)], false);
            let (at, m) = (syms(t, 0), template(&kernel));
            let inputs = inputs(&kernel, &at, t);
            let have = to_f32s(&launch_all(&kernel, &at, &inputs, 2));
            assert_close(&have, &reference(&kernel, &m, &m.parts[0], &inputs), 1e-6);
        }
    }
}

/// Where products are added without being rounded first, they come out otherwise: so is seen which instructions run.
#[test]
fn a_kernel_runs_with_the_instructions_it_was_bound_for() {
    let kernel = stored(DType::F32, 32, 32, &[(DType::F32, 1)], false);
    let row = |first: f32, second: f32| {
        let mut row = [0.0; 32];
        (row[0], row[LANES]) = (first, second);
        Some(f32_bytes(&row))
    };
    // a² is 1 + 2⁻¹² + 2⁻²⁶, whose last bit rounding takes.
    let a = 1.0 + 2f32.powi(-13);
    let inputs = [row(-1.0, a), row(1.0 + 2f32.powi(-12), a), None];
    for features in Features::available() {
        let y = to_f32s(&launch(&kernel, &features, &syms(1, 0), &inputs, None)[2]);
        let want = if features == Features::baseline() { 0.0 } else { 2f32.powi(-26) };
        assert_eq!(y, [want], "{}", features.name());
    }
}

#[test]
fn plain_formats_take_any_number_of_columns() {
    for (format, k) in [(DType::F32, 1), (DType::F32, 17), (DType::F16, 300), (DType::F16, 7)] {
        let kernel = stored(DType::F32, k, 3, &[(format, 5)], false);
        let (at, m) = (syms(3, 0), template(&kernel));
        let inputs = inputs(&kernel, &at, k);
        let have = to_f32s(&launch_all(&kernel, &at, &inputs, 2));
        assert_close(&have, &reference(&kernel, &m, &m.parts[0], &inputs), 1e-6);
    }
}

#[test]
fn parts_differ_in_rows_and_format() {
    let kernel =
        stored(DType::Q8Act, 256, 40, &[(DType::Q4_K, 64), (DType::Q6_K, 33), (DType::F16, 41)], true);
    let (at, m) = (syms(5, 0), template(&kernel));
    let inputs = inputs(&kernel, &at, 1);
    for part in &m.parts {
        let have = to_f32s(&launch_all(&kernel, &at, &inputs, part.out.unwrap()));
        assert_close(&have, &reference(&kernel, &m, part, &inputs), 1e-6);
    }
}

#[test]
fn a_tokens_result_does_not_depend_on_the_others() {
    // What many tokens share is summed in another order than rows are, so they agree but to rounding.
    let kinds = [
        (DType::F32, DType::Q4_K, &[][..]),
        (DType::Q8Act, DType::Q6_K, &[]),
        (DType::Q8Act, DType::Q8_0, &[]),
        (DType::Q8Act, DType::Q4_K, &[1]),
        (DType::Q8Act, DType::Q6_K, &[1]),
    ];
    for (x, format, weights) in kinds {
        let rows = 48;
        let kernel = with_interleaved_weights(stored(x, 512, 32, &[(format, rows)], false), weights);
        for features in Features::available() {
            let all = inputs(&kernel, &syms(21, 0), 3);
            let want = launch(&kernel, &features, &syms(21, 0), &all, None).swap_remove(2);
            let row = blocks::bytes_of(x, 512);
            let xs = all[0].as_ref().unwrap();
            for (t, want) in want.chunks(4 * rows as usize).enumerate() {
                let alone = [Some(xs[t * row..(t + 1) * row].to_vec()), all[1].clone(), None];
                let have = launch(&kernel, &features, &syms(1, 0), &alone, None).swap_remove(2);
                let want: Vec<f64> = to_f32s(want).into_iter().map(f64::from).collect();
                assert_close(&to_f32s(&have), &want, 1e-6);
            }
        }
    }
}

/// Weights in any layout, few tokens and many, all rows and the last sixteen alone.
#[test]
fn interleaved_rows_give_what_rows_give() {
    for format in [DType::Q4_K, DType::Q6_K] {
        for (k, rows) in [(256, 16), (768, 48), (2304, 32)] {
            for t in (1..=9).chain([23, 24, 33, 50]) {
                let kernel = stored(DType::Q8Act, k, 32, &[(format, rows)], t == 7);
                let (at, m) = (syms(t, 0), template(&kernel));
                let inputs = inputs(&kernel, &at, t);
                let out = m.parts[0].out.unwrap();
                let kernel = with_interleaved_weights(kernel, &[1]);
                let have = to_f32s(&launch_all(&kernel, &at, &inputs, out));
                assert_close(&have, &reference(&kernel, &m, &m.parts[0], &inputs), 1e-6);
            }
        }
    }
}

/// The largest sums of products that there can be, of either sign.
#[test]
fn no_product_of_interleaved_rows_overflows() {
    for format in [DType::Q4_K, DType::Q6_K] {
        let kernel = with_interleaved_weights(stored(DType::Q8Act, 256, 32, &[(format, 16)], false), &[1]);
        let (at, m) = (syms(2, 0), template(&kernel));
        let mut inputs = inputs(&kernel, &at, 1);
        let x = inputs[0].as_mut().unwrap();
        for (i, block) in x.as_chunks_mut::<40>().0.iter_mut().enumerate() {
            let q = if i < 8 { 127i8 } else { -127 };
            block[..4].copy_from_slice(&1f32.to_le_bytes());
            block[4..8].copy_from_slice(&(32.0 * f32::from(q)).to_le_bytes());
            block[8..].fill(q as u8);
        }
        // Nibbles, scales and pairs of ones; what is not f16 scales.
        let w = inputs[1].as_mut().unwrap();
        let d = half::f16::from_f32(0.5).to_le_bytes();
        for block in w.chunks_mut(format.block_bytes()) {
            block.fill(0xff);
            match format {
                DType::Q4_K => block[..4].copy_from_slice(&[d[0], d[1], 0, 0]),
                _ => {
                    block[192..208].fill(0x80);
                    block[208..].copy_from_slice(&d);
                }
            }
        }
        let have = to_f32s(&launch_all(&kernel, &at, &inputs, 2));
        assert_close(&have, &reference(&kernel, &m, &m.parts[0], &inputs), 1e-6);
    }
}

#[test]
fn parts_may_differ_in_layout() {
    let weights = [(DType::Q6_K, 48), (DType::Q4_K, 64), (DType::Q4_K, 16), (DType::Q8_0, 7)];
    for t in [1, 5, 25] {
        let kernel = stored(DType::Q8Act, 512, 32, &weights, true);
        let (at, m) = (syms(t, 0), template(&kernel));
        let inputs = inputs(&kernel, &at, 1);
        let kernel = with_interleaved_weights(kernel, &[m.parts[0].weight, m.parts[2].weight]);
        for part in &m.parts {
            let have = to_f32s(&launch_all(&kernel, &at, &inputs, part.out.unwrap()));
            assert_close(&have, &reference(&kernel, &m, part, &inputs), 1e-6);
        }
    }
}

/// Results that are consumed: of gate and up, and of the rows of which the best is wanted.
#[test]
fn epilogues_take_interleaved_rows() {
    for (out, tolerance) in [(DType::F32, 2e-6), (DType::Q8Act, 6e-3)] {
        let kernel = swiglu(DType::Q8Act, out, 96, 32);
        let (at, m) = (syms(3, 0), template(&kernel));
        let inputs = inputs(&kernel, &at, 4);
        let (gate, up) =
            (reference(&kernel, &m, &m.parts[0], &inputs), reference(&kernel, &m, &m.parts[1], &inputs));
        let want: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        for weights in [&[1, 2][..], &[1], &[2]] {
            let kernel = with_interleaved_weights(kernel.clone(), weights);
            let have = launch_all(&kernel, &at, &inputs, 3);
            let have: Vec<f32> = values(out, &have).into_iter().map(|x| x as f32).collect();
            assert_close(&have, &want, tolerance);
        }
    }
    let mut kernel = argmax(96, 32);
    let Computation::Matmul(m) = &mut kernel.spec.computes else { unreachable!() };
    (m.k, m.parts[0].format) = (256, DType::Q6_K);
    kernel.spec.args[0] = arg(Access::Read, DType::Q8Act, [T, n(256)]);
    kernel.spec.args[1] = arg(Access::Read, DType::Q6_K, [96, 256]);
    let kernel = with_interleaved_weights(kernel, &[1]);
    let (at, m) = (syms(18, 0), template(&kernel));
    let inputs = inputs(&kernel, &at, 5);
    let y = reference(&kernel, &m, &m.parts[0], &inputs);
    let best = |y: &[f64]| y.iter().enumerate().fold(0, |b, (i, v)| if *v > y[b] { i } else { b }) as i32;
    let want: Vec<i32> = y.chunks(96).map(best).collect();
    assert_eq!(to_i32s(&launch_all(&kernel, &at, &inputs, 2)), want);
}

#[test]
fn a_residual_may_lie_under_the_result() {
    let mut kernel = stored(DType::F32, 64, 32, &[(DType::Q8_0, 50)], true);
    kernel.may_alias.push(Alias { write: 4, read: 3 });
    let (at, m) = (syms(20, 0), template(&kernel));
    let inputs = inputs(&kernel, &at, 9);
    let want = reference(&kernel, &m, &m.parts[0], &inputs);
    for features in Features::available() {
        let have = launch(&kernel, &features, &at, &inputs, Some((4, 3)));
        assert_close(&to_f32s(&have[4]), &want, 1e-6);
    }
}

fn swiglu(x: DType, out: DType, rows: u64, tile: u32) -> Implementation {
    let mut kernel = stored(x, 256, tile, &[(DType::Q4_K, rows), (DType::Q6_K, rows)], false);
    let Computation::Matmul(m) = &mut kernel.spec.computes else { unreachable!() };
    m.parts.iter_mut().for_each(|p| p.out = None);
    m.parts[1].weight = 2;
    m.epilogue = Epilogue::Swiglu { out: 3 };
    kernel.spec.args.remove(2);
    kernel.spec.args[3] = arg(Access::Write, out, [T, n(rows)]);
    kernel.launches[0].grid = vec![Extent::each(rows.div_ceil(tile.into()))];
    kernel
}

#[test]
fn gate_and_up_become_one() {
    for (rows, tile, out, tolerance) in
        [(96, 64, DType::F32, 2e-6), (96, 32, DType::Q8Act, 6e-3), (50, 32, DType::F32, 2e-6)]
    {
        let kernel = swiglu(DType::F32, out, rows, tile);
        let (at, m) = (syms(19, 0), template(&kernel));
        let inputs = inputs(&kernel, &at, 4);
        let (gate, up) =
            (reference(&kernel, &m, &m.parts[0], &inputs), reference(&kernel, &m, &m.parts[1], &inputs));
        let want: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        let have = launch_all(&kernel, &at, &inputs, 3);
        let have: Vec<f32> = values(out, &have).into_iter().map(|x| x as f32).collect();
        assert_close(&have, &want, tolerance);
    }
}

fn argmax(rows: u64, tile: u32) -> Implementation {
    let mut kernel = stored(DType::F32, 64, tile, &[(DType::F32, rows)], false);
    let Computation::Matmul(m) = &mut kernel.spec.computes else { unreachable!() };
    m.parts[0].out = None;
    m.epilogue = Epilogue::ArgMax { out: 2 };
    let each = [T, n(rows.div_ceil(tile.into()))];
    kernel.spec.args[2] = arg(Access::Write, DType::I32, [T]);
    kernel.workspace = [DType::F32, DType::I32].map(|dtype| arg(Access::Scratch, dtype, each)).into();
    kernel.launches.push(LaunchSpec { code: Code::Cpu(CpuCode::BestOfItems), grid: vec![Extent::each(T)] });
    kernel
}

#[test]
fn the_largest_result_wins_and_the_first_of_equals() {
    let kernel = argmax(101, 40);
    let (at, m) = (syms(18, 0), template(&kernel));
    let mut inputs = inputs(&kernel, &at, 5);
    // Row 90 is as good as row 20, whatever that is.
    let w = inputs[1].as_mut().unwrap();
    w.copy_within(20 * 256..21 * 256, 90 * 256);
    let y = reference(&kernel, &m, &m.parts[0], &inputs);
    let best = |y: &[f64]| y.iter().enumerate().fold(0, |b, (i, v)| if *v > y[b] { i } else { b }) as i32;
    let want: Vec<i32> = y.chunks(101).map(best).collect();
    assert_eq!(to_i32s(&launch_all(&kernel, &at, &inputs, 2)), want);
    assert!(!want.contains(&90));
    let nan = vec![Some(f32_bytes(&[f32::NAN; 18 * 64])), inputs[1].clone(), None, None, None];
    assert_eq!(to_i32s(&launch_all(&kernel, &at, &nan, 2)), [-1; 18]);
}

#[test]
fn the_rows_may_be_those_that_are_wanted() {
    let kinds = [(DType::F32, DType::F16), (DType::Q8Act, DType::Q6_K)];
    for ((x, format), r) in kinds.into_iter().flat_map(|kind| [0, 1, 5, 20].map(|r| (kind, r))) {
        let mut kernel = stored(x, 256, 32, &[(format, 32)], false);
        kernel.spec.args[0].ty.shape[0] = Dim::R;
        kernel.spec.args[2].ty.shape[0] = Dim::R;
        let (at, m) = (syms(21, r), template(&kernel));
        let inputs = inputs(&kernel, &at, 6);
        let have = to_f32s(&launch_all(&kernel, &at, &inputs, 2));
        assert_close(&have, &reference(&kernel, &m, &m.parts[0], &inputs), 1e-6);
    }
    let mut kernel = argmax(101, 40);
    for arg in [0, 2] {
        kernel.spec.args[arg].ty.shape[0] = Dim::R;
    }
    kernel.workspace.iter_mut().for_each(|room| room.ty.shape[0] = Dim::R);
    kernel.launches[1].grid = vec![Extent::each(Dim::R)];
    let inputs = inputs(&kernel, &syms(3, 0), 5);
    assert!(launch_all(&kernel, &syms(3, 0), &inputs, 2).is_empty());
}

#[test]
fn refuses_what_does_not_fit() {
    let good = || stored(DType::F32, 256, 32, &[(DType::Q4_K, 64), (DType::Q6_K, 33)], true);
    assert!(bind(&good(), &Features::baseline()).is_ok());
    let refuse = |name: &str, change: &dyn Fn(&mut Implementation, &mut MatmulSpec)| {
        let mut kernel = good();
        let mut m = template(&kernel);
        change(&mut kernel, &mut m);
        kernel.spec.computes = Computation::Matmul(m);
        assert!(bind(&kernel, &Features::baseline()).is_err(), "{name}");
    };
    refuse("x", &|_, m| m.x = 99);
    refuse("x of other columns", &|s, _| s.spec.args[0].ty.shape[1] = n(512));
    refuse("x of integers", &|s, _| s.spec.args[0].ty.dtype = DType::I32);
    refuse("x written", &|s, _| s.spec.args[0].access = Access::Update);
    refuse("columns", &|_, m| m.k = 512);
    refuse("no columns", &|_, m| m.k = 0);
    refuse("rows", &|_, m| m.parts[0].rows = 65);
    refuse("huge rows", &|_, m| m.parts[0].rows = u64::MAX);
    refuse("format", &|_, m| m.parts[0].format = DType::Q8_0);
    refuse("activations as a weight", &|s, m| {
        m.parts[0].format = DType::Q8Act;
        s.spec.args[1].ty.dtype = DType::Q8Act;
    });
    refuse("part of a block", &|s, m| {
        m.k = 255;
        s.spec.args.iter_mut().for_each(|a| a.ty.shape[0] = n(255));
    });
    refuse("bias", &|s, _| s.spec.args[2].ty.shape = vec![n(63)]);
    refuse("residual", &|s, _| s.spec.args[3].ty.shape = vec![T, n(63)]);
    refuse("tokens of a result", &|s, _| s.spec.args[4].ty.shape = vec![n(1), n(64)]);
    refuse("a result read", &|s, _| s.spec.args[4].access = Access::Read);
    refuse("a result in f16", &|s, _| s.spec.args[4].ty.dtype = DType::F16);
    refuse("one result for two parts", &|s, m| {
        s.spec.args[7] = s.spec.args[4].clone();
        m.parts[1].out = Some(4);
    });
    refuse("no result", &|_, m| m.parts[0].out = None);
    refuse("no parts", &|s, m| {
        m.parts.clear();
        s.launches[0].grid = vec![];
    });
    refuse("tile", &|s, _| s.launches[0].code = Code::Cpu(CpuCode::Matmul { tile: 0 }));
    refuse("no launch", &|s, _| s.launches.clear());
    refuse("a launch more", &|s, _| s.launches.push(s.launches[0].clone()));
    refuse("another function", &|s, _| s.launches[0].code = Code::Cpu(CpuCode::Whole));
    refuse("alias of a residual that two parts add", &|s, m| {
        m.parts[1].residual = m.parts[0].residual;
        m.parts[1].rows = 64;
        s.spec.args.remove(7);
        s.spec.args[5].ty.shape[0] = n(64);
        s.spec.args[6].ty.shape[0] = n(64);
        s.spec.args[7].ty.shape[1] = n(64);
        m.parts[1].out = Some(7);
        s.may_alias.push(Alias { write: 4, read: 3 });
    });
    refuse("grid", &|s, _| s.launches[0].grid = vec![Extent::each(5)]);
    refuse("unused", &|s, _| s.spec.args.push(arg(Access::Read, DType::F32, [1])));
    refuse("alias of x", &|s, _| s.may_alias.push(Alias { write: 4, read: 0 }));
    refuse("alias of another part", &|s, _| s.may_alias.push(Alias { write: 4, read: 7 }));
    let layout = |name: &str, ids: &[ArgId], change: &dyn Fn(&mut Implementation, &mut MatmulSpec)| {
        let mut kernel = stored(DType::Q8Act, 256, 32, &[(DType::Q4_K, 64)], true);
        kernel.layouts = ids.iter().map(|id| (*id, Layout::Interleaved16)).collect();
        let mut m = template(&kernel);
        change(&mut kernel, &mut m);
        kernel.spec.computes = Computation::Matmul(m);
        let bound = bind(&kernel, &Features::baseline());
        match bound {
            Ok(_) => assert_eq!(name, ""),
            Err(e) => assert!(matches!(e, BindError::Layout { .. }), "{name}: {e}"),
        }
    };
    layout("", &[1], &|_, _| ());
    layout("activations", &[0], &|_, _| ());
    layout("a bias", &[2], &|_, _| ());
    layout("a result", &[4], &|_, _| ());
    layout("twice", &[1, 1], &|_, _| ());
    layout("nothing", &[9], &|_, _| ());
    layout("exact activations", &[1], &|s, _| s.spec.args[0].ty.dtype = DType::F32);
    layout("other formats", &[1], &|s, m| {
        (m.parts[0].format, s.spec.args[1].ty.dtype) = (DType::Q5_K, DType::Q5_K);
    });
    layout("rows beside", &[1], &|s, m| {
        m.parts[0].rows = 63;
        s.spec.args[1].ty.shape[0] = n(63);
        s.spec.args[2].ty.shape[0] = n(63);
        s.spec.args[3].ty.shape[1] = n(63);
        s.spec.args[4].ty.shape[1] = n(63);
    });
    layout("a tile of 24", &[1], &|s, _| {
        s.launches[0].code = Code::Cpu(CpuCode::Matmul { tile: 24 });
        s.launches[0].grid = vec![Extent::each(3)];
    });
    let epilogues =
        |name: &str, mut kernel: Implementation, change: &dyn Fn(&mut Implementation, &mut MatmulSpec)| {
            assert!(bind(&kernel, &Features::baseline()).is_ok(), "{name}");
            let mut m = template(&kernel);
            change(&mut kernel, &mut m);
            kernel.spec.computes = Computation::Matmul(m);
            assert!(bind(&kernel, &Features::baseline()).is_err(), "{name}");
        };
    let quantised = || swiglu(DType::F32, DType::Q8Act, 64, 32);
    epilogues("tile", quantised(), &|s, _| {
        s.launches[0].code = Code::Cpu(CpuCode::Matmul { tile: 48 });
        s.launches[0].grid = vec![Extent::each(2)];
    });
    epilogues("one part", quantised(), &|_, m| m.parts.truncate(1));
    epilogues("out", quantised(), &|s, _| s.spec.args[3].ty.shape[1] = n(96));
    epilogues("best", argmax(64, 32), &|s, _| s.workspace[0].ty.shape[1] = n(1));
    epilogues("index", argmax(64, 32), &|s, _| s.workspace[1].ty.dtype = DType::F32);
    epilogues("the best written", argmax(64, 32), &|s, _| s.workspace[0].access = Access::Write);
    epilogues("no best of items", argmax(64, 32), &|s, _| s.launches.truncate(1));
    epilogues("grid of the best", argmax(64, 32), &|s, _| s.launches[1].grid = vec![Extent::each(2)]);
    epilogues("out", argmax(64, 32), &|s, _| s.spec.args[2].ty.shape[0] = n(1));
}

#[test]
#[should_panic(expected = "of a launch of 2")]
fn refuses_items_beyond_the_grid() {
    let kernel =
        bind(&stored(DType::F32, 64, 32, &[(DType::F16, 64)], false), &Features::baseline()).unwrap();
    // SAFETY: no memory is promised, and none is touched.
    unsafe { kernel[0].run(&[], &syms(1, 0), &mut std::iter::once(1..3)) };
}
