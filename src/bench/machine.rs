//! What speeds are measured on and with.

use super::run::{GpuHardware, Hardware, Software};
use crate::runtime::hip::{Compiler, Gpu, HipError};
use std::num::NonZeroUsize;

/// The processor as Linux names it, or its architecture.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_string()
}

/// The processors that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Bytes of memory, where Linux tells.
fn memory_bytes() -> Option<u64> {
    total(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// Of `MemTotal:    8165492 kB`.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

impl Hardware {
    /// This machine, with kernels for `isa`, which run on `gpu` if there is one.
    ///
    /// # Errors
    /// If the GPU's driver does not tell its memory.
    pub fn here(isa: &str, gpu: Option<&Gpu>) -> Result<Hardware, HipError> {
        let gpu = match gpu {
            Some(gpu) => Some(GpuHardware { name: gpu.name.clone(), memory_bytes: gpu.memory()?.1 }),
            None => None,
        };
        let memory_bytes = memory_bytes();
        Ok(Hardware { cpu: cpu_name(), cores: cores(), memory_bytes, isa: isa.to_string(), gpu })
    }
}

impl Software {
    /// What is installed here.
    pub fn here(gpu: Option<&Gpu>) -> Software {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Software {
            sinter: env!("CARGO_PKG_VERSION").to_string(),
            os: format!("{} {release}", std::env::consts::OS).trim().to_string(),
            driver: gpu.map(|gpu| format!("{} {}", gpu.platform.name(), gpu.driver)),
            // A plan that has its kernels compiled runs without any.
            compiler: gpu
                .and_then(|gpu| Compiler::of_platform(gpu.platform).ok())
                .map(|compiler| compiler.name().to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_found_among_what_linux_tells() {
        assert_eq!(total("MemFree: 1 kB\nMemTotal:        8165492 kB\n"), Some(8_165_492 * 1024));
        for other in ["", "MemTotal: many kB", "MemTotal: 5 pages", "MemTotal: 18446744073709551615 kB"] {
            assert_eq!(total(other), None, "{other}");
        }
    }
}
