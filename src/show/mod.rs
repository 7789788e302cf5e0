//! Graphs, plans and what the passes did, as pictures: Graphviz, SVG, and a page for a browser.
//!
//! A [`Diagram`] is what there is to draw: nodes with what they read, replace and cost, in groups of layers that do the same ([`dot`]
//! writes it for Graphviz, [`svg`] as a picture). A [`View`] is a step on a target before and after fusion, rewrite by rewrite, with the
//! plan's memory; a [`Page`] is a file of views for a browser. Where things lie is decided here, so the page and the pictures look the same.

mod about;
mod chart;
mod diagram;
pub mod dot;
mod layout;
mod limit;
mod memory;
mod page;
mod roofline;
mod svg;
mod tried;
mod view;
mod watch;

pub use diagram::{Diagram, Node, Operand, Read};
pub use limit::Limit;
pub use memory::{Held, Lane, Memory};
pub use page::Page;
pub use tried::Rejected;
pub use view::{Drawn, KernelNode, Member, PageGroup, Parts, Primitive, Roof, View, svg, svg_of_plan};
pub use watch::{Part, Step};
