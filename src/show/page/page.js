"use strict";
// The page: its state is in the address (#view=0&search=rope&step=3&unfold=1&kernel=5), and everything is drawn from that.

const page = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { view: 0, search: "", step: null, unfold: new Set(), kernel: null, primitive: null };
let view, owners;

function readAddress() {
  const at = new URLSearchParams(location.hash.slice(1)), number = (key) => (at.has(key) ? Number(at.get(key)) || 0 : null);
  state.view = Math.min(Math.max(number("view") ?? 0, 0), page.views.length - 1);
  view = page.views[state.view];
  state.search = at.get("search") ?? "";
  state.step = at.has("step") ? Math.min(Math.max(number("step"), 0), view.steps.length) : null;
  const folded = at.get("unfold") ?? "";
  state.unfold = new Set(folded === "all" ? view.groups.keys() : folded.split(",").filter(Boolean).map(Number));
  state.kernel = view.kernels[number("kernel")] ? number("kernel") : null;
  state.primitive = view.primitives[number("primitive")] ? number("primitive") : null;
}

function go(change) {
  Object.assign(state, change);
  const at = new URLSearchParams();
  if (state.view) at.set("view", state.view);
  if (state.search) at.set("search", state.search);
  if (state.step !== null) at.set("step", state.step);
  if (state.unfold.size) at.set("unfold", [...state.unfold].join(","));
  if (state.kernel !== null) at.set("kernel", state.kernel);
  if (state.primitive !== null) at.set("primitive", state.primitive);
  history.replaceState(null, "", `#${at}`);
  draw();
}

const total = (items, of) => items.reduce((sum, item) => sum + of(item), 0);
const typed = (list) => list.map(([name, type]) => `<tr><th>${escapeText(type)}</th><td><code>${escapeText(name)}</code></td></tr>`).join("");
const fewer = (n) => (n === 0 ? "as many launches" : `${amount(Math.abs(n), "launch", "launches")} ${n < 0 ? "more" : "less"}`);
const isGone = (gone) => gone === true || (typeof gone === "number" && (state.step === null || gone <= state.step));
const struck = ([type, n, gone]) => (isGone(gone) ? `<s>${escapeText(type)} ${bytes(n)}</s>` : `${escapeText(type)} ${bytes(n)}`);
const hue = (kind) => kind.replace("fused ", "");

// After so many rewrites: the colour of the kernel that each primitive is in, and how many rewrites each kernel still needs.
function replay() {
  const made = new Array(view.primitives.length).fill(null), last = new Array(view.kernels.length).fill(0);
  view.steps.forEach((step, i) => {
    for (const p of step.primitives) {
      const kernel = view.primitives[p].kernel;
      if (kernel !== null) last[kernel] = Math.max(last[kernel], i + 1);
      if (state.step === null || i < state.step) made[p] = step.added.at(-1)?.class ?? null;
    }
  });
  owners = { made, last };
}

function drawHeader() {
  document.querySelector("h1").textContent = page.model;
  $("views").innerHTML = page.views.map((v, i) =>
    `<button data-view="${i}" class="${i === state.view ? "on" : ""}">${escapeText(v.step)}${page.views.some((w) => w.target !== v.target) ? ` · ${escapeText(v.target)}` : ""}</button>`).join("");
  const [step, costs, rates] = view.about;
  $("totals").textContent = `${view.target}, ${view.program}: ${step}${rates ? `; ${rates}` : ""}`;
  $("costs").textContent = costs;
  const sums = new Map();
  for (const kernel of view.kernels) {
    const sum = sums.get(kernel.name) ?? { name: kernel.name, class: kernel.class, us: 0, bytes: 0, launches: 0 };
    for (const key of ["us", "bytes", "launches"]) sum[key] += kernel[key];
    sums.set(kernel.name, sum);
  }
  const rows = [...sums.values()].filter((sum) => sum.launches).sort((a, b) => b.us - a.us), all = total(rows, (row) => row.us);
  const share = (row) => `${((100 * row.us) / all).toFixed(1)} %`;
  $("bar").innerHTML = rows.map((row) =>
    `<span class="${row.class}" style="flex:${row.us / all}" data-find="${escapeText(row.name)}" title="${escapeText(row.name)}: ${time(row.us)}, ${share(row)}">${escapeText(row.name)} ${share(row)}</span>`).join("");
  $("legend").innerHTML = rows.map((row) =>
    `<span data-find="${escapeText(row.name)}"><i class="chip ${row.class}"></i>${escapeText(row.name.split(" {")[0])} ${time(row.us)} <small>${row.launches}×, ${bytes(row.bytes)}</small></span>`).join("");
}

function drawStep() {
  const at = state.step ?? view.steps.length, step = state.step ? view.steps[state.step - 1] : null;
  $("slider").max = view.steps.length;
  $("slider").value = at;
  $("step").innerHTML = `rewrite ${at} of ${view.steps.length}` +
    (step ? `: <b>${escapeText(step.pass)}</b> at <code>${escapeText(step.at)}</code>` : state.step === 0 ? ": nothing fused yet" : ": all made; step through with ◀ ▶ or the arrow keys");
  $("rewrite").hidden = !step;
  if (!step) return;
  const part = (p, extra) => `<span class="node ${extra}">${escapeText(p.name)}</span>` +
    p.results.map((result) => `<span class="value">→ ${struck(result)}</span>`).join("");
  let worth = "";
  if (step.gain) {
    const [unfused, fused, saved, launches] = step.gain;
    worth = ` <small>${time(unfused)} → ${time(fused)}, ${bytes(Math.abs(saved))} ${saved < 0 ? "more" : "less"} moved, ${fewer(launches)}</small>`;
  }
  $("rewrite").innerHTML = step.dropped.map((p) => part(p, "")).join(" ") + " <b>⇒</b> " +
    (step.added.map((p) => part(p, `new ${p.class}`)).join(" ") || "nothing: it is not needed, or is there already") + worth;
}

// The layer of a folded group that is shown: that of the step or of the chosen node, else the first.
function shownMember(group) {
  const step = state.step ? view.steps[state.step - 1] : null;
  const has = (member) => step ? step.primitives.some((p) => member.primitives.includes(p))
    : member.kernels.includes(state.kernel) || member.primitives.includes(state.primitive);
  return group.members.find(has) ?? group.members[0];
}

function picture(drawn, ids, what) {
  if (!drawn.width) return `<p class="hint" style="padding:0 14px">${what === "kernel" ? "went into kernels of other layers" : "nothing"}</p>`;
  const svg = drawn.svg.replace(/ data-i="(\d+)"/g, (_, place) => ` data-${what}="${ids[place]}"`)
    .replace(/ data-of="(\d+)"/g, (_, place) => ` data-of="${ids[place]}"`);
  return `<svg class="picture" style="--w:${drawn.width}" viewBox="0 0 ${drawn.width} ${drawn.height}">${svg}</svg>`;
}

function drawGroups() {
  let html = "";
  // All pictures of a view share its columns, and shrink together where these are too narrow.
  const widths = ["before", "after"].map((side) => Math.max(220, ...view.groups.map((group) => group[side].width)));
  const style = $("graph").style;
  style.setProperty("--before", widths[0]);
  style.setProperty("--after", widths[1]);
  style.setProperty("--columns", widths.map((width) => `minmax(0, ${width}fr)`).join(" "));
  view.groups.forEach((group, i) => {
    const many = group.members.length > 1, open = many && state.unfold.has(i);
    for (const member of open ? group.members : [shownMember(group)]) {
      const us = total(member.kernels, (k) => view.kernels[k].us) * (open ? 1 : group.members.length);
      const first = member === group.members[0];
      const title = open ? member.title : group.title;
      const shown = many && !open ? `<small>showing ${escapeText(member.title)}</small>` : "";
      const fold = many && (!open || first) ? `<button data-fold="${i}">${open ? `fold ${escapeText(group.title)}` : `unfold ${group.members.length}`}</button>` : "";
      html += `<div class="group" data-group="${i}"><div><b>${escapeText(title)}</b>${fold}${shown}<span class="time">${us ? time(us) : ""}</span></div>` +
        `<div class="pair"><div class="before">${picture(group.before, member.primitives, "primitive")}</div><div class="after">${picture(group.after, member.kernels, "kernel")}</div></div></div>`;
    }
  });
  $("groups").innerHTML = html;
}

// What a search looks at: a node's own words, the name of its kernel, and the weights that it reads, if through what dequantises them.
const words = (node) => [node.name, node.replaces ?? "", ...node.reads.flat(), ...(node.weights ?? []), ...node.results.map((result) => result[0]),
  node.limit ?? "", view.kernels[node.kernel]?.name ?? ""].join(" ").toLowerCase();

function mark() {
  const needle = state.search.trim().toLowerCase();
  const hit = (node) => needle && words(node).includes(needle);
  const step = state.step ? view.steps[state.step - 1] : null;
  const chosen = state.kernel ?? view.primitives[state.primitive]?.kernel ?? null;
  for (const node of document.querySelectorAll("#groups [data-primitive]")) {
    const p = Number(node.dataset.primitive), primitive = view.primitives[p];
    const now = state.step === null ? view.kernels[primitive.kernel]?.class : owners.made[p];
    node.setAttribute("class", `node part ${hue(now ?? "plain")}`);
    node.classList.toggle("hit", Boolean(hit(primitive) || step?.primitives.includes(p)));
    node.classList.toggle("dim", Boolean(needle && !hit(primitive)));
    node.classList.toggle("chosen", p === state.primitive);
    node.classList.toggle("kin", chosen !== null && primitive.kernel === chosen);
  }
  for (const value of document.querySelectorAll("#groups [data-of]")) {
    // The results of a node are gone together, but for kernels that yield some of them.
    value.classList.toggle("gone", view.primitives[value.dataset.of].results.some((result) => isGone(result[2])));
  }
  for (const node of document.querySelectorAll("[data-kernel]")) {
    const k = Number(node.dataset.kernel), kernel = view.kernels[k];
    node.classList.toggle("hit", Boolean(hit(kernel)));
    node.classList.toggle("dim", Boolean(needle && !hit(kernel)));
    node.classList.toggle("unmade", state.step !== null && owners.last[k] > state.step);
    node.classList.toggle("chosen", k === chosen);
  }
  for (const node of document.querySelectorAll("[data-call]")) {
    node.classList.toggle("chosen", chosen !== null && view.memory.calls[node.dataset.call].kernel === chosen);
  }
  for (const node of $("bar").children) node.classList.toggle("dim", Boolean(needle) && !view.kernels.some((k) => k.name === node.dataset.find && hit(k)));
  const found = needle ? [view.kernels.filter(hit).length, view.primitives.filter(hit).length] : null;
  $("found").textContent = found ? `${amount(found[0], "kernel")}, ${amount(found[1], "primitive")}` : "";
}

function kernelTable(kernel) {
  return `<tr><th>estimated</th><td>${time(kernel.us)}, limited by ${kernel.limit || "nothing"}; ${bytes(kernel.bytes)}, ${amount(kernel.operations, "operation")}, ${amount(kernel.launches, "launch", "launches")}</td></tr>` +
    (kernel.measured_us === null ? "" : `<tr><th>measured</th><td>${time(kernel.measured_us)}, ${(kernel.measured_us / kernel.us).toFixed(2)} times the estimate</td></tr>`) +
    (kernel.replaces ? `<tr><th>stands for</th><td>${escapeText(kernel.replaces)}</td></tr>` : "") +
    `<tr><th>yields</th><td>${kernel.results.map(struck).join(", ")}</td></tr>${typed(kernel.reads)}`;
}

const primitiveTable = (p) => `<tr><th>alone</th><td>${time(p.us)}, ${bytes(p.bytes)}</td></tr>` +
  `<tr><th>yields</th><td>${p.results.map(struck).join(", ")}</td></tr>${typed(p.reads)}` +
  (p.kernel === null ? "" : `<tr><th>now in</th><td>${escapeText(view.kernels[p.kernel].name)}</td></tr>`);

function drawDetail() {
  const k = state.kernel ?? view.primitives[state.primitive]?.kernel ?? null, kernel = view.kernels[k];
  if (!kernel) {
    $("detail").innerHTML = `<h2>kernel</h2><p class="hint">Click a node for what it is, what it replaced and what it costs.</p>`;
    return;
  }
  const parts = kernel.primitives.map((p) => view.primitives[p]);
  const alone = total(parts, (p) => p.us), moved = total(parts, (p) => p.bytes);
  const heading = (text) => `<h2 style="margin-top:10px">${text}</h2>`;
  $("detail").innerHTML = `<h2><i class="chip ${kernel.class}"></i>${escapeText(kernel.name)}</h2><table>${kernelTable(kernel)}</table>` +
    (parts.length ? heading(`before: ${amount(parts.length, "primitive")}, ${time(alone)}, ${bytes(moved)} moved`) + `<table>` +
      parts.map((p) => `<tr><td>${escapeText(p.name.split(" {")[0])}</td><td>${p.results.map(struck).join(", ")}</td><td class="n">${time(p.us)}</td></tr>`).join("") +
      `</table><p>after: 1 kernel, ${time(kernel.us)}, ${bytes(kernel.bytes)} moved</p>` : "") +
    (kernel.steps.length ? heading("how it was made") + `<table>` + kernel.steps.map(madeBy).join("") + `</table>` : "") +
    (kernel.rejected.length ? heading("what else was tried") + rejectedTable(kernel.rejected.map((i) => view.rejected[i])) : "");
}

// By how much one time is longer than another, of their ratio.
const longer = (ratio) => (ratio < 2 ? `${(100 * (ratio - 1)).toFixed(1)} %` : `${ratio.toFixed(1)} times`);

// A rewrite, what came second to it and what would turn it over.
function madeBy(n) {
  const step = view.steps[n - 1];
  let gain = "", second = "";
  if (step.gain) {
    const [unfused, fused, saved, launches] = step.gain;
    gain = `${time(fused)}, ${time(unfused - fused)} less`;
    second = `<br><small>runner-up: unfused, ${time(unfused - fused)} longer (${longer(unfused / fused)}), ${bytes(saved)} and ${amount(launches, "launch", "launches")} more</small>`;
  }
  return `<tr><td><button data-step="${n}">${n}</button></td><td>${escapeText(step.pass)} at ${escapeText(step.at)} <span class="n">${gain}</span>${second}` +
    `<br><small>would turn over with: ${escapeText(view.turns[step.turn])}</small></td></tr>`;
}

const rejectedTable = (list) => `<table>` + list.map((r) =>
  `<tr><th>${escapeText(r.pass)}</th><td>${escapeText(r.at)}${r.times > 1 ? ` <small>× ${r.times}</small>` : ""}<br><small>${escapeText(r.why)}</small>` +
  `<br><small>would turn over with: ${escapeText(r.turns)}</small></td></tr>`).join("") + `</table>`;

function drawCharts() {
  const dots = view.groups.flatMap((group) => group.members[0].kernels.map((k) => {
    const kernel = view.kernels[k], us = kernel.us * group.members.length;
    return { kernel: k, class: kernel.class, intensity: kernel.operations / kernel.bytes, rate: kernel.operations / (kernel.us * 1e-6),
      radius: 3 + 9 * Math.sqrt(us / view.after.us) };
  })).filter((dot) => dot.intensity > 0 && Number.isFinite(dot.rate));
  // In the middle of the panel's widths where there is no layout yet.
  const width = Math.min(Math.max($("roof").clientWidth || 420, 300), 454);
  $("roof").innerHTML = roofline(view, dots, width);
  $("memory").innerHTML = memoryPlan(view, width);
  $("rejections").textContent = times(total(view.rejected, (r) => r.times));
  $("rejected").innerHTML = rejectedTable(view.rejected);
}

let drawn = {};
function draw() {
  view = page.views[state.view];
  if (drawn.view !== state.view) {
    drawHeader();
    drawCharts();
  }
  replay();
  const shown = JSON.stringify([state.view, [...state.unfold], view.groups.map((group) => shownMember(group).title)]);
  if (drawn.groups !== shown) drawGroups();
  drawn = { ...drawn, view: state.view, groups: shown };
  if ($("search").value !== state.search) $("search").value = state.search;
  drawStep();
  drawDetail();
  mark();
  document.body.style.setProperty("--header", `${document.querySelector("header").offsetHeight}px`);
  if (drawn.at !== (drawn.at = `${state.step} ${state.kernel} ${state.primitive}`)) {
    document.querySelector("#groups .chosen, #groups .hit")?.scrollIntoView({ block: "center" });
  }
  document.body.dataset.ready = JSON.stringify({ ...state, unfold: [...state.unfold] });
}

function tip(event) {
  const at = event.target.closest?.("[data-kernel],[data-primitive],[data-held],[data-call]"), d = at?.dataset;
  $("tip").hidden = !at;
  if (!at) return;
  const table = (name, rows) => `<b>${escapeText(name)}</b><table>${rows}</table>`;
  if (d.kernel) $("tip").innerHTML = table(view.kernels[d.kernel].name, kernelTable(view.kernels[d.kernel]));
  else if (d.primitive) $("tip").innerHTML = table(view.primitives[d.primitive].name, primitiveTable(view.primitives[d.primitive]));
  else if (d.call) $("tip").innerHTML = `call ${d.call}, stream ${view.memory.calls[d.call].stream}: ${escapeText(view.memory.calls[d.call].label)}`;
  else {
    const held = view.memory.buffers[d.held];
    $("tip").innerHTML = `${escapeText(held.role || `of ${view.memory.calls[held.from]?.label ?? "?"}`)}: ${escapeText(held.ty)}, ${bytes(held.bytes)} at ${held.offset}, calls ${held.from} to ${held.to}`;
  }
  $("tip").style.left = `${Math.min(event.clientX + 14, innerWidth - $("tip").offsetWidth - 8)}px`;
  $("tip").style.top = `${Math.min(event.clientY + 14, innerHeight - $("tip").offsetHeight - 8)}px`;
}

const move = (by) => go({ step: Math.min(Math.max((state.step ?? view.steps.length) + by, 0), view.steps.length), kernel: null, primitive: null });
document.addEventListener("mousemove", tip);
document.addEventListener("click", (event) => {
  const d = event.target.closest?.("[data-view],[data-fold],[data-find],[data-step],[data-kernel],[data-primitive],[data-call]")?.dataset;
  if (!d) return;
  // What the click opens may lie under it.
  $("tip").hidden = true;
  if (d.view) view = page.views[d.view], go({ view: Number(d.view), step: null, unfold: new Set(), kernel: null, primitive: null });
  else if (d.fold) {
    const unfold = new Set(state.unfold), i = Number(d.fold);
    if (!unfold.delete(i)) unfold.add(i);
    go({ unfold });
  } else if (d.find) go({ search: state.search === d.find ? "" : d.find });
  else if (d.step) go({ step: Number(d.step) });
  else if (d.kernel) go({ kernel: Number(d.kernel), primitive: null });
  else if (d.primitive) go({ primitive: Number(d.primitive), kernel: null });
  else if (d.call) go({ kernel: view.memory.calls[d.call].kernel, primitive: null });
});
$("search").addEventListener("input", () => go({ search: $("search").value }));
$("slider").addEventListener("input", () => go({ step: Number($("slider").value) }));
$("first").addEventListener("click", () => go({ step: 0 }));
$("last").addEventListener("click", () => go({ step: null }));
$("previous").addEventListener("click", () => move(-1));
$("next").addEventListener("click", () => move(1));
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input") || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "ArrowRight") move(1);
  else if (event.key === "ArrowLeft") move(-1);
  else if (event.key === "Home") go({ step: 0 });
  else if (event.key === "End") go({ step: null });
});
addEventListener("resize", () => { drawn.view = null; draw(); });
addEventListener("hashchange", () => { readAddress(); draw(); });
readAddress();
draw();
