// Shows a reply: the matrix, a summary in words, figures, and where the time went.
import { byId, el } from "../shared/dom.js";
import { cosines, extremes, heatmap } from "./heatmap.js";
import { cosine, integer, plural, seconds } from "./numbers.js";

const STAGES = [["prepare", "preparation"], ["queue", "queue"], ["device", "device"]];

let shown = null; // {items, matrix} of the last reply

export function showResult(items, reply) {
  shown = { items, matrix: cosines(reply.vectors) };
  byId("empty").hidden = true;
  byId("answer").hidden = false;
  byId("scale").hidden = items.length < 3;
  byId("summary").textContent = summary(reply, shown);
  byId("figures").replaceChildren(...figures(reply));
  byId("timing").replaceChildren(...timing(reply));
  draw();
  byId("result").scrollIntoView({ block: "nearest" });
}

// Shows whether the inputs have changed since the reply.
export function markOld(isOld) {
  byId("old").hidden = !isOld;
}

// Draws the matrix, again whenever the scale of colours or the theme changes.
export function draw() {
  if (!shown) return;
  const { items, matrix } = shown;
  const stretched = document.querySelector("[name=scale]:checked").value === "range";
  const pair = byId("pair");
  pair.textContent = "Point at a cell for more digits.";
  byId("matrix").replaceChildren(heatmap(matrix, items, stretched, (i, j) => {
    pair.textContent = `${items[i].place} and ${items[j].place}: ${cosine(matrix[i][j], 4)}`;
  }));
}

function summary(reply, { items, matrix }) {
  const ends = extremes(matrix);
  const size = `${plural(reply.vectors.length, "vector")} of ${plural(reply.vectors[0].length, "component")}.`;
  if (!ends) return `${size} A second input gives it something to be compared with.`;
  const name = ({ value, i, j }) => `${items[i].place} and ${items[j].place}, ${cosine(value)}`;
  if (matrix.length === 2) return `${size} Their cosine is ${cosine(ends.high.value)}.`;
  return `${size} Nearest: ${name(ends.high)}. Farthest: ${name(ends.low)}.`;
}

function figures({ vectors, usage, milliseconds, fingerprint }) {
  const details = usage.prompt_tokens_details;
  const kinds = details ? `${integer(details.text_tokens)} text, ${integer(details.image_tokens)} image` : "";
  return [
    figure("Tokens", integer(usage.total_tokens), kinds),
    figure("Round trip", seconds(milliseconds / 1000), "as this page sees it"),
    figure("Vectors", `${vectors.length} × ${integer(vectors[0].length)}`, "float32, of length 1"),
    figure("Fingerprint", fingerprint ?? "–", "equal ones are comparable", "mono"),
  ];
}

function figure(name, value, note, kind = "") {
  return el("div", {}, el("dt", {}, name), el("dd", { class: `value ${kind}` }, value), el("dd", { class: "hint" }, note));
}

// Where the round trip's time went. Each stage is that of its slowest input, so the stages may add up to more than the whole.
function timing({ timings, milliseconds }) {
  const stages = STAGES.filter(([key]) => key in timings).map(([key, name]) => ({ key, name, ms: timings[key] }));
  if (!stages.length) return [];
  const rest = milliseconds - stages.reduce((sum, { ms }) => sum + ms, 0);
  if (rest > 0) stages.push({ key: "rest", name: "the way, and the rest", ms: rest });
  const parts = stages.map(({ key, ms }) => {
    const part = el("span", { class: `part ${key}` });
    part.style.setProperty("flex-grow", ms);
    return part;
  });
  const words = stages.map(({ key, name, ms }) =>
    el("li", {}, el("span", { class: `swatch ${key}` }), `${name} `, el("b", {}, seconds(ms / 1000))));
  return [el("div", { class: "stages", "aria-hidden": "true" }, parts), el("ul", { class: "legend" }, words)];
}
