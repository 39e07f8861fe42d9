// The matrix of cosines as a table of coloured cells. Arrow keys move in it.
import { el, isDark } from "../shared/dom.js";
import { cosine } from "./numbers.js";

// Colours in sRGB for each theme: of the cosines 0, 0.5 and 1, and of 0, -0.5 and -1.
const RAMPS = {
  light: {
    up: [[255, 255, 255], [128, 190, 212], [13, 76, 101]],
    down: [[255, 255, 255], [238, 176, 132], [150, 62, 22]],
  },
  dark: {
    up: [[26, 30, 34], [36, 98, 121], [150, 218, 240]],
    down: [[26, 30, 34], [128, 72, 38], [245, 178, 130]],
  },
};

// The cosines of all pairs of unit vectors, as a list of rows.
export function cosines(vectors) {
  return vectors.map((a) => vectors.map((b) => a.reduce((sum, value, index) => sum + value * b[index], 0)));
}

// The least and the greatest cosine of two different inputs: {low, high}, each {value, i, j}; null if there are fewer than two.
export function extremes(matrix) {
  const pairs = matrix.flatMap((row, i) => row.slice(0, i).map((value, j) => ({ value, i: j, j: i })));
  if (!pairs.length) return null;
  const by = (better) => pairs.reduce((best, pair) => (better(pair.value, best.value) ? pair : best));
  return { low: by((a, b) => a < b), high: by((a, b) => a > b) };
}

// The table. `items` are {place, text, image}; `stretched` spreads the colours over the cosines that occur; `shown(i, j)` is
// called when a cell is pointed at or focused.
export function heatmap(matrix, items, stretched, shown) {
  const colours = colouring(matrix, stretched);
  const cells = matrix.map((row, i) => row.map((value, j) => {
    const cell = el("td", {
      role: "gridcell", tabindex: i || j ? "-1" : "0", "aria-label": `Inputs ${items[i].place} and ${items[j].place}: ${cosine(value, 4)}`,
      onfocus: () => mark(i, j), onpointerenter: () => mark(i, j),
    }, cosine(value));
    const { ground, ink } = colours(value);
    cell.style.setProperty("background-color", `rgb(${ground.join(" ")})`);
    cell.style.setProperty("color", ink);
    return cell;
  }));
  const tops = items.map((item) => el("th", { scope: "col", role: "columnheader" }, label(item, false)));
  const sides = items.map((item) => el("th", { scope: "row", role: "rowheader" }, label(item, true)));
  const clear = () => [...tops, ...sides].forEach((head) => head.classList.remove("in-hand"));

  function mark(i, j) {
    clear();
    sides[i].classList.add("in-hand");
    tops[j].classList.add("in-hand");
    shown(i, j);
  }

  function walk(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const i = cells.findIndex((row) => row.includes(event.target));
    if (!step || i < 0) return;
    const next = cells[i + step[0]]?.[cells[i].indexOf(event.target) + step[1]];
    event.preventDefault();
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  const head = el("tr", { role: "row" }, el("td", {}), tops);
  const body = cells.map((row, i) => el("tr", { role: "row" }, sides[i], row));
  return el("div", { class: "scroll" },
    el("table", { role: "grid", "aria-label": "Cosines", onkeydown: walk, onpointerleave: clear },
      el("thead", {}, head), el("tbody", {}, body)));
}

function label({ place, text, image }, isSide) {
  return el("span", { class: "label", title: [image?.name, text].filter(Boolean).join("\n") },
    el("span", { class: "number" }, place),
    image ? thumbnail(image) : null,
    isSide ? el("span", { class: "words" }, text || image.name) : null);
}

// Formats that the browser cannot show, such as TIFF, have no thumbnail.
function thumbnail(image) {
  const picture = el("img", { src: image.url, alt: "", onerror: () => picture.remove() });
  return picture;
}

// A function of a cosine to {ground, ink}. Ink is black or white, whichever has more contrast: 4.5 to 1 or better on any colour.
function colouring(matrix, stretched) {
  const { up, down } = RAMPS[isDark() ? "dark" : "light"];
  const ends = extremes(matrix);
  const spread = stretched && ends && ends.high.value - ends.low.value > 1e-6;
  return (value) => {
    const part = spread ? Math.max(0, (value - ends.low.value) / (ends.high.value - ends.low.value)) : value;
    const ramp = part < 0 ? down : up;
    const place = Math.min(1, Math.abs(part)) * (ramp.length - 1);
    const from = Math.min(Math.floor(place), ramp.length - 2);
    const ground = ramp[from].map((start, index) => Math.round(start + (ramp[from + 1][index] - start) * (place - from)));
    return { ground, ink: luminance(ground) > 0.179 ? "#000" : "#fff" };
  };
}

// The relative luminance, by WCAG 2.
function luminance(colour) {
  const [red, green, blue] = colour.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
