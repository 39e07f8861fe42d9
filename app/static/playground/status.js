// Polls the state of the service.
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
// Pauses between polls, by state. It is "unknown" behind a proxy that does not pass /health on, which is then polled seldom.
const PAUSES_MS = { ok: 5000, unknown: 15000 };
const SOON_MS = 1000;

// The last known state, and the body of /health.
export const service = { state: null, health: {} };

// Whether a request may succeed. Behind a proxy that does not pass /health on, it may.
export const isReady = () => service.state === "ok" || service.state === "unknown";

let isKnown = false;

// Calls `changed(isFirst)` when the state changes.
export function follow(changed) {
  poll(async () => {
    await ask(changed);
    return PAUSES_MS[service.state] ?? SOON_MS;
  });
}

// Has the next poll ask for the details too, since a service that was restarted between two polls may be another one.
export function askAgain() {
  isKnown = false;
}

// Asks /health/live, which answers while the model loads too; and /health for the details, if the state is new.
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
