// Small charts: lines over time in SVG, and bars. They do not know what they show.
import { el, svg } from "../shared/dom.js";

const WIDTH = 240;
const HEIGHT = 64;
// Points further apart than this are not joined, since nothing is known of the time between them.
const GAP_S = 3;

// Lines over the last `span` seconds. `series` is [{name, values: (point) => number or null}]; `format` writes a number.
export class LineChart {
  #span;
  #series;
  #format;
  #least;
  #lines;
  #area;
  #cursor;
  #values;
  #top;
  #plot;

  // `least` is the smallest top of the scale. `pointed(seconds)` is called when the pointer moves, with seconds before now, and
  // with null when it leaves.
  constructor({ name, unit = "", series, format, least, span, pointed }) {
    Object.assign(this, { name });
    this.#span = span;
    this.#series = series;
    this.#format = format;
    this.#least = least;
    this.#area = svg("path", { class: "area" });
    this.#lines = series.map((_, index) => svg("path", { class: `line line-${index}` }));
    this.#cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
    this.#values = series.map(() => el("b", {}));
    this.#top = el("span", {});
    this.#plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      svg("path", { class: "grid", d: `M0 .5H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}` }),
      this.#area, this.#lines, this.#cursor, svg("path", { class: "axis", d: `M0 ${HEIGHT - 0.5}H${WIDTH}` }));
    const place = (event) => {
      const { left, width } = this.#plot.getBoundingClientRect();
      pointed((1 - (event.clientX - left) / width) * span);
    };
    this.#plot.addEventListener("pointermove", place);
    this.#plot.addEventListener("pointerleave", () => pointed(null));
    const legend = series.map((one, index) => el("span", { class: "entry" },
      series.length > 1 ? [el("span", { class: `swatch line-${index}` }), `${one.name} `] : null, this.#values[index]));
    this.element = el("figure", { class: "tile" },
      caption(name, unit, legend),
      el("div", { class: "plot" }, el("div", { class: "ticks", "aria-hidden": "true" }, this.#top, el("span", {}, "0")), this.#plot),
      el("div", { class: "times", "aria-hidden": "true" }, el("span", {}, `${span / 60} min ago`), el("span", {}, "now")));
  }

  // Draws points, each with a time. If `at` is a point, its numbers are shown instead of the last ones.
  draw(points, now, at) {
    const x = ({ time }) => WIDTH * (1 - (now - time) / this.#span);
    const values = this.#series.map((one) => points.map((point) => one.values(point)));
    const top = roundUp(Math.max(this.#least, ...values.flat().filter((value) => value !== null)));
    const y = (value) => HEIGHT - 1 - (value / top) * (HEIGHT - 4);
    const runs = values.map((row) => runsOf(points, row));
    runs.forEach((row, index) => this.#lines[index].setAttribute("d", row.map((run) => lineThrough(run, x, y)).join("")));
    this.#area.setAttribute("d", runs[0].map((run) =>
      `${lineThrough(run, x, y)}L${x(run.at(-1).point)} ${HEIGHT}L${x(run[0].point)} ${HEIGHT}Z`).join(""));
    this.#top.textContent = this.#format(top);
    const shown = at ?? points.at(-1);
    this.#values.forEach((value, index) => { value.textContent = this.#format(shown ? this.#series[index].values(shown) : null); });
    this.#cursor.setAttribute("visibility", at ? "visible" : "hidden");
    if (at) ["x1", "x2"].forEach((side) => this.#cursor.setAttribute(side, x(at)));
    const words = this.#series.map((one, index) => `${one.name} ${this.#values[index].textContent}`.trim()).join(", ");
    this.#plot.setAttribute("aria-label", `${this.name} over the last ${this.#span / 60} minutes, now ${words}`);
  }
}

function caption(name, unit, values) {
  return el("figcaption", {},
    el("span", { class: "name" }, name, unit && el("span", { class: "unit" }, ` ${unit}`)),
    el("span", { class: "now" }, values));
}

// Splits points into runs without a gap, each of {point, value}.
function runsOf(points, values) {
  const runs = [];
  let last = null;
  points.forEach((point, index) => {
    if (values[index] !== null) {
      if (last === null || point.time - last.time > GAP_S) runs.push([]);
      runs.at(-1).push({ point, value: values[index] });
    }
    last = values[index] === null ? null : point;
  });
  return runs;
}

// The path of a run. A single point is a line of no length, which its round ends make a dot.
function lineThrough(run, x, y) {
  const path = run.map(({ point, value }) => `${x(point).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
  return `M${path}${run.length === 1 ? "h0" : ""}`;
}

// The next number up that is 1, 2 or 5 times a power of ten.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * (1 - 1e-9));
}

// A chart of bars, drawn from rows of [label, title, value]; the label is below the bar.
export class BarChart {
  #bars;
  #note;

  constructor({ name, unit = "" }) {
    Object.assign(this, { name });
    this.#bars = el("ol", { class: "bars" });
    this.#note = el("b", {});
    this.element = el("figure", { class: "tile wide" }, caption(name, unit, this.#note), this.#bars);
  }

  draw(rows, note) {
    const most = Math.max(1, ...rows.map(([, , value]) => value));
    this.#note.textContent = note;
    this.#bars.replaceChildren(...rows.map(([label, title, value]) => {
      const bar = el("span", { class: "fill" });
      bar.style.setProperty("height", `${value ? Math.max(4, (100 * value) / most) : 0}%`);
      return el("li", { title }, el("span", { class: "column" }, bar), el("span", { class: "foot", "aria-hidden": "true" }, label),
        el("span", { class: "unseen" }, title));
    }));
  }
}
