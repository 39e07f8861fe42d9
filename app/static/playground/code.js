// Writes a request as code that runs as it is: the key comes from the environment, images from files of the same names.
import { BASE, quoted } from "../shared/dom.js";

// The API's item for an input; `image` is put in for its image.
export function itemOf(text, image) {
  if (image) return text ? { text, image } : { image };
  // As a string, this would be an image.
  return /^\s*data:image/i.test(text) ? { text } : text;
}

// An image in code: the file that the code reads.
class FileOf {
  constructor(name) {
    this.name = name;
  }
}

// The body of a request: {model, input, instruction, dimensions}, as far as they are set.
function bodyOf({ inputs, ...fields }) {
  const input = inputs.map(({ text, image }) => itemOf(text, image && new FileOf(image.name)));
  return Object.fromEntries(Object.entries({ ...fields, input }).filter(([, value]) => value != null));
}

// Writes a value in the notation that JSON and Python share; `text` writes a string, `file` an image.
function write(value, text, file, margin = "") {
  const inner = `${margin}  `;
  if (value instanceof FileOf) return file(value.name);
  if (typeof value === "string") return text(value);
  if (Array.isArray(value)) return `[\n${value.map((one) => inner + write(one, text, file, inner)).join(",\n")}\n${margin}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([key, one]) => `"${key}": ${write(one, text, file, margin)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

function writeJson(body, text, file) {
  const lines = Object.entries(body).map(([key, value]) => `  "${key}": ${write(value, text, file, "  ")}`);
  return `{\n${lines.join(",\n")}\n}`;
}

// Linux takes arguments of up to 128 KiB; a here-document has no limit.
const MOST_OF_AN_ARGUMENT = 100_000;

// Escapes a string of JSON for a here-document, where $, ` and \ are special; at a prompt ! is too, and JSON can escape it.
function hereString(text) {
  return JSON.stringify(text).replace(/[\\$`]/g, "\\$&").replaceAll("!", "\\u0021");
}

// A curl command. `request` has inputs, as of Inputs.filled(), and model, instruction and dimensions, or null for each.
export function curl(request, needsKey) {
  const body = bodyOf(request);
  const head = [`curl ${quoted(`${BASE}/v1/embeddings`)}`];
  if (needsKey) head.push('-H "Authorization: Bearer $API_KEY"');
  head.push('-H "Content-Type: application/json"');
  if (!request.inputs.some(({ image }) => image)) {
    const data = quoted(writeJson(body, JSON.stringify));
    if (new TextEncoder().encode(data).length <= MOST_OF_AN_ARGUMENT) return [...head, `-d ${data}`].join(" \\\n  ");
  }
  const file = (name) => `"$(base64 < ${quoted(name)} | tr -d '\\n')"`;
  return `${[...head, "-d @- <<JSON"].join(" \\\n  ")}\n${writeJson(body, hereString, file)}\nJSON`;
}

// A Python program. Strings of JSON are written as they are, since they are strings of Python too.
export function python(request, needsKey) {
  const { model, input, dimensions, instruction } = bodyOf(request);
  const hasImages = request.inputs.some(({ image }) => image);
  const file = (name) => `image(${JSON.stringify(name)})`;
  return [
    ...(hasImages ? ["import base64"] : []),
    ...(needsKey ? ["import os"] : []),
    ...(hasImages ? ["from pathlib import Path"] : []),
    ...(hasImages || needsKey ? [""] : []),
    "import numpy as np",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(`${BASE}/v1`)}, api_key=${needsKey ? 'os.environ["API_KEY"]' : '"none"'})`,
    "",
    ...(hasImages ? ["", "def image(name):", "    return base64.b64encode(Path(name).read_bytes()).decode()", "", ""] : []),
    "reply = client.embeddings.create(",
    `    model=${JSON.stringify(model)},`,
    `    input=${write(input, JSON.stringify, file, "    ")},`,
    ...(dimensions == null ? [] : [`    dimensions=${JSON.stringify(dimensions)},`]),
    ...(instruction ? [`    extra_body={"instruction": ${JSON.stringify(instruction)}},`] : []),
    ")",
    "vectors = np.array([row.embedding for row in reply.data])",
    "print((vectors @ vectors.T).round(4))",
  ].join("\n");
}
