// The arithmetic of metrics.js: what changed between two readings of /metrics.
import assert from "node:assert/strict";
import { test } from "node:test";
import { module } from "./page.mjs";

const { History, Reading } = await module("metrics.js");

const text = (life, ones, twos, more) => `
# HELP h A histogram
h_bucket{le="0.1"} ${ones}
h_bucket{le="0.2"} ${ones + twos}
h_bucket{le="+Inf"} ${ones + twos + more}
h_count ${ones + twos + more}
h_sum ${ones * 0.05 + twos * 0.15 + more}
h_created ${life}
c_total{kind="a \\"b\\", c}"} ${ones}
c_total{kind="x"} ${twos}
`;
const near = (found, expected) => assert.ok(Math.abs(found - expected) < 1e-9, `${found} is not ${expected}`);

function watched() {
  const history = new History(120, 5);
  return { history, add: (time, ...rest) => history.add(new Reading(text(...rest), time)) };
}

test("one reading has no rate", () => {
  const { history, add } = watched();
  assert.equal(add(0, 1, 10, 0, 0), false);
  assert.equal(history.rate("h_count"), null);
  assert.equal(history.quantile(0.5, "h"), null);
  assert.equal(new History(120, 5).last, null);
});

test("rates, means and quantiles are of what came between two readings", () => {
  const { history, add } = watched();
  add(0, 1, 10, 0, 0);
  add(2, 1, 20, 10, 0);
  // 10 below 0.1 and 10 from there to 0.2 in two seconds.
  assert.equal(history.rate("h_count"), 10);
  assert.equal(history.rate("c_total", { kind: "x" }), 5);
  near(history.mean("h"), 0.1);
  near(history.quantile(0.5, "h"), 0.1);
  near(history.quantile(0.75, "h"), 0.15);
});

test("of what is beyond the last bound nothing more is known", () => {
  const { history, add } = watched();
  add(2, 1, 20, 10, 0);
  add(4, 1, 20, 10, 100);
  near(history.quantile(0.99, "h"), 0.2);
});

test("without traffic the rate is zero, and there is no mean", () => {
  const { history, add } = watched();
  add(20, 1, 20, 10, 100);
  add(22, 1, 20, 10, 100);
  assert.equal(history.rate("h_count"), 0);
  assert.equal(history.mean("h"), null);
  assert.equal(history.quantile(0.5, "h"), null);
});

test("after a restart there is no rate, and what was counted before it was seen is not known", () => {
  const { history, add } = watched();
  add(0, 1, 10, 0, 0);
  add(22, 1, 20, 10, 100);
  assert.equal(add(23, 2, 30, 30, 100), true);
  assert.equal(history.rate("h_count"), null);
  assert.equal(history.grown("c_total", { kind: "x" }), 10);
  assert.equal(add(24, 2, 31, 30, 100), false);
  assert.equal(history.rate("h_count"), 1);
  assert.equal(history.grown("h_count"), 121);
  assert.deepEqual(history.spread("h"), [[0.1, 11], [0.2, 10], [Infinity, 100]]);
});

test("a counter that has fallen is a restart", () => {
  const { add } = watched();
  add(0, 2, 31, 30, 100);
  assert.equal(add(1, 2, 0, 0, 0), true);
});

test("readings older than the span are forgotten", () => {
  const { history, add } = watched();
  add(0, 1, 10, 0, 0);
  add(100, 1, 30, 0, 0);
  assert.equal(history.grown("h_count"), 20);
  add(121, 1, 40, 0, 0);
  assert.equal(history.grown("h_count"), 10);
});

test("labels and bounds are read as Prometheus writes them", () => {
  const reading = new Reading(text(1, 10, 20, 30), 0);
  assert.deepEqual(reading.labelled("c_total", "kind"), ['a "b", c}', "x"]);
  assert.deepEqual(reading.buckets("h").map(([bound]) => bound), [0.1, 0.2, Infinity]);
  assert.equal(reading.total("c_total"), 30);
  assert.equal(reading.total("c_total", { kind: "y" }), 0);
  assert.equal(reading.has("h"), false);
});
