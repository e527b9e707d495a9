"use strict";
// Curves of the report, drawn as SVG. A chart asks `lines()` for what to draw, so that every control redraws all charts.
const results = JSON.parse(document.getElementById("results").textContent);
const labels = results.optimizers.map((row) => row.label);
// Lines are told apart by colour, dashes and marks; 8, 8 and 7 of them, so that 56 optimizers differ in something.
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "5 2", "1 4", "12 4", "4 4"];
const MARKS = [
  (x, y, r) => `M${x - r},${y}a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0Z`,
  (x, y, r) => `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
  (x, y, r) => `M${x},${y - 1.3 * r}l${1.3 * r},${2.3 * r}h${-2.6 * r}Z`,
  (x, y, r) => `M${x},${y - 1.5 * r}l${1.3 * r},${1.5 * r}l${-1.3 * r},${1.5 * r}l${-1.3 * r},${-1.5 * r}Z`,
  (x, y, r) => `M${x},${y + 1.3 * r}l${1.3 * r},${-2.3 * r}h${-2.6 * r}Z`,
  (x, y, r) => `M${x - 1.5 * r},${y - 0.5 * r}h${3 * r}v${r}h${-3 * r}Z`,
  (x, y, r) => `M${x - 0.5 * r},${y - 1.5 * r}h${r}v${3 * r}h${-r}Z`,
];
const X_AXES = { tokens: "tokens", step: "optimizer steps", seconds: "seconds in training steps", flops: "model FLOPs" };
const view = { x: "tokens", logX: false, logY: false, smooth: 0.6, seeds: true, hidden: new Set(), focus: null };
const charts = [];

const index = (label) => labels.indexOf(label);
const color = (label) => `var(--c${index(label) % 8})`;
const dash = (label) => DASHES[index(label) % DASHES.length];
const mark = (label) => MARKS[index(label) % MARKS.length];
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const clip = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function element(name, attributes = {}, parent = null, text = null) {
  const svg = ["svg", "g", "path", "line", "rect", "text", "circle", "clipPath"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// The sample of a line that stands beside a name.
function sample(label, parent, width = 28) {
  const svg = element("svg", { width, height: 12, "aria-hidden": "true" }, parent);
  element("line", { x1: 0, x2: width, y1: 6, y2: 6, stroke: color(label), "stroke-width": 2.5, "stroke-dasharray": dash(label) }, svg);
  element("path", { d: mark(label)(width / 2, 6, 3.5), fill: color(label) }, svg);
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e15 || size < 1e-3) return value.toExponential(2).replace(/\.?0*e/, "e").replace("e+", "e").replace("-", "−");
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= unit) return `${+(value / (letter === "k" ? 1e3 : unit)).toPrecision(3)}${letter}`;
  return `${+value.toPrecision(4)}`.replace("-", "−");
}

// Names of ticks that are close to each other: one unit and as many decimals for all.
function tickNames(values) {
  const most = Math.max(...values.map(Math.abs));
  if (values.length < 2 || (values[0] > 0 && most > 30 * values[0])) return values.map(short);
  const tiny = most < 1e-3 || most >= 1e15;
  const [unit, letter] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]].find(([u]) => most >= u) || [1, ""];
  const scale = tiny ? 10 ** Math.floor(Math.log10(most) + 1e-9) : letter === "k" ? 1e3 : unit;
  let decimals = 0;
  while (decimals < 6 && values.some((v) => Math.abs((v / scale) * 10 ** decimals - Math.round((v / scale) * 10 ** decimals)) > 1e-6)) decimals++;
  const suffix = tiny ? `e${Math.round(Math.log10(scale))}`.replace("-", "−") : letter;
  return values.map((v) => (v === 0 ? "0" : `${(v / scale).toFixed(decimals)}${suffix}`.replace(/^-/, "−")));
}

function ticks(low, high, log, count) {
  if (log) {
    const found = [], decades = Math.log10(high / low);
    const steps = decades > 2.5 ? [1] : decades > 0.9 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      for (const value of steps.map((m) => +(m * 10 ** e).toPrecision(12))) // 10 ** -4 is not 1e-4
        if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) found.push(value);
    const every = Math.ceil(found.length / (count + 1));
    if (found.length > 2) return found.filter((_, i) => i % every === 0);
  }
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * unit >= rough * 0.999) * unit;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
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

// Over the steps that all seeds have: mean x, mean y, smallest and largest y.
function meanLine(parts) {
  const maps = parts.map(({ steps, points }) => new Map(steps.map((s, i) => [s, points[i]])));
  const common = parts[0].steps.filter((s) => maps.every((m) => m.has(s)));
  return common.map((s) => {
    const at = maps.map((m) => m.get(s)), ys = at.map((p) => p[1]);
    const average = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;
    return [average(at.map((p) => p[0])), average(ys), Math.min(...ys), Math.max(...ys)];
  });
}

// Lines of one logged quantity: each seed thin, the mean of an optimizer's seeds thick. A diverged run is no part of a mean.
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
      if (!points.length) continue;
      if (run.status === "diverged") lines.push({ label, name: `${label}, seed ${run.seed}, diverged`, points, thin: true, diverged: true });
      else parts.push({ run, steps: keep.map((i) => table.step[i]), points });
    }
    if (!parts.length) continue;
    if (parts.length > 1 && view.seeds)
      for (const { run, points } of parts) lines.push({ label, name: `${label}, seed ${run.seed}`, points, thin: true });
    lines.push({ label, name: label, points: parts.length > 1 ? meanLine(parts) : parts[0].points, marks: kind === "validation" });
  }
  return lines.sort((a, b) => (a.thin ? 0 : 1) - (b.thin ? 0 : 1)); // means lie above seeds
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

class Chart {
  constructor(host, options) {
    Object.assign(this, { zoom: null, cursor: null, pointed: false }, options);
    this.figure = element("figure", this.wide ? { class: "whole" } : {}, host);
    const head = element("div", { class: "head" }, this.figure);
    element("h3", {}, head, this.title);
    const tools = element("div", { class: "tools" }, head);
    for (const [text, name, act] of [["−", "zoom out", () => this.scaleX(2)], ["+", "zoom in", () => this.scaleX(0.5)]])
      element("button", { type: "button", "aria-label": `${name}: ${this.title}`, title: name }, tools, text).addEventListener("click", act);
    this.back = element("button", { type: "button", hidden: "", "aria-label": `whole range: ${this.title}` }, tools, "whole range");
    this.back.addEventListener("click", () => this.reset());
    this.svg = element("svg", { tabindex: 0, role: "img", "aria-describedby": "help" }, this.figure);
    this.tip = element("div", { class: "tip", hidden: "", role: "status" }, this.figure);
    if (this.note) element("figcaption", {}, this.figure, this.note);
    const on = (name, handler, options = {}) => this.svg.addEventListener(name, handler, options);
    on("pointermove", (event) => this.point(event));
    on("pointerleave", (event) => event.pointerType !== "touch" && this.leave()); // what a finger asked for stays
    on("pointerdown", (event) => this.press(event));
    on("pointerup", (event) => this.release(event));
    on("pointercancel", () => { this.start = null; this.showCursor(); });
    on("wheel", (event) => this.wheel(event), { passive: false });
    on("dblclick", () => this.reset());
    on("keydown", (event) => this.key(event));
    on("blur", () => this.leave());
    charts.push(this);
  }

  usable([x, y]) { return (!this.logX || x > 0) && (!this.logY || y > 0); }

  // Where a chart begins: all x; of losses the part after the first fifth, since the first steps would flatten the rest.
  extent() {
    const sound = this.drawn.filter((line) => !line.diverged);
    const points = (sound.length ? sound : this.drawn).flatMap((line) => line.points).filter((p) => this.usable(p));
    if (!points.length) return null;
    const range = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    let [x0, x1] = range([...points.map((p) => p[0]), ...this.drawn.flatMap((line) => line.lost || [])]);
    if (!this.logX && !this.ownX) x0 = 0;
    const late = this.tail ? points.filter((p) => p[0] >= x0 + 0.2 * (x1 - x0)) : points;
    let [y0, y1] = range((late.length ? late : points).map((p) => p[1]));
    const pad = this.logY ? (y1 / y0) ** 0.05 : 0.05 * (y1 - y0) || Math.abs(y1) * 0.05 || 1;
    [y0, y1] = this.logY ? [y0 / pad, y1 * pad] : [y0 >= 0 ? Math.max(0, y0 - pad) : y0 - pad, y1 + pad];
    const margin = Math.max(1.15, (x1 / x0) ** 0.03); // room for the hollow mark of the chosen one
    if (this.ownX) [x0, x1] = [x0 / margin, x1 * margin];
    else x1 = this.logX ? x1 * (x1 / x0) ** 0.012 : x1 + 0.012 * (x1 - x0); // room for the last mark
    if (x0 === x1) x1 = this.logX ? x0 * 2 : x0 + 1;
    if (y0 === y1) [y0, y1] = this.logY ? [y0 / 1.1, y1 * 1.1] : [y0, y0 + 1];
    return { x: [x0, x1], y: [y0, y1] };
  }

  draw() {
    this.logX = this.ownX ? true : view.logX;
    this.logY = view.logY;
    this.drawn = this.lines();
    const width = Math.max(280, this.figure.clientWidth || 560);
    const height = Math.round(clamp(width * (this.wide ? 0.42 : 0.6), 250, this.wide ? 440 : 340));
    const named = width >= 460 && labels.length > 1 ? this.drawn.filter((line) => !line.thin) : [];
    const room = Math.max(0, ...named.map((line) => Math.min(18, line.name.length))) * 8.1;
    this.box = { left: 58, right: width - 12 - room, top: 10, bottom: height - 42 };
    const { left, right, top, bottom } = this.box;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("aria-label", `${this.title}: ${this.drawn.filter((l) => !l.thin).map((l) => l.name).join(", ")}`);
    this.svg.replaceChildren();
    this.back.hidden = !this.zoom;
    this.range = this.zoom || this.extent();
    if (!this.range) {
      this.overlay = null;
      this.tip.hidden = true;
      element("text", { x: (left + right) / 2, y: height / 2, "text-anchor": "middle" }, this.svg, "nothing to show");
      return;
    }
    const number = charts.indexOf(this);
    element("rect", { x: left, y: top, width: right - left, height: bottom - top }, element("clipPath", { id: `clip${number}` }, this.svg));
    const xs = ticks(...this.range.x, this.logX, Math.max(3, Math.floor((right - left) / 90)));
    tickNames(xs).forEach((name, i) => {
      const x = this.toX(xs[i]);
      element("line", { class: "grid", x1: x, x2: x, y1: top, y2: bottom }, this.svg);
      element("text", { x, y: bottom + 17, "text-anchor": "middle" }, this.svg, name);
    });
    const ys = ticks(...this.range.y, this.logY, 6);
    tickNames(ys).forEach((name, i) => {
      const y = this.toY(ys[i]);
      element("line", { class: "grid", x1: left, x2: right, y1: y, y2: y }, this.svg);
      element("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, this.svg, name);
    });
    element("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }, this.svg);
    element("text", { x: (left + right) / 2, y: height - 5, "text-anchor": "middle" }, this.svg, this.xName || X_AXES[view.x]);
    const inside = element("g", { "clip-path": `url(#clip${number})` }, this.svg);
    for (const line of this.drawn) this.drawLine(inside, line);
    this.nameLines(named);
    this.overlay = element("g", {}, this.svg);
    this.showCursor();
  }

  drawLine(parent, line) {
    const points = line.points.filter((p) => this.usable(p)), faded = view.focus && view.focus !== line.label;
    const path = points.map(([x, y], i) => `${i ? "L" : "M"}${this.toX(x).toFixed(1)},${this.toY(y).toFixed(1)}`).join("");
    const own = element("g", { opacity: faded ? 0.12 : line.thin ? 0.35 : 1 }, parent);
    element("path", { d: path, fill: "none", stroke: color(line.label), "stroke-width": line.thin ? 1 : 2.25,
      "stroke-dasharray": line.thin ? "" : dash(line.label), "stroke-linejoin": "round" }, own);
    const every = Math.ceil(points.length / 12); // marks tell lines apart; more of them would hide the line
    if (line.marks)
      points.forEach(([x, y], i) => {
        const chosen = x === line.chosen;
        if (!chosen && !this.ownX && (points.length - 1 - i) % every) return;
        element("path", { d: mark(line.label)(this.toX(x), this.toY(y), chosen ? 6 : 3.5), fill: chosen ? "var(--paper)" : color(line.label),
          stroke: color(line.label), "stroke-width": chosen ? 3 : 0 }, own);
      });
    if (line.diverged && points.length) this.cross(own, line, this.toX(points[points.length - 1][0]), Math.max(this.box.top + 8, this.toY(points[points.length - 1][1])));
    for (const x of line.lost || []) this.cross(own, line, this.toX(x), this.box.top + 8 + 13 * index(line.label));
  }
  cross(parent, line, x, y) {
    element("path", { d: `M${x - 4},${y - 4}l8,8m0,-8l-8,8`, stroke: color(line.label), "stroke-width": 2.5, fill: "none" }, parent);
  }

  // Names at the right ends of lines, moved apart where they would cover each other.
  nameLines(lines) {
    const { right, top, bottom } = this.box;
    const ends = lines.map((line) => {
      const seen = line.points.filter((p) => this.usable(p) && p[0] <= this.range.x[1] * (1 + 1e-9));
      const x = this.ownX && seen.length ? this.toX(seen[seen.length - 1][0]) : right; // a search ends where it ends
      return { line, x, y: seen.length ? this.toY(seen[seen.length - 1][1]) : NaN };
    }).filter(({ y }) => y >= top - 1 && y <= bottom + 1).sort((a, b) => a.y - b.y);
    const gap = Math.min(14, (bottom - top) / Math.max(1, ends.length));
    ends.forEach((end, i) => { end.y = Math.max(end.y, i ? ends[i - 1].y + gap : top + 4); });
    ends.reverse().forEach((end, i) => { end.y = Math.min(end.y, i ? ends[i - 1].y - gap : bottom); });
    for (const { line, x, y } of ends)
      element("text", { x: x + 10, y: y + 4, class: "name", style: `fill:${color(line.label)}`,
        opacity: view.focus && view.focus !== line.label ? 0.25 : 1 }, this.svg, clip(line.name, 18));
  }

  scale(value, [low, high], from, to, log) {
    return from + (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low)) * (to - from);
  }
  unscale(position, [low, high], from, to, log) {
    const part = (position - from) / (to - from);
    return log ? low * (high / low) ** part : low + part * (high - low);
  }
  toX(value) { return this.scale(value, this.range.x, this.box.left, this.box.right, this.logX); }
  toY(value) { return this.scale(value, this.range.y, this.box.bottom, this.box.top, this.logY); }
  fromX(position) { return this.unscale(position, this.range.x, this.box.left, this.box.right, this.logX); }
  fromY(position) { return this.unscale(position, this.range.y, this.box.bottom, this.box.top, this.logY); }
  place(event) {
    const frame = this.svg.getBoundingClientRect(), unit = this.svg.viewBox.baseVal.width / frame.width;
    const { left, right, top, bottom } = this.box;
    return [clamp((event.clientX - frame.left) * unit, left, right), clamp((event.clientY - frame.top) * unit, top, bottom)];
  }

  // The cursor is at the same place in all charts with the same axis; the values are told where it is pointed at.
  moveCursor(value) {
    for (const chart of charts)
      if (Boolean(chart.ownX) === Boolean(this.ownX)) {
        Object.assign(chart, { cursor: value, pointed: chart === this });
        chart.showCursor();
      }
  }
  leave() { if (!this.start && this.pointed) this.moveCursor(null); }

  point(event) {
    if (!this.range) return;
    const [x, y] = this.place(event);
    this.moveCursor(this.fromX(x));
    if (!this.start) return;
    const [x0, y0] = this.start;
    element("rect", { class: "zoom", x: Math.min(x, x0), y: Math.min(y, y0), width: Math.abs(x - x0), height: Math.abs(y - y0) }, this.overlay);
  }
  press(event) {
    if (event.pointerType === "touch" || event.button || !this.range) return this.point(event); // a finger scrolls the page
    this.svg.setPointerCapture(event.pointerId);
    this.start = this.place(event);
  }
  release(event) {
    if (!this.start) return;
    const [x0, y0] = this.start, [x1, y1] = this.place(event);
    this.start = null;
    if (Math.abs(x1 - x0) < 8) return this.showCursor();
    const sorted = (values) => values.sort((a, b) => a - b);
    const flat = Math.abs(y1 - y0) < 8; // a horizontal drag zooms x alone
    this.zoom = { x: sorted([this.fromX(x0), this.fromX(x1)]), y: flat ? this.range.y : sorted([this.fromY(y0), this.fromY(y1)]) };
    this.draw();
  }
  wheel(event) {
    if (!(event.ctrlKey || event.metaKey) || !this.range) return; // the wheel alone scrolls the page
    event.preventDefault();
    this.scaleX(1.25 ** Math.sign(event.deltaY), this.place(event)[0]);
  }
  // Show `factor` times as much of x, with what is at `position` staying there; losses fill the height again.
  scaleX(factor, position = null) {
    if (!this.range) return;
    const { left, right } = this.box, at = position ?? (this.cursor === null ? right : clamp(this.toX(this.cursor), left, right));
    const whole = this.zoom ? this.wholeX() : this.range.x;
    const x = [at - (at - left) * factor, at + (right - at) * factor].map((v) => clamp(this.fromX(v), ...whole));
    const inside = this.drawn.filter((l) => !l.diverged).flatMap((l) => l.points).filter((p) => this.usable(p) && p[0] >= x[0] && p[0] <= x[1]);
    if (!inside.length || x[0] === x[1]) return;
    if (x[0] <= whole[0] && x[1] >= whole[1]) return this.reset();
    const ys = inside.map((p) => p[1]), low = Math.min(...ys), high = Math.max(...ys), pad = this.logY ? (high / low) ** 0.05 : 0.05 * (high - low);
    this.zoom = { x, y: low === high ? this.range.y : this.logY ? [low / pad, high * pad] : [low - pad, high + pad] };
    this.draw();
  }
  wholeX() { const range = this.extent(); return range ? range.x : this.range.x; }
  reset() { this.zoom = null; this.draw(); }

  key(event) {
    if (!this.range || event.altKey || event.ctrlKey || event.metaKey) return;
    const xs = [...new Set(this.drawn.filter((l) => !l.thin).flatMap((l) => l.points.map((p) => p[0])))].sort((a, b) => a - b);
    const shown = xs.filter((x) => x >= this.range.x[0] && x <= this.range.x[1]);
    const now = this.cursor ?? shown[shown.length - 1];
    const move = { ArrowRight: () => shown.find((x) => x > now) ?? now, ArrowLeft: () => shown.filter((x) => x < now).pop() ?? now,
      Home: () => shown[0], End: () => shown[shown.length - 1] }[event.key];
    if (move) this.moveCursor(move() ?? null);
    else if (event.key === "+" || event.key === "=") this.scaleX(0.5);
    else if (event.key === "-") this.scaleX(2);
    else if (event.key === "0" || event.key === "Escape") { this.moveCursor(null); this.reset(); }
    else return;
    event.preventDefault();
  }

  // The point of a line at the cursor: between two points interpolated, of a search the nearest trial; none beyond its ends.
  under(line) {
    const points = line.points.filter((p) => this.usable(p)), x = this.toX(this.cursor);
    if (!points.length || x < this.toX(points[0][0]) - 8 || x > this.toX(points[points.length - 1][0]) + 8) return null;
    const distance = (p) => Math.abs(this.toX(p[0]) - x);
    const next = points.findIndex((p) => p[0] >= this.cursor);
    if (this.ownX || next < 1) return points.reduce((best, p) => (distance(p) < distance(best) ? p : best));
    const [a, b] = [points[next - 1], points[next]], part = (this.cursor - a[0]) / (b[0] - a[0]);
    return a.map((v, i) => v + part * (b[i] - v));
  }

  showCursor() {
    if (!this.overlay) return;
    this.overlay.replaceChildren();
    const { left, right, top, bottom } = this.box, x = this.cursor === null ? NaN : this.toX(this.cursor);
    this.tip.hidden = true;
    if (!(x >= left - 1 && x <= right + 1)) return;
    const nearest = this.drawn.filter((line) => !line.thin).map((line) => [line, this.under(line)]).filter(([, p]) => p)
      .sort((a, b) => a[1][1] - b[1][1]);
    element("line", { class: "cross", x1: x, x2: x, y1: top, y2: bottom }, this.overlay);
    for (const [line, [px, py]] of nearest)
      if (this.toX(px) >= left - 1 && this.toX(px) <= right + 1 && this.toY(py) >= top && this.toY(py) <= bottom)
        element("circle", { cx: this.toX(px), cy: this.toY(py), r: 4.5, fill: color(line.label), stroke: "var(--paper)", "stroke-width": 1.5 }, this.overlay);
    if (!this.pointed || !nearest.length) return;
    this.tip.hidden = false;
    this.tip.replaceChildren();
    element("div", { class: "at" }, this.tip, this.xName ? `${this.xName} ${short(this.cursor)}` : `${short(this.cursor)} ${X_AXES[view.x]}`);
    for (const [line, [px, py, low, high]] of nearest) {
      const item = element("div", {}, this.tip), name = element("span", {}, item);
      sample(line.label, name, 22);
      element("span", {}, name, line.name);
      const value = element("span", {}, item, this.ownX ? `${py.toFixed(4)} at ${short(px)}` : py.toPrecision(5));
      if (low !== undefined && view.seeds) element("small", {}, value, ` ${low.toPrecision(4)}–${high.toPrecision(4)}`);
    }
    const frame = this.svg.getBoundingClientRect(), home = this.figure.getBoundingClientRect(), unit = frame.width / this.svg.viewBox.baseVal.width;
    const width = this.tip.offsetWidth, wanted = x > (left + right) / 2 ? (x - 12) * unit - width : (x + 12) * unit;
    this.tip.style.left = `${clamp(wanted, 0, Math.max(0, home.width - width))}px`;
    this.tip.style.top = `${frame.top - home.top + (top + 4) * unit}px`;
  }
}

function redraw(resetZoom = false) {
  for (const chart of charts) {
    if (resetZoom) Object.assign(chart, { zoom: null, cursor: null });
    chart.draw();
  }
}

// Where a curve of (x, loss) first comes down to the loss, as in curves.py; null if it never does.
function crossing(xs, losses, target) {
  const i = losses.findIndex((loss) => loss !== null && loss <= target);
  if (i < 1) return i < 0 ? null : xs[0];
  return xs[i - 1] + ((xs[i] - xs[i - 1]) * (losses[i - 1] - target)) / (losses[i - 1] - losses[i]);
}

// The table of what each optimizer needs to come down to a loss, for the loss that the reader asks for.
function retarget(target) {
  for (const cell of document.querySelectorAll("td[data-cost]")) {
    const [which, key] = cell.dataset.cost.split(" ");
    const runs = results.runs.filter((run) => run.label === labels[+which] && run.status !== "diverged" && run.validation.step.length);
    const limit = results.compared_at_tokens;
    const found = runs.map(({ validation: v }) => {
      const kept = v.tokens.filter((t) => t <= limit).length, part = (limit - v.tokens[kept - 1]) / (v.tokens[kept] - v.tokens[kept - 1]);
      const upto = (ys) => [...ys.slice(0, kept), ...(part > 0 ? [ys[kept - 1] + part * (ys[kept] - ys[kept - 1])] : [])];
      return crossing(upto(v[key]), upto(v.val_loss), target);
    }).filter((x) => x !== null);
    const mean = found.reduce((sum, x) => sum + x, 0) / found.length;
    const bound = runs.some(({ validation: v }) => v.val_loss[0] <= target) ? "≤ " : ""; // there already at the first evaluation
    cell.textContent = found.length ? bound + mean.toLocaleString("en-US", { maximumFractionDigits: key !== "seconds" ? 0 : mean < 10 ? 2 : 1 }) : "never";
    if (found.length && found.length < runs.length && key === "tokens") cell.textContent += ` (${found.length} of ${runs.length} runs)`;
  }
}

function control(id, event, apply, reset) {
  const node = document.getElementById(id);
  node.addEventListener(event, () => { apply(node); redraw(reset); });
}

function legend(host) {
  for (const label of labels) {
    const button = element("button", { type: "button", "aria-pressed": "true", title: "show or hide" }, host);
    sample(label, button);
    element("span", {}, button, label);
    const focus = (value) => { if (!view.hidden.has(label)) { view.focus = value; redraw(); } };
    button.addEventListener("pointerenter", (event) => event.pointerType !== "touch" && focus(label));
    button.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && focus(null));
    button.addEventListener("click", () => {
      if (!view.hidden.delete(label)) view.hidden.add(label);
      view.focus = null;
      button.setAttribute("aria-pressed", String(!view.hidden.has(label)));
      redraw();
    });
  }
}

function start() {
  const curves = document.getElementById("curves");
  const add = (title, kind, quantity, options = {}) => results.runs.some((run) => run[kind][quantity])
    && new Chart(curves, { title, lines: () => runLines(kind, quantity), ...options });
  add("Validation loss, nats per token", "validation", "val_loss", { tail: true, wide: true });
  add("Training loss, nats per token", "training", "loss", { tail: true });
  add("Norm of the gradient, before clipping", "training", "grad_norm", { tail: true });
  add("RMS change of a hidden weight in one step", "training", "update_rms");
  add("The same relative to the RMS of the weight", "training", "update_ratio");
  const host = document.getElementById("sensitivity");
  if (host) new Chart(host, { title: "Validation loss by learning rate", lines: searchLines, ownX: true, wide: true,
    xName: "learning rate (optimizer.lr)", note: "One seed. Hollow: chosen; × at the top: diverged." });
  legend(document.querySelector(".legend"));
  control("x-axis", "change", (node) => { view.x = node.value; }, true);
  control("log-x", "change", (node) => { view.logX = node.checked; }, true);
  control("log-y", "change", (node) => { view.logY = node.checked; }, true);
  control("seeds", "change", (node) => { view.seeds = node.checked; }, false);
  control("smooth", "input", (node) => { view.smooth = +node.value; node.nextElementSibling.textContent = (+node.value).toFixed(2); }, false);
  document.getElementById("reset").addEventListener("click", () => redraw(true));
  const target = document.getElementById("target");
  if (target) target.addEventListener("input", () => { if (target.value > 0) retarget(+target.value); });
  new ResizeObserver(() => redraw()).observe(curves);
  redraw();
}
start();
