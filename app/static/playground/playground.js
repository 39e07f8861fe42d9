// The playground: puts its parts together, and sends the request.
import { embed, get } from "./api.js";
import { curl, itemOf, python } from "./code.js";
import { byId, copy } from "../shared/dom.js";
import { chooseFor, takeImages } from "./files.js";
import { Inputs, readBase64 } from "./inputs.js";
import { FIELDS, clearProblems, explain, fieldProblem, problem } from "./problems.js";
import { draw, markOld, showResult } from "./result.js";
import { askAgain, follow, isReady, service } from "./status.js";
import { watch } from "./watch.js";

const EXAMPLE = ["A dog plays on the beach at sunset.", "At dusk a puppy runs along the shore.", "The quarterly report is due on Friday."];

let needsKey = true;
let running = null; // the AbortController of the request under way
let answered = null; // the request whose result is shown

const inputs = new Inputs(byId("inputs"), {
  changed: () => { showAge(); showCode(); },
  refused: problem,
  chooseFor,
});

// The request

// The request's fields, null if empty. A number that is no integer is sent as it is: the API says what is wrong.
function fields() {
  const dimensions = byId("dimensions");
  return {
    model: service.health.model ?? null,
    instruction: byId("instruction").value || null,
    dimensions: dimensions.validity.badInput ? dimensions.value : dimensions.value ? Number(dimensions.value) : null,
  };
}

const request = () => ({ items: inputs.filled(), fields: fields() });

function isSame(one, other) {
  return one.fields.instruction === other.fields.instruction && one.fields.dimensions === other.fields.dimensions
    && one.items.length === other.items.length
    && one.items.every(({ text, image }, index) => text === other.items[index].text && image === other.items[index].image);
}

function withoutNulls(object) {
  return Object.fromEntries(Object.entries(object).filter(([, value]) => value !== null));
}

const key = () => byId("key").value.trim();

// Sending

async function send() {
  if (running || !isReady()) return;
  clearProblems(inputs);
  const asked = request();
  const { items } = asked;
  if (!items.length) {
    problem("Write a text or add an image first.");
    inputs.focus();
    return;
  }
  running = new AbortController();
  const stop = showProgress();
  try {
    const input = await Promise.all(items.map(toItem));
    const reply = await embed(withoutNulls({ ...asked.fields, input }), needsKey ? key() : "", running.signal);
    service.health.model ??= reply.model;
    showResult(items, reply);
    answered = asked;
    showAge();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error.status === 401) wantKey(true);
    explain(error, items, inputs);
  } finally {
    running = null;
    stop();
    showReadiness();
  }
}

async function toItem({ row, text, image }) {
  let data = null;
  try {
    data = image && (await readBase64(image.file));
  } catch {
    throw Object.assign(new Error(`${image.name} cannot be read any more. Choose it again.`), { row });
  }
  return itemOf(text, data);
}

// Shows that a request is under way; returns a function that ends it. The seconds have their own element, so that a screen reader
// does not read each of them out.
function showProgress() {
  const started = performance.now();
  const timer = setInterval(() => { byId("elapsed").textContent = `${Math.floor((performance.now() - started) / 1000)} s`; }, 1000);
  byId("progress").textContent = "Embedding…";
  byId("embed").setAttribute("aria-disabled", "true");
  byId("cancel").hidden = false;
  return () => {
    clearInterval(timer);
    byId("progress").textContent = byId("elapsed").textContent = "";
    if (document.activeElement === byId("cancel")) byId("embed").focus();
    byId("cancel").hidden = true;
  };
}

// The rest of the page

function showAge() {
  markOld(answered !== null && !isSame(answered, request()));
}

// Shows whether a request can be sent. The button is only marked as disabled, since a disabled one would lose the focus.
function showReadiness() {
  byId("embed").setAttribute("aria-disabled", String(Boolean(running) || !isReady()));
  const words = { loading: "The model is loading. This page is ready when it is.", unreachable: "The server cannot be reached." };
  if (!running) byId("progress").textContent = words[service.state] ?? "";
  const most = service.health.embedding_dimension;
  if (most) Object.assign(byId("dimensions"), { max: most, placeholder: `1 to ${most}` });
  showCode();
}

function showCode() {
  const { items, fields } = request();
  const shown = { ...fields, model: fields.model ?? "", inputs: items.length ? items : [{ text: EXAMPLE[0], image: null }] };
  const language = document.querySelector("[name=language]:checked").value;
  byId("code").textContent = (language === "curl" ? curl : python)(shown, needsKey);
  const files = items.some(({ image }) => image) ? "It reads the images from the folder that it runs in. " : "";
  const needs = language === "curl" ? "" : "It needs the packages openai and numpy. ";
  byId("code-hint").textContent = files + needs + (needsKey ? "The key is taken from the environment: API_KEY." : "");
}

// Asks the OpenAPI document whether the service needs a key, which may change with a restart.
async function askForKey() {
  try {
    wantKey(Boolean((await (await get("/openapi.json")).json()).components.securitySchemes));
  } catch {
    wantKey(true);
  }
}

function wantKey(wanted) {
  needsKey = wanted;
  byId("key-field").hidden = !wanted;
  showCode();
}

function takeKeys() {
  byId("try").addEventListener("keydown", (event) => {
    const isField = event.target.matches("#key, #instruction, #dimensions");
    if (event.key !== "Enter" || event.isComposing || !(event.ctrlKey || event.metaKey || isField)) return;
    event.preventDefault();
    send();
  });
  if (/Mac|iPhone|iPad/.test(navigator.platform)) document.querySelector(".keys kbd").textContent = "⌘";
}

function start() {
  inputs.addText();
  inputs.addText();
  takeImages(inputs);
  takeKeys();
  byId("embed").addEventListener("click", send);
  byId("cancel").addEventListener("click", () => running?.abort());
  byId("example").addEventListener("click", () => inputs.addTexts(EXAMPLE));
  byId("add-text").addEventListener("click", () => inputs.addText()?.text.focus());
  byId("show-key").addEventListener("click", ({ currentTarget: button }) => {
    const hidden = byId("key").type === "text";
    byId("key").type = hidden ? "password" : "text";
    button.textContent = hidden ? "Show" : "Hide";
    button.setAttribute("aria-pressed", String(!hidden));
  });
  for (const name of FIELDS) {
    byId(name).addEventListener("input", () => {
      fieldProblem(name, "");
      showAge();
      showCode();
    });
  }
  document.querySelectorAll("[name=language]").forEach((choice) => choice.addEventListener("change", showCode));
  document.querySelectorAll("[name=scale]").forEach((choice) => choice.addEventListener("change", draw));
  byId("copy").addEventListener("click", ({ currentTarget }) => copy(byId("code").textContent, currentTarget));
  addEventListener("themechange", draw);
  showReadiness();
  askForKey();
  follow((isFirst) => {
    showReadiness();
    if (!isFirst && service.state !== "unreachable") askForKey();
  });
  watch(askAgain);
}

start();
