// Adds images to the inputs: chosen, pasted or dropped.
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
    // A copy from a document may be a text with a picture of it: the text is pasted.
    if (!event.clipboardData?.files.length || event.clipboardData.types.includes("text/plain")) return;
    event.preventDefault();
    inputs.addImages(event.clipboardData.files);
  });
  takeDrops(inputs);
}

// An image that is dropped on a row's frame is for that row; anywhere else it is a new input.
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
