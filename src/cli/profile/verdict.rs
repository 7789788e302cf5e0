//! What limits a kernel, in a word and in a sentence.

use sinter::bench::{Arithmetic, KernelTime};
use sinter::ir::Micros;
use sinter::target::Target;

/// A kernel that reaches this share of the bandwidth is limited by it.
const MEMORY: f64 = 0.5;
/// One that exceeds it finds its operands in caches.
const CACHES: f64 = 1.1;
/// One that takes no more than so many launches' time has little to do.
const LAUNCH: f64 = 2.0;
/// Operations for each byte from which on arithmetic is what takes the time; with fewer it is the way there and back.
const INTENSE: f64 = 8.0;
/// Microseconds of a launch that has little to do, however few a launch takes.
const SHORT: f64 = 20.0;
/// A share of a limit that leaves nothing to gain.
const FULL: f64 = 0.85;

/// What the device can do at most.
#[derive(Clone, Debug)]
pub struct Roofs {
    /// Bytes per second that it reads.
    pub bandwidth: f64,
    pub bandwidth_is: &'static str,
    /// Operations per second: of floats, of 8-bit integers, and of numbers in 16 bits on matrix units.
    pub float: Rate,
    pub integer: Rate,
    pub half: Rate,
    /// Microseconds of the launch that takes least.
    pub launch_us: f64,
}

/// Operations per second, and how that is known.
#[derive(Clone, Debug, PartialEq)]
pub struct Rate {
    pub per_second: f64,
    /// Whether `sinter tune` measured it; else the target's description has it, by which it is assumed.
    pub is_tuned: bool,
    /// The kernel that reached more, which is then all that is known.
    pub reached_by: Option<String>,
}

impl Rate {
    /// As a target has it.
    pub fn of(target: &Target, gops: f64) -> Rate {
        Rate { per_second: 1e9 * gops, is_tuned: target.measured.is_some(), reached_by: None }
    }

    /// How it is known, after the number.
    pub fn source(&self) -> String {
        match (&self.reached_by, self.is_tuned) {
            (Some(kernel), false) => {
                format!("reached here by {kernel}; more than the target's description has")
            }
            (Some(kernel), true) => format!("reached here by {kernel}; more than sinter tune measured"),
            (None, false) => "assumed, from the target's description".into(),
            (None, true) => "measured by sinter tune".into(),
        }
    }

    /// The same in a word or two.
    pub fn known(&self) -> &'static str {
        match (&self.reached_by, self.is_tuned) {
            (Some(_), _) => "reached here",
            (None, false) => "assumed",
            (None, true) => "measured by sinter tune",
        }
    }
}

impl Roofs {
    /// Raises what is assumed to what some kernel reached.
    pub fn raise(&mut self, kernels: &[KernelTime]) {
        for k in kernels {
            let rate = match k.arithmetic {
                Arithmetic::Float => &mut self.float,
                Arithmetic::Integer => &mut self.integer,
                Arithmetic::Half => &mut self.half,
            };
            if k.arithmetic() > rate.per_second {
                rate.per_second = k.arithmetic();
                rate.reached_by = Some(format!("{} {}", k.kernel, k.node));
            }
        }
    }

    pub fn rate(&self, arithmetic: Arithmetic) -> &Rate {
        match arithmetic {
            Arithmetic::Float => &self.float,
            Arithmetic::Integer => &self.integer,
            Arithmetic::Half => &self.half,
        }
    }
}

/// What limits a kernel.
pub struct Verdict {
    pub limit: &'static str,
    /// The least time that memory and arithmetic allow, of the time that it takes.
    pub roofline_share: f64,
    pub words: String,
}

impl Verdict {
    pub fn of(k: &KernelTime, roofs: &Roofs) -> Verdict {
        let bandwidth = k.bandwidth() / roofs.bandwidth;
        let rate = roofs.rate(k.arithmetic);
        let arithmetic = k.arithmetic() / rate.per_second;
        let each = k.ns as f64 / 1e3 / k.launches.max(1) as f64;
        let limit = match each {
            _ if bandwidth > CACHES => "caches",
            _ if bandwidth >= MEMORY => "memory",
            each if each <= LAUNCH * roofs.launch_us => "launch",
            _ if k.work.operations as f64 >= INTENSE * k.work.bytes as f64 => "arithmetic",
            _ => "latency",
        };
        let percent = |share: f64| format!("{:.0} %", 100.0 * share);
        let (moves, each_us, each) = (moves(k), each, Micros(each));
        let words = match limit {
            "caches" => {
                format!(
                    "{moves} {bandwidth:.1} times as fast as memory gives it: from the processor's caches"
                )
            }
            "memory" => {
                let left = if bandwidth >= FULL {
                    "nothing to gain but fewer bytes"
                } else {
                    "fewer bytes gain most"
                };
                format!("{moves} at {} of the memory's bandwidth: {left}", percent(bandwidth))
            }
            "launch" => {
                let launch = Micros(roofs.launch_us);
                format!("{each} a launch, where the least of all takes {launch}: fewer launches gain most")
            }
            "arithmetic" => {
                let intensity = k.work.operations as f64 / k.work.bytes.max(1) as f64;
                let share = match &rate.reached_by {
                    Some(_) => format!("{} of the most that a kernel reached here", percent(arithmetic)),
                    None if rate.is_tuned => {
                        format!("{} of the rate that sinter tune measured", percent(arithmetic))
                    }
                    None => format!("{} of the rate assumed for this target", percent(arithmetic)),
                };
                format!("{intensity:.0} operations for each byte, so not memory; computes at {share}")
            }
            _ => {
                let memory = format!("memory is busy at {}", percent(bandwidth));
                match k.work.operations {
                    _ if each_us <= SHORT => {
                        format!("{memory}: {each} a launch is too little work to fill the device")
                    }
                    0 => format!("{memory}: the rest is arithmetic that is not counted here, or waiting"),
                    _ => format!(
                        "{memory}, arithmetic at {}: it waits for neither, but for threads or for its own steps",
                        percent(arithmetic)
                    ),
                }
            }
        };
        Verdict { limit, roofline_share: bandwidth.max(arithmetic), words }
    }
}

/// What most of its bytes are.
fn moves(k: &KernelTime) -> &'static str {
    match k.work.bytes / 2 {
        half if k.work.weights > half => "reads weights",
        half if k.work.states > half => "goes over the cache",
        _ => "moves activations",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sinter::plan::CallWork;

    fn roofs() -> Roofs {
        let target = Target::test_cpu();
        let [float, integer, half] = [1e3, 4e3, 2e3].map(|gops| Rate::of(&target, gops));
        Roofs { bandwidth: 1e11, bandwidth_is: "measured", float, integer, half, launch_us: 2.0 }
    }

    fn kernel(us: u64, bytes: u64, operations: u64) -> KernelTime {
        let work = CallWork { bytes, weights: bytes, states: 0, operations };
        let (kernel, node) = ("matmul", "w".into());
        KernelTime {
            kernel,
            node,
            calls: 1,
            launches: 1,
            ns: us * 1000,
            work,
            arithmetic: Arithmetic::Integer,
        }
    }

    #[test]
    fn a_kernel_is_limited_by_what_it_reaches() {
        let of = |us, bytes, operations| {
            let Verdict { limit, roofline_share, words } =
                Verdict::of(&kernel(us, bytes, operations), &roofs());
            (limit, (100.0 * roofline_share).round(), words)
        };
        // In 100 µs memory gives 10 MB.
        let gain = "reads weights at 95 % of the memory's bandwidth: nothing to gain but fewer bytes";
        assert_eq!(of(100, 9_500_000, 0), ("memory", 95.0, gain.into()));
        let some = "reads weights at 60 % of the memory's bandwidth: fewer bytes gain most";
        assert_eq!(of(100, 6_000_000, 0), ("memory", 60.0, some.into()));
        let caches = "reads weights 1.5 times as fast as memory gives it: from the processor's caches";
        assert_eq!(of(100, 15_000_000, 0), ("caches", 150.0, caches.into()));
        let launch = "3.0 µs a launch, where the least of all takes 2.0 µs: fewer launches gain most";
        assert_eq!(of(3, 1000, 0), ("launch", 0.0, launch.into()));
        let arithmetic = "300 operations for each byte, so not memory; computes at 75 % of the rate assumed for this target";
        assert_eq!(of(100, 1_000_000, 300_000_000), ("arithmetic", 75.0, arithmetic.into()));
        let latency = |words: &str| ("latency", 10.0, format!("memory is busy at 10 %{words}"));
        let neither =
            latency(", arithmetic at 1 %: it waits for neither, but for threads or for its own steps");
        assert_eq!(of(100, 1_000_000, 4_000_000), neither);
        let uncounted = latency(": the rest is arithmetic that is not counted here, or waiting");
        assert_eq!(of(100, 1_000_000, 0), uncounted);
        assert_eq!(of(10, 100_000, 0), latency(": 10.0 µs a launch is too little work to fill the device"));
    }

    #[test]
    fn a_rate_that_was_assumed_too_low_is_raised() {
        let mut roofs = roofs();
        let mut float = kernel(100, 1, 90_000_000);
        float.arithmetic = Arithmetic::Float;
        let half = KernelTime { arithmetic: Arithmetic::Half, ..float.clone() };
        // 0.9e12 of floats is below; 5e12 of integers is not.
        roofs.raise(&[float.clone(), half.clone(), kernel(100, 1, 500_000_000)]);
        assert_eq!(roofs.float, Rate::of(&Target::test_cpu(), 1e3));
        assert_eq!(Verdict::of(&half, &roofs).roofline_share, 0.45);
        assert_eq!((roofs.integer.per_second, roofs.integer.reached_by.as_deref()), (5e12, Some("matmul w")));
        assert_eq!(Verdict::of(&float, &roofs).roofline_share, 0.9);
    }

    /// What was measured of a device is not called assumed.
    #[test]
    fn a_rate_that_was_measured_is_said_to_be() {
        let target = Target { measured: Some(Default::default()), ..Target::test_cpu() };
        let mut roofs = Roofs { integer: Rate::of(&target, 4e3), ..roofs() };
        let said = (roofs.integer.source(), roofs.integer.known());
        assert_eq!(said, ("measured by sinter tune".into(), "measured by sinter tune"));
        let of = |roofs: &Roofs| Verdict::of(&kernel(100, 1_000_000, 300_000_000), roofs).words;
        assert!(
            of(&roofs).ends_with("; computes at 75 % of the rate that sinter tune measured"),
            "{}",
            of(&roofs)
        );
        roofs.raise(&[kernel(100, 1, 500_000_000)]);
        assert!(roofs.integer.source().ends_with("; more than sinter tune measured"));
    }
}
