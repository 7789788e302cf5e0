use super::super::testing::*;
use super::super::{Features, bind};
use crate::codegen::spec::{Access, Alias, Arg, ArgId, Computation, Extent, Implementation, Layout};
use crate::ir::{DType, Dim, Op, Rope, RopeStyle, Syms, TensorType};

const T: Dim = Dim::T;
/// Sequences, and positions of each.
const B: u64 = 3;
const C: u64 = 50;

fn ty<D: Into<Dim>>(dtype: DType, shape: impl IntoIterator<Item = D>) -> TensorType {
    TensorType::new(dtype, shape)
}

fn f32s<const N: usize>(shape: [Dim; N]) -> TensorType {
    ty(DType::F32, shape)
}

/// A primitive with one item for each row of its result.
fn primitive(p: Op, operands: Vec<TensorType>, out: TensorType) -> Implementation {
    let grid = out.shape.iter().rev().skip(1).rev().map(|d| Extent::each(*d)).collect();
    let mut args: Vec<Arg> = operands.into_iter().map(|ty| Arg::new(Access::Read, ty)).collect();
    args.push(Arg::new(Access::Write, out));
    kernel(Computation::Op(p), args, grid)
}

/// The same, where operand `slot` holds values below a bound.
fn following(
    p: Op,
    operands: Vec<TensorType>,
    out: TensorType,
    slot: usize,
    below: impl Into<Dim>,
) -> Implementation {
    let mut kernel = primitive(p, operands, out);
    kernel.spec.args[slot].index = index([0u64; 0], below).index;
    kernel
}

fn inputs(kernel: &Implementation, at: &Syms) -> Vec<Option<Vec<u8>>> {
    let mut rng = rng(11);
    let fill = |a: &Arg| {
        (a.access != Access::Write).then(|| random(&mut rng, a.ty.dtype, a.ty.elements(at) as usize))
    };
    kernel.spec.args.iter().map(fill).collect()
}

fn operand(kernel: &Implementation, inputs: &[Option<Vec<u8>>], i: usize) -> Vec<f64> {
    values(kernel.spec.args[i].ty.dtype, inputs[i].as_ref().unwrap())
}

/// Checks the result against `want(operands, syms)` at several sizes, also in place of operands in `in_place`.
#[track_caller]
fn check(kernel: &Implementation, in_place: &[ArgId], want: impl Fn(&[Vec<f64>], &Syms) -> Vec<f64>) {
    let out = (kernel.spec.args.len() - 1) as ArgId;
    let mut kernel = kernel.clone();
    kernel.may_alias = in_place.iter().map(|&read| Alias { write: out, read }).collect();
    for at in [syms(1, 0), syms(2, 2), syms(7, 3), syms(33, 1)] {
        let inputs = inputs(&kernel, &at);
        let operands: Vec<Vec<f64>> = (0..usize::from(out))
            .map(|i| match kernel.spec.args[i].ty.dtype {
                DType::I32 => to_i32s(inputs[i].as_ref().unwrap()).into_iter().map(f64::from).collect(),
                _ => operand(&kernel, &inputs, i),
            })
            .collect();
        let want = want(&operands, &at);
        assert_close(&to_f32s(&launch_all(&kernel, &at, &inputs, out)), &want, 1e-6);
        for &read in in_place {
            let have = launch(&kernel, &Features::detect(), &at, &inputs, Some((out, read)));
            assert_close(&to_f32s(&have[usize::from(out)]), &want, 1e-6);
        }
    }
}

#[test]
fn fill() {
    let kernel = primitive(Op::Const { value: 1.25 }, vec![], f32s([T, n(3), n(300)]));
    check(&kernel, &[], |_, at| vec![1.25; at.t as usize * 900]);
    let scalar = primitive(Op::Const { value: -2.0 }, vec![], f32s([]));
    check(&scalar, &[], |_, _| vec![-2.0]);
}

/// Rows of a table by ids, for as many results as there are ids.
fn get_rows(table: TensorType, ids: Dim) -> Implementation {
    let (rows, out) = (table.shape[0], ty(table.dtype, [ids, table.shape[1]]));
    following(Op::GetRows, vec![table, ty(DType::I32, [ids])], out, 1, rows)
}

#[test]
fn get_rows_copies_blocks_and_clamps_ids() {
    for format in DType::WEIGHTS {
        let kernel = get_rows(ty(format, [9u64, 256]), T);
        let at = syms(4, 0);
        let mut inputs = inputs(&kernel, &at);
        inputs[1] = Some(i32_bytes(&[2, -1, 8, i32::MAX]));
        let row = 256 / format.block_len() * format.block_bytes();
        let table = inputs[0].as_ref().unwrap();
        let want: Vec<u8> =
            [2, 0, 8, 8].iter().flat_map(|i| table[i * row..(i + 1) * row].to_vec()).collect();
        for features in Features::available() {
            assert!(launch(&kernel, &features, &at, &inputs, None)[2] == want, "{format}");
        }
    }
}

#[test]
fn get_rows_picks_rows_of_the_step() {
    let kernel = get_rows(f32s([T, n(301)]), Dim::R);
    for (t, ids) in
        [(1, &[][..]), (1, &[0]), (5, &[]), (5, &[4]), (5, &[3, 3, 0, 1]), (2, &[1, 2, -9, 0, i32::MAX])]
    {
        let at = syms(t, ids.len() as u64);
        let mut inputs = inputs(&kernel, &at);
        inputs[1] = Some(i32_bytes(ids));
        let x = operand(&kernel, &inputs, 0);
        let row = |id: &i32| x[(*id).clamp(0, t as i32 - 1) as usize * 301..][..301].to_vec();
        let want: Vec<f64> = ids.iter().flat_map(row).collect();
        assert_close(&to_f32s(&launch_all(&kernel, &at, &inputs, 2)), &want, 0.0);
    }
}

#[test]
fn dequant_is_exact() {
    let widths = |d: DType| if d.is_quantised() { [d.block_len() as u64 * 3, 512] } else { [301, 8] };
    // What GPUs alone have is refused.
    let of_gpus = primitive(Op::Dequant, vec![ty(DType::Q16Act, [n(5), n(64)])], f32s([n(5), n(64)]));
    let why = bind(&of_gpus, &Features::detect()).map(|_| ()).unwrap_err().to_string();
    assert!(why.contains("the CPU has no kernels of q16_act"), "{why}");
    let formats = DType::ALL.into_iter().filter(|d| d.is_dequantisable() && *d != DType::Q16Act);
    for (format, width) in formats.flat_map(|d| widths(d).map(|w| (d, w))) {
        let kernel = primitive(Op::Dequant, vec![ty(format, [n(5), n(width)])], f32s([n(5), n(width)]));
        let at = syms(1, 0);
        let inputs = inputs(&kernel, &at);
        let want = operand(&kernel, &inputs, 0);
        for features in Features::available() {
            let have = to_f32s(&launch(&kernel, &features, &at, &inputs, None)[1]);
            assert!(have.iter().map(|x| f64::from(*x)).eq(want.iter().copied()), "{format}");
        }
    }
}

#[test]
fn matmul_id_takes_the_matrix_of_each_row() {
    let operands = vec![f32s([T, n(300)]), f32s([n(3), n(7), n(300)]), ty(DType::I32, [T])];
    let kernel = following(Op::MatMulId, operands, f32s([T, n(7)]), 2, 3);
    let at = syms(6, 0);
    let mut inputs = inputs(&kernel, &at);
    // Ids beside the matrices lead to the first or the last.
    inputs[2] = Some(i32_bytes(&[2, 0, 1, -1, 3, i32::MAX]));
    let (x, w) = (operand(&kernel, &inputs, 0), operand(&kernel, &inputs, 1));
    let mut want = vec![];
    for (t, e) in [2, 0, 1, 0, 2, 2].into_iter().enumerate() {
        let rows = w[e * 7 * 300..][..7 * 300].chunks(300);
        want.extend(rows.map(|w| w.iter().zip(&x[t * 300..][..300]).map(|(w, x)| w * x).sum::<f64>()));
    }
    assert_close(&to_f32s(&launch_all(&kernel, &at, &inputs, 3)), &want, 1e-6);
}

#[test]
fn quant_act_is_the_reference_bit_for_bit() {
    let kernel = primitive(Op::QuantAct, vec![f32s([T, n(2), n(96)])], ty(DType::Q8Act, [T, n(2), n(96)]));
    let at = syms(33, 0);
    let mut inputs = inputs(&kernel, &at);
    let mut x = to_f32s(inputs[0].as_ref().unwrap());
    // Halves, which round away from zero, zeros, tiny and odd numbers.
    x[..32].iter_mut().enumerate().for_each(|(i, x)| *x = i as f32 - 15.5);
    x[0] = 127.0;
    x[32..64].fill(0.0);
    x[64..96].iter_mut().for_each(|x| *x *= 1e-42);
    x[96] = f32::NAN;
    x[128] = f32::INFINITY;
    inputs[0] = Some(f32_bytes(&x));
    let mut want = vec![0; x.len() / 32 * 40];
    crate::gguf::dequant::quantise_q8_act(&x, &mut want).unwrap();
    for features in Features::available() {
        let have = launch(&kernel, &features, &at, &inputs, None).swap_remove(1);
        for (i, (h, w)) in have.chunks(40).zip(want.chunks(40)).enumerate() {
            // The sign and payload of a NaN are the processor's.
            let nan = |b: &[u8]| f32::from_le_bytes(b[4..8].try_into().unwrap()).is_nan();
            assert!(h == w || nan(h) && nan(w) && h[8..] == w[8..], "block {i}: {h:?} not {w:?}");
        }
    }
}

#[test]
fn matmul() {
    let kernel =
        primitive(Op::MatMul { round: None }, vec![f32s([T, n(300)]), f32s([n(7), n(300)])], f32s([T, n(7)]));
    check(&kernel, &[], |x, _| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
        x[0].chunks(300).flat_map(|a| x[1].chunks(300).map(|b| dot(a, b)).collect::<Vec<f64>>()).collect()
    });
}

#[test]
fn add_and_mul_with_rows_and_with_one_row() {
    let full = || f32s([T, n(301)]);
    let each = |x: &[Vec<f64>], f: fn(f64, f64) -> f64| -> Vec<f64> {
        x[0].iter().zip(x[1].iter().cycle()).map(|(a, b)| f(*a, *b)).collect()
    };
    for (p, f) in [(Op::Add, (|a, b| a + b) as fn(f64, f64) -> f64), (Op::Mul, |a, b| a * b)] {
        check(&primitive(p.clone(), vec![full(), full()], full()), &[0, 1], |x, _| each(x, f));
        check(&primitive(p, vec![full(), f32s([n(301)])], full()), &[0], |x, _| each(x, f));
    }
    let kernel = primitive(Op::Add, vec![f32s([n(5)]), f32s([n(5)])], f32s([n(5)]));
    check(&kernel, &[0, 1], |x, _| each(x, |a, b| a + b));
}

#[test]
fn silu() {
    let kernel = primitive(Op::Silu, vec![f32s([T, n(301)])], f32s([T, n(301)]));
    check(&kernel, &[0], |x, _| x[0].iter().map(|x| x / (1.0 + (-x).exp())).collect());
}

#[test]
fn rms_norm() {
    let x = || f32s([T, n(2), n(301)]);
    let kernel = primitive(Op::RmsNorm { eps: 1e-5 }, vec![x(), f32s([n(301)])], x());
    check(&kernel, &[0], |x, _| {
        x[0].chunks(301)
            .flat_map(|row| {
                let mean = row.iter().map(|x| x * x).sum::<f64>() / 301.0;
                row.iter().zip(&x[1]).map(move |(x, w)| x / (mean + 1e-5).sqrt() * w)
            })
            .collect()
    });
}

#[test]
fn rope() {
    for style in [RopeStyle::Interleaved, RopeStyle::NeoX] {
        let rope = Rope { base: 5e5, dims: 6, style };
        let x = || f32s([T, n(2), n(9)]);
        let operands = [x(), ty(DType::I32, [T]), f32s([n(3)])];
        for count in [2, 3] {
            let kernel = primitive(Op::Rope(rope), operands[..count].to_vec(), x());
            check(&kernel, &[0], |x, _| {
                let mut y = x[0].clone();
                for (row, y) in y.chunks_mut(9).enumerate() {
                    for i in 0..3 {
                        let factor = x.get(2).map_or(1.0, |f| f[i]);
                        let angle = x[1][row / 2] * 5e5f64.powf(-(i as f64) / 3.0) / factor;
                        let (a, b) = if style == RopeStyle::NeoX { (i, i + 3) } else { (2 * i, 2 * i + 1) };
                        (y[a], y[b]) = (
                            y[a] * angle.cos() - y[b] * angle.sin(),
                            y[a] * angle.sin() + y[b] * angle.cos(),
                        );
                    }
                }
                y
            });
        }
    }
}

fn append(cache: DType) -> Implementation {
    let args = vec![
        arg(Access::Update, cache, [9u64, 2, 133]),
        arg(Access::Read, DType::F32, [T, n(2), n(133)]),
        written_by([T], 9),
    ];
    kernel(Computation::Op(Op::KvAppend), args, vec![Extent::each(T)])
}

#[test]
fn kv_append_writes_its_rows_alone() {
    for (cache, tolerance) in [(DType::F32, 0.0), (DType::F16, 1e-3)] {
        for rows in [&[4, 5, 6][..], &[8, 0, 3], &[7], &[2, 1000, -1], &[i32::MAX, i32::MIN]] {
            let (kernel, at) = (append(cache), syms(rows.len() as u64, 0));
            let mut inputs = inputs(&kernel, &at);
            inputs[2] = Some(i32_bytes(rows));
            let mut want = operand(&kernel, &inputs, 0);
            for (row, x) in rows.iter().zip(operand(&kernel, &inputs, 1).chunks(266)) {
                want[(*row).clamp(0, 8) as usize * 266..][..266].copy_from_slice(x);
            }
            let have = values(cache, &launch_all(&kernel, &at, &inputs, 0));
            assert_close(&have.iter().map(|x| *x as f32).collect::<Vec<_>>(), &want, tolerance);
        }
    }
}

/// Two sequences of up to three pages of four rows, in a cache of five pages.
fn read(cache: DType) -> Implementation {
    let operands = vec![ty(cache, [20u64, 2, 300]), ty(DType::I32, [2u64, 3]), ty(DType::I32, [2u64])];
    let mut kernel = following(Op::KvRead { page: 4 }, operands, ty(cache, [2u64, 12, 2, 300]), 1, 5);
    kernel.spec.args[2] = index([2u64], 13);
    kernel
}

#[test]
fn kv_read_gathers_pages_and_leaves_the_rest_zero() {
    for cache in [DType::F32, DType::F16] {
        for (tables, lengths) in [
            ([3, 0, 4, 1, 2, 0], [12, 0]),
            ([3, 0, 4, 3, 2, 1], [5, 9]),
            ([0, 77, -7, 4, 4, 4], [4, 1]),
            ([5, -1, i32::MIN, 1, i32::MAX, 2], [13, i32::MAX]),
            ([0, 1, 2, 3, 4, 0], [-1, i32::MIN]),
        ] {
            let (kernel, at) = (read(cache), syms(1, 0));
            let mut inputs = inputs(&kernel, &at);
            (inputs[1], inputs[2]) = (Some(i32_bytes(&tables)), Some(i32_bytes(&lengths)));
            let row = 600 * cache.block_bytes();
            let rows = inputs[0].as_ref().unwrap();
            let mut want = vec![];
            for (table, length) in tables.chunks(3).zip(lengths) {
                for l in 0..12 {
                    let from = (table[l / 4].clamp(0, 4) as usize * 4 + l % 4) * row;
                    let filled = (l as i32) < length;
                    want.extend(if filled { rows[from..from + row].to_vec() } else { vec![0; row] });
                }
            }
            for features in Features::available() {
                assert!(launch(&kernel, &features, &at, &inputs, None)[3] == want, "{tables:?} {lengths:?}");
            }
        }
    }
}

/// The sequence that random numbers mean.
fn sequence(x: f64) -> usize {
    x.clamp(0.0, (B - 1) as f64) as usize
}

fn scores() -> Implementation {
    let operands = vec![f32s([T, n(6), n(13)]), f32s([n(B), n(C), n(2), n(13)]), ty(DType::I32, [T])];
    following(Op::Scores { scale: 0.3 }, operands, f32s([n(6), T, n(C)]), 2, B)
}

fn weighted_sum() -> Implementation {
    let operands = vec![f32s([n(6), T, n(C)]), f32s([n(B), n(C), n(2), n(300)]), ty(DType::I32, [T])];
    following(Op::WeightedSum, operands, f32s([T, n(6), n(300)]), 2, B)
}

fn mask(window: Option<u32>) -> Implementation {
    let square = || f32s([n(2), T, n(C)]);
    primitive(Op::CausalMask { window }, vec![square(), ty(DType::I32, [T])], square())
}

#[test]
fn attention_in_pieces() {
    let c = C as usize;
    check(&scores(), &[], |x, at| {
        let t = at.t as usize;
        let one = |h: usize, t: usize, l: usize| {
            let k = ((sequence(x[2][t]) * c + l) * 2 + h / 3) * 13;
            (0..13).map(|i| x[0][(t * 6 + h) * 13 + i] * x[1][k + i]).sum::<f64>() * f64::from(0.3f32)
        };
        (0..6 * t * c).map(|i| one(i / c / t, i / c % t, i % c)).collect()
    });
    check(&weighted_sum(), &[], |x, at| {
        let t = at.t as usize;
        let one = |tt: usize, h: usize, i: usize| {
            let v = |l: usize| x[1][((sequence(x[2][tt]) * c + l) * 2 + h / 3) * 300 + i];
            (0..c).map(|l| x[0][(h * t + tt) * c + l] * v(l)).sum()
        };
        (0..t * 6 * 300).map(|i| one(i / 1800, i / 300 % 6, i % 300)).collect()
    });
    let square = || f32s([n(2), T, n(C)]);
    let softmax = primitive(Op::Softmax, vec![square()], square());
    check(&softmax, &[0], |x, _| {
        x[0].chunks(c)
            .flat_map(|row| {
                let total: f64 = row.iter().map(|x| x.exp()).sum();
                row.iter().map(move |x| x.exp() / total)
            })
            .collect()
    });
}

#[test]
fn sequences_beside_those_there_are_clamped() {
    for kernel in [scores(), weighted_sum()] {
        let at = syms(4, 0);
        let mut inputs = inputs(&kernel, &at);
        let mut run = |sequences: [i32; 4]| {
            inputs[2] = Some(i32_bytes(&sequences));
            launch_all(&kernel, &at, &inputs, 3)
        };
        assert!(run([-1, 3, i32::MIN, i32::MAX]) == run([0, 2, 0, 2]));
    }
}

#[test]
fn the_mask_hides_what_lies_ahead_or_far_back_and_softmax_takes_it() {
    let positions = [3, 0, 49, 20, 48, 5];
    for window in [None, Some(1), Some(4), Some(50), Some(u32::MAX)] {
        let (mut mask, at) = (mask(window), syms(6, 0));
        mask.may_alias.push(Alias { write: 2, read: 0 });
        let square = || f32s([n(2), T, n(C)]);
        let softmax = primitive(Op::Softmax, vec![square()], square());
        let mut inputs = inputs(&mask, &at);
        inputs[1] = Some(i32_bytes(&positions));
        for features in Features::available() {
            let masked = launch(&mask, &features, &at, &inputs, None).swap_remove(2);
            let shares = launch(&softmax, &features, &at, &[Some(masked.clone()), None], None).swap_remove(1);
            let rows = to_f32s(inputs[0].as_ref().unwrap());
            for (i, (y, share)) in to_f32s(&masked).iter().zip(to_f32s(&shares)).enumerate() {
                let (l, position) = ((i % 50) as i64, i64::from(positions[i / 50 % 6]));
                let seen = l <= position && window.is_none_or(|w| l > position - i64::from(w));
                assert_eq!(*y, if seen { rows[i] } else { f32::NEG_INFINITY });
                assert_eq!(share > 0.0, seen);
            }
            assert!(launch(&mask, &features, &at, &inputs, Some((2, 0)))[2] == masked, "in place");
            let mut wild = inputs.clone();
            wild[1] = Some(i32_bytes(&[-1, i32::MIN, i32::MIN, -7, -1, -50]));
            let hidden = launch(&mask, &features, &at, &wild, None).swap_remove(2);
            assert!(to_f32s(&hidden).iter().all(|x| *x == f32::NEG_INFINITY));
        }
    }
}

#[test]
fn argmax_takes_the_first_of_equals_and_tells_of_nan() {
    let mut kernel = primitive(Op::ArgMax, vec![f32s([T, n(300)])], ty(DType::I32, [T]));
    kernel.launches[0].grid = vec![Extent::each(T)];
    let mut x = vec![0f32; 4 * 300];
    (x[270], x[290]) = (5.0, 5.0);
    x[300..600].fill(f32::NAN);
    x[600 + 3] = f32::NAN;
    x[600 + 299] = 1e-3;
    x[900..].fill(f32::NEG_INFINITY);
    let inputs = [Some(f32_bytes(&x)), None];
    assert_eq!(to_i32s(&launch_all(&kernel, &syms(4, 0), &inputs, 1)), [270, -1, -1, 0]);
}

#[test]
fn refuses_what_does_not_fit() {
    let refuse = |name: &str, kernel: Implementation, change: &dyn Fn(&mut Implementation)| {
        let mut kernel = kernel;
        bind(&kernel, &Features::baseline()).map(|_| ()).unwrap();
        change(&mut kernel);
        assert!(bind(&kernel, &Features::baseline()).is_err(), "{name}");
    };
    let row = || f32s([T, n(64)]);
    let add = || primitive(Op::Add, vec![row(), row()], row());
    // Only matmuls and norms take rows as strips.
    let strips = |s: &mut Implementation| s.layouts.push((0, Layout::Interleaved16));
    refuse("layout of a table", get_rows(ty(DType::Q4_K, [32u64, 256]), T), &strips);
    let weight = [n(32), n(256)];
    refuse("layout", primitive(Op::Dequant, vec![ty(DType::Q6_K, weight)], f32s(weight)), &strips);
    refuse("operands", add(), &|s| s.spec.args[1].ty.shape[1] = n(32));
    refuse("result", add(), &|s| s.spec.args[2].ty.shape[0] = n(1));
    refuse("type of the result", add(), &|s| s.spec.args[2].ty.dtype = DType::F16);
    refuse("result read", add(), &|s| s.spec.args[2].access = Access::Read);
    refuse("operand written", add(), &|s| s.spec.args[0].access = Access::Write);
    refuse("too few", add(), &|s| drop(s.spec.args.remove(0)));
    refuse("none", add(), &|s| s.spec.args.clear());
    refuse("grid", add(), &|s| s.launches[0].grid = vec![Extent { dim: T, per: 2 }]);
    refuse("zero per item", add(), &|s| s.launches[0].grid = vec![Extent { dim: T, per: 0 }]);
    let per_row = primitive(Op::Mul, vec![row(), f32s([n(64)])], row());
    refuse("in place of a row", per_row, &|s| s.may_alias.push(Alias { write: 2, read: 1 }));
    let quant = primitive(Op::QuantAct, vec![row()], ty(DType::Q8Act, [T, n(64)]));
    refuse("quantising in place", quant, &|s| s.may_alias.push(Alias { write: 1, read: 0 }));
    let get = || get_rows(ty(DType::Q4_K, [9u64, 256]), T);
    refuse("ids", get(), &|s| s.spec.args[1].ty.dtype = DType::F32);
    refuse("empty table", get(), &|s| {
        s.spec.args[0].ty.shape[0] = n(0);
        s.spec.args[1] = index([T], 0);
    });
    refuse("a table that may be empty", get(), &|s| {
        s.spec.args[0].ty.shape[0] = Dim::R;
        s.spec.args[1] = index([T], Dim::R);
    });
    refuse("broken blocks", get(), &|s| {
        s.spec.args[0].ty.shape[1] = n(255);
        s.spec.args[2].ty.shape[1] = n(255);
    });
    let norm = || primitive(Op::RmsNorm { eps: 1e-5 }, vec![row(), f32s([n(64)])], row());
    refuse("eps", norm(), &|s| s.spec.computes = Computation::Op(Op::RmsNorm { eps: -1.0 }));
    refuse("weight", norm(), &|s| s.spec.args[1].ty.shape[0] = n(32));
    let rope = Rope { base: 1e4, dims: 8, style: RopeStyle::NeoX };
    let heads = |d| f32s([T, n(2), n(d)]);
    let rotate = primitive(Op::Rope(rope), vec![heads(16), ty(DType::I32, [T])], heads(16));
    refuse("wide heads", rotate.clone(), &|s| {
        s.spec.args[0].ty.shape[2] = n(4096);
        s.spec.args[2].ty.shape[2] = n(4096);
    });
    refuse("base", rotate, &|s| {
        s.spec.computes = Computation::Op(Op::Rope(Rope { base: f32::NAN, ..rope }));
    });
    refuse("cache", append(DType::F16), &|s| s.spec.args[0].ty.shape[1] = n(3));
    refuse("cache of few rows", append(DType::F16), &|s| s.spec.args[0].ty.shape[0] = n(8));
    refuse("cache of tokens", append(DType::F16), &|s| {
        s.spec.args[0].ty.shape[0] = T;
        s.spec.args[2] = written_by([T], T);
    });
    refuse("cache without rows", append(DType::F16), &|s| {
        s.spec.args[0].ty.shape[0] = n(0);
        s.spec.args[2] = written_by([T], 0);
    });
    refuse("cache read", append(DType::F16), &|s| s.spec.args[0].access = Access::Read);
    refuse("no rows", append(DType::F16), &|s| drop(s.spec.args.remove(2)));
    refuse("rows of other tokens", append(DType::F16), &|s| s.spec.args[2].ty.shape[0] = Dim::R);
    refuse("rows and more", append(DType::F16), &|s| s.spec.args.push(s.spec.args[1].clone()));
    refuse("pages that are not whole", read(DType::F16), &|s| {
        s.spec.args[0].ty.shape[0] = n(22);
    });
    refuse("page", read(DType::F16), &|s| s.spec.computes = Computation::Op(Op::KvRead { page: 5 }));
    refuse("no page", read(DType::F16), &|s| s.spec.computes = Computation::Op(Op::KvRead { page: 0 }));
    refuse("what is read", read(DType::F16), &|s| s.spec.args[3].ty.shape[1] = n(8));
    refuse("sequences of tokens", scores(), &|s| {
        s.spec.args[1].ty.shape[0] = T;
        s.spec.args[2] = index([T], T);
    });
    refuse("no sequences", weighted_sum(), &|s| {
        s.spec.args[1].ty.shape[0] = n(0);
        s.spec.args[2] = index([T], 0);
    });
    refuse("window", mask(Some(1)), &|s| {
        s.spec.computes = Computation::Op(Op::CausalMask { window: Some(0) });
    });
    for kernel in [get(), append(DType::F16), read(DType::F32), scores(), weighted_sum(), mask(None), add()] {
        for (i, arg) in kernel.spec.args.iter().enumerate() {
            let right = arg.index.into_iter().flat_map(wrong_indices);
            let none = arg.index.is_none().then(|| index([T], 1).index);
            for wrong in right.chain(none) {
                refuse("what values are held to", kernel.clone(), &|s| s.spec.args[i].index = wrong);
            }
        }
    }
}
