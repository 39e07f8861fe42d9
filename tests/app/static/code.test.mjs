// The code that code.js writes, run: bash with a curl, and Python with an openai, that show what they would send.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { module } from "./page.mjs";

const { curl, itemOf, python } = await module("code.js");

const folder = mkdtempSync(join(tmpdir(), "code-"));
after(() => rmSync(folder, { recursive: true }));
// Its arguments, and what it gets on standard input where -d asks for that.
writeFileSync(join(folder, "curl"), `#!/bin/sh
printf '%s\\0' "$@" > arguments
case "$*" in *"-d @-"*) cat > input;; esac
`);
chmodSync(join(folder, "curl"), 0o755);
writeFileSync(join(folder, "openai.py"), `
import json
from types import SimpleNamespace


class OpenAI:
    def __init__(self, **client):
        self.embeddings = self
        self.client = client

    def create(self, **request):
        with open("sent", "w") as file:
            json.dump([self.client, request], file)
        return SimpleNamespace(data=[SimpleNamespace(embedding=[1.0, 0.0])] * len(request["input"]))
`);

function run(command, input) {
  const env = { PATH: `${folder}:${process.env.PATH}`, API_KEY: "sk-key", PYTHONPATH: folder };
  const done = spawnSync(command[0], command.slice(1), { cwd: folder, env, input, encoding: "utf8" });
  assert.equal(done.status, 0, done.stderr);
  return done.stdout;
}

// The command's arguments and its body.
function sentByCurl(code) {
  run(["bash", "-euo", "pipefail", "-s"], code);
  const given = readFileSync(join(folder, "arguments"), "utf8").split("\0").slice(0, -1);
  const data = given.at(-1) === "@-" ? readFileSync(join(folder, "input"), "utf8") : given.at(-1);
  return { given, body: JSON.parse(data) };
}

function sentByPython(code) {
  const shown = run([process.env.PYTHON ?? "python3", "-W", "error", "-c", code]);
  const [client, { extra_body: more, ...body }] = JSON.parse(readFileSync(join(folder, "sent"), "utf8"));
  return { client, shown, body: { ...body, ...more } };
}

// Everything that a shell, Python or JSON could read as its own.
const AWKWARD = "a \"quoted\" 'word', $HOME `id` \\ \\n ${x} !! %s\n第二行 \t🙂 JSON";
const LOOKS_LIKE_AN_IMAGE = "data:image/png;base64,bm90IGFuIGltYWdl";
const FILE = "it's $a `photo`\" (1) é.jpg";
writeFileSync(join(folder, FILE), "not really an image");
const ENCODED = Buffer.from("not really an image").toString("base64");

const request = (inputs, fields = {}) => ({ model: "a/model", inputs, instruction: null, dimensions: null, ...fields });
const textOf = (text) => ({ text, image: null });

test("an item is a string, unless that would be read as an image", () => {
  assert.equal(itemOf("a dog", null), "a dog");
  assert.deepEqual(itemOf(LOOKS_LIKE_AN_IMAGE, null), { text: LOOKS_LIKE_AN_IMAGE });
  assert.deepEqual(itemOf(` ${LOOKS_LIKE_AN_IMAGE.toUpperCase()}`, null), { text: ` ${LOOKS_LIKE_AN_IMAGE.toUpperCase()}` });
  assert.deepEqual(itemOf("", "AAAA"), { image: "AAAA" });
  assert.deepEqual(itemOf("a dog", "AAAA"), { text: "a dog", image: "AAAA" });
});

for (const withImages of [false, true]) {
  const inputs = [textOf(AWKWARD), textOf(LOOKS_LIKE_AN_IMAGE)];
  const items = [AWKWARD, { text: LOOKS_LIKE_AN_IMAGE }];
  if (withImages) {
    inputs.push({ text: "", image: { name: FILE } }, { text: AWKWARD, image: { name: FILE } });
    items.push({ image: ENCODED }, { text: AWKWARD, image: ENCODED });
  }
  const asked = request(inputs, { instruction: `Find it: ${AWKWARD}`, dimensions: 32 });
  const body = { model: "a/model", input: items, instruction: `Find it: ${AWKWARD}`, dimensions: 32 };
  const name = withImages ? "texts and images" : "texts";

  test(`curl sends awkward ${name} as they are`, () => {
    const sent = sentByCurl(curl(asked, true));
    assert.deepEqual(sent.body, body);
    assert.ok(sent.given.includes("http://service.example/below/v1/embeddings"));
    assert.ok(sent.given.includes("Authorization: Bearer sk-key"));
  });

  test(`Python sends awkward ${name} as they are`, () => {
    const { client, body: sent, shown } = sentByPython(python(asked, true));
    assert.deepEqual(sent, body);
    assert.deepEqual(client, { base_url: "http://service.example/below/v1", api_key: "sk-key" });
    assert.match(shown, /^\[\[1\. /);
  });
}

test("what is not set is not sent", () => {
  const asked = request([textOf("a dog")]);
  const body = { model: "a/model", input: ["a dog"] };
  assert.deepEqual(sentByCurl(curl(asked, true)).body, body);
  assert.deepEqual(sentByPython(python(asked, true)).body, body);
});

test("dimensions that are no number are sent as they are written", () => {
  for (const dimensions of [65, 0, 1.5, "1e"]) {
    const asked = request([textOf("a dog")], { dimensions });
    assert.equal(sentByCurl(curl(asked, true)).body.dimensions, dimensions);
    assert.equal(sentByPython(python(asked, true)).body.dimensions, dimensions);
  }
});

test("without keys none is sent", () => {
  const asked = request([textOf("a dog")]);
  assert.ok(!sentByCurl(curl(asked, false)).given.some((word) => word.includes("Authorization")));
  assert.doesNotMatch(python(asked, false), /API_KEY|import os/);
  assert.equal(sentByPython(python(asked, false)).client.api_key, "none");
});

test("curl sends texts that are longer than an argument may be", () => {
  // Linux takes arguments up to 128 KiB; here 64 texts of 3 KiB are sent.
  const texts = Array.from({ length: 64 }, (_, index) => `${index} it's $HOME \\ \n`.repeat(180));
  const code = curl(request(texts.map(textOf), { dimensions: 8 }), true);
  assert.ok(code.length > 1 << 17);
  assert.deepEqual(sentByCurl(code).body, { model: "a/model", dimensions: 8, input: texts });
});
