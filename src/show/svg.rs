//! Pictures as SVG: pieces for the page, and a document that stands alone.

use super::chart::Chart;
use super::layout::{Line, Picture, Placed};
use super::view::View;
use std::fmt::Write;

/// The colours and fonts of all pictures, light and dark.
pub(super) const STYLE: &str = include_str!("page/picture.css");

/// The least that a picture of a group is wide, for its title.
const TITLE_WIDTH: f64 = 260.0;
const GAP: f64 = 28.0;

/// A picture without the element around it.
pub(super) fn fragment(picture: &Picture) -> String {
    let mut svg = String::new();
    for line in &picture.lines {
        path(&mut svg, line);
    }
    for placed in &picture.boxes {
        node(&mut svg, placed);
    }
    for line in &picture.lines {
        let gone = gone(line);
        let (x, y) = (line.at.0, line.at.1 + 3.5);
        _ = write!(
            svg,
            "<text class=\"bytes{gone} x=\"{x:.0}\" y=\"{y:.1}\">{}</text>",
            escaped(&line.label)
        );
    }
    svg
}

/// The end of a class, and of which node the value is that is no longer written.
fn gone(line: &Line) -> String {
    match (line.gone, line.of) {
        (Some(_), Some(of)) => format!(" gone\" data-of=\"{of}\""),
        (Some(_), None) => " gone\"".into(),
        (None, _) => "\"".into(),
    }
}

fn path(svg: &mut String, line: &Line) {
    let [first, rest @ ..] = &line.points[..] else { return };
    let gone = gone(line);
    _ = write!(svg, "<path class=\"edge{gone} d=\"M{:.0} {:.0}", first.0, first.1);
    // Through the middles of the segments, so that corners are round.
    for pair in rest.windows(2) {
        let middle = ((pair[0].0 + pair[1].0) / 2.0, (pair[0].1 + pair[1].1) / 2.0);
        _ = write!(svg, "Q{:.0} {:.0} {:.0} {:.0}", pair[0].0, pair[0].1, middle.0, middle.1);
    }
    if let Some(last) = rest.last() {
        _ = write!(svg, "L{:.0} {:.0}", last.0, last.1);
    }
    svg.push_str("\"/>");
}

fn node(svg: &mut String, placed: &Placed) {
    let Placed { x, y, width, height, .. } = placed;
    let item = placed.item.map_or(String::new(), |item| format!(" data-i=\"{item}\""));
    _ = write!(svg, "<g class=\"node {}\"{item}>", placed.class);
    _ = write!(svg, "<rect x=\"{x:.0}\" y=\"{y:.0}\" width=\"{width:.0}\" height=\"{height:.0}\" rx=\"4\"/>");
    let middle = x + width / 2.0;
    for (i, line) in placed.text.iter().enumerate() {
        let class = if i == 0 { "name" } else { "more" };
        let y = y + 15.0 + i as f64 * 14.0;
        _ = write!(svg, "<text class=\"{class}\" x=\"{middle:.0}\" y=\"{y:.0}\">{}</text>", escaped(line));
    }
    svg.push_str("</g>");
}

/// A group as a document draws it: its title, and pictures side by side.
pub(super) struct Frame<'a> {
    pub title: String,
    pub pictures: Vec<&'a Picture>,
}

/// The least that a picture with charts is wide, without its margins.
const CHART_WIDTH: f64 = 640.0;
/// Widths of a character: of a line and of the heading, as `picture.css` has them.
const LINE_CHARACTER: f64 = 7.3;
const HEADING_CHARACTER: f64 = 8.5;

/// Lines of at most so many characters, broken between words, and within one that is longer.
pub(super) fn broken(text: &str, most: usize) -> Vec<String> {
    let (mut lines, mut line) = (vec![], String::new());
    for word in text.split(' ') {
        let mut word: Vec<char> = word.chars().collect();
        let length = line.chars().count();
        if length > 0 && length + 1 + word.len() > most {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        while word.len() > most {
            lines.push(word.drain(..most).collect());
        }
        line.extend(word);
    }
    lines.push(line);
    lines
}

/// A document that stands alone: a heading, charts of a width, and groups of layers below each other.
pub(super) fn document(
    heading: &[String],
    charts: &[&dyn Fn(f64) -> Chart],
    columns: &[&str],
    frames: &[Frame],
) -> String {
    let widths: Vec<f64> = (0..columns.len().max(1))
        .map(|i| frames.iter().filter_map(|f| f.pictures.get(i)).fold(TITLE_WIDTH, |w, p| w.max(p.width)))
        .collect();
    let of_titles = frames.iter().map(|frame| frame.title.chars().count() as f64 * LINE_CHARACTER);
    let inner = widths.iter().sum::<f64>() + GAP * (widths.len() as f64 - 1.0);
    let inner = of_titles.fold(inner, f64::max).max(if charts.is_empty() { 0.0 } else { CHART_WIDTH });
    let width = inner + 2.0 * GAP;
    let mut y = 20.0;
    let mut body = String::new();
    for (i, line) in heading.iter().enumerate() {
        let (class, character) =
            if i == 0 { ("heading", HEADING_CHARACTER) } else { ("line", LINE_CHARACTER) };
        for line in broken(line, (inner / character) as usize) {
            _ = writeln!(body, "<text class=\"{class}\" x=\"{GAP}\" y=\"{y}\">{}</text>", escaped(&line));
            y += 18.0;
        }
    }
    for chart in charts {
        let Chart { svg, height } = chart(inner);
        _ = writeln!(body, "<g class=\"chart\" transform=\"translate({GAP} {y:.0})\">{svg}</g>");
        y += height + 10.0;
    }
    y += 8.0;
    let mut x = GAP;
    for (column, width) in columns.iter().zip(&widths) {
        _ = writeln!(body, "<text class=\"column\" x=\"{x:.0}\" y=\"{y:.0}\">{}</text>", escaped(column));
        x += width + GAP;
    }
    for frame in frames {
        let height = frame.pictures.iter().fold(0.0, |h: f64, p| h.max(p.height)) + 26.0;
        y += 12.0;
        _ = writeln!(
            body,
            "<rect class=\"frame\" x=\"{:.0}\" y=\"{y:.0}\" width=\"{:.0}\" height=\"{height:.0}\" rx=\"8\"/>\
             <text class=\"title\" x=\"{GAP}\" y=\"{:.0}\">{}</text>",
            GAP / 2.0,
            width - GAP,
            y + 18.0,
            escaped(&frame.title)
        );
        let mut x = GAP;
        for (picture, column) in frame.pictures.iter().zip(&widths) {
            let at = x + (column - picture.width).max(0.0) / 2.0;
            _ = writeln!(
                body,
                "<g transform=\"translate({at:.0} {:.0})\">{}</g>",
                y + 24.0,
                fragment(picture)
            );
            x += column + GAP;
        }
        y += height;
    }
    let height = y + 14.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"picture\" width=\"{width:.0}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {width:.0} {height:.0}\">\n<style>{STYLE}</style>\n{MARKER}\n\
         <rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n{body}</svg>\n"
    )
}

/// The head of an arrow.
pub(super) const MARKER: &str = "<defs><marker id=\"arrow\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" \
    markerWidth=\"6\" markerHeight=\"6\" orient=\"auto\"><path class=\"head\" d=\"M0 0L8 4L0 8Z\"/></marker></defs>";

/// The heading of a view's picture.
pub(super) fn heading(view: &View) -> Vec<String> {
    let first = format!("{} on {}: {}", view.model, view.target, view.program);
    std::iter::once(first).chain(view.about.iter().cloned()).collect()
}

/// Text as XML has it.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML has none of these, not even escaped.
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_where_they_end() {
        assert_eq!(broken("a step of T=1", 9), ["a step of", "T=1"]);
        assert_eq!(broken("of abcdefghij k", 4), ["of", "abcd", "efgh", "ij k"]);
        assert_eq!(broken("", 4), [""]);
    }
}
