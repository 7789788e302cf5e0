//! Perplexity over windows of a text, as llama-perplexity defines it.

use super::{Session, SessionError};

/// A running estimate of `e^(mean negative log-likelihood)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Perplexity {
    sum: f64,
    sum_of_squares: f64,
    count: u64,
}

impl Perplexity {
    /// Adds a window: each token of its second half but the first is predicted from all before it. The window starts
    /// afresh with `bos` in place of its first token, if the model has one.
    ///
    /// # Errors
    /// More tokens than fit the context, or a model whose logits are NaN.
    pub fn window(
        &mut self,
        session: &mut Session,
        tokens: &[u32],
        bos: Option<u32>,
    ) -> Result<(), SessionError> {
        let mut read = tokens.to_vec();
        if let (Some(first), Some(bos)) = (read.first_mut(), bos) {
            *first = bos;
        }
        session.reset()?;
        let half = tokens.len() / 2;
        session.score(&read, |row, logits| {
            if row >= half
                && let Some(&next) = tokens.get(row + 1)
            {
                self.add(negative_log_likelihood(logits, next));
            }
        })?;
        if self.sum.is_nan() { Err(SessionError::Nan) } else { Ok(()) }
    }

    fn add(&mut self, nll: f64) {
        self.sum += nll;
        self.sum_of_squares += nll * nll;
        self.count += 1;
    }

    /// The estimate so far; NaN before the first window.
    pub fn estimate(&self) -> f64 {
        (self.sum / self.count as f64).exp()
    }

    /// The standard error of the estimate.
    pub fn error(&self) -> f64 {
        let n = self.count as f64;
        let mean = self.sum / n;
        let variance = self.sum_of_squares / n - mean * mean;
        if variance > 0.0 && n > 1.0 { (variance / (n - 1.0)).sqrt() * self.estimate() } else { 0.0 }
    }
}

/// `-ln softmax(logits)[token]`, in float64.
fn negative_log_likelihood(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    let x = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    sum.ln() - f64::from(x - max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihood_of_a_known_distribution() {
        let logits = [1.0f32.ln(), 2.0f32.ln(), 5.0f32.ln()];
        for (token, p) in [(0, 0.125f64), (1, 0.25), (2, 0.625)] {
            assert!((negative_log_likelihood(&logits, token) + p.ln()).abs() < 1e-6);
        }
        assert_eq!(negative_log_likelihood(&logits, 3), f64::INFINITY);
    }

    #[test]
    fn estimate_and_error() {
        let mut p = Perplexity::default();
        for nll in [1.0, 2.0, 3.0] {
            p.add(nll);
        }
        assert!((p.estimate() - 2.0f64.exp()).abs() < 1e-12);
        // Variance 2/3, standard error of the mean sqrt(2/3 / 2).
        assert!((p.error() - (1.0f64 / 3.0).sqrt() * 2.0f64.exp()).abs() < 1e-12);
    }
}
