//! A history of runs as a picture: a panel for each test, time from left to right, tokens per second upwards.
//!
//! Runs that cannot be compared (another model, other options or hardware) are drawn apart, each kind under a heading of
//! its own. The picture is one SVG that takes nothing from elsewhere, and follows the reader's choice of light or dark.

use super::compare::comparable;
use super::run::{Run, TestResult};
use jiff::Timestamp;
use std::fmt::{self, Display, Write};

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 20.0;
/// Panels beside each other.
const COLUMNS: usize = 2;
const PANEL: (f64, f64) = (450.0, 210.0);
const GAP: f64 = 20.0;
/// Of a heading.
const HEADING: f64 = 64.0;
/// What lies around the plot of a panel: left, top, right, bottom.
const AROUND: (f64, f64, f64, f64) = (56.0, 40.0, 16.0, 30.0);

const STYLE: &str = "
  svg { --ink: #1f2328; --faint: #656d76; --rule: #d8dee4; --page: #ffffff; --line: #0969da; --version: #8250df }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e6edf3; --faint: #8d96a0; --rule: #30363d; --page: #0d1117; --line: #4493f8; --version: #ab7df8 }
  }
  text { font: 12px system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif; fill: var(--ink) }
  .page { fill: var(--page) } .faint { fill: var(--faint); font-size: 11px }
  .model { font-size: 17px; font-weight: 600 } .test { font-size: 14px; font-weight: 600 }
  .rule { stroke: var(--rule) } .line { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round }
  .spread { stroke: var(--line); stroke-opacity: .45; stroke-width: 1.5 } .dot { fill: var(--line) }
  .since { stroke: var(--version); stroke-dasharray: 3 3 } .version { fill: var(--version); font-size: 11px }
";

/// Draws a history.
pub fn trend(runs: &[Run]) -> String {
    let mut runs: Vec<&Run> = runs.iter().collect();
    runs.sort_by_key(|run| run.time);
    let mut kinds: Vec<Vec<&Run>> = vec![];
    for run in runs {
        match kinds.iter_mut().find(|kind| comparable(kind[0], run).is_ok()) {
            Some(kind) => kind.push(run),
            None => kinds.push(vec![run]),
        }
    }
    let mut body = String::new();
    let mut y = MARGIN;
    for kind in &kinds {
        // Writing to a string does not fail, here and below.
        _ = heading(&mut body, kind, y);
        y += HEADING;
        let panels = panels(kind);
        for (i, panel) in panels.iter().enumerate() {
            let x = MARGIN + (i % COLUMNS) as f64 * (PANEL.0 + GAP);
            let row = (i / COLUMNS) as f64;
            _ = panel.draw(&mut body, x, y + row * (PANEL.1 + GAP));
        }
        y += panels.len().div_ceil(COLUMNS) as f64 * (PANEL.1 + GAP) + MARGIN;
    }
    let (right, legend) = (WIDTH - MARGIN, "tokens per second: medians, ± deviation of the repetitions");
    _ = writeln!(
        body,
        "<text class=\"faint\" x=\"{right}\" y=\"{}\" text-anchor=\"end\">{legend}</text>",
        MARGIN + 16.0
    );
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" width=\"{WIDTH}\" height=\"{y}\" role=\"img\">\n\
         <title>sinter bench: tokens per second over time</title>\n<style>{STYLE}</style>\n\
         <rect class=\"page\" width=\"100%\" height=\"100%\"/>\n{body}</svg>\n"
    )
}

/// Text as XML has it, without what moves a cursor, and cut off where it is no name any more.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST: usize = 120;
        for (i, c) in self.0.chars().filter(|c| !c.is_control()).enumerate() {
            match c {
                _ if i == MOST => return f.write_char('…'),
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '&' => f.write_str("&amp;")?,
                '"' => f.write_str("&quot;")?,
                // These two are no characters of XML.
                '\u{fffe}' | '\u{ffff}' => f.write_char('\u{fffd}')?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// Whose speeds follow.
fn heading(out: &mut String, kind: &[&Run], y: f64) -> fmt::Result {
    let run = kind[0];
    let mut line = run.hardware.summary();
    let o = &run.options;
    for (given, flag) in [(o.exact, "--exact"), (!o.fuse, "--no-fuse"), (!o.graph, "--no-graph")] {
        if given {
            _ = write!(line, ", {flag}");
        }
    }
    if let Some(passes) = &o.passes {
        _ = write!(line, ", --passes {}", passes.join(","));
    }
    _ = write!(line, ", cache {},{}", o.type_k, o.type_v);
    writeln!(
        out,
        "<text class=\"model\" x=\"{MARGIN}\" y=\"{}\">{}</text>",
        y + 16.0,
        Escaped(&run.model.name)
    )?;
    writeln!(out, "<text class=\"faint\" x=\"{MARGIN}\" y=\"{}\">{}</text>", y + 36.0, Escaped(&line))
}

/// One test over time.
struct Panel<'a> {
    points: Vec<(&'a Run, &'a TestResult)>,
}

/// In the order in which tests came up.
fn panels<'a>(kind: &[&'a Run]) -> Vec<Panel<'a>> {
    let mut panels: Vec<Panel<'a>> = vec![];
    for run in kind {
        for result in &run.tests {
            let same = |p: &&mut Panel| {
                let (_, first) = p.points[0];
                (&first.test, first.n_threads) == (&result.test, result.n_threads)
            };
            match panels.iter_mut().find(same) {
                Some(panel) => panel.points.push((run, result)),
                None => panels.push(Panel { points: vec![(run, result)] }),
            }
        }
    }
    panels
}

/// Numbers from `from` to `to`, and where they lie.
struct Axis {
    from: f64,
    to: f64,
    at: (f64, f64),
}

impl Axis {
    fn place(&self, x: f64) -> f64 {
        let share = if self.to > self.from { (x - self.from) / (self.to - self.from) } else { 0.5 };
        self.at.0 + share * (self.at.1 - self.at.0)
    }
}

impl Panel<'_> {
    fn draw(&self, out: &mut String, x: f64, y: f64) -> fmt::Result {
        let (left, top, right, bottom) = AROUND;
        let (x0, x1, y0, y1) = (x + left, x + PANEL.0 - right, y + top, y + PANEL.1 - bottom);
        let (_, last) = self.points[self.points.len() - 1];
        let threads = if last.n_threads == 1 { "thread" } else { "threads" };
        writeln!(
            out,
            "<text class=\"test\" x=\"{x}\" y=\"{}\">{} <tspan class=\"faint\">{} {threads}</tspan></text>",
            y + 16.0,
            Escaped(&last.test),
            last.n_threads,
        )?;
        let mut latest = format!("{} t/s", speed(last.median_ts));
        if let [.., (_, before), _] = self.points[..] {
            let change = 100.0 * (last.median_ts / before.median_ts - 1.0);
            let sign = if change < 0.0 { '−' } else { '+' };
            _ = write!(latest, ", {sign}{:.1} %", change.abs());
        }
        writeln!(out, "<text x=\"{x1}\" y=\"{}\" text-anchor=\"end\">{latest}</text>", y + 16.0)?;

        let (low, high) = self.range();
        let speeds = Axis { from: low, to: high, at: (y1, y0) };
        let step = nice(high - low);
        let ticks = (0..=12).map(|i| ((low / step).ceil() + f64::from(i)) * step);
        for tick in ticks.take_while(|tick| *tick <= high) {
            let at = speeds.place(tick);
            writeln!(out, "<path class=\"rule\" d=\"M{x0:.1} {at:.1}H{x1:.1}\"/>")?;
            let (at, label) = (at + 4.0, tick_label(tick, step));
            writeln!(
                out,
                "<text class=\"faint\" x=\"{}\" y=\"{at:.1}\" text-anchor=\"end\">{label}</text>",
                x0 - 8.0
            )?;
        }

        let seconds = |run: &Run| run.time.as_millisecond() as f64 / 1e3;
        let (first, end) = (self.points[0].0, self.points[self.points.len() - 1].0);
        let times = Axis { from: seconds(first), to: seconds(end), at: (x0 + 8.0, x1 - 8.0) };
        dates(out, &times, y1 + 20.0)?;

        let mut labelled = x0;
        for pair in self.points.windows(2) {
            let (then, now) = (&pair[0].0.software.sinter, &pair[1].0.software.sinter);
            if then == now {
                continue;
            }
            let at = times.place(seconds(pair[1].0));
            writeln!(out, "<path class=\"since\" d=\"M{at:.1} {y0:.1}V{y1:.1}\"/>")?;
            // No label covers another.
            if at - labelled >= 34.0 {
                let (x, y, label) = (at - 4.0, y0 + 2.0, Escaped(now));
                let place = format!("x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"end\"");
                writeln!(out, "<text class=\"version\" {place}>{label}</text>")?;
                labelled = at;
            }
        }
        let at =
            |(run, result): &(&Run, &TestResult)| (times.place(seconds(run)), speeds.place(result.median_ts));
        let line: Vec<String> = self.points.iter().map(at).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        writeln!(out, "<polyline class=\"line\" points=\"{}\"/>", line.join(" "))?;
        for point @ (run, result) in &self.points {
            let ((x, y), spread) = (at(point), result.stddev_ts);
            let ends = [-spread, spread].map(|d| speeds.place((result.median_ts + d).max(low)));
            writeln!(out, "<path class=\"spread\" d=\"M{x:.1} {:.1}V{:.1}\"/>", ends[0], ends[1])?;
            writeln!(
                out,
                "<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"><title>{}: {} t/s ± {}, 95 % of steps within {:.3} ms, sinter {}</title></circle>",
                run.time.strftime("%Y-%m-%d %H:%M:%S"),
                speed(result.median_ts),
                speed(spread),
                result.p95_ns as f64 / 1e6,
                Escaped(&run.software.sinter),
            )?;
        }
        Ok(())
    }

    /// What is shown: all points and their deviations, and not so little that noise looks like a change.
    fn range(&self) -> (f64, f64) {
        let ends = |sign: f64| self.points.iter().map(move |(_, r)| r.median_ts + sign * r.stddev_ts);
        let (low, high) = (ends(-1.0).fold(f64::INFINITY, f64::min), ends(1.0).fold(0.0, f64::max));
        let (middle, half) = (low.midpoint(high), (high - low) / 2.0);
        let half = (1.15 * half).max(0.06 * middle);
        ((middle - half).max(0.0), middle + half)
    }
}

/// A step of 1, 2 or 5 times a power of ten, of which three to seven make `span`.
fn nice(span: f64) -> f64 {
    let rough = span / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let times = [1.0, 2.0, 5.0].into_iter().find(|times| times * power >= rough).unwrap_or(10.0);
    times * power
}

/// With as many digits as steps need.
fn tick_label(x: f64, step: f64) -> String {
    let digits = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
    if x >= 1e6 { format!("{x:.1e}") } else { format!("{x:.digits$}") }
}

/// With three digits or more.
fn speed(x: f64) -> String {
    match x {
        x if x >= 1e7 => format!("{x:.2e}"),
        x if x >= 100.0 => format!("{x:.0}"),
        x if x >= 10.0 => format!("{x:.1}"),
        x => format!("{x:.2}"),
    }
}

/// Four times, or the one that there is, as exact as tells them apart.
fn dates(out: &mut String, times: &Axis, y: f64) -> fmt::Result {
    const DAY: f64 = 86400.0;
    let span = times.to - times.from;
    let format = match span {
        s if s >= 3.0 * DAY => "%Y-%m-%d",
        s if s >= 240.0 => "%m-%d %H:%M",
        _ => "%H:%M:%S",
    };
    let format = if span == 0.0 { "%Y-%m-%d %H:%M" } else { format };
    let shares: &[f64] = match span {
        0.0 => &[0.5],
        s if s < 3.0 => &[0.0, 1.0],
        _ => &[0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0],
    };
    for share in shares {
        let seconds = times.from + share * span;
        let Ok(time) = Timestamp::from_millisecond((seconds * 1e3).round() as i64) else { continue };
        let label = time.strftime(format);
        let x = times.place(seconds);
        writeln!(
            out,
            "<text class=\"faint\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{label}</text>"
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::run::tests::run;

    fn at(day: u32, speeds: [f64; 2]) -> Run {
        Run { time: format!("2026-03-{day:02}T12:00:00Z").parse().unwrap(), ..run(speeds) }
    }

    #[test]
    fn each_test_has_a_panel_and_each_run_a_dot() {
        let svg = trend(&[at(9, [110.0, 50.0]), at(1, [100.0, 50.0]), at(5, [90.0, 50.0])]);
        let count = |what: &str| svg.matches(what).count();
        assert_eq!((count("class=\"test\""), count("<circle"), count("class=\"model\"")), (2, 6, 1));
        // In order of time: down, then up; the latest beside the one before.
        let line = svg.lines().find(|line| line.contains("polyline")).unwrap();
        let points = line.split('"').nth(3).unwrap().split(' ').map(|p| p.split_once(',').unwrap());
        let points: Vec<(f64, f64)> = points.map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).collect();
        assert!(points.is_sorted_by(|a, b| a.0 < b.0), "{points:?}");
        assert!(points[1].1 > points[0].1 && points[0].1 > points[2].1, "{points:?}");
        assert!((points[1].0 - points[0].0 - (points[2].0 - points[1].0)).abs() < 0.2, "{points:?}");
        assert!(svg.contains(">110 t/s, +22.2 %<") && svg.contains(">50.0 t/s, +0.0 %<"), "{svg}");
        assert!(svg.contains(">2026-03-01<") && svg.contains(">2026-03-09<"), "{svg}");
        assert!(svg.contains("prefers-color-scheme: dark") && !svg.contains("href"), "{svg}");
    }

    #[test]
    fn what_cannot_be_compared_is_drawn_apart() {
        let mut other = at(2, [10.0, 5.0]);
        other.hardware.cpu = "<b> & \u{1b} \"c\"".into();
        let mut newer = at(3, [100.0, 50.0]);
        newer.software.sinter = "0.2.0".into();
        let svg = trend(&[at(1, [100.0, 50.0]), other, newer]);
        let count = |what: &str| svg.matches(what).count();
        assert_eq!((count("class=\"model\""), count("class=\"test\""), count("<circle")), (2, 4, 6));
        assert!(svg.contains("&lt;b&gt; &amp;  &quot;c&quot; (avx512)"), "{svg}");
        assert_eq!(count(">0.2.0<"), 2);
    }

    #[test]
    fn any_speed_is_drawn() {
        for speeds in [[1e-9, 1e18], [1.0, 1.0], [99.99, 1e6]] {
            let mut wild = at(1, speeds);
            wild.tests[0].stddev_ts = 1e18;
            for svg in [trend(&[wild.clone()]), trend(&[wild.clone(), at(1, [1.0, 2.0]), at(2, [1e7, 3.0])])]
            {
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            }
        }
    }

    #[test]
    fn ticks_are_round_and_few() {
        for span in [1e-8, 0.3, 1.0, 7.0, 44.0, 999.0, 1e12] {
            let step = nice(span);
            assert!((2.0..=7.0).contains(&(span / step)), "{span} {step}");
        }
        assert_eq!(
            [(20.0, 5.0), (0.25, 0.05), (2e7, 1e7)].map(|(x, s)| tick_label(x, s)),
            ["20", "0.25", "2.0e7"]
        );
    }
}
