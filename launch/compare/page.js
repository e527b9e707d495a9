"use strict";
// Curves of the report, drawn as SVG. A chart asks `lines(view)` for what to draw, so that every control redraws all charts.
const results = JSON.parse(document.getElementById("results").textContent);
const labels = results.optimizers.map((row) => row.label);
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "5 2", "1 4", "12 4", "4 4"];
const view = { x: "tokens", logX: false, logY: false, smooth: 0.6, seeds: true, hidden: new Set() };
const X_AXES = { tokens: "tokens", step: "optimizer steps", seconds: "seconds in training steps", flops: "model FLOPs" };
const charts = [];

const color = (label) => `var(--c${labels.indexOf(label) % 8})`;
const dash = (label) => DASHES[labels.indexOf(label) % DASHES.length];

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e15 || size < 1e-3) return value.toExponential(size >= 1e15 ? 2 : 1).replace(/\.0+e/, "e").replace("e+", "e");
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return `${+(value / unit).toPrecision(3)}${letter}`;
  return `${+value.toPrecision(4)}`;
}

function element(name, attributes = {}, parent = null, text = null) {
  const svg = ["svg", "g", "path", "line", "rect", "text", "circle", "clipPath", "title"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// Exponential moving average whose start is not pulled towards 0; weight 0 leaves the points alone.
function smoothed(points, weight) {
  let sum = 0, norm = 0;
  return points.map(([x, y]) => {
    sum = weight * sum + (1 - weight) * y;
    norm = weight * norm + (1 - weight);
    return [x, sum / norm];
  });
}

function xValues(run, table) {
  if (view.x !== "flops") return table[view.x];
  return run.flops_per_token ? table.tokens.map((t) => t * run.flops_per_token) : null;
}

// The mean over seeds at the steps that all seeds have: mean x, mean y.
function meanLine(parts) {
  const maps = parts.map(({ steps, points }) => new Map(steps.map((s, i) => [s, points[i]])));
  const common = parts[0].steps.filter((s) => maps.every((m) => m.has(s)));
  const average = (s, axis) => maps.reduce((sum, m) => sum + m.get(s)[axis], 0) / maps.length;
  return common.map((s) => [average(s, 0), average(s, 1)]);
}

// Lines of one logged quantity: each seed thin, the mean of an optimizer's seeds thick.
function runLines(kind, quantity) {
  const lines = [];
  for (const label of labels) {
    if (view.hidden.has(label)) continue;
    const parts = [];
    for (const run of results.runs) {
      const table = run[kind], xs = table[quantity] && xValues(run, table);
      if (run.label !== label || !xs) continue;
      const keep = xs.map((_, i) => i).filter((i) => table[quantity][i] !== null && xs[i] !== null);
      const points = smoothed(keep.map((i) => [xs[i], table[quantity][i]]), kind === "training" ? view.smooth : 0);
      if (points.length) parts.push({ run, steps: keep.map((i) => table.step[i]), points });
    }
    if (!parts.length) continue;
    if (parts.length > 1 && view.seeds)
      for (const { run, points } of parts) lines.push({ label, name: `${label}, seed ${run.seed}`, points, thin: true });
    lines.push({ label, name: label, points: parts.length > 1 ? meanLine(parts) : parts[0].points, marks: kind === "validation" });
  }
  return lines;
}

function searchLines() {
  return results.optimizers.filter((row) => row.search && row.search.lr.length && !view.hidden.has(row.label)).map((row) => ({
    label: row.label,
    name: row.label,
    points: row.search.lr.filter((p) => p.loss !== null).map((p) => [p.value, p.loss]),
    lost: row.search.lr.filter((p) => p.loss === null).map((p) => p.value),
    chosen: row.lr,
    marks: true,
  }));
}

function ticks(low, high, log, count) {
  if (log) {
    const found = [];
    const steps = Math.log10(high / low) > 2.5 ? [1] : Math.log10(high / low) > 0.9 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      for (const m of steps) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(m * 10 ** e);
    const every = Math.ceil(found.length / (count + 2));
    if (found.length > 1) return found.filter((_, i) => i % every === 0);
  }
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * unit >= rough) * unit;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

class Chart {
  constructor(host, options) {
    Object.assign(this, options);
    this.zoom = null;
    this.cursor = null;
    this.figure = element("figure", {}, host);
    element("h3", {}, this.figure, this.title);
    this.svg = element("svg", { tabindex: 0, role: "img" }, this.figure);
    this.tip = element("div", { class: "tip", hidden: "", "aria-live": "polite" }, this.figure);
    if (this.note) element("figcaption", {}, this.figure, this.note);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("pointerdown", (event) => this.press(event));
    this.svg.addEventListener("pointerup", (event) => this.release(event));
    this.svg.addEventListener("pointercancel", () => { this.start = null; this.leave(); });
    this.svg.addEventListener("dblclick", () => this.reset());
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("blur", () => this.leave());
    charts.push(this);
  }

  // Where a chart begins: all x; of losses the part after the first tenth, since the first steps would flatten the rest.
  extent() {
    const points = this.drawn.flatMap((line) => line.points).filter(([x, y]) => (!this.logX || x > 0) && (!this.logY || y > 0));
    const lost = this.drawn.flatMap((line) => line.lost || []);
    const xs = [...points.map((p) => p[0]), ...lost];
    if (!points.length) return null;
    const range = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    let [x0, x1] = range(xs);
    if (!this.logX && !this.ownX) x0 = 0;
    const late = this.tail ? points.filter((p) => p[0] >= x0 + 0.1 * (x1 - x0)) : points;
    let [y0, y1] = range((late.length ? late : points).map((p) => p[1]));
    const pad = this.logY ? (y1 / y0) ** 0.05 : 0.05 * (y1 - y0) || Math.abs(y1) * 0.05 || 1;
    [y0, y1] = this.logY ? [y0 / (pad || 1), y1 * (pad || 1)] : [y0 - pad, y1 + pad];
    if (this.ownX) [x0, x1] = [x0 / 1.15, x1 * 1.15];
    if (x0 === x1) x1 = this.logX ? x0 * 2 : x0 + 1;
    if (y0 === y1) y1 = y0 * 1.1;
    return { x: [x0, x1], y: [y0, y1] };
  }

  draw() {
    this.logX = this.ownX ? true : view.logX;
    this.logY = view.logY;
    this.drawn = this.lines();
    const width = Math.max(280, this.figure.clientWidth || 560), height = Math.round(Math.min(340, Math.max(240, width * 0.6)));
    this.box = { left: 62, right: width - 12, top: 10, bottom: height - 42 };
    const { left, right, top, bottom } = this.box;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren();
    element("title", {}, this.svg, `${this.title}: ${this.drawn.filter((l) => !l.thin).map((l) => l.name).join(", ")}`);
    const whole = this.extent();
    this.range = this.zoom || whole;
    if (!this.range) {
      element("text", { x: (left + right) / 2, y: height / 2, "text-anchor": "middle" }, this.svg, "nothing to show");
      return;
    }
    const clip = element("clipPath", { id: `clip${charts.indexOf(this)}` }, this.svg);
    element("rect", { x: left, y: top, width: right - left, height: bottom - top }, clip);
    for (const t of ticks(...this.range.x, this.logX, Math.max(3, Math.floor(width / 110)))) {
      const x = this.toX(t);
      element("line", { class: "grid", x1: x, x2: x, y1: top, y2: bottom }, this.svg);
      element("text", { x, y: bottom + 16, "text-anchor": "middle" }, this.svg, short(t));
    }
    for (const t of ticks(...this.range.y, this.logY, 6)) {
      const y = this.toY(t);
      element("line", { class: "grid", x1: left, x2: right, y1: y, y2: y }, this.svg);
      element("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, this.svg, short(t));
    }
    element("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, this.svg, this.xName || X_AXES[view.x]);
    const inside = element("g", { "clip-path": `url(#clip${charts.indexOf(this)})` }, this.svg);
    for (const line of this.drawn) this.drawLine(inside, line);
    this.overlay = element("g", {}, this.svg);
    this.showCursor();
  }

  drawLine(parent, line) {
    const points = line.points.filter(([x, y]) => (!this.logX || x > 0) && (!this.logY || y > 0));
    const path = points.map(([x, y], i) => `${i ? "L" : "M"}${this.toX(x).toFixed(1)},${this.toY(y).toFixed(1)}`).join("");
    const style = { fill: "none", stroke: color(line.label), "stroke-width": line.thin ? 1 : 2, opacity: line.thin ? 0.35 : 1,
      "stroke-dasharray": line.thin ? "" : dash(line.label), "stroke-linejoin": "round" };
    element("path", { d: path, ...style }, parent);
    if (line.marks && points.length <= 60)
      for (const [x, y] of points) {
        const chosen = x === line.chosen;
        element("circle", { cx: this.toX(x), cy: this.toY(y), r: chosen ? 6 : 3, fill: chosen ? "var(--paper)" : color(line.label),
          stroke: color(line.label), "stroke-width": chosen ? 3 : 0 }, parent);
      }
    for (const x of line.lost || [])
      element("text", { x: this.toX(x), y: this.box.top + 14 + 14 * labels.indexOf(line.label), "text-anchor": "middle",
        style: `fill:${color(line.label)};font-weight:700` }, parent, "×");
  }

  scale(value, [low, high], from, to, log) {
    const part = log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    return from + part * (to - from);
  }
  toX(value) { return this.scale(value, this.range.x, this.box.left, this.box.right, this.logX); }
  toY(value) { return this.scale(value, this.range.y, this.box.bottom, this.box.top, this.logY); }
  back(position, [low, high], from, to, log) {
    const part = (position - from) / (to - from);
    return log ? low * (high / low) ** part : low + part * (high - low);
  }
  place(event) {
    const frame = this.svg.getBoundingClientRect(), unit = this.svg.viewBox.baseVal.width / frame.width;
    const { left, right, top, bottom } = this.box;
    const clamp = (v, a, b) => Math.min(b, Math.max(a, v));
    return [clamp((event.clientX - frame.left) * unit, left, right), clamp((event.clientY - frame.top) * unit, top, bottom)];
  }

  point(event) {
    if (!this.range) return;
    const [x, y] = this.place(event);
    this.cursor = this.back(x, this.range.x, this.box.left, this.box.right, this.logX);
    this.showCursor();
    if (this.start) {
      const [x0, y0] = this.start;
      element("rect", { class: "zoom", x: Math.min(x, x0), y: Math.min(y, y0), width: Math.abs(x - x0), height: Math.abs(y - y0) }, this.overlay);
    }
  }
  press(event) {
    if (event.pointerType === "touch" || !this.range) return; // a finger scrolls the page
    this.svg.setPointerCapture(event.pointerId);
    this.start = this.place(event);
  }
  release(event) {
    if (!this.start) return;
    const [x0, y0] = this.start, [x1, y1] = this.place(event);
    this.start = null;
    if (Math.abs(x1 - x0) < 8) return;
    const { left, right, top, bottom } = this.box;
    const span = (a, b, range, from, to, log) => [a, b].map((v) => this.back(v, range, from, to, log)).sort((p, q) => p - q);
    const flat = Math.abs(y1 - y0) < 8; // a horizontal drag zooms x alone
    this.zoom = {
      x: span(x0, x1, this.range.x, left, right, this.logX),
      y: flat ? this.range.y : span(y0, y1, this.range.y, bottom, top, this.logY),
    };
    this.draw();
  }
  reset() { this.zoom = null; this.draw(); }
  leave() { if (!this.start) { this.cursor = null; this.showCursor(); } }

  key(event) {
    if (!this.range) return;
    const xs = [...new Set(this.drawn.filter((l) => !l.thin).flatMap((l) => l.points.map((p) => p[0])))].sort((a, b) => a - b);
    const shown = xs.filter((x) => x >= this.range.x[0] && x <= this.range.x[1]);
    const now = this.cursor ?? shown[shown.length - 1];
    if (event.key === "ArrowRight") this.cursor = shown.find((x) => x > now) ?? now;
    else if (event.key === "ArrowLeft") this.cursor = shown.filter((x) => x < now).pop() ?? now;
    else if (event.key === "Home") this.cursor = shown[0];
    else if (event.key === "End") this.cursor = shown[shown.length - 1];
    else if (event.key === "+" || event.key === "-") {
      const factor = event.key === "+" ? 0.5 : 2, middle = this.toX(now), half = ((this.box.right - this.box.left) / 2) * factor;
      const x = [middle - half, middle + half].map((v) => this.back(v, this.range.x, this.box.left, this.box.right, this.logX));
      this.zoom = { x: this.logX || x[0] > 0 ? x : [0, x[1]], y: this.range.y };
      this.cursor = now;
      this.draw();
    } else if (event.key === "0" || event.key === "Escape") { this.cursor = null; this.reset(); }
    else return;
    event.preventDefault();
    this.showCursor();
  }

  showCursor() {
    if (!this.overlay) return;
    this.overlay.replaceChildren();
    this.tip.hidden = this.cursor === null || this.cursor === undefined;
    if (this.tip.hidden) return;
    const main = this.drawn.filter((line) => !line.thin && line.points.length);
    const nearest = main.map((line) => {
      const distance = (p) => Math.abs(this.toX(p[0]) - this.toX(this.cursor));
      return [line, line.points.reduce((best, p) => (distance(p) < distance(best) ? p : best))];
    }).sort((a, b) => a[1][1] - b[1][1]);
    const x = this.toX(this.cursor);
    element("line", { class: "cross", x1: x, x2: x, y1: this.box.top, y2: this.box.bottom }, this.overlay);
    this.tip.replaceChildren();
    element("div", { class: "soft" }, this.tip, `${short(this.cursor)} ${this.xName ? "" : X_AXES[view.x]}`);
    for (const [line, [px, py]] of nearest) {
      const visible = this.toX(px) >= this.box.left - 1 && this.toX(px) <= this.box.right + 1 && this.toY(py) >= this.box.top && this.toY(py) <= this.box.bottom;
      if (visible) element("circle", { cx: this.toX(px), cy: this.toY(py), r: 4, fill: color(line.label) }, this.overlay);
      const item = element("div", {}, this.tip);
      element("span", { style: `color:${color(line.label)}` }, item, line.name);
      element("span", {}, item, this.ownX ? `${py.toFixed(4)} at ${short(px)}` : py.toPrecision(5));
    }
    const frame = this.svg.getBoundingClientRect(), unit = frame.width / this.svg.viewBox.baseVal.width;
    const side = x > (this.box.left + this.box.right) / 2;
    this.tip.style.left = side ? "auto" : `${(x + 12) * unit}px`;
    this.tip.style.right = side ? `${this.figure.clientWidth - (x - 12) * unit}px` : "auto";
    this.tip.style.top = `${frame.top - this.figure.getBoundingClientRect().top + (this.box.top + 4) * unit}px`;
  }
}

function redraw(resetZoom = false) {
  for (const chart of charts) {
    if (resetZoom) chart.zoom = null;
    chart.draw();
  }
}

function control(id, event, apply, reset) {
  const node = document.getElementById(id);
  node.addEventListener(event, () => { apply(node); redraw(reset); });
}

function start() {
  const logged = (kind, quantity) => results.runs.some((run) => run[kind][quantity]);
  const curves = document.getElementById("curves");
  const add = (host, title, kind, quantity, options = {}) =>
    logged(kind, quantity) && new Chart(host, { title, lines: () => runLines(kind, quantity), ...options });
  add(curves, "Validation loss, nats per token", "validation", "val_loss", { tail: true });
  add(curves, "Training loss, nats per token", "training", "loss", { tail: true });
  add(curves, "Norm of the gradient, before clipping", "training", "grad_norm", { tail: true });
  add(curves, "RMS change of a hidden weight in one step", "training", "update_rms", {});
  add(curves, "The same relative to the RMS of the weight", "training", "update_ratio", {});
  const host = document.getElementById("sensitivity");
  if (host && results.optimizers.some((row) => row.search && row.search.lr.length))
    new Chart(host, { title: "Validation loss by learning rate", lines: searchLines, ownX: true, xName: "learning rate (optimizer.lr)",
      note: "One seed. Ring: chosen; × at the top: diverged." });
  for (const legend of document.querySelectorAll(".legend"))
    for (const label of labels) {
      const button = element("button", { type: "button", "aria-pressed": "true", title: "show or hide" }, legend);
      const sample = element("svg", { width: 28, height: 10, "aria-hidden": "true" }, button);
      element("line", { x1: 0, x2: 28, y1: 5, y2: 5, stroke: color(label), "stroke-width": 3, "stroke-dasharray": dash(label) }, sample);
      element("span", {}, button, label);
      button.addEventListener("click", () => {
        if (!view.hidden.delete(label)) view.hidden.add(label);
        for (const other of document.querySelectorAll(".legend button"))
          if (other.textContent === label) other.setAttribute("aria-pressed", String(!view.hidden.has(label)));
        redraw();
      });
    }
  control("x-axis", "change", (node) => { view.x = node.value; }, true);
  control("log-x", "change", (node) => { view.logX = node.checked; }, true);
  control("log-y", "change", (node) => { view.logY = node.checked; }, true);
  control("seeds", "change", (node) => { view.seeds = node.checked; }, false);
  control("smooth", "input", (node) => { view.smooth = +node.value; }, false);
  document.getElementById("reset").addEventListener("click", () => redraw(true));
  new ResizeObserver(() => redraw()).observe(curves);
  redraw();
}
start();
