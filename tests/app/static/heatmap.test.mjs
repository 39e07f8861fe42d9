// The matrix of heatmap.js: its cosines, its extremes, and colours that every number can be read on.
import assert from "node:assert/strict";
import { test } from "node:test";
import { module } from "./page.mjs";

const { cosines, extremes, heatmap } = await module("heatmap.js");

test("cosines of all pairs", () => {
  assert.deepEqual(cosines([[1, 0], [0, 1], [0.6, 0.8]]), [[1, 0, 0.6], [0, 1, 0.8], [0.6, 0.8, 1]]);
});

test("the nearest and the farthest pair of different inputs", () => {
  const matrix = [[1, 0.2, -0.5], [0.2, 1, 0.9], [-0.5, 0.9, 1]];
  assert.deepEqual(extremes(matrix), { low: { value: -0.5, i: 0, j: 2 }, high: { value: 0.9, i: 1, j: 2 } });
  assert.equal(extremes([[1]]), null);
});

// {ground: [r, g, b], ink: "#000" or "#fff", words} of every cell.
function cells(matrix, stretched) {
  const items = matrix[0].map((_, index) => ({ place: index + 1, text: "x", image: null }));
  const drawn = [...heatmap(matrix, items, stretched, () => {}).all()].filter(({ attributes }) => attributes.role === "gridcell");
  return drawn.map(({ attributes, properties, children }) => ({
    ground: properties["background-color"].match(/\d+/g).map(Number),
    ink: properties.color,
    words: attributes["aria-label"],
    text: children[0],
  }));
}

// As WCAG 2 has it.
function luminance(colour) {
  const [red, green, blue] = colour.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

for (const theme of ["light", "dark"]) {
  test(`every colour is legible in the ${theme} theme`, () => {
    document.documentElement.dataset.theme = theme;
    const values = Array.from({ length: 201 }, (_, index) => index / 100 - 1);
    const drawn = cells([values], false);
    assert.equal(drawn.length, 201);
    for (const { ground, ink, words } of drawn) {
      const [low, high] = [luminance(ground), ink === "#fff" ? 1 : 0].sort((a, b) => a - b);
      assert.ok((high + 0.05) / (low + 0.05) >= 4.5, words);
    }
    assert.ok(new Set(drawn.map(({ ground }) => String(ground))).size > 150);
  });
}

test("stretched colours reach from the least cosine to the greatest", () => {
  document.documentElement.dataset.theme = "light";
  const matrix = [[1, 0.5, 0.6], [0.5, 1, 0.7], [0.6, 0.7, 1]];
  const ends = [[255, 255, 255], [13, 76, 101]];
  const drawn = cells(matrix, true);
  assert.deepEqual([drawn[1].ground, drawn[5].ground, drawn[0].ground], [...ends, ends[1]]);
  assert.deepEqual(cells(matrix, false)[0].ground, ends[1]);
  assert.notDeepEqual(cells(matrix, false)[1].ground, ends[0]);
});

test("a cell tells its inputs and four digits", () => {
  const [, cell] = cells([[1, -0.12345], [-0.12345, 1]], false);
  assert.deepEqual([cell.words, cell.text], ["Inputs 1 and 2: −0.1235", "−0.12"]);
});
