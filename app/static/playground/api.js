// Requests to the service. The key goes into their header and nowhere else.
import { BASE } from "../shared/dom.js";

// A reply that is an error, or the lack of a reply (status 0).
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }, retryAfter = null) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }
}

export async function get(path, signal = undefined) {
  return fetch(BASE + path, { credentials: "omit", cache: "no-store", signal });
}

// Sends one request. Returns {vectors, model, usage, milliseconds, timings, fingerprint}; throws ApiError or AbortError.
export async function embed(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${asBytes(key)}`;
  const text = JSON.stringify({ ...body, encoding_format: "base64" });
  const started = performance.now();
  let response, reply;
  try {
    const options = { method: "POST", headers, body: text, credentials: "omit", cache: "no-store", signal };
    response = await fetch(`${BASE}/v1/embeddings`, options);
    reply = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "No reply: the server cannot be reached." });
  }
  const milliseconds = performance.now() - started;
  if (!response.ok) throw new ApiError(response.status, errorIn(reply, response), response.headers.get("Retry-After"));
  const { data, model, usage } = JSON.parse(reply);
  return {
    vectors: data.map((row) => vectorOf(row.embedding)),
    model,
    usage,
    milliseconds,
    timings: timingsIn(response.headers.get("Server-Timing") ?? ""),
    fingerprint: response.headers.get("X-Model-Fingerprint"),
  };
}

// The error in a reply. A proxy in between may answer with a page of its own, which has none.
function errorIn(reply, response) {
  try {
    const { error } = JSON.parse(reply);
    if (error?.message) return error;
  } catch {
    // It is not from the service.
  }
  return { message: response.statusText || "an error without words, not of this service" };
}

// A header takes bytes, one a character; the service reads them as UTF-8.
function asBytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

// Decodes float32, little-endian, from base64, which is exact and half as long as digits.
function vectorOf(base64) {
  const data = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(data.buffer);
  return Float32Array.from({ length: data.length / 4 }, (_, index) => view.getFloat32(4 * index, true));
}

// Parses Server-Timing: "queue;dur=1.5, device;dur=2" -> {queue: 1.5, device: 2}, in milliseconds.
function timingsIn(header) {
  return Object.fromEntries([...header.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, value]) => [name, Number(value)]));
}
