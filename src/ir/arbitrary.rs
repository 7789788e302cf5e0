//! Random graphs that pass the verifier, and random steps and tensors for them: for property tests.

use super::attributes::{Rope, RopeStyle, Slice, StateRole};
use super::graph::{Graph, NodeId, Value};
use super::kernel::{Fused, Kernel};
use super::op::Op;
use super::step::{PAGE, StepInput};
use super::types::{DType, Dim, Syms, TensorType};
use half::f16;

/// Bounds of [`random_graph`].
pub const BOUNDS: Syms = Syms { t: 4, r: 4 };

/// Sequences of a random graph.
pub const SEQUENCES: usize = 3;

/// Positions that each of them has room for, at least.
pub const CONTEXT: u64 = 64;

/// Rows that a page of a random graph may have.
pub const PAGES: [u32; 2] = [PAGE, 2 * PAGE];

const WIDTH: u64 = 256;
const HEAD: u64 = 32;
const HEADS: u64 = WIDTH / HEAD;
const VOCAB: u64 = 32;

/// A small generator (Marsaglia's xorshift64), the same everywhere for the same seed.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        // Spreads small seeds; the state must not be 0.
        Rng(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `n`, which must not be 0.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.bits() >> 16) % n
    }

    pub fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }

    /// Within -1..1.
    pub fn float(&mut self) -> f32 {
        (self.below(1 << 24) as f32) / (1 << 23) as f32 - 1.0
    }
}

/// How the caches of a random graph are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// Rows of a page.
    pub page: u32,
    /// Pages of a sequence, at most.
    pub each: u64,
}

impl Paging {
    /// That of the graphs of this seed.
    pub fn of(seed: u64) -> Paging {
        let page = *Rng::new(!seed).pick(&PAGES);
        Paging { page, each: CONTEXT.div_ceil(u64::from(page)) }
    }

    /// Pages of a cache: some more than all sequences need.
    fn pages(self) -> u64 {
        SEQUENCES as u64 * self.each + 2
    }
}

/// A graph of about `size` or more operations, in pieces that a transformer is made of: embedding, norms,
/// projections in all formats, rotation, caches, attention with and without a window, feed-forward, gated
/// recurrences, residuals, a head for all rows or those that are wanted; with shared values, dead nodes, and
/// fused nodes. Its inputs are all of [`StepInput`], for [`Sequences`] to give.
///
/// # Panics
/// Never, if the typing rules are right.
pub fn random_graph(seed: u64, size: usize) -> Graph {
    build(seed, size, BOUNDS, true)
}

/// As [`random_graph`], but of primitives alone, which is what models are lowered to, and of any bounds.
///
/// # Panics
/// Never, if the typing rules are right.
pub fn random_primitives(seed: u64, size: usize, bounds: Syms) -> Graph {
    build(seed, size, bounds, false)
}

fn build(seed: u64, size: usize, bounds: Syms, fuses: bool) -> Graph {
    let mut g = Graph::new("random", bounds);
    let paging = Paging::of(seed);
    let step = StepInput::ALL.map(|input| {
        let shape = match input {
            StepInput::Tokens | StepInput::Positions | StepInput::Sequences | StepInput::Rows => vec![Dim::T],
            StepInput::Tables => vec![Dim::n(SEQUENCES as u64), Dim::n(paging.each)],
            StepInput::Lengths => vec![Dim::n(SEQUENCES as u64)],
            StepInput::Wanted => vec![Dim::R],
        };
        let ty = TensorType::new(DType::I32, shape);
        g.leaf(Op::input(input.name()), ty).expect("leaves have any type")
    });
    let rng = Rng::new(seed);
    let mut b = Builder { rng, g, fuses, names: 0, rows: vec![], states: vec![], paging, step };
    let dtype = *b.rng.pick(&DType::WEIGHTS);
    let table = b.weight(dtype, &[VOCAB, WIDTH]);
    let tokens = b.input(StepInput::Tokens);
    let rows = b.op(Op::GetRows, &[table, tokens]);
    let x = b.dequant(rows);
    b.rows.push(x);
    if b.rng.coin() {
        b.norm();
    }
    while b.g.len() < size {
        match b.rng.below(10) {
            0 => b.norm(),
            1 => b.projection(),
            2 => b.residual(),
            3 => b.gated(),
            4 | 5 => b.attention(),
            6 => b.recurrence(),
            7 if b.fuses => b.fused(),
            7 => b.gated(),
            // They take their time, so few graphs have them, and once.
            8 if seed.is_multiple_of(8)
                && !b.g.ids().into_iter().any(|id| matches!(b.g.op(id), Op::MatMulId)) =>
            {
                b.experts()
            }
            8 => b.projection(),
            _ => b.dead(),
        }
    }
    b.finish(table)
}

struct Builder {
    rng: Rng,
    g: Graph,
    /// Whether there may be fused nodes.
    fuses: bool,
    /// Counts weights and states, for their names.
    names: usize,
    /// Values of type `f32[T,WIDTH]`.
    rows: Vec<Value>,
    /// The last version of each state.
    states: Vec<Value>,
    paging: Paging,
    /// The inputs, in the order of [`StepInput::ALL`].
    step: [Value; StepInput::ALL.len()],
}

impl Builder {
    fn add(&mut self, op: Op, operands: &[Value]) -> NodeId {
        self.g.add(op, operands).expect("the operands fit")
    }

    fn op(&mut self, op: Op, operands: &[Value]) -> Value {
        self.add(op, operands).into()
    }

    fn leaf<D: Into<Dim>>(&mut self, op: Op, dtype: DType, shape: impl IntoIterator<Item = D>) -> Value {
        self.g.leaf(op, TensorType::new(dtype, shape)).expect("leaves have any type")
    }

    fn input(&self, input: StepInput) -> Value {
        self.step[input as usize]
    }

    fn name(&mut self, kind: &str) -> String {
        self.names += 1;
        format!("blk.{}.{kind}", self.names)
    }

    fn weight(&mut self, dtype: DType, shape: &[u64]) -> Value {
        let name = self.name("weight");
        // Some are rows of larger tensors.
        let sliced = self.names.is_multiple_of(4) && shape.len() > 1;
        let rows = sliced.then(|| Slice { first: 3, of: shape[0] + 5 });
        self.leaf(Op::Weight { name, rows }, dtype, shape.iter().copied())
    }

    /// A weight as f32, from any format of which blocks make up its rows.
    fn floats(&mut self, shape: &[u64]) -> Value {
        let columns = shape.last().copied().unwrap_or(1);
        let fits = |dtype: &DType| columns % dtype.block_len() as u64 == 0;
        let fitting: Vec<DType> = DType::WEIGHTS.into_iter().filter(fits).collect();
        let dtype = *self.rng.pick(&fitting);
        let w = self.weight(dtype, shape);
        self.dequant(w)
    }

    fn dequant(&mut self, x: Value) -> Value {
        if self.g.ty(x).dtype == DType::F32 { x } else { self.op(Op::Dequant, &[x]) }
    }

    fn reshape(&mut self, x: Value, shape: &[Dim]) -> Value {
        let ty = TensorType::new(self.g.ty(x).dtype, shape.iter().copied());
        self.g.add_typed(Op::Reshape, &[x], &[ty]).expect("as many elements").into()
    }

    /// One of the last three rows, as in a model, or any.
    fn row(&mut self) -> Value {
        let newest = self.rows.len().saturating_sub(3);
        let from = if self.rng.coin() { newest } else { 0 };
        *self.rng.pick(&self.rows[from..])
    }

    fn eps(&mut self) -> f32 {
        *self.rng.pick(&[1e-5, 1e-6, 0.1 + 0.2])
    }

    fn norm(&mut self) {
        let x = self.row();
        self.norm_of(x);
    }

    fn norm_of(&mut self, x: Value) {
        let (w, eps) = (self.floats(&[WIDTH]), self.eps());
        let y = self.op(Op::RmsNorm { eps }, &[x, w]);
        self.rows.push(y);
    }

    /// A sum and its norm. Now and then nobody else sees the sum.
    fn sum(&mut self, x: Value, y: Value) {
        let sum = self.op(Op::Add, &[x, y]);
        if self.rng.coin() {
            self.rows.push(sum);
        }
        self.norm_of(sum);
    }

    /// `x`, or `x` quantised.
    fn activations(&mut self, x: Value) -> Value {
        if self.rng.coin() {
            return x;
        }
        let q = self.op(Op::QuantAct, &[x]);
        self.op(Op::Dequant, &[q])
    }

    /// Projections of one input, which now and then is not quantised alike for all.
    fn project<const N: usize>(&mut self, x: Value, widths: [u64; N]) -> [Value; N] {
        let shared = self.activations(x);
        widths.map(|width| {
            let x = if self.rng.below(8) == 0 { self.activations(x) } else { shared };
            self.project_one(x, width)
        })
    }

    fn project_one(&mut self, x: Value, width: u64) -> Value {
        let w = self.floats(&[width, WIDTH]);
        let round = (self.rng.below(4) == 0).then_some(DType::F16);
        let y = self.op(Op::MatMul { round }, &[x, w]);
        if self.rng.coin() {
            return y;
        }
        let bias = self.floats(&[width]);
        self.op(Op::Add, &[y, bias])
    }

    fn projection(&mut self) {
        let x = self.row();
        let [y] = self.project(x, [WIDTH]);
        if self.rng.coin() {
            let x = self.row();
            return self.sum(x, y);
        }
        // Keeps values small however long the graph is.
        let scale = self.constant(0.0625);
        let y = self.op(Op::Mul, &[y, scale]);
        self.rows.push(y);
    }

    fn constant(&mut self, value: f32) -> Value {
        self.leaf(Op::Const { value }, DType::F32, [WIDTH])
    }

    /// A matrix for each sequence.
    fn experts(&mut self) {
        let x = self.row();
        let x = self.activations(x);
        let matrices = self.floats(&[SEQUENCES as u64, WIDTH, WIDTH]);
        let y = self.op(Op::MatMulId, &[x, matrices, self.input(StepInput::Sequences)]);
        let scale = self.constant(0.0625);
        let y = self.op(Op::Mul, &[y, scale]);
        self.rows.push(y);
    }

    fn residual(&mut self) {
        let (x, y) = (self.row(), self.row());
        let y = if self.rng.coin() { self.floats(&[WIDTH]) } else { y };
        self.sum(x, y);
    }

    fn gated(&mut self) {
        let x = self.row();
        let [gate, up] = self.project(x, [WIDTH; 2]);
        let gate = self.op(Op::Silu, &[gate]);
        let y = self.op(Op::Mul, &[gate, up]);
        let y = self.out(x, y);
        self.rows.push(y);
        self.norm();
    }

    /// `y`, or what its projection adds to `x`: then nobody else needs `y`.
    fn out(&mut self, x: Value, y: Value) -> Value {
        if self.rng.coin() {
            return y;
        }
        let [y] = self.project(y, [WIDTH]);
        self.op(Op::Add, &[x, y])
    }

    /// A recurrence, of what a SiLU gates or of a plain projection.
    fn recurrence(&mut self) {
        let x = self.row();
        let [decay, gate, x] = self.project(x, [WIDTH; 3]);
        // Within 0..1, and now and then within 0.5..1, so that what was before is not soon forgotten.
        let mut decay = self.op(Op::Softmax, &[decay]);
        if self.rng.coin() {
            let half = self.constant(0.5);
            let halved = self.op(Op::Mul, &[decay, half]);
            decay = self.op(Op::Add, &[halved, half]);
        }
        let name = self.name("state");
        let state = Op::State { name, role: StateRole::Replaced };
        let state = self.leaf(state, DType::F32, [SEQUENCES as u64, WIDTH]);
        let [sequences, positions] = [StepInput::Sequences, StepInput::Positions].map(|i| self.input(i));
        let mut x = x;
        if self.rng.below(4) == 0 {
            // Reads the old version before it is overwritten.
            let old = self.op(Op::GetRows, &[state, sequences]);
            x = self.op(Op::Add, &[x, old]);
        }
        let node = if self.rng.coin() {
            if self.fuses && self.rng.coin() {
                self.fuse(Kernel::GatedScan, &[state, decay, gate, x, sequences, positions], |b, x| {
                    let silu = b.op(Op::Silu, &[x[2]]);
                    let gated = b.op(Op::Mul, &[silu, x[3]]);
                    let node = b.add(Op::GatedScan, &[x[0], x[1], gated, x[4], x[5]]);
                    [0, 1].map(|out| Value { node, out }).to_vec()
                })
            } else {
                let silu = self.op(Op::Silu, &[gate]);
                let gated = self.op(Op::Mul, &[silu, x]);
                self.add(Op::GatedScan, &[state, decay, gated, sequences, positions])
            }
        } else {
            self.add(Op::GatedScan, &[state, decay, x, sequences, positions])
        };
        self.rows.push(node.into());
        self.states.push(Value { node, out: 1 });
        self.norm();
    }

    fn cache(&mut self, groups: u64) -> Value {
        let dtype = *self.rng.pick(&[DType::F16, DType::F32]);
        let name = self.name("cache");
        let rows = self.paging.pages() * u64::from(self.paging.page);
        self.leaf(Op::State { name, role: StateRole::Appended }, dtype, [rows, groups, HEAD])
    }

    fn read(&mut self, cache: Value) -> Value {
        let [tables, lengths] = [StepInput::Tables, StepInput::Lengths].map(|i| self.input(i));
        let rows = self.op(Op::KvRead { page: self.paging.page }, &[cache, tables, lengths]);
        self.dequant(rows)
    }

    /// A rotation and what it takes beside positions.
    fn rotation(&mut self) -> (Rope, Option<Value>) {
        let style = *self.rng.pick(&[RopeStyle::Interleaved, RopeStyle::NeoX]);
        let dims = *self.rng.pick(&[HEAD, HEAD / 2]);
        let factors = self.rng.coin().then(|| self.floats(&[dims / 2]));
        (Rope { base: 10000.0, dims: dims as u32, style }, factors)
    }

    fn rope(&mut self, x: Value, (rope, factors): (Rope, Option<Value>)) -> Value {
        let operands: Vec<Value> = [x, self.input(StepInput::Positions)].into_iter().chain(factors).collect();
        self.op(Op::Rope(rope), &operands)
    }

    fn head_norm(&mut self, x: Value) -> Value {
        let (w, eps) = (self.floats(&[HEAD]), self.eps());
        self.op(Op::RmsNorm { eps }, &[x, w])
    }

    fn attend(&mut self, q: Value, k: Value, v: Value) -> Value {
        let [sequences, positions] = [StepInput::Sequences, StepInput::Positions].map(|i| self.input(i));
        let window = *self.rng.pick(&[None, None, Some(1), Some(5), Some(20)]);
        let scores = self.op(Op::Scores { scale: (HEAD as f32).sqrt().recip() }, &[q, k, sequences]);
        let masked = self.op(Op::CausalMask { window }, &[scores, positions]);
        let p = self.op(Op::Softmax, &[masked]);
        self.op(Op::WeightedSum, &[p, v, sequences])
    }

    fn attention(&mut self) {
        let groups = *self.rng.pick(&[1, 2, HEADS]);
        let x = self.row();
        let head = |n: u64| [Dim::T, Dim::n(n), Dim::n(HEAD)];
        let heads = [HEADS, groups, groups];
        let [q, k, v] = self.project(x, heads.map(|n| n * HEAD));
        let [mut q, mut k, mut v] =
            [(q, HEADS), (k, groups), (v, groups)].map(|(y, n)| self.reshape(y, &head(n)));
        if self.rng.coin() {
            (q, k) = (self.head_norm(q), self.head_norm(k));
        }
        let turn = self.rotation();
        // Queries and keys are turned alike, or they do not fit one kernel.
        let other = if self.rng.below(4) == 0 { self.rotation() } else { turn };
        let (q, k) = (self.rope(q, turn), self.rope(k, other));
        let caches = [self.cache(groups), self.cache(groups)];
        if groups == HEADS && self.rng.coin() {
            // Reads the old version before it is overwritten.
            let old = self.read(caches[1]);
            v = self.attend(v, old, old);
        }
        let appended = if self.rng.coin() && self.fuses {
            self.fused_append(caches, [k, v])
        } else {
            let rows = self.input(StepInput::Rows);
            [self.op(Op::KvAppend, &[caches[0], k, rows]), self.op(Op::KvAppend, &[caches[1], v, rows])]
        };
        self.states.extend(appended);
        let (k, v) = (self.read(appended[0]), self.read(appended[1]));
        let y = self.attend(q, k, v);
        let y = self.reshape(y, &[Dim::T, Dim::n(WIDTH)]);
        let y = self.out(x, y);
        self.rows.push(y);
    }

    /// A fused node over `operands`, with the body that `build` makes of its inputs.
    fn fuse(
        &mut self,
        kernel: Kernel,
        operands: &[Value],
        build: impl FnOnce(&mut Builder, &[Value]) -> Vec<Value>,
    ) -> NodeId {
        let body = Graph::new(kernel.name(), self.g.bounds);
        let mut inner = Builder {
            rng: Rng::new(self.rng.bits()),
            g: body,
            fuses: false,
            names: 0,
            rows: vec![],
            states: vec![],
            paging: self.paging,
            step: self.step,
        };
        let mut params = vec![];
        for (i, &v) in operands.iter().enumerate() {
            let (ty, role) = (self.g.ty(v).clone(), self.g.state_role(v));
            params.push(inner.leaf(Op::Input { name: format!("x{i}"), role }, ty.dtype, ty.shape));
        }
        let results = build(&mut inner, &params);
        inner.g.set_return(&results);
        self.g.add(Op::Fused(Box::new(Fused { kernel, body: inner.g })), operands).expect("the body fits")
    }

    fn fused_append(&mut self, [k, v]: [Value; 2], [new_k, new_v]: [Value; 2]) -> [Value; 2] {
        let rows = self.input(StepInput::Rows);
        let node = self.fuse(Kernel::RopeKv, &[k, v, new_k, new_v, rows], |b, x| {
            vec![b.op(Op::KvAppend, &[x[0], x[2], x[4]]), b.op(Op::KvAppend, &[x[1], x[3], x[4]])]
        });
        [Value { node, out: 0 }, Value { node, out: 1 }]
    }

    fn fused(&mut self) {
        let (x, y, eps) = (self.row(), self.row(), self.eps());
        match self.rng.below(3) {
            0 => {
                let w = self.weight(DType::F32, &[WIDTH]);
                let node = self.fuse(Kernel::AddRmsnorm, &[x, y, w], |b, x| {
                    let sum = b.op(Op::Add, &[x[0], x[1]]);
                    vec![sum, b.op(Op::RmsNorm { eps }, &[sum, x[2]])]
                });
                self.rows.extend([0, 1].map(|out| Value { node, out }));
            }
            1 => {
                let node = self.fuse(Kernel::Swiglu, &[x, y], |b, x| {
                    let gate = b.op(Op::Silu, &[x[0]]);
                    vec![b.op(Op::Mul, &[gate, x[1]])]
                });
                self.rows.push(node.into());
                self.norm();
            }
            _ => {
                let w = self.weight(DType::Q4_K, &[WIDTH, WIDTH]);
                let node = self.fuse(Kernel::DequantMatmul, &[x, w, y], |b, x| {
                    let w = b.op(Op::Dequant, &[x[1]]);
                    let product = b.op(Op::MatMul { round: None }, &[x[0], w]);
                    vec![b.op(Op::Add, &[product, x[2]])]
                });
                self.rows.push(node.into());
                self.norm();
            }
        }
    }

    fn dead(&mut self) {
        let x = self.row();
        let y = self.op(Op::Silu, &[x]);
        self.op(Op::GetRows, &[y, self.input(StepInput::Wanted)]);
    }

    fn finish(mut self, table: Value) -> Graph {
        let mut x = self.row();
        if self.rng.coin() {
            x = self.op(Op::GetRows, &[x, self.input(StepInput::Wanted)]);
        }
        // A tied head: the table is used by rows and as a matrix.
        let head = self.dequant(table);
        let logits = self.op(Op::MatMul { round: None }, &[x, head]);
        let mut results = vec![self.row()];
        // The logits, the best token, or both.
        let wanted = self.rng.below(3);
        if wanted != 0 {
            results.push(self.op(Op::ArgMax, &[logits]));
        }
        if wanted != 1 {
            results.push(logits);
        }
        results.append(&mut self.states);
        self.g.set_return(&results);
        self.g
    }
}

/// Sequences that grow step by step, in pages that lie in no order.
pub struct Sequences {
    rng: Rng,
    paging: Paging,
    free: Vec<i32>,
    /// The pages that each sequence has filled, at least in part.
    tables: [Vec<i32>; SEQUENCES],
    lengths: [u64; SEQUENCES],
}

/// A step of some sequences.
#[derive(Clone, Debug)]
pub struct RandomStep {
    pub syms: Syms,
    /// Sequences that have tokens in it.
    pub sequences: usize,
    /// In the order of [`StepInput::ALL`].
    values: [Vec<i32>; StepInput::ALL.len()],
}

impl RandomStep {
    /// What an input holds, row by row.
    pub fn values(&self, input: StepInput) -> &[i32] {
        &self.values[input as usize]
    }
}

impl Sequences {
    /// Empty ones, for graphs of this paging.
    pub fn new(paging: Paging, seed: u64) -> Sequences {
        let free = (0..paging.pages() as i32).collect();
        Sequences { rng: Rng::new(seed), paging, free, tables: Default::default(), lengths: [0; SEQUENCES] }
    }

    /// Positions that a sequence has filled.
    pub fn length(&self, sequence: usize) -> u64 {
        self.lengths[sequence]
    }

    /// Begins a sequence anew. Its pages go to whoever needs one next.
    pub fn begin(&mut self, sequence: usize) {
        self.lengths[sequence] = 0;
        self.free.append(&mut self.tables[sequence]);
    }

    /// The row of the caches for the next token of a sequence.
    fn grow(&mut self, sequence: usize) -> u64 {
        let (position, page) = (self.lengths[sequence], u64::from(self.paging.page));
        if position % page == 0 {
            let at = self.rng.below(self.free.len() as u64) as usize;
            self.tables[sequence].push(self.free.swap_remove(at));
        }
        self.lengths[sequence] += 1;
        self.tables[sequence][(position / page) as usize] as u64 * page + position % page
    }

    /// The step that gives each sequence so many more tokens, in rows that are mixed or not, and wants the results of
    /// `wanted` of them.
    pub fn step(&mut self, tokens: [u64; SEQUENCES], wanted: u64) -> RandomStep {
        let mut left: Vec<usize> =
            (0..tokens.len()).flat_map(|b| std::iter::repeat_n(b, tokens[b] as usize)).collect();
        let t = left.len();
        let (mut values, mixed) = (StepInput::ALL.map(|_| vec![]), self.rng.coin());
        let mut unwanted: Vec<i32> = (0..t as i32).collect();
        for _ in 0..t {
            let at = if mixed { self.rng.below(left.len() as u64) as usize } else { 0 };
            let b = left.remove(at);
            let (position, row) = (self.lengths[b], self.grow(b));
            let token = [
                (StepInput::Tokens, self.rng.below(VOCAB)),
                (StepInput::Positions, position),
                (StepInput::Sequences, b as u64),
                (StepInput::Rows, row),
            ];
            token.into_iter().for_each(|(input, value)| values[input as usize].push(value as i32));
        }
        for _ in 0..wanted {
            let at = self.rng.below(unwanted.len() as u64) as usize;
            values[StepInput::Wanted as usize].push(unwanted.swap_remove(at));
        }
        for table in &self.tables {
            let tables = &mut values[StepInput::Tables as usize];
            tables.extend(table);
            // Any page: nobody looks at what is beyond the length.
            let rest = table.len()..self.paging.each as usize;
            tables.extend(rest.map(|_| self.rng.below(self.paging.pages()) as i32));
        }
        values[StepInput::Lengths as usize] = self.lengths.iter().map(|&n| n as i32).collect();
        let sequences = tokens.iter().filter(|n| **n > 0).count();
        RandomStep { syms: Syms { t: t as u64, r: wanted }, sequences, values }
    }
}

/// The storage of a random tensor of type `ty` at `syms`: floats within -1..1, block scales that keep
/// values there, and integers that are ids of the table.
pub fn random_bytes(ty: &TensorType, syms: &Syms, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let blocks = ty.elements(syms) / ty.dtype.block_len() as u64;
    let mut bytes = vec![];
    for _ in 0..blocks {
        random_block(ty.dtype, &mut rng, &mut bytes);
    }
    bytes
}

fn random_block(dtype: DType, rng: &mut Rng, bytes: &mut Vec<u8>) {
    let noise = |rng: &mut Rng, n: usize| (0..n).map(|_| rng.bits() as u8).collect::<Vec<_>>();
    let half = |x: f32| f16::from_f32(x).to_le_bytes();
    match dtype {
        DType::F32 => bytes.extend(rng.float().to_le_bytes()),
        DType::F16 => bytes.extend(half(rng.float())),
        DType::I32 => bytes.extend((rng.below(VOCAB) as i32).to_le_bytes()),
        DType::BF16 => bytes.extend(&rng.float().to_le_bytes()[2..]),
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => {
            let largest = if dtype == DType::Q8_0 { 128.0 } else { 16.0 };
            bytes.extend(half(rng.float() / largest));
            bytes.extend(noise(rng, dtype.block_bytes() - 2));
        }
        DType::Q4_1 | DType::Q5_1 => {
            bytes.extend(half(rng.float() / 32.0));
            bytes.extend(half(rng.float() / 2.0));
            bytes.extend(noise(rng, dtype.block_bytes() - 4));
        }
        DType::Q2_K => {
            bytes.extend(noise(rng, 80));
            bytes.extend(half(rng.float() / 64.0));
            bytes.extend(half(rng.float() / 64.0));
        }
        DType::Q3_K => {
            bytes.extend(noise(rng, 108));
            bytes.extend(half(rng.float() / 128.0));
        }
        DType::Q4_K | DType::Q5_K => {
            bytes.extend(half(rng.float() / 2048.0));
            bytes.extend(half(rng.float() / 64.0));
            bytes.extend(noise(rng, dtype.block_bytes() - 4));
        }
        DType::MXFP4 => {
            bytes.push(120 + rng.below(5) as u8);
            bytes.extend(noise(rng, 16));
        }
        DType::Q6_K => {
            bytes.extend(noise(rng, 208));
            bytes.extend(half(rng.float() / 4096.0));
        }
        DType::Q16Act => {
            let (step, q, r) = (rng.float().abs() / 127.0 / 254.0, noise(rng, 32), noise(rng, 32));
            let both = q.iter().zip(&r).map(|(&q, &r)| 254 * i32::from(q as i8) + i32::from(r as i8));
            bytes.extend((254.0 * step).to_le_bytes());
            bytes.extend((step * both.sum::<i32>() as f32).to_le_bytes());
            bytes.extend(q);
            bytes.extend(r);
        }
        DType::Q8Act => {
            let (d, q) = (rng.float().abs() / 127.0, noise(rng, 32));
            let sum: i32 = q.iter().map(|&q| i32::from(q as i8)).sum();
            bytes.extend(d.to_le_bytes());
            bytes.extend((d * sum as f32).to_le_bytes());
            bytes.extend(q);
        }
    }
}
