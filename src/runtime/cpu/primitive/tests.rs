use super::super::testing::*;
use super::super::{Features, bind};
use crate::codegen::spec::{Access, Alias, Arg, ArgId, Extent, KernelSpec, Primitive, Template};
use crate::ir::{DType, Dim, Rope, RopeStyle, Syms, TensorType};

const T: Dim = Dim::T;
const P_T: Dim = Dim { c: 0, t: 1, p: 1, s: 0 };

fn ty<D: Into<Dim>>(dtype: DType, shape: impl IntoIterator<Item = D>) -> TensorType {
    TensorType::new(dtype, shape)
}

fn f32s<const N: usize>(shape: [Dim; N]) -> TensorType {
    ty(DType::F32, shape)
}

/// A primitive with one item for each row of its result.
fn primitive(p: Primitive, operands: Vec<TensorType>, out: TensorType) -> KernelSpec {
    let grid = out.shape.iter().rev().skip(1).rev().map(|d| Extent::each(*d)).collect();
    let mut args: Vec<Arg> = operands.into_iter().map(|ty| Arg { access: Access::Read, ty }).collect();
    args.push(Arg { access: Access::Write, ty: out });
    spec(Template::Primitive(p), args, grid)
}

fn inputs(spec: &KernelSpec, at: &Syms) -> Vec<Option<Vec<u8>>> {
    let mut rng = rng(11);
    let fill = |a: &Arg| {
        (a.access != Access::Write).then(|| random(&mut rng, a.ty.dtype, a.ty.elements(at) as usize))
    };
    spec.args.iter().map(fill).collect()
}

fn operand(spec: &KernelSpec, inputs: &[Option<Vec<u8>>], i: usize) -> Vec<f64> {
    values(spec.args[i].ty.dtype, inputs[i].as_ref().unwrap())
}

/// Checks the result against `want(operands, syms)` at several sizes, also in place of operands in `in_place`.
#[track_caller]
fn check(spec: &KernelSpec, in_place: &[ArgId], want: impl Fn(&[Vec<f64>], &Syms) -> Vec<f64>) {
    let out = (spec.args.len() - 1) as ArgId;
    let mut spec = spec.clone();
    spec.may_alias = in_place.iter().map(|&read| Alias { write: out, read }).collect();
    for at in [syms(1, 0, 50), syms(2, 5, 50), syms(7, 0, 50), syms(33, 10, 50)] {
        let inputs = inputs(&spec, &at);
        let operands: Vec<Vec<f64>> = (0..usize::from(out))
            .map(|i| match spec.args[i].ty.dtype {
                DType::I32 => to_i32s(inputs[i].as_ref().unwrap()).into_iter().map(f64::from).collect(),
                _ => operand(&spec, &inputs, i),
            })
            .collect();
        let want = want(&operands, &at);
        assert_close(&to_f32s(&launch_all(&spec, &at, &inputs, out)), &want, 1e-6);
        for &read in in_place {
            let have = launch(&spec, &Features::detect(), &at, &inputs, Some((out, read)));
            assert_close(&to_f32s(&have[usize::from(out)]), &want, 1e-6);
        }
    }
}

#[test]
fn fill() {
    let spec = primitive(Primitive::Fill { value: 1.25 }, vec![], f32s([T, n(3), n(300)]));
    check(&spec, &[], |_, at| vec![1.25; at.t as usize * 900]);
    let scalar = primitive(Primitive::Fill { value: -2.0 }, vec![], f32s([]));
    check(&scalar, &[], |_, _| vec![-2.0]);
}

#[test]
fn get_rows_copies_blocks_and_clamps_ids() {
    for format in DType::WEIGHTS {
        let table = ty(format, [9u64, 256]);
        let spec = primitive(Primitive::GetRows, vec![table, ty(DType::I32, [T])], ty(format, [T, n(256)]));
        let at = syms(4, 0, 8);
        let mut inputs = inputs(&spec, &at);
        inputs[1] = Some(i32_bytes(&[2, -1, 8, i32::MAX]));
        let row = 256 / format.block_len() * format.block_bytes();
        let table = inputs[0].as_ref().unwrap();
        let want: Vec<u8> =
            [2, 0, 8, 8].iter().flat_map(|i| table[i * row..(i + 1) * row].to_vec()).collect();
        for features in Features::available() {
            assert!(launch(&spec, &features, &at, &inputs, None)[2] == want, "{format}");
        }
    }
}

#[test]
fn dequant_is_exact() {
    let widths = |d: DType| if d.is_quantised() { [d.block_len() as u64 * 3, 512] } else { [301, 8] };
    let formats = DType::ALL.into_iter().filter(|d| d.is_dequantisable());
    for (format, width) in formats.flat_map(|d| widths(d).map(|w| (d, w))) {
        let spec = primitive(Primitive::Dequant, vec![ty(format, [n(5), n(width)])], f32s([n(5), n(width)]));
        let at = syms(1, 0, 1);
        let inputs = inputs(&spec, &at);
        let want = operand(&spec, &inputs, 0);
        for features in Features::available() {
            let have = to_f32s(&launch(&spec, &features, &at, &inputs, None)[1]);
            assert!(have.iter().map(|x| f64::from(*x)).eq(want.iter().copied()), "{format}");
        }
    }
}

#[test]
fn quant_act_is_the_reference_bit_for_bit() {
    let spec =
        primitive(Primitive::QuantAct, vec![f32s([T, n(2), n(96)])], ty(DType::Q8Act, [T, n(2), n(96)]));
    let at = syms(33, 0, 50);
    let mut inputs = inputs(&spec, &at);
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
        let have = launch(&spec, &features, &at, &inputs, None).swap_remove(1);
        for (i, (h, w)) in have.chunks(40).zip(want.chunks(40)).enumerate() {
            // The sign and payload of a NaN are the processor's.
            let nan = |b: &[u8]| f32::from_le_bytes(b[4..8].try_into().unwrap()).is_nan();
            assert!(h == w || nan(h) && nan(w) && h[8..] == w[8..], "block {i}: {h:?} not {w:?}");
        }
    }
}

#[test]
fn matmul() {
    let spec = primitive(Primitive::MatMul, vec![f32s([T, n(300)]), f32s([n(7), n(300)])], f32s([T, n(7)]));
    check(&spec, &[], |x, _| {
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
    for (p, f) in [(Primitive::Add, (|a, b| a + b) as fn(f64, f64) -> f64), (Primitive::Mul, |a, b| a * b)] {
        check(&primitive(p.clone(), vec![full(), full()], full()), &[0, 1], |x, _| each(x, f));
        check(&primitive(p, vec![full(), f32s([n(301)])], full()), &[0], |x, _| each(x, f));
    }
    let spec = primitive(Primitive::Add, vec![f32s([n(5)]), f32s([n(5)])], f32s([n(5)]));
    check(&spec, &[0, 1], |x, _| each(x, |a, b| a + b));
}

#[test]
fn silu() {
    let spec = primitive(Primitive::Silu, vec![f32s([T, n(301)])], f32s([T, n(301)]));
    check(&spec, &[0], |x, _| x[0].iter().map(|x| x / (1.0 + (-x).exp())).collect());
}

#[test]
fn rms_norm() {
    let x = || f32s([T, n(2), n(301)]);
    let spec = primitive(Primitive::RmsNorm { eps: 1e-5 }, vec![x(), f32s([n(301)])], x());
    check(&spec, &[0], |x, _| {
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
    for style in [RopeStyle::Interleaved, RopeStyle::Halves] {
        let rope = Rope { base: 5e5, dims: 6, style };
        let x = || f32s([T, n(2), n(9)]);
        let operands = [x(), ty(DType::I32, [T]), f32s([n(3)])];
        for count in [2, 3] {
            let spec = primitive(Primitive::Rope(rope), operands[..count].to_vec(), x());
            check(&spec, &[0], |x, _| {
                let mut y = x[0].clone();
                for (row, y) in y.chunks_mut(9).enumerate() {
                    for i in 0..3 {
                        let factor = x.get(2).map_or(1.0, |f| f[i]);
                        let angle = x[1][row / 2] * 5e5f64.powf(-(i as f64) / 3.0) / factor;
                        let (a, b) = if style == RopeStyle::Halves { (i, i + 3) } else { (2 * i, 2 * i + 1) };
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

#[test]
fn last_row() {
    let mut spec = primitive(Primitive::LastRow, vec![f32s([T, n(3), n(5)])], f32s([n(1), n(3), n(5)]));
    spec.grid = vec![];
    check(&spec, &[], |x, at| x[0][(at.t as usize - 1) * 15..].to_vec());
}

fn append(cache: DType) -> KernelSpec {
    let args = vec![
        arg(Access::Update, cache, [Dim::S, n(2), n(133)]),
        arg(Access::Read, DType::F32, [T, n(2), n(133)]),
    ];
    spec(Template::Primitive(Primitive::KvAppend), args, vec![Extent::each(T)])
}

#[test]
fn kv_append_writes_its_rows_alone() {
    for (cache, tolerance) in [(DType::F32, 0.0), (DType::F16, 1e-3)] {
        let (spec, at) = (append(cache), syms(3, 4, 9));
        let inputs = inputs(&spec, &at);
        let mut want = operand(&spec, &inputs, 0);
        want[4 * 266..7 * 266].copy_from_slice(&operand(&spec, &inputs, 1));
        let have = values(cache, &launch_all(&spec, &at, &inputs, 0));
        assert_close(&have.iter().map(|x| *x as f32).collect::<Vec<_>>(), &want, tolerance);
    }
}

#[test]
fn attention_in_pieces() {
    let scores = primitive(
        Primitive::Scores { scale: 0.3 },
        vec![f32s([T, n(6), n(13)]), f32s([P_T, n(2), n(13)])],
        f32s([n(6), T, P_T]),
    );
    check(&scores, &[], |x, at| {
        let (t, l) = (at.t as usize, (at.p + at.t) as usize);
        let one = |h: usize, t: usize, l: usize| {
            (0..13).map(|i| x[0][(t * 6 + h) * 13 + i] * x[1][(l * 2 + h / 3) * 13 + i]).sum::<f64>()
                * f64::from(0.3f32)
        };
        (0..6 * t * l).map(|i| one(i / l / t, i / l % t, i % l)).collect()
    });
    let sums = primitive(
        Primitive::WeightedSum,
        vec![f32s([n(6), T, P_T]), f32s([P_T, n(2), n(300)])],
        f32s([T, n(6), n(300)]),
    );
    check(&sums, &[], |x, at| {
        let (t, len) = (at.t as usize, (at.p + at.t) as usize);
        let one = |tt: usize, h: usize, i: usize| {
            (0..len).map(|l| x[0][(h * t + tt) * len + l] * x[1][(l * 2 + h / 3) * 300 + i]).sum()
        };
        (0..t * 6 * 300).map(|i| one(i / 1800, i / 300 % 6, i % 300)).collect()
    });
    let square = || f32s([n(2), T, P_T]);
    let softmax = primitive(Primitive::Softmax, vec![square()], square());
    check(&softmax, &[0], |x, at| {
        let rows = x[0].chunks((at.p + at.t) as usize);
        rows.flat_map(|row| {
            let total: f64 = row.iter().map(|x| x.exp()).sum();
            row.iter().map(move |x| x.exp() / total)
        })
        .collect()
    });
}

#[test]
fn the_mask_hides_what_lies_ahead_and_softmax_takes_it() {
    let square = || f32s([n(2), T, P_T]);
    let mask = primitive(Primitive::CausalMask, vec![square()], square());
    let softmax = primitive(Primitive::Softmax, vec![square()], square());
    let at = syms(3, 2, 9);
    let inputs = inputs(&mask, &at);
    for features in Features::available() {
        let masked = launch(&mask, &features, &at, &inputs, None).swap_remove(1);
        let shares = launch(&softmax, &features, &at, &[Some(masked.clone()), None], None).swap_remove(1);
        let rows = to_f32s(inputs[0].as_ref().unwrap());
        for (i, (y, share)) in to_f32s(&masked).iter().zip(to_f32s(&shares)).enumerate() {
            let seen = i % 5 <= 2 + i / 5 % 3;
            assert_eq!(*y, if seen { rows[i] } else { f32::NEG_INFINITY });
            assert_eq!(share > 0.0, seen);
        }
    }
}

#[test]
fn argmax_takes_the_first_of_equals_and_tells_of_nan() {
    let mut spec = primitive(Primitive::ArgMax, vec![f32s([T, n(300)])], ty(DType::I32, [T]));
    spec.grid = vec![Extent::each(T)];
    let mut x = vec![0f32; 4 * 300];
    (x[270], x[290]) = (5.0, 5.0);
    x[300..600].fill(f32::NAN);
    x[600 + 3] = f32::NAN;
    x[600 + 299] = 1e-3;
    x[900..].fill(f32::NEG_INFINITY);
    let inputs = [Some(f32_bytes(&x)), None];
    assert_eq!(to_i32s(&launch_all(&spec, &syms(4, 0, 9), &inputs, 1)), [270, -1, -1, 0]);
}

#[test]
fn refuses_what_does_not_fit() {
    let refuse = |name: &str, spec: KernelSpec, change: &dyn Fn(&mut KernelSpec)| {
        let mut spec = spec;
        bind(&spec, &Features::baseline()).map(|_| ()).unwrap();
        change(&mut spec);
        assert!(bind(&spec, &Features::baseline()).is_err(), "{name}");
    };
    let row = || f32s([T, n(64)]);
    let add = || primitive(Primitive::Add, vec![row(), row()], row());
    refuse("operands", add(), &|s| s.args[1].ty.shape[1] = n(32));
    refuse("result", add(), &|s| s.args[2].ty.shape[0] = n(1));
    refuse("type of the result", add(), &|s| s.args[2].ty.dtype = DType::F16);
    refuse("result read", add(), &|s| s.args[2].access = Access::Read);
    refuse("operand written", add(), &|s| s.args[0].access = Access::Write);
    refuse("too few", add(), &|s| drop(s.args.remove(0)));
    refuse("none", add(), &|s| s.args.clear());
    refuse("grid", add(), &|s| s.grid = vec![Extent { dim: T, per: 2 }]);
    refuse("zero per item", add(), &|s| s.grid = vec![Extent { dim: T, per: 0 }]);
    let per_row = primitive(Primitive::Mul, vec![row(), f32s([n(64)])], row());
    refuse("in place of a row", per_row, &|s| s.may_alias.push(Alias { write: 2, read: 1 }));
    let quant = primitive(Primitive::QuantAct, vec![row()], ty(DType::Q8Act, [T, n(64)]));
    refuse("quantising in place", quant, &|s| s.may_alias.push(Alias { write: 1, read: 0 }));
    let rows = vec![ty(DType::Q4_K, [9u64, 256]), ty(DType::I32, [T])];
    let get = || primitive(Primitive::GetRows, rows.clone(), ty(DType::Q4_K, [T, n(256)]));
    refuse("ids", get(), &|s| s.args[1].ty.dtype = DType::F32);
    refuse("empty table", get(), &|s| s.args[0].ty.shape[0] = n(0));
    refuse("open table", get(), &|s| s.args[0].ty.shape[0] = Dim::S);
    refuse("broken blocks", get(), &|s| {
        s.args[0].ty.shape[1] = n(255);
        s.args[2].ty.shape[1] = n(255);
    });
    let norm = || primitive(Primitive::RmsNorm { eps: 1e-5 }, vec![row(), f32s([n(64)])], row());
    refuse("eps", norm(), &|s| s.template = Template::Primitive(Primitive::RmsNorm { eps: -1.0 }));
    refuse("weight", norm(), &|s| s.args[1].ty.shape[0] = n(32));
    let rope = Rope { base: 1e4, dims: 8, style: RopeStyle::Halves };
    let heads = |d| f32s([T, n(2), n(d)]);
    let rotate = primitive(Primitive::Rope(rope), vec![heads(16), ty(DType::I32, [T])], heads(16));
    refuse("wide heads", rotate.clone(), &|s| {
        s.args[0].ty.shape[2] = n(4096);
        s.args[2].ty.shape[2] = n(4096);
    });
    refuse("base", rotate, &|s| {
        s.template = Template::Primitive(Primitive::Rope(Rope { base: f32::NAN, ..rope }));
    });
    refuse("cache", append(DType::F16), &|s| s.args[0].ty.shape[1] = n(3));
    refuse("cache of few rows", append(DType::F16), &|s| s.args[0].ty.shape[0] = T);
    refuse("cache read", append(DType::F16), &|s| s.args[0].access = Access::Read);
    refuse("no rows", append(DType::F16), &|s| drop(s.args.remove(1)));
    refuse("rows and more", append(DType::F16), &|s| s.args.push(s.args[1].clone()));
}
