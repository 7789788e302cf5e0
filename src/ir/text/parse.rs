//! Parsing: one pass, one token ahead, at most one body deep.

use super::super::attributes::{Rope, RopeStyle, Slice, StateRole};
use super::super::graph::{Graph, Value};
use super::super::kernel::{Fused, Kernel};
use super::super::op::Op;
use super::super::types::{DType, Dim, Syms, TensorType};
use super::is_name_byte;
use std::collections::HashMap;

/// What is wrong with a text, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{column}: {message}")]
pub struct ParseError {
    /// Counted from 1.
    pub line: usize,
    /// In characters, counted from 1.
    pub column: usize,
    pub message: String,
}

impl Graph {
    /// Reads the text form.
    ///
    /// Types are checked as by [`Graph::add_typed`]; what only [`verify`](super::super::verify()) checks, such
    /// as effects, is not.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn parse(text: &str) -> Result<Graph, ParseError> {
        let mut parser = Parser { text, next: 0, start: 0, token: Token::End };
        parser.graph().map_err(|(at, message)| {
            let before = text.get(..at).unwrap_or(text);
            let line_start = before.rfind('\n').map_or(0, |i| i + 1);
            ParseError {
                line: before.matches('\n').count() + 1,
                column: before[line_start..].chars().count() + 1,
                message,
            }
        })
    }
}

/// A byte offset and what is wrong there.
type Fault = (usize, String);
type Parsed<T> = Result<T, Fault>;
type Names = HashMap<String, Value>;

#[derive(Clone, Debug, PartialEq)]
enum Token<'t> {
    /// `%name`
    Value(String),
    /// `@name`
    Graph(String),
    Word(&'t str),
    Number(&'t str),
    Text(String),
    Sign(&'static str),
    End,
}

impl Token<'_> {
    fn describe(&self) -> String {
        match self {
            Token::Value(name) => format!("%{name}"),
            Token::Graph(name) => format!("@{name}"),
            Token::Word(text) | Token::Number(text) => format!("`{text}`"),
            Token::Text(text) => format!("{text:?}"),
            Token::Sign(sign) => format!("`{sign}`"),
            Token::End => "the end".into(),
        }
    }
}

struct Parser<'t> {
    text: &'t str,
    /// Where the token after `token` starts, or space before it.
    next: usize,
    /// Where `token` starts.
    start: usize,
    token: Token<'t>,
}

/// Attributes as read: the key and the value, each with its place.
type Attributes<'t> = Vec<(usize, &'t str, usize, Token<'t>)>;

impl<'t> Parser<'t> {
    fn graph(&mut self) -> Parsed<Graph> {
        self.advance()?;
        self.word("graph")?;
        let at = self.start;
        let Token::Graph(name) = self.take()? else {
            return Err((at, "expected a name such as @decode".into()));
        };
        let mut graph = Graph::new(name, Syms { t: 1, r: 1 });
        let mut names = Names::new();
        self.sign("(")?;
        if !self.accept(")")? {
            loop {
                let (at, name) = self.value_name()?;
                self.sign(":")?;
                let (type_at, ty) = (self.start, self.tensor_type()?);
                let value = graph.leaf(Op::input(&name), ty).map_err(|e| (type_at, e))?;
                define(&mut names, at, name, value)?;
                if !self.accept(",")? {
                    break;
                }
            }
            self.sign(")")?;
        }
        graph.bounds = self.bounds()?;
        self.block(&mut graph, names, false)?;
        if self.token != Token::End {
            return Err(self.expected("the end"));
        }
        Ok(graph)
    }

    fn bounds(&mut self) -> Parsed<Syms> {
        let (mut t, mut r) = (None, None);
        if self.token == Token::Word("sym") {
            self.advance()?;
            loop {
                let at = self.start;
                let bound = match self.take()? {
                    Token::Word("T") => &mut t,
                    Token::Word("R") => &mut r,
                    other => return Err((at, format!("{} is no symbol: T or R", other.describe()))),
                };
                self.sign("<=")?;
                if bound.replace(self.integer()?).is_some() {
                    return Err((at, "the symbol is bounded twice".into()));
                }
                if !self.accept(",")? {
                    break;
                }
            }
        }
        let t = t.unwrap_or(1);
        Ok(Syms { t, r: r.unwrap_or(t) })
    }

    /// Statements in braces, the last of which returns.
    fn block(&mut self, graph: &mut Graph, mut names: Names, in_body: bool) -> Parsed<()> {
        self.sign("{")?;
        while self.token != Token::Word("return") {
            if self.token == Token::Sign("}") || self.token == Token::End {
                return Err(self.expected("a return"));
            }
            self.statement(graph, &mut names, in_body)?;
        }
        self.advance()?;
        let results = self.operands(&names)?;
        graph.set_return(&results);
        self.sign("}")
    }

    fn statement(&mut self, graph: &mut Graph, names: &mut Names, in_body: bool) -> Parsed<()> {
        let results_at = self.start;
        let mut results = vec![self.value_name()?];
        while self.accept(",")? {
            results.push(self.value_name()?);
        }
        self.sign("=")?;
        let at = self.start;
        let Token::Word(name) = self.take()? else { return Err((at, "expected an operation".into())) };
        let (op, operands, types) = match name {
            "fused" if in_body => return Err((at, "a body holds no fused operation".into())),
            "fused" => {
                let (mut fused, operands, params) = self.fused(graph, names)?;
                let types = self.result_types()?;
                self.block(&mut fused.body, params, true)?;
                (Op::Fused(Box::new(fused)), operands, types)
            }
            "weight" => {
                let name = self.string()?;
                let rows = match self.token {
                    Token::Word("from") => Some(self.slice()?),
                    _ => None,
                };
                (Op::Weight { name, rows }, vec![], self.result_types()?)
            }
            "state" => {
                let name = self.string()?;
                let types = self.result_types()?;
                let role_at = self.start;
                let role = match self.take()? {
                    Token::Word(role) => StateRole::from_name(role),
                    _ => None,
                };
                let role = role.ok_or((role_at, "expected `appended` or `replaced`".to_owned()))?;
                (Op::State { name, role }, vec![], types)
            }
            "const" => {
                let value_at = self.start;
                let token = self.take()?;
                (Op::Const { value: float(value_at, &token)? }, vec![], self.result_types()?)
            }
            _ => {
                let operands = self.operands(names)?;
                let mut attributes = self.attributes()?;
                let op = primitive(at, name, &mut attributes)?;
                if let Some((at, key, ..)) = attributes.first() {
                    return Err((*at, format!("{name} has no attribute {key}")));
                }
                (op, operands, self.result_types()?)
            }
        };
        if types.len() != results.len() {
            return Err((
                results_at,
                format!("{} values need as many types, not {}", results.len(), types.len()),
            ));
        }
        let node = graph.add_typed(op, &operands, &types).map_err(|e| (at, e))?;
        for (out, (at, name)) in results.into_iter().enumerate() {
            define(names, at, name, Value { node, out: out as u32 })?;
        }
        Ok(())
    }

    /// `from 64 of 256`: which rows of a tensor.
    fn slice(&mut self) -> Parsed<Slice> {
        self.advance()?;
        let first = self.integer()?;
        if self.token != Token::Word("of") {
            return Err(self.expected("`of`"));
        }
        self.advance()?;
        Ok(Slice { first, of: self.integer()? })
    }

    /// `kernel(%param = %value, …)`: the node without its statements, its operands, the names in its body.
    fn fused(&mut self, graph: &Graph, names: &Names) -> Parsed<(Fused, Vec<Value>, Names)> {
        let at = self.start;
        let Token::Word(name) = self.take()? else { return Err((at, "expected a kernel".into())) };
        let kernel = Kernel::from_name(name).ok_or_else(|| (at, format!("unknown kernel {name:?}")))?;
        let mut body = Graph::new(name, graph.bounds);
        let (mut operands, mut params) = (vec![], Names::new());
        self.sign("(")?;
        if !self.accept(")")? {
            loop {
                let (at, name) = self.value_name()?;
                self.sign("=")?;
                let operand = self.operand(names)?;
                let input = Op::Input { name: name.clone(), role: graph.state_role(operand) };
                let param = body.leaf(input, graph.ty(operand).clone()).map_err(|e| (at, e))?;
                define(&mut params, at, name, param)?;
                operands.push(operand);
                if !self.accept(",")? {
                    break;
                }
            }
            self.sign(")")?;
        }
        Ok((Fused { kernel, body }, operands, params))
    }

    fn operands(&mut self, names: &Names) -> Parsed<Vec<Value>> {
        let mut operands = vec![];
        if matches!(self.token, Token::Value(_)) {
            operands.push(self.operand(names)?);
            while self.accept(",")? {
                operands.push(self.operand(names)?);
            }
        }
        Ok(operands)
    }

    fn operand(&mut self, names: &Names) -> Parsed<Value> {
        let (at, name) = self.value_name()?;
        names.get(&name).copied().ok_or_else(|| (at, format!("unknown value %{name}")))
    }

    fn attributes(&mut self) -> Parsed<Attributes<'t>> {
        let mut attributes: Attributes<'t> = vec![];
        if self.accept("{")? {
            loop {
                let at = self.start;
                let Token::Word(key) = self.take()? else { return Err((at, "expected an attribute".into())) };
                if attributes.iter().any(|(_, k, ..)| *k == key) {
                    return Err((at, format!("attribute {key} is given twice")));
                }
                self.sign("=")?;
                attributes.push((at, key, self.start, self.take()?));
                if !self.accept(",")? {
                    break;
                }
            }
            self.sign("}")?;
        }
        Ok(attributes)
    }

    fn result_types(&mut self) -> Parsed<Vec<TensorType>> {
        self.sign(":")?;
        let mut types = vec![self.tensor_type()?];
        while self.accept(",")? {
            types.push(self.tensor_type()?);
        }
        Ok(types)
    }

    fn tensor_type(&mut self) -> Parsed<TensorType> {
        let at = self.start;
        let Token::Word(name) = self.take()? else { return Err((at, "expected a type".into())) };
        let dtype = DType::from_name(name).ok_or_else(|| (at, format!("unknown element type {name:?}")))?;
        let mut shape = vec![];
        self.sign("[")?;
        if !self.accept("]")? {
            loop {
                if shape.len() == TensorType::MAX_RANK {
                    return Err(self.fault(format!("more than {} dimensions", TensorType::MAX_RANK)));
                }
                shape.push(self.dim()?);
                if !self.accept(",")? {
                    break;
                }
            }
            self.sign("]")?;
        }
        Ok(TensorType { dtype, shape })
    }

    fn dim(&mut self) -> Parsed<Dim> {
        let mut sum = Dim::ZERO;
        loop {
            let at = self.start;
            let term = match self.token {
                Token::Word("T") => Dim::T,
                Token::Word("R") => Dim::R,
                Token::Number(_) => Dim::n(self.peek_integer()?),
                _ => return Err(self.expected("a dimension")),
            };
            self.advance()?;
            sum = sum.checked_add(term).ok_or((at, "the dimension is too large".into()))?;
            if !self.accept("+")? {
                return Ok(sum);
            }
        }
    }

    fn value_name(&mut self) -> Parsed<(usize, String)> {
        let at = self.start;
        match self.take()? {
            Token::Value(name) => Ok((at, name)),
            other => Err((at, format!("expected a value such as %0, found {}", other.describe()))),
        }
    }

    fn string(&mut self) -> Parsed<String> {
        let at = self.start;
        match self.take()? {
            Token::Text(text) => Ok(text),
            other => Err((at, format!("expected a name in quotes, found {}", other.describe()))),
        }
    }

    fn integer(&mut self) -> Parsed<u64> {
        let value = self.peek_integer()?;
        self.advance()?;
        Ok(value)
    }

    fn peek_integer(&self) -> Parsed<u64> {
        let Token::Number(text) = self.token else { return Err(self.expected("an integer")) };
        text.parse().map_err(|_| self.fault(format!("{text} is no 64-bit integer")))
    }

    fn word(&mut self, word: &str) -> Parsed<()> {
        if self.token != Token::Word(word) {
            return Err(self.expected(&format!("`{word}`")));
        }
        self.advance()
    }

    fn sign(&mut self, sign: &'static str) -> Parsed<()> {
        if self.accept(sign)? { Ok(()) } else { Err(self.expected(&format!("`{sign}`"))) }
    }

    fn accept(&mut self, sign: &'static str) -> Parsed<bool> {
        let found = self.token == Token::Sign(sign);
        if found {
            self.advance()?;
        }
        Ok(found)
    }

    fn take(&mut self) -> Parsed<Token<'t>> {
        let token = std::mem::replace(&mut self.token, Token::End);
        self.advance()?;
        Ok(token)
    }

    fn expected(&self, what: &str) -> Fault {
        self.fault(format!("expected {what}, found {}", self.token.describe()))
    }

    fn fault(&self, message: String) -> Fault {
        (self.start, message)
    }

    /// Reads the next token.
    fn advance(&mut self) -> Parsed<()> {
        self.skip_space();
        self.start = self.next;
        let rest = &self.text[self.next..];
        let run = |from: usize, belongs: fn(u8) -> bool| {
            from + rest.bytes().skip(from).take_while(|&b| belongs(b)).count()
        };
        let Some(&first) = rest.as_bytes().first() else {
            self.token = Token::End;
            return Ok(());
        };
        let len;
        (self.token, len) = match first {
            b'%' | b'@' => {
                let (name, len) = match rest.as_bytes().get(1) {
                    Some(b'"') => self.quoted(1)?,
                    _ => (rest[1..run(1, is_name_byte)].to_owned(), run(1, is_name_byte)),
                };
                if len == 1 {
                    return Err(self.fault(format!("a name must follow {}", char::from(first))));
                }
                (if first == b'%' { Token::Value(name) } else { Token::Graph(name) }, len)
            }
            b'"' => {
                let (text, len) = self.quoted(0)?;
                (Token::Text(text), len)
            }
            b'0'..=b'9' | b'-' => {
                let mut len = run(1, |b| b.is_ascii_alphanumeric() || b == b'.');
                let is_exponent = rest[..len].ends_with(['e', 'E']) && !rest.starts_with("0x");
                if is_exponent && matches!(rest.as_bytes().get(len), Some(b'-' | b'+')) {
                    len = run(len + 1, |b| b.is_ascii_digit());
                }
                (Token::Number(&rest[..len]), len)
            }
            b'a'..=b'z' | b'A'..=b'Z' | b'_' => {
                let len = run(1, |b| b.is_ascii_alphanumeric() || b == b'_');
                (Token::Word(&rest[..len]), len)
            }
            _ => {
                let signs = ["(", ")", "[", "]", "{", "}", ",", ":", "=", "+", "<="];
                let Some(sign) = signs.into_iter().find(|s| rest.starts_with(s)) else {
                    let c = rest.chars().next().unwrap_or_default();
                    return Err(self.fault(format!("unexpected character {c:?}")));
                };
                (Token::Sign(sign), sign.len())
            }
        };
        self.next += len;
        Ok(())
    }

    fn skip_space(&mut self) {
        loop {
            let rest = &self.text[self.next..];
            let space = rest.len() - rest.trim_start().len();
            let comment = if rest.starts_with('#') || rest.starts_with("//") {
                rest.find('\n').unwrap_or(rest.len())
            } else {
                0
            };
            if space + comment == 0 {
                return;
            }
            self.next += space + comment;
        }
    }

    /// The quoted string `skip` bytes into the token, and where it ends.
    fn quoted(&self, skip: usize) -> Parsed<(String, usize)> {
        let base = self.start + skip;
        let mut text = String::new();
        let mut chars = self.text[base..].char_indices().skip(1);
        while let Some((i, c)) = chars.next() {
            match c {
                '"' => return Ok((text, skip + i + 1)),
                '\n' => break,
                '\\' => {
                    let escaped = match chars.next().map(|(_, c)| c) {
                        Some('n') => Some('\n'),
                        Some('r') => Some('\r'),
                        Some('t') => Some('\t'),
                        Some('0') => Some('\0'),
                        Some(c @ ('"' | '\'' | '\\')) => Some(c),
                        Some('u') if chars.next().is_some_and(|(_, c)| c == '{') => {
                            let hex = chars.by_ref().map(|(_, c)| c).take_while(|&c| c != '}').take(7);
                            u32::from_str_radix(&hex.collect::<String>(), 16).ok().and_then(char::from_u32)
                        }
                        _ => None,
                    };
                    text.push(escaped.ok_or_else(|| (base + i, "unknown escape in a string".to_owned()))?);
                }
                _ => text.push(c),
            }
        }
        Err((base, "the string does not end on its line".into()))
    }
}

fn define(names: &mut Names, at: usize, name: String, value: Value) -> Parsed<()> {
    if names.contains_key(&name) {
        return Err((at, format!("%{name} is defined twice")));
    }
    names.insert(name, value);
    Ok(())
}

/// The primitive called `name`; takes the attributes it knows.
fn primitive(at: usize, name: &str, attributes: &mut Attributes<'_>) -> Parsed<Op> {
    let mut optional = |key: &str| {
        let given = attributes.iter().position(|(_, k, ..)| *k == key);
        given.map(|i| attributes.remove(i)).map(|(_, _, at, value)| (at, value))
    };
    let mut attribute =
        |key: &str| optional(key).ok_or_else(|| (at, format!("{name} needs the attribute {key}")));
    let read = |(at, token): (usize, Token<'_>)| float(at, &token);
    Ok(match name {
        "get_rows" => Op::GetRows,
        "dequant" => Op::Dequant,
        "quant_act" => Op::QuantAct,
        "matmul" => {
            let round = match optional("round") {
                None => None,
                Some((_, Token::Word("f16"))) => Some(DType::F16),
                Some((_, Token::Word("bf16"))) => Some(DType::BF16),
                Some((at, other)) => {
                    return Err((at, format!("{} is no rounding: f16 or bf16", other.describe())));
                }
            };
            Op::MatMul { round }
        }
        "matmul_id" => Op::MatMulId,
        "add" => Op::Add,
        "mul" => Op::Mul,
        "silu" => Op::Silu,
        "rms_norm" => Op::RmsNorm { eps: attribute("eps").and_then(read)? },
        "rope" => {
            let base = attribute("base").and_then(read)?;
            let dims = attribute("dims").and_then(integer)?;
            let style = match attribute("style")? {
                (_, Token::Word("interleaved")) => RopeStyle::Interleaved,
                (_, Token::Word("neox")) => RopeStyle::NeoX,
                (at, other) => {
                    return Err((at, format!("{} is no style: interleaved or neox", other.describe())));
                }
            };
            Op::Rope(Rope { base, dims, style })
        }
        "reshape" => Op::Reshape,
        "kv_append" => Op::KvAppend,
        "kv_read" => Op::KvRead { page: attribute("page").and_then(integer)? },
        "scores" => Op::Scores { scale: attribute("scale").and_then(read)? },
        "causal_mask" => Op::CausalMask { window: optional("window").map(integer).transpose()? },
        "softmax" => Op::Softmax,
        "weighted_sum" => Op::WeightedSum,
        "gated_scan" => Op::GatedScan,
        "argmax" => Op::ArgMax,
        _ => return Err((at, format!("unknown operation {name:?}"))),
    })
}

fn integer((at, token): (usize, Token<'_>)) -> Parsed<u32> {
    match token {
        Token::Number(n) => n.parse().map_err(|_| (at, format!("{n} is no 32-bit integer"))),
        other => Err((at, format!("{} is no integer", other.describe()))),
    }
}

fn float(at: usize, token: &Token<'_>) -> Parsed<f32> {
    let value = match token {
        Token::Number(n) => match n.strip_prefix("0x") {
            Some(bits) => u32::from_str_radix(bits, 16).ok().map(f32::from_bits),
            None => n.parse().ok().filter(|x: &f32| x.is_finite()),
        },
        _ => None,
    };
    value.ok_or_else(|| (at, format!("{} is no 32-bit float", token.describe())))
}
