use crate::ir::arbitrary::{Rng, random_graph};
use crate::ir::{DType, Graph, Op, Slice, StateRole, Syms, TensorType, verify_unfinished};
use proptest::prelude::*;

const EXAMPLE: &str = r#"graph @decode(%tokens: i32[T], %positions: i32[T], %sequences: i32[T], %rows: i32[T], %tables: i32[2,4], %lengths: i32[2], %wanted: i32[R]) sym T<=4, R<=2 {
  %w0 = weight "token_embd.weight" : q6_k[4096,512]
  %0 = get_rows %w0, %tokens : q6_k[T,512]
  %1 = dequant %0 : f32[T,512]
  %c0 = const 0.5 : f32[512]
  %2 = rms_norm %1, %c0 {eps=0.00001} : f32[T,512]
  %3, %4 = fused add_rmsnorm(%x0 = %1, %x1 = %2, %x2 = %c0) : f32[T,512], q8_act[T,512] {
    %0 = add %x0, %x1 : f32[T,512]
    %1 = rms_norm %0, %x2 {eps=1e-9} : f32[T,512]
    %2 = quant_act %1 : q8_act[T,512]
    return %0, %2
  }
  %5 = get_rows %3, %wanted : f32[R,512]
  %6 = dequant %4 : f32[T,512]
  %w1 = weight "blk.0.attn_k.weight" : f32[256,512]
  %7 = matmul %6, %w1 : f32[T,256]
  %8 = reshape %7 : f32[T,4,64]
  %9 = rope %8, %positions {base=10000, dims=64, style=interleaved} : f32[T,4,64]
  %s0 = state "blk.0.k" : f16[256,4,64] appended
  %10 = kv_append %s0, %9, %rows : f16[256,4,64]
  %11 = kv_read %10, %tables, %lengths {page=32} : f16[2,128,4,64]
  %12 = dequant %11 : f32[2,128,4,64]
  %13 = scores %9, %12, %sequences {scale=0.125} : f32[4,T,128]
  %14 = causal_mask %13, %positions {window=100} : f32[4,T,128]
  %15 = causal_mask %13, %positions : f32[4,T,128]
  %16 = weighted_sum %15, %12, %sequences : f32[T,4,64]
  %s1 = state "blk.1.h" : f32[2,256] replaced
  %17, %18 = fused gated_scan(%h = %s1, %x = %7, %s = %sequences, %p = %positions) : f32[T,256], f32[2,256] {
    %0 = silu %x : f32[T,256]
    %1 = mul %0, %x : f32[T,256]
    %2, %3 = gated_scan %h, %x, %1, %s, %p : f32[T,256], f32[2,256]
    return %2, %3
  }
  return %5, %14, %16, %17, %10, %18
}"#;

fn parsed(text: &str) -> Graph {
    Graph::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn message(text: &str) -> String {
    Graph::parse(text).expect_err(text).to_string()
}

/// The message for one statement in a small graph; the statement is line 2 from column 1.
fn message_at(statement: &str) -> String {
    message(&format!("graph @g(%x: f32[T,4], %n: i32[T]) {{\n{statement}\nreturn %x }}"))
}

#[test]
fn the_example_reads_and_prints_as_it_is() {
    assert_eq!(parsed(EXAMPLE).to_string(), EXAMPLE);
    verify_unfinished(&parsed(EXAMPLE)).unwrap();
}

#[test]
fn inputs_of_a_body_have_the_roles_of_what_they_stand_for() {
    let g = parsed(EXAMPLE);
    let roles = |kernel: &str| -> Vec<Option<StateRole>> {
        let fused = g.ids().into_iter().find_map(|id| match g.op(id) {
            Op::Fused(fused) if fused.kernel.name() == kernel => Some(&fused.body),
            _ => None,
        });
        let body = fused.unwrap();
        let role = |&id: &_| match body.op(id) {
            Op::Input { role, .. } => *role,
            other => panic!("{other:?}"),
        };
        body.inputs().iter().map(role).collect()
    };
    assert_eq!(roles("add_rmsnorm"), [None; 3]);
    assert_eq!(roles("gated_scan"), [Some(StateRole::Replaced), None, None, None]);
}

#[test]
fn space_comments_and_names_are_free() {
    let text = "// head\n graph@\"a\"( %x:f32[ 1+T+T ] # T twice\n)sym R<=1,T<=2{%some-name.1=silu %x:f32[T+1+T]return %some-name.1}//";
    let printed = "graph @a(%x: f32[T+T+1]) sym T<=2, R<=1 {\n  %0 = silu %x : f32[T+T+1]\n  return %0\n}";
    assert_eq!(parsed(text).to_string(), printed);
}

#[test]
fn zeros_keep_their_sign() {
    for zero in ["0", "-0"] {
        let text = format!("graph @g() sym T<=1, R<=1 {{\n  %c0 = const {zero} : f32[4]\n  return %c0\n}}");
        let g = parsed(&text);
        assert_eq!(g.to_string(), text);
        let Op::Const { value } = *g.op(g.results()[0].node) else { panic!("{g}") };
        assert_eq!(value.is_sign_negative(), zero == "-0");
    }
}

#[test]
fn symbols_have_default_bounds() {
    let bounds = |sym| parsed(&format!("graph @g() {sym} {{ return }}")).bounds;
    assert_eq!(bounds(""), Syms { t: 1, r: 1 });
    // All rows are wanted, unless fewer are.
    assert_eq!(bounds("sym T<=7"), Syms { t: 7, r: 7 });
    assert_eq!(bounds("sym R<=0"), Syms { t: 1, r: 0 });
    assert_eq!(bounds("sym T<=18446744073709551615, R<=2"), Syms { t: u64::MAX, r: 2 });
}

#[test]
fn names_of_any_kind_survive() {
    let names = ["0", "w0", "s1", "c0", "", "a b", "é\"\\\n\u{202e}'", "%x", "1", "-"];
    let mut g = Graph::new("a \"graph\"", Syms { t: 1, r: 1 });
    let mut results = vec![];
    for name in names {
        let x = g.leaf(Op::input(name), TensorType::new(DType::F32, [4u64])).unwrap();
        let w = g.leaf(Op::weight(name), TensorType::new(DType::F32, [4u64])).unwrap();
        results.push(g.add(Op::Add, &[x, w]).unwrap().into());
    }
    g.set_return(&results);
    let text = g.to_string();
    let read = parsed(&text);
    assert_eq!(read.to_string(), text);
    assert_eq!(read.name, g.name);
    let inputs: Vec<&Op> = read.inputs().iter().map(|&id| read.op(id)).collect();
    assert_eq!(inputs, names.map(Op::input).iter().collect::<Vec<_>>());
    let weights: Vec<&Op> =
        read.order().into_iter().map(|id| read.op(id)).filter(|o| o.name() == "weight").collect();
    assert_eq!(weights, names.map(Op::weight).iter().collect::<Vec<_>>());
}

#[test]
fn rows_of_a_tensor_are_a_weight() {
    let text = "graph @g() sym T<=1, R<=1 {\n  %w0 = weight \"w\" from 3 of 9 : f16[4,8]\n  \
                %w1 = weight \"w\" from 0 of 9 : f16[3,8]\n  return %w0, %w1\n}";
    let graph = parsed(text);
    assert_eq!(graph.to_string(), text);
    let slices: Vec<_> = graph.order().into_iter().map(|id| graph.op(id).clone()).collect();
    assert_eq!(slices[0], Op::Weight { name: "w".into(), rows: Some(Slice { first: 3, of: 9 }) });
    for (from, to, says) in [
        ("3 of 9", "6 of 9", "f16[4,8] from row 6 on is more than 9 rows"),
        ("3 of 9", "18446744073709551615 of 9", "is more than 9 rows"),
        ("3 of 9 : f16[4,8]", "0 of 64 : q8_0[32]", "single elements of q8_0 are no whole blocks"),
        ("3 of 9 : f16[4,8]", "0 of 4 : f16[]", "is more than 4 rows"),
        ("3 of 9", "3 in 9", "expected `of`"),
        ("3 of 9", "3 of", "expected an integer"),
        ("3 of 9", "of 9", "expected an integer"),
    ] {
        let error = Graph::parse(&text.replacen(from, to, 1)).expect_err(to).to_string();
        assert!(error.contains(says), "{to}: {error}");
    }
}

#[test]
fn unused_nodes_are_printed_too() {
    let text = "graph @g(%x: f32[4]) sym T<=1, R<=1 {\n  %0 = silu %x : f32[4]\n  %1 = softmax %x : f32[4]\n  return\n}";
    assert_eq!(parsed(text).to_string(), text);
}

#[test]
fn a_long_chain_overflows_no_stack() {
    let mut text = String::from("graph @g(%x: f32[4]) {\n%0 = silu %x : f32[4]\n");
    for i in 0..50_000 {
        text += &format!("%{} = silu %{i} : f32[4]\n", i + 1);
    }
    text += "return %50000 }";
    let g = parsed(&text);
    verify_unfinished(&g).unwrap();
    assert!(!g.is_cyclic());
    assert_eq!(parsed(&g.to_string()).len(), g.len());
}

#[test]
fn a_node_of_many_operands_is_described() {
    const MANY: usize = 1000;
    let mut text = String::from("graph @g(%x: f32[4]) {\n%0 = silu %x : f32[4]\n");
    for i in 0..4 {
        let operands: Vec<String> = (0..MANY).map(|n| format!("%p{n} = %{i}")).collect();
        let operands = operands.join(", ");
        let next = i + 1;
        text +=
            &format!("%{next} = fused merge({operands}) : f32[4] {{ %y = silu %p0 : f32[4] return %y }}\n");
    }
    let g = parsed(&(text + "return %4 }"));
    // Four levels of so many, each counted as often as there are ways to it, would be 10^12 nodes.
    assert_eq!(g.describe(g.results()[0].node), "merge");
}

#[test]
fn mistakes_are_named_with_their_place() {
    for (statement, expected) in [
        ("%0 = matmull %x, %x : f32[T,4]", r#"2:6: unknown operation "matmull""#),
        ("%0 = silu %y : f32[T,4]", "2:11: unknown value %y"),
        ("%x = silu %x : f32[T,4]", "2:1: %x is defined twice"),
        ("%0, %0 = silu %x : f32[T,4]", "2:1: 2 values need as many types, not 1"),
        ("%0 = silu %x", "3:1: expected `:`, found `return`"),
        ("%0 = silu %x : f33[T,4]", r#"2:16: unknown element type "f33""#),
        ("%0 = silu %x : f32[T,5]", "2:6: silu: declared f32[T,5], but its operands give f32[T,4]"),
        ("%0 = silu : f32[T,4]", "2:6: silu: takes 1 operands, not 0"),
        ("%0 = silu %x {eps=1} : f32[T,4]", "2:15: silu has no attribute eps"),
        ("%0 = rms_norm %x, %x : f32[T,4]", "2:6: rms_norm needs the attribute eps"),
        ("%0 = matmul %x, %x {round=q8_act} : f32[T,4]", "2:27: `q8_act` is no rounding: f16 or bf16"),
        ("%0 = rms_norm %x, %x {eps=x} : f32[4]", "2:27: `x` is no 32-bit float"),
        ("%0 = rms_norm %x, %x {eps=1e99} : f32[4]", "2:27: `1e99` is no 32-bit float"),
        ("%0 = rms_norm %x {eps=1, eps=2} : f32[4]", "2:26: attribute eps is given twice"),
        (
            "%0 = rope %x, %n {base=1, dims=2, style=odd} : f32[4]",
            "2:41: `odd` is no style: interleaved or neox",
        ),
        ("%0 = rope %x, %n {base=1, dims=2.5, style=neox} : f32[4]", "2:32: 2.5 is no 32-bit integer"),
        ("%0 = kv_read %x : f32[T,4]", "2:6: kv_read needs the attribute page"),
        ("%0 = kv_read %x {page=-1} : f32[T,4]", "2:23: -1 is no 32-bit integer"),
        ("%0 = causal_mask %x {window=wide} : f32[T,4]", "2:29: `wide` is no integer"),
        ("%0 = causal_mask %x, %n {scale=1} : f32[T,4]", "2:26: causal_mask has no attribute scale"),
        ("%0 = causal_mask %x : f32[T,4]", "2:6: causal_mask: takes 2 operands, not 1"),
        ("%0 = state \"k\" : f32[4]", "3:1: expected `appended` or `replaced`"),
        ("%0 = state \"k\" : f32[4] kept", "2:25: expected `appended` or `replaced`"),
        ("%0 = gated_scan %x : f32[4]", "2:6: gated_scan: takes 5 operands, not 1"),
        ("%0 = last_row %x : f32[1,4]", r#"2:6: unknown operation "last_row""#),
        ("%0 = const : f32[4]", "2:12: `:` is no 32-bit float"),
        ("%0 = weight w : f32[4]", "2:13: expected a name in quotes, found `w`"),
        ("%0 = weight \"a\nb\" : f32[4]", "2:13: the string does not end on its line"),
        (r#"%0 = weight "\u{110000}" : f32[4]"#, "2:14: unknown escape in a string"),
        ("%0 = silu %x : f32[T,-1]", "2:22: -1 is no 64-bit integer"),
        ("%0 = silu %x : f32[T,99999999999999999999]", "2:22: 99999999999999999999 is no 64-bit integer"),
        ("%0 = silu %x : f32[18446744073709551615+1]", "2:41: the dimension is too large"),
        ("%0 = silu %x : f32[1,2,3,4,5,6,7,8,9]", "2:36: more than 8 dimensions"),
        ("%0 = silu %x : f32[S]", "2:20: expected a dimension, found `S`"),
        ("%0 = fused melt(%a = %x) : f32[4] { return }", r#"2:12: unknown kernel "melt""#),
        ("%0 = fused swiglu(%a = %x, %a = %x) : f32[4] { return }", "2:28: %a is defined twice"),
        (
            "%0 = fused swiglu(%a = %x) : f32[T,4] { %0 = fused swiglu(%a = %a) : f32[T,4] { return %a } return %0 }",
            "2:46: a body holds no fused operation",
        ),
        (
            "%0 = fused swiglu(%a = %x) : f32[4] { return %a }",
            "2:6: fused: declared f32[4], but its operands give f32[T,4]",
        ),
        ("%0 = fused swiglu(%a = %x) : f32[T,4] { return %x }", "2:48: unknown value %x"),
        ("%0 = silu %x ; f32[4]", "2:14: unexpected character ';'"),
        ("% = silu", "2:1: a name must follow %"),
        ("}", "2:1: expected a return, found `}`"),
        ("silu %x", "2:1: expected a value such as %0, found `silu`"),
        ("return %x }", "3:1: expected the end, found `return`"),
        ("return %x, }", "2:12: expected a value such as %0, found `}`"),
    ] {
        assert_eq!(message_at(statement), expected, "{statement}");
    }
    assert_eq!(message(""), "1:1: expected `graph`, found the end");
    assert_eq!(message("graph g"), "1:7: expected a name such as @decode");
    assert_eq!(message("graph @g(%x: f32[4], %x: f32[4])"), "1:22: %x is defined twice");
    assert_eq!(message("graph @g() sym S<=1 {"), "1:16: `S` is no symbol: T or R");
    assert_eq!(message("graph @g() sym T<=1, T<=2 {"), "1:22: the symbol is bounded twice");
    assert_eq!(message("graph @g() { return } é"), "1:23: unexpected character 'é'");
    // Columns are characters, however many bytes they take.
    assert_eq!(message("graph @\"é→😀\"() { return } ;"), "1:27: unexpected character ';'");
    assert_eq!(message("graph @g() { return"), "1:20: expected `}`, found the end");
}

/// A few random edits of a text, at character boundaries.
fn mutate(text: &str, rng: &mut Rng) -> String {
    let mut bytes = text.as_bytes().to_vec();
    for _ in 0..=rng.below(4) {
        let at = rng.below(bytes.len() as u64 + 1) as usize;
        let end = (at + rng.below(12) as usize).min(bytes.len());
        match rng.below(4) {
            0 => drop(bytes.drain(at..end)),
            1 => bytes.insert(at, *rng.pick(b"%@\"\\{}[](),:=+-<#/0919eTRx \n\xc3\xff")),
            2 => {
                let copy = bytes[at..end].to_vec();
                let to = rng.below(bytes.len() as u64 + 1) as usize;
                bytes.splice(to..to, copy);
            }
            _ => bytes[at..end].iter_mut().for_each(|b| *b ^= 1 << rng.below(8)),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

proptest! {
    #[test]
    fn random_graphs_survive(seed: u64, size in 1usize..120) {
        let text = random_graph(seed, size).to_string();
        prop_assert_eq!(parsed(&text).to_string(), text);
    }

    #[test]
    fn floats_survive(bits: u32) {
        let mut g = Graph::new("g", Syms { t: 1, r: 1 });
        let value = f32::from_bits(bits);
        g.leaf(Op::Const { value }, TensorType::new(DType::F32, [1u64])).unwrap();
        let read = parsed(&g.to_string());
        let Op::Const { value } = read.op(read.order()[0]) else { panic!("{read}") };
        prop_assert_eq!(value.to_bits(), bits);
    }

    #[test]
    fn names_survive(name: String) {
        let mut g = Graph::new(name.clone(), Syms { t: 1, r: 1 });
        g.leaf(Op::input(&name), TensorType::new(DType::F32, [1u64])).unwrap();
        let read = parsed(&g.to_string());
        prop_assert_eq!(&read.name, &name);
        prop_assert_eq!(read.op(read.inputs()[0]), &Op::input(name));
    }

    #[test]
    fn damaged_text_never_panics(seed: u64) {
        let mut rng = Rng::new(seed);
        let graph = if rng.coin() { EXAMPLE.to_owned() } else { random_graph(seed, 20).to_string() };
        for _ in 0..20 {
            if let Ok(g) = Graph::parse(&mutate(&graph, &mut rng)) {
                let text = g.to_string();
                prop_assert_eq!(parsed(&text).to_string(), text);
                if let Err(errors) = verify_unfinished(&g) {
                    prop_assert!(errors.to_string().contains("^ rule"));
                }
            }
        }
    }

    #[test]
    fn any_text_never_panics(text: String) {
        let _ = Graph::parse(&text);
    }
}
