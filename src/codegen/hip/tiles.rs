//! Matmuls of more than a few tokens, in tiles: `kernels/matmul.h`, of weights in 16 bits `kernels/matmul_halves.h`, and of quantised ones that are
//! unpacked to such `kernels/matmul_unpacked.h`.

use super::super::in_place::residuals;
use super::super::spec::{ArgId, Epilogue, Extent, MatmulPart, MatmulSpec};
use super::{THREADS, Unit, WAIT, floats, format_name, layout_name, symbol};
use crate::ir::{DType, Dim, TensorType};
use crate::target::{HalfTile, HalfTiles};

/// Blocks of narrow tiles that share a multiprocessor.
const NARROW_AT_ONCE: u32 = 2;
/// Rows of a wide tile, and of a narrow one.
const WIDE_ROWS: u64 = 128;
const NARROW_ROWS: u64 = 32;
/// Blocks that keep a GPU busy: with fewer wide tiles, tiles are narrow.
const BLOCKS: u64 = 256;

/// What is in a tile.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Bytes,
    /// Weights in 16 bits, F16 or BF16, and activations rounded to such numbers.
    Halves,
    /// Weights unpacked to F16, and activations rounded to it.
    Unpacked,
    Floats,
}

/// How a matmul is cut into tiles.
struct Tiling {
    /// Of each part.
    kinds: Vec<Kind>,
    /// Rows of a tile.
    rows: u64,
    is_narrow: bool,
    halves: HalfTiles,
}

impl Unit<'_> {
    /// The matmul in tiles; false if there are none of its kind.
    pub(super) fn tiles(&mut self, m: &MatmulSpec, tokens: Dim) -> Result<bool, String> {
        if self.ty(m.x)?.dtype == DType::Q16Act {
            return Ok(false);
        }
        match m.epilogue {
            Epilogue::Store => {}
            Epilogue::Swiglu { out } => {
                let [gate, up] = &m.parts[..] else { return Err("a gate and an up".into()) };
                let alike = gate.format == up.format
                    && gate.round == up.round
                    && self.layout(gate.weight) == self.layout(up.weight);
                let in_blocks = self.ty(out)?.dtype.is_activations();
                if !alike
                    || gate.bias.is_some()
                    || up.bias.is_some()
                    || in_blocks && !gate.rows.is_multiple_of(32)
                {
                    return Ok(false);
                }
            }
            Epilogue::ArgMax { .. } => return Ok(false),
        }
        let tiling = self.tiling(m, tokens)?;
        let HalfTiles { tile, ref rounds, ranges } = tiling.halves;
        let mut rounded = vec![];
        for format in rounds {
            rounded.push((format, self.round(m, *format, tokens)?));
        }
        // Sums of ranges lie apart, and the bias and the residual are added with them.
        let mut stored = m.parts.clone();
        for part in stored.iter_mut().filter(|_| ranges > 1) {
            let sums = TensorType::new(DType::F32, [tokens, Dim::n(ranges * part.rows)]);
            (part.out, part.bias, part.residual) = (Some(self.scratch(sums)), None, None);
        }
        let mut body = self.waits_unless_given(m.parts.iter().map(|part| part.weight)).to_string();
        body += &format!("__shared__ union {{ {}}} room;\n", rooms(m, &tiling));
        if tiling.kinds.iter().any(|kind| matches!(kind, Kind::Bytes | Kind::Floats)) {
            body += &format!("const auto x = {};\n", self.activations(m.x, m.k)?);
        }
        for (format, value) in &rounded {
            body += &format!("const auto x_{format} = {value};\n");
        }
        let (code, blocks) = match m.epilogue {
            Epilogue::Swiglu { out } => self.swiglu_of_tiles(m, &tiling, out, tokens)?,
            Epilogue::Store | Epilogue::ArgMax { .. } => self.sums_of_tiles(m.k, &stored, &tiling, tokens)?,
        };
        let header = match &tiling.kinds {
            kinds if kinds.contains(&Kind::Unpacked) => "matmul_unpacked.h",
            kinds if kinds.contains(&Kind::Halves) => "matmul_halves.h",
            _ => "matmul.h",
        };
        let mut grid = vec![Extent::each(blocks), Extent { dim: tokens, per: tile.tokens as u32 }];
        if ranges > 1 {
            grid.insert(0, Extent::each(ranges));
        }
        self.file(&[header], tile.threads, grid, body + &code);
        if let Some(file) = self.files.last_mut() {
            file.blocks = if tiling.is_narrow { NARROW_AT_ONCE } else { tile.at_once };
        }
        if matches!(m.epilogue, Epilogue::Store) {
            self.aliases = residuals(m);
        }
        if ranges > 1 {
            self.join(m, &stored, ranges, tokens)?;
        }
        Ok(true)
    }

    fn tiling(&self, m: &MatmulSpec, tokens: Dim) -> Result<Tiling, String> {
        let in_bytes =
            self.ty(m.x)?.dtype == DType::Q8Act && m.parts.iter().all(|part| part.format.is_quantised());
        let halves = self.target.half_tiles(m, tokens.eval(self.bounds));
        let kind =
            |part: &MatmulPart| match part.round {
                _ if in_bytes => Kind::Bytes,
                Some(to) if self.target.rounds_to(part.format, m.k) == Some(to) => {
                    if part.format.is_quantised() { Kind::Unpacked } else { Kind::Halves }
                }
                _ => Kind::Floats,
            };
        let wide_tiles = m.parts.iter().map(|part| part.rows.div_ceil(WIDE_ROWS)).sum::<u64>()
            * tokens.eval(self.bounds).div_ceil(halves.tile.tokens);
        let is_narrow = in_bytes && wide_tiles < BLOCKS && matches!(m.epilogue, Epilogue::Store);
        let rows = match in_bytes {
            true if is_narrow => NARROW_ROWS,
            true => WIDE_ROWS,
            false => halves.tile.rows,
        };
        Ok(Tiling { kinds: m.parts.iter().map(kind).collect(), rows, is_narrow, halves })
    }

    /// A launch that rounds the activations to `format`, and an expression for those.
    fn round(&mut self, m: &MatmulSpec, format: DType, tokens: Dim) -> Result<String, String> {
        let x = self.activations(m.x, m.k)?;
        let near = self.scratch(TensorType::new(format, [tokens, Dim::n(m.k)]));
        let scales = (format == DType::F16).then(|| self.scratch(TensorType::new(DType::F32, [tokens])));
        let scales = scales.map_or("nullptr".into(), |scales| format!("(float*)a{scales}"));
        let name = format_name(format);
        let to = format!("Rounded<{name}, {}>{{a{near}, {scales}}}", m.k);
        if self.precision != DType::BF16 {
            self.precision = format;
        }
        let warps = THREADS / self.target.wave;
        let body = format!(
            "__shared__ float room[{warps}];\n{WAIT}round_row<{name}, {THREADS}>(room, {x}, {to}, block_x());\n"
        );
        self.file(&["matmul_halves.h"], THREADS, vec![Extent::each(tokens)], body);
        Ok(to)
    }

    /// Code that stores the sums of all parts, and of how many rows of tiles.
    fn sums_of_tiles(
        &self,
        k: u64,
        parts: &[MatmulPart],
        tiling: &Tiling,
        tokens: Dim,
    ) -> Result<(String, u64), String> {
        let count = symbol(tokens)?;
        let (mut body, mut blocks, mut placed) = (String::new(), 0, vec![]);
        for (part, kind) in parts.iter().zip(&tiling.kinds) {
            placed.push((part, blocks, self.template(k, part, *kind, "", tiling.halves.ranges)?));
            blocks += part.rows.div_ceil(tiling.rows);
        }
        // Neighbouring parts of a kind share their code.
        let mut rest = &placed[..];
        for group in placed.chunk_by(|a, b| a.2 == b.2) {
            rest = &rest[group.len()..];
            let mut code = String::new();
            for (i, (part, first, (template, [room, x]))) in group.iter().enumerate() {
                let what = part_of(part)?;
                code += &match i {
                    0 => format!("Part part = {what};\ni32 first = {first};\n"),
                    _ => format!("if (block_y() >= {first}) part = {what}, first = {first};\n"),
                };
                if i + 1 == group.len() {
                    code += &format!("return {template}({room}, part, {x}, block_y() - first, {count});\n");
                }
            }
            body += &match rest.first() {
                Some((_, next, _)) => format!("if (block_y() < {next}) {{\n{code}}}\n"),
                None => code,
            };
        }
        Ok((body, blocks))
    }

    /// The same of silu(gate) * up.
    fn swiglu_of_tiles(
        &self,
        m: &MatmulSpec,
        tiling: &Tiling,
        out: ArgId,
        tokens: Dim,
    ) -> Result<(String, u64), String> {
        let [gate, up] = &m.parts[..] else { return Err("a gate and an up".into()) };
        let (template, [room, x]) = self.template(m.k, gate, tiling.kinds[0], "_swiglu", 1)?;
        let code = format!(
            "{template}({room}, a{}, a{}, {}, {x}, block_y(), {}, {});\n",
            gate.weight,
            up.weight,
            gate.rows,
            symbol(tokens)?,
            self.store(out, gate.rows)?
        );
        Ok((code, gate.rows.div_ceil(tiling.rows / 2)))
    }

    /// The template that multiplies a part, and what it is told first and of the activations.
    fn template(
        &self,
        k: u64,
        part: &MatmulPart,
        kind: Kind,
        suffix: &str,
        ranges: u64,
    ) -> Result<(String, [String; 2]), String> {
        // The rows are those of each part.
        let weight = self.weight(part.weight, part.format, 1, k)?;
        let weight = weight.split_once('{').map_or(weight.as_str(), |(ty, _)| ty);
        Ok(match kind {
            Kind::Bytes => {
                let of = format!("{}, {}", format_name(part.format), layout_name(self.layout(part.weight))?);
                (format!("matmul{suffix}<{of}>"), [format!("room.t{}", run(part.format)), "x".into()])
            }
            Kind::Halves => {
                let of = if suffix.is_empty() { format!("{weight}, {ranges}") } else { weight.into() };
                let x = format!("x_{}", part.format);
                (format!("matmul_halves{suffix}<{of}>"), ["room.halves".into(), x])
            }
            Kind::Unpacked => {
                let of = format!("{}, {}", format_name(part.format), layout_name(self.layout(part.weight))?);
                let of = if suffix.is_empty() { format!("{of}, {ranges}") } else { of };
                let x = format!("x_{}", DType::F16);
                (format!("matmul_unpacked{suffix}<{of}>"), ["room.unpacked".into(), x])
            }
            Kind::Floats => (format!("matmul_floats{suffix}<{weight}>"), ["room.floats".into(), "x".into()]),
        })
    }

    /// A launch that adds the sums of all ranges of the columns, which are the results of `stored`.
    fn join(
        &mut self,
        m: &MatmulSpec,
        stored: &[MatmulPart],
        ranges: u64,
        tokens: Dim,
    ) -> Result<(), String> {
        let count = symbol(tokens)?;
        let mut body = WAIT.to_string();
        let mut blocks = 0;
        for (i, (part, sums)) in m.parts.iter().zip(stored).enumerate() {
            let own = part.rows.div_ceil(u64::from(THREADS));
            if i + 1 < m.parts.len() {
                body += &format!("if (block_x() < {}) ", blocks + own);
            }
            body += &format!(
                "return join_sums<{THREADS}, {ranges}>(Part{}, {}, block_x() - {blocks}, block_y(), {count});\n",
                part_of(part)?,
                floats(sums.out)
            );
            blocks += own;
        }
        self.file(&["matmul_halves.h"], THREADS, vec![Extent::each(tokens), Extent::each(blocks)], body);
        Ok(())
    }
}

/// The members of the shared memory of a block, which has a tile of one kind at a time.
fn rooms(m: &MatmulSpec, tiling: &Tiling) -> String {
    let HalfTile { rows, tokens, threads, .. } = tiling.halves.tile;
    let room = |(part, kind): (&MatmulPart, &Kind)| match kind {
        Kind::Bytes => {
            let run = run(part.format);
            format!("Tile<{run}, {}> t{run}; ", if tiling.is_narrow { "NARROW" } else { "WIDE" })
        }
        Kind::Halves => format!("HalfTile<{rows}, {tokens}, {threads}> halves; "),
        Kind::Unpacked => format!("UnpackedTile<{rows}, {tokens}, {threads}> unpacked; "),
        Kind::Floats => "FloatTile floats; ".into(),
    };
    let mut rooms: Vec<String> = m.parts.iter().zip(&tiling.kinds).map(room).collect();
    rooms.sort_unstable();
    rooms.dedup();
    rooms.concat()
}

/// A `Part` of `kernels/matmul.h`.
fn part_of(part: &MatmulPart) -> Result<String, String> {
    Ok(format!(
        "{{a{}, {}, {}, {}, (float*)a{}}}",
        part.weight,
        part.rows,
        floats(part.bias),
        floats(part.residual),
        part.out.ok_or("a part without a result")?
    ))
}

/// Columns that share a scale, as `kernels/quant.h` has them.
fn run(format: DType) -> u32 {
    match format {
        DType::Q2_K | DType::Q3_K | DType::Q6_K => 16,
        _ => 32,
    }
}
