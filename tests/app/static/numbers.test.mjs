// Numbers as numbers.js writes them.
import assert from "node:assert/strict";
import { test } from "node:test";
import { module } from "./page.mjs";

const { bytes, cosine, count, integer, plural, seconds } = await module("numbers.js");

function writes(write, rows) {
  for (const [value, text, ...more] of rows) assert.equal(write(value, ...more), text);
}

test("counts", () => {
  writes(count, [
    [null, "–"], [0, "0"], [0.42, "0.42"], [4.2, "4.2"], [4, "4"], [42.4, "42"], [4200, "4,200"], [9999, "9,999"], [42_000, "42K"],
    [1_250_000, "1.3M"],
  ]);
});

test("seconds", () => {
  writes(seconds, [[null, "–"], [0.0008, "0.8 ms"], [0.002, "2 ms"], [0.0424, "42 ms"], [1.34, "1.3 s"], [75, "75 s"]]);
});

test("bytes", () => {
  writes(bytes, [[0, "0 bytes"], [1023, "1023 bytes"], [1536, "1.5 KiB"], [20 * 2 ** 20, "20 MiB"], [3 * 2 ** 30, "3.0 GiB"]]);
});

test("cosines have a true minus, and no negative zero", () => {
  writes(cosine, [[1, "1.00"], [-0.25, "−0.25"], [-0.001, "0.00"], [-0.001, "−0.0010", 4], [0.12345, "0.1235", 4]]);
});

test("plurals", () => {
  assert.deepEqual([plural(1, "batch"), plural(2, "batch"), plural(1, "vector"), plural(1200, "vector"), integer(12_345)],
    ["1 batch", "2 batches", "1 vector", "1,200 vectors", "12,345"]);
});
