//! The back end of GPUs: each launch becomes a small file of HIP C++ that instantiates templates of `kernels/` for the shapes and
//! formats of one kernel.
//!
//! A kernel is called with the address of each argument, in order, then `T` and `R` of the step as two integers. Blocks are numbered
//! by the grid of the launch: its last extent is the x axis.

mod attention;
mod matmul;
mod norm;
mod primitive;
mod rope_kv;
mod tiles;
mod units;

use super::Backend;
use super::spec::{
    Access, Alias, Arg, ArgId, Code, Computation, Extent, HipCode, Implementation, KernelSpec, LaunchSpec,
    Layout, NormSource, NormSpec,
};
use crate::ir::{DType, Dim, Syms, TensorType};
use crate::target::Target;

/// Threads of a block, where nothing asks for another number.
const THREADS: u32 = 256;
/// Blocks along the y and z axes of a grid, at most.
const MOST_BLOCKS: u64 = 65_535;

/// From here on a kernel may read what those before it wrote.
const WAIT: &str = "wait_for_previous();\n";

/// The kernels of `kernels/`.
pub struct Hip;

impl Backend for Hip {
    /// Planes, if everything that reads a weight takes those.
    fn layout(&self, weight: &TensorType, uses: &[(KernelSpec, ArgId)]) -> Layout {
        let takes_planes = |(spec, arg): &(KernelSpec, ArgId)| match &spec.computes {
            Computation::Matmul(m) => m.parts.iter().any(|part| part.weight == *arg),
            Computation::Norm(NormSpec { source: NormSource::Embedding { table, .. }, .. }) => table == arg,
            Computation::Norm(_)
            | Computation::RopeKv(_)
            | Computation::Swiglu(_)
            | Computation::Attention(_)
            | Computation::RopeAttention(_)
            | Computation::GatedScan(_)
            | Computation::Op(_) => false,
        };
        let pays = !uses.is_empty() && uses.iter().all(takes_planes);
        if pays && Layout::Planes.fits(weight) { Layout::Planes } else { Layout::RowMajor }
    }

    fn emit(
        &self,
        spec: KernelSpec,
        layouts: Vec<(ArgId, Layout)>,
        given: &[ArgId],
        body: &[String],
        bounds: &Syms,
        target: &Target,
    ) -> Result<Implementation, String> {
        let mut unit = Unit {
            spec: &spec,
            layouts: &layouts,
            given,
            bounds,
            target,
            workspace: vec![],
            aliases: vec![],
            precision: DType::F32,
            files: vec![],
        };
        match &spec.computes {
            Computation::Matmul(m) => unit.matmul(m)?,
            Computation::Norm(m) => unit.norm(m)?,
            Computation::RopeKv(m) => unit.rope_kv(m)?,
            Computation::Swiglu(m) => unit.swiglu(m)?,
            Computation::Attention(m) => unit.attention(m)?,
            Computation::RopeAttention(m) => unit.rope_attention(m)?,
            Computation::GatedScan(m) => unit.gated_scan(m)?,
            Computation::Op(op) => unit.primitive(op)?,
        }
        let Unit { workspace, aliases: may_alias, precision, files, .. } = unit;
        let args: Vec<Arg> = spec.args.iter().chain(&workspace).cloned().collect();
        for file in &files {
            let blocks: Vec<u64> = file.grid.iter().map(|extent| extent.eval(bounds)).collect();
            // Of all axes but the last, which is x.
            if blocks.iter().rev().skip(1).any(|n| *n > MOST_BLOCKS) {
                return Err(format!(
                    "{blocks:?} blocks are more than a GPU takes at once: a smaller chunk has fewer"
                ));
            }
        }
        let launches = files.into_iter().map(|file| file.launch(&args, body)).collect();
        Ok(Implementation { workspace, may_alias, precision, launches, layouts, spec })
    }
}

/// A kernel on its way to an [`Implementation`].
struct Unit<'a> {
    spec: &'a KernelSpec,
    layouts: &'a [(ArgId, Layout)],
    /// Arguments that no kernel of the program writes.
    given: &'a [ArgId],
    bounds: &'a Syms,
    target: &'a Target,
    workspace: Vec<Arg>,
    aliases: Vec<Alias>,
    /// See [`Implementation::precision`].
    precision: DType,
    files: Vec<File>,
}

/// The source of one launch.
struct File {
    entry: String,
    /// What it computes, in words.
    about: String,
    headers: Vec<&'static str>,
    /// What stands before the kernel.
    constants: String,
    body: String,
    threads: u32,
    /// Blocks that share a multiprocessor at least: so few registers does a thread get.
    blocks: u32,
    grid: Vec<Extent>,
}

impl File {
    /// The source. It says of what body it is, which names nothing that differs from layer to layer.
    fn launch(self, args: &[Arg], of: &[String]) -> LaunchSpec {
        let File { entry, about, headers, constants, body, threads, blocks, grid } = self;
        let mut source = format!("// {about}");
        if !of.is_empty() {
            source += ", for this body, in which %x0 is a0 and so on:";
        }
        source.push('\n');
        for line in of {
            source += &format!("//   {line}\n");
        }
        for (i, arg) in args.iter().enumerate() {
            source += &format!("// a{i} {}{}\n", super::mark(arg.access), arg.ty);
        }
        for header in headers {
            source += &format!("#include \"{header}\"\n");
        }
        source += &constants;
        let parameters = args.iter().enumerate().map(|(i, arg)| match arg.access {
            Access::Read => format!("const u8* a{i}, "),
            Access::Write | Access::Update | Access::Scratch => format!("u8* a{i}, "),
        });
        source += &format!(
            "\nKERNEL({entry}, {threads}, {blocks})({}i32 T, i32 R) {{\n",
            parameters.collect::<String>()
        );
        source += "    let_next_start();\n";
        for line in body.lines() {
            source += &format!("    {line}\n");
        }
        source += "}\n";
        LaunchSpec { code: Code::Hip(HipCode { source, entry, threads }), grid }
    }
}

impl Unit<'_> {
    fn arg(&self, id: ArgId) -> Result<&Arg, String> {
        let all = || self.spec.args.iter().chain(&self.workspace);
        all().nth(usize::from(id)).ok_or_else(|| format!("there is no argument {id}"))
    }

    fn ty(&self, id: ArgId) -> Result<&TensorType, String> {
        Ok(&self.arg(id)?.ty)
    }

    fn dim(&self, id: ArgId, axis: usize) -> Result<Dim, String> {
        let ty = self.ty(id)?;
        ty.shape.get(axis).copied().ok_or_else(|| format!("{ty} has no axis {axis}"))
    }

    /// A size that is the same in every step, as kernels count: in 32 bits.
    fn constant(&self, id: ArgId, axis: usize) -> Result<u32, String> {
        size(self.dim(id, axis)?)
    }

    /// What a kernel begins with that reads these before those before it are done: a wait, unless nothing writes them.
    fn waits_unless_given(&self, ids: impl IntoIterator<Item = ArgId>) -> &'static str {
        if ids.into_iter().all(|id| self.given.contains(&id)) { "" } else { WAIT }
    }

    fn layout(&self, id: ArgId) -> Layout {
        self.layouts.iter().find(|(arg, _)| *arg == id).map_or(Layout::RowMajor, |(_, layout)| *layout)
    }

    /// Room for the launches, as an argument.
    fn scratch(&mut self, ty: TensorType) -> ArgId {
        self.workspace.push(Arg::new(Access::Scratch, ty));
        (self.spec.args.len() + self.workspace.len() - 1) as ArgId
    }

    fn file(&mut self, headers: &[&'static str], threads: u32, grid: Vec<Extent>, body: String) {
        let n = self.files.len();
        // As C++ may call a function.
        let name = if self.spec.name() == "const" { "constant" } else { self.spec.name() };
        let entry = if n == 0 { name.to_string() } else { format!("{name}_{}", n + 1) };
        let about = format!("{}, launch {} of the kernel", self.spec.name(), n + 1);
        let headers = headers.to_vec();
        self.files.push(File {
            entry,
            about,
            headers,
            constants: String::new(),
            body,
            threads,
            blocks: 1,
            grid,
        });
    }

    /// An expression for where numbers of rows of `width` go that an argument has, floats or in blocks.
    fn store(&self, id: ArgId, width: u64) -> Result<String, String> {
        let ty = self.ty(id)?;
        match ty.dtype {
            DType::F32 => Ok(format!("StoreFloats<{width}>{{(float*)a{id}}}")),
            DType::Q8Act | DType::Q16Act => {
                Ok(format!("StoreQuantised<{}>{{{{a{id}}}}}", self.quantised(id, width)?))
            }
            other => Err(format!("results are f32, q8_act or q16_act, not {other}")),
        }
    }

    /// An expression for activations of rows of `width`.
    fn activations(&self, id: ArgId, width: u64) -> Result<String, String> {
        match self.ty(id)?.dtype {
            DType::F32 => Ok(format!("Floats<{width}>{{(const float*)a{id}}}")),
            DType::Q8Act | DType::Q16Act => {
                Ok(format!("Quantised<{}>{{(u8*)a{id}}}", self.quantised(id, width)?))
            }
            other => Err(format!("activations are f32, q8_act or q16_act, not {other}")),
        }
    }

    /// The parameters of `Quantised` for an argument's rows of `width`: as many as at the bounds, as those of all the program's steps have their scales
    /// after these.
    fn quantised(&self, id: ArgId, width: u64) -> Result<String, String> {
        let bytes = if self.ty(id)?.dtype == DType::Q16Act { ", 2" } else { "" };
        Ok(format!("{}, {width}{bytes}", self.rows(id, width)?))
    }

    /// Rows of `width` that an argument has at the bounds.
    fn rows(&self, id: ArgId, width: u64) -> Result<u64, String> {
        Ok(self.ty(id)?.elements(self.bounds) / width.max(1))
    }
}

/// A size that is the same in every step.
fn size(dim: Dim) -> Result<u32, String> {
    let n = dim.as_const().ok_or_else(|| format!("{dim} is no constant"))?;
    u32::try_from(n).ok().filter(|&n| n <= i32::MAX as u32).ok_or_else(|| format!("{n} is too large a size"))
}

/// How a kernel spells a size that it is told: one of the symbols, or a constant.
fn symbol(dim: Dim) -> Result<String, String> {
    match dim {
        Dim::T => Ok("T".into()),
        Dim::R => Ok("R".into()),
        dim => size(dim).map(|n| n.to_string()),
    }
}

/// How a kernel spells a format.
fn format_name(dtype: DType) -> String {
    dtype.name().to_uppercase()
}

/// How a kernel spells a layout.
fn layout_name(layout: Layout) -> Result<&'static str, String> {
    match layout {
        Layout::RowMajor => Ok("RowMajor"),
        Layout::Planes => Ok("Planes"),
        Layout::Interleaved16 => Err("GPUs read no rows that are interleaved".into()),
    }
}

/// How a kernel spells a float.
fn float(x: f32) -> String {
    format!("{x:?}f")
}

/// An address of floats, or null.
fn floats(id: Option<ArgId>) -> String {
    id.map_or("(const float*)nullptr".into(), |id| format!("(const float*)a{id}"))
}
