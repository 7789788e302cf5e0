//! The roofline of a profile as a picture: operations per second over operations for each byte, both logarithmic, with the roofs that
//! memory and arithmetic are (Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009).

use super::svg::Svg;
use super::verdict::{Rate, Roofs, Verdict};
use sinter::bench::{Arithmetic, KernelTime, Profile, Test};
use sinter::ir::Micros;

const WIDTH: f64 = 1180.0;
/// The plot, whose height is at least this, and grows with the legend up to that.
const PLOT: Area = Area { left: 74.0, top: 72.0, width: 620.0, height: 470.0 };
const HIGHEST: f64 = 700.0;
const LEGEND: f64 = 724.0;
/// Between the lines of the legend.
const LINE: f64 = 34.0;
/// Radius of the smallest dot, and of one that takes all the time.
const SMALLEST: f64 = 5.0;
const LARGEST: f64 = 26.0;
/// Half the width and height of a number beside a dot.
const NUMBER: (f64, f64) = (8.0, 7.0);

const STYLE: &str = "
  svg { font: 13px system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif; }
  .ground { fill: #ffffff; } .ink { fill: #1f2328; } .quiet { fill: #656d76; } .grid { stroke: #e6e9ed; } .frame { stroke: #afb8c1; }
  .roof { stroke: #1f2328; stroke-width: 2; } .assumed { stroke: #656d76; stroke-width: 2; stroke-dasharray: 7 5; }
  .lead { stroke: #8c959f; }
  .a { fill: #0969da; stroke: #0550ae; } .b { fill: #d4720a; stroke: #953800; }
  circle { fill-opacity: .55; stroke-width: 1.2; } .key { fill-opacity: .8; }
  .title { font-size: 17px; font-weight: 600; } .small { font-size: 11.5px; } .strong { font-weight: 600; }
  .mid { text-anchor: middle; } .end { text-anchor: end; }
  .number { font-size: 11px; font-weight: 700; text-anchor: middle; paint-order: stroke; stroke: #ffffff; stroke-width: 3px; stroke-opacity: .75; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; } .ink { fill: #e6edf3; } .quiet { fill: #9198a1; } .grid { stroke: #21262d; } .frame { stroke: #484f58; }
    .roof { stroke: #e6edf3; } .assumed { stroke: #9198a1; } .lead { stroke: #6e7681; }
    .a { fill: #4493f8; stroke: #79c0ff; } .b { fill: #f0883e; stroke: #ffb77c; } .number { stroke: #0d1117; }
  }";

/// Where the plot is.
#[derive(Clone, Copy)]
struct Area {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

/// The logarithmic axes.
struct Axes {
    area: Area,
    /// The smallest and the largest: operations a byte, and 1e9 operations a second.
    x: (f64, f64),
    y: (f64, f64),
}

impl Axes {
    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        let part = |value: f64, (low, high): (f64, f64)| (value / low).ln() / (high / low).ln();
        let Area { left, top, width, height } = self.area;
        (left + width * part(x, self.x), top + height * (1.0 - part(y, self.y)))
    }

    /// The right and the lower end.
    fn ends(&self) -> (f64, f64) {
        (self.area.left + self.area.width, self.area.top + self.area.height)
    }
}

/// A kernel in the plot.
struct Dot<'a> {
    kernel: &'a KernelTime,
    class: &'static str,
    share: f64,
    /// Operations a byte, and 1e9 operations a second.
    at: (f64, f64),
    number: usize,
}

impl Dot<'_> {
    /// Its area is its share of the time.
    fn radius(&self) -> f64 {
        (LARGEST * self.share.sqrt()).max(SMALLEST)
    }
}

/// The picture.
pub fn roofline(model: &str, target: &str, roofs: &Roofs, steps: &[(Test, Profile)]) -> String {
    let dots = dots(steps);
    let legend_height = dots.len() as f64 * LINE + steps.len() as f64 * 58.0;
    let area = Area { height: (legend_height - 90.0).clamp(PLOT.height, HIGHEST), ..PLOT };
    let axes = axes(area, &dots, roofs);
    let height = (area.top + area.height + 64.0).max(area.top + legend_height - 10.0);
    let mut svg = Svg::new(WIDTH, height, STYLE);
    svg.rect("ground", (0.0, 0.0), (WIDTH, height));
    svg.text("ink title", (area.left, 30.0), format!("{model} on {target}"));
    let what = "each dot is a kernel, its area the share of the step's time; what lies under a roof has that much to gain";
    svg.text("quiet small", (area.left, 50.0), what);
    grid(&mut svg, &axes);
    let mut taken = draw_roofs(&mut svg, &axes, roofs, &dots);
    draw_dots(&mut svg, &axes, &dots, &mut taken);
    legend(&mut svg, steps, &dots, roofs);
    svg.finish(&format!("Roofline of {model} on {target}"))
}

/// The kernels whose operations are counted, most time of a step first.
fn dots(steps: &[(Test, Profile)]) -> Vec<Dot<'_>> {
    let mut dots = vec![];
    for ((_, profile), class) in steps.iter().zip(["a", "b"].into_iter().cycle()) {
        let all = profile.kernels_ns().max(1) as f64;
        for kernel in profile.kernels.iter().filter(|k| k.work.operations > 0 && k.work.bytes > 0 && k.ns > 0)
        {
            let at = (kernel.work.operations as f64 / kernel.work.bytes as f64, kernel.arithmetic() / 1e9);
            dots.push(Dot { kernel, class, share: kernel.ns as f64 / all, at, number: dots.len() + 1 });
        }
    }
    dots
}

/// The share of a step's time that is of kernels without counted operations.
fn uncounted(profile: &Profile) -> f64 {
    let ns: u64 = profile.kernels.iter().filter(|k| k.work.operations == 0).map(|k| k.ns).sum();
    ns as f64 / profile.kernels_ns().max(1) as f64
}

/// What kernels compute with; floats if there are none.
fn used(dots: &[Dot<'_>]) -> Vec<Arithmetic> {
    let mut used = vec![Arithmetic::Integer, Arithmetic::Half, Arithmetic::Float];
    used.retain(|of| dots.iter().any(|dot| dot.kernel.arithmetic == *of));
    if used.is_empty() { vec![Arithmetic::Float] } else { used }
}

/// Axes that hold all dots, and where the roofs meet.
fn axes(area: Area, dots: &[Dot<'_>], roofs: &Roofs) -> Axes {
    let rates = used(dots).into_iter().map(|of| roofs.rate(of).per_second / 1e9);
    let (least, highest) = rates.fold((f64::INFINITY, 0f64), |(a, b), rate| (a.min(rate), b.max(rate)));
    let ridge = highest * 1e9 / roofs.bandwidth;
    let xs = || dots.iter().map(|dot| dot.at.0);
    let ys = || dots.iter().map(|dot| dot.at.1);
    let x = (xs().fold(1.0, f64::min) / 4.0, xs().fold(ridge, f64::max) * 4.0);
    let y = (ys().fold(least, f64::min) / 2.0, ys().fold(highest, f64::max) * 2.5);
    Axes { area, x, y }
}

/// 1, 2 and 5 of each power of ten between two numbers.
fn ticks((low, high): (f64, f64)) -> Vec<(f64, bool)> {
    let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let all = powers.flat_map(|power| [1.0, 2.0, 5.0].map(|n| (n * 10f64.powi(power), n == 1.0)));
    all.filter(|(value, _)| (low..=high).contains(value)).collect()
}

fn grid(svg: &mut Svg, axes: &Axes) {
    let (Area { left, top, width, height }, (right, bottom)) = (axes.area, axes.ends());
    for (value, major) in ticks(axes.x) {
        let (x, _) = axes.at(value, axes.y.0);
        svg.line("grid", (x, top), (x, bottom));
        if major {
            svg.text("quiet small mid", (x, bottom + 18.0), number(value));
        }
    }
    for (value, major) in ticks(axes.y) {
        let (_, y) = axes.at(axes.x.0, value);
        svg.line("grid", (left, y), (right, y));
        if major {
            svg.text("quiet small end", (left - 8.0, y + 4.0), number(value));
        }
    }
    svg.line("frame", (left, bottom), (right, bottom));
    svg.line("frame", (left, top), (left, bottom));
    svg.text("ink mid", (left + width / 2.0, bottom + 40.0), "operations for each byte that is moved");
    svg.turned("ink mid", (22.0, top + height / 2.0), -90.0, "Gop/s");
}

/// A power of ten.
fn number(value: f64) -> String {
    if value >= 1.0 { format!("{value:.0}") } else { format!("{value}") }
}

/// Memory up to the highest arithmetic roof, and the arithmetic roofs from memory on; where their words are.
fn draw_roofs(svg: &mut Svg, axes: &Axes, roofs: &Roofs, dots: &[Dot<'_>]) -> Vec<(f64, f64)> {
    let slope = roofs.bandwidth / 1e9;
    let name = |of| match of {
        Arithmetic::Integer => "8-bit integers",
        Arithmetic::Half => "16 bits",
        Arithmetic::Float => "floats",
    };
    let flat: Vec<(&str, &Rate)> = used(dots).into_iter().map(|of| (name(of), roofs.rate(of))).collect();
    let highest = flat.iter().map(|(_, rate)| rate.per_second / 1e9).fold(0.0, f64::max);
    // Where the memory's roof enters the plot from below or from the left.
    let first = axes.x.0.max(axes.y.0 / slope);
    let (from, to) = (axes.at(first, first * slope), axes.at(highest / slope, highest));
    svg.line("roof", from, to);
    let (dx, dy) = (to.0 - from.0, to.1 - from.1);
    let (along, memory) = (dy.atan2(dx), format!("memory: {slope:.0} GB/s, {}", roofs.bandwidth_is));
    // Over its lower end.
    let begin =
        (from.0 + 14.0 * along.cos() + 9.0 * along.sin(), from.1 + 14.0 * along.sin() - 9.0 * along.cos());
    let mut taken: Vec<(f64, f64)> = (0..=length(&memory) as u32 / 10)
        .map(|i| f64::from(10 * i))
        .map(|by| (begin.0 + by * along.cos(), begin.1 + by * along.sin()))
        .collect();
    svg.turned("ink small", begin, along.to_degrees(), memory);
    for (what, rate) in flat {
        let gops = rate.per_second / 1e9;
        let (from, to) = (axes.at(gops / slope, gops), (axes.ends().0, axes.at(1.0, gops).1));
        svg.line(if rate.known() == "assumed" { "assumed" } else { "roof" }, from, to);
        let words = format!("{what}: {gops:.0} Gop/s, {}", rate.known());
        // Over the dots that lie there.
        let over = dots.iter().filter_map(|dot| {
            let ((x, y), r) = (axes.at(dot.at.0, dot.at.1), dot.radius());
            let there = x + r > to.0 - length(&words) && y + r > to.1 - 24.0 && y < to.1 + r;
            there.then_some(to.1 - (y - r))
        });
        let base = to.1 - 7.0 - over.fold(0.0, f64::max);
        taken.extend((0..=length(&words) as u32 / 10).map(|i| (to.0 - f64::from(10 * i), base - 4.0)));
        svg.text("ink small end", (to.0, base), words);
    }
    taken
}

/// About how long small text is.
fn length(text: &str) -> f64 {
    6.0 * text.chars().count() as f64
}

/// The dots, large ones below, and a number at each.
fn draw_dots(svg: &mut Svg, axes: &Axes, dots: &[Dot<'_>], taken: &mut Vec<(f64, f64)>) {
    let mut order: Vec<&Dot<'_>> = dots.iter().collect();
    order.sort_by(|a, b| b.share.total_cmp(&a.share));
    for dot in &order {
        let KernelTime { kernel, node, ns, .. } = dot.kernel;
        let time = Micros(*ns as f64 / 1e3);
        let title = format!("{kernel} {node}: {time}, {:.1} % of the step", 100.0 * dot.share);
        svg.circle(dot.class, axes.at(dot.at.0, dot.at.1), dot.radius(), title);
    }
    let centres: Vec<((f64, f64), f64)> =
        dots.iter().map(|dot| (axes.at(dot.at.0, dot.at.1), dot.radius())).collect();
    for dot in order {
        let (centre, radius) = (axes.at(dot.at.0, dot.at.1), dot.radius());
        let place = place(axes, (centre, radius), &centres, taken);
        if distance(place, centre) > radius + 14.0 {
            let towards = |from: (f64, f64), to: (f64, f64), by: f64| {
                let part = by / distance(from, to).max(1.0);
                (from.0 + part * (to.0 - from.0), from.1 + part * (to.1 - from.1))
            };
            svg.line("lead", towards(centre, place, radius), towards(place, centre, 8.0));
        }
        taken.push(place);
        svg.text("ink number", (place.0, place.1 + 4.0), dot.number);
    }
}

fn distance(a: (f64, f64), b: (f64, f64)) -> f64 {
    (a.0 - b.0).hypot(a.1 - b.1)
}

/// Where a number stands: in its dot, if that has room and nothing lies over it, else as near as it is clear of all others.
fn place(
    axes: &Axes,
    (centre, radius): ((f64, f64), f64),
    dots: &[((f64, f64), f64)],
    taken: &[(f64, f64)],
) -> (f64, f64) {
    let apart = |at: (f64, f64)| {
        taken
            .iter()
            .all(|other| (other.0 - at.0).abs() > 2.0 * NUMBER.0 || (other.1 - at.1).abs() > 2.0 * NUMBER.1)
    };
    let clear = |at: (f64, f64), own: bool| {
        let hit = |(other, r): &((f64, f64), f64)| {
            distance(*other, at) < r + NUMBER.0 && !(own && *other == centre)
        };
        apart(at) && !dots.iter().any(hit)
    };
    let (Area { left, top, .. }, (right, bottom)) = (axes.area, axes.ends());
    let inside = (left + 10.0..right - 10.0, top + 10.0..bottom - 10.0);
    if radius >= 11.0 && clear(centre, true) {
        return centre;
    }
    for ring in 0..12 {
        let reach = radius + 11.0 + 9.0 * f64::from(ring);
        for step in 0..24 {
            // To the right first, then around.
            let turn = f64::from(step) * std::f64::consts::TAU / 24.0;
            let at = (centre.0 + reach * turn.cos(), centre.1 + reach * turn.sin());
            if inside.0.contains(&at.0) && inside.1.contains(&at.1) && clear(at, false) {
                return at;
            }
        }
    }
    centre
}

/// The names to the numbers, step by step.
fn legend(svg: &mut Svg, steps: &[(Test, Profile)], dots: &[Dot<'_>], roofs: &Roofs) {
    let mut y = PLOT.top + 4.0;
    for ((test, profile), class) in steps.iter().zip(["a", "b"].into_iter().cycle()) {
        svg.circle(&format!("{class} key"), (LEGEND + 7.0, y - 5.0), 7.0, test);
        let time = Micros(profile.kernels_ns() as f64 / 1e3);
        svg.text("ink strong", (LEGEND + 22.0, y), format!("{test}: {time} of kernels"));
        y += 22.0;
        // Those of a step are in it.
        let of_step = |dot: &&Dot<'_>| profile.kernels.iter().any(|kernel| std::ptr::eq(kernel, dot.kernel));
        for dot in dots.iter().filter(of_step) {
            let KernelTime { kernel, node, ns, .. } = dot.kernel;
            let verdict = Verdict::of(dot.kernel, roofs);
            svg.text("ink strong small end", (LEGEND + 16.0, y), dot.number);
            svg.text("ink small", (LEGEND + 22.0, y), shortened(&format!("{kernel} {node}"), 66));
            let (share, roof) = (100.0 * dot.share, 100.0 * verdict.roofline_share);
            let text = format!(
                "{}, {share:.1} % of the step; {}, at {roof:.0} % of its roof",
                Micros(*ns as f64 / 1e3),
                verdict.limit
            );
            svg.text("quiet small", (LEGEND + 22.0, y + 15.0), text);
            y += LINE;
        }
        let uncounted = uncounted(profile);
        if uncounted > 0.0 {
            let text = format!(
                "not shown: kernels without matmul or attention, {:.1} % of the step",
                100.0 * uncounted
            );
            svg.text("quiet small", (LEGEND + 22.0, y), text);
        }
        y += 36.0;
    }
}

/// The first letters of a text that is too long.
fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}
