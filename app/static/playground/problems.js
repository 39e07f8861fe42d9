// Errors, where they belong: at an input, at a field, or below the button.
import { ApiError } from "./api.js";
import { byId } from "../shared/dom.js";

export const FIELDS = ["key", "instruction", "dimensions"];

// `items` are those of the request, in its order: the API names one of them by its place.
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

// What is wrong with none of them, or with the whole.
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
