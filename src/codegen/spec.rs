//! What codegen produces, as plain data: kernels, how a back end implements them, and the calls that a program makes.
//!
//! A [`KernelSpec`] says *what* a kernel computes of which arguments. An [`Implementation`] says *how*: it is all that a back
//! end decides. Neither names a buffer, so equal kernels are shared by all layers.

use crate::ir::{DType, Dim, Kernel, Slice, StateRole, Syms, TensorType};
use serde::{Deserialize, Serialize};

pub use crate::ir::fused::{
    ArgId, AttentionSpec, CacheRows, Computation, Epilogue, GatedScanSpec, HeadNorm, MatmulPart, MatmulSpec,
    NormSource, NormSpec, RopeAttentionSpec, RopeK, RopeKvSpec, RopeQ, SwigluSpec,
};

/// How a kernel touches an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    Read,
    /// Every element is written; nothing is read.
    Write,
    /// A state changed in place: some of its rows are written.
    Update,
    /// Room that the kernel needs while it runs.
    Scratch,
}

/// One argument of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Arg {
    pub access: Access,
    pub ty: TensorType,
    /// What the values are held to, where the kernel follows them.
    pub index: Option<Index>,
}

impl Arg {
    /// An argument whose values the kernel does not follow.
    pub fn new(access: Access, ty: TensorType) -> Arg {
        Arg { access, ty, index: None }
    }
}

/// What values that a kernel follows, as rows, pages or sequences, are held to. Each kernel clamps what it reads by;
/// what it writes by is checked before the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Index {
    /// Each value lies in `0..below`.
    pub below: Dim,
    /// No two values are equal.
    pub distinct: bool,
    pub source: IndexSource,
}

/// Where an index comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IndexSource {
    /// An input of the step, checked before it.
    Input,
    /// Computed on the device.
    Device,
}

/// What a kernel computes, of which arguments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelSpec {
    /// The fused kernel this is; none for a primitive.
    pub kernel: Option<Kernel>,
    pub computes: Computation,
    /// The operands of the node, then its results that are no next version of a state.
    pub args: Vec<Arg>,
}

impl KernelSpec {
    /// What it is called where kernels are counted: the fused kernel or the operation.
    pub fn name(&self) -> &'static str {
        match (self.kernel, &self.computes) {
            (Some(kernel), _) => kernel.name(),
            (None, Computation::Op(op)) => op.name(),
            (None, Computation::GatedScan(_)) => Kernel::GatedScan.name(),
            (None, Computation::Matmul(_)) => "matmul",
            (None, Computation::Norm(_)) => "rms_norm",
            (None, Computation::RopeKv(_)) => Kernel::RopeKv.name(),
            (None, Computation::Swiglu(_)) => Kernel::Swiglu.name(),
            (None, Computation::Attention(_)) => Kernel::Attention.name(),
            (None, Computation::RopeAttention(_)) => Kernel::RopeAttention.name(),
        }
    }
}

/// `write` may lie where `read` lies: each element is read by the work item that writes it, first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Alias {
    pub write: ArgId,
    pub read: ArgId,
}

/// `⌈dim / per⌉` work items along one axis of the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    pub dim: Dim,
    pub per: u32,
}

impl Extent {
    pub fn each(dim: impl Into<Dim>) -> Extent {
        Extent { dim: dim.into(), per: 1 }
    }

    /// The number of items at `at`.
    pub fn eval(&self, at: &Syms) -> u64 {
        self.dim.eval(at).div_ceil(u64::from(self.per.max(1)))
    }
}

/// How the rows of a weight lie in the memory of a device. Each layout only moves bits about, so a weight takes as many bytes in
/// any of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// One after another, as in the model file.
    #[default]
    RowMajor,
    /// Sixteen at a time, their columns side by side (`src/runtime/cpu/interleaved.rs`).
    Interleaved16,
    /// Each field of all blocks in a plane of its own, so that it can be loaded in aligned vectors (`kernels/quant.h`).
    Planes,
}

impl Layout {
    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Layout::RowMajor => "row-major",
            Layout::Interleaved16 => "interleaved16",
            Layout::Planes => "planes",
        }
    }

    /// Whether a weight of this type can lie so.
    pub fn fits(self, ty: &TensorType) -> bool {
        match (self, &ty.shape[..]) {
            (Layout::RowMajor, _) => true,
            (Layout::Interleaved16, [rows, columns]) => {
                let is_there = |dim: &Dim| dim.as_const().is_some_and(|n| n > 0);
                matches!(ty.dtype, DType::Q4_K | DType::Q6_K)
                    && is_there(rows)
                    && is_there(columns)
                    && rows.c.is_multiple_of(16)
                    && ty.is_blocked()
            }
            (Layout::Planes, [rows, columns]) => {
                let is_there = |dim: &Dim| dim.as_const().is_some_and(|n| n > 0);
                ty.dtype.is_quantised()
                    && !ty.dtype.is_activations()
                    && is_there(rows)
                    && is_there(columns)
                    && ty.is_blocked()
            }
            (Layout::Interleaved16 | Layout::Planes, _) => false,
        }
    }
}

/// How a back end implements a kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Implementation {
    pub spec: KernelSpec,
    /// The weights among the arguments that do not lie row after row.
    pub layouts: Vec<(ArgId, Layout)>,
    /// Arguments after those of the spec: room that the launches share while they run.
    pub workspace: Vec<Arg>,
    /// What the back end permits; it holds for all launches together.
    pub may_alias: Vec<Alias>,
    /// What numbers are rounded to on their way at the least: f32, or f16 or bf16 on matrix units.
    pub precision: DType,
    /// One after another. Each gets all arguments.
    pub launches: Vec<LaunchSpec>,
}

impl Implementation {
    /// All arguments, the workspace last.
    pub fn args(&self) -> impl Iterator<Item = &Arg> {
        self.spec.args.iter().chain(&self.workspace)
    }

    /// How an argument lies in memory.
    pub fn layout(&self, id: ArgId) -> Layout {
        self.layouts.iter().find(|(arg, _)| *arg == id).map_or(Layout::RowMajor, |(_, layout)| *layout)
    }

    /// The argument of a number.
    pub fn arg(&self, id: ArgId) -> Option<&Arg> {
        self.args().nth(id.into())
    }
}

/// One launch of a kernel's implementation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaunchSpec {
    pub code: Code,
    /// Work items: the product of the extents, the last running fastest.
    pub grid: Vec<Extent>,
}

impl LaunchSpec {
    /// Work items at `at`.
    pub fn items(&self, at: &Syms) -> u64 {
        self.grid.iter().fold(1, |n, e| n.saturating_mul(e.eval(at)))
    }
}

/// What a launch runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    Cpu(CpuCode),
    Hip(HipCode),
}

/// A kernel of a GPU. The grid of its launch counts blocks: the last extent is the x axis, the one before the y axis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HipCode {
    /// A file of HIP C++, which includes headers of `kernels/` alone.
    pub source: String,
    /// The name of the kernel in it.
    pub entry: String,
    /// Threads of a block.
    pub threads: u32,
}

/// Which of the CPU's functions does a launch (`src/runtime/cpu`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CpuCode {
    /// The kernel's own, which does all of it.
    Whole,
    /// A matmul, of which an item computes `tile` weight rows of one part (its last one may have fewer) for all tokens. With
    /// [`Epilogue::Swiglu`] it computes the same rows of both parts. With [`Epilogue::ArgMax`] it leaves its own best of each
    /// token in the workspace: values f32 and indices i32, both `[T,items]`.
    Matmul { tile: u32 },
    /// The best of what the items of [`CpuCode::Matmul`] left.
    BestOfItems,
}

/// Index into [`Program::buffers`].
pub type BufId = u32;

/// What one graph becomes: kernels, calls in order, and the buffers they use. Nothing is placed yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    pub name: String,
    pub bounds: Syms,
    pub kernels: Vec<Implementation>,
    pub calls: Vec<Call>,
    pub buffers: Vec<Buffer>,
    /// The graph's parameters by name, written before each step.
    pub inputs: Vec<(String, BufId)>,
    /// The graph's results that are not states, read after each step.
    pub results: Vec<BufId>,
}

/// One node's work: the launches of its kernel, on these buffers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// Index into [`Program::kernels`].
    pub kernel: u32,
    /// One buffer per argument of the kernel. Views share the buffer of what they view.
    pub args: Vec<BufId>,
    /// The node it came from, in words.
    pub label: String,
}

/// Memory that a call reads or writes. Its size is that of `ty` at the program's bounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    pub ty: TensorType,
    pub place: Place,
}

/// What a buffer belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Planned in the arena.
    Arena,
    /// A tensor of the model file, or some of its rows; read only.
    Weight { name: String, rows: Option<Slice>, layout: Layout },
    /// Kept from step to step.
    State { name: String, role: StateRole },
}

impl Place {
    /// A whole tensor of the model file.
    pub fn weight(name: impl Into<String>) -> Place {
        Place::Weight { name: name.into(), rows: None, layout: Layout::RowMajor }
    }
}
