//! Numbers as people read them.

use sinter::runtime::Size;

/// A time that is given in microseconds.
pub fn time(us: f64) -> String {
    match us.abs() {
        n if n < 1e3 => format!("{us:.1} µs"),
        n if n < 1e6 => format!("{:.2} ms", us / 1e3),
        _ => format!("{:.2} s", us / 1e6),
    }
}

/// Bytes; more may be saved than there are, so to say, where a fusion adds some.
pub fn bytes(n: i64) -> String {
    let size = Size(n.unsigned_abs());
    if n < 0 { format!("-{size}") } else { size.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_follow_sizes() {
        assert_eq!([0.25, 999.0, 1500.0, 2_504_828.0].map(time), ["0.2 µs", "999.0 µs", "1.50 ms", "2.50 s"]);
        assert_eq!([-12, 1_500, 67_476_930_000].map(bytes), ["-12 bytes", "1.5 kB", "67.5 GB"]);
        assert_eq!(time(-1500.0), "-1.50 ms");
    }
}
