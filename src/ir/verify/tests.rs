use super::*;
use crate::ir::arbitrary::random_graph;
use petgraph::visit::EdgeRef;
use proptest::prelude::*;

/// The head of a graph over `x`, `y` f32[T,64], an index `n` for each token, and a cache `k` of two pages.
const HEAD: &str =
    "graph @g(%x: f32[T,1,64], %y: f32[T,64], %n: i32[T], %tables: i32[1,2], %lengths: i32[1]) sym T<=4, R<=2 {
        %k = state \"k\" : f16[64,1,64] appended";

/// That graph with these statements.
fn graph(statements: &str) -> Graph {
    let text = format!("{HEAD} {statements} }}");
    Graph::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn rules(g: &Graph) -> Vec<u8> {
    verify_unfinished(g).map_or_else(|e| e.errors.iter().map(|e| e.violation.rule()).collect(), |()| vec![])
}

/// Asserts that a graph breaks this one rule, with this message.
#[track_caller]
fn breaks(g: &Graph, rule: u8, message: &str) {
    let errors = verify_unfinished(g).expect_err("a rule is broken").errors;
    let found: Vec<_> = errors.iter().map(|e| (e.violation.rule(), e.violation.to_string())).collect();
    assert_eq!(found, [(rule, message.to_owned())]);
}

#[track_caller]
fn statements_break(statements: &str, rule: u8, message: &str) {
    breaks(&graph(statements), rule, message);
}

/// What attention makes of a cache, to be appended to it.
const ATTENTION: &str = "%r = kv_read %k, %tables, %lengths {page=32} : f16[1,64,1,64]
    %d = dequant %r : f32[1,64,1,64]
    %s = scores %x, %d, %n {scale=1} : f32[1,T,64]
    %v = weighted_sum %s, %d, %n : f32[T,1,64]";

#[test]
fn good_graphs_pass() {
    for statements in [
        "return %k",
        "%k1 = kv_append %k, %x, %n : f16[64,1,64] return %y, %k1",
        // A read before the write that depends on it, and one after it; what was read is no view.
        &format!(
            "{ATTENTION}
             %k1 = kv_append %k, %v, %n : f16[64,1,64]
             %late = dequant %r : f32[1,64,1,64]
             %r1 = kv_read %k1, %tables, %lengths {{page=32}} : f16[1,64,1,64]
             return %r1, %late, %k1"
        ),
        "%k1 = kv_append %k, %x, %n : f16[64,1,64]
         %k2 = kv_append %k1, %x, %n : f16[64,1,64]
         return %k2",
        "%k1 = fused rope_kv(%k = %k, %x = %x, %n = %n) : f16[64,1,64] {
             %k1 = kv_append %k, %x, %n : f16[64,1,64]
             return %k1
         }
         return %k1",
        // A body that only reads a state does not return it.
        "%a = fused attention(%k = %k, %q = %x, %n = %n, %t = %tables, %l = %lengths) : f32[1,T,64] {
             %r = kv_read %k, %t, %l {page=32} : f16[1,64,1,64]
             %d = dequant %r : f32[1,64,1,64]
             %s = scores %q, %d, %n {scale=1} : f32[1,T,64]
             return %s
         }
         return %a, %k",
        // A replaced state, with a kernel of its own and in a body, of which one result is no state.
        "%h = state \"h\" : f32[1,64] replaced
         %a, %h1 = gated_scan %h, %y, %y, %n, %n : f32[T,64], f32[1,64]
         %b, %h2 = fused gated_scan(%h = %h1, %x = %a, %n = %n) : f32[T,64], f32[1,64] {
             %b, %h1 = gated_scan %h, %x, %x, %n, %n : f32[T,64], f32[1,64]
             return %b, %h1
         }
         return %b, %k, %h2",
        // Its rows may be read too, by whoever comes before.
        "%h = state \"h\" : f32[1,64] replaced
         %old = get_rows %h, %n : f32[T,64]
         %a, %h1 = gated_scan %h, %y, %old, %n, %n : f32[T,64], f32[1,64]
         return %a, %h1, %k",
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
    assert!(verify_unfinished(&g).unwrap_err().to_string().contains("silu %? : "));
}

#[test]
fn rule_3_types_follow_from_operands() {
    let mut g = graph("%a = silu %y : f32[T,64] return %a, %k");
    let a = g.results()[0].node;
    g.raw_mut()[a].outs[0] = TensorType::new(DType::F32, [7u64]);
    breaks(&g, 3, "the results are declared as f32[7], but the operands give f32[T,64]");
    g.raw_mut()[a].op = Op::MatMul { round: None };
    breaks(&g, 3, "takes 2 operands, not 1");
}

#[test]
fn rule_3_indices_are_one_for_each_token() {
    let says = |positions: &str| {
        let text = format!(
            "graph @g(%x: f32[T,1,64], %p: {positions}) sym T<=4, R<=4 {{
               %a = rope %x, %p {{base=1e4, dims=64, style=neox}} : f32[T,1,64] return %a }}"
        );
        Graph::parse(&text).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(says("i32[T]"), Ok(()));
    for other in ["i32[1]", "i32[R]", "i32[T+R]", "i32[T,1]", "f32[T]"] {
        assert!(says(other).is_err_and(|e| e.contains("rope")), "{other}: {:?}", says(other));
    }
}

/// Operands that do not fit, so that no graph has them.
#[test]
fn rule_3_operands_fit_their_operation() {
    let leaves = "%d = const 1 : f32[1,64,1,64] %s = const 1 : f32[1,T,64] %two = weight \"two\" : i32[2]
        %f = const 1 : f32[1] %h = state \"h\" : f32[1,64] replaced";
    for (statement, message) in [
        ("kv_append %k, %x : f32[1]", "takes 3 operands, not 2"),
        ("kv_append %k, %y, %n : f32[1]", "the rows must have three dimensions, not f32[T,64]"),
        ("kv_append %k, %s, %n : f32[1]", "rows f32[1,T,64] do not fit the cache f16[64,1,64]"),
        ("kv_append %k, %x, %lengths : f32[1]", "the row numbers must be i32[T], not i32[1]"),
        ("kv_append %x, %x, %n : f32[1]", "a cache needs a constant number of rows"),
        (
            "kv_read %k, %n, %lengths {page=32} : f32[1]",
            "the block tables must have two dimensions, not i32[T]",
        ),
        (
            "kv_read %k, %y, %lengths {page=32} : f32[1]",
            "the block tables must be i32 and constant, not f32[T,64]",
        ),
        ("kv_read %k, %tables, %two {page=32} : f32[1]", "the lengths must be i32[1], not i32[2]"),
        ("kv_read %k, %tables, %f {page=32} : f32[1]", "the lengths must be i32, not f32"),
        ("kv_read %k, %tables, %lengths {page=0} : f32[1]", "pages of 0 rows make no sense"),
        ("kv_read %k, %tables, %lengths {page=48} : f32[1]", "64 rows are not whole pages of 48"),
        ("kv_read %n, %tables, %lengths {page=1} : f32[1]", "a cache is f32 or f16, not i32"),
        ("scores %x, %r, %n {scale=1} : f32[1]", "the keys must be f32, not f16"),
        ("scores %x, %x, %n {scale=1} : f32[1]", "the keys must have four dimensions, not f32[T,1,64]"),
        ("scores %x, %d, %two {scale=1} : f32[1]", "the sequences must be i32[T], not i32[2]"),
        ("causal_mask %s, %two : f32[1]", "the positions must be i32[T], not i32[2]"),
        ("causal_mask %s, %n {window=0} : f32[1]", "a window of 0 sees nothing"),
        ("weighted_sum %x, %d, %n : f32[1]", "1 KV heads do not divide T heads"),
        ("weighted_sum %s, %d, %two : f32[1]", "the sequences must be i32[T], not i32[2]"),
        ("gated_scan %h, %y, %x, %n, %n : f32[1]", "the operand must have two dimensions, not f32[T,1,64]"),
        ("gated_scan %h, %h, %y, %n, %n : f32[1]", "f32[1,64] and f32[T,64] do not fit a state f32[1,64]"),
        ("gated_scan %y, %y, %y, %n, %n : f32[1]", "f32[T,64] and f32[T,64] do not fit a state f32[T,64]"),
        ("gated_scan %h, %y, %y, %two, %n : f32[1]", "the sequences must be i32[T], not i32[2]"),
        ("gated_scan %h, %y, %y, %n, %lengths : f32[1]", "the positions must be i32[T], not i32[1]"),
        (
            "gated_scan %h, %y, %y, %n, %n : f32[T,64]",
            "declared f32[T,64], but its operands give f32[T,64], f32[1,64]",
        ),
    ] {
        let read = "%r = kv_read %k, %tables, %lengths {page=32} : f16[1,64,1,64]";
        let text = format!("{HEAD} {leaves} {read} %a = {statement} return %a }}");
        let says = Graph::parse(&text).expect_err(statement).message;
        let op = statement.split(' ').next().unwrap();
        assert_eq!(says, format!("{op}: {message}"));
    }
}

#[test]
fn rule_4_names_are_unique() {
    let twice = "%j = state \"k\" : f16[64,1,64] appended return %k, %j";
    statements_break(twice, 4, "another state is called \"k\"");
    let twice = "%a = weight \"w\" : f32[64] %b = weight \"w\" : f32[64] return %a, %b, %k";
    statements_break(twice, 4, "another weight is called \"w\"");
    let twice =
        "%a = weight \"w\" from 8 of 99 : f32[64] %b = weight \"w\" from 8 of 99 : f32[64] return %a, %b, %k";
    statements_break(twice, 4, "another weight is called \"w\"");
    // Other rows of the same tensor are another weight.
    let apart = "%a = weight \"w\" from 0 of 128 : f32[64] %b = weight \"w\" from 64 of 128 : f32[64] return %a, %b, %k";
    verify(graph(apart)).unwrap();
    let mut g = graph("return %k");
    g.leaf(Op::input("x"), TensorType::new(DType::F32, [1u64])).unwrap();
    breaks(&g, 4, "another input is called \"x\"");
}

#[test]
fn rule_5_attributes_make_sense() {
    for (statement, message) in [
        ("%a = rms_norm %y, %c {eps=-1} : f32[T,64]", "eps cannot be -1"),
        ("%a = rms_norm %y, %c {eps=0x7fc00000} : f32[T,64]", "eps cannot be NaN"),
        ("%a = rope %x, %n {base=0, dims=64, style=neox} : f32[T,1,64]", "base cannot be 0"),
        ("%a = scores %x, %d, %n {scale=0x7f800000} : f32[1,T,64]", "scale cannot be inf"),
        ("%a = const 0xff800000 : f32[1]", "the constant cannot be -inf"),
    ] {
        let leaves = "%c = const 1 : f32[64] %d = const 1 : f32[1,64,1,64]";
        statements_break(&format!("{leaves} {statement} return %a, %k"), 5, message);
    }
    let mut g = graph("%d = const 1 : f32[8,64] %a = matmul %y, %d {round=bf16} : f32[T,8] return %a, %k");
    assert!(verify(g.clone()).is_ok());
    let a = g.ids().into_iter().find(|id| matches!(g.op(*id), Op::MatMul { .. })).unwrap();
    g.raw_mut()[a].op = Op::MatMul { round: Some(DType::Q8Act) };
    breaks(&g, 5, "round cannot be q8_act");
}

#[test]
fn rule_6_sizes_make_sense() {
    let huge = "%w = weight \"w\" : f32[16777216,8388608] return %w, %k";
    statements_break(huge, 6, "f32[16777216,8388608] can have 2^48 elements or bytes, or more");
    let overflow = "%w = weight \"w\" : f32[18446744073709551615,18446744073709551615] return %k";
    assert_eq!(rules(&graph(overflow)), [6]);
    statements_break("%w = weight \"w\" : f32[4,0] return %w, %k", 6, "f32[4,0] can be empty");
    // There may be no rows that are wanted.
    verify_unfinished(&graph("%a = const 1 : f32[R] return %a, %k")).unwrap();
    let mut g = graph("return %k");
    g.leaf(Op::input("r"), TensorType::new(DType::F32, [1u64; 9])).unwrap();
    breaks(&g, 6, "f32[1,1,1,1,1,1,1,1,1] has more than 8 dimensions");
}

#[test]
fn rule_7_bounds_make_sense() {
    for (t, r) in [(0, 0), (1, 2), (0, 1)] {
        let mut g = Graph::new("g", Syms { t, r });
        g.set_return(&[]);
        breaks(&g, 7, &format!("bounds need 1 <= T and R <= T, but T is {t} and R is {r}"));
    }
    verify_unfinished(&Graph::new("g", Syms { t: 1, r: 0 })).unwrap();
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
fn rule_9_states_have_constant_dimensions_and_floats() {
    for (ty, role) in [
        ("i32[64,1]", "appended"),
        ("q8_0[64,1,64]", "appended"),
        ("bf16[64,1,64]", "appended"),
        ("f16[T,1,64]", "appended"),
        ("f16[64,R,64]", "appended"),
        ("f32[]", "appended"),
        ("f16[1,64]", "replaced"),
        ("i32[1,64]", "replaced"),
        ("f32[T,64]", "replaced"),
        ("f32[]", "replaced"),
    ] {
        statements_break(
            &format!("%j = state \"j\" : {ty} {role} return %k, %j"),
            9,
            &format!("{ty} is no type of a state that is {role}"),
        );
    }
}

#[test]
fn rule_10_a_version_is_written_once() {
    let twice = |write: &str| format!("%a = {write} %b = {write} return %a, %b");
    statements_break(
        &twice("kv_append %k, %x, %n : f16[64,1,64]"),
        10,
        "this version of state \"k\" is already written by another node",
    );
    statements_break(
        "%h = state \"h\" : f32[1,64] replaced
         %a, %b = gated_scan %h, %y, %y, %n, %n : f32[T,64], f32[1,64]
         %c, %d = gated_scan %h, %y, %y, %n, %n : f32[T,64], f32[1,64]
         return %a, %c, %b, %d, %k",
        10,
        "this version of state \"h\" is already written by another node",
    );
}

#[test]
fn rule_10_states_are_touched_as_their_role_says() {
    let (appended, replaced) = ["appended", "replaced"]
        .map(|role| format!("operand 0 must be a version of a state that is {role}"))
        .into();
    for (statements, message) in [
        // What is no state, and a view of one.
        ("%i = const 1 : f32[64,1,64] %a = kv_append %i, %x, %n : f32[64,1,64] return %a, %k", &appended),
        ("%v = reshape %k : f16[64,1,64] %a = kv_append %v, %x, %n : f16[64,1,64] return %a, %k", &appended),
        (
            "%i = const 1 : f32[64,1,64]
             %a = kv_read %i, %tables, %lengths {page=32} : f32[1,64,1,64] return %a, %k",
            &appended,
        ),
        (
            "%i = const 1 : f32[1,64]
             %a, %b = gated_scan %i, %y, %y, %n, %n : f32[T,64], f32[1,64] return %a, %b, %k",
            &replaced,
        ),
        // A state of the other role.
        (
            "%h = state \"h\" : f32[64,1,64] replaced
             %a = kv_append %h, %x, %n : f32[64,1,64] return %k, %a",
            &appended,
        ),
        (
            "%h = state \"h\" : f32[64,1,64] replaced
             %a = kv_read %h, %tables, %lengths {page=32} : f32[1,64,1,64] return %a, %k, %h",
            &appended,
        ),
        (
            "%h = state \"h\" : f32[1,64] appended
             %a, %b = gated_scan %h, %y, %y, %n, %n : f32[T,64], f32[1,64] return %a, %b, %k",
            &replaced,
        ),
        // In a body.
        (
            "%h = state \"h\" : f32[1,64] appended
             %a, %b = fused gated_scan(%h = %h, %y = %y, %n = %n) : f32[T,64], f32[1,64] {
                 %a, %b = gated_scan %h, %y, %y, %n, %n : f32[T,64], f32[1,64]
                 return %a, %b
             }
             return %a, %b, %k",
            &replaced,
        ),
        (
            "%i = const 1 : f32[64,1,64]
             %a = fused rope_kv(%i = %i, %x = %x, %n = %n) : f32[64,1,64] {
                 %a = kv_append %i, %x, %n : f32[64,1,64]
                 return %a
             }
             return %a, %k",
            &appended,
        ),
    ] {
        statements_break(statements, 10, message);
    }
}

const LATE: &str = "this reads state \"k\", which may be overwritten before it runs";

#[test]
fn rule_11_readers_of_an_overwritten_version_come_before() {
    // The read is after, or in no order to the write.
    statements_break(
        "%a = kv_append %k, %x, %n : f16[64,1,64]
         %r = kv_read %k, %tables, %lengths {page=32} : f16[1,64,1,64]
         %d = dequant %r : f32[1,64,1,64]
         return %d, %a",
        11,
        LATE,
    );
    statements_break(
        "%h = state \"h\" : f32[1,64] replaced
         %a, %b = gated_scan %h, %y, %y, %n, %n : f32[T,64], f32[1,64]
         %old = get_rows %h, %n : f32[T,64]
         return %a, %old, %b, %k",
        11,
        &LATE.replace("\"k\"", "\"h\""),
    );
    // The view is before the write, but somebody looks at it later.
    statements_break(
        "%r = reshape %k : f16[64,64]
         %d = dequant %r : f32[64,64]
         %s = matmul %y, %d : f32[T,64]
         %v = reshape %s : f32[T,1,64]
         %a = kv_append %k, %v, %n : f16[64,1,64]
         %late = dequant %r : f32[64,64]
         return %late, %a",
        11,
        LATE,
    );
    // A node that is given the version twice.
    statements_break(
        "%a = fused rope_kv(%k = %k, %same = %k, %x = %x, %n = %n) : f16[64,1,64] {
             %k1 = kv_append %k, %x, %n : f16[64,1,64]
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
            "%s{i} = state \"{i}\" : f32[64,1,64] appended
             %r{i} = kv_read %s{i}, %tables, %lengths {{page=32}} : f32[1,64,1,64]
             %p{i} = scores %x, %r{i}, %n {{scale=1}} : f32[1,T,64]
             %v{i} = weighted_sum %p{i}, %r{i}, %n : f32[T,1,64]
             %k{i} = kv_append %s{i}, %v{i}, %n : f32[64,1,64]\n"
        );
        results.push(format!("%k{i}"));
    }
    let results = results.join(", ");
    verify_unfinished(&graph(&format!("{statements} return %k, {results}"))).unwrap();
    let late = "%d = kv_read %s99, %tables, %lengths {page=32} : f32[1,64,1,64]";
    let late = format!("{statements} {late} return %d, %k, {results}");
    statements_break(&late, 11, &LATE.replace("\"k\"", "\"99\""));
}

#[test]
fn rule_12_states_are_returned() {
    let write = |ret: &str| format!("%a = kv_append %k, %x, %n : f16[64,1,64] {ret}");
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
            "{results} = fused rope_kv(%k = %k, %x = %x, %n = %n) : {types} {{
                %k1 = kv_append %k, %x, %n : f16[64,1,64]
                %z = silu %x : f32[T,1,64]
                return {ret}
            }}
            return %k"
        )
    };
    statements_break(&body("%z", "f32[T,1,64]", "%z"), 12, "state \"k\" is not returned");
    let after = body("%k1, %z", "f16[64,1,64], f32[T,1,64]", "%k1, %z");
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
    statements_break(&body("%w = state \"w\" : f32[4,4] replaced"), 13, "a fused body holds no state");
    let mut g = graph("return %k");
    let mut inner = graph(&body(""));
    inner.name = "swiglu".into();
    let mut outer = Graph::new("swiglu", g.bounds);
    let y = outer.leaf(Op::input("y"), inner.ty(inner.inputs()[1].into()).clone()).unwrap();
    let nested = outer.add(inner.op(inner.results()[0].node).clone(), &[y]).unwrap();
    outer.set_return(&[nested.into()]);
    let fused = Op::Fused(Box::new(Fused { kernel: crate::ir::Kernel::Swiglu, body: outer }));
    let y = g.inputs()[1];
    g.add(fused, &[y.into()]).unwrap();
    breaks(&g, 13, "a fused body holds no fused");
    verify_unfinished(&g).unwrap_err().to_string();
}

#[test]
fn rule_13_bodies_fit_their_node() {
    let fused = |change: fn(&mut Graph)| {
        let mut g = graph("return %k");
        let mut body = Graph::new("swiglu", g.bounds);
        let y = body.leaf(Op::input("y"), g.ty(g.inputs()[1].into()).clone()).unwrap();
        let z = body.add(Op::Silu, &[y]).unwrap();
        body.set_return(&[z.into()]);
        change(&mut body);
        let y = g.inputs()[1];
        let kernel = crate::ir::Kernel::Swiglu;
        g.add(Op::Fused(Box::new(Fused { kernel, body })), &[y.into()]).unwrap();
        g
    };
    verify_unfinished(&fused(|_| {})).unwrap();
    breaks(&fused(|b| b.set_return(&[])), 13, "a fused body returns something");
    breaks(&fused(|b| b.name = "melt".into()), 13, "the body is called \"melt\", not \"swiglu\"");
    breaks(&fused(|b| b.bounds.r = 1), 13, "the body has other bounds than the graph around it");
}

#[test]
fn rule_13_bodies_return_no_views() {
    for (ty, statement, ret) in
        [("f16[64,1,64]", "", "%k"), ("f16[64,64]", "%r = reshape %k : f16[64,64]", "%r")]
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
fn rule_13_inputs_have_the_role_of_what_they_stand_for() {
    let another = |slot: usize| format!("input {slot} has another role than what it stands for");
    // Outside of a body there is nothing to stand for.
    for role in [StateRole::Appended, StateRole::Replaced] {
        let mut g = graph("return %k");
        let input = Op::Input { name: "i".into(), role: Some(role) };
        g.leaf(input, TensorType::new(DType::F32, [64u64, 1, 64])).unwrap();
        breaks(&g, 13, &another(5));
    }
    let mut g = graph(
        "%a = fused attention(%n = %n, %k = %k, %t = %tables, %l = %lengths) : f32[1,64,1,64] {
             %r = kv_read %k, %t, %l {page=32} : f16[1,64,1,64]
             %d = dequant %r : f32[1,64,1,64]
             return %d
         }
         return %a, %k",
    );
    let a = g.results()[0].node;
    let mut role_of = |slot: usize, role: Option<StateRole>| {
        let Op::Fused(fused) = &mut g.raw_mut()[a].op else { panic!("a fused node") };
        let input = fused.body.inputs()[slot];
        let Op::Input { role: old, .. } = &mut fused.body.raw_mut()[input].op else { panic!("an input") };
        let old = std::mem::replace(old, role);
        let found = rules(&g);
        let Op::Fused(fused) = &mut g.raw_mut()[a].op else { panic!("a fused node") };
        let Op::Input { role, .. } = &mut fused.body.raw_mut()[input].op else { panic!("an input") };
        *role = old;
        found
    };
    assert!(role_of(1, Some(StateRole::Appended)).is_empty());
    // A state that the body knows as a plain value, or as one of the other role.
    assert_eq!(role_of(1, None), [13, 10]);
    assert_eq!(role_of(1, Some(StateRole::Replaced)), [13, 9]);
    // A plain value that the body takes for a state.
    assert_eq!(role_of(0, Some(StateRole::Appended)), [13, 9]);
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
        verify_unfinished(&g).unwrap_err().to_string(),
        r#"graph @g(%x: f32[T,1,64], %y: f32[T,64], %n: i32[T], %tables: i32[1,2], %lengths: i32[1]) sym T<=4, R<=2 {
  %c0 = const 0xff800000 : f32[64]
  ^ rule 5: the constant cannot be -inf
  %0 = fused add_rmsnorm(%y = %y, %c = %c0) : f32[T,64] {
    %0 = rms_norm %y, %c {eps=-1} : f32[T,64]
    ^ rule 5: eps cannot be -1
    return %0
  }
  %s0 = state "k" : f16[64,1,64] appended
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
        verify_unfinished(&g).unwrap_err().to_string(),
        "  ...
  %60 = silu %59 : f32[T,64]
  %s0 = state \"k\" : f16[64,1,64] appended
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
        if let Err(e) = verify_unfinished(&g) {
            prop_assert!(false, "{e}");
        }
    }
}

/// What a body follows in several ways is held to all of them.
#[test]
fn indices_are_held_to_every_use_in_a_body() {
    for (a, b) in [(5, 3), (3, 5)] {
        let text = format!(
            "graph @g(%t: f32[{a},8], %u: f32[{b},8], %c: f32[4,8], %n: i32[T]) sym T<=4, R<=2 {{
               %0, %1 = fused merge(%t = %t, %u = %u, %n = %n) : f32[T,8], f32[T,8] {{
                 %a = get_rows %t, %n : f32[T,8]
                 %b = get_rows %u, %n : f32[T,8]
                 return %a, %b
               }}
               return %0, %1
             }}"
        );
        let g = Graph::parse(&text).unwrap_or_else(|e| panic!("{e}"));
        let node = g.results()[0].node;
        let operands = g.operands(node);
        let types: Vec<&TensorType> = operands.iter().map(|v| g.ty(*v)).collect();
        let held = |slot| g.op(node).follows(slot, &types);
        assert_eq!([held(0), held(1), held(2)], [None, None, Some((crate::ir::Dim::n(3), false))]);
    }
}
