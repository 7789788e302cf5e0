//! What a rewrite changed, in lines.

use super::super::graph::{Graph, NodeId, Value};
use super::print::{Line, block, names};
use std::collections::HashMap;

/// What one rewrite changed: the statements that are gone after a `-`, those that are new after a `+`, and both of each node that has
/// other operands now, without its body. Values have the names that they have in the text of `before`; those that are new are called `%new0`, `%new1`, ….
///
/// The graphs are one graph before and after a [patch](crate::passes::Patch): nodes that both have are told by their ids.
pub fn diff(before: &Graph, after: &Graph) -> Vec<String> {
    let mut names = names(before);
    let old = statements(before, &names);
    let is_new = |id: &NodeId| before.get(*id).is_none();
    let mut count = 0;
    for id in after.order().into_iter().filter(is_new) {
        for out in 0..after.node(id).outs.len() as u32 {
            names.insert(Value { node: id, out }, format!("%new{count}"));
            count += 1;
        }
    }
    let new = statements(after, &names);
    let marked = |sign: char, these: &[Statement], those: &[Statement]| {
        let others: HashMap<NodeId, &[String]> = those.iter().map(|s| (s.node, &s.lines[..])).collect();
        let mut marked = vec![];
        for Statement { node, lines } in these {
            match others.get(node) {
                None => marked.extend(lines.iter().map(|line| format!("{sign}{line}"))),
                Some(other) if *other == &lines[..] => {}
                // It has other operands; its body, if it has one, is the same.
                Some(_) => {
                    let more = if lines.len() > 1 { " … }" } else { "" };
                    marked.extend(lines.first().map(|line| format!("{sign}{line}{more}")));
                }
            }
        }
        marked
    };
    [marked('-', &old, &new), marked('+', &new, &old)].concat()
}

/// A node and its lines, those of a body included.
struct Statement {
    node: NodeId,
    lines: Vec<String>,
}

fn statements(graph: &Graph, names: &HashMap<Value, String>) -> Vec<Statement> {
    let mut lines = vec![];
    block(graph, None, names, &mut lines);
    let mut statements: Vec<Statement> = vec![];
    for Line { at, text } in lines {
        match (at, statements.last_mut()) {
            // Lines of a body, and the brace that closes it, belong to the node before.
            (Some(at), Some(last)) if at.inner.is_some() => last.lines.push(text),
            (None, Some(last)) => last.lines.push(text),
            (Some(at), _) => statements.push(Statement { node: at.node, lines: vec![text] }),
            (None, None) => {}
        }
    }
    statements
}
