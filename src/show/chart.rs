//! The charts of the still pictures: a step's time by kernel, what was not fused, and the memory of a plan over its calls, with its streams
//! as lanes.

use super::memory::Memory;
use super::svg::{broken, escaped};
use super::tried::Rejected;
use crate::ir::Micros;
use crate::runtime::Size;
use std::collections::BTreeSet;
use std::fmt::Write;

/// Width of a character in the font of `picture.css`, of 11 pixels.
const CHARACTER: f64 = 6.65;
const LINE: f64 = 18.0;

/// A chart without the element around it, at the left upper corner.
pub(super) struct Chart {
    pub svg: String,
    pub height: f64,
}

/// The time of all kernels of one name.
#[derive(Clone, Debug)]
pub(super) struct Share {
    pub name: String,
    /// Its colour, of CSS.
    pub class: String,
    pub us: f64,
}

pub(super) fn hue(class: &str) -> &str {
    class.trim_start_matches("fused ")
}

/// Time by kernel: a bar, and below it what is what.
pub(super) fn bar(shares: &[Share], width: f64) -> Chart {
    let all: f64 = shares.iter().map(|share| share.us).sum();
    let mut shares: Vec<&Share> = shares.iter().filter(|share| share.us > 0.0).collect();
    shares.sort_by(|a, b| b.us.total_cmp(&a.us));
    let (mut svg, mut x) = (String::new(), 0.0);
    for share in &shares {
        let part = width * share.us / all;
        let class = hue(&share.class);
        _ = write!(
            svg,
            "<rect class=\"call {class}\" x=\"{x:.1}\" y=\"0\" width=\"{part:.1}\" height=\"16\"/>"
        );
        x += part;
    }
    let (mut x, mut y) = (0.0, 34.0);
    for share in &shares {
        let percent = 100.0 * share.us / all;
        let text = format!("{} {}, {percent:.1} %", share.name, Micros(share.us));
        let wide = 14.0 + (text.chars().count() as f64 + 2.0) * CHARACTER;
        if x > 0.0 && x + wide > width {
            (x, y) = (0.0, y + LINE);
        }
        let (class, top, from) = (hue(&share.class), y - 9.0, x + 14.0);
        _ = write!(
            svg,
            "<rect class=\"call {class}\" x=\"{x:.0}\" y=\"{top:.0}\" width=\"10\" height=\"10\"/>\
             <text x=\"{from:.0}\" y=\"{y:.0}\">{}</text>",
            escaped(&text)
        );
        x += wide;
    }
    Chart { svg, height: y + 8.0 }
}

/// What was not fused, and why: a line each, or as many as it needs.
pub(super) fn not_fused(rejected: &[Rejected], width: f64) -> Chart {
    let times: u64 = rejected.iter().map(|rejected| rejected.times).sum();
    let mut lines = vec![format!("not fused: {times}")];
    for Rejected { pass, at, why, times, .. } in rejected {
        let many = if *times > 1 { format!(" × {times}") } else { String::new() };
        let text = format!("{pass} at {at}{many}: {why}");
        lines.extend(broken(&text, (width / CHARACTER) as usize - 2));
    }
    let mut svg = String::new();
    for (i, line) in lines.iter().enumerate() {
        let (class, x) = if i == 0 { ("line", 0.0) } else { ("", 2.0 * CHARACTER) };
        let y = 12.0 + LINE * i as f64;
        _ = write!(svg, "<text class=\"{class}\" x=\"{x:.0}\" y=\"{y:.0}\">{}</text>", escaped(line));
    }
    Chart { svg, height: LINE * lines.len() as f64 }
}

const PLOT: f64 = 190.0;
const LANE: f64 = 16.0;
/// Where the plot begins, for the offsets beside it.
const LEFT: f64 = 72.0;

/// Offsets of the arena in pixels. They are in scale, but for stretches without which all else would be flat: those are drawn shorter.
struct Offsets {
    /// The first byte and the number of bytes of each stretch, where it begins, and how high it is.
    runs: Vec<(u64, u64, f64, f64)>,
    broken: Vec<usize>,
}

impl Offsets {
    fn of(memory: &Memory) -> Offsets {
        let held =
            memory.buffers.iter().flat_map(|held| [held.offset, held.offset.saturating_add(held.bytes)]);
        let edges: BTreeSet<u64> = [0, memory.arena_bytes].into_iter().chain(held).collect();
        let edges: Vec<u64> = edges.into_iter().collect();
        let runs: Vec<(u64, u64)> = edges.windows(2).map(|pair| (pair[0], pair[1] - pair[0])).collect();
        let all: u64 = runs.iter().map(|run| run.1).sum();
        let is_long = |bytes: u64| bytes > all / 3;
        let rest: u64 = runs.iter().map(|run| run.1).filter(|bytes| !is_long(*bytes)).sum();
        let shown = |bytes: u64| if is_long(bytes) && rest > 0 { bytes.min(rest / 4) } else { bytes };
        let scale = PLOT / (runs.iter().map(|run| shown(run.1)).sum::<u64>().max(1) as f64);
        let mut up = 0.0;
        let mut offsets = Offsets { runs: vec![], broken: vec![] };
        for (from, bytes) in runs {
            let high = shown(bytes) as f64 * scale;
            if shown(bytes) < bytes {
                offsets.broken.push(offsets.runs.len());
            }
            offsets.runs.push((from, bytes, up, high));
            up += high;
        }
        offsets
    }

    /// Pixels above the beginning of the arena.
    fn at(&self, offset: u64) -> f64 {
        let run = self.runs.iter().rev().find(|run| run.0 <= offset);
        run.map_or(0.0, |(from, bytes, up, high)| up + (offset - from) as f64 / (*bytes).max(1) as f64 * high)
    }
}

/// Buffers as rectangles from their first call to their last, and the calls on the lanes of their streams below. `class` is the colour of a
/// call, of CSS.
pub(super) fn memory_plan(memory: &Memory, class: &dyn Fn(usize) -> String, width: f64) -> Chart {
    let calls = memory.calls.len().max(1) as f64;
    let offsets = Offsets::of(memory);
    let said = broken(&said(memory, &offsets), (width / CHARACTER) as usize);
    let (top, right) = (LINE * said.len() as f64 + 6.0, width - 4.0);
    let x = |call: usize| LEFT + call as f64 / calls * (right - LEFT);
    let y = |offset: u64| top + PLOT - offsets.at(offset);
    let mut svg = format!(
        "<rect class=\"grid\" fill=\"none\" x=\"{LEFT}\" y=\"{top}\" width=\"{:.0}\" height=\"{PLOT}\"/>",
        right - LEFT
    );
    for (i, line) in said.iter().enumerate() {
        let y = 12.0 + LINE * i as f64;
        _ = write!(svg, "<text class=\"line\" x=\"0\" y=\"{y}\">{}</text>", escaped(line));
    }
    for held in &memory.buffers {
        let class = if held.role.is_empty() { class(held.from) } else { "io".into() };
        let high = (y(held.offset) - y(held.offset.saturating_add(held.bytes))).max(0.8);
        _ = write!(
            svg,
            "<rect class=\"held {}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{high:.1}\"/>",
            hue(&class),
            x(held.from),
            y(held.offset) - high,
            x(held.to + 1) - x(held.from)
        );
    }
    let mut marks = vec![0];
    for (from, bytes, up, high) in offsets.broken.iter().map(|run| offsets.runs[*run]) {
        let middle = top + PLOT - up - high / 2.0;
        let teeth = ((right - LEFT) / 12.0).max(1.0) as usize;
        let points = (0..=teeth).map(|i| {
            let (part, way) = (i as f64 / teeth as f64, if i % 2 == 0 { 3.0 } else { -3.0 });
            format!("{:.1} {:.1}", LEFT + part * (right - LEFT), middle + way)
        });
        let zigzag = points.collect::<Vec<_>>().join("L");
        for kind in ["break", "break thin"] {
            _ = write!(svg, "<path class=\"{kind}\" d=\"M{zigzag}\"/>");
        }
        marks.extend([from, from + bytes]);
    }
    marks.push(memory.arena_bytes);
    // What is too close to the label below has none.
    let mut last = f64::INFINITY;
    for offset in marks {
        if last - y(offset) < 11.0 {
            continue;
        }
        last = y(offset);
        let text = if offset == 0 { "0".into() } else { Size(offset).to_string() };
        let (at, base) = (LEFT - 4.0, last + 3.0);
        _ = write!(svg, "<text class=\"offset\" x=\"{at}\" y=\"{base:.1}\">{text}</text>");
    }
    let lanes = top + PLOT + 8.0;
    let lane = |stream: u32| lanes + f64::from(stream) * LANE;
    for stream in 0..memory.streams {
        let (at, base) = (LEFT - 4.0, lane(stream) + 10.0);
        _ = write!(svg, "<text class=\"offset\" x=\"{at}\" y=\"{base:.0}\">stream {stream}</text>");
    }
    for (at, call) in memory.calls.iter().enumerate() {
        _ = write!(
            svg,
            "<rect class=\"call {}\" x=\"{:.1}\" y=\"{:.0}\" width=\"{:.1}\" height=\"{:.0}\"/>",
            hue(&class(at)),
            x(at),
            lane(call.stream),
            (x(1) - x(0) - 0.3).max(0.7),
            LANE - 3.0
        );
        for &from in &call.waits {
            let (begin, end) = (lane(memory.calls[from].stream) + 6.0, lane(call.stream) + 6.0);
            _ = write!(svg, "<path class=\"wait\" d=\"M{:.1} {begin}L{:.1} {end}\"/>", x(from + 1), x(at));
        }
    }
    Chart { svg, height: lane(memory.streams) + 8.0 }
}

/// What the memory is, in words.
fn said(memory: &Memory, offsets: &Offsets) -> String {
    let counted = |n: u64, one: &str| if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") };
    let said = format!(
        "memory: arena {}, at most {} live at once; {} on {}, from left to right",
        Size(memory.arena_bytes),
        Size(memory.lower_bound),
        counted(memory.calls.len() as u64, "call"),
        counted(u64::from(memory.streams), "stream")
    );
    let cut: Vec<String> = offsets.broken.iter().map(|run| Size(offsets.runs[*run].1).to_string()).collect();
    match cut.is_empty() {
        true => said,
        false => format!("{said}; where the zigzag is, {} are drawn shorter", cut.join(" and ")),
    }
}
