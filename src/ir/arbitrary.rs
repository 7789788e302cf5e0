//! Random graphs that pass the verifier, and random tensors for them: for property tests.

use super::graph::{Graph, NodeId, Value};
use super::op::{Fused, Kernel, Op, Rope, RopeStyle};
use super::types::{DType, Dim, Syms, TensorType};
use half::f16;

/// Bounds of [`random_graph`].
pub const BOUNDS: Syms = Syms { t: 4, p: 12, s: 16 };

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

/// A graph of about `size` or more operations, in pieces that a transformer is made of: embedding, norms,
/// projections in all formats, rotation, caches, attention, feed-forward, residuals, a head; with shared
/// values, dead nodes, and fused nodes.
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
    let mut b = Builder {
        rng: Rng::new(seed),
        g: Graph::new("random", bounds),
        fuses,
        names: 0,
        rows: vec![],
        states: vec![],
    };
    let tokens = b.leaf(Op::Input { name: "tokens".into() }, DType::I32, [Dim::T]);
    let pos = b.leaf(Op::Input { name: "pos".into() }, DType::I32, [Dim::T]);
    let dtype = *b.rng.pick(&DType::WEIGHTS);
    let table = b.weight(dtype, &[VOCAB, WIDTH]);
    let rows = b.op(Op::GetRows, &[table, tokens]);
    let x = b.dequant(rows);
    b.rows.push(x);
    while b.g.len() < size {
        match b.rng.below(8) {
            0 => b.norm(),
            1 => b.projection(),
            2 => b.residual(),
            3 => b.gated(),
            4 | 5 => b.attention(pos),
            6 if b.fuses => b.fused(),
            6 => b.gated(),
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
}

impl Builder {
    fn op(&mut self, op: Op, operands: &[Value]) -> Value {
        self.g.add(op, operands).expect("the operands fit").into()
    }

    fn leaf<D: Into<Dim>>(&mut self, op: Op, dtype: DType, shape: impl IntoIterator<Item = D>) -> Value {
        self.g.leaf(op, TensorType::new(dtype, shape)).expect("leaves have any type")
    }

    fn name(&mut self, kind: &str) -> String {
        self.names += 1;
        format!("blk.{}.{kind}", self.names)
    }

    fn weight(&mut self, dtype: DType, shape: &[u64]) -> Value {
        let name = self.name("weight");
        self.leaf(Op::Weight { name }, dtype, shape.iter().copied())
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

    fn row(&mut self) -> Value {
        *self.rng.pick(&self.rows)
    }

    fn eps(&mut self) -> f32 {
        *self.rng.pick(&[1e-5, 1e-6, 0.1 + 0.2])
    }

    fn norm(&mut self) {
        let (x, w, eps) = (self.row(), self.floats(&[WIDTH]), self.eps());
        let y = self.op(Op::RmsNorm { eps }, &[x, w]);
        self.rows.push(y);
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
        let y = self.op(Op::MatMul, &[x, w]);
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
            let sum = self.op(Op::Add, &[x, y]);
            self.rows.push(sum);
            return self.norm();
        }
        // Keeps values small however long the graph is.
        let scale = self.leaf(Op::Const { value: 0.0625 }, DType::F32, [WIDTH]);
        let y = self.op(Op::Mul, &[y, scale]);
        self.rows.push(y);
    }

    fn residual(&mut self) {
        let (x, y) = (self.row(), self.row());
        let y = if self.rng.coin() { self.floats(&[WIDTH]) } else { y };
        let sum = self.op(Op::Add, &[x, y]);
        self.rows.push(sum);
        self.norm();
    }

    fn gated(&mut self) {
        let x = self.row();
        let [gate, up] = self.project(x, [WIDTH; 2]);
        let gate = self.op(Op::Silu, &[gate]);
        let y = self.op(Op::Mul, &[gate, up]);
        self.rows.push(y);
        self.norm();
    }

    fn cache(&mut self, groups: u64) -> Value {
        let dtype = *self.rng.pick(&[DType::F16, DType::F32]);
        let name = self.name("cache");
        self.leaf(Op::State { name }, dtype, [Dim::S, Dim::n(groups), Dim::n(HEAD)])
    }

    fn read(&mut self, cache: Value) -> Value {
        let rows = self.op(Op::KvRead, &[cache]);
        self.dequant(rows)
    }

    /// A rotation and what it takes beside positions.
    fn rotation(&mut self) -> (Rope, Option<Value>) {
        let style = *self.rng.pick(&[RopeStyle::Interleaved, RopeStyle::Halves]);
        let dims = *self.rng.pick(&[HEAD, HEAD / 2]);
        let factors = self.rng.coin().then(|| self.floats(&[dims / 2]));
        (Rope { base: 10000.0, dims: dims as u32, style }, factors)
    }

    fn rope(&mut self, x: Value, pos: Value, (rope, factors): (Rope, Option<Value>)) -> Value {
        let operands: Vec<Value> = [x, pos].into_iter().chain(factors).collect();
        self.op(Op::Rope(rope), &operands)
    }

    fn head_norm(&mut self, x: Value) -> Value {
        let (w, eps) = (self.floats(&[HEAD]), self.eps());
        self.op(Op::RmsNorm { eps }, &[x, w])
    }

    fn attend(&mut self, q: Value, k: Value, v: Value) -> Value {
        let scores = self.op(Op::Scores { scale: (HEAD as f32).sqrt().recip() }, &[q, k]);
        let masked = self.op(Op::CausalMask, &[scores]);
        let p = self.op(Op::Softmax, &[masked]);
        self.op(Op::WeightedSum, &[p, v])
    }

    fn attention(&mut self, pos: Value) {
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
        let (q, k) = (self.rope(q, pos, turn), self.rope(k, pos, other));
        let caches = [self.cache(groups), self.cache(groups)];
        if groups == HEADS && self.rng.coin() {
            // Reads the old version before it is overwritten.
            let old = self.read(caches[1]);
            v = self.attend(v, old, old);
        }
        let appended = if self.rng.coin() && self.fuses {
            self.fused_append(caches, [k, v])
        } else {
            [self.op(Op::KvAppend, &[caches[0], k]), self.op(Op::KvAppend, &[caches[1], v])]
        };
        self.states.extend(appended);
        let (k, v) = (self.read(appended[0]), self.read(appended[1]));
        let y = self.attend(q, k, v);
        let y = self.reshape(y, &[Dim::T, Dim::n(WIDTH)]);
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
        };
        let mut params = vec![];
        for (i, &v) in operands.iter().enumerate() {
            let ty = self.g.ty(v).clone();
            params.push(inner.leaf(Op::Input { name: format!("x{i}") }, ty.dtype, ty.shape));
        }
        let results = build(&mut inner, &params);
        inner.g.set_return(&results);
        self.g.add(Op::Fused(Box::new(Fused { kernel, body: inner.g })), operands).expect("the body fits")
    }

    fn fused_append(&mut self, [k, v]: [Value; 2], [new_k, new_v]: [Value; 2]) -> [Value; 2] {
        let node = self.fuse(Kernel::RopeKv, &[k, v, new_k, new_v], |b, x| {
            vec![b.op(Op::KvAppend, &[x[0], x[2]]), b.op(Op::KvAppend, &[x[1], x[3]])]
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
                    let product = b.op(Op::MatMul, &[x[0], w]);
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
        self.op(Op::LastRow, &[y]);
    }

    fn finish(mut self, table: Value) -> Graph {
        let mut x = self.row();
        if self.rng.coin() {
            x = self.op(Op::LastRow, &[x]);
        }
        // A tied head: the table is used by rows and as a matrix.
        let head = self.dequant(table);
        let logits = self.op(Op::MatMul, &[x, head]);
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

/// The storage of a random tensor of type `ty` at `syms`: floats within -1..1, block scales that keep
/// values there, and integers that are ids of the table and small positions.
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
        DType::Q8Act => {
            let (d, q) = (rng.float().abs() / 127.0, noise(rng, 32));
            let sum: i32 = q.iter().map(|&q| i32::from(q as i8)).sum();
            bytes.extend(d.to_le_bytes());
            bytes.extend((d * sum as f32).to_le_bytes());
            bytes.extend(q);
        }
    }
}
