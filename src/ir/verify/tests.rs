use super::*;
use crate::ir::arbitrary::random_graph;
use petgraph::visit::EdgeRef;
use proptest::prelude::*;

/// A graph over `x`, `y` f32[T,64] and a cache `k`, with these statements.
fn graph(statements: &str) -> Graph {
    let text = format!(
        "graph @g(%x: f32[T,1,64], %y: f32[T,64]) sym T<=4, P<=12, S<=16 {{
            %k = state \"k\" : f16[S,1,64]
            {statements}
        }}"
    );
    Graph::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn rules(g: &Graph) -> Vec<u8> {
    check(g).map_or_else(|e| e.errors.iter().map(|e| e.violation.rule()).collect(), |()| vec![])
}

/// Asserts that a graph breaks this one rule, with this message.
#[track_caller]
fn breaks(g: &Graph, rule: u8, message: &str) {
    let errors = check(g).expect_err("a rule is broken").errors;
    let found: Vec<_> = errors.iter().map(|e| (e.violation.rule(), e.violation.to_string())).collect();
    assert_eq!(found, [(rule, message.to_owned())]);
}

#[track_caller]
fn statements_break(statements: &str, rule: u8, message: &str) {
    breaks(&graph(statements), rule, message);
}

#[test]
fn good_graphs_pass() {
    for statements in [
        "return %k",
        "%k1 = kv_append %k, %x : f16[S,1,64] return %y, %k1",
        // A read before the write that depends on it, and one after it.
        "%r = kv_read %k : f16[P+T,1,64]
         %d = dequant %r : f32[P+T,1,64]
         %s = scores %x, %d {scale=1} : f32[1,T,P+T]
         %v = weighted_sum %s, %d : f32[T,1,64]
         %k1 = kv_append %k, %v : f16[S,1,64]
         %r1 = kv_read %k1 : f16[P+T,1,64]
         return %r1, %k1",
        "%k1 = kv_append %k, %x : f16[S,1,64]
         %k2 = kv_append %k1, %x : f16[S,1,64]
         return %k2",
        "%k1 = fused rope_kv(%k = %k, %x = %x) : f16[S,1,64] {
             %k1 = kv_append %k, %x : f16[S,1,64]
             return %k1
         }
         return %k1",
        // A body that only reads a state does not return it.
        "%a = fused attention(%k = %k, %q = %x) : f32[1,T,P+T] {
             %r = kv_read %k : f16[P+T,1,64]
             %d = dequant %r : f32[P+T,1,64]
             %s = scores %q, %d {scale=1} : f32[1,T,P+T]
             return %s
         }
         return %a, %k",
    ] {
        let g = graph(statements);
        assert_eq!(*verify(g.clone()).unwrap(), g);
    }
}

#[test]
fn rule_1_no_circle() {
    let mut g = graph("%a = silu %y : f32[T,64] %b = silu %a : f32[T,64] return %b, %k");
    let b = g.results()[0];
    let a = g.operand(b.node, 0).unwrap();
    g.set_operand(a.node, 0, b).unwrap();
    breaks(&g, 1, "data flows in a circle");
    assert!(g.is_cyclic());
}

#[test]
fn rule_2_operands_fill_their_slots() {
    let mut g = graph("%a = add %y, %y : f32[T,64] return %a, %k");
    let a = g.results()[0].node;
    let edges: Vec<_> = g.raw_mut().edges_directed(a, petgraph::Incoming).map(|e| e.id()).collect();
    for e in edges {
        g.raw_mut()[e].slot += 1;
    }
    breaks(&g, 2, "operand 0 is missing, the next is in slot 1");
}

#[test]
fn rule_2_results_exist() {
    let mut g = graph("%a = silu %y : f32[T,64] return %a, %k");
    let a = g.results()[0].node;
    let edge = g.raw_mut().edges_directed(a, petgraph::Incoming).next().unwrap().id();
    g.raw_mut()[edge].out = 3;
    breaks(&g, 2, "operand 0 is result 3 of a node that has 1");
    assert!(check(&g).unwrap_err().to_string().contains("silu %? : "));
}

#[test]
fn rule_3_types_follow_from_operands() {
    let mut g = graph("%a = silu %y : f32[T,64] return %a, %k");
    let a = g.results()[0].node;
    g.raw_mut()[a].outs[0] = TensorType::new(DType::F32, [7u64]);
    breaks(&g, 3, "the results are declared as f32[7], but the operands give f32[T,64]");
    g.raw_mut()[a].op = Op::MatMul;
    breaks(&g, 3, "takes 2 operands, not 1");
}

#[test]
fn rule_3_positions_are_one_for_each_token() {
    let says = |positions: &str| {
        let text = format!(
            "graph @g(%x: f32[T,1,64], %p: {positions}) sym T<=4, P<=4, S<=8 {{
               %a = rope %x, %p {{base=1e4, dims=64, style=halves}} : f32[T,1,64] return %a }}"
        );
        Graph::parse(&text).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(says("i32[T]"), Ok(()));
    for other in ["i32[1]", "i32[S]", "i32[P+T]", "i32[T,1]", "f32[T]"] {
        assert!(says(other).is_err_and(|e| e.contains("rope")), "{other}: {:?}", says(other));
    }
}

#[test]
fn rule_4_names_are_unique() {
    statements_break("%j = state \"k\" : f16[S,1,64] return %k, %j", 4, "another state is called \"k\"");
    let twice = "%a = weight \"w\" : f32[64] %b = weight \"w\" : f32[64] return %a, %b, %k";
    statements_break(twice, 4, "another weight is called \"w\"");
    let mut g = graph("return %k");
    g.leaf(Op::Input { name: "x".into() }, TensorType::new(DType::F32, [1u64])).unwrap();
    breaks(&g, 4, "another input is called \"x\"");
}

#[test]
fn rule_5_attributes_make_sense() {
    for (statement, message) in [
        ("%a = rms_norm %y, %c {eps=-1} : f32[T,64]", "eps cannot be -1"),
        ("%a = rms_norm %y, %c {eps=0x7fc00000} : f32[T,64]", "eps cannot be NaN"),
        ("%a = rope %x, %n {base=0, dims=64, style=halves} : f32[T,1,64]", "base cannot be 0"),
        ("%a = scores %x, %x {scale=0x7f800000} : f32[1,T,T]", "scale cannot be inf"),
        ("%a = const 0xff800000 : f32[1]", "the constant cannot be -inf"),
    ] {
        let leaves = "%c = const 1 : f32[64] %n = weight \"n\" : i32[1]";
        let statement = statement.replace("%n", "%p");
        let text = format!(
            "graph @g(%x: f32[T,1,64], %y: f32[T,64], %p: i32[T]) {{ {leaves} {statement} return %a }}"
        );
        breaks(&Graph::parse(&text).unwrap(), 5, message);
    }
}

#[test]
fn rule_6_sizes_make_sense() {
    let huge = "%w = weight \"w\" : f32[16777216,8388608] return %w, %k";
    statements_break(huge, 6, "f32[16777216,8388608] can have 2^48 elements or bytes, or more");
    let overflow = "%w = weight \"w\" : f32[18446744073709551615,18446744073709551615] return %k";
    assert_eq!(rules(&graph(overflow)), [6]);
    statements_break("%w = weight \"w\" : f32[4,0] return %w, %k", 6, "f32[4,0] can be empty");
    let mut g = graph("return %k");
    g.leaf(Op::Input { name: "p".into() }, TensorType::new(DType::F32, [Dim::P])).unwrap();
    breaks(&g, 6, "f32[P] can be empty");
    let mut g = graph("return %k");
    g.leaf(Op::Input { name: "r".into() }, TensorType::new(DType::F32, [1u64; 9])).unwrap();
    breaks(&g, 6, "f32[1,1,1,1,1,1,1,1,1] has more than 8 dimensions");
}

#[test]
fn rule_7_bounds_make_sense() {
    for (t, p, s) in [(0, 0, 1), (2, 0, 1), (1, 2, 1)] {
        let mut g = Graph::new("g", Syms { t, p, s });
        g.set_return(&[]);
        breaks(&g, 7, &format!("bounds need 1 <= T <= S and P <= S, but T is {t}, P is {p} and S is {s}"));
    }
}

#[test]
fn rule_8_rows_are_whole_blocks() {
    statements_break(
        "%w = weight \"w\" : q4_k[256,128] return %w, %k",
        8,
        "rows of q4_k[256,128] are not whole blocks of 256",
    );
}

#[test]
fn rule_9_states_have_rows_and_floats() {
    for ty in ["i32[S,1]", "f16[T,1,64]", "q8_0[S,1,64]"] {
        let statements = format!("%j = state \"j\" : {ty} return %k, %j");
        assert_eq!(rules(&graph(&statements)).first(), Some(&9), "{ty}");
    }
    statements_break(
        "%j = state \"j\" : f32[4] return %k, %j",
        9,
        "a state is f32 or f16 and has S rows, not f32[4]",
    );
}

#[test]
fn rule_10_a_version_is_written_once() {
    statements_break(
        "%a = kv_append %k, %x : f16[S,1,64] %b = kv_append %k, %x : f16[S,1,64] return %a, %b",
        10,
        "this version of state \"k\" is already written by another node",
    );
}

#[test]
fn rule_10_only_states_are_written() {
    let text = "graph @g(%i: f16[S,1,64], %x: f32[T,1,64]) {
        %a = kv_append %i, %x : f16[S,1,64]
        return %a
    }";
    breaks(&Graph::parse(text).unwrap(), 10, "operand 0 is written, but is no version of a state");
    statements_break(
        "%v = reshape %k : f16[S,1,64] %a = kv_append %v, %x : f16[S,1,64] return %a, %k",
        10,
        "operand 0 is written, but is no version of a state",
    );
}

const LATE: &str = "this reads state \"k\", which may be overwritten before it runs";

#[test]
fn rule_11_readers_of_an_overwritten_version_come_before() {
    // The read is after, or in no order to the write.
    let unordered = "%a = kv_append %k, %x : f16[S,1,64]
        %r = kv_read %k : f16[P+T,1,64]
        %d = dequant %r : f32[P+T,1,64]
        return %d, %a";
    assert_eq!(rules(&graph(unordered)), [11, 11]);
    // The view is before the write, but somebody looks at it later.
    statements_break(
        "%r = kv_read %k : f16[P+T,1,64]
         %d = dequant %r : f32[P+T,1,64]
         %s = scores %x, %d {scale=1} : f32[1,T,P+T]
         %v = weighted_sum %s, %d : f32[T,1,64]
         %a = kv_append %k, %v : f16[S,1,64]
         %late = dequant %r : f32[P+T,1,64]
         return %late, %a",
        11,
        LATE,
    );
    // A node that is given the version twice.
    statements_break(
        "%n = weight \"n\" : f32[64]
         %a = fused rope_kv(%k = %k, %same = %k, %x = %x) : f16[S,1,64] {
             %k1 = kv_append %k, %x : f16[S,1,64]
             return %k1
         }
         return %a",
        11,
        LATE,
    );
}

#[test]
fn rule_11_holds_with_more_writers_than_a_sweep_serves() {
    let mut statements = String::new();
    let mut results = vec![];
    for i in 0..100 {
        statements += &format!(
            "%s{i} = state \"{i}\" : f32[S,1,64]
             %r{i} = kv_read %s{i} : f32[P+T,1,64]
             %p{i} = scores %x, %r{i} {{scale=1}} : f32[1,T,P+T]
             %v{i} = weighted_sum %p{i}, %r{i} : f32[T,1,64]
             %k{i} = kv_append %s{i}, %v{i} : f32[S,1,64]\n"
        );
        results.push(format!("%k{i}"));
    }
    let good = format!("{statements} return %k, {}", results.join(", "));
    check(&graph(&good)).unwrap();
    let late = format!("{statements} %d = silu %r99 : f32[P+T,1,64] return %d, %k, {}", results.join(", "));
    statements_break(&late, 11, &LATE.replace("\"k\"", "\"99\""));
}

#[test]
fn rule_12_states_are_returned() {
    let write = |ret: &str| format!("%a = kv_append %k, %x : f16[S,1,64] {ret}");
    let missing = "state \"k\" is not returned";
    statements_break("return %y", 12, missing);
    statements_break(&write("return"), 12, missing);
    let stale = "what is returned for state \"k\" is not its last version";
    statements_break(&write("return %k"), 12, stale);
    assert_eq!(rules(&graph(&write("return %k, %a"))), [12, 12]);
    statements_break(&write("return %a, %a"), 12, "state \"k\" is returned twice");
    statements_break(&write("return %a, %y"), 12, "result 1 comes after a state");
}

#[test]
fn rule_12_holds_in_bodies() {
    let body = |results: &str, types: &str, ret: &str| {
        format!(
            "{results} = fused rope_kv(%k = %k, %x = %x) : {types} {{
                %k1 = kv_append %k, %x : f16[S,1,64]
                %z = silu %x : f32[T,1,64]
                return {ret}
            }}
            return %k"
        )
    };
    statements_break(&body("%z", "f32[T,1,64]", "%z"), 12, "state \"k\" is not returned");
    let after = body("%k1, %z", "f16[S,1,64], f32[T,1,64]", "%k1, %z");
    statements_break(&after, 12, "result 1 comes after a state");
}

#[test]
fn rule_13_bodies_are_primitive() {
    let body = |statement: &str| {
        format!(
            "%a = fused swiglu(%y = %y) : f32[T,64] {{ {statement} %z = silu %y : f32[T,64] return %z }}
             return %a, %k"
        )
    };
    statements_break(&body("%w = weight \"w\" : f32[4]"), 13, "a fused body holds no weight");
    statements_break(&body("%w = state \"w\" : f32[S,4]"), 13, "a fused body holds no state");
    let mut g = graph("return %k");
    let mut inner = graph(&body(""));
    inner.name = "swiglu".into();
    let mut outer = Graph::new("swiglu", g.bounds);
    let y = outer.leaf(Op::Input { name: "y".into() }, inner.ty(inner.inputs()[1].into()).clone()).unwrap();
    let nested = outer.add(inner.op(inner.results()[0].node).clone(), &[y]).unwrap();
    outer.set_return(&[nested.into()]);
    let fused = Op::Fused(Box::new(Fused { kernel: crate::ir::Kernel::Swiglu, body: outer }));
    let y = g.inputs()[1];
    g.add(fused, &[y.into()]).unwrap();
    breaks(&g, 13, "a fused body holds no fused");
    check(&g).unwrap_err().to_string();
}

#[test]
fn rule_13_bodies_fit_their_node() {
    let fused = |change: fn(&mut Graph)| {
        let mut g = graph("return %k");
        let mut body = Graph::new("swiglu", g.bounds);
        let y = body.leaf(Op::Input { name: "y".into() }, g.ty(g.inputs()[1].into()).clone()).unwrap();
        let z = body.add(Op::Silu, &[y]).unwrap();
        body.set_return(&[z.into()]);
        change(&mut body);
        let y = g.inputs()[1];
        let kernel = crate::ir::Kernel::Swiglu;
        g.add(Op::Fused(Box::new(Fused { kernel, body })), &[y.into()]).unwrap();
        g
    };
    check(&fused(|_| {})).unwrap();
    breaks(&fused(|b| b.set_return(&[])), 13, "a fused body returns something");
    breaks(&fused(|b| b.name = "melt".into()), 13, "the body is called \"melt\", not \"swiglu\"");
    breaks(&fused(|b| b.bounds.t = 3), 13, "the body has other bounds than the graph around it");
}

#[test]
fn rule_13_bodies_return_no_views() {
    for (ty, statement, ret) in
        [("f16[S,1,64]", "", "%k"), ("f16[P+T,1,64]", "%r = kv_read %k : f16[P+T,1,64]", "%r")]
    {
        statements_break(
            &format!(
                "%a = fused attention(%k = %k) : {ty} {{ {statement} return {ret} }}
                 return %a, %k"
            ),
            13,
            "result 0 of the body only shows state \"k\", which it does not write",
        );
    }
}

#[test]
fn errors_show_in_the_text() {
    let g = graph(
        "%c = const 0xff800000 : f32[64]
         %a = fused add_rmsnorm(%y = %y, %c = %c) : f32[T,64] {
             %z = rms_norm %y, %c {eps=-1} : f32[T,64]
             return %z
         }
         return %a, %k",
    );
    assert_eq!(
        check(&g).unwrap_err().to_string(),
        r#"graph @g(%x: f32[T,1,64], %y: f32[T,64]) sym T<=4, P<=12, S<=16 {
  %c0 = const 0xff800000 : f32[64]
  ^ rule 5: the constant cannot be -inf
  %0 = fused add_rmsnorm(%y = %y, %c = %c0) : f32[T,64] {
    %0 = rms_norm %y, %c {eps=-1} : f32[T,64]
    ^ rule 5: eps cannot be -1
    return %0
  }
  %s0 = state "k" : f16[S,1,64]
  return %0, %s0
}
2 errors in graph "g""#
    );
}

#[test]
fn long_graphs_show_the_lines_around() {
    let chain: String = (0..60).map(|i| format!("%{} = silu %{i} : f32[T,64]\n", i + 1)).collect();
    let g = graph(&format!("%0 = silu %y : f32[T,64] {chain} return %60"));
    assert_eq!(
        check(&g).unwrap_err().to_string(),
        "  ...
  %60 = silu %59 : f32[T,64]
  %s0 = state \"k\" : f16[S,1,64]
  return %60
  ^ rule 12: state \"k\" is not returned
}
1 error in graph \"g\""
    );
}

proptest! {
    #[test]
    fn random_graphs_pass(seed: u64, size in 1usize..200) {
        let g = random_graph(seed, size);
        if let Err(e) = check(&g) {
            prop_assert!(false, "{e}");
        }
    }
}
