//! What a target can do and what things cost there: plain data, read by passes and codegen.

mod halves;
mod measured;

pub use halves::{HalfTile, HalfTiles};
pub use measured::{Losing, Measured, MeasuredTime};

use crate::ir::{DType, Kernel};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The kind of device that a plan is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetKind {
    Cpu,
    HipAmd,
    HipNvidia,
}

/// Tokens of a step up to which a GPU goes over each weight once (twice for more than half as many, of activations in two bytes), row by row, and splits attention over positions; more go in tiles.
pub const FEW_TOKENS: u64 = 8;

/// Tokens of a step up to which attention turns its queries and keys itself. Each block turns those of the step that it may meet: of eight
/// tokens that costs an H200 1.3 % of its speed, of four nothing, of two it gains 1 % and of one 3 %.
pub const TURNED_TOKENS: u64 = 4;

/// Whether attention of so many tokens takes a GPU one launch, rather than one for the parts of the positions and one to join them.
pub fn attends_at_once(tokens: u64, head_dim: u64, quantised: bool) -> bool {
    // What is quantised goes in runs of 32 columns, which heads of other widths share.
    tokens > FEW_TOKENS && (head_dim.is_multiple_of(32) || !quantised)
}

/// Bytes of shared memory that a block may have on any GPU that is a target.
pub const SHARED_BYTES: u64 = 48 << 10;

/// Threads of a block that attends for a few tokens.
pub const ATTENDING: u32 = 256;
/// Heads of a group that share what they read, at most: each takes registers, and four of them so many that half as many blocks run at
/// once, which on an H200 takes longer than to read twice.
const SHARED_HEADS: u64 = 2;

/// How many heads of a group share a block of attention of a few tokens, which turns the queries and so many tokens' keys and values (of
/// so many bytes an element) itself if there are any; none where shared memory is too small for one.
pub fn heads_at_once(wave: u32, group: u64, head_dim: u64, turned: (u64, u64)) -> Option<u64> {
    let (tokens, element) = turned;
    let fits = |heads: u64| {
        // What each warp found, as `attend_part` of `kernels/attention.h` has it, and `Turning::Room` of `kernels/rope_attention.h`.
        let found = u64::from(ATTENDING / wave.max(1)) * heads * (head_dim + 2) * 4;
        let queries = if tokens > 0 { heads * head_dim * 4 } else { 0 };
        found + queries + 2 * tokens * head_dim * element <= SHARED_BYTES
    };
    (1..=group.min(SHARED_HEADS)).rev().find(|heads| group.is_multiple_of(*heads) && fits(*heads))
}

/// A device as the compiler sees it. `sinter` reads one from JSON wherever it takes a target name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    pub name: String,
    pub kind: TargetKind,
    /// Token rows for which a program of its own is compiled, ascending; the chunk is the last. A step runs in the smallest that
    /// holds it.
    #[serde(default = "default_buckets")]
    pub buckets: Vec<u64>,
    /// The architecture that kernels are compiled for, as its compiler names it; empty for the CPU.
    #[serde(default)]
    pub arch: String,
    /// Lanes of a GPU that run in step; 1 where there is no such thing.
    #[serde(default = "default_wave")]
    pub wave: u32,
    /// Streams that calls may be spread over.
    pub streams: u32,
    /// Memory bandwidth in GB/s (1e9 bytes).
    pub bandwidth_gbs: f64,
    /// What one launch costs beside its work, in microseconds.
    pub launch_us: f64,
    /// Rate of float32 arithmetic, in 1e9 operations per second.
    pub f32_gflops: f64,
    /// Rate of 8-bit integer dot products in 1e9 operations per second; none if the target lacks them.
    pub dot4_gops: Option<f64>,
    /// Rate of the matrix units of a GPU over numbers in 16 bits, in 1e9 operations per second; that of float32 where nobody said.
    #[serde(default)]
    pub f16_gflops: Option<f64>,
    /// To what the activations of many tokens are rounded that meet quantised weights: [`DType::Q8Act`], or F16 where a GPU has matrix units of those.
    #[serde(default = "default_activations")]
    pub prompt_activations: DType,
    /// Layers, from the first on, whose activations of a GPU's step of up to [`FEW_TOKENS`] are in [`DType::Q16Act`] where others are in
    /// [`DType::Q8Act`].
    #[serde(default)]
    pub fine_layers: u64,
    /// Tokens of a step of up to [`FEW_TOKENS`] from which a GPU's matrix units multiply sixteen rows of a quantised weight with all of them; none where its
    /// lanes do, row by row. Kernels of that are NVIDIA's.
    #[serde(default)]
    pub units_from: Option<u64>,
    /// How a GPU's matvecs go over weights of a format, where that was measured; elsewhere they are portable ([`Target::shape`]).
    #[serde(default)]
    pub shapes: BTreeMap<DType, MatvecShape>,
    /// Share of bandwidth and arithmetic that a fused kernel reaches, by kernel; 1 where absent.
    #[serde(default)]
    pub efficiency: BTreeMap<Kernel, f64>,
    /// Share of its speed that a matmul keeps when its epilogue adds a residual.
    pub residual_epilogue: f64,
    /// What was measured on the device; none of a target that was written down.
    #[serde(default)]
    pub measured: Option<Measured>,
}

/// How a matvec of up to [`FEW_TOKENS`] tokens goes over the rows of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatvecShape {
    /// Rows that a group of lanes takes at once: 1 or 2. Two share what they read of the activations, and need twice the registers; of more than two
    /// tokens in two bytes it is 1.
    pub rows: u64,
    /// Pairs of a gate's and an up's rows that it takes at once of one token; of more tokens it is `rows`.
    pub pairs: u64,
    /// Warps that share a row of one token: 1, 2 or 4, in launches of fewer than [`FEW_ROWS`], whose sums are stored.
    #[serde(default = "two_warps")]
    pub warps: u64,
}

/// Rows of a launch with which a GPU is busy though each has but one warp. (An H200, one token: two warps a row
/// save 1 to 11 % of a step of a 1B model, whose launches are of 2048 rows, and cost 1 to 6 % of one of a 7B and an 8B, where they are of 4096.)
pub const FEW_ROWS: u64 = 4096;

/// Threads of a matvec's block that stores sums: small blocks, so that no multiprocessor waits for the last one long.
pub const STORING: u32 = 128;

fn two_warps() -> u64 {
    2
}

/// On an H200 a step of one token of a 1B model in Q8_0 takes 603 µs so, and 630 after 480 tokens; with two rows and one pair at once 644 and
/// 622, with two pairs 730 and 750. With two pairs Q4_0 runs 0.94 times as fast as with one.
fn measured_shapes() -> BTreeMap<DType, MatvecShape> {
    BTreeMap::from([(DType::Q8_0, MatvecShape { rows: 1, pairs: 2, warps: 2 })])
}

/// See [`Target::units_from`].
const UNITS_FROM: u64 = 2;

/// What the first layer rounds is in all that come after. (llama-3.2-1b of random weights, 24 tokens on a CPU: logits are 6.7e-2 from exact ones with all
/// activations in 8 bits, 3.4e-2 with those of the first layer in float, 2.7e-2 of the first two; a 13M model's divergence is 8.7e-4, 5.0e-4 and less.)
const FINE_LAYERS: u64 = 2;

/// One token, and as many as a matvec takes without reading its weight again.
fn default_buckets() -> Vec<u64> {
    vec![1, 8]
}

/// A graph is captured for each of the few, so they are close; then what one tile of tokens holds, for which tiles of weights are others
/// than for many.
fn gpu_buckets() -> Vec<u64> {
    vec![1, 2, 4, 8, 64]
}

fn default_activations() -> DType {
    DType::Q8Act
}

fn default_wave() -> u32 {
    32
}

/// The targets that `--target` knows by name.
pub const NAMES: [&str; 3] = ["cpu", "test-cpu", "test-wave32"];

/// AMD's architectures that [`Target::gpu`] knows, beside their [`AMD_RELATIVES`]; of NVIDIA's it takes `sm_80` and all later ones.
pub const AMD: [&str; 8] =
    ["gfx900", "gfx906", "gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1151", "gfx1201"];

/// Architectures that differ from one of [`AMD`] by what a card has of everything, or by an instruction that `kernels/device.h` knows of: they are
/// targets with the rates and the choices of that one.
pub const AMD_RELATIVES: [(&str, &str); 12] = [
    ("gfx908", "gfx90a"),
    ("gfx1031", "gfx1030"),
    ("gfx1032", "gfx1030"),
    ("gfx1034", "gfx1030"),
    ("gfx1035", "gfx1030"),
    ("gfx1036", "gfx1030"),
    ("gfx1101", "gfx1100"),
    ("gfx1102", "gfx1100"),
    ("gfx1103", "gfx1100"),
    ("gfx1150", "gfx1151"),
    ("gfx1152", "gfx1151"),
    ("gfx1200", "gfx1201"),
];

impl Target {
    /// A built-in target, by name.
    pub fn named(name: &str) -> Option<Target> {
        match name {
            "cpu" => Some(Target::cpu()),
            "test-cpu" => Some(Target::test_cpu()),
            "test-wave32" => Some(Target::test_wave32()),
            arch => Target::gpu(arch),
        }
    }

    /// A GPU, by its architecture. Of those that nobody measured, rates are another's ([`Target::whose_rates`]), and what is chosen by
    /// them is portable.
    pub fn gpu(arch: &str) -> Option<Target> {
        let amd = |wave, bandwidth_gbs, f32_gflops, dot4_gops| {
            let target = Target {
                name: arch.into(),
                kind: TargetKind::HipAmd,
                arch: arch.into(),
                buckets: gpu_buckets(),
                wave,
                streams: 1,
                bandwidth_gbs,
                // Of a node of a graph that depends on the one before it (rocm-systems 10834).
                launch_us: 3.9,
                f32_gflops,
                dot4_gops,
                // Matrix units of such cards do as many of either.
                f16_gflops: dot4_gops.filter(|_| halves::has_units(arch)),
                prompt_activations: halves::prompt_activations(arch),
                fine_layers: FINE_LAYERS,
                units_from: None,
                shapes: BTreeMap::new(),
                efficiency: BTreeMap::new(),
                residual_epilogue: 1.0,
                measured: None,
            };
            Some(target)
        };
        let relative = AMD_RELATIVES.iter().find(|(name, _)| *name == arch);
        match relative.map_or(arch, |(_, of)| *of) {
            "gfx900" => amd(64, 480.0, 12_000.0, None),
            "gfx906" => amd(64, 1_000.0, 13_000.0, Some(53_000.0)),
            "gfx90a" => amd(64, 1_600.0, 23_000.0, Some(90_000.0)),
            "gfx942" => amd(64, 5_300.0, 80_000.0, Some(320_000.0)),
            "gfx1030" => amd(32, 510.0, 23_000.0, Some(90_000.0)),
            "gfx1100" => amd(32, 960.0, 61_000.0, Some(120_000.0)),
            "gfx1151" => amd(32, 256.0, 29_000.0, Some(59_000.0)),
            "gfx1201" => amd(32, 640.0, 48_000.0, Some(97_000.0)),
            _ => {
                let capability: u32 = arch.strip_prefix("sm_")?.parse().ok().filter(|n| *n >= 80)?;
                Some(Target {
                    name: format!("sm_{capability}"),
                    kind: TargetKind::HipNvidia,
                    arch: format!("sm_{capability}"),
                    buckets: gpu_buckets(),
                    wave: 32,
                    streams: 1,
                    // An H200's, measured.
                    bandwidth_gbs: 4_280.0,
                    launch_us: 1.2,
                    f32_gflops: 60_000.0,
                    dot4_gops: Some(240_000.0),
                    // Of a prompt of 512 tokens of an 8B in F16.
                    f16_gflops: Some(260_000.0),
                    prompt_activations: halves::prompt_activations(&format!("sm_{capability}")),
                    fine_layers: FINE_LAYERS,
                    units_from: Some(UNITS_FROM),
                    shapes: if capability == 90 { measured_shapes() } else { BTreeMap::new() },
                    efficiency: BTreeMap::new(),
                    residual_epilogue: 1.0,
                    measured: None,
                })
            }
        }
    }

    /// Whose the rates are that a built-in GPU has.
    pub fn whose_rates(&self) -> &'static str {
        match self.kind {
            TargetKind::HipNvidia => "an H200's",
            TargetKind::HipAmd | TargetKind::Cpu => "of a card of its generation",
        }
    }

    /// Whether it is a GPU whose rates and shapes of kernels nobody measured: those are another's, and portable.
    pub fn is_unmeasured(&self) -> bool {
        // A target of another name has rates that somebody wrote down.
        self.kind != TargetKind::Cpu
            && self.measured.is_none()
            && self.name == self.arch
            && self.arch != "sm_90"
    }

    /// The host's processor. Rates are those of two cores of a server with AVX2; only their ratios matter
    /// to the passes.
    pub fn cpu() -> Target {
        Target {
            name: "cpu".into(),
            kind: TargetKind::Cpu,
            buckets: default_buckets(),
            arch: String::new(),
            wave: 1,
            streams: 1,
            bandwidth_gbs: 27.0,
            launch_us: 1.0,
            f32_gflops: 60.0,
            dot4_gops: Some(120.0),
            f16_gflops: None,
            prompt_activations: default_activations(),
            fine_layers: 0,
            units_from: None,
            shapes: BTreeMap::new(),
            efficiency: BTreeMap::new(),
            residual_epilogue: 1.0,
            measured: None,
        }
    }

    /// A frozen, made-up processor for goldens of what only a CPU has so far: kernels and plans.
    pub fn test_cpu() -> Target {
        Target {
            name: "test-cpu".into(),
            kind: TargetKind::Cpu,
            buckets: default_buckets(),
            arch: String::new(),
            wave: 1,
            streams: 1,
            bandwidth_gbs: 27.0,
            launch_us: 1.0,
            f32_gflops: 60.0,
            dot4_gops: Some(120.0),
            f16_gflops: None,
            prompt_activations: default_activations(),
            fine_layers: 0,
            units_from: None,
            shapes: BTreeMap::new(),
            efficiency: BTreeMap::new(),
            residual_epilogue: 1.0,
            measured: None,
        }
    }

    /// A frozen, made-up GPU for goldens, so that tuning real targets does not churn them.
    ///
    /// Its gate-and-up kernel reaches 31 % of the speed of the plain matmuls, as a public fork for RDNA4 measured
    /// (20 % of bandwidth against 65 %), so small models fuse it for the launch and large ones do not.
    pub fn test_wave32() -> Target {
        Target {
            name: "test-wave32".into(),
            kind: TargetKind::HipAmd,
            buckets: default_buckets(),
            arch: "gfx1100".into(),
            wave: 32,
            streams: 1,
            bandwidth_gbs: 800.0,
            launch_us: 4.0,
            f32_gflops: 30_000.0,
            dot4_gops: Some(120_000.0),
            f16_gflops: None,
            prompt_activations: default_activations(),
            fine_layers: 0,
            units_from: None,
            shapes: BTreeMap::new(),
            efficiency: BTreeMap::from([(Kernel::MatmulSwiglu, 0.31)]),
            residual_epilogue: 0.95,
            measured: None,
        }
    }

    /// How matvecs go over weights of a format. Portable: of formats whose chunks are of 64 columns two rows share what they meet, which on
    /// an H200 makes 2 to 4 TB/s of 1.7 to 2.6; of the others that is slower.
    pub fn shape(&self, format: DType) -> MatvecShape {
        let rows = match format {
            DType::Q2_K | DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::Q6_K => 2,
            _ => 1,
        };
        let portable = MatvecShape { rows, pairs: rows, warps: two_warps() };
        let shape = self.shapes.get(&format).copied().unwrap_or(portable);
        MatvecShape { warps: shape.warps.min(self.most_warps()), ..shape }
    }

    /// The most warps that may share a row: those of a block.
    pub fn most_warps(&self) -> u64 {
        u64::from(STORING / self.wave.max(1))
    }

    /// Share of bandwidth and arithmetic that `kernel` reaches here.
    pub fn efficiency_of(&self, kernel: Kernel) -> f64 {
        self.efficiency.get(&kernel).copied().unwrap_or(1.0)
    }

    /// Whether a block of a norm has room for so many whole rows of floats, beside what it sums in.
    pub fn stages_rows(&self, rows: u64, width: u64) -> bool {
        self.kind == TargetKind::Cpu || width.saturating_mul(4 * rows).saturating_add(256) <= SHARED_BYTES
    }

    /// Checks that every rate makes sense, as a target may come from a file.
    ///
    /// # Errors
    /// The field that does not, by name.
    pub fn validate(&self) -> Result<(), String> {
        let positive = |name: &str, x: f64| {
            if x.is_finite() && x > 0.0 {
                Ok(())
            } else {
                Err(format!("target {:?}: {name} must be above zero, not {x}", self.name))
            }
        };
        positive("bandwidth_gbs", self.bandwidth_gbs)?;
        positive("f32_gflops", self.f32_gflops)?;
        positive("dot4_gops", self.dot4_gops.unwrap_or(1.0))?;
        positive("f16_gflops", self.f16_gflops.unwrap_or(1.0))?;
        positive("residual_epilogue", self.residual_epilogue)?;
        for (kernel, x) in &self.efficiency {
            positive(&format!("efficiency.{}", kernel.name()), *x)?;
        }
        for (format, MatvecShape { rows, pairs, warps }) in &self.shapes {
            if ![rows, pairs].iter().all(|n| (1..=2).contains(*n)) || ![1, 2, 4].contains(warps) {
                return Err(format!(
                    "target {:?}: shapes.{format} must have 1 or 2 rows and pairs, and 1, 2 or 4 warps",
                    self.name
                ));
            }
        }
        if !matches!(self.prompt_activations, DType::Q8Act | DType::F16) {
            let Target { name, prompt_activations, .. } = self;
            return Err(format!(
                "target {name:?}: prompt_activations must be Q8Act or F16, not {prompt_activations:?}"
            ));
        }
        if !(self.launch_us.is_finite() && self.launch_us >= 0.0) {
            return Err(format!("target {:?}: launch_us must not be negative", self.name));
        }
        let ascending = self.buckets.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.buckets.len() > 32 || self.buckets.first() == Some(&0) {
            return Err(format!("target {:?}: buckets must ascend from 1 on, at most 32 of them", self.name));
        }
        let wave = if self.arch.starts_with("gfx9") { 64 } else { 32 };
        if self.kind != TargetKind::Cpu && self.wave != wave {
            let Target { name, arch, .. } = self;
            return Err(format!("target {name:?}: wave must be {wave} on {arch}, not {}", self.wave));
        }
        if let Some(measured) = &self.measured {
            measured.validate().map_err(|e| format!("target {:?}: {e}", self.name))?;
        }
        if !(1..=64).contains(&self.streams) {
            return Err(format!("target {:?}: streams must lie in 1..=64", self.name));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rate_must_make_sense() {
        let relatives = AMD_RELATIVES.map(|(arch, _)| arch);
        for name in NAMES.into_iter().chain(AMD).chain(relatives).chain(["sm_80"]) {
            let target = Target::named(name).unwrap();
            assert_eq!((target.name.as_str(), target.validate()), (name, Ok(())));
        }
        type Set = fn(&mut Target, f64);
        let positive: [(&str, Set); 7] = [
            ("bandwidth_gbs", |t, x| t.bandwidth_gbs = x),
            ("f32_gflops", |t, x| t.f32_gflops = x),
            ("dot4_gops", |t, x| t.dot4_gops = Some(x)),
            ("f16_gflops", |t, x| t.f16_gflops = Some(x)),
            ("residual_epilogue", |t, x| t.residual_epilogue = x),
            ("efficiency.swiglu", |t, x| _ = t.efficiency.insert(Kernel::Swiglu, x)),
            ("launch_us", |t, x| t.launch_us = x),
        ];
        for (field, set) in positive {
            for wrong in [-1.0, 0.0, f64::NAN, f64::INFINITY] {
                let mut target = Target::test_cpu();
                set(&mut target, wrong);
                // A launch may cost nothing.
                let fine = field == "launch_us" && wrong == 0.0;
                assert_eq!(target.validate().is_ok(), fine, "{field} {wrong}");
                assert!(fine || target.validate().unwrap_err().contains(field), "{field} {wrong}");
            }
        }
        for streams in [0, 65] {
            assert!(Target { streams, ..Target::test_cpu() }.validate().is_err(), "{streams}");
        }
        for buckets in [vec![0], vec![2, 2], vec![8, 1], (1..40).collect()] {
            let target = Target { buckets, ..Target::test_cpu() };
            assert!(target.validate().unwrap_err().contains("buckets"));
        }
        let bits = Target { prompt_activations: DType::BF16, ..Target::test_cpu() };
        assert!(bits.validate().unwrap_err().contains("prompt_activations must be Q8Act or F16, not BF16"));
        // Kernels are compiled for the wave that the architecture has.
        for (arch, wave) in [("gfx942", 32), ("gfx1100", 64), ("sm_90", 64), ("sm_90", 0)] {
            let wrong = Target { wave, ..Target::gpu(arch).unwrap() }.validate().unwrap_err();
            assert!(wrong.contains(&format!("wave must be {}", if wave == 32 { 64 } else { 32 })), "{wrong}");
        }
        let none = Target { dot4_gops: None, ..Target::test_cpu() };
        assert_eq!(none.validate(), Ok(()));
    }
}
