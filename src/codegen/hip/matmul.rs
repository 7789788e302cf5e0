//! Matmuls: of up to eight tokens `kernels/matvec.h`, of more `kernels/matmul.h` and, of weights in 16 bits, `kernels/matmul_halves.h`.

use super::super::in_place::residuals;
use super::super::spec::{ArgId, Epilogue, Extent, Layout, MatmulPart, MatmulSpec};
use super::{THREADS, Unit, WAIT, floats, format_name, layout_name, size, symbol};
use crate::ir::{DType, Dim, TensorType};
use crate::target::{FEW_ROWS, FEW_TOKENS, STORING};

/// The most blocks among which the best of all rows is sought.
const BEST_OF: u64 = 1024;
/// Tokens and threads of a tile, as `kernels/matmul.h` has them.
const TILE_TOKENS: u32 = 64;
const TILE_THREADS: u32 = 128;
/// Blocks of tiles that share a multiprocessor: two leave half of it waiting, and four spill (an H200: 0.97 and 0.52 of the speed).
const TILES_AT_ONCE: u32 = 3;
/// The same of narrow tiles, which take more registers.
const NARROW_AT_ONCE: u32 = 2;
/// Rows of a wide tile, of a narrow one, and of one of numbers.
const WIDE_ROWS: u64 = 128;
const NARROW_ROWS: u64 = 32;
const NUMBER_ROWS: u64 = 64;
/// Blocks that keep a GPU busy: with fewer wide tiles, tiles are narrow.
const BLOCKS: u64 = 256;
/// The same of tiles of halves: of fewer, each is of a range of the columns. (An H200, prompts of 128 and 256 tokens of a 1B: 1.17 and 1.13 times
/// as fast as with 512, and 1.21 and 1.20 with 1200; of 64 tokens 0.97 and 0.95, and of 512 the same.)
const HALF_BLOCKS: u64 = 800;
/// Columns of a range, at least, and ranges, at most.
const RANGE_COLUMNS: u64 = 256;
const MOST_RANGES: u64 = 32;
/// Columns that a tile of halves has at once.
const HALF_COLUMNS: u64 = 32;

/// What is in a tile.
#[derive(Clone, Copy, PartialEq)]
enum TileKind {
    Bytes,
    /// Weights in 16 bits, and activations split into two such numbers.
    Halves,
    Floats,
}

impl Unit<'_> {
    pub(super) fn matmul(&mut self, m: &MatmulSpec) -> Result<(), String> {
        size(Dim::n(m.k))?;
        for part in &m.parts {
            size(Dim::n(part.rows))?;
        }
        let tokens = self.dim(m.x, 0)?;
        if tokens.eval(self.bounds) > FEW_TOKENS && self.tiles(m, tokens)? {
            return Ok(());
        }
        let most = tokens.eval(self.bounds).min(FEW_TOKENS).next_power_of_two();
        let count = symbol(tokens)?;
        let x = self.activations(m.x, m.k)?;
        let wave = self.target.wave;
        let groups =
            |part: &MatmulPart, threads: u32| u64::from(threads / lanes_of_row(m.k, part.format, wave));
        let target = self.target;
        let at_once = |format: DType| target.shape(format).rows;
        let mut body = self.waits_unless_given(m.parts.iter().map(|part| part.weight)).to_string();
        body += &format!("const auto x = {x};\n");
        let token_tiles = Extent { dim: tokens, per: most as u32 };
        match m.epilogue {
            Epilogue::Store => {
                let mut blocks = 0;
                for (i, part) in m.parts.iter().enumerate() {
                    let weight = self.weight(part.weight, part.format, part.rows, m.k)?;
                    let warps = self.warps_of_row(m, part.format, most);
                    let own = part.rows.div_ceil(groups(part, STORING) / warps * at_once(part.format));
                    let out = part.out.ok_or("a part without a result")?;
                    if i + 1 < m.parts.len() {
                        body += &format!("if (block_x() < {}) ", blocks + own);
                    }
                    body += &format!(
                        "return matvec<{STORING}, {warps}, {}, {most}>({weight}, x, block_x() - {blocks}, {count}, {}, {}, (float*)a{out});\n",
                        at_once(part.format),
                        floats(part.bias),
                        floats(part.residual),
                    );
                    blocks += own;
                }
                self.aliases = residuals(m);
                self.file(&["matvec.h"], STORING, vec![token_tiles, Extent::each(blocks)], body);
            }
            Epilogue::Swiglu { out } => {
                let [gate, up] = &m.parts[..] else { return Err("a gate and an up".into()) };
                let to = self.store(out, gate.rows)?;
                let [g, u] = [gate, up].map(|part| self.weight(part.weight, part.format, part.rows, m.k));
                if self.ty(out)?.dtype == DType::Q8Act && !gate.rows.is_multiple_of(32) {
                    return Err(format!("{} rows are no whole blocks", gate.rows));
                }
                let shape = self.target.shape(gate.format);
                let at_once = if most == 1 { shape.pairs } else { shape.rows };
                body += &format!(
                    "matvec_swiglu<{THREADS}, {at_once}, {most}>({}, {}, {}, {}, x, block_x(), {count}, {to});\n",
                    g?,
                    u?,
                    floats(gate.bias),
                    floats(up.bias)
                );
                let blocks = gate.rows.div_ceil(32);
                self.file(&["matvec.h"], THREADS, vec![token_tiles, Extent::each(blocks)], body);
            }
            Epilogue::ArgMax { out } => {
                let [part] = &m.parts[..] else { return Err("one part".into()) };
                let weight = self.weight(part.weight, part.format, part.rows, m.k)?;
                let each = part.rows.div_ceil(groups(part, STORING) * at_once(part.format)).div_ceil(BEST_OF);
                let blocks = part.rows.div_ceil(groups(part, STORING) * at_once(part.format) * each);
                let [values, indices] = [DType::F32, DType::I32]
                    .map(|dtype| self.scratch(TensorType::new(dtype, [tokens, Dim::n(blocks)])));
                body += &format!(
                    "matvec_best<{STORING}, {}, {most}, {blocks}, {each}>({weight}, x, block_x(), {count}, {}, (float*)a{values}, (i32*)a{indices});\n",
                    at_once(part.format),
                    floats(part.bias),
                );
                self.file(&["matvec.h"], STORING, vec![token_tiles, Extent::each(blocks)], body);
                let body = format!(
                    "{WAIT}best_of_row<{THREADS}, {blocks}>((const float*)a{values}, (const i32*)a{indices}, (i32*)a{out}, block_x());\n"
                );
                self.file(&["sample.h"], THREADS, vec![Extent::each(tokens)], body);
            }
        }
        Ok(())
    }

    /// Warps that share a row of a format whose sum is stored: as many as the target has it, if each lane of them has a chunk, of one token
    /// and few rows.
    fn warps_of_row(&self, m: &MatmulSpec, format: DType, tokens: u64) -> u64 {
        let wave = u64::from(self.target.wave);
        let mut warps = self.target.shape(format).warps;
        let rows: u64 = m.parts.iter().map(|part| part.rows).sum();
        let alone = tokens > 1 || rows >= FEW_ROWS;
        while warps > 1 && (alone || warps * wave > m.k / span(format)) {
            warps /= 2;
        }
        warps
    }

    /// The matmul in tiles; false if there are none of its kind.
    fn tiles(&mut self, m: &MatmulSpec, tokens: Dim) -> Result<bool, String> {
        let in_bytes =
            self.ty(m.x)?.dtype == DType::Q8Act && m.parts.iter().all(|part| part.format.is_quantised());
        let count = symbol(tokens)?;
        let tiles_of = |rows: u64| {
            m.parts.iter().map(|part| part.rows.div_ceil(rows)).sum::<u64>()
                * tokens.eval(self.bounds).div_ceil(u64::from(TILE_TOKENS))
        };
        let stores = matches!(m.epilogue, Epilogue::Store);
        let kinds = m.parts.iter().map(|part| self.tile(m, part)).collect::<Result<Vec<_>, _>>()?;
        let narrow = in_bytes && stores && tiles_of(WIDE_ROWS) < BLOCKS;
        // Rows of a tile.
        let rows = match in_bytes {
            true if narrow => NARROW_ROWS,
            true => WIDE_ROWS,
            false => NUMBER_ROWS,
        };
        let all_halves = kinds.iter().all(|kind| *kind == TileKind::Halves);
        let ranges = match all_halves && stores {
            true => {
                let most = (m.k / RANGE_COLUMNS).clamp(1, MOST_RANGES);
                (HALF_BLOCKS / tiles_of(rows).max(1)).clamp(1, most)
            }
            false => 1,
        };
        match m.epilogue {
            Epilogue::Store => {}
            Epilogue::Swiglu { out } => {
                let [gate, up] = &m.parts[..] else { return Err("a gate and an up".into()) };
                let alike = gate.format == up.format && self.layout(gate.weight) == self.layout(up.weight);
                if !alike || gate.bias.is_some() || up.bias.is_some() {
                    return Ok(false);
                }
                if self.ty(out)?.dtype == DType::Q8Act && !gate.rows.is_multiple_of(32) {
                    return Ok(false);
                }
            }
            Epilogue::ArgMax { .. } => return Ok(false),
        }
        // By the formats of halves, activations that were split.
        let mut split: Vec<(DType, String)> = vec![];
        for (part, kind) in m.parts.iter().zip(&kinds) {
            if *kind == TileKind::Halves && split.iter().all(|(format, _)| *format != part.format) {
                let to = self.split(m, part.format, tokens)?;
                split.push((part.format, to));
            }
        }
        let mut body = self.waits_unless_given(m.parts.iter().map(|part| part.weight)).to_string();
        let mut rooms: Vec<String> = vec![];
        for (part, kind) in m.parts.iter().zip(&kinds) {
            let room = match kind {
                TileKind::Bytes => {
                    let run = run(part.format);
                    format!("Tile<{run}, {}> t{run}; ", if narrow { "NARROW" } else { "WIDE" })
                }
                TileKind::Halves => "HalfTile halves; ".into(),
                TileKind::Floats => "FloatTile floats; ".into(),
            };
            if !rooms.contains(&room) {
                rooms.push(room);
            }
        }
        rooms.sort_unstable();
        body += &format!("__shared__ union {{ {}}} room;\n", rooms.concat());
        if kinds.iter().any(|kind| *kind != TileKind::Halves) {
            body += &format!("const auto x = {};\n", self.activations(m.x, m.k)?);
        }
        for (format, value) in &split {
            body += &format!("const auto x_{format} = {value};\n");
        }
        // Sums of ranges go to a room of their own, and the bias and the residual are added with them.
        let mut sums = vec![];
        if ranges > 1 {
            for part in &m.parts {
                let shape = [tokens, Dim::n(ranges * part.rows)];
                sums.push(self.scratch(TensorType::new(DType::F32, shape)));
            }
        }
        let stored: Vec<MatmulPart> = match ranges {
            1 => m.parts.clone(),
            _ => {
                let of_sums = |(part, sums): (&MatmulPart, &ArgId)| MatmulPart {
                    out: Some(*sums),
                    bias: None,
                    residual: None,
                    ..part.clone()
                };
                m.parts.iter().zip(&sums).map(of_sums).collect()
            }
        };
        // What a part's template is called, and the rest of its arguments.
        let call =
            |part: &MatmulPart, kind: &TileKind, suffix: &str| -> Result<(String, String, String), String> {
                // The rows are those of each part.
                let numbers = self.weight(part.weight, part.format, 1, m.k)?;
                let numbers = numbers.split_once('{').map_or(numbers.as_str(), |(ty, _)| ty);
                Ok(match kind {
                    TileKind::Bytes => {
                        let layout = layout_name(self.layout(part.weight))?;
                        let template = format!("matmul{suffix}<{}, {layout}>", format_name(part.format));
                        (template, format!("room.t{}", run(part.format)), "x".into())
                    }
                    TileKind::Halves => {
                        let of =
                            if suffix.is_empty() { format!("{numbers}, {ranges}") } else { numbers.into() };
                        let template = format!("matmul_halves{suffix}<{of}>");
                        (template, "room.halves".into(), format!("x_{}", part.format))
                    }
                    TileKind::Floats => {
                        (format!("matmul_floats{suffix}<{numbers}>"), "room.floats".into(), "x".into())
                    }
                })
            };
        let blocks = match m.epilogue {
            Epilogue::Store => {
                let mut blocks = 0;
                let mut placed = vec![];
                for (part, kind) in stored.iter().zip(&kinds) {
                    placed.push((part, blocks, call(part, kind, "")?));
                    blocks += part.rows.div_ceil(rows);
                }
                // Neighbouring parts of a kind share their code.
                let mut rest = &placed[..];
                for group in placed.chunk_by(|a, b| a.2 == b.2) {
                    rest = &rest[group.len()..];
                    let mut code = String::new();
                    for (i, (part, first, _)) in group.iter().enumerate() {
                        let what = part_of(part)?;
                        code += &match i {
                            0 => format!("Part part = {what};\ni32 first = {first};\n"),
                            _ => format!("if (block_y() >= {first}) part = {what}, first = {first};\n"),
                        };
                    }
                    if let Some((_, _, (template, room, x))) = group.first() {
                        code +=
                            &format!("return {template}({room}, part, {x}, block_y() - first, {count});\n");
                    }
                    body += &match rest.first() {
                        Some((_, next, _)) => format!("if (block_y() < {next}) {{\n{code}}}\n"),
                        None => code,
                    };
                }
                self.aliases = residuals(m);
                blocks
            }
            Epilogue::Swiglu { out } => {
                let [gate, up] = &m.parts[..] else { return Err("a gate and an up".into()) };
                let (template, room, x) = call(gate, &kinds[0], "_swiglu")?;
                let to = self.store(out, gate.rows)?;
                body += &format!(
                    "{template}({room}, a{}, a{}, {}, {x}, block_y(), {count}, {to});\n",
                    gate.weight, up.weight, gate.rows
                );
                gate.rows.div_ceil(rows / 2)
            }
            Epilogue::ArgMax { .. } => return Ok(false),
        };
        let header = if split.is_empty() { "matmul.h" } else { "matmul_halves.h" };
        let mut grid = vec![Extent::each(blocks), Extent { dim: tokens, per: TILE_TOKENS }];
        if ranges > 1 {
            grid.insert(0, Extent::each(ranges));
        }
        self.file(&[header], TILE_THREADS, grid, body);
        if let Some(file) = self.files.last_mut() {
            file.blocks = if narrow { NARROW_AT_ONCE } else { TILES_AT_ONCE };
        }
        if ranges > 1 {
            self.join(m, &sums, ranges, tokens)?;
        }
        Ok(true)
    }

    /// A launch that adds the sums of all ranges of the columns, those of each part after another.
    fn join(&mut self, m: &MatmulSpec, sums: &[ArgId], ranges: u64, tokens: Dim) -> Result<(), String> {
        let count = symbol(tokens)?;
        let mut body = WAIT.to_string();
        let mut blocks = 0;
        for (i, (part, sums)) in m.parts.iter().zip(sums).enumerate() {
            let own = part.rows.div_ceil(u64::from(THREADS));
            if i + 1 < m.parts.len() {
                body += &format!("if (block_x() < {}) ", blocks + own);
            }
            body += &format!(
                "return join_sums<{THREADS}, {ranges}>(Part{}, (const float*)a{sums}, block_x() - {blocks}, block_y(), {count});\n",
                part_of(part)?
            );
            blocks += own;
        }
        self.file(&["matmul_halves.h"], THREADS, vec![Extent::each(tokens), Extent::each(blocks)], body);
        Ok(())
    }

    /// The tile that a part goes in.
    fn tile(&self, m: &MatmulSpec, part: &MatmulPart) -> Result<TileKind, String> {
        let in_bytes = self.ty(m.x)?.dtype == DType::Q8Act && part.format.is_quantised();
        // In whole steps.
        let in_halves = matches!(part.format, DType::F16 | DType::BF16) && m.k.is_multiple_of(HALF_COLUMNS);
        Ok(match in_bytes {
            true => TileKind::Bytes,
            false if in_halves && self.target.multiplies_halves() => TileKind::Halves,
            false => TileKind::Floats,
        })
    }

    /// A launch that splits the activations into numbers of `format`, and an expression for those.
    fn split(&mut self, m: &MatmulSpec, format: DType, tokens: Dim) -> Result<String, String> {
        let x = self.activations(m.x, m.k)?;
        let parts = self.scratch(TensorType::new(format, [tokens, Dim::n(2 * m.k)]));
        let scales = self.scratch(TensorType::new(DType::F32, [tokens]));
        let to = format!("Split<{}, {}>{{a{parts}, (float*)a{scales}}}", format_name(format), m.k);
        let warps = THREADS / self.target.wave;
        let body = format!(
            "__shared__ float room[{warps}];\n{WAIT}split_row<{}, {THREADS}>(room, {x}, {to}, block_x());\n",
            format_name(format)
        );
        self.file(&["matmul_halves.h"], THREADS, vec![Extent::each(tokens)], body);
        Ok(to)
    }

    /// An expression for a weight `[rows, k]`.
    pub(super) fn weight(&self, id: ArgId, format: DType, rows: u64, k: u64) -> Result<String, String> {
        let name = format_name(format);
        let layout = self.layout(id);
        match format {
            DType::F32 | DType::F16 | DType::BF16 if layout == Layout::RowMajor => {
                Ok(format!("Numbers<{name}, {rows}, {k}>{{a{id}}}"))
            }
            _ if format.is_quantised() => {
                Ok(format!("Matrix<{name}, {}, {rows}, {k}>{{a{id}}}", layout_name(layout)?))
            }
            _ => Err(format!("a weight cannot be {format}")),
        }
    }
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

/// Columns of a chunk, as `kernels/quant.h` has them.
fn span(format: DType) -> u64 {
    match format {
        DType::Q2_K | DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::Q6_K => 64,
        _ => 32,
    }
}

/// Columns that share a scale, as `kernels/quant.h` has them.
fn run(format: DType) -> u32 {
    match format {
        DType::Q2_K | DType::Q3_K | DType::Q6_K => 16,
        _ => 32,
    }
}

/// Lanes that share a row of `k` columns, as `lanes_of_row` of `kernels/matvec.h` has it.
fn lanes_of_row(k: u64, format: DType, wave: u32) -> u32 {
    let mut lanes = wave;
    while lanes > 1 && u64::from(lanes) > k / span(format) {
        lanes /= 2;
    }
    lanes
}
