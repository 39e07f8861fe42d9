// What the page's modules find in a browser, as far as tests of single modules need it. `module(name)` imports one of the playground's
// from the folder STATIC, a copy of app/static that Node.js takes for modules.
import { pathToFileURL } from "node:url";

// An element that keeps what it is given: attributes, children, and style properties.
class Element {
  constructor(tag) {
    Object.assign(this, { tag, attributes: {}, children: [], listeners: {}, properties: {} });
    this.style = { setProperty: (name, value) => { this.properties[name] = value; } };
  }

  setAttribute(name, value) {
    this.attributes[name] = value;
  }

  addEventListener(name, listener) {
    this.listeners[name] = listener;
  }

  append(...children) {
    this.children.push(...children);
  }

  // All elements within, itself among them.
  *all() {
    yield this;
    for (const child of this.children) if (child instanceof Element) yield* child.all();
  }
}

globalThis.location = { href: "http://service.example/below/docs" };
globalThis.document = {
  documentElement: { dataset: {} },
  createElement: (tag) => new Element(tag),
  createElementNS: (_, tag) => new Element(tag),
};
// Browsers have it for longer than Node.js.
Map.groupBy ??= (items, keyOf) => {
  const groups = new Map();
  for (const item of items) groups.set(keyOf(item), [...(groups.get(keyOf(item)) ?? []), item]);
  return groups;
};

export const module = (name) => import(pathToFileURL(`${process.env.STATIC}/playground/${name}`).href);
