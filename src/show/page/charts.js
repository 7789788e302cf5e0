"use strict";
// Charts beside the graph: the roofline and the memory of the plan. Both are SVG text.

const escapeText = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function bytes(n) {
  const size = Math.abs(n), sign = n < 0 ? "-" : "";
  if (size < 1e3) return `${sign}${size} bytes`;
  const [unit, name] = size < 1e6 ? [1e3, "kB"] : size < 1e9 ? [1e6, "MB"] : [1e9, "GB"];
  return `${sign}${(size / unit).toFixed(1)} ${name}`;
}

// How many, in words: 1 launch, 8.4 M operations.
function amount(n, one, many = `${one}s`) {
  if (n < 1e3) return `${n} ${n === 1 ? one : many}`;
  const [unit, letter] = n < 1e6 ? [1e3, "k"] : n < 1e9 ? [1e6, "M"] : n < 1e12 ? [1e9, "G"] : [1e12, "T"];
  return `${(n / unit).toFixed(1)} ${letter} ${many}`;
}

const times = (n) => (n === 1 ? "once" : n === 2 ? "twice" : `${n} times`);

function time(us) {
  const size = Math.abs(us);
  if (size > 0 && size < 0.1) return `${(1e3 * us).toFixed(0)} ns`;
  return size < 1e3 ? `${us.toFixed(1)} µs` : size < 1e6 ? `${(us / 1e3).toFixed(2)} ms` : `${(us / 1e6).toFixed(2)} s`;
}

function rate(perSecond) {
  return perSecond >= 1e12 ? `${(perSecond / 1e12).toPrecision(3)} Top/s` : `${(perSecond / 1e9).toPrecision(3)} Gop/s`;
}

// Operations for each byte across, operations per second up, both by powers of ten; a dot for each kernel of a layer.
function roofline(view, dots, width) {
  const height = 240, left = 44, bottom = 36, { roof } = view;
  const peaks = [["f32", roof.f32_gflops * 1e9]];
  if (roof.dot4_gops) peaks.push(["8-bit", roof.dot4_gops * 1e9]);
  if (roof.f16_gflops) peaks.push(["16-bit", roof.f16_gflops * 1e9]);
  const bandwidth = roof.bandwidth_gbs * 1e9, top = Math.max(...peaks.map((peak) => peak[1]));
  const xs = dots.map((dot) => dot.intensity), ys = dots.map((dot) => dot.rate);
  const down = (n) => Math.floor(Math.log10(n)), up = (n) => Math.ceil(Math.log10(n));
  const x0 = down(Math.min(0.1, ...xs)), x1 = Math.max(up(Math.max(...xs, 10)), up(top / bandwidth) + 1);
  const y1 = up(top * 1.01), y0 = Math.min(y1 - 3, Math.max(down(Math.min(...ys, top)), y1 - 7));
  const x = (n) => left + ((Math.log10(n) - x0) / (x1 - x0)) * (width - left - 18);
  const y = (n) => height - bottom - ((Math.max(Math.log10(n), y0) - y0) / (y1 - y0)) * (height - bottom - 8);
  let svg = "";
  for (let e = x0; e <= x1; e++) {
    svg += `<line class="grid" x1="${x(10 ** e)}" x2="${x(10 ** e)}" y1="8" y2="${height - bottom}"/>`;
    svg += `<text x="${x(10 ** e)}" y="${height - 22}" text-anchor="middle">${10 ** e < 1 ? (10 ** e).toFixed(-e) : 10 ** e}</text>`;
  }
  for (let e = y0; e <= y1; e++) {
    svg += `<line class="grid" x1="${left}" x2="${width - 18}" y1="${y(10 ** e)}" y2="${y(10 ** e)}"/>`;
    svg += `<text x="${left - 4}" y="${y(10 ** e) + 3}" text-anchor="end">${e >= 12 ? `${10 ** (e - 12)}T` : e >= 9 ? `${10 ** (e - 9)}G` : `${10 ** (e - 6)}M`}</text>`;
  }
  for (const [name, peak] of peaks) {
    const knee = peak / bandwidth, low = Math.max(10 ** x0, 10 ** y0 / bandwidth);
    svg += `<path class="roofline" d="M${x(low)} ${y(low * bandwidth)}L${x(knee)} ${y(peak)}L${x(10 ** x1)} ${y(peak)}"/>`;
  }
  svg += `<text x="${width - 8}" y="${height - 5}" text-anchor="end">operations for each byte</text>`;
  for (const dot of dots) {
    svg += `<circle class="dot ${dot.class}" data-kernel="${dot.kernel}" cx="${x(dot.intensity)}" cy="${y(dot.rate)}" r="${dot.radius.toFixed(1)}"/>`;
  }
  const roofs = peaks.map(([name, peak]) => `${name} ${rate(peak)}`).join(", ");
  return `<p class="hint">roofs: ${Number(roof.bandwidth_gbs.toPrecision(3))} GB/s, ${roofs}</p><svg width="${width}" height="${height}">${svg}</svg>`;
}

// Offsets up: in scale, but for stretches without which all else would be flat. Of those a fifth of the rest is drawn, with a mark.
function offsets(memory, height) {
  const edges = new Set([0, memory.arena_bytes]);
  for (const held of memory.buffers) edges.add(held.offset).add(held.offset + held.bytes);
  const sorted = [...edges].sort((a, b) => a - b);
  const runs = sorted.slice(1).map((to, i) => ({ from: sorted[i], bytes: to - sorted[i] }));
  const all = Math.max(total(runs, (run) => run.bytes), 1), long = (run) => run.bytes > all / 3;
  const rest = total(runs.filter((run) => !long(run)), (run) => run.bytes);
  // Of a broken run its share; no run is longer for it.
  const shown = (run) => (long(run) && rest > 0 ? Math.min(run.bytes, rest / 4) : run.bytes);
  const scale = height / Math.max(total(runs, shown), 1), broken = [];
  let up = 0;
  for (const run of runs) {
    [run.up, run.high] = [up, shown(run) * scale];
    if (shown(run) < run.bytes) broken.push(run);
    up += run.high;
  }
  const at = (offset) => {
    const run = runs.findLast((run) => run.from <= offset);
    return run ? run.up + ((offset - run.from) / run.bytes) * run.high : 0;
  };
  return { at, broken };
}

// Buffers as rectangles from their first call to their last, and calls on the lanes of their streams below.
function memoryPlan(view, width) {
  const { memory } = view;
  if (!memory) return `<p class="hint">no plan was made for this target</p>`;
  const plot = 190, lane = 16, left = 52, n = Math.max(memory.calls.length, 1), axis = offsets(memory, plot);
  const x = (call) => left + (call / n) * (width - left - 4);
  const y = (offset) => 8 + plot - axis.at(offset);
  let svg = "", marks = "";
  memory.buffers.forEach((held, i) => {
    const by = memory.calls[held.from]?.kernel, kernel = view.kernels[by];
    const kind = held.role ? "io" : (kernel?.class ?? "plain").replace("fused", "");
    const high = Math.max(y(held.offset) - y(held.offset + held.bytes), 0.8);
    svg += `<rect class="held ${kind}" data-held="${i}" x="${x(held.from).toFixed(1)}" y="${(y(held.offset) - high).toFixed(1)}" width="${(x(held.to + 1) - x(held.from)).toFixed(1)}" height="${high.toFixed(1)}"/>`;
  });
  for (const run of axis.broken) {
    // A zigzag across, as wide as the paper shows through.
    const middle = 8 + plot - run.up - run.high / 2, right = width - 4, teeth = Math.floor((right - left) / 12);
    const points = Array.from({ length: teeth + 1 }, (_, i) => `${(left + (i / teeth) * (right - left)).toFixed(1)} ${(middle + (i % 2 ? -3 : 3)).toFixed(1)}`);
    marks += ["break", "break thin"].map((kind) => `<path class="${kind}" d="M${points.join("L")}"/>`).join("");
  }
  // What is too close to the label below has none.
  let last = Infinity;
  for (const offset of [0, ...axis.broken.flatMap((run) => [run.from, run.from + run.bytes]), memory.arena_bytes]) {
    if (last - y(offset) < 11) continue;
    last = y(offset);
    marks += `<text x="${left - 4}" y="${(last + 3).toFixed(1)}" text-anchor="end">${offset ? bytes(offset) : 0}</text>`;
  }
  const top = plot + 16;
  memory.calls.forEach((call, i) => {
    const kernel = view.kernels[call.kernel];
    const kind = (kernel?.class ?? "plain").replace("fused", "");
    svg += `<rect class="call ${kind}" data-call="${i}" x="${x(i).toFixed(1)}" y="${top + call.stream * lane}" width="${Math.max(x(1) - x(0) - 0.3, 0.7).toFixed(1)}" height="${lane - 3}"/>`;
    for (const from of call.waits) {
      svg += `<path class="wait" d="M${x(from + 1)} ${top + memory.calls[from].stream * lane + 6}L${x(i)} ${top + call.stream * lane + 6}"/>`;
    }
  });
  const height = top + memory.streams * lane + 4;
  const cut = axis.broken.map((run) => bytes(run.bytes)).join(" and ");
  return `<p class="hint">arena ${bytes(memory.arena_bytes)}, at most ${bytes(memory.lower_bound)} live at once; ${amount(memory.calls.length, "call")} on ${amount(memory.streams, "stream")}` +
    `${cut ? `; where the zigzag is, ${cut} are drawn shorter than they are` : ""}</p>` +
    `<svg width="${width}" height="${height}"><rect x="${left}" y="8" width="${width - left - 4}" height="${plot}" fill="none" class="grid"/>${svg}${marks}</svg>`;
}
