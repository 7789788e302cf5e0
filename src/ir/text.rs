//! The text form.
use super::graph::Graph;
impl std::fmt::Display for Graph {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Ok(())
    }
}
#[derive(Debug)]
pub struct ParseError;
