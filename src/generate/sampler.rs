//! Choosing the next token from the logits.
//!
//! The stages and their order are those of llama.cpp's default chain: repetition penalty, top-k, top-p, min-p,
//! temperature, draw. Top-p and min-p look at probabilities before the temperature.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cmp::Ordering;
use std::hash::{BuildHasher, RandomState};

/// How to choose tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the best token.
    pub temperature: f32,
    /// Keep this many best tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest best tokens that together have this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this probable, relative to the best; 0 keeps all.
    pub min_p: f32,
    /// Makes recent tokens less likely when above 1, which is off.
    pub repeat_penalty: f32,
    /// How many tokens count as recent; 0 is off.
    pub repeat_last_n: usize,
    /// Equal seeds give equal choices; without one, each sampler differs.
    pub seed: Option<u64>,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            seed: None,
        }
    }
}

impl Sampling {
    /// The best token each time.
    pub fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    ///
    /// [`SamplingError::Range`] for a value that is not a number or out of range.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |name, value: f32, needs, ok: bool| {
            if ok { Ok(()) } else { Err(SamplingError::Range { name, value, needs }) }
        };
        let (t, p, m, r) = (self.temperature, self.top_p, self.min_p, self.repeat_penalty);
        check("temperature", t, "at least 0", t.is_finite() && t >= 0.0)?;
        check("top-p", p, "0 to 1", (0.0..=1.0).contains(&p))?;
        check("min-p", m, "0 to 1", (0.0..=1.0).contains(&m))?;
        check("repetition penalty", r, "above 0", r.is_finite() && r > 0.0)
    }
}

/// Why no token could be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    #[error("{name} is {value}; it must be {needs}")]
    Range { name: &'static str, value: f32, needs: &'static str },
    #[error("there are no logits to choose from")]
    Empty,
    #[error("the logit of token {id} is {value}: the model's output is broken")]
    Logit { id: u32, value: f32 },
    #[error("every token is ruled out: all logits are -inf")]
    AllRuledOut,
}

/// A token that is still in the running.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    id: u32,
    logit: f32,
}

/// Best first; the lower id of equals.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Chooses tokens, one after the other.
pub struct Sampler {
    sampling: Sampling,
    seed: u64,
    rng: ChaCha8Rng,
    /// Kept between calls for its allocation.
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler at the start of its random sequence.
    ///
    /// # Errors
    ///
    /// As [`Sampling::validate`].
    pub fn new(sampling: Sampling) -> Result<Sampler, SamplingError> {
        sampling.validate()?;
        // A fresh `RandomState` hashes with keys from the operating system.
        let seed = sampling.seed.unwrap_or_else(|| RandomState::new().hash_one(0));
        Ok(Sampler { sampling, seed, rng: ChaCha8Rng::seed_from_u64(seed), candidates: Vec::new() })
    }

    /// Whether it always takes the largest of the logits as they come.
    pub fn is_greedy(&self) -> bool {
        self.sampling.temperature == 0.0 && self.sampling.repeat_penalty == 1.0
    }

    /// The seed in use: the given one, or the one that was drawn.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Chooses the token after `history` from the model's `logits`, one for each token of the vocabulary. The
    /// logits of recent tokens are changed in place.
    ///
    /// # Errors
    ///
    /// No logits, a logit that is NaN or infinite (-inf rules a token out), or all tokens ruled out.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32, SamplingError> {
        let Sampling { temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, .. } = self.sampling;
        penalise(logits, history, repeat_penalty, repeat_last_n);
        check(logits)?;
        if temperature == 0.0 {
            return greedy(logits).ok_or(SamplingError::Empty);
        }
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(
            (0u32..)
                .zip(logits.iter())
                .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
                .map(|(id, &logit)| Candidate { id, logit }),
        );
        keep_top_k(candidates, top_k);
        keep_top_p(candidates, top_p);
        keep_min_p(candidates, min_p);
        draw(candidates, temperature, self.rng.random()).ok_or(SamplingError::AllRuledOut)
    }
}

/// The best token, the lowest id of equals; `None` without logits or if one is NaN.
pub fn greedy(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, &logit) in (0u32..).zip(logits) {
        if logit.is_nan() {
            return None;
        }
        if best.is_none_or(|(_, b)| logit > b) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id)
}

/// Rejects what no choice can be made from.
fn check(logits: &[f32]) -> Result<(), SamplingError> {
    if logits.is_empty() {
        return Err(SamplingError::Empty);
    }
    if let Some((id, &value)) = (0u32..).zip(logits).find(|(_, l)| l.is_nan() || **l == f32::INFINITY) {
        return Err(SamplingError::Logit { id, value });
    }
    if logits.iter().all(|l| *l == f32::NEG_INFINITY) {
        return Err(SamplingError::AllRuledOut);
    }
    Ok(())
}

/// Divides positive logits of the last `last_n` tokens by `penalty` and multiplies others, each token once
/// (Keskar et al., "CTRL", 2019, with the sign mended as llama.cpp does).
fn penalise(logits: &mut [f32], history: &[u32], penalty: f32, last_n: usize) {
    if penalty == 1.0 {
        return;
    }
    let mut recent = history[history.len().saturating_sub(last_n)..].to_vec();
    recent.sort_unstable();
    recent.dedup();
    for id in recent {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}

/// Keeps the `k` best, sorted; all, as they are, if `k` is 0. O(n + k log k).
fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k == 0 {
        return;
    }
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k - 1, best_first);
        candidates.truncate(k);
    }
    candidates.sort_unstable_by(best_first);
}

/// Keeps the fewest best whose probabilities sum to `p`, at least one, sorted.
///
/// The best are found in growing batches, so a peaked distribution over a large vocabulary is never sorted whole.
fn keep_top_p(candidates: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 {
        return;
    }
    let Some(max) = max_logit(candidates) else { return };
    let weight = |c: &Candidate| f64::from(c.logit - max).exp();
    let enough = f64::from(p) * candidates.iter().map(weight).sum::<f64>();
    let (mut sum, mut kept, mut batch) = (0.0, 0, 256);
    while kept < candidates.len() {
        let rest = &mut candidates[kept..];
        if batch < rest.len() {
            rest.select_nth_unstable_by(batch - 1, best_first);
        }
        let end = batch.min(rest.len());
        rest[..end].sort_unstable_by(best_first);
        for c in &rest[..end] {
            sum += weight(c);
            kept += 1;
            if sum >= enough {
                candidates.truncate(kept);
                return;
            }
        }
        batch *= 4;
    }
}

/// Keeps those whose probability is at least `p` times the best one's.
fn keep_min_p(candidates: &mut Vec<Candidate>, p: f32) {
    if let Some(max) = max_logit(candidates) {
        // ln 0 is -inf, which keeps all.
        let least = max + p.ln();
        candidates.retain(|c| c.logit >= least);
    }
}

/// The candidate at `u` in 0..1 of the cumulated probabilities at this temperature.
fn draw(candidates: &[Candidate], temperature: f32, u: f64) -> Option<u32> {
    let max = max_logit(candidates)?;
    let weight = |c: &Candidate| f64::from((c.logit - max) / temperature).exp();
    let target = u * candidates.iter().map(weight).sum::<f64>();
    let mut sum = 0.0;
    let drawn = candidates.iter().find(|c| {
        sum += weight(c);
        sum > target
    });
    // Rounding may leave the sum just short of the target.
    drawn.or(candidates.last()).map(|c| c.id)
}

fn max_logit(candidates: &[Candidate]) -> Option<f32> {
    candidates.iter().map(|c| c.logit).reduce(f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Logits of these probabilities.
    fn candidates(probabilities: &[f32]) -> Vec<Candidate> {
        (0u32..).zip(probabilities).map(|(id, p)| Candidate { id, logit: p.ln() }).collect()
    }

    fn ids(candidates: &[Candidate]) -> Vec<u32> {
        candidates.iter().map(|c| c.id).collect()
    }

    /// Every stage off.
    fn plain(seed: u64) -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: Some(seed),
            ..Sampling::default()
        }
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_equals() {
        assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0]), Some(1));
        assert_eq!(greedy(&[f32::NEG_INFINITY; 2]), Some(0));
        assert_eq!(greedy(&[0.0, f32::NAN]), None);
        assert_eq!(greedy(&[]), None);
        let mut sampler = Sampler::new(Sampling::greedy()).unwrap();
        assert_eq!(sampler.sample(&mut [1.0, 3.0, 3.0], &[]), Ok(1));
    }

    #[test]
    fn top_k_keeps_the_best_in_order() {
        let mut c = candidates(&[0.1, 0.4, 0.2, 0.2, 0.1]);
        keep_top_k(&mut c, 3);
        assert_eq!(ids(&c), [1, 2, 3]);
        keep_top_k(&mut c, 0);
        assert_eq!(ids(&c), [1, 2, 3]);
        keep_top_k(&mut c, 10);
        assert_eq!(ids(&c), [1, 2, 3]);
        let mut equal = candidates(&[0.25; 4]);
        keep_top_k(&mut equal, 2);
        assert_eq!(ids(&equal), [0, 1]);
    }

    #[test]
    fn top_p_keeps_the_token_that_crosses_the_sum() {
        let kept = |p| {
            let mut c = candidates(&[0.1, 0.5, 0.15, 0.25]);
            keep_top_p(&mut c, p);
            ids(&c)
        };
        assert_eq!(kept(0.0), [1]);
        assert_eq!(kept(0.45), [1]);
        assert_eq!(kept(0.6), [1, 3]);
        assert_eq!(kept(0.8), [1, 3, 2]);
        assert_eq!(kept(0.95), [1, 3, 2, 0]);
        assert_eq!(kept(1.0), [0, 1, 2, 3]);
    }

    #[test]
    fn top_p_in_batches_is_top_p_of_the_sorted_whole() {
        // 5000 nearly equal tokens in shuffled order: several batches are needed.
        let mut flat: Vec<Candidate> = (0..5000u32)
            .map(|id| Candidate { id, logit: (id.wrapping_mul(2_654_435_761) % 5003) as f32 * 1e-4 })
            .collect();
        let mut sorted = flat.clone();
        sorted.sort_by(best_first);
        let total: f64 = sorted.iter().map(|c| f64::from(c.logit).exp()).sum();
        let mut sum = 0.0;
        let n = sorted.iter().take_while(|c| {
            let before = sum;
            sum += f64::from(c.logit).exp();
            before < 0.7 * total
        });
        let expected: Vec<u32> = n.map(|c| c.id).collect();
        assert!(expected.len() > 256 * 5);
        keep_top_p(&mut flat, 0.7);
        assert_eq!(ids(&flat), expected);
    }

    #[test]
    fn min_p_is_relative_to_the_best() {
        let kept = |p| {
            let mut c = candidates(&[0.5, 0.3, 0.04, 0.16]);
            keep_min_p(&mut c, p);
            ids(&c)
        };
        assert_eq!(kept(0.0), [0, 1, 2, 3]);
        assert_eq!(kept(0.1), [0, 1, 3]);
        assert_eq!(kept(0.5), [0, 1]);
        assert_eq!(kept(1.0), [0]);
    }

    #[test]
    fn the_temperature_sharpens_and_flattens() {
        let c = candidates(&[0.8, 0.2]);
        // At temperature 1/2 the odds are 16 : 1, at 2 they are 2 : 1.
        assert_eq!(draw(&c, 0.5, 0.94), Some(0));
        assert_eq!(draw(&c, 0.5, 0.95), Some(1));
        assert_eq!(draw(&c, 2.0, 0.66), Some(0));
        assert_eq!(draw(&c, 2.0, 0.67), Some(1));
        assert_eq!(draw(&c, 1e-38, 0.999), Some(0));
        assert_eq!(draw(&[], 1.0, 0.5), None);
    }

    #[test]
    fn the_penalty_divides_positive_and_multiplies_negative_logits_once() {
        let mut logits = [2.0, -2.0, 4.0, 0.0, 8.0];
        penalise(&mut logits, &[4, 1, 0, 0, 99, 3], 2.0, 5);
        assert_eq!(logits, [1.0, -4.0, 4.0, 0.0, 8.0]);
        penalise(&mut logits, &[2], 2.0, 0);
        assert_eq!(logits[2], 4.0);
        penalise(&mut logits, &[2], 1.0, 64);
        assert_eq!(logits[2], 4.0);
    }

    #[test]
    fn the_penalty_acts_before_a_greedy_choice() {
        let sampling = Sampling { repeat_penalty: 1.5, ..Sampling::greedy() };
        let mut sampler = Sampler::new(sampling).unwrap();
        assert_eq!(sampler.sample(&mut [3.0, 2.5], &[]), Ok(0));
        assert_eq!(sampler.sample(&mut [3.0, 2.5], &[0]), Ok(1));
    }

    #[test]
    fn equal_seeds_give_equal_choices() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32 * 0.3).collect();
        let run = |seed| -> Vec<u32> {
            let mut sampler = Sampler::new(Sampling { seed, ..Sampling::default() }).unwrap();
            (0..50).map(|_| sampler.sample(&mut logits.clone(), &[]).unwrap()).collect()
        };
        assert_eq!(run(Some(7)), run(Some(7)));
        assert_ne!(run(Some(7)), run(Some(8)));
        assert_ne!(run(None), run(None));
        let drawn = Sampler::new(Sampling::default()).unwrap().seed();
        assert_eq!(run(Some(drawn)), run(Some(drawn)));
    }

    #[test]
    fn draws_follow_the_distribution() {
        let p = [0.4f32, 0.3, 0.2, 0.1];
        let mut sampler = Sampler::new(plain(1)).unwrap();
        let n = 20_000;
        let mut counts = [0u32; 4];
        for _ in 0..n {
            let mut logits = p.map(f32::ln);
            counts[sampler.sample(&mut logits, &[]).unwrap() as usize] += 1;
        }
        let chi2: f64 = counts
            .iter()
            .zip(p)
            .map(|(&count, p)| {
                let expected = f64::from(n) * f64::from(p);
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum();
        // 16.27 is exceeded once in a thousand by three degrees of freedom.
        assert!(chi2 < 16.27, "{counts:?}: {chi2}");
    }

    #[test]
    fn broken_logits_are_errors() {
        let mut sampler = Sampler::new(plain(0)).unwrap();
        assert_eq!(sampler.sample(&mut [], &[]), Err(SamplingError::Empty));
        let nan = sampler.sample(&mut [0.0, f32::NAN], &[]).unwrap_err();
        assert!(matches!(nan, SamplingError::Logit { id: 1, value } if value.is_nan()));
        let inf = sampler.sample(&mut [f32::INFINITY, 0.0], &[]);
        assert_eq!(inf, Err(SamplingError::Logit { id: 0, value: f32::INFINITY }));
        assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY], &[]), Err(SamplingError::AllRuledOut));
        assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY, 0.0], &[]), Ok(1));
        let mut greedy = Sampler::new(Sampling::greedy()).unwrap();
        assert!(greedy.sample(&mut [f32::NAN], &[]).is_err());
    }

    #[test]
    fn ranges_are_checked() {
        assert_eq!(Sampling::default().validate(), Ok(()));
        for bad in [
            Sampling { temperature: -0.1, ..Sampling::default() },
            Sampling { temperature: f32::INFINITY, ..Sampling::default() },
            Sampling { top_p: 1.1, ..Sampling::default() },
            Sampling { top_p: f32::NAN, ..Sampling::default() },
            Sampling { min_p: -1.0, ..Sampling::default() },
            Sampling { repeat_penalty: 0.0, ..Sampling::default() },
            Sampling { repeat_penalty: f32::NAN, ..Sampling::default() },
        ] {
            assert!(matches!(bad.validate(), Err(SamplingError::Range { .. })), "{bad:?}");
            assert!(Sampler::new(bad).is_err());
        }
        let text = Sampling { top_p: 1.5, ..Sampling::default() }.validate().unwrap_err().to_string();
        assert_eq!(text, "top-p is 1.5; it must be 0 to 1");
    }

    /// Every token that many draws yield.
    fn drawn(sampling: Sampling, probabilities: &[f32]) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling).unwrap();
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let mut ids: Vec<u32> = (0..500).map(|_| sampler.sample(&mut logits.clone(), &[]).unwrap()).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    #[test]
    fn every_stage_takes_part_in_a_choice() {
        let p = [0.1, 0.4, 0.2, 0.3];
        assert_eq!(drawn(plain(1), &p), [0, 1, 2, 3]);
        assert_eq!(drawn(Sampling { top_k: 3, ..plain(1) }, &p), [1, 2, 3]);
        assert_eq!(drawn(Sampling { top_p: 0.6, ..plain(1) }, &p), [1, 3]);
        assert_eq!(drawn(Sampling { min_p: 0.4, ..plain(1) }, &p), [1, 2, 3]);
        // The odds of the best are then at least (4/3)^100 to 1.
        assert_eq!(drawn(Sampling { temperature: 0.01, ..plain(1) }, &p), [1]);
    }

    #[test]
    fn the_stages_take_their_turns() {
        // What the best two leave to top-p is 4/7 and 3/7; of all, 0.4 were too little.
        let k_p = Sampling { top_k: 2, top_p: 0.5, ..plain(1) };
        assert_eq!(drawn(k_p, &[0.1, 0.4, 0.2, 0.3]), [1]);
        // Of all, two are 0.7, too little for top-p; of those that min-p leaves, they were 0.78.
        let p_min = Sampling { top_p: 0.75, min_p: 0.3, ..plain(1) };
        assert_eq!(drawn(p_min, &[0.5, 0.2, 0.2, 0.06, 0.04]), [0, 1, 2]);
        // A temperature that makes all tokens equal comes after both.
        let hot = Sampling { temperature: 1e6, ..plain(1) };
        assert_eq!(drawn(Sampling { top_p: 0.6, ..hot.clone() }, &[0.1, 0.4, 0.2, 0.3]), [1, 3]);
        assert_eq!(drawn(Sampling { min_p: 0.6, ..hot }, &[0.1, 0.4, 0.2, 0.3]), [1, 3]);
        // And the penalty before all: it makes the best of three the worst.
        let mut penalised = Sampler::new(Sampling { repeat_penalty: 9.0, top_k: 2, ..plain(1) }).unwrap();
        for _ in 0..50 {
            assert_ne!(penalised.sample(&mut [3.0, 2.0, 1.0], &[0]), Ok(0));
        }
    }

    proptest! {
        /// Of logits so close that any token may come.
        #[test]
        fn a_choice_is_always_among_the_top_k(
            logits in prop::collection::vec(-1f32..1.0, 30..300), k in 1usize..20, seed: u64,
        ) {
            let mut sorted = logits.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let mut sampler = Sampler::new(Sampling { top_k: k, ..plain(seed) }).unwrap();
            for _ in 0..20 {
                let id = sampler.sample(&mut logits.clone(), &[]).unwrap();
                prop_assert!(logits[id as usize] >= sorted[k - 1]);
            }
        }
    }
}
