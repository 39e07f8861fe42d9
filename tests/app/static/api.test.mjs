// What api.js makes of the service's replies. Its fetch is this file's.
import assert from "node:assert/strict";
import { test } from "node:test";
import { module } from "./page.mjs";

const { ApiError, embed } = await module("api.js");

const REPLY = { data: [{ embedding: "AACAPwAAAAA=" }, { embedding: "AAAAvwAAQD8=" }], model: "m", usage: { total_tokens: 7 } };

function answering(status, body, headers = {}, statusText = "") {
  const asked = [];
  globalThis.fetch = async (url, options) => {
    asked.push({ url, ...options });
    return new Response(typeof body === "string" ? body : JSON.stringify(body), { status, headers, statusText });
  };
  return asked;
}

async function refusal(...answer) {
  answering(...answer);
  const { status, message, param, code, retryAfter } = await embed({}, "", undefined).then(assert.fail, (error) => {
    assert.ok(error instanceof ApiError);
    return error;
  });
  return { status, message, param, code, retryAfter };
}

test("vectors are float32, little-endian, in base64", async () => {
  answering(200, REPLY, { "Server-Timing": "queue;dur=1.5, device;dur=2", "X-Model-Fingerprint": "f00d" });
  const { vectors, model, usage, timings, fingerprint } = await embed({ input: ["a", "b"] }, "sk", undefined);
  assert.deepEqual(vectors, [Float32Array.of(1, 0), Float32Array.of(-0.5, 0.75)]);
  assert.deepEqual([model, usage, timings, fingerprint], ["m", { total_tokens: 7 }, { queue: 1.5, device: 2 }, "f00d"]);
});

test("the request is below the page, with its key in the header alone", async () => {
  const [asked] = [answering(200, REPLY)];
  await embed({ input: ["a"], dimensions: 2 }, "schlüssel", undefined);
  const [{ url, method, headers, body, credentials }] = asked;
  assert.deepEqual([url, method, credentials], ["http://service.example/below/v1/embeddings", "POST", "omit"]);
  assert.deepEqual(JSON.parse(body), { input: ["a"], dimensions: 2, encoding_format: "base64" });
  assert.equal(Buffer.from(headers.Authorization, "latin1").toString("utf8"), "Bearer schlüssel");
  await embed({}, "", undefined);
  assert.ok(!("Authorization" in asked[1].headers));
});

test("a refusal has the service's words", async () => {
  const error = { message: "too long", param: "input[1]", code: "context_length_exceeded" };
  assert.deepEqual(await refusal(400, { error }), { status: 400, ...error, retryAfter: null });
  const busy = await refusal(429, { error: { message: "busy" } }, { "Retry-After": "3" });
  assert.deepEqual([busy.status, busy.param, busy.retryAfter], [429, null, "3"]);
});

test("what another server says is told as far as it goes", async () => {
  assert.equal((await refusal(502, "<html>", {}, "Bad Gateway")).message, "Bad Gateway");
  assert.equal((await refusal(502, "{}")).message, "an error without words, not of this service");
});

test("no reply is status 0, and a request that was cancelled stays so", async () => {
  globalThis.fetch = async () => { throw new TypeError("Failed to fetch"); };
  const { status, message } = await embed({}, "", undefined).then(assert.fail, (error) => error);
  assert.deepEqual([status, message], [0, "No reply: the server cannot be reached."]);
  globalThis.fetch = async () => { throw new DOMException("cancelled", "AbortError"); };
  assert.equal((await embed({}, "", undefined).then(assert.fail, (error) => error)).name, "AbortError");
});
