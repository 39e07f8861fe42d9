// Formats numbers to be shown.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

// Formats a count: 0, 0.42, 4.2, 42, 4,200, 42K.
export function count(value) {
  if (value == null) return "–";
  if (value >= 10_000) return short.format(value);
  if (value >= 10 || Number.isInteger(value)) return whole.format(value);
  return value >= 1 ? value.toFixed(1) : value.toFixed(2);
}

export const integer = (value) => whole.format(value);

// Formats seconds: 0.8 ms, 42 ms, 1.3 s.
export function seconds(value) {
  if (value == null) return "–";
  const ms = value * 1000;
  if (ms < 10) return `${Number(ms.toFixed(1))} ms`;
  return ms < 1000 ? `${Math.round(ms)} ms` : `${value < 10 ? value.toFixed(1) : Math.round(value)} s`;
}

export function bytes(value) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= size) return `${(value / size).toFixed(value < 10 * size ? 1 : 0)} ${unit}`;
  }
  return `${value} bytes`;
}

// Formats a cosine, with a minus sign instead of a hyphen, and without a negative zero.
export function cosine(value, digits = 2) {
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

export function plural(number, noun) {
  return `${integer(number)} ${noun}${number === 1 ? "" : noun.endsWith("ch") ? "es" : "s"}`;
}
