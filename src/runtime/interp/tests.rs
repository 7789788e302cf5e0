use super::*;
use crate::ir::StepInput;
use crate::ir::arbitrary::{Paging, RandomStep, Sequences, random_bytes, random_graph};
use proptest::prelude::*;

/// The results of a graph without weights and states.
fn results(text: &str, syms: Syms, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let graph = Graph::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    eval(&graph, &syms, inputs, &|name| panic!("no weight {name}"), IndexMap::new())
}

/// The f32 result of one operation over inputs `%a`, `%b`, `%c` of these types, at T=2, R=1.
fn value(statement: &str, inputs: &[(&str, Tensor)]) -> Vec<f32> {
    let params: Vec<_> =
        inputs.iter().zip(["%a", "%b", "%c"]).map(|((t, _), n)| format!("{n}: {t}")).collect();
    let text = format!("graph @g({}) sym T<=2, R<=2 {{ %y = {statement} return %y }}", params.join(", "));
    let inputs: Vec<_> = inputs.iter().map(|(_, x)| x.clone()).collect();
    results(&text, Syms { t: 2, r: 1 }, &inputs).unwrap()[0].to_f32().unwrap()
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
    let rows = ("f32[T,2]", f32s(&[2, 2], &[1.0, 2.0, 3.0, 4.0]));
    close(&value("get_rows %a, %b : f32[R,2]", &[rows, ("i32[R]", i32s(&[1]))]), &[3.0, 4.0]);
    let x = || ("f32[T,2,2]", f32s(&[2, 2, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]));
    close(&value("reshape %a : f32[T,4]", &[x()]), &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
}

#[test]
fn ids_beyond_the_table_are_refused() {
    for bad in [-1, 3, i32::MIN, i32::MAX] {
        let text = "graph @g(%a: f32[3,2], %b: i32[T]) { %y = get_rows %a, %b : f32[T,2] return %y }";
        let inputs = [f32s(&[3, 2], &[0.0; 6]), i32s(&[bad])];
        let e = results(text, Syms { t: 1, r: 1 }, &inputs).unwrap_err();
        assert_eq!(e.to_string(), format!("id {bad} is not below 3"));
    }
}

#[test]
fn nothing_may_be_wanted() {
    let text = "graph @g(%x: f32[T,2], %wanted: i32[R]) sym T<=2, R<=2 {
        %rows = get_rows %x, %wanted : f32[R,2]
        %w = const 1 : f32[3,2]
        %g = const 1 : f32[2]
        %n = rms_norm %rows, %g {eps=0.5} : f32[R,2]
        %logits = matmul %n, %w : f32[R,3]
        %best = argmax %logits : i32[R]
        %s = softmax %logits : f32[R,3]
        %z = add %s, %logits : f32[R,3]
        %a = silu %z : f32[R,3]
        return %a, %best
    }";
    let inputs = |wanted: &[i32]| [f32s(&[2, 2], &[f32::NAN, 1.0, 2.0, 3.0]), i32s(wanted)];
    let y = results(text, Syms { t: 2, r: 0 }, &inputs(&[])).unwrap();
    assert_eq!((y[0].dims(), y[0].bytes().len()), (&[0, 3][..], 0));
    assert_eq!((y[1].dims(), y[1].bytes().len()), (&[0][..], 0));
    // The row that is not wanted does not count.
    let y = results(text, Syms { t: 2, r: 1 }, &inputs(&[1])).unwrap();
    assert!(y[0].to_f32().unwrap().iter().all(|x| x.is_finite()) && y[1].to_i32().unwrap() == [0]);
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
    let positions = || ("i32[T]", i32s(&[0, 3]));
    let (s, c) = 3f32.sin_cos();
    let (s2, c2) = 0.3f32.sin_cos();
    let still = [1.0, 0.0, 0.0, 1.0, 7.0, 8.0];
    let y = value("rope %a, %b {base=100, dims=4, style=interleaved} : f32[T,1,6]", &[x(), positions()]);
    close(&y[..6], &still);
    close(&y[6..], &[c, s, -s2, c2, 7.0, 8.0]);
    // Pairs (0,2) and (1,3).
    let y = value("rope %a, %b {base=100, dims=4, style=neox} : f32[T,1,6]", &[x(), positions()]);
    close(&y[6..], &[c, -s2, s, c2, 7.0, 8.0]);
    // A factor divides the angle.
    let factors = ("f32[2]", f32s(&[2], &[1.0, 0.1]));
    let x = [x(), positions(), factors];
    let y = value("rope %a, %b, %c {base=100, dims=4, style=interleaved} : f32[T,1,6]", &x);
    close(&y[6..], &[c, s, -s, c, 7.0, 8.0]);
}

#[test]
fn attention_by_parts() {
    // Two tokens of two sequences, two heads of 2 that share one KV head of three rows.
    let q = ("f32[T,2,2]", f32s(&[2, 2, 2], &[1.0, 0.0, 0.0, 1.0, 2.0, 2.0, -1.0, 0.0]));
    let k = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0];
    let k = ("f32[2,3,1,2]", f32s(&[2, 3, 1, 2], &k));
    let sequences = |ids: [i32; 2]| ("i32[T]", i32s(&ids));
    let scores = "scores %a, %b, %c {scale=0.5} : f32[2,T,3]";
    let s = [0.5, 1.5, 2.5, 3.0, 7.0, 11.0, 1.0, 2.0, 3.0, -0.5, -1.5, -2.5];
    close(&value(scores, &[q.clone(), k.clone(), sequences([0, 0])]), &s);
    let s = [5.0, 15.0, 25.0, 3.0, 7.0, 11.0, 10.0, 20.0, 30.0, -0.5, -1.5, -2.5];
    close(&value(scores, &[q, k.clone(), sequences([1, 0])]), &s);

    let p = [1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 1.0, 0.25, 0.25, 0.5];
    let p = ("f32[2,T,3]", f32s(&[2, 2, 3], &p));
    let sum = "weighted_sum %a, %b, %c : f32[T,2,2]";
    let y = [1.0, 2.0, 5.0, 6.0, 4.0, 5.0, 3.5, 4.5];
    close(&value(sum, &[p.clone(), k.clone(), sequences([0, 0])]), &y);
    let y = [10.0, 20.0, 50.0, 60.0, 4.0, 5.0, 3.5, 4.5];
    close(&value(sum, &[p, k, sequences([1, 0])]), &y);
}

#[test]
fn a_token_sees_what_came_before_within_its_window() {
    let s: Vec<f32> = (1..=12).map(|i| i as f32).collect();
    let mask = |attributes: &str, positions: [i32; 2]| {
        let x = [("f32[1,T,6]", f32s(&[1, 2, 6], &s)), ("i32[T]", i32s(&positions))];
        let y = value(&format!("causal_mask %a, %b {attributes} : f32[1,T,6]"), &x);
        assert!(y.iter().zip(&s).all(|(y, s)| y == s || *y == f32::NEG_INFINITY));
        let seen: Vec<String> = y
            .chunks(6)
            .map(|row| row.iter().map(|y| if y.is_finite() { 'x' } else { '.' }).collect())
            .collect();
        seen.join(" ")
    };
    assert_eq!(mask("", [2, 3]), "xxx... xxxx..");
    // Rows are in no order, and of any sequences.
    assert_eq!(mask("", [5, 0]), "xxxxxx x.....");
    assert_eq!(mask("{window=2}", [2, 3]), ".xx... ..xx..");
    assert_eq!(mask("{window=1}", [0, 5]), "x..... .....x");
    assert_eq!(mask("{window=4}", [1, 4]), "xx.... .xxxx.");
    // As wide as all there is, and wider.
    assert_eq!(mask("{window=6}", [5, 6]), "xxxxxx .xxxxx");
    assert_eq!(mask("{window=4294967295}", [5, 2147483647]), "xxxxxx xxxxxx");
}

#[test]
fn heads_share_kv_heads_in_groups() {
    let q = ("f32[1,4,1]", f32s(&[1, 4, 1], &[1.0; 4]));
    let k = ("f32[1,1,2,1]", f32s(&[1, 1, 2, 1], &[10.0, 20.0]));
    let sequences = ("i32[1]", i32s(&[0]));
    let scores = "scores %a, %b, %c {scale=1} : f32[4,1,1]";
    close(&value(scores, &[q, k.clone(), sequences.clone()]), &[10.0, 10.0, 20.0, 20.0]);
    let p = ("f32[4,1,1]", f32s(&[4, 1, 1], &[1.0; 4]));
    close(&value("weighted_sum %a, %b, %c : f32[1,4,1]", &[p, k, sequences]), &[10.0, 10.0, 20.0, 20.0]);
}

#[test]
fn sequences_beyond_those_there_are_are_refused() {
    for statement in
        ["scores %x, %k, %sequences {scale=1} : f32[1,1,1]", "weighted_sum %x, %k, %sequences : f32[1,1,1]"]
    {
        for bad in [-1, 2] {
            let text = format!(
                "graph @g(%x: f32[1,1,1], %k: f32[2,1,1,1], %sequences: i32[1]) {{ %y = {statement} return %y }}"
            );
            let inputs = [f32s(&[1, 1, 1], &[1.0]), f32s(&[2, 1, 1, 1], &[1.0; 2]), i32s(&[bad])];
            let e = results(&text, Syms { t: 1, r: 1 }, &inputs).unwrap_err();
            assert_eq!(e.to_string(), format!("sequence {bad} is not below 2"));
        }
    }
}

#[test]
fn argmax_takes_the_first_of_equals_and_tells_of_nan() {
    let text = "graph @g(%a: f32[T,4]) sym T<=3 { %y = argmax %a : i32[T] return %y }";
    let x = f32s(&[3, 4], &[1.0, 5.0, 5.0, 2.0, f32::NAN, -3.0, -2.0, f32::NAN, 3.0, 0.0, 1.0, 9.0]);
    let y = results(text, Syms { t: 3, r: 3 }, &[x]).unwrap();
    assert_eq!(y[0].to_i32().unwrap(), [1, -1, 3]);
}

#[test]
fn quantised_activations_round_trip() {
    let mut x = [0.0; 32];
    (x[0], x[1], x[31]) = (127.0, -64.4, 0.6);
    let text = "graph @g(%a: f32[T,32]) { %q = quant_act %a : q8_act[T,32] %y = dequant %q : f32[T,32] return %q, %y }";
    let y = results(text, Syms { t: 1, r: 1 }, &[f32s(&[1, 32], &x)]).unwrap();
    (x[1], x[31]) = (-64.0, 1.0);
    assert_eq!(y[1].to_f32().unwrap(), x);
    assert_eq!((y[0].bytes().len(), y[0].bytes()[8] as i8, y[0].bytes()[9] as i8), (40, 127, -64));
}

/// Four pages of two rows, two sequences of up to four positions.
const CACHE: &str =
    "graph @g(%x: f32[T,1,2], %rows: i32[T], %tables: i32[2,2], %lengths: i32[2]) sym T<=3, R<=2 {
    %k = state \"k\" : f16[8,1,2] appended
    %k1 = kv_append %k, %x, %rows : f16[8,1,2]
    %r = kv_read %k1, %tables, %lengths {page=2} : f16[2,4,1,2]
    return %r, %k1
}";

/// A step that appends `(row, x)`.
fn cached(
    tokens: &[(i32, [f32; 2])],
    tables: [i32; 4],
    lengths: [i32; 2],
    k: &Tensor,
) -> Result<Vec<Tensor>> {
    let graph = Graph::parse(CACHE).unwrap();
    let (rows, x): (Vec<i32>, Vec<[f32; 2]>) = tokens.iter().copied().unzip();
    let x = f32s(&[x.len(), 1, 2], x.as_flattened());
    let inputs = [x, i32s(&rows), Tensor::from_i32(&[2, 2], &tables).unwrap(), i32s(&lengths)];
    let syms = Syms { t: tokens.len() as u64, r: 0 };
    eval(&graph, &syms, &inputs, &|_| unreachable!(), IndexMap::from([("k".to_owned(), k.clone())]))
}

fn filled(x: f32) -> Tensor {
    Tensor::new(DType::F16, vec![8, 1, 2], f16::from_f32(x).to_le_bytes().repeat(16)).unwrap()
}

#[test]
fn caches_are_appended_and_read_in_pages() {
    // Sequence 0 lies in pages 3 and 0, sequence 1 in page 1; the rest is not a number, and no page is looked at
    // beyond what is filled.
    let tables = [3, 0, 1, -5];
    let tokens = [(2, [1.0, 2.0]), (6, [3.0, 4.0]), (7, [5.0, 6.0])];
    let mut y = cached(&tokens, tables, [2, 1], &filled(f32::NAN)).unwrap();
    assert_eq!(y[0].dims(), [2, 4, 1, 2]);
    let read = [3.0, 4.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    assert_eq!(y[0].to_f32().unwrap(), read);
    let k1 = y.pop().unwrap();
    // 2049 lies between the f16s 2048 and 2050, and 2051 between 2050 and 2052: to the even mantissa.
    let y = cached(&[(0, [2049.0, 2051.0])], tables, [3, 0], &k1).unwrap();
    let read = [3.0, 4.0, 5.0, 6.0, 2048.0, 2052.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    assert_eq!(y[0].to_f32().unwrap(), read);
    let k = y[1].to_f32().unwrap();
    assert_eq!([&k[..2], &k[4..6], &k[12..]].concat(), [2048.0, 2052.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert!([&k[2..4], &k[6..12]].concat().iter().all(|x| x.is_nan()));
    // Two sequences may share a page, as one that begins as another did.
    let y = cached(&[(1, [7.0, 8.0])], [1, 0, 1, 0], [4, 1], &k1).unwrap();
    assert_eq!(y[0].to_f32().unwrap()[8..10], [1.0, 2.0]);
}

#[test]
fn rows_pages_and_lengths_beyond_the_cache_are_refused() {
    let x = [0.0; 2];
    for (tokens, tables, lengths, message) in [
        (&[(8, x)][..], [0; 4], [0, 0], "row 8 is not below 8"),
        (&[(0, x), (-1, x)], [0; 4], [0, 0], "row -1 is not below 8"),
        (&[(5, x), (4, x), (5, x)], [0; 4], [0, 0], "row 5 is written twice"),
        (&[(0, x)], [0, 0, 3, 4], [0, 3], "page 4 is not below 4"),
        (&[(0, x)], [-1, 0, 0, 0], [1, 0], "page -1 is not below 4"),
        (&[(0, x)], [0; 4], [5, 0], "length 5 is not below 5"),
        (&[(0, x)], [0; 4], [0, -1], "length -1 is not below 5"),
    ] {
        let e = cached(tokens, tables, lengths, &filled(0.0)).unwrap_err();
        assert_eq!(e.to_string(), message);
    }
}

/// Sequence, position, decay and input of a token.
type ScanToken = (i32, i32, [f32; 2], [f32; 2]);

/// Three sequences of two channels.
fn scanned(state: [f32; 6], tokens: &[ScanToken]) -> Result<[Vec<f32>; 2]> {
    let text =
        "graph @g(%decay: f32[T,2], %x: f32[T,2], %sequences: i32[T], %positions: i32[T]) sym T<=4, R<=1 {
        %h = state \"h\" : f32[3,2] replaced
        %y, %h1 = gated_scan %h, %decay, %x, %sequences, %positions : f32[T,2], f32[3,2]
        return %y, %h1
    }";
    let graph = Graph::parse(text).unwrap();
    let t = tokens.len();
    let column = |f: fn(&ScanToken) -> i32| i32s(&tokens.iter().map(f).collect::<Vec<_>>());
    let rows = |f: fn(&ScanToken) -> [f32; 2]| {
        f32s(&[t, 2], tokens.iter().map(f).collect::<Vec<_>>().as_flattened())
    };
    let inputs = [rows(|t| t.2), rows(|t| t.3), column(|t| t.0), column(|t| t.1)];
    let states = IndexMap::from([("h".to_owned(), f32s(&[3, 2], &state))]);
    let y = eval(&graph, &Syms { t: t as u64, r: 0 }, &inputs, &|_| unreachable!(), states)?;
    assert_eq!((y[0].dims(), y[1].dims()), (&[t, 2][..], &[3, 2][..]));
    Ok([y[0].to_f32()?, y[1].to_f32()?])
}

#[test]
fn a_gated_scan_goes_token_by_token() {
    let n = f32::NAN;
    // Sequence 2 goes on at position 5, sequence 0 begins, whatever was there before; sequence 1 has no tokens.
    let tokens = [
        (2, 5, [0.5, 0.0], [1.0, 2.0]),
        (0, 0, [0.5, 0.5], [3.0, 4.0]),
        (2, 6, [2.0, 0.25], [0.0, 1.0]),
        (0, 1, [0.5, -1.0], [1.0, 1.0]),
    ];
    let [y, h] = scanned([n, n, 7.0, n, 10.0, 20.0], &tokens).unwrap();
    close(&y, &[6.0, 2.0, 3.0, 4.0, 12.0, 1.5, 2.5, -3.0]);
    close(&[&h[..2], &h[4..]].concat(), &[2.5, -3.0, 12.0, 1.5]);
    assert!(h[2] == 7.0 && h[3].is_nan());
    // A sequence that begins twice forgets the first time.
    let [y, h] = scanned([0.0; 6], &[(1, 0, [0.5; 2], [8.0; 2]), (1, 0, [0.5; 2], [1.0; 2])]).unwrap();
    close(&y, &[8.0, 8.0, 1.0, 1.0]);
    close(&h, &[0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
    for bad in [-1, 3] {
        let e = scanned([0.0; 6], &[(bad, 0, [0.0; 2], [0.0; 2])]).unwrap_err();
        assert_eq!(e.to_string(), format!("sequence {bad} is not below 3"));
    }
}

#[test]
fn a_scan_in_steps_gives_the_same_bits() {
    let token = |i: i32| {
        let x = |k: f32| (i as f32 * k).sin();
        (i % 2, i / 2, [x(0.3).abs(), x(0.7).abs()], [x(1.1), x(1.3)])
    };
    let tokens: Vec<_> = (0..4).map(token).collect();
    let [y, h] = scanned([0.0; 6], &tokens).unwrap();
    let (mut ys, mut state) = (vec![], [0.0; 6]);
    for part in [&tokens[..1], &tokens[1..3], &tokens[3..]] {
        let [y, h] = scanned(state, part).unwrap();
        (state, _) = (h.try_into().unwrap(), ys.extend(y));
    }
    assert_eq!((ys, state.to_vec()), (y, h));
}

#[test]
fn a_step_is_within_its_bounds() {
    let text = "graph @g(%x: f32[T], %n: i32[R]) sym T<=3, R<=2 { return %x }";
    for (t, r) in [(1, 0), (1, 1), (3, 2), (3, 0)] {
        let inputs = [f32s(&[t], &vec![0.0; t]), i32s(&vec![0; r])];
        results(text, Syms { t: t as u64, r: r as u64 }, &inputs).unwrap();
    }
    for (t, r) in [(0, 0), (1, 2), (3, 3), (4, 0), (u64::MAX, u64::MAX)] {
        let e = results(text, Syms { t, r }, &[]).unwrap_err();
        let says = format!("a step needs 1 <= T and R <= T within the bounds, but T is {t} and R is {r}");
        assert_eq!(e.to_string(), says);
    }
}

#[test]
fn what_is_missing_or_of_another_type_is_named() {
    let syms = Syms { t: 1, r: 1 };
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
        message("graph @g() { %w = state \"k\" : f16[4,2] appended return %w }", &[]),
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
    let (y, syms) = (g.results()[0].node, Syms { t: 1, r: 1 });
    let message = |xs: &[&Tensor]| eval_node(&g, y, xs, &syms).unwrap_err().to_string();
    assert_eq!(message(&[]), "the graph \"silu\" takes 1 inputs, not 0");
    assert_eq!(message(&[&i32s(&[1, 2])]), "operand 0 of silu must be f32[2], not i32[2]");
    assert_eq!(eval_node(&g, y, &[&f32s(&[2], &[0.0, 0.0])], &syms).unwrap(), [f32s(&[2], &[0.0, 0.0])]);
    let e = eval_node(&g, g.ret(), &[&f32s(&[2], &[0.0, 0.0])], &syms).unwrap_err().to_string();
    assert_eq!(e, "return cannot be evaluated by itself");
}

/// The results of a random graph in a step, on weights and states that depend on their names alone.
fn evaluate(graph: &Graph, step: &RandomStep) -> Vec<Tensor> {
    let tensor = |name: &str, ty: &TensorType| {
        let seed = name.bytes().fold(7u64, |h, b| h.wrapping_mul(31) + u64::from(b));
        Tensor::new(ty.dtype, dims(ty, &step.syms), random_bytes(ty, &step.syms, seed)).unwrap()
    };
    let (mut inputs, mut states, mut weights) = (vec![], IndexMap::new(), IndexMap::new());
    for &id in graph.inputs() {
        let Op::Input { name, .. } = graph.op(id) else { panic!("an input") };
        let values = step.values(StepInput::from_name(name).unwrap());
        inputs.push(Tensor::from_i32(&dims(graph.ty(id.into()), &step.syms), values).unwrap());
    }
    for id in graph.ids() {
        match graph.op(id) {
            Op::State { name, .. } => drop(states.insert(name.clone(), tensor(name, graph.ty(id.into())))),
            Op::Weight { name, rows } => {
                let ty = graph.ty(id.into());
                let whole = rows.map_or_else(|| ty.clone(), |rows| rows.whole(ty));
                drop(weights.insert(name.clone(), tensor(name, &whole)));
            }
            _ => {}
        }
    }
    eval(graph, &step.syms, &inputs, &|name| Ok(weights[name].clone()), states).unwrap()
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
                        let outs = &body.node(id).outs;
                        let node = g.add_typed(body.op(id).clone(), &xs, outs).unwrap();
                        inner.extend(
                            (0..outs.len() as u32).map(|out| (Value { node: id, out }, Value { node, out })),
                        );
                    }
                }
                for (out, v) in (0..).zip(body.results()) {
                    new.insert(Value { node: id, out }, inner[&v]);
                }
            }
            op => {
                let outs = &graph.node(id).outs;
                let node = g.add_typed(op.clone(), &operands, outs).unwrap();
                new.extend((0..outs.len() as u32).map(|out| (Value { node: id, out }, Value { node, out })));
            }
        }
    }
    g
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn text_and_fusing_change_no_bit(
        seed: u64,
        size in 1usize..60,
        before in prop::array::uniform3(0u64..60),
        mut tokens in prop::array::uniform3(0u64..=1),
        wanted in 0u64..=3,
    ) {
        let graph = random_graph(seed, size);
        let mut sequences = Sequences::new(Paging::of(seed), seed);
        sequences.step(before, 0);
        // Two of one sequence, or one at least.
        tokens[0] = if tokens == [0; 3] { 1 } else { 2 * tokens[0] };
        let wanted = wanted.min(tokens.iter().sum());
        let step = sequences.step(tokens, wanted);
        let expected = evaluate(&graph, &step);
        let types: Vec<_> = graph.results().iter().map(|v| dims(graph.ty(*v), &step.syms)).collect();
        prop_assert_eq!(expected.iter().map(|x| x.dims().to_vec()).collect::<Vec<_>>(), types);
        let logits = expected[0].to_f32().unwrap();
        prop_assert!(logits.iter().all(|x| x.is_finite()));
        let printed = Graph::parse(&graph.to_string()).unwrap();
        prop_assert_eq!(&evaluate(&printed, &step), &expected);
        prop_assert_eq!(&evaluate(&unfused(&graph), &step), &expected);
    }
}

#[test]
fn a_slice_is_of_the_whole_tensor_that_it_says() {
    let tensor = Tensor::from_f32(&[4, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).unwrap();
    let ty = TensorType::new(DType::F32, [2u64, 2]);
    let slice = |first, of| tensor.slice("w", &Slice { first, of }, &ty);
    assert_eq!(slice(1, 4).unwrap().to_f32().unwrap(), [2.0, 3.0, 4.0, 5.0]);
    for (first, of) in [(3, 4), (u64::MAX, 4), (1, 3), (1, 8), (0, 0)] {
        let says = slice(first, of).unwrap_err().to_string();
        assert!(says.contains("which f32[4,2] has not"), "{first} of {of}: {says}");
    }
}
