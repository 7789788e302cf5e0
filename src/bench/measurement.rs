//! Times, and what is said about them.

/// The times of one test. Speeds are tokens per second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measurement {
    tokens: u64,
    samples_ns: Vec<u64>,
    steps_ns: Vec<u64>,
}

impl Measurement {
    /// Of repetitions of `tokens` tokens, none of which was made yet.
    pub fn new(tokens: u64) -> Measurement {
        Measurement { tokens, samples_ns: vec![], steps_ns: vec![] }
    }

    /// Adds a repetition by the times of its steps, in nanoseconds.
    pub fn add(&mut self, steps_ns: &[u64]) {
        self.samples_ns.push(steps_ns.iter().fold(0, |sum, ns| sum.saturating_add(*ns)));
        self.steps_ns.extend_from_slice(steps_ns);
    }

    /// The time of each repetition in nanoseconds.
    pub fn samples_ns(&self) -> &[u64] {
        &self.samples_ns
    }

    /// The time of each step of all repetitions in nanoseconds.
    pub fn steps_ns(&self) -> &[u64] {
        &self.steps_ns
    }

    /// The speed of each repetition.
    pub fn samples_ts(&self) -> Vec<f64> {
        self.samples_ns.iter().map(|ns| 1e9 * self.tokens as f64 / (*ns).max(1) as f64).collect()
    }

    /// The mean time of a repetition in nanoseconds.
    pub fn avg_ns(&self) -> f64 {
        mean(&self.nanoseconds())
    }

    /// The standard deviation of that.
    pub fn stddev_ns(&self) -> f64 {
        deviation(&self.nanoseconds())
    }

    /// The mean of [`Measurement::samples_ts`].
    pub fn avg_ts(&self) -> f64 {
        mean(&self.samples_ts())
    }

    /// The standard deviation of that.
    pub fn stddev_ts(&self) -> f64 {
        deviation(&self.samples_ts())
    }

    /// The median of [`Measurement::samples_ts`], which a single slow repetition does not move.
    pub fn median_ts(&self) -> f64 {
        median(self.samples_ts())
    }

    /// The time in nanoseconds that `percent` of the steps do not exceed: by nearest rank, so one that was measured. 0
    /// without steps.
    pub fn percentile_ns(&self, percent: u8) -> u64 {
        let mut sorted = self.steps_ns.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * usize::from(percent.min(100))).div_ceil(100);
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0)
    }

    fn nanoseconds(&self) -> Vec<f64> {
        self.samples_ns.iter().map(|ns| *ns as f64).collect()
    }
}

/// The arithmetic mean, 0 of nothing.
fn mean(x: &[f64]) -> f64 {
    if x.is_empty() { 0.0 } else { x.iter().sum::<f64>() / x.len() as f64 }
}

/// The middle of these, or the mean of the two in the middle; 0 of nothing.
pub(crate) fn median(mut x: Vec<f64>) -> f64 {
    x.sort_unstable_by(f64::total_cmp);
    let middle = |back: usize| x.get((x.len() - back) / 2).copied().unwrap_or(0.0);
    if x.is_empty() { 0.0 } else { middle(1).midpoint(middle(0)) }
}

/// The standard deviation of a sample (over `n − 1`), 0 of fewer than two.
fn deviation(x: &[f64]) -> f64 {
    if x.len() < 2 {
        return 0.0;
    }
    let mean = mean(x);
    let squares: f64 = x.iter().map(|x| (x - mean).powi(2)).sum();
    (squares / (x.len() - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_and_deviations_are_of_repetitions() {
        let mut m = Measurement::new(2);
        for steps in [[100, 100], [200, 200], [200, 400]] {
            m.add(&steps);
        }
        assert_eq!(m.samples_ns(), [200, 400, 600]);
        assert_eq!((m.avg_ns(), m.stddev_ns()), (400.0, 200.0));
        assert_eq!(m.samples_ts(), [1e7, 5e6, 2e9 / 600.0]);
        assert!((m.avg_ts() - (1e7 + 5e6 + 2e9 / 600.0) / 3.0).abs() < 1e-6);
        assert_eq!(m.steps_ns(), [100, 100, 200, 200, 200, 400]);
    }

    #[test]
    fn one_repetition_does_not_deviate_and_none_is_zero() {
        let mut m = Measurement::new(1);
        assert_eq!((m.avg_ns(), m.avg_ts(), m.stddev_ts(), m.percentile_ns(50)), (0.0, 0.0, 0.0, 0));
        m.add(&[0]);
        assert_eq!((m.stddev_ns(), m.stddev_ts()), (0.0, 0.0));
        assert!(m.avg_ts().is_finite());
    }

    #[test]
    fn a_median_is_not_moved_by_one() {
        assert_eq!(median(vec![]), 0.0);
        assert_eq!(median(vec![3.0]), 3.0);
        assert_eq!(median(vec![9.0, 1.0]), 5.0);
        assert_eq!(median(vec![1e9, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 1e9]), 3.0);
        let mut m = Measurement::new(1);
        for ns in [100, 100, 100_000] {
            m.add(&[ns]);
        }
        assert_eq!(m.median_ts(), 1e7);
    }

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let mut m = Measurement::new(1);
        m.add(&[50, 15, 40, 20, 35]);
        let at = |percent| m.percentile_ns(percent);
        assert_eq!(
            [0, 5, 20, 30, 40, 41, 50, 99, 100, 255].map(at),
            [15, 15, 15, 20, 20, 35, 35, 50, 50, 50]
        );
        let mut hundred = Measurement::new(1);
        hundred.add(&(1..=100).rev().collect::<Vec<_>>());
        assert_eq!([1, 50, 90, 99, 100].map(|p| hundred.percentile_ns(p)), [1, 50, 90, 99, 100]);
    }
}
