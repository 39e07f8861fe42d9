// The page of the OpenAPI document. The document's words are only put in as text. The key is kept in its field and nowhere else.
import { BASE, byId, copy, el, quoted } from "../shared/dom.js";

const MAX_SHOWN = 20000; // characters of a reply that is not JSON
let spec;

// Words

// Turns `words` in backticks into code.
function inline(text) {
  return (text ?? "").split("`").map((piece, index) => (index % 2 ? el("code", {}, piece) : piece));
}

// A name that may be broken after a slash, an underscore or a dot.
function breakable(text) {
  return el("code", {}, text.split(/(?<=[/_.])/).flatMap((piece) => [piece, el("wbr")]));
}

function prose(text) {
  return (text ?? "").split(/\n\n+/).filter(Boolean).map((paragraph) => el("p", {}, inline(paragraph)));
}

function table(caption, heads, rows) {
  if (!rows.length) return null;
  return el("div", { class: "scroll" },
    el("table", {},
      el("caption", {}, caption),
      el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, rows.map(([first, ...cells]) =>
        el("tr", {}, el("th", { scope: "row" }, first), cells.map((cell) => el("td", {}, cell)))))));
}

// Schemas

function resolve(node) {
  while (node?.$ref) {
    const keys = node.$ref.slice(2).split("/").map((key) => key.replaceAll("~1", "/").replaceAll("~0", "~"));
    node = keys.reduce((at, key) => at[key], spec);
  }
  return node ?? {};
}

const unique = (list) => [...new Set(list)];
const variants = (schema) => schema.anyOf ?? schema.oneOf ?? [];

// The names of a schema's types. A component of the document with fields or forms of its own goes by its name.
function types(schema) {
  const found = resolve(schema);
  if (schema.$ref && (found.properties || found.allOf || found.anyOf)) return [schema.$ref.split("/").pop()];
  if ("const" in found) return [JSON.stringify(found.const)];
  if (found.enum) return found.enum.map((value) => JSON.stringify(value));
  if (found.type === "array") return [`list of ${types(found.items ?? {}).join(" or ")}`];
  if (found.contentEncoding) return [`${found.contentEncoding} ${found.type}`];
  if (found.type) return [found.type].flat();
  if (variants(found).length) return unique(variants(found).flatMap(types));
  return [];
}

function routes() {
  return Object.entries(spec.paths).flatMap(([path, item]) =>
    Object.entries(item).map(([method, op]) => ({ path, method, op })));
}

// Every field that a reply may have, at any depth: path -> {types, description}.
function fields(schema, path = "", rows = new Map()) {
  const found = resolve(schema);
  for (const part of found.allOf ?? []) {
    for (const [at, row] of fields(part, path)) {
      rows.set(at, { types: row.types, description: row.description ?? rows.get(at)?.description });
    }
  }
  for (const part of variants(found)) {
    for (const [at, row] of fields(part, path)) {
      const known = rows.get(at);
      const kinds = unique([...(known?.types ?? []), ...row.types]);
      rows.set(at, { types: kinds, description: known?.description ?? row.description });
    }
  }
  for (const [name, property] of Object.entries(found.properties ?? {})) {
    const at = path ? `${path}.${name}` : name;
    rows.set(at, { types: types(property), description: property.description ?? resolve(property).description });
    fields(property, at, rows);
  }
  if (found.items) fields(found.items, `${path}[]`, rows);
  return rows;
}

// The schemas with a title that a schema may be.
function forms(schema, found = new Set()) {
  const node = resolve(schema);
  if (node.title) found.add(node);
  else [...(node.allOf ?? []), ...variants(node)].forEach((part) => forms(part, found));
  return found;
}

// Values

// Like JSON.stringify(value, null, 2), but with long lists of numbers and long strings cut.
function print(value, margin = "") {
  const inner = `${margin}  `;
  if (typeof value === "string" && value.length > 1200) {
    return `${JSON.stringify(value.slice(0, 120))} … ${value.length - 120} more characters`;
  }
  if (Array.isArray(value) && value.length && value.every((one) => typeof one === "number")) {
    const rest = value.length - 4;
    return rest > 4 ? `[${value.slice(0, 4).join(", ")}, … ${rest} more]` : `[${value.join(", ")}]`;
  }
  if (Array.isArray(value) && value.length) {
    return `[\n${value.map((one) => inner + print(one, inner)).join(",\n")}\n${margin}]`;
  }
  if (value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
    const lines = Object.entries(value).map(([key, one]) => `${inner}${JSON.stringify(key)}: ${print(one, inner)}`);
    return `{\n${lines.join(",\n")}\n${margin}}`;
  }
  return JSON.stringify(value);
}

// A route

function operation(path, method, op) {
  const id = op.operationId;
  const body = op.requestBody && resolve(op.requestBody).content["application/json"];
  const parameters = (op.parameters ?? []).map(resolve);
  return el("section", { class: "card route", id, "aria-labelledby": `${id}-title` },
    el("div", { class: "words" },
      el("h3", { id: `${id}-title` }, op.summary),
      el("p", { class: "address" },
        badge(method), breakable(path), op.security?.length ? el("span", { class: "quiet" }, "needs a key") : null),
      el("div", { class: "prose" }, prose(op.description)),
      table("Parameters", ["Name", "Meaning"], parameters.map((parameter) => [
        named(parameter.name, parameter.in, parameter.required), inline(parameter.description)])),
      body ? requestTables(body.schema, op) : null,
      replyTables(op)),
    tryOut(path, method, op, body, parameters.filter((parameter) => parameter.in === "path")));
}

function more(summary, content, open = false) {
  return el("details", { open }, el("summary", {}, summary), content);
}

function badge(method) {
  return el("span", { class: `method ${method}` }, method.toUpperCase());
}

function named(text, type, required = false) {
  return [breakable(text), el("span", { class: "type" }, type, required ? ", required" : "")];
}

// The tables of a request's body. If several routes take it, it is shown with the first.
function requestTables(schema, op) {
  const same = ({ op: other }) => resolve(other.requestBody).content?.["application/json"].schema.$ref === schema.$ref;
  const first = routes().find(same).op;
  if (schema.$ref && first !== op) {
    return el("p", {}, "The body is that of ", el("a", { href: `#${first.operationId}` }, first.summary), ".");
  }
  const properties = Object.entries(resolve(schema).properties ?? {});
  const rows = properties.map(([name, property]) => {
    const preset = property.default === undefined ? [] : [" Default: ", el("code", {}, JSON.stringify(property.default)), "."];
    const range = property.maximum === undefined ? "" : `, ${property.minimum} to ${property.maximum}`;
    const kinds = types(property).filter((type) => type !== "null").join(" | ") + range;
    return [named(name, kinds), [...inline(property.description), ...preset]];
  });
  const shapes = [...forms(resolve(schema).properties?.input)].map((form) => [
    form.title, [...inline(form.description), el("code", { class: "example" }, JSON.stringify(form.examples?.[0]))]]);
  return [
    el("div", { class: "prose" }, prose(resolve(schema).description)),
    table("Fields", ["Field", "Meaning"], rows),
    shapes.length ? more("Forms of an input", table("Forms of an input", ["Form", "Meaning and example"], shapes)) : null,
  ];
}

function replyTables(op) {
  const replies = Object.entries(op.responses).map(([status, reply]) => [status, resolve(reply)]);
  const rows = replies.map(([status, reply]) => {
    const headers = Object.keys(reply.headers ?? {}).filter((name) => name !== "X-Request-Id");
    const carries = headers.length ? el("span", { class: "type" }, `with ${headers.join(", ")}`) : null;
    const number = el("span", { class: `status s${status[0]}` }, status === "default" ? "other" : status);
    return [number, [...inline(reply.description), carries]];
  });
  const content = Object.values(replies[0][1].content ?? {})[0];
  const held = [...fields(content?.schema ?? {})].map(([at, row]) => [
    named(at, row.types.join(" | ")), inline(row.description)]);
  return [
    table("Replies", ["Status", "Meaning"], rows),
    held.length ? more("Fields of the reply", table("Fields of the reply", ["Field", "Meaning"], held)) : null,
    Object.values(content?.examples ?? {}).map((example) =>
      more(["Reply: ", inline(example.summary)], el("pre", { tabindex: "0" }, print(example.value)))),
  ];
}

// Trying it out

function tryOut(path, method, op, body, parameters) {
  const id = op.operationId;
  const curl = el("pre", { class: "curl", tabindex: "0", "aria-label": "The request as a curl command" });
  const outcome = el("p", { class: "outcome", role: "status" });
  const reply = el("pre", { class: "reply", tabindex: "0", "aria-label": "The reply", hidden: true });
  const inputs = parameters.map(({ name, example }) => el("input", {
    id: `${id}-${name}`, name, value: example ?? "", spellcheck: "false", autocomplete: "off", oninput: () => update() }));
  const examples = Object.values(body?.examples ?? {});
  const text = body && el("textarea", { id: `${id}-body`, spellcheck: "false", oninput: () => update(), onkeydown: (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
  } });
  const choice = body && el("select", { id: `${id}-example`, onchange: () => show() },
    examples.map((example, index) => el("option", { value: index }, example.summary)));
  let sending = false;

  function address() {
    return BASE + inputs.reduce((at, input) => at.replace(`{${input.name}}`, encodeURIComponent(input.value)), path);
  }

  function update() {
    const lines = [`curl ${quoted(address())}`];
    if (op.security?.length) lines.push('-H "Authorization: Bearer $API_KEY"');
    if (text) lines.push('-H "Content-Type: application/json"', `-d ${quoted(text.value)}`);
    curl.textContent = lines.join(" \\\n  ");
  }

  function show() {
    text.value = JSON.stringify(examples[choice.value]?.value ?? {}, null, 2);
    text.rows = Math.min(20, Math.max(6, text.value.split("\n").length));
    update();
  }

  async function send() {
    if (sending) return;
    sending = true;
    outcome.textContent = "Waiting for the reply…";
    const headers = {};
    const key = byId("key").value;
    if (op.security?.length && key) headers.Authorization = `Bearer ${key}`;
    if (text) headers["Content-Type"] = "application/json";
    const started = performance.now();
    try {
      const options = { method: method.toUpperCase(), headers, body: text?.value, credentials: "omit", cache: "no-store" };
      const response = await fetch(address(), options);
      const received = await response.text();
      const details = [`${response.status} ${response.statusText}`.trim(), `${Math.round(performance.now() - started)} ms`];
      for (const name of ["Server-Timing", "Retry-After", "X-Request-Id"]) {
        if (response.headers.has(name)) details.push(`${name}: ${response.headers.get(name)}`);
      }
      outcome.textContent = details.join("  ·  ");
      reply.textContent = readable(received, response.headers.get("Content-Type") ?? "");
      reply.hidden = false;
    } catch {
      outcome.textContent = "No reply: the server cannot be reached, or the key has characters that no header can carry.";
      reply.hidden = true;
    } finally {
      sending = false;
    }
  }

  if (text) show();
  else update();
  return el("div", { class: "try", role: "group", "aria-label": `Try out ${op.summary}` },
    inputs.map((input) => [el("label", { for: input.id }, input.name), input]),
    text ? [el("label", { for: choice.id }, "Example"), choice, el("label", { for: text.id }, "Body"), text] : null,
    el("div", { class: "buttons" },
      el("button", { class: "send primary", type: "button", onclick: send }, "Send"),
      el("button", { type: "button", onclick: (event) => copy(curl.textContent, event.currentTarget) }, "Copy as curl")),
    outcome, reply,
    more("curl", curl, !text));
}

function readable(text, type) {
  if (type.startsWith("application/json")) {
    try {
      return print(JSON.parse(text));
    } catch {
      // It is shown as it came.
    }
  }
  return text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}\n… ${text.length - MAX_SHOWN} more characters` : text;
}

// The page

function render() {
  document.title = `${spec.info.title}: API`;
  byId("title").textContent = spec.info.title;
  byId("version").textContent = `${spec.info.version} ·`;
  byId("about").replaceChildren(...prose(spec.info.description));
  byId("to-playground").hidden = !spec.paths["/"];
  byId("key-card").hidden = !spec.components.securitySchemes;

  const groups = spec.tags.map((tag) => ({ ...tag, routes: routes().filter((route) => route.op.tags.includes(tag.name)) }));
  byId("nav").replaceChildren(...groups.map((group) => el("div", {},
    el("h2", {}, group.name),
    el("ul", {}, group.routes.map(({ path, method, op }) =>
      el("li", {}, el("a", { href: `#${op.operationId}` }, badge(method), breakable(path))))))));
  byId("routes").replaceChildren(...groups.flatMap((group) => [
    el("div", { class: "group" }, el("h2", {}, group.name), el("p", { class: "quiet" }, group.description)),
    ...group.routes.map(({ path, method, op }) => operation(path, method, op)),
  ]));
  follow();
  if (location.hash) byId(location.hash.slice(1))?.scrollIntoView();
}

// Marks the route in view in the list of routes.
function follow() {
  const links = new Map([...document.querySelectorAll("#nav a")].map((link) => [link.hash.slice(1), link]));
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(entry.target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  document.querySelectorAll(".route").forEach((route) => observer.observe(route));
}

async function start() {
  try {
    const response = await fetch(`${BASE}/openapi.json`, { credentials: "omit" });
    if (!response.ok) throw new Error(response.statusText);
    spec = await response.json();
  } catch {
    byId("state").textContent = "The document cannot be read now. Reload the page to try again.";
    return;
  }
  render();
}

start();
