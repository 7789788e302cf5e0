//! The checks that every kernel makes of its spec when it is bound.

use crate::codegen::spec::{
    Access, Alias, Arg, ArgId, Code, CpuCode, Extent, Implementation, Index, IndexSource, LaunchSpec, Layout,
};
use crate::ir::{DType, Dim, TensorType};
use thiserror::Error;

/// Why a spec has no kernel.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BindError {
    #[error("{role} is argument {arg}, but the kernel has {args}")]
    NoSuchArg { role: &'static str, arg: ArgId, args: usize },
    #[error("{role} (argument {arg}) must be {want:?}, not {have:?}")]
    Access { role: &'static str, arg: ArgId, want: Access, have: Access },
    #[error("{role} (argument {arg}) must be {want}, not {have}")]
    Type { role: &'static str, arg: ArgId, want: String, have: TensorType },
    #[error("the values of {role} (argument {arg}) must be {want}, not {have}")]
    Index { role: &'static str, arg: ArgId, want: String, have: String },
    #[error("argument {0} is written under two names")]
    WrittenTwice(ArgId),
    #[error("argument {0} is not used")]
    Unused(ArgId),
    #[error("argument {write} must not lie where argument {read} lies")]
    Alias { write: ArgId, read: ArgId },
    #[error("argument {arg} must not lie {}", layout.name())]
    Layout { arg: ArgId, layout: Layout },
    #[error("the launches must be {want}, not {have}")]
    Launches { want: String, have: String },
    #[error("{0}")]
    Parameter(String),
}

/// A failed check of a parameter.
pub(super) fn parameter<T>(why: impl Into<String>) -> Result<T, BindError> {
    Err(BindError::Parameter(why.into()))
}

/// A number of elements: above zero, and small enough that products of two and a block size cannot overflow.
pub(super) fn size(what: &str, n: u64) -> Result<usize, BindError> {
    match usize::try_from(n) {
        Ok(n) if (1..1 << 31).contains(&n) => Ok(n),
        _ => parameter(format!("{what} must lie in 1..2^31, not {n}")),
    }
}

/// The rows of a table: some in every step. A step has at least one token, but may want no results.
pub(super) fn table_rows(rows: Dim) -> Result<(), BindError> {
    match rows.as_const() {
        Some(rows) => size("the rows of the table", rows).map(|_| ()),
        None if rows.c > 0 || rows.t > 0 => Ok(()),
        None => parameter(format!("a table may have no rows, as it has {rows}")),
    }
}

/// Formats that weights come in.
pub(super) const WEIGHTS: &[DType] = &DType::WEIGHTS;
/// Formats of a cache.
pub(super) const CACHES: &[DType] = &[DType::F32, DType::F16];
/// Formats of activations.
pub(super) const ACTIVATIONS: &[DType] = &[DType::F32, DType::Q8Act];

/// Walks over the arguments of an implementation as a kernel names them.
pub(super) struct Binding<'a> {
    kernel: &'a Implementation,
    args: Vec<&'a Arg>,
    /// How many parts each argument has in the kernel.
    roles: Vec<usize>,
    /// Arguments that may lie in any layout that fits them.
    any_layout: Vec<ArgId>,
    /// Pairs (write, read) that may share memory, once for each part that allows it.
    safe: Vec<(ArgId, ArgId)>,
}

impl<'a> Binding<'a> {
    pub fn new(kernel: &'a Implementation) -> Result<Binding<'a>, BindError> {
        let args: Vec<&Arg> = kernel.args().collect();
        for (i, arg) in args.iter().enumerate() {
            if !arg.ty.is_blocked() {
                let want = format!("whole blocks of {} elements a row", arg.ty.dtype.block_len());
                return Err(BindError::Type {
                    role: "a tensor",
                    arg: i as ArgId,
                    want,
                    have: arg.ty.clone(),
                });
            }
        }
        Ok(Binding { kernel, roles: vec![0; args.len()], args, any_layout: vec![], safe: vec![] })
    }

    fn find(&self, role: &'static str, arg: ArgId) -> Result<&'a Arg, BindError> {
        let args = self.args.len();
        self.args.get(usize::from(arg)).copied().ok_or(BindError::NoSuchArg { role, arg, args })
    }

    /// The type of an argument that is still to be checked, where it decides what others must be.
    pub fn ty(&self, role: &'static str, arg: ArgId) -> Result<&'a TensorType, BindError> {
        Ok(&self.find(role, arg)?.ty)
    }

    /// An argument that must have this access. One that is not only read must have but one role.
    fn touched(&mut self, role: &'static str, arg: ArgId, want: Access) -> Result<&'a Arg, BindError> {
        let found = self.find(role, arg)?;
        if found.access != want {
            return Err(BindError::Access { role, arg, want, have: found.access });
        }
        let roles = &mut self.roles[usize::from(arg)];
        *roles += 1;
        if *roles > 1 && want != Access::Read {
            return Err(BindError::WrittenTwice(arg));
        }
        Ok(found)
    }

    /// The type of an argument that must have this access, and whose values the kernel does not follow.
    pub fn arg(&mut self, role: &'static str, arg: ArgId, want: Access) -> Result<&'a TensorType, BindError> {
        let found = self.touched(role, arg, want)?;
        match &found.index {
            None => Ok(&found.ty),
            have => Err(BindError::Index { role, arg, want: held(None), have: held(have.as_ref()) }),
        }
    }

    /// Values that the kernel reads by, or writes by if they are `distinct`. Those must be inputs of the step: only of inputs is
    /// it checked.
    pub fn index(
        &mut self,
        role: &'static str,
        arg: ArgId,
        shape: &[Dim],
        below: Dim,
        distinct: bool,
    ) -> Result<(), BindError> {
        let found = self.touched(role, arg, Access::Read)?;
        exactly(role, arg, &found.ty, &[DType::I32], shape)?;
        let held_so = |i: &Index| {
            i.below == below && i.distinct == distinct && !(distinct && i.source == IndexSource::Device)
        };
        if found.index.as_ref().is_some_and(held_so) {
            return Ok(());
        }
        let want = held(Some(&Index { below, distinct, source: IndexSource::Input }));
        Err(BindError::Index { role, arg, want, have: held(found.index.as_ref()) })
    }

    /// Integers, one for each token, that the kernel does not follow; another part may.
    pub fn per_token(&mut self, role: &'static str, arg: ArgId, tokens: Dim) -> Result<(), BindError> {
        let found = self.touched(role, arg, Access::Read)?;
        exactly(role, arg, &found.ty, &[DType::I32], &[tokens]).map(|_| ())
    }

    /// An argument of exactly one shape.
    pub fn exact(
        &mut self,
        role: &'static str,
        arg: ArgId,
        access: Access,
        dtypes: &[DType],
        shape: &[Dim],
    ) -> Result<DType, BindError> {
        let have = self.arg(role, arg, access)?;
        exactly(role, arg, have, dtypes, shape)
    }

    /// Rows of `n` elements, which may be split into heads, one for each token; tells the number of tokens.
    pub fn tokens(
        &mut self,
        role: &'static str,
        arg: ArgId,
        access: Access,
        dtypes: &[DType],
        tokens: Option<Dim>,
        n: usize,
    ) -> Result<(DType, Dim), BindError> {
        let have = self.arg(role, arg, access)?;
        if let Some((&first, rest)) = have.shape.split_first()
            && dtypes.contains(&have.dtype)
            && tokens.is_none_or(|t| t == first)
            && product(rest) == Some(n as u64)
            && !rest.is_empty()
        {
            return Ok((have.dtype, first));
        }
        let tokens = tokens.map_or("T".to_string(), |t| t.to_string());
        Err(BindError::Type {
            role,
            arg,
            want: format!("{}[{tokens},{n}]", names(dtypes)),
            have: have.clone(),
        })
    }

    /// How an argument lies in memory, for a kernel that takes it in any layout.
    pub fn layout(&mut self, arg: ArgId) -> Layout {
        self.any_layout.push(arg);
        self.kernel.layout(arg)
    }

    /// Allows `write` to lie where `read` lies, if the spec says so and their sizes agree.
    pub fn may_alias(&mut self, write: ArgId, read: ArgId) {
        let ty = |arg: ArgId| self.args.get(usize::from(arg)).map(|a| &a.ty);
        let dtype = |arg| ty(arg).map(|t| t.dtype);
        if dtype(write) == dtype(read) {
            self.safe.push((write, read));
        }
    }

    /// Ends the checks of a kernel that is one launch with this grid.
    pub fn done(self, grid: &[Extent]) -> Result<(), BindError> {
        self.done_by(&[(CpuCode::Whole, grid.to_vec())])
    }

    /// Ends the checks: the launches must be these, every argument have a part and lie as all parts take it, and every alias be one
    /// that all parts of what is read allow.
    pub fn done_by(self, want: &[(CpuCode, Vec<Extent>)]) -> Result<(), BindError> {
        let telling = |grid: &[Extent]| {
            grid.iter().filter(|e| e.dim.as_const() != Some(1)).copied().collect::<Vec<_>>()
        };
        let as_wanted = |(launch, (code, grid)): (&LaunchSpec, &(CpuCode, Vec<Extent>))| {
            launch.code == Code::Cpu(*code)
                && telling(&launch.grid) == telling(grid)
                && launch.grid.iter().all(|e| e.per > 0)
        };
        let have = &self.kernel.launches;
        if have.len() != want.len() || !have.iter().zip(want).all(as_wanted) {
            let have = have.iter().map(|l| show(&format!("{:?}", l.code), &l.grid)).collect::<Vec<_>>();
            let want = want.iter().map(|(c, grid)| show(&format!("{:?}", Code::Cpu(*c)), grid));
            let want = want.collect::<Vec<_>>();
            return Err(BindError::Launches { want: want.join(", "), have: have.join(", ") });
        }
        if let Some(i) = self.roles.iter().position(|roles| *roles == 0) {
            return Err(BindError::Unused(i as ArgId));
        }
        for (i, (arg, layout)) in self.kernel.layouts.iter().enumerate() {
            let ty = self.args.get(usize::from(*arg)).map(|arg| &arg.ty);
            let parts = self.any_layout.iter().filter(|any| *any == arg).count();
            let taken = parts > 0 && Some(&parts) == self.roles.get(usize::from(*arg));
            let once = self.kernel.layouts[..i].iter().all(|(other, _)| other != arg);
            let fits = *layout == Layout::Interleaved16 && ty.is_some_and(|ty| layout.fits(ty));
            if !taken || !once || !fits {
                return Err(BindError::Layout { arg: *arg, layout: *layout });
            }
        }
        let allowed = |a: &Alias| {
            let parts = self.safe.iter().filter(|pair| **pair == (a.write, a.read)).count();
            parts > 0 && Some(&parts) == self.roles.get(usize::from(a.read))
        };
        match self.kernel.may_alias.iter().find(|a| !allowed(a)) {
            Some(a) => Err(BindError::Alias { write: a.write, read: a.read }),
            None => Ok(()),
        }
    }
}

/// The product of constant dimensions, none of them zero.
pub(super) fn product(dims: &[Dim]) -> Option<u64> {
    dims.iter().try_fold(1u64, |n, d| n.checked_mul(d.as_const().filter(|d| *d > 0)?))
}

/// All dimensions but the last, each an extent.
pub(super) fn rows_grid(shape: &[Dim]) -> Vec<Extent> {
    shape.split_last().map_or(&[][..], |(_, rows)| rows).iter().map(|d| Extent::each(*d)).collect()
}

/// The element type of a tensor that must have one of `dtypes` and this shape.
fn exactly(
    role: &'static str,
    arg: ArgId,
    have: &TensorType,
    dtypes: &[DType],
    shape: &[Dim],
) -> Result<DType, BindError> {
    if dtypes.contains(&have.dtype) && have.shape == shape {
        return Ok(have.dtype);
    }
    let shape = shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(",");
    let want = format!("{}[{shape}]", names(dtypes));
    Err(BindError::Type { role, arg, want, have: have.clone() })
}

/// What the values of an argument are held to, in words.
fn held(index: Option<&Index>) -> String {
    let Some(Index { below, distinct, source }) = index else { return "of any kind".into() };
    let distinct = if *distinct { ", each once" } else { "" };
    let source = if *source == IndexSource::Device { ", computed" } else { "" };
    format!("below {below}{distinct}{source}")
}

fn names(dtypes: &[DType]) -> String {
    dtypes.iter().map(|d| d.name()).collect::<Vec<_>>().join("|")
}

fn show(code: &str, grid: &[Extent]) -> String {
    let one = |e: &Extent| if e.per == 1 { e.dim.to_string() } else { format!("({})/{}", e.dim, e.per) };
    format!("{code} over [{}]", grid.iter().map(one).collect::<Vec<_>>().join(", "))
}
