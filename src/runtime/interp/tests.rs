use super::*;
use crate::ir::arbitrary::{BOUNDS, Rng, random_bytes, random_graph};
use proptest::prelude::*;

/// The results of a graph without weights and states.
fn results(text: &str, syms: Syms, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let graph = Graph::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    eval(&graph, &syms, inputs, &|name| panic!("no weight {name}"), IndexMap::new())
}

/// The f32 result of one operation over inputs `%a`, `%b`, `%c` of these types, at T=2, P=1.
fn value(statement: &str, inputs: &[(&str, Tensor)]) -> Vec<f32> {
    let params: Vec<_> =
        inputs.iter().zip(["%a", "%b", "%c"]).map(|((t, _), n)| format!("{n}: {t}")).collect();
    let text =
        format!("graph @g({}) sym T<=2, P<=1, S<=4 {{ %y = {statement} return %y }}", params.join(", "));
    let inputs: Vec<_> = inputs.iter().map(|(_, x)| x.clone()).collect();
    results(&text, Syms { t: 2, p: 1, s: 4 }, &inputs).unwrap()[0].to_f32().unwrap()
}

fn f32s(dims: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_f32(dims, values).unwrap()
}

fn i32s(values: &[i32]) -> Tensor {
    Tensor::from_i32(&[values.len()], values).unwrap()
}

#[track_caller]
fn close(a: &[f32], b: &[f32]) {
    assert!(
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || (a - b).abs() < 1e-6),
        "{a:?}\n{b:?}"
    );
}

#[test]
fn elementwise() {
    let x = || ("f32[T,3]", f32s(&[2, 3], &[1.0, 2.0, 3.0, -4.0, 0.0, 6.0]));
    let row = || ("f32[3]", f32s(&[3], &[10.0, 20.0, 0.5]));
    close(&value("add %a, %b : f32[T,3]", &[x(), x()]), &[2.0, 4.0, 6.0, -8.0, 0.0, 12.0]);
    close(&value("add %a, %b : f32[T,3]", &[x(), row()]), &[11.0, 22.0, 3.5, 6.0, 20.0, 6.5]);
    close(&value("mul %a, %b : f32[T,3]", &[x(), x()]), &[1.0, 4.0, 9.0, 16.0, 0.0, 36.0]);
    close(&value("mul %a, %b : f32[T,3]", &[x(), row()]), &[10.0, 40.0, 1.5, -40.0, 0.0, 3.0]);
    let e = std::f32::consts::E;
    let silu = |x: f32| x / (1.0 + e.powf(-x));
    close(&value("silu %a : f32[T,3]", &[x()]), &[1.0, 2.0, 3.0, -4.0, 0.0, 6.0].map(silu));
    close(&value("const 0.25 : f32[2,2]", &[]), &[0.25; 4]);
}

#[test]
fn rows_and_shapes() {
    let table = || ("f32[3,2]", f32s(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    let ids = |ids: &[i32]| ("i32[T]", i32s(ids));
    close(&value("get_rows %a, %b : f32[T,2]", &[table(), ids(&[2, 0])]), &[5.0, 6.0, 1.0, 2.0]);
    let x = || ("f32[T,2,2]", f32s(&[2, 2, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]));
    close(&value("last_row %a : f32[1,2,2]", &[x()]), &[4.0, 5.0, 6.0, 7.0]);
    close(&value("reshape %a : f32[T,4]", &[x()]), &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
}

#[test]
fn ids_beyond_the_table_are_refused() {
    for bad in [-1, 3, i32::MIN, i32::MAX] {
        let text = "graph @g(%a: f32[3,2], %b: i32[T]) { %y = get_rows %a, %b : f32[T,2] return %y }";
        let inputs = [f32s(&[3, 2], &[0.0; 6]), i32s(&[bad])];
        let e = results(text, Syms { t: 1, p: 0, s: 1 }, &inputs).unwrap_err();
        assert_eq!(e.to_string(), format!("id {bad} is not within the 3 rows of the table"));
    }
}

#[test]
fn matmul_takes_rows_of_both() {
    let x = ("f32[T,3]", f32s(&[2, 3], &[1.0, 2.0, 3.0, 0.0, 1.0, 0.0]));
    let w = ("f32[2,3]", f32s(&[2, 3], &[1.0, 1.0, 1.0, 0.0, -1.0, 2.0]));
    close(&value("matmul %a, %b : f32[T,2]", &[x, w]), &[6.0, 4.0, 1.0, -1.0]);
}

#[test]
fn norms_and_softmax() {
    let x = ("f32[T,2]", f32s(&[2, 2], &[3.0, 4.0, 0.0, 0.0]));
    let w = ("f32[2]", f32s(&[2], &[1.0, 2.0]));
    // mean of squares 12.5, plus 12.5
    close(&value("rms_norm %a, %b {eps=12.5} : f32[T,2]", &[x, w]), &[0.6, 1.6, 0.0, 0.0]);
    let x = ("f32[T,2]", f32s(&[2, 2], &[0.0, 3f32.ln(), 1000.0, f32::NEG_INFINITY]));
    close(&value("softmax %a : f32[T,2]", &[x]), &[0.25, 0.75, 1.0, 0.0]);
}

#[test]
fn rope_turns_pairs() {
    // Two tokens of one head of 6, of which 4 turn; base 100: frequencies 1 and 0.1.
    let x =
        || ("f32[T,1,6]", f32s(&[2, 1, 6], &[1.0, 0.0, 0.0, 1.0, 7.0, 8.0, 1.0, 0.0, 0.0, 1.0, 7.0, 8.0]));
    let pos = || ("i32[T]", i32s(&[0, 3]));
    let (s, c) = 3f32.sin_cos();
    let (s2, c2) = 0.3f32.sin_cos();
    let still = [1.0, 0.0, 0.0, 1.0, 7.0, 8.0];
    let y = value("rope %a, %b {base=100, dims=4, style=interleaved} : f32[T,1,6]", &[x(), pos()]);
    close(&y[..6], &still);
    close(&y[6..], &[c, s, -s2, c2, 7.0, 8.0]);
    // Pairs (0,2) and (1,3).
    let y = value("rope %a, %b {base=100, dims=4, style=halves} : f32[T,1,6]", &[x(), pos()]);
    close(&y[6..], &[c, -s2, s, c2, 7.0, 8.0]);
    // A factor divides the angle.
    let factors = ("f32[2]", f32s(&[2], &[1.0, 0.1]));
    let y =
        value("rope %a, %b, %c {base=100, dims=4, style=interleaved} : f32[T,1,6]", &[x(), pos(), factors]);
    close(&y[6..], &[c, s, -s, c, 7.0, 8.0]);
}

#[test]
fn attention_by_parts() {
    // Two tokens, two heads of 2 that share one cache head of three rows.
    let q = ("f32[T,2,2]", f32s(&[2, 2, 2], &[1.0, 0.0, 0.0, 1.0, 2.0, 2.0, -1.0, 0.0]));
    let k = ("f32[P+T,1,2]", f32s(&[3, 1, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    let s = [0.5, 1.5, 2.5, 3.0, 7.0, 11.0, 1.0, 2.0, 3.0, -0.5, -1.5, -2.5];
    close(&value("scores %a, %b {scale=0.5} : f32[2,T,P+T]", &[q, k.clone()]), &s);
    // One token was cached: the first of the two new ones does not see the second.
    let n = f32::NEG_INFINITY;
    let masked = [0.5, 1.5, n, 3.0, 7.0, 11.0, 1.0, 2.0, n, -0.5, -1.5, -2.5];
    close(&value("causal_mask %a : f32[2,T,P+T]", &[("f32[2,T,P+T]", f32s(&[2, 2, 3], &s))]), &masked);
    let p = [1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 1.0, 0.25, 0.25, 0.5];
    let p = ("f32[2,T,P+T]", f32s(&[2, 2, 3], &p));
    let y = [1.0, 2.0, 5.0, 6.0, 4.0, 5.0, 3.5, 4.5];
    close(&value("weighted_sum %a, %b : f32[T,2,2]", &[p, k]), &y);
}

#[test]
fn heads_share_cache_heads_in_groups() {
    let q = ("f32[1,4,1]", f32s(&[1, 4, 1], &[1.0; 4]));
    let k = ("f32[1,2,1]", f32s(&[1, 2, 1], &[10.0, 20.0]));
    close(&value("scores %a, %b {scale=1} : f32[4,1,1]", &[q, k.clone()]), &[10.0, 10.0, 20.0, 20.0]);
    let p = ("f32[4,1,1]", f32s(&[4, 1, 1], &[1.0; 4]));
    close(&value("weighted_sum %a, %b : f32[1,4,1]", &[p, k]), &[10.0, 10.0, 20.0, 20.0]);
}

#[test]
fn argmax_takes_the_first_of_equals_and_tells_of_nan() {
    let text = "graph @g(%a: f32[T,4]) sym T<=3 { %y = argmax %a : i32[T] return %y }";
    let x = f32s(&[3, 4], &[1.0, 5.0, 5.0, 2.0, f32::NAN, -3.0, -2.0, f32::NAN, 3.0, 0.0, 1.0, 9.0]);
    let y = results(text, Syms { t: 3, p: 0, s: 3 }, &[x]).unwrap();
    assert_eq!(y[0].to_i32().unwrap(), [1, -1, 3]);
}

#[test]
fn quantised_activations_round_trip() {
    let mut x = [0.0; 32];
    (x[0], x[1], x[31]) = (127.0, -64.4, 0.6);
    let text = "graph @g(%a: f32[T,32]) { %q = quant_act %a : q8_act[T,32] %y = dequant %q : f32[T,32] return %q, %y }";
    let y = results(text, Syms { t: 1, p: 0, s: 1 }, &[f32s(&[1, 32], &x)]).unwrap();
    (x[1], x[31]) = (-64.0, 1.0);
    assert_eq!(y[1].to_f32().unwrap(), x);
    assert_eq!((y[0].bytes().len(), y[0].bytes()[8] as i8, y[0].bytes()[9] as i8), (40, 127, -64));
}

const CACHE: &str = "graph @g(%x: f32[T,1,2]) sym T<=2, P<=4, S<=4 {
    %k = state \"k\" : f16[S,1,2]
    %k1 = kv_append %k, %x : f16[S,1,2]
    %r = kv_read %k1 : f16[P+T,1,2]
    return %r, %k1
}";

fn cached(syms: Syms, x: &[f32], k: Tensor) -> Result<Vec<Tensor>> {
    let graph = Graph::parse(CACHE).unwrap();
    let x = f32s(&[x.len() / 2, 1, 2], x);
    eval(&graph, &syms, &[x], &|_| unreachable!(), IndexMap::from([("k".to_owned(), k)]))
}

#[test]
fn caches_are_appended_and_read() {
    let ty = TensorType::new(DType::F16, [4u64, 1, 2]);
    let syms = Syms { t: 2, p: 0, s: 4 };
    let zeros = Tensor::zeros(&ty, &syms).unwrap();
    let mut y = cached(syms, &[1.0, 2.0, 3.0, 4.0], zeros.clone()).unwrap();
    assert_eq!((y[0].dims(), y[0].to_f32().unwrap()), (&[2, 1, 2][..], vec![1.0, 2.0, 3.0, 4.0]));
    let k1 = y.pop().unwrap();
    // 2049 lies between the halves 2048 and 2050, and 2051 between 2050 and 2052: to the even mantissa.
    let y = cached(Syms { t: 1, p: 2, s: 4 }, &[2049.0, 2051.0], k1).unwrap();
    assert_eq!(y[0].to_f32().unwrap(), [1.0, 2.0, 3.0, 4.0, 2048.0, 2052.0]);
    assert_eq!(y[1].to_f32().unwrap(), [1.0, 2.0, 3.0, 4.0, 2048.0, 2052.0, 0.0, 0.0]);
    for (t, p) in [(1, 4), (2, 3), (0, 0), (1, u64::MAX), (1, 5)] {
        let x = vec![0.0; 2 * t as usize];
        assert!(matches!(cached(Syms { t, p, s: 4 }, &x, zeros.clone()), Err(InterpError::Step(_))));
    }
}

#[test]
fn what_is_missing_or_of_another_type_is_named() {
    let syms = Syms { t: 1, p: 0, s: 1 };
    let message = |text: &str, inputs: &[Tensor]| {
        let graph = Graph::parse(text).unwrap();
        let weights = |name: &str| match name {
            "w" => Tensor::from_f32(&[2], &[1.0, 2.0]),
            _ => Err(InterpError::Weight { name: name.into(), why: "no such tensor".into() }),
        };
        eval(&graph, &syms, inputs, &weights, IndexMap::new()).unwrap_err().to_string()
    };
    let x = || f32s(&[2], &[1.0, 2.0]);
    assert_eq!(message("graph @g(%x: f32[2]) { return %x }", &[]), "the graph \"g\" takes 1 inputs, not 0");
    assert_eq!(
        message("graph @g(%x: f32[3]) { return %x }", &[x()]),
        "input \"x\" must be f32[3], not f32[2]"
    );
    assert_eq!(
        message("graph @g() { %w = weight \"w\" : f16[2] return %w }", &[]),
        "weight \"w\" must be f16[2], not f32[2]"
    );
    assert_eq!(
        message("graph @g() { %w = weight \"v\" : f16[2] return %w }", &[]),
        "weight \"v\" cannot be read: no such tensor"
    );
    assert_eq!(
        message("graph @g() { %w = state \"k\" : f16[S,2] return %w }", &[]),
        "state \"k\" is not given"
    );
    assert!(message("graph @g() { %c = const 0x7f800000 : f32[2] return %c }", &[]).contains("rule 5"));
    let huge = message("graph @g() { %c = const 1 : f32[16777216,4194303] return %c }", &[]);
    assert!(huge.ends_with("is too large for the memory"), "{huge}");
}

#[test]
fn tensors_hold_what_their_type_says() {
    let length = |dtype, dims: &[usize], bytes| Tensor::new(dtype, dims.to_vec(), vec![0; bytes]).is_ok();
    assert!(length(DType::Q8_0, &[2, 32], 68) && length(DType::F16, &[], 2));
    assert!(!length(DType::F32, &[2], 7) && !length(DType::Q8_0, &[32, 2], 68));
    assert!(!length(DType::F32, &[usize::MAX, usize::MAX], 4) && !length(DType::F32, &[usize::MAX], 0));
    assert!(i32s(&[1]).to_f32().is_err() && f32s(&[1], &[1.0]).to_i32().is_err());
}

#[test]
fn nodes_check_their_operands() {
    let g = Graph::parse("graph @g(%x: f32[2]) { %y = silu %x : f32[2] return %y }").unwrap();
    let (y, syms) = (g.results()[0].node, Syms { t: 1, p: 0, s: 1 });
    let message = |xs: &[&Tensor]| eval_node(&g, y, xs, &syms).unwrap_err().to_string();
    assert_eq!(message(&[]), "the graph \"silu\" takes 1 inputs, not 0");
    assert_eq!(message(&[&i32s(&[1, 2])]), "operand 0 of silu must be f32[2], not i32[2]");
    assert_eq!(eval_node(&g, y, &[&f32s(&[2], &[0.0, 0.0])], &syms).unwrap(), [f32s(&[2], &[0.0, 0.0])]);
    let e = eval_node(&g, g.ret(), &[&f32s(&[2], &[0.0, 0.0])], &syms).unwrap_err().to_string();
    assert_eq!(e, "return cannot be evaluated by itself");
}

/// The results of a random graph on tensors that depend on their names alone.
fn evaluate(graph: &Graph, syms: &Syms) -> Vec<Tensor> {
    let tensor = |name: &str, ty: &TensorType| {
        let seed = name.bytes().fold(7u64, |h, b| h.wrapping_mul(31) + u64::from(b));
        Tensor::new(ty.dtype, dims(ty, syms), random_bytes(ty, syms, seed)).unwrap()
    };
    let (mut inputs, mut states, mut weights) = (vec![], IndexMap::new(), IndexMap::new());
    for &id in graph.inputs() {
        let Op::Input { name } = graph.op(id) else { panic!("an input") };
        inputs.push(tensor(name, graph.ty(id.into())));
    }
    for id in graph.ids() {
        match graph.op(id) {
            Op::State { name } => drop(states.insert(name.clone(), tensor(name, graph.ty(id.into())))),
            Op::Weight { name } => drop(weights.insert(name.clone(), tensor(name, graph.ty(id.into())))),
            _ => {}
        }
    }
    eval(graph, syms, &inputs, &|name| Ok(weights[name].clone()), states).unwrap()
}

/// The same graph with every fused node replaced by its body.
fn unfused(graph: &Graph) -> Graph {
    let mut g = Graph::new(graph.name.clone(), graph.bounds);
    let mut new = HashMap::<Value, Value>::new();
    for id in graph.inputs().iter().copied().chain(graph.order()) {
        let operands: Vec<Value> = graph.operands(id).iter().filter_map(|v| new.get(v).copied()).collect();
        match graph.op(id) {
            Op::Input { .. } if new.contains_key(&id.into()) => {}
            Op::Return => g.set_return(&operands),
            Op::Fused(f) => {
                let body = &f.body;
                let mut inner: HashMap<Value, Value> =
                    body.inputs().iter().map(|&i| i.into()).zip(operands).collect();
                for id in body.order() {
                    if !matches!(body.op(id), Op::Input { .. } | Op::Return) {
                        let xs: Vec<Value> = body.operands(id).iter().map(|v| inner[v]).collect();
                        let node = g.add_typed(body.op(id).clone(), &xs, &body.node(id).outs).unwrap();
                        inner.insert(id.into(), node.into());
                    }
                }
                for (out, v) in (0..).zip(body.results()) {
                    new.insert(Value { node: id, out }, inner[&v]);
                }
            }
            op => {
                let node = g.add_typed(op.clone(), &operands, &graph.node(id).outs).unwrap();
                new.insert(id.into(), node.into());
            }
        }
    }
    g
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn text_and_fusing_change_no_bit(seed: u64, size in 1usize..60) {
        let graph = random_graph(seed, size);
        let mut rng = Rng::new(seed);
        let t = 1 + rng.below(BOUNDS.t);
        let syms = Syms { t, p: rng.below(BOUNDS.p + 1), s: BOUNDS.s };
        let expected = evaluate(&graph, &syms);
        let types: Vec<_> = graph.results().iter().map(|v| dims(graph.ty(*v), &syms)).collect();
        prop_assert_eq!(expected.iter().map(|x| x.dims().to_vec()).collect::<Vec<_>>(), types);
        let logits = expected[0].to_f32().unwrap();
        prop_assert!(logits.iter().all(|x| x.is_finite()));
        let printed = Graph::parse(&graph.to_string()).unwrap();
        prop_assert_eq!(&evaluate(&printed, &syms), &expected);
        prop_assert_eq!(&evaluate(&unfused(&graph), &syms), &expected);
    }
}
