// The charts: reads /metrics once a second while the page is visible, and draws the last two minutes.
import { BarChart, LineChart } from "./chart.js";
import { byId, el } from "../shared/dom.js";
import { get } from "./api.js";
import { History, Reading } from "./metrics.js";
import { bytes, count, integer, plural, seconds } from "./numbers.js";
import { poll } from "./poll.js";

const SPAN_S = 120;
const WINDOW_S = 5;
const EVERY_MS = 1000;
// Behind a proxy that does not pass /metrics on, it is read seldom.
const CLOSED_MS = 15000;

const history = new History(SPAN_S, WINDOW_S);
let points = [];
let inHand = null; // the time that is pointed at, in seconds before now

const percent = (value) => (value === null ? "–" : `${Math.round(100 * value)} %`);
const clock = () => performance.now() / 1000;

const CHARTS = [
  { name: "Requests", unit: "a second", least: 1, format: count, series: { "": () => history.rate("embedding_request_seconds_count") } },
  {
    name: "Answered in", least: 0.005, format: seconds,
    series: {
      p50: () => history.quantile(0.5, "embedding_request_seconds"),
      p99: () => history.quantile(0.99, "embedding_request_seconds"),
    },
  },
  {
    name: "Tokens", unit: "a second", least: 10, format: count,
    series: {
      text: () => history.rate("embedding_tokens_total", { kind: "text" }),
      image: () => history.rate("embedding_tokens_total", { kind: "image" }),
    },
  },
  { name: "Queue", unit: "inputs", least: 5, format: count, series: { "": () => history.last.total("embedding_queue_depth") } },
  { name: "Batch size", unit: "inputs, mean", least: 2, format: count, series: { "": () => history.mean("embedding_batch_size") } },
  {
    name: "Device busy", least: 1, format: percent,
    // A batch counts when it ends, so a long one may count for more than the window.
    series: { "": () => busy(history.rate("embedding_batch_seconds_sum")) },
  },
];
const busy = (share) => (share === null ? null : Math.min(1, share));

const charts = CHARTS.map(({ series, ...rest }, place) => new LineChart({
  ...rest,
  span: SPAN_S,
  pointed: (ago) => { inHand = ago; draw(); },
  series: Object.keys(series).map((name, index) => ({ name, values: (point) => point.values[place][index] })),
}));
const sizes = new BarChart({ name: "Batch sizes", unit: "batches of up to so many inputs, last 2 minutes" });

// Starts watching. `restarted()` is called when the counters have begun again.
export function watch(restarted) {
  byId("tiles").append(...charts.map((chart) => chart.element), sizes.element);
  say("", "Asking…");
  poll(() => read(restarted));
}

// Reads and draws once. Returns after how many milliseconds to read again.
async function read(restarted) {
  let response, text;
  try {
    response = await get("/metrics", AbortSignal.timeout(5000));
    text = await response.text();
  } catch {
    say("unreachable", "Unreachable", "No reply. This goes on by itself when there is one.");
    draw();
    return EVERY_MS;
  }
  const reading = new Reading(text, clock());
  if (!response.ok || !reading.has("embedding_ready")) {
    const answer = response.ok ? "something else" : `${response.status} ${response.statusText}`.trim();
    say("closed", "Closed", `/metrics answers ${answer}: a proxy may keep it inside. Everything else on this page works without it.`);
    return CLOSED_MS;
  }
  if (history.add(reading)) {
    note(`Restarted at ${new Date().toLocaleTimeString()}. Counters began again.`);
    restarted();
  }
  points.push({ time: reading.time, values: CHARTS.map(({ series }) => Object.values(series).map((value) => value())) });
  points = points.filter(({ time }) => time >= reading.time - SPAN_S);
  say("ok", "Live");
  draw();
  tables();
  return EVERY_MS;
}

function draw() {
  const now = clock();
  const nearest = (best, point) => (Math.abs(now - point.time - inHand) < Math.abs(now - best.time - inHand) ? point : best);
  const at = inHand === null || !points.length ? null : points.reduce(nearest);
  charts.forEach((chart) => chart.draw(points, now, at));
  if (!history.last) return;
  const rows = history.spread("embedding_batch_size").map(([bound, number], index, all) => {
    const low = index ? all[index - 1][0] + 1 : 1;
    const label = bound === Infinity ? "more" : String(bound);
    const range = bound === Infinity ? `${low} or more` : low >= bound ? label : `${low} to ${bound}`;
    return [label, `${range}: ${integer(number)}`, number];
  });
  sizes.draw(rows, plural(history.grown("embedding_batches_total"), "batch"));
}

function tables() {
  const { last } = history;
  const row = (head, kind, name, labels) => [head, kind, history.grown(name, labels), last.total(name, labels)];
  const statuses = [...new Set(last.labelled("embedding_requests_total", "status"))].sort();
  const reasons = (name) => [...new Set(last.labelled(name, "reason"))].sort();
  const memory = last.total("embedding_device_memory_bytes");
  byId("tables").replaceChildren(
    table("Replies, by status", statuses.map((status) => row(status, `s${status[0]}`, "embedding_requests_total", { status }))),
    table("Inputs", [
      row("of text", "", "embedding_inputs_total", { kind: "text" }),
      row("with an image", "", "embedding_inputs_total", { kind: "image" }),
      row("shared in flight", "", "embedding_shared_total", { how: "in_flight" }),
      row("from the cache", "", "embedding_shared_total", { how: "cached" }),
      ...reasons("embedding_dropped_total").map((reason) => row(`dropped: ${reason}`, "s5", "embedding_dropped_total", { reason })),
    ]),
    ...(memory ? [el("p", { class: "hint" }, `Device memory: ${bytes(memory)}`)] : []));
}

function table(caption, rows) {
  const none = [el("tr", {}, el("td", { class: "quiet", colspan: "3" }, "None yet"))];
  return el("table", {},
    el("thead", {}, el("tr", {},
      el("th", { scope: "col" }, caption), el("th", { scope: "col" }, "2 min"), el("th", { scope: "col" }, "in all"))),
    el("tbody", {}, rows.length ? rows.map(([head, kind, lately, all]) => el("tr", {},
      el("th", { scope: "row", class: kind }, head), el("td", {}, integer(lately)), el("td", {}, integer(all)))) : none));
}

function say(state, words, why = "") {
  const place = byId("watch-state");
  if (place.dataset.state !== state) {
    place.dataset.state = state;
    place.textContent = words;
    if (why) note(why);
    else if (state === "ok" && !byId("watch-note").textContent.startsWith("Restarted")) note("");
  }
  byId("watch").classList.toggle("paused", state !== "ok");
}

function note(words) {
  byId("watch-note").textContent = words;
  byId("watch-note").hidden = !words;
}
