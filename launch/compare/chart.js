// Charts of the report, drawn by uPlot; page.js says which. A chart asks `lines()` for what to draw, so that every control redraws all.
// Lines are told apart by color, dashes and marks; 8, 7 and 7 of them (looks.py).
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [5, 2], [1, 4], [12, 4]];
const MARKS = [
  (x, y, r) => `M${x - r},${y}a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0Z`,
  (x, y, r) => `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
  (x, y, r) => `M${x},${y - 1.3 * r}l${1.3 * r},${2.3 * r}h${-2.6 * r}Z`,
  (x, y, r) => `M${x},${y - 1.5 * r}l${1.3 * r},${1.5 * r}l${-1.3 * r},${1.5 * r}l${-1.3 * r},${-1.5 * r}Z`,
  (x, y, r) => `M${x},${y + 1.3 * r}l${1.3 * r},${-2.3 * r}h${-2.6 * r}Z`,
  (x, y, r) => `M${x - 1.5 * r},${y - 0.5 * r}h${3 * r}v${r}h${-3 * r}Z`,
  (x, y, r) => `M${x - 0.5 * r},${y - 1.5 * r}h${r}v${3 * r}h${-r}Z`,
];
const FONT = '12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif';

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const clip = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const mean = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;
const extremes = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);

// The name at the end of a line, and its width in pixels of the page.
const nameOf = (label) => clip(label, 18);
const nameFont = (ratio) => `600 ${FONT.replace("12px", `${12 * ratio}px`)}`;
const ruler = document.createElement("canvas").getContext("2d");
function nameWidth(label) {
  ruler.font = nameFont(1);
  return ruler.measureText(nameOf(label)).width;
}

function element(name, attributes, parent, text = null) {
  const svg = ["svg", "path", "line"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

// The sample of a line that stands beside a name. Its color is the style sheet's, so that it follows dark mode by itself.
function sample(label, parent, width = 28) {
  const svg = element("svg", { width, height: 12, "aria-hidden": "true", style: `color:var(${paint(label)})` }, parent);
  const line = { x1: 0, x2: width, y1: 6, y2: 6, stroke: "currentcolor", "stroke-width": 2.5, "stroke-dasharray": dash(label) };
  element("line", line, svg);
  element("path", { d: mark(label)(width / 2, 6, 3.5), fill: "currentcolor" }, svg);
}

// [unit, letter] that a number of this size is told in: thousands from 10,000 on, powers of ten below a thousandth.
function unitOf(size) {
  if (size >= 1e15 || (size > 0 && size < 1e-3)) {
    const exponent = Math.floor(Math.log10(size) + 1e-9);
    return [10 ** exponent, `e${exponent}`];
  }
  return [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([unit]) => size >= (unit === 1e3 ? 1e4 : unit)) ?? [1, ""];
}

function short(value) {
  const [unit, letter] = unitOf(Math.abs(value));
  return `${+(value / unit).toPrecision(letter ? 3 : 4)}${letter}`.replaceAll("-", "−");
}

// Names of ticks that are close to each other: one unit and as many decimals for all.
function tickNames(values) {
  const most = Math.max(...values.map(Math.abs));
  if (values.length < 2 || (values[0] > 0 && most > 30 * values[0])) return values.map(short);
  const [unit, letter] = unitOf(most);
  const whole = (v, decimals) => Math.abs((v / unit) * 10 ** decimals - Math.round((v / unit) * 10 ** decimals)) <= 1e-6;
  let decimals = 0;
  while (decimals < 6 && !values.every((v) => whole(v, decimals))) decimals++;
  return values.map((v) => (v === 0 ? "0" : `${(v / unit).toFixed(decimals)}${letter}`.replaceAll("-", "−")));
}

// Ticks of a logarithmic axis, about `count`: uPlot's own begin at the end of the axis, not at a round number.
function logTicks(low, high, count) {
  const decades = Math.log10(high / low), rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough)), found = [];
  const factors = decades > 2.5 ? [1] : decades > 0.9 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
  const rounded = (v) => +v.toPrecision(12); // 10 ** -4 is not 1e-4
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) found.push(...factors.map((f) => rounded(f * 10 ** e)));
  let shown = found.filter((v) => v >= low && v <= high);
  if (shown.length < 3) { // within so little, they are those of a linear axis
    const step = [1, 2, 5, 10].find((f) => f * unit >= rough) * unit, first = Math.ceil(low / step - 1e-9);
    shown = Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => rounded((first + i) * step));
  }
  return shown.filter((_, i) => i % Math.ceil(shown.length / (count + 1)) === 0);
}

// A range with some room at both ends. Values that differ by less than rounding does get the room of a single one.
function padded([low, high], share, log) {
  const flat = high - low <= 1e-9 * Math.abs(high);
  if (log) {
    const factor = flat ? 1.1 : (high / low) ** share;
    return [low / factor, high * factor];
  }
  const pad = share * (flat ? Math.abs(high) || 1 : high - low);
  return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
}

class Chart {
  constructor(host, options) {
    Object.assign(this, { zoom: null, cursor: null, pointed: false, plot: null, dots: [] }, options);
    this.figure = element("figure", this.wide ? { class: "whole" } : {}, host);
    const head = element("div", { class: "head" }, this.figure);
    element("h3", {}, head, this.title);
    const tools = element("div", { class: "tools" }, head);
    const tool = (text, name, act) => {
      const button = element("button", { type: "button", "aria-label": `${name}: ${this.title}`, title: name }, tools, text);
      button.addEventListener("click", act);
      return button;
    };
    tool("CSV", "values as CSV", () => this.saveValues());
    tool("PNG", "picture", () => this.savePicture());
    tool("−", "zoom out", () => this.scaleX(2));
    tool("+", "zoom in", () => this.scaleX(0.5));
    this.back = tool("whole range", "whole range", () => this.show(null));
    this.frame = element("div", { class: "frame", tabindex: 0, role: "img", "aria-describedby": "help" }, this.figure);
    this.tip = element("div", { class: "tip", hidden: "", role: "status" }, this.figure);
    if (this.note) element("figcaption", {}, this.figure, this.note);
    this.cropped = element("figcaption", { class: "cropped", hidden: "" }, this.figure);
    for (const name of ["pointerdown", "pointermove"]) this.frame.addEventListener(name, (event) => this.touch(event));
    this.frame.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.frame.addEventListener("keydown", (event) => this.key(event));
    this.frame.addEventListener("blur", () => this.moveCursor(null));
    charts.push(this);
  }

  draw() {
    this.plot?.destroy();
    this.plot = null;
    this.frame.replaceChildren();
    [this.logX, this.logY] = [this.ownX || view.logX, view.logY];
    const usable = ([x, y]) => (!this.logX || x > 0) && (!this.logY || y > 0);
    const lines = this.lines().map((line) => ({ ...line, points: line.points.filter(usable) }));
    this.drawn = lines.filter((line) => line.points.length || line.lost);
    this.thick = this.drawn.filter((line) => !line.thin);
    this.frame.setAttribute("aria-label", `${this.title}: ${this.thick.map((line) => line.label).join(", ")}`);
    this.back.hidden = !this.zoom;
    this.range = this.zoom ?? this.whole();
    this.sayCropped();
    if (this.range) {
      const columns = this.drawn.map(({ points }) => [0, 1].map((axis) => points.map((p) => p[axis])));
      this.plot = new uPlot(this.options(), [null, ...columns], this.frame);
    } else element("p", { class: "soft" }, this.frame, "nothing to show");
    this.showCursor();
  }

  options() {
    const width = Math.max(280, this.figure.clientWidth || 560);
    const height = Math.round(clamp(width * (this.wide ? 0.42 : 0.6), 250, this.wide ? 440 : 340));
    this.named = width >= 460 && labels.length > 1;
    const room = this.named ? Math.max(...this.thick.map((line) => nameWidth(line.label))) : 0;
    const soft = variable("--soft");
    const axis = (scale, log, count) => ({ scale, stroke: soft, grid: { stroke: variable("--rule"), width: 1 }, gap: 7,
      font: FONT, labelFont: FONT, ticks: { show: false }, values: (_, ticks) => tickNames(ticks),
      ...(log && { splits: (_, side, low, high) => logTicks(low, high, count), filter: (_, ticks) => ticks }) });
    const series = this.drawn.map(({ label, thin }) => ({ facets: [{ scale: "x" }, { scale: "y" }], paths: uPlot.paths.linear(),
      points: { show: false }, stroke: color(label), width: thin ? 1 : 2.25, dash: thin ? [] : dash(label),
      alpha: this.alpha(label, thin) }));
    return {
      mode: 2, width, height, series: [null, ...series], legend: { show: false }, padding: [10, 16 + room, 0, 0],
      scales: { x: { time: false, distr: this.logX ? 3 : 1, range: () => this.range.x },
        y: { distr: this.logY ? 3 : 1, range: () => this.range.y } },
      axes: [
        { ...axis("x", this.logX, Math.max(3, Math.floor(width / 110))), label: this.xName ?? X_AXES[view.x], space: 80, size: 24,
          labelSize: 18, border: { show: true, stroke: soft, width: 1 } },
        { ...axis("y", this.logY, 6), space: 45, size: 58 },
      ],
      cursor: { y: false, points: { show: false }, drag: { x: true, y: true, uni: 8, dist: 8, setScale: false },
        bind: { dblclick: () => () => this.show(null) } },
      hooks: {
        drawSeries: [(plot, i) => this.drawMarks(plot, this.drawn[i - 1])],
        draw: [(plot) => this.drawNames(plot)],
        setCursor: [({ cursor: { left } }) => this.moveCursor(left < 0 ? null : this.plot.posToVal(left, "x"), true)],
        setSelect: [({ select }) => this.selected(select)],
      },
    };
  }
  // Whether something lies beyond the axes.
  sayCropped() {
    const { x, y } = this.range ?? { x: [0, 0], y: [0, 0] }, inside = (v, [low, high]) => v >= low - 1e-12 && v <= high + 1e-12;
    const own = this.drawn.filter((line) => !line.reference).flatMap((line) => line.points);
    const beyond = own.filter((p) => !inside(p[0], x) || !inside(p[1], y));
    this.cropped.hidden = !this.range || !beyond.length;
    const values = beyond.length ? ` (up to ${short(Math.max(...beyond.map((p) => p[1])))})` : "";
    this.cropped.textContent = `Cropped axes: ${beyond.length} of ${own.length} points${values} lie beyond them.`;
  }
  // All drawn points; those of seeds are told by `line`.
  saveValues() {
    const rows = this.drawn.flatMap(({ label, points, thin, reference }) =>
      points.map((p) => [label, reference ? "reference" : thin ? "seed" : "mean", p[0], p[1]]));
    const x = this.xName ?? X_AXES[view.x];
    download(`${slug(this.title)}.csv`, csv([["optimizer", "line", x, this.title], ...rows]), "text/csv");
  }
  // The chart with its title and names on paper, at the resolution of the screen.
  savePicture() {
    if (!this.plot) return;
    const from = this.plot.ctx.canvas, ratio = uPlot.pxRatio, line = 20 * ratio, names = this.thick.map(({ label }) => label);
    const canvas = element("canvas", { width: from.width, height: from.height + line * (2 + names.length) }, document.body);
    const ctx = canvas.getContext("2d");
    canvas.remove();
    ctx.fillStyle = variable("--paper");
    ctx.fillRect(0, 0, canvas.width, canvas.height);
    ctx.drawImage(from, 0, 1.5 * line);
    ctx.fillStyle = variable("--ink");
    ctx.font = `600 ${FONT.replace("12px", `${13 * ratio}px`)}`;
    ctx.fillText(this.title, 8 * ratio, line);
    names.forEach((label, i) => {
      ctx.fillStyle = color(label);
      ctx.fillText(`${label}`, 8 * ratio, from.height + line * (i + 2.2));
    });
    canvas.toBlob((blob) => download(`${slug(this.title)}.png`, blob));
  }
  alpha(label, thin = false) { return view.focus && view.focus !== label ? 0.12 : thin ? 0.35 : 1; }

  // Where a chart begins: all x; of losses the part after the first fifth, since the first steps would flatten the rest.
  whole() {
    const own = this.drawn.filter((line) => !line.reference), sound = own.filter((line) => !line.diverged);
    const points = (sound.length ? sound : own).flatMap((line) => line.points);
    if (!points.length) return null;
    let [x0, x1] = extremes([...points.map((p) => p[0]), ...this.drawn.flatMap((line) => line.lost ?? [])]);
    if (!this.logX) x0 = 0;
    const late = this.tail ? points.filter((p) => p[0] >= x0 + 0.2 * (x1 - x0)) : points;
    const margin = Math.max(1.15, (x1 / x0) ** 0.03); // room for the hollow mark of the chosen one
    const x = this.ownX ? [x0 / margin, x1 * margin] : [x0, padded([x0, x1], 0.012, this.logX)[1]]; // and for the last mark
    return { x, y: padded(extremes(late.map((p) => p[1])), 0.05, this.logY) };
  }

  // Marks on a line, and crosses where it diverged. In hooks of uPlot, places are pixels of the device.
  drawMarks({ ctx, bbox, valToPos }, { label, points, thin, marks, chosen, diverged, lost = [] }) {
    const ratio = uPlot.pxRatio, last = points.length - 1;
    const place = ([x, y]) => [valToPos(x, "x", true), valToPos(y, "y", true)];
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.globalAlpha = this.alpha(label, thin);
    ctx.strokeStyle = color(label);
    ctx.setLineDash([]);
    ctx.lineWidth = 3 * ratio;
    const every = this.ownX ? 1 : Math.ceil(points.length / 12); // marks tell lines apart; more of them would hide the line
    for (const [i, point] of marks ? points.entries() : []) {
      const hollow = point[0] === chosen;
      if (!hollow && (last - i) % every) continue;
      const path = new Path2D(mark(label)(...place(point), (hollow ? 6 : 3.5) * ratio));
      ctx.fillStyle = hollow ? variable("--paper") : color(label);
      ctx.fill(path);
      if (hollow) ctx.stroke(path);
    }
    ctx.lineWidth = 2.5 * ratio;
    const crosses = lost.map((x) => [valToPos(x, "x", true), bbox.top + (8 + 13 * Math.max(0, index(label))) * ratio]), r = 4 * ratio;
    if (diverged) crosses.push([place(points[last])[0], Math.max(bbox.top + 8 * ratio, place(points[last])[1])]);
    for (const [x, y] of crosses) ctx.stroke(new Path2D(`M${x - r},${y - r}l${2 * r},${2 * r}m0,${-2 * r}l${-2 * r},${2 * r}`));
    ctx.restore();
  }

  // Names at the right ends of lines, moved apart where they would cover each other.
  drawNames({ ctx, bbox: { left, top, width, height }, valToPos }) {
    if (!this.named) return;
    const ratio = uPlot.pxRatio, [right, bottom] = [left + width, top + height], ends = [];
    for (const { label, points } of this.thick) {
      const end = points.filter((p) => p[0] <= this.range.x[1] * (1 + 1e-9)).pop();
      const y = end ? valToPos(end[1], "y", true) : NaN;
      if (y >= top - 1 && y <= bottom + 1) // a search ends where it ends
        ends.push({ label, y, x: this.ownX ? valToPos(end[0], "x", true) : right });
    }
    ends.sort((a, b) => a.y - b.y);
    const gap = Math.min(14 * ratio, height / Math.max(1, ends.length));
    ends.forEach((end, i) => { end.y = Math.max(end.y, i ? ends[i - 1].y + gap : top + 4 * ratio); });
    ends.reverse().forEach((end, i) => { end.y = Math.min(end.y, i ? ends[i - 1].y - gap : bottom); });
    ctx.save();
    ctx.font = nameFont(ratio);
    [ctx.textAlign, ctx.textBaseline] = ["left", "alphabetic"];
    for (const { label, x, y } of ends) {
      [ctx.fillStyle, ctx.globalAlpha] = [color(label), this.alpha(label)];
      ctx.fillText(nameOf(label), x + 10 * ratio, y + 4 * ratio);
    }
    ctx.restore();
  }

  show(range) {
    this.zoom = range;
    this.draw();
  }
  selected({ left, top, width, height }) {
    const from = (start, size, axis) => [start, start + size].map((p) => this.plot.posToVal(p, axis)).sort((a, b) => a - b);
    if (width < 8) return;
    const flat = height >= this.plot.over.clientHeight; // a horizontal drag zooms x alone
    const zoom = { x: from(left, width, "x"), y: flat ? this.range.y : from(top, height, "y") };
    setTimeout(() => this.show(zoom)); // when uPlot is done with the event
  }
  wheel(event) {
    if (!(event.ctrlKey || event.metaKey) || !this.plot) return; // the wheel alone scrolls the page
    event.preventDefault();
    this.scaleX(1.25 ** Math.sign(event.deltaY));
  }
  // Show `factor` times as much of x, around the cursor or before the end; losses fill the height again.
  scaleX(factor) {
    if (!this.range) return;
    const [to, from] = this.logX ? [Math.log, Math.exp] : [(v) => v, (v) => v];
    const whole = this.whole(), at = clamp(this.cursor ?? Infinity, ...this.range.x);
    const x = this.range.x.map((v) => clamp(from(to(at) + (to(v) - to(at)) * factor), ...whole.x));
    const inside = this.drawn.filter((l) => !l.diverged).flatMap((l) => l.points).filter((p) => p[0] >= x[0] && p[0] <= x[1]);
    if (!inside.length || x[0] === x[1]) return;
    if (x[0] <= whole.x[0] && x[1] >= whole.x[1]) this.show(null);
    else this.show({ x, y: padded(extremes(inside.map((p) => p[1])), 0.05, this.logY) });
  }

  // A finger moves the cursor; it neither zooms nor keeps the page from scrolling. What it asked for stays.
  touch(event) {
    if (event.pointerType !== "touch" || !this.plot) return;
    const frame = this.plot.over.getBoundingClientRect();
    this.plot.setCursor({ left: clamp(event.clientX - frame.left, 0, frame.width), top: 0 });
  }
  key(event) {
    if (!this.plot || event.altKey || event.ctrlKey || event.metaKey) return;
    const xs = [...new Set(this.thick.flatMap((line) => line.points.map((p) => p[0])))].sort((a, b) => a - b);
    const shown = xs.filter((x) => x >= this.range.x[0] && x <= this.range.x[1]);
    const now = this.cursor ?? shown[shown.length - 1];
    const acts = {
      ArrowRight: () => this.moveCursor(shown.find((x) => x > now) ?? now),
      ArrowLeft: () => this.moveCursor(shown.filter((x) => x < now).pop() ?? now),
      Home: () => this.moveCursor(shown[0] ?? null),
      End: () => this.moveCursor(shown[shown.length - 1] ?? null),
      "+": () => this.scaleX(0.5),
      "-": () => this.scaleX(2),
      Escape: () => { this.moveCursor(null); this.show(null); },
    };
    const act = acts[{ "=": "+", 0: "Escape" }[event.key] ?? event.key];
    if (!act) return;
    act();
    event.preventDefault();
  }

  // The cursor is at the same place in all charts with the same axis; the values are told where it is pointed at.
  moveCursor(value, byPointer = false) {
    for (const chart of charts.filter((c) => c.ownX === this.ownX)) {
      Object.assign(chart, { cursor: value, pointed: chart === this });
      const left = value === null || !chart.plot ? -10 : chart.plot.valToPos(value, "x");
      if (chart !== this || !byPointer) chart.plot?.setCursor({ left, top: 0 }, false);
      chart.showCursor();
    }
  }

  // The point of a line at the cursor: between two points interpolated, of a search the nearest trial; none beyond its ends.
  under({ points }) {
    const place = (p) => this.plot.valToPos(p[0], "x"), x = this.plot.valToPos(this.cursor, "x");
    if (!points.length || x < place(points[0]) - 8 || x > place(points[points.length - 1]) + 8) return null;
    const next = points.findIndex((p) => p[0] >= this.cursor), distance = (p) => Math.abs(place(p) - x);
    if (this.ownX || next < 1) return points.reduce((best, p) => (distance(p) < distance(best) ? p : best));
    const [a, b] = [points[next - 1], points[next]], part = (this.cursor - a[0]) / (b[0] - a[0]);
    return Object.assign(a.map((v, i) => v + part * (b[i] - v)), { interpolated: part > 0 && part < 1 });
  }

  // Dots where lines cross the cursor, and their values.
  showCursor() {
    for (const dot of this.dots) dot.remove();
    this.dots = [];
    this.tip.hidden = true;
    if (!this.plot || this.cursor === null || this.cursor < this.range.x[0] || this.cursor > this.range.x[1]) return;
    const found = this.thick.map(({ label, ...line }) => ({ label, point: this.under(line) })).filter(({ point }) => point);
    found.sort((a, b) => a.point[1] - b.point[1]);
    const { over } = this.plot;
    for (const { label, point } of found) {
      const [left, top] = [this.plot.valToPos(point[0], "x"), this.plot.valToPos(point[1], "y")];
      if (left < -1 || left > over.clientWidth + 1 || top < 0 || top > over.clientHeight) continue;
      this.dots.push(element("i", { class: "dot", style: `left:${left}px;top:${top}px;background:${color(label)}` }, over));
    }
    if (this.pointed && found.length) this.tell(found);
  }
  tell(found) {
    this.tip.hidden = false;
    this.tip.replaceChildren();
    const at = short(this.cursor);
    element("div", { class: "at" }, this.tip, this.xName ? `${this.xName} ${at}` : `${at} ${X_AXES[view.x]}`);
    for (const { label, point } of found) {
      const [x, y, low, high] = point;
      const item = element("div", {}, this.tip), name = element("span", {}, item);
      sample(label, name, 22);
      element("span", {}, name, label);
      const value = element("span", {}, item, this.ownX ? `${y.toFixed(4)} at ${short(x)}` : `${point.interpolated ? "≈ " : ""}${y.toPrecision(5)}`);
      if (low !== undefined && view.seeds) element("small", {}, value, ` ${low.toPrecision(4)}–${high.toPrecision(4)}`);
    }
    const home = this.figure.getBoundingClientRect(), frame = this.plot.over.getBoundingClientRect();
    const x = frame.left - home.left + this.plot.valToPos(this.cursor, "x"), width = this.tip.offsetWidth;
    const wanted = this.plot.valToPos(this.cursor, "x") > frame.width / 2 ? x - 12 - width : x + 12;
    this.tip.style.left = `${clamp(wanted, 0, Math.max(0, home.width - width))}px`;
    this.tip.style.top = `${frame.top - home.top + 4}px`;
  }
}
