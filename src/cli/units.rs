//! Numbers as people read them.

use sinter::runtime::Size;

/// Bytes; more may be saved than there are, so to say, where a fusion adds some.
pub fn bytes(n: i64) -> String {
    let size = Size(n.unsigned_abs());
    if n < 0 { format!("-{size}") } else { size.to_string() }
}

/// Launches, of which one is one.
pub fn launches(n: i64) -> String {
    if n == 1 { "1 launch".into() } else { format!("{n} launches") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sinter::ir::Micros;

    #[test]
    fn units_follow_sizes() {
        assert_eq!([-12, 1_500, 67_476_930_000].map(bytes), ["-12 bytes", "1.5 kB", "67.5 GB"]);
        let times = [0.25, 999.0, -1500.0, 2_504_828.0].map(|us| Micros(us).to_string());
        assert_eq!(times, ["0.2 µs", "999.0 µs", "-1.50 ms", "2.50 s"]);
    }
}
