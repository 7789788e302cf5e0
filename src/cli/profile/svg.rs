//! A small writer of SVG: elements, one after the other.

use std::fmt::Display;

/// A picture that grows.
pub struct Svg {
    width: f64,
    height: f64,
    style: String,
    body: String,
}

impl Svg {
    pub fn new(width: f64, height: f64, style: &str) -> Svg {
        Svg { width, height, style: style.into(), body: String::new() }
    }

    pub fn rect(&mut self, class: &str, (x, y): (f64, f64), (width, height): (f64, f64)) {
        self.add(format!(
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>"
        ));
    }

    pub fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.add(format!(
            "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
        ));
    }

    /// A disc that says something where the mouse is over it.
    pub fn circle(&mut self, class: &str, (x, y): (f64, f64), r: f64, title: impl Display) {
        let title = escaped(&title.to_string());
        self.add(format!(
            "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r:.1}\"><title>{title}</title></circle>"
        ));
    }

    pub fn text(&mut self, class: &str, at: (f64, f64), text: impl Display) {
        self.turned(class, at, 0.0, text);
    }

    /// Text that is turned by so many degrees around where it stands.
    pub fn turned(&mut self, class: &str, (x, y): (f64, f64), degrees: f64, text: impl Display) {
        let text = escaped(&text.to_string());
        let turn = match degrees {
            0.0 => String::new(),
            _ => format!(" transform=\"rotate({degrees:.1} {x:.1} {y:.1})\""),
        };
        self.add(format!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\"{turn}>{text}</text>"));
    }

    fn add(&mut self, element: String) {
        self.body.push_str(&element);
        self.body.push('\n');
    }

    /// The whole file.
    pub fn finish(self, title: &str) -> String {
        let Svg { width, height, style, body } = self;
        let title = escaped(title);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
             height=\"{height:.0}\" role=\"img\">\n<title>{title}</title>\n<style>{style}</style>\n{body}</svg>\n"
        )
    }
}

/// Text of an element. What XML does not have at all becomes a question mark.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\t' | '\n' => out.push(' '),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_text_whatever_it_holds() {
        let mut svg = Svg::new(10.0, 10.0, "");
        svg.text("t", (1.0, 2.0), "a<b & \"c\"\u{1}\n");
        let text = svg.finish("<x>");
        assert!(
            text.contains("<text class=\"t\" x=\"1.0\" y=\"2.0\">a&lt;b &amp; &quot;c&quot;? </text>"),
            "{text}"
        );
        assert!(text.contains("<title>&lt;x&gt;</title>"), "{text}");
    }
}
