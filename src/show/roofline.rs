//! The roofline of the still pictures: operations per second over operations for each byte, both by powers of ten, as `page/charts.js` draws
//! it for the page (Williams, Waterman, Patterson, 2009, doi:10.1145/1498765.1498785).

use super::chart::{Chart, hue};
use super::view::Roof;
use std::fmt::Write;

/// Kernels of equal layers, together.
pub(super) struct Dot {
    /// Its colour, of CSS.
    pub class: String,
    /// Operations for each byte, and a second.
    pub intensity: f64,
    pub rate: f64,
    /// Of the step's time.
    pub share: f64,
}

const WIDEST: f64 = 560.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 44.0;
const TOP: f64 = 24.0;
const BELOW: f64 = 36.0;

/// A number of operations a second.
fn per_second(rate: f64) -> String {
    match rate {
        rate if rate >= 1e12 => format!("{:.1} Top/s", rate / 1e12),
        rate => format!("{:.0} Gop/s", rate / 1e9),
    }
}

/// A power of ten, as few characters as it may have.
fn power(exponent: i32) -> String {
    let (unit, less) = match exponent {
        12.. => ("T", 12),
        9..=11 => ("G", 9),
        6..=8 => ("M", 6),
        _ => ("", 0),
    };
    10f64.powi(exponent - less).to_string() + unit
}

/// A dot for each, as large as its share of the time, below what memory and arithmetic allow.
pub(super) fn roofline(roof: &Roof, dots: &[Dot], width: f64) -> Chart {
    let right = width.min(WIDEST) - 18.0;
    let bandwidth = roof.bandwidth_gbs * 1e9;
    let named = [("f32", Some(roof.f32_gflops)), ("8-bit", roof.dot4_gops), ("16-bit", roof.f16_gflops)];
    let peaks: Vec<(&str, f64)> =
        named.into_iter().filter_map(|(of, gops)| Some((of, gops? * 1e9))).collect();
    let top = peaks.iter().map(|(_, rate)| *rate).fold(1.0, f64::max);
    let down = |n: f64| n.log10().floor() as i32;
    let up = |n: f64| n.log10().ceil() as i32;
    let most = dots.iter().map(|dot| dot.intensity).fold(10.0, f64::max);
    let x0 = down(dots.iter().map(|dot| dot.intensity).fold(0.1, f64::min));
    let x1 = up(most).max(up(top / bandwidth) + 1);
    let y1 = up(top * 1.01);
    // Seven powers at most: what is slower lies on the ground.
    let y0 = down(dots.iter().map(|dot| dot.rate).fold(top, f64::min)).max(y1 - 7).min(y1 - 3);
    let ground = HEIGHT - BELOW;
    let x = |n: f64| LEFT + (n.log10() - f64::from(x0)) / f64::from(x1 - x0) * (right - LEFT);
    let y = |n: f64| {
        ground - (n.log10().max(f64::from(y0)) - f64::from(y0)) / f64::from(y1 - y0) * (ground - TOP)
    };
    let roofs: Vec<String> = peaks.iter().map(|(of, rate)| format!("{of} {}", per_second(*rate))).collect();
    let mut svg = format!(
        "<text class=\"line\" x=\"0\" y=\"12\">roofline: {:.1} GB/s, {}</text>",
        roof.bandwidth_gbs,
        roofs.join(", ")
    );
    for exponent in x0..=x1 {
        let (at, base) = (x(10f64.powi(exponent)), HEIGHT - 22.0);
        _ = write!(
            svg,
            "<path class=\"grid\" d=\"M{at:.1} {TOP}V{ground}\"/>\
             <text class=\"offset across\" x=\"{at:.1}\" y=\"{base}\">{}</text>",
            power(exponent)
        );
    }
    for exponent in y0..=y1 {
        let at = y(10f64.powi(exponent));
        let base = at + 3.0;
        _ = write!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/>\
             <text class=\"offset\" x=\"40\" y=\"{base:.1}\">{}</text>",
            power(exponent)
        );
    }
    for (_, peak) in peaks {
        let low = 10f64.powi(x0).max(10f64.powi(y0) / bandwidth);
        let points = [(low, low * bandwidth), (peak / bandwidth, peak), (10f64.powi(x1), peak)];
        let points = points.map(|(across, rate)| format!("{:.1} {:.1}", x(across), y(rate)));
        _ = write!(svg, "<path class=\"roof\" d=\"M{}\"/>", points.join("L"));
    }
    let base = HEIGHT - 5.0;
    _ = write!(svg, "<text class=\"offset\" x=\"{right}\" y=\"{base}\">operations for each byte</text>");
    for dot in dots {
        _ = write!(
            svg,
            "<circle class=\"call {}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{:.1}\"/>",
            hue(&dot.class),
            x(dot.intensity),
            y(dot.rate),
            3.0 + 9.0 * dot.share.sqrt()
        );
    }
    Chart { svg, height: HEIGHT }
}
