// Runs a script for k6 in Node.js, where k6 is not to be had: `node k6_shim.mjs SCRIPT ITERATIONS`, with the environment as __ENV.
// Iterations follow each other; options are not carried out but printed, with what the checks came to, as one line of JSON.
// As a module of the script, with the name that it was imported by after a `?`, this file is that part of k6.
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { register } from 'node:module';
import { resolve } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

const state = (globalThis.k6_shim ??= { iteration: 0, checks: {}, counters: {} });
const name = new URL(import.meta.url).search.slice(1);

// k6's requests are synchronous; Node.js has none that are.
function request(method, url, body, { headers = {} } = {}) {
  const sent = Object.entries(headers).flatMap(([key, value]) => ['-H', `${key}: ${value}`]);
  const data = body === null ? [] : ['--data-binary', '@-'];
  const command = ['-sS', '--noproxy', '*', '-X', method, '-w', '\n%{http_code}', ...sent, ...data, url];
  const done = spawnSync('curl', command, { input: body ?? '', encoding: 'utf8', maxBuffer: 1 << 28 });
  const end = done.stdout.lastIndexOf('\n');
  const text = done.stdout.slice(0, end);
  return { status: Number(done.stdout.slice(end + 1)), body: text, json: () => JSON.parse(text) };
}

export default {
  'k6/http': { get: (url, params) => request('GET', url, null, params), post: (url, body, params) => request('POST', url, body, params) },
  'k6/execution': { scenario: { get iterationInTest() { return state.iteration; } } },
}[name];

export function check(value, checks) {
  for (const [title, holds] of Object.entries(checks)) {
    const [passed, failed] = state.checks[title] ?? [0, 0];
    state.checks[title] = holds(value) ? [passed + 1, failed] : [passed, failed + 1];
  }
}

export class SharedArray {
  constructor(_, make) {
    return Object.freeze(make());
  }
}

export class Counter {
  constructor(title) {
    this.title = title;
    state.counters[title] = 0;
  }

  add(value) {
    state.counters[this.title] += value;
  }
}

if (!name) {
  const script = resolve(process.argv[2]);
  const hooks = `
    export const resolve = (name, context, next) => /^k6(\\/|$)/.test(name)
      ? { url: ${JSON.stringify(import.meta.url)} + '?' + name, shortCircuit: true } : next(name, context);
    export const load = (url, context, next) => next(url, { ...context, format: url.startsWith('file:') ? 'module' : context.format });`;
  register(`data:text/javascript,${encodeURIComponent(hooks)}`);
  globalThis.__ENV = process.env;
  globalThis.open = (path) => readFileSync(resolve(fileURLToPath(new URL('.', pathToFileURL(script))), path), 'utf8');
  const { default: iterate, options } = await import(pathToFileURL(script));
  for (; state.iteration < Number(process.argv[3]); state.iteration += 1) {
    iterate();
  }
  console.log(JSON.stringify({ options, checks: state.checks, counters: state.counters }));
}
