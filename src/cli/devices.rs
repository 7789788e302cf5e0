//! `sinter devices`: what can run here.

use sinter::runtime::cpu::Features;
use sinter::runtime::device::Size;
use sinter::runtime::hip::gpus;
use sinter::target::Target;
use std::io::Write;

pub fn run() -> super::Outcome {
    let mut out = std::io::stdout().lock();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    writeln!(out, "cpu    {} ({threads} threads)", Features::detect().name())?;
    match gpus() {
        Ok((gpus, broken)) => {
            for gpu in gpus {
                let memory = match gpu.memory() {
                    Ok((free, all)) => format!("{} of {} free", Size(free), Size(all)),
                    Err(e) => e.to_string(),
                };
                let without = if Target::gpu(&gpu.arch).is_none() { ", no kernels for it" } else { "" };
                writeln!(
                    out,
                    "hip:{}  {} ({}, platform {}, driver {}{without}): {memory}",
                    gpu.ordinal,
                    gpu.name,
                    gpu.arch,
                    gpu.platform.name(),
                    gpu.driver_version(),
                )?;
            }
            if let Some(e) = broken {
                writeln!(out, "hip    no more: {e}")?;
            }
        }
        Err(e) => writeln!(out, "hip    none: {e}")?,
    }
    Ok(())
}
