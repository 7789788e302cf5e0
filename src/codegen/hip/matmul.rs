//! Matmuls: of up to eight tokens `kernels/matvec.h`, of more `kernels/matmul.h`.

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
/// Rows of a wide tile and of a narrow one.
const WIDE_ROWS: u64 = 128;
const NARROW_ROWS: u64 = 32;
/// Blocks that keep a GPU busy: with fewer wide tiles, tiles are narrow.
const BLOCKS: u64 = 256;

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
        let x = self.activations(m.x, m.k)?;
        let in_bytes =
            self.ty(m.x)?.dtype == DType::Q8Act && m.parts.iter().all(|part| part.format.is_quantised());
        let count = symbol(tokens)?;
        let wide_tiles = m.parts.iter().map(|part| part.rows.div_ceil(WIDE_ROWS)).sum::<u64>()
            * tokens.eval(self.bounds).div_ceil(u64::from(TILE_TOKENS));
        let narrow = in_bytes && wide_tiles < BLOCKS && matches!(m.epilogue, Epilogue::Store);
        let mut body = self.waits_unless_given(m.parts.iter().map(|part| part.weight)).to_string();
        let kind = |part: &MatmulPart| -> Result<(String, String), String> {
            if in_bytes {
                let layout = layout_name(self.layout(part.weight))?;
                Ok((format!("t{}", run(part.format)), format!("<{}, {layout}>", format_name(part.format))))
            } else {
                // The rows are those of each part.
                let like = self.weight(part.weight, part.format, 1, m.k)?;
                let like = like.split_once('{').map_or(like.as_str(), |(ty, _)| ty);
                // In whole vectors of 16 bytes.
                let in_halves = matches!(part.format, DType::F16 | DType::BF16) && m.k.is_multiple_of(8);
                let tile = match in_halves && self.target.multiplies_halves() {
                    true => "halves",
                    false => "floats",
                };
                Ok((tile.into(), format!("_{tile}<{like}>")))
            }
        };
        let kinds = m.parts.iter().map(kind).collect::<Result<Vec<_>, _>>()?;
        let mut tiles: Vec<&str> = kinds.iter().map(|(tile, _)| tile.as_str()).collect();
        tiles.sort_unstable();
        tiles.dedup();
        let members = tiles.iter().map(|tile| match tile.strip_prefix('t') {
            Some(run) => format!("Tile<{run}, {}> {tile}; ", if narrow { "NARROW" } else { "WIDE" }),
            None if *tile == "halves" => "HalfTile halves; ".into(),
            None => format!("FloatTile {tile}; "),
        });
        body +=
            &format!("__shared__ union {{ {}}} room;\nconst auto x = {x};\n", members.collect::<String>());
        // Rows of a block.
        let (storing, pairs) = match (in_bytes, narrow) {
            (true, true) => (NARROW_ROWS, 0),
            (true, false) => (WIDE_ROWS, WIDE_ROWS / 2),
            (false, _) => (64, 32),
        };
        let blocks = match m.epilogue {
            Epilogue::Store => {
                let mut blocks = 0;
                let mut placed = vec![];
                for (part, kind) in m.parts.iter().zip(&kinds) {
                    placed.push((part, blocks, kind));
                    blocks += part.rows.div_ceil(storing);
                }
                // Neighbouring parts of a kind share their code.
                let mut rest = &placed[..];
                for group in placed.chunk_by(|a, b| a.2 == b.2) {
                    rest = &rest[group.len()..];
                    let mut call = String::new();
                    for (i, (part, first, _)) in group.iter().enumerate() {
                        let what = format!(
                            "{{a{}, {}, {}, {}, (float*)a{}}}",
                            part.weight,
                            part.rows,
                            floats(part.bias),
                            floats(part.residual),
                            part.out.ok_or("a part without a result")?
                        );
                        call += &match i {
                            0 => format!("Part part = {what};\ni32 first = {first};\n"),
                            _ => format!("if (block_y() >= {first}) part = {what}, first = {first};\n"),
                        };
                    }
                    if let Some((_, (tile, of))) = group.first().map(|(_, first, kind)| (first, kind)) {
                        call += &format!(
                            "return matmul{of}(room.{tile}, part, x, block_y() - first, {count});\n"
                        );
                    }
                    body += &match rest.first() {
                        Some((_, next, _)) => format!("if (block_y() < {next}) {{\n{call}}}\n"),
                        None => call,
                    };
                }
                blocks
            }
            Epilogue::Swiglu { out } => {
                let [gate, up] = &m.parts[..] else { return Err("a gate and an up".into()) };
                let to = self.store(out, gate.rows)?;
                if kinds[0] != kinds[1] || gate.bias.is_some() || up.bias.is_some() {
                    return Ok(false);
                }
                if self.ty(out)?.dtype == DType::Q8Act && !gate.rows.is_multiple_of(32) {
                    return Ok(false);
                }
                let (tile, of) = &kinds[0];
                let name = of.replacen('<', "_swiglu<", 1);
                body += &format!(
                    "matmul{name}(room.{tile}, a{}, a{}, {}, x, block_y(), {count}, {to});\n",
                    gate.weight, up.weight, gate.rows
                );
                gate.rows.div_ceil(pairs)
            }
            Epilogue::ArgMax { .. } => return Ok(false),
        };
        if matches!(m.epilogue, Epilogue::Store) {
            self.aliases = residuals(m);
        }
        let grid = vec![Extent::each(blocks), Extent { dim: tokens, per: TILE_TOKENS }];
        self.file(&["matmul.h"], TILE_THREADS, grid, body);
        if let Some(file) = self.files.last_mut() {
            file.blocks = if narrow { NARROW_AT_ONCE } else { TILES_AT_ONCE };
        }
        Ok(true)
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
