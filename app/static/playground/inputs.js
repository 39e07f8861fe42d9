// The list of inputs: each is a text, an image, or both, which are fused into one vector. It does not know of requests.
import { el, svg } from "../shared/dom.js";
import { bytes } from "./numbers.js";

// A larger matrix could not be read; the API takes more inputs.
const MOST = 64;

export class Inputs {
  #rows = [];
  #made = 0;
  #list;
  #changed;
  #refused;
  #chooseFor;

  // Calls `changed()` after every change, `refused(message)` if something cannot be an input, with "" once that is past, and
  // `chooseFor(row)` to open a file chooser.
  constructor(list, { changed, refused, chooseFor }) {
    this.#list = list;
    this.#changed = changed;
    this.#refused = refused;
    this.#chooseFor = chooseFor;
  }

  // The inputs that are not empty: {row, place, text, image: {file, name, url} or null}. `place` is the number that is shown.
  filled() {
    const items = this.#rows.map((row, index) => ({ row, place: index + 1, text: row.text.value, image: row.image }));
    return items.filter(({ text, image }) => text || image);
  }

  // The number that is shown at a row, null once the row is removed.
  placeOf(row) {
    return this.#rows.indexOf(row) + 1 || null;
  }

  addText(text = "") {
    const row = this.#add();
    if (row) row.text.value = text;
    this.#update();
    return row;
  }

  // Adds texts in place of the empty rows.
  addTexts(texts) {
    this.#rows.filter((row) => !row.text.value && !row.image).forEach((row) => this.#drop(row));
    texts.forEach((text) => this.addText(text));
  }

  addImages(files) {
    const images = this.#imagesOf(files);
    const blank = this.#rows.filter((row) => !row.text.value && !row.image);
    for (const file of images) {
      const row = blank.shift() ?? this.#add();
      if (!row) break;
      this.#setImage(row, file);
    }
    this.#update();
  }

  // Puts the first image into `row`, to be fused with its text; further images become new rows.
  addImagesTo(row, files) {
    const [first, ...rest] = this.#imagesOf(files);
    if (first) this.#setImage(row, first);
    if (rest.length) this.addImages(rest);
    this.#update();
  }

  rowOf(element) {
    return this.#rows.find((row) => row.element.contains(element));
  }

  focus() {
    (this.#rows[0] ?? this.addText()).text.focus();
  }

  showError(row, message) {
    row.error.textContent = message;
    row.error.hidden = !message;
    row.element.classList.toggle("wrong", Boolean(message));
    row.text.setAttribute("aria-invalid", message ? "true" : "false");
    if (message) row.text.focus();
  }

  clearErrors() {
    this.#rows.forEach((row) => this.showError(row, ""));
  }

  #add() {
    if (this.#rows.length >= MOST) {
      this.#refused(`This page takes ${MOST} inputs; the API takes more.`);
      return null;
    }
    const row = { image: null };
    const id = `input-error-${this.#made += 1}`;
    row.number = el("span", { class: "number", "aria-hidden": "true" });
    row.slot = el("button", { class: "slot", type: "button", onclick: () => this.#chooseFor(row) }, pictureIcon());
    row.text = el("textarea", {
      rows: "1", "aria-describedby": id,
      oninput: () => { this.showError(row, ""); this.#refused(""); this.#changed(); },
    });
    row.file = el("p", { class: "file", hidden: true });
    row.error = el("p", { class: "error", id, hidden: true });
    row.remove = el("button", { class: "icon", type: "button", onclick: () => this.#removeByHand(row) }, crossIcon());
    row.element = el("li", {}, row.number, row.slot, el("div", { class: "content" }, row.text, row.file, row.error), row.remove);
    this.#rows.push(row);
    this.#list.append(row.element);
    return row;
  }

  #drop(row) {
    this.#rows.splice(this.#rows.indexOf(row), 1);
    row.element.remove();
  }

  // Removes a row, and moves the focus to the one that takes its place.
  #removeByHand(row) {
    const index = this.#rows.indexOf(row);
    this.#drop(row);
    if (!this.#rows.length) this.#add();
    this.#rows[Math.min(index, this.#rows.length - 1)].text.focus();
    this.#refused("");
    this.#update();
  }

  #imagesOf(files) {
    const images = [...files].filter((file) => file.type.startsWith("image/"));
    const others = [...files].filter((file) => !images.includes(file));
    this.#refused(others.length ? `No image: ${others.map((file) => file.name).join(", ")}` : "");
    return images;
  }

  // The object URL is never revoked, since a result shows it after its row is removed.
  #setImage(row, file) {
    row.image = { file, name: this.#freeName(file), url: URL.createObjectURL(file) };
    this.showError(row, "");
    const picture = el("img", { src: row.image.url, alt: "", onerror: () => picture.replaceWith(pictureIcon()) });
    row.slot.replaceChildren(picture);
    row.slot.classList.add("held");
    const taken = el("button", { class: "plain", type: "button", onclick: () => this.#takeImage(row) }, "Take out");
    taken.setAttribute("aria-label", `Take ${row.image.name} out`);
    row.file.replaceChildren(el("span", { class: "name", title: row.image.name }, row.image.name), ` ${bytes(file.size)} `, taken);
    row.file.hidden = false;
  }

  #takeImage(row) {
    row.image = null;
    row.slot.replaceChildren(pictureIcon());
    row.slot.classList.remove("held");
    row.file.hidden = true;
    this.showError(row, "");
    this.#refused("");
    row.text.focus();
    this.#update();
  }

  // A name that no other file has, since the code that is shown reads files by name.
  #freeName(file) {
    const others = this.#rows.map((row) => row.image).filter((image) => image && !isSame(image.file, file));
    const taken = new Set(others.map((image) => image.name));
    const [, stem, ending] = /^(.*?)(\.[^.]*)?$/s.exec(file.name || "image");
    let name = file.name || "image";
    for (let next = 2; taken.has(name); next += 1) name = `${stem}-${next}${ending ?? ""}`;
    return name;
  }

  #update() {
    this.#rows.forEach((row, index) => {
      const at = index + 1;
      row.number.textContent = at;
      row.text.setAttribute("aria-label", `Text of input ${at}`);
      row.text.placeholder = row.image ? "A text to fuse with the image, or none" : "A text";
      row.slot.setAttribute("aria-label", `${row.image ? "Another" : "An"} image for input ${at}`);
      row.slot.title = row.image ? "Choose another image" : "Fuse an image with the text";
      row.remove.setAttribute("aria-label", `Remove input ${at}`);
      row.remove.title = "Remove";
    });
    this.#changed();
  }
}

function isSame(one, other) {
  return one === other || (one.name === other.name && one.size === other.size && one.lastModified === other.lastModified);
}

// Reads a file as base64.
export function readBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",")[1] ?? "");
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function pictureIcon() {
  return svg("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" },
    svg("path", { d: "M3.5 4.5h13v11h-13zM3.5 13l3.6-3.6 3 3 2.2-2.2 4.2 4.2" }), svg("circle", { cx: "12.8", cy: "7.8", r: "1.2" }));
}

function crossIcon() {
  return svg("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" }, svg("path", { d: "M6 6l8 8M14 6l-8 8" }));
}
