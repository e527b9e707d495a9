"use strict";
// What is on the page: lines of runs, searches and references, tables that answer, files to take away.
const results = JSON.parse(document.getElementById("results").textContent);
const labels = results.optimizers.map((row) => row.label);
const X_AXES = { tokens: "tokens", step: "optimizer steps", seconds: "seconds in training steps", flops: "model FLOPs" };
const view = { x: "tokens", logX: false, logY: false, smooth: 0.6, seeds: true, hidden: new Set(), focus: null };
const charts = [];

const index = (label) => labels.indexOf(label);
// An optimizer's color, dashes and mark follow from its name; a reference of other people has none of them.
const REFERENCE = { color: null, dash: 1, mark: 0 };
const LOOKS = new Map(Object.entries(results.looks));
const look = (label) => LOOKS.get(label) ?? REFERENCE;
const paint = (label) => (look(label).color === null ? "--soft" : `--c${look(label).color}`);
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name); // a canvas knows no var()
const color = (label) => variable(paint(label));
const other = (label) => results.references.findIndex((reference) => reference.label === label);
const dash = (label) => (LOOKS.has(label) ? DASHES[look(label).dash] : [[2, 4], [8, 3], [1, 6], [5, 2, 1, 2]][other(label) % 4]);
const mark = (label) => MARKS[look(label).mark];

// Exponential moving average whose start is not pulled towards 0; weight 0 leaves the points alone.
function smoothed(points, weight) {
  let sum = 0, norm = 0;
  return points.map(([x, y]) => {
    sum = weight * sum + (1 - weight) * y;
    norm = weight * norm + (1 - weight);
    return [x, sum / norm];
  });
}

// The steps of a run at which a quantity was logged, with points (x, y).
function pointsOf(run, kind, quantity) {
  const table = run[kind], ys = table[quantity] ?? [];
  let xs = table[view.x] ?? [];
  if (view.x === "flops") xs = run.flops_per_token ? table.tokens.map((t) => t * run.flops_per_token) : [];
  const kept = xs.map((_, i) => i).filter((i) => xs[i] !== null && ys[i] !== null && ys[i] !== undefined);
  const points = smoothed(kept.map((i) => [xs[i], ys[i]]), kind === "training" ? view.smooth : 0);
  return { run, points, steps: kept.map((i) => table.step[i]) };
}

// Over the steps that all seeds have: mean x, mean y, smallest and largest y.
function meanLine(parts) {
  const maps = parts.map(({ steps, points }) => new Map(steps.map((s, i) => [s, points[i]])));
  return parts[0].steps.filter((s) => maps.every((m) => m.has(s))).map((s) => {
    const at = maps.map((m) => m.get(s)), ys = at.map((p) => p[1]);
    return [mean(at.map((p) => p[0])), mean(ys), ...extremes(ys)];
  });
}

// Lines of one logged quantity: each seed thin, the mean of an optimizer's seeds thick. A diverged run is no part of a mean.
function runLines(kind, quantity) {
  const thin = [], thick = [];
  for (const label of labels.filter((l) => !view.hidden.has(l))) {
    const all = results.runs.filter((run) => run.label === label).map((run) => pointsOf(run, kind, quantity));
    const logged = all.filter(({ points }) => points.length), sound = logged.filter(({ run }) => run.status !== "diverged");
    for (const { run, points } of logged) {
      const diverged = run.status === "diverged";
      if (diverged || (view.seeds && sound.length > 1)) thin.push({ label, points, thin: true, diverged });
    }
    const points = sound.length > 1 ? meanLine(sound) : sound[0]?.points;
    if (points) thick.push({ label, points, marks: kind === "validation" });
  }
  return [...thin, ...thick]; // means lie above seeds
}

// Runs of other people: over the same axis, and a loss without a curve as a level. The chart does not stretch for them.
function referenceLines() {
  return results.references.filter(({ label, x }) => !view.hidden.has(label) && (x === null || x === view.x)).map((reference) => {
    const ends = results.runs.flatMap((run) => pointsOf(run, "validation", "val_loss").points.map((p) => p[0]));
    const points = reference.x === null ? extremes(ends).map((x) => [x, reference.points[0][1]]) : reference.points;
    return { label: reference.label, points, reference: true };
  });
}

function seedsOfSearch() {
  const seeds = Math.max(...results.optimizers.map((row) => row.search?.seeds ?? 1));
  return seeds > 1 ? `The mean of ${seeds} seeds.` : "One seed.";
}

function searchLines() {
  return results.optimizers.filter((row) => row.search?.lr.length && !view.hidden.has(row.label)).map((row) => ({
    label: row.label,
    points: row.search.lr.filter((p) => p.loss !== null).map((p) => [p.value, p.loss]),
    lost: row.search.lr.filter((p) => p.loss === null).map((p) => p.value),
    chosen: row.search.chosen_lr ?? row.lr,
    marks: true,
  }));
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

// What a run needs to come down to the loss, within the tokens that the comparison goes to.
function needed({ tokens, val_loss: losses, ...others }, key, target) {
  const kept = tokens.filter((t) => t <= results.compared_at_tokens).length, [before, after] = [tokens[kept - 1], tokens[kept]];
  const part = (results.compared_at_tokens - before) / (after - before); // of the way to the first evaluation after it
  const cut = (ys) => [...ys.slice(0, kept), ...(part > 0 ? [ys[kept - 1] + part * (ys[kept] - ys[kept - 1])] : [])];
  return crossing(cut({ tokens, ...others }[key]), cut(losses), target);
}

// The table of what each optimizer needs to come down to the loss that the reader asks for, the fewest tokens first.
function retarget(target) {
  const needs = new Map();
  for (const cell of document.querySelectorAll("td[data-cost]")) {
    const [which, key] = cell.dataset.cost.split(" ");
    const runs = results.runs.filter((r) => r.label === labels[+which] && r.status !== "diverged" && r.validation.step.length);
    const found = runs.map((run) => needed(run.validation, key, target)).filter((x) => x !== null);
    const bound = runs.some((run) => run.validation.val_loss[0] <= target) ? "≤ " : "≈ "; // there already at the first evaluation
    const maximumFractionDigits = key !== "seconds" ? 0 : mean(found) < 10 ? 2 : 1;
    const some = key === "tokens" && found.length < runs.length ? ` (${found.length} of ${runs.length} runs)` : "";
    cell.textContent = found.length ? bound + mean(found).toLocaleString("en-US", { maximumFractionDigits }) + some : "never";
    if (key === "tokens") needs.set(cell.parentElement, found.length ? mean(found) : Infinity);
  }
  for (const row of [...needs.keys()].sort((a, b) => needs.get(a) - needs.get(b))) row.parentElement.append(row);
}

function control(id, event, apply, reset) {
  const node = document.getElementById(id);
  node.addEventListener(event, () => { apply(node); redraw(reset); });
}

// A file to take away, made here.
function download(name, content, type = "text/plain") {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  element("a", { href: url, download: name }, document.body).click();
  document.body.lastElementChild.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// A cell of a CSV. A text that a spreadsheet would take for a formula gets an apostrophe before it.
function cell(value) {
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) && Number.isNaN(+value) ? `'${value}` : String(value ?? "");
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
const csv = (rows) => rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
const slug = (text) => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60);

// Each table as a CSV; where it is wider than the page, that it scrolls.
function tables() {
  for (const host of document.querySelectorAll(".wide")) {
    const name = slug(host.dataset.name), hint = element("p", { class: "hint", hidden: "" }, host, "more columns: scroll →");
    const foot = element("p", { class: "foot" }, host), button = element("button", { type: "button" }, foot, "CSV");
    host.before(hint);
    host.after(foot);
    button.setAttribute("aria-label", `CSV: ${host.dataset.name}`);
    button.addEventListener("click", () => {
      const lines = [...host.querySelectorAll("tr")].map((tr) => [...tr.cells].filter((c) => !c.classList.contains("plot")));
      download(`${name}.csv`, csv(lines.map((tr) => tr.map((c) => c.textContent.trim().replace(/\s+/g, " ").replaceAll("−", "-")))), "text/csv");
    });
    const show = () => {
      const hidden = host.scrollWidth - host.clientWidth;
      hint.hidden = hidden < 2;
      hint.textContent = host.scrollLeft > hidden - 2 ? "← scroll back" : "more columns: scroll →";
      host.classList.toggle("more", hidden >= 2 && host.scrollLeft <= hidden - 2);
    };
    host.addEventListener("scroll", show, { passive: true });
    new ResizeObserver(show).observe(host);
    show();
  }
}

function legend(host) {
  for (const label of [...labels, ...results.references.map((r) => r.label)]) {
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
  add("Validation loss, nats per token", "validation", "val_loss", { tail: true, wide: true,
    lines: () => [...referenceLines(), ...runLines("validation", "val_loss")] });
  const others = new Set(results.runs.flatMap((run) => Object.keys(run.validation)));
  for (const key of others) if (/\//.test(key)) add(key, "validation", key);
  add("Training loss, nats per token", "training", "loss", { tail: true });
  add("Norm of the gradient, before clipping", "training", "grad_norm", { tail: true });
  add("RMS change of a hidden weight in one step", "training", "update_rms");
  add("The same relative to the RMS of the weight", "training", "update_ratio");
  const host = document.getElementById("sensitivity");
  if (host) new Chart(host, { title: "Validation loss by learning rate", lines: searchLines, ownX: true, wide: true,
    xName: "learning rate (optimizer.lr)", note: `${seedsOfSearch()} Hollow: chosen; × at the top: diverged.` });
  legend(document.querySelector(".legend"));
  tables();
  control("x-axis", "change", (node) => { view.x = node.value; }, true);
  control("log-x", "change", (node) => { view.logX = node.checked; }, true);
  control("log-y", "change", (node) => { view.logY = node.checked; }, true);
  control("seeds", "change", (node) => { view.seeds = node.checked; }, false);
  control("smooth", "input", (node) => {
    view.smooth = +node.value;
    node.nextElementSibling.textContent = view.smooth.toFixed(2);
  }, false);
  document.getElementById("reset").addEventListener("click", () => redraw(true));
  const target = document.getElementById("target");
  if (target) target.addEventListener("input", () => { if (target.value > 0) retarget(+target.value); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
  new ResizeObserver(() => redraw()).observe(curves);
  redraw();
}
start();
