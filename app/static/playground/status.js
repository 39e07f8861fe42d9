// What state the service is in, asked again and again.
import { byId } from "../shared/dom.js";
import { get } from "./api.js";
import { integer } from "./numbers.js";
import { poll } from "./poll.js";

const WORDS = {
  ok: "Ready",
  loading: "Loading the model",
  draining: "Stopping",
  failed: "The device has failed",
  unreachable: "Unreachable",
  unknown: "State not shown here",
};
// Until it is asked again. A proxy that closes the state is asked seldom.
const PAUSES_MS = { ok: 5000, unknown: 15000 };
const SOON_MS = 1000;

// The last that is known: `state`, and /health's body.
export const service = { state: null, health: {} };

// Whether a request has a chance. Where a proxy closes /health, it may.
export const isReady = () => service.state === "ok" || service.state === "unknown";

let isKnown = false;

// Calls `changed(isFirst)` when there is news.
export function follow(changed) {
  poll(async () => {
    await ask(changed);
    return PAUSES_MS[service.state] ?? SOON_MS;
  });
}

// A service that has come back as quickly as that may be another one: with the next state its details are asked for too.
export function askAgain() {
  isKnown = false;
}

// /health/live is 200 while the model loads; the rest is asked for when that says something new.
async function ask(changed) {
  const state = await liveState();
  const isFirst = service.state === null;
  if (isKnown && state === service.state) return;
  isKnown = true;
  const health = state === "unreachable" || state === "unknown" ? null : await details();
  service.state = state;
  service.health = health ?? service.health;
  show();
  changed(isFirst);
}

async function liveState() {
  try {
    const response = await get("/health/live", AbortSignal.timeout(5000));
    const body = await response.json().catch(() => null);
    return body?.status in WORDS ? body.status : "unknown";
  } catch {
    return "unreachable";
  }
}

async function details() {
  try {
    return await (await get("/health", AbortSignal.timeout(5000))).json();
  } catch {
    return null;
  }
}

function show() {
  const { state, health } = service;
  byId("state").textContent = WORDS[state];
  byId("state").dataset.state = state;
  if (health.model) {
    byId("model").textContent = health.model;
    document.title = `${health.model}: playground`;
  }
  const facts = [
    health.device && `${health.device}, ${health.dtype}`,
    health.embedding_dimension && `${integer(health.embedding_dimension)} components`,
    health.fingerprint && `fingerprint ${health.fingerprint}`,
    health.version && `version ${health.version}`,
  ];
  byId("facts").textContent = facts.filter(Boolean).join(" · ");
}
