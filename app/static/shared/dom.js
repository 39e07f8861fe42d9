// What every page makes its elements with. Text is only ever put in as text.

// el("p", { class: "quiet", onclick: f }, "text", element, [more]): nothing for a child that is null; no attribute for false.
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

// The same in SVG.
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null));
  return element;
}

export const byId = (id) => document.getElementById(id);

// Where the service is, also behind a proxy that puts it below a path.
export const BASE = new URL(".", location.href).href.replace(/\/$/, "");

// The theme that is shown: see theme.js.
export function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// A word for a shell: in single quotes where it needs them.
export function quoted(text) {
  return /^[\w:/.%-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

// Copies, and says so on the button. Pages from plain http have no clipboard; the older way, by a selection, works for them.
export async function copy(text, button) {
  const label = button.dataset.label ??= button.textContent;
  let copied;
  try {
    await navigator.clipboard.writeText(text);
    copied = true;
  } catch {
    const field = el("textarea", { class: "offscreen", "aria-hidden": "true", tabindex: "-1" });
    field.value = text;
    document.body.append(field);
    field.select();
    copied = document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.textContent = copied ? "Copied" : "Not copied";
  setTimeout(() => { button.textContent = label; }, 1500);
}
