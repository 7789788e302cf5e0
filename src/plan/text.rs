//! Plans as people read them.

use super::{BufRef, Plan, PlannedCall, PlannedProgram, kind_name};
use crate::codegen::mark;
use crate::codegen::spec::{ArgId, Layout};
use std::fmt;

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { model, target, options, .. } = self;
        writeln!(f, "plan by sinter {}, kernels {:.12}", self.engine, self.kernels_hash)?;
        let source = model.source.as_deref().unwrap_or("embedded");
        writeln!(f, "model   {:?} ({}), {source}: {}", model.name, model.architecture, model.identity)?;
        writeln!(f, "target  {} ({})", target.name, kind_name(target.kind))?;
        write!(f, "options context {}, sequences {}, ", options.context, options.sequences)?;
        write!(f, "chunk {}, kv {}", options.chunk, options.kv)?;
        for (on, name) in [(options.exact, "exact"), (options.greedy, "greedy")] {
            if on {
                write!(f, ", {name}")?;
            }
        }
        let (pool, weights) = (self.pool_bytes(), self.weight_bytes());
        writeln!(f, "\npool    {pool} bytes: states {}, arena {}", self.arena_offset, self.arena_bytes)?;
        for state in &self.states {
            writeln!(f, "  @{:<10} {:?} {} {}", state.offset, state.name, state.ty, state.role.name())?;
        }
        writeln!(f, "weights {} ({weights} bytes)", self.weights.len())?;
        for weight in &self.weights {
            write!(f, "  {:?} {}", weight.name, weight.ty)?;
            if let Some(rows) = weight.rows {
                write!(f, " from {} of {}", rows.first, rows.of)?;
            }
            match weight.layout {
                Layout::RowMajor => writeln!(f)?,
                layout => writeln!(f, " {}", layout.name())?,
            }
        }
        writeln!(f, "kernels {}", self.kernels.len())?;
        for (i, kernel) in self.kernels.iter().enumerate() {
            writeln!(f, "  k{i} {}", kernel)?;
        }
        if let Some(object) = self.objects.first() {
            let bytes: usize = self.objects.iter().map(|object| object.code.len()).sum();
            writeln!(f, "objects {} ({bytes} bytes) by {}", self.objects.len(), object.compiler)?;
        }
        for program in &self.programs {
            write!(f, "program {:?} ", program.name)?;
            self.fmt_program(f, program)?;
        }
        Ok(())
    }
}

impl Plan {
    fn fmt_program(&self, f: &mut fmt::Formatter<'_>, program: &PlannedProgram) -> fmt::Result {
        let at = program.bounds;
        writeln!(f, "T<={} R<={}", at.t, at.r)?;
        writeln!(f, "  arena {} bytes, {} live at once", program.arena_bytes, program.lower_bound)?;
        for (i, buffer) in program.buffers.iter().enumerate() {
            let end = buffer.offset.saturating_add(buffer.ty.bytes(&at));
            write!(f, "  b{i} {} @{}..{end}", buffer.ty, buffer.offset)?;
            for input in program.inputs.iter().filter(|x| x.buffer as usize == i) {
                write!(f, " input %{}", input.name)?;
                if let Some(below) = input.below {
                    write!(f, " < {below}")?;
                }
                if input.distinct {
                    write!(f, " distinct")?;
                }
            }
            for (r, _) in program.results.iter().enumerate().filter(|(_, b)| **b as usize == i) {
                write!(f, " result {r}")?;
            }
            writeln!(f)?;
        }
        for (i, call) in program.calls.iter().enumerate() {
            write!(f, "  {i:>4}: ")?;
            self.fmt_call(f, call)?;
        }
        writeln!(f, "  decisions: {}", program.report.decisions.len())
    }

    fn fmt_call(&self, f: &mut fmt::Formatter<'_>, call: &PlannedCall) -> fmt::Result {
        let slot = &call.slot;
        if self.target.streams > 1 {
            write!(f, "stream {} ", slot.stream)?;
        }
        for event in &slot.waits {
            write!(f, "wait e{event} ")?;
        }
        let kernel = self.kernels.get(call.kernel as usize);
        write!(f, "k{} {}(", call.kernel, kernel.map_or("?", |k| k.spec.name()))?;
        for (i, arg) in call.args.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            let access = kernel.and_then(|k| k.arg(i as ArgId)).map_or("", |a| mark(a.access));
            write!(f, "{comma}{access}")?;
            let name = |name: Option<&String>| name.map_or("?", String::as_str).to_owned();
            match *arg {
                BufRef::Arena(b) => write!(f, "b{b}")?,
                BufRef::State(s) => write!(f, "{:?}", name(self.states.get(s as usize).map(|s| &s.name)))?,
                BufRef::Weight(w) => {
                    let weight = self.weights.get(w as usize);
                    write!(f, "{:?}", name(weight.map(|w| &w.name)))?;
                    if let Some(rows) = weight.and_then(|w| w.rows) {
                        write!(f, "[{}..]", rows.first)?;
                    }
                }
            }
        }
        f.write_str(")")?;
        if let Some(event) = slot.signals {
            write!(f, " signal e{event}")?;
        }
        writeln!(f, "  {}", call.label)
    }
}
