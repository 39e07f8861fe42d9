// Makes the elements of every page. Text is only put in as text.

// Makes an element: el("p", { class: "quiet", onclick: f }, "text", element, [more]). Children that are null are left out, and so
// are attributes that are null or false.
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

// Makes an element of SVG.
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

// The service's URL, also behind a proxy that serves it below a path.
export const BASE = new URL(".", location.href).href.replace(/\/$/, "");

// Whether the theme that is shown is dark: see theme.js.
export function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// Quotes a word for a shell, if it needs quotes.
export function quoted(text) {
  return /^[\w:/.%-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

// Copies a text, and says so on the button. Pages over plain HTTP have no clipboard, so a selection is copied instead.
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
