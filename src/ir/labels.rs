//! What nodes are called, layers folded: `blk.0-31.ffn_down.weight`.

/// The number of the layer in a label such as `dequant_matmul blk.7.ffn_down.weight`.
pub fn layer(label: &str) -> Option<u64> {
    let rest = &label[label.find("blk.")? + 4..];
    rest.split('.').next()?.parse().ok()
}

/// A label with another word for the number of each layer that it names.
pub fn fold(label: &str, mut word: impl FnMut(u64) -> String) -> String {
    let mut parts = label.split("blk.");
    let mut text = parts.next().unwrap_or_default().to_string();
    for part in parts {
        text.push_str("blk.");
        let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        match part[..digits].parse() {
            Ok(layer) => text.push_str(&(word(layer) + &part[digits..])),
            Err(_) => text.push_str(part),
        }
    }
    text
}

/// Ascending numbers as runs: `0-3,7`.
pub fn runs(numbers: &[u64]) -> String {
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable();
    numbers.dedup();
    let runs = numbers.chunk_by(|a, b| *b == a + 1);
    let text = runs.map(|run| match (run[0], run[run.len() - 1]) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    });
    text.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_fold_to_runs() {
        let label = "merge blk.12.attn_q.weight, blk.12.attn_k.weight";
        assert_eq!(layer(label), Some(12));
        assert_eq!(
            fold(label, |_| runs(&[3, 0, 1, 2, 7, 7])),
            "merge blk.0-3,7.attn_q.weight, blk.0-3,7.attn_k.weight"
        );
        for same in ["sample_head output.weight", "blk.", "blk.x.y", ""] {
            assert_eq!((layer(same), fold(same, |_| "*".into())), (None, same.to_string()));
        }
    }
}
