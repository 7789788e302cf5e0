//! Programs as people read them.

use super::spec::{Access, ArgId, Code, Implementation, Layout, Place, Program};
use std::fmt;

/// How an argument is touched: read unless marked.
pub fn mark(access: Access) -> &'static str {
    match access {
        Access::Read => "",
        Access::Write => ">",
        Access::Update => "&",
        Access::Scratch => "~",
    }
}

/// A kernel's name, its arguments, which may share memory, and the grid of each launch.
impl fmt::Display for Implementation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.spec.name())?;
        for (i, arg) in self.args().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{}{}", mark(arg.access), arg.ty)?;
            match self.layout(i as ArgId) {
                Layout::RowMajor => {}
                layout => write!(f, " {}", layout.name())?,
            }
        }
        f.write_str(")")?;
        for alias in &self.may_alias {
            write!(f, " {}={}", alias.write, alias.read)?;
        }
        for (i, launch) in self.launches.iter().enumerate() {
            f.write_str(if i == 0 { " grid" } else { ", then" })?;
            for extent in &launch.grid {
                match extent.per {
                    0 | 1 => write!(f, " {}", extent.dim)?,
                    per => write!(f, " {}/{per}", extent.dim)?,
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.bounds;
        writeln!(f, "program {:?} T<={} R<={}", self.name, at.t, at.r)?;
        writeln!(f, "kernels {} (> written, & updated, ~ scratch)", self.kernels.len())?;
        for (i, kernel) in self.kernels.iter().enumerate() {
            writeln!(f, "  k{i} {kernel}")?;
        }
        writeln!(f, "calls {}", self.calls.len())?;
        for (i, call) in self.calls.iter().enumerate() {
            let kernel = self.kernels.get(call.kernel as usize);
            write!(f, "  {i:>4}: k{} {}(", call.kernel, kernel.map_or("?", |k| k.spec.name()))?;
            for (n, buf) in call.args.iter().enumerate() {
                let comma = if n == 0 { "" } else { ", " };
                let access = kernel.and_then(|k| k.arg(n as u16)).map_or("", |a| mark(a.access));
                write!(f, "{comma}{access}")?;
                match self.buffers.get(*buf as usize).map(|b| &b.place) {
                    Some(Place::Weight { name, rows: Some(rows), .. }) => {
                        write!(f, "{name:?}[{}..]", rows.first)?;
                    }
                    Some(Place::Weight { name, .. } | Place::State { name, .. }) => write!(f, "{name:?}")?,
                    _ => write!(f, "b{buf}")?,
                }
            }
            writeln!(f, ")  {}", call.label)?;
        }
        for (i, kernel) in self.kernels.iter().enumerate() {
            for (n, launch) in kernel.launches.iter().enumerate() {
                if let Code::Hip(code) = &launch.code {
                    write!(f, "\nsource of k{i}, launch {}\n{}", n + 1, code.source)?;
                }
            }
        }
        Ok(())
    }
}
