//! The page: one file for a browser, with everything in it.

use super::svg::{MARKER, STYLE, escaped};
use super::view::View;
use serde::Serialize;

const HTML: &str = include_str!("page/page.html");
const CSS: &str = include_str!("page/page.css");
const JS: &str = include_str!("page/page.js");
const CHARTS: &str = include_str!("page/charts.js");

/// What the page shows: a model, a step at a time, on one target or several.
#[derive(Clone, Debug, Serialize)]
pub struct Page {
    /// Of sinter.
    pub version: &'static str,
    pub model: String,
    pub views: Vec<View>,
}

impl Page {
    /// The views of a model.
    pub fn new(model: impl Into<String>, views: Vec<View>) -> Page {
        Page { version: env!("CARGO_PKG_VERSION"), model: model.into(), views }
    }

    /// The page as HTML: it needs no other file and no network.
    ///
    /// # Errors
    /// If the data cannot be written as JSON, which is a defect.
    pub fn to_html(&self) -> Result<String, serde_json::Error> {
        // Within a script, `</script>` and `<!--` end or change it wherever they stand.
        let data = serde_json::to_string(self)?.replace('<', "\\u003c");
        let style = format!("{STYLE}\n{CSS}");
        let title = escaped(&self.model);
        let script = format!("{CHARTS}\n{JS}");
        // In one go, so that nothing in what was put in is taken for a place to put something.
        let mut html = String::with_capacity(HTML.len() + data.len() + style.len() + script.len());
        let mut rest = HTML;
        for (place, text) in [
            ("{{title}}", title.as_str()),
            ("{{style}}", &style),
            ("{{marker}}", MARKER),
            ("{{data}}", &data),
            ("{{script}}", &script),
        ] {
            if let Some((before, after)) = rest.split_once(place) {
                html += before;
                html += text;
                rest = after;
            }
        }
        Ok(html + rest)
    }
}
