// How images come to the inputs: chosen, pasted, or dropped.
import { byId } from "../shared/dom.js";

let chosenFor = null; // the row that an image is chosen for

export function chooseFor(row) {
  chosenFor = row;
  byId("file").click();
}

export function takeImages(inputs) {
  const chosen = (id, take) => byId(id).addEventListener("change", () => {
    take(byId(id).files);
    byId(id).value = "";
  });
  chosen("files", (files) => inputs.addImages(files));
  chosen("file", (files) => inputs.addImagesTo(chosenFor, files));
  byId("add-images").addEventListener("click", () => byId("files").click());
  document.addEventListener("paste", (event) => {
    // What is copied from a document may be a text with a picture of it.
    if (!event.clipboardData?.files.length || event.clipboardData.types.includes("text/plain")) return;
    event.preventDefault();
    inputs.addImages(event.clipboardData.files);
  });
  takeDrops(inputs);
}

// A frame takes an image for its row; anywhere else on the page it becomes an input of its own.
function takeDrops(inputs) {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const target = (event) => event.target.closest?.(".slot") ?? byId("composer");
  const mark = (element) => {
    document.querySelectorAll(".target").forEach((one) => one.classList.remove("target"));
    element?.classList.add("target");
  };
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(target(event));
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) mark(null); });
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(null);
    const row = inputs.rowOf(target(event));
    if (row) inputs.addImagesTo(row, event.dataTransfer.files);
    else inputs.addImages(event.dataTransfer.files);
  });
}
