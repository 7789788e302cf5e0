//! What is compiled for: targets by name, from files, and of the devices here as they were measured.

use super::args::Device;
use sinter::runtime::hip::{Gpu, gpu};
use sinter::target::{self, Target};
use sinter::{bench, tune};
use std::path::Path;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The target of a name: `cpu` is the one here, `hip` and `hip:NUMBER` a GPU here, both by the rates that were measured of them if some
/// were; others are built in, or come from a JSON file.
pub fn find(name: &str) -> Result<Target, Error> {
    match name.parse() {
        Ok(Device::Cpu) => tuned(Target::cpu(), &tune::cpu(bench::cores())),
        Ok(Device::Hip(number)) => {
            let gpu = gpu(number)?;
            tuned(of_gpu(&gpu)?, &gpu.name)
        }
        Err(_) => named(name),
    }
}

/// A built-in target, or one from a JSON file.
fn named(name: &str) -> Result<Target, Error> {
    if let Some(target) = Target::named(name) {
        return Ok(target);
    }
    if !name.ends_with(".json") {
        return Err(format!(
            "there is no target {name:?}; there are {}, {}, their relatives {}, sm_80 and later, hip and hip:NUMBER for a GPU here, or a .json file",
            target::NAMES.join(", "),
            target::AMD.join(", "),
            target::AMD_RELATIVES.map(|(arch, _)| arch).join(", ")
        )
        .into());
    }
    read(Path::new(name))
}

/// The target of a GPU, as nobody measured it.
pub fn of_gpu(gpu: &Gpu) -> Result<Target, Error> {
    let Gpu { name, arch, .. } = gpu;
    Ok(Target::gpu(arch).ok_or_else(|| format!("{name} is {arch}, for which there are no kernels"))?)
}

/// The target as it was measured on a device of this name, if it was. What was kept but makes no sense is said, and left alone: it must
/// not keep anything from running.
pub fn tuned(target: Target, device: &str) -> Result<Target, Error> {
    let Some(path) = tune::path_of(device).filter(|path| path.is_file()) else { return Ok(target) };
    let is_of_it =
        |found: &Target| (found.kind, &found.arch) == (target.kind, &target.arch) && found.measured.is_some();
    let why = match read(&path) {
        Ok(found) if is_of_it(&found) => return Ok(found),
        Ok(_) => format!("{} is not what sinter tune measured of {device}", path.display()),
        Err(e) => e.to_string(),
    };
    super::say!("{why}; built-in rates are used (sinter tune measures anew)");
    Ok(target)
}

fn read(path: &Path) -> Result<Target, Error> {
    let name = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| format!("target file {name}: {e}"))?;
    let target: Target = serde_json::from_str(&text).map_err(|e| format!("target file {name}: {e}"))?;
    target.validate()?;
    Ok(target)
}
