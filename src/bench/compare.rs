//! Two runs side by side.

use super::run::{Hardware, Run, Settings, TestResult};
use std::fmt::Display;

/// Runs whose speeds say nothing about each other.
#[derive(Debug, thiserror::Error)]
pub enum Incomparable {
    #[error("it was measured on other hardware: {0}")]
    Hardware(String),
    #[error(
        "it is of another model, {before} with {before_bytes} bytes; this is {now} with {now_bytes} bytes"
    )]
    Model { before: String, before_bytes: u64, now: String, now_bytes: u64 },
    #[error("it was measured with other options: {0}")]
    Settings(String),
}

/// Makes sure that the two are of the same model, with the same options, on the same hardware. Versions may differ.
///
/// # Errors
/// What differs.
pub fn comparable(before: &Run, now: &Run) -> Result<(), Incomparable> {
    let hardware = hardware(&before.hardware, &now.hardware);
    if !hardware.is_empty() {
        return Err(Incomparable::Hardware(hardware.join("; ")));
    }
    if before.model.identity != now.model.identity {
        return Err(Incomparable::Model {
            before: format!("{:?}", before.model.name),
            before_bytes: before.model.bytes,
            now: format!("{:?}", now.model.name),
            now_bytes: now.model.bytes,
        });
    }
    let settings = settings(&before.options, &now.options);
    if settings.is_empty() { Ok(()) } else { Err(Incomparable::Settings(settings.join("; "))) }
}

/// `what: then X, now Y`, unless they are equal.
fn differs<T: PartialEq + Display>(what: &str, then: &T, now: &T) -> Option<String> {
    // What a file says is shown without what would move a terminal's cursor.
    let shown = |x: &T| x.to_string().escape_debug().to_string();
    (then != now).then(|| format!("{what}: then {}, now {}", shown(then), shown(now)))
}

fn hardware(then: &Hardware, now: &Hardware) -> Vec<String> {
    let gpu = |h: &Hardware| h.gpu.as_ref().map_or("none".to_string(), |gpu| gpu.name.clone());
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    // A system keeps some for itself, more or less from version to version.
    let memory = |what, then: Option<u64>, now: Option<u64>| {
        let (then, now) = then.zip(now)?;
        let same = then.abs_diff(now) <= then.max(now) / 20;
        if same { None } else { differs(what, &gib(then), &gib(now)) }
    };
    let of_gpu = |h: &Hardware| h.gpu.as_ref().map(|gpu| gpu.memory_bytes);
    [
        differs("processor", &then.cpu, &now.cpu),
        differs("processors to use", &then.cores, &now.cores),
        memory("memory", then.memory_bytes, now.memory_bytes),
        differs("GPU", &gpu(then), &gpu(now)),
        memory("the GPU's memory", of_gpu(then), of_gpu(now)),
        differs("instruction set", &then.isa, &now.isa),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn settings(then: &Settings, now: &Settings) -> Vec<String> {
    let cache = |s: &Settings| format!("{},{}", s.type_k, s.type_v);
    let passes = |s: &Settings| s.passes.as_ref().map_or("all".to_string(), |list| list.join(","));
    let fuel = |s: &Settings| s.fuel.map_or("none".to_string(), |n| n.to_string());
    let denied = |s: &Settings| match s.denied.is_empty() {
        true => "none".to_string(),
        false => s.denied.join(", "),
    };
    [
        differs("target", &then.target, &now.target),
        differs("--exact", &then.exact, &now.exact),
        differs("--kv", &cache(then), &cache(now)),
        differs("--chunk", &then.chunk, &now.chunk),
        differs("--no-fuse", &!then.fuse, &!now.fuse),
        differs("--passes", &passes(then), &passes(now)),
        differs("--fuel", &fuel(then), &fuel(now)),
        differs("--deny", &denied(then), &denied(now)),
        differs("--no-graph", &!then.graph, &!now.graph),
        differs("--no-warmup", &!then.warm_up, &!now.warm_up),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Versions that differ between two runs, each in words: they may be why speeds do.
pub fn versions(before: &Run, now: &Run) -> Vec<String> {
    let (then, now) = (&before.software, &now.software);
    let or_none = |x: &Option<String>| x.clone().unwrap_or("none".into());
    [
        differs("sinter", &then.sinter, &now.sinter),
        differs("system", &then.os, &now.os),
        differs("driver", &or_none(&then.driver), &or_none(&now.driver)),
        differs("compiler of kernels", &or_none(&then.compiler), &or_none(&now.compiler)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// By how much a test may become slower, in per cent: above 0 and below 100.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold(f64);

impl std::str::FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> Result<Threshold, String> {
        let number = text.parse::<f64>().ok().filter(|x| *x > 0.0 && *x < 100.0);
        number.map(Threshold).ok_or_else(|| "a threshold is a number above 0 and below 100".into())
    }
}

impl Display for Threshold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} %", self.0)
    }
}

/// The tests of a run whose speed varied by more than that: as a baseline, they would hide what becomes slower.
pub fn unsteady(run: &Run, threshold: Threshold) -> Vec<String> {
    let varied = |t: &TestResult| {
        let per_cent = 100.0 * t.stddev_ts / t.avg_ts;
        (per_cent > threshold.0).then(|| format!("{} by {per_cent:.0} %", t.name()))
    };
    run.tests.iter().filter_map(varied).collect()
}

/// What became of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has less than its old speed less the threshold.
    Slower,
    /// It has more than its old speed and the threshold.
    Faster,
    Same,
}

impl Threshold {
    /// By the medians of the repetitions, which a single bad one does not move.
    pub fn judge(self, before: &TestResult, now_ts: f64) -> Verdict {
        let ratio = now_ts / before.median_ts;
        match self.0 / 100.0 {
            most if ratio < 1.0 - most => Verdict::Slower,
            most if ratio > 1.0 + most => Verdict::Faster,
            _ => Verdict::Same,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::run::GpuHardware;
    use crate::bench::run::tests::run;

    #[test]
    fn hardware_model_and_options_must_be_the_same_and_versions_need_not() {
        let before = run([100.0, 50.0]);
        let refused = |change: fn(&mut Run)| {
            let mut now = run([100.0, 50.0]);
            change(&mut now);
            comparable(&before, &now).err().map(|e| e.to_string())
        };
        let gpu = GpuHardware { name: "GPU".into(), memory_bytes: 80 << 30 };
        let mut on_gpu = run([1.0, 1.0]);
        on_gpu.hardware.gpu = Some(gpu.clone());
        let mut smaller = on_gpu.clone();
        smaller.hardware.gpu = Some(GpuHardware { memory_bytes: 40 << 30, ..gpu });
        let error = comparable(&on_gpu, &smaller).unwrap_err().to_string();
        assert!(error.ends_with("hardware: the GPU's memory: then 80.0 GiB, now 40.0 GiB"), "{error}");
        for (change, says) in [
            (
                (|r| r.hardware.cpu = "b\u{1b}[2J".into()) as fn(&mut Run),
                "other hardware: processor: then a processor, now b\\u{1b}[2J",
            ),
            (|r| r.hardware.cores = 4, "processors to use: then 2, now 4"),
            (|r| r.hardware.memory_bytes = Some(8 << 30), "memory: then 16.0 GiB, now 8.0 GiB"),
            (|r| r.hardware.isa = "avx2".into(), "instruction set: then avx512, now avx2"),
            (
                |r| r.hardware.gpu = Some(GpuHardware { name: "X".into(), memory_bytes: 1 }),
                "GPU: then none, now X",
            ),
            (|r| r.model.identity = "other".into(), "another model, \"llama 13M Q4_K\" with 8 bytes"),
            (|r| r.options.exact = true, "other options: --exact: then false, now true"),
            (|r| r.options.type_v = "f32".into(), "--kv: then f16,f16, now f16,f32"),
            (|r| r.options.chunk = 8, "--chunk: then 512, now 8"),
            (|r| r.options.fuse = false, "--no-fuse: then false, now true"),
            (|r| r.options.passes = Some(vec!["-merge".into()]), "--passes: then all, now -merge"),
            (|r| r.options.fuel = Some(3), "--fuel: then none, now 3"),
            (|r| r.options.graph = false, "--no-graph: then false, now true"),
            (|r| r.options.warm_up = false, "--no-warmup: then false, now true"),
            (|r| r.options.target = "test-cpu".into(), "target: then cpu, now test-cpu"),
        ] {
            let error = refused(change).unwrap_or_default();
            assert!(error.contains(says), "{says}: {error}");
        }
        assert_eq!(refused(|r| r.hardware.memory_bytes = None), None);
        assert_eq!(refused(|r| r.hardware.memory_bytes = Some((16 << 30) - (100 << 20))), None);
        assert_eq!(refused(|r| r.options.context = 99), None);
        let mut newer = before.clone();
        newer.software.sinter = "0.2.0".into();
        newer.software.driver = Some("AMD 60300000".into());
        comparable(&before, &newer).unwrap();
        let said = versions(&before, &newer);
        assert_eq!(said, ["sinter: then 0.1.0, now 0.2.0", "driver: then none, now AMD 60300000"]);
        assert_eq!(versions(&before, &before), Vec::<String>::new());
    }

    #[test]
    fn what_varies_too_much_is_named() {
        let mut run = run([100.0, 50.0]);
        run.tests[1].avg_ts = 50.0;
        run.tests[1].stddev_ts = 6.0;
        assert_eq!(unsteady(&run, "10".parse().unwrap()), ["tg8 (2 threads) by 12 %"]);
        assert_eq!(unsteady(&run, "13".parse().unwrap()), Vec::<String>::new());
    }

    #[test]
    fn beyond_the_threshold_and_not_at_it() {
        let before = &run([100.0, 50.0]).tests[0];
        let ten: Threshold = "10".parse().unwrap();
        let judged = [50.0, 89.9, 90.1, 100.0, 109.9, 110.1].map(|ts| ten.judge(before, ts));
        use Verdict::{Faster, Same, Slower};
        assert_eq!(judged, [Slower, Slower, Same, Same, Same, Faster]);
        assert_eq!("60".parse::<Threshold>().unwrap().judge(before, 50.0), Same);
        assert_eq!("0.5".parse::<Threshold>().unwrap().judge(before, 99.0), Slower);
        for no in ["0", "-1", "100", "NaN", "inf", "ten", ""] {
            assert!(no.parse::<Threshold>().is_err(), "{no}");
        }
    }
}
