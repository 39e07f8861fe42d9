// Shows errors at the input or the field that they are about, else below the button.
import { ApiError } from "./api.js";
import { byId } from "../shared/dom.js";

export const FIELDS = ["key", "instruction", "dimensions"];

// Shows an error of a request. `items` are its items, in order, since the API names one by its index.
export function explain(error, items, inputs) {
  if (error.row) {
    inputs.showError(error.row, error.message);
  } else if (!(error instanceof ApiError)) {
    problem("The reply is not one of this service.");
    throw error;
  } else {
    explainReply(error, items, inputs);
  }
}

function explainReply({ status, message, param, retryAfter }, items, inputs) {
  const index = /^input\[(\d+)\]/.exec(param ?? "")?.[1];
  const item = items[index];
  const place = item && inputs.placeOf(item.row);
  if (status === 401) {
    fieldProblem("key", byId("key").value.trim() ? "The service does not know this key." : "The service needs a key.");
  } else if (place) {
    inputs.showError(item.row, message);
    problem(`${status}: input ${place} is refused.`);
  } else if (item) {
    problem(`${status}: an input that has been removed since is refused: ${sentence(message)}`);
  } else if (FIELDS.includes(param)) {
    fieldProblem(param, message);
  } else {
    const again = retryAfter ? ` That is ${retryAfter} s from now.` : "";
    problem(`${status ? `${status}: ` : ""}${sentence(message)}${again}`);
  }
}

function sentence(text) {
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

// Shows an error below the button.
export function problem(message) {
  byId("problem").textContent = message;
}

export function fieldProblem(name, message) {
  byId(`${name}-error`).textContent = message;
  byId(`${name}-error`).hidden = !message;
  byId(name).setAttribute("aria-invalid", message ? "true" : "false");
  if (message) byId(name).focus();
}

export function clearProblems(inputs) {
  problem("");
  inputs.clearErrors();
  FIELDS.forEach((name) => fieldProblem(name, ""));
}
