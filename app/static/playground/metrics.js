// Prometheus' text, and what changed between two readings of it. It knows neither the page nor the service's metrics by name.

// One reading: numbers by name and labels. `time` is in seconds, on any clock that only goes forward.
export class Reading {
  #samples = new Map();

  constructor(text, time) {
    this.time = time;
    for (const line of text.split("\n")) {
      const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?[ \t]+(\S+)/.exec(line);
      if (!found) continue;
      const [, name, labels, value] = found;
      if (!this.#samples.has(name)) this.#samples.set(name, []);
      this.#samples.get(name).push({ labels: labelsIn(labels ?? ""), value: numberIn(value) });
    }
  }

  has(name) {
    return this.#samples.has(name);
  }

  // The sum over all samples with these labels; 0 where there are none yet.
  total(name, labels = {}) {
    const wanted = Object.entries(labels);
    const samples = (this.#samples.get(name) ?? []).filter((sample) => wanted.every(([key, value]) => sample.labels[key] === value));
    return samples.reduce((sum, { value }) => sum + value, 0);
  }

  labelled(name, label) {
    return (this.#samples.get(name) ?? []).map(({ labels }) => labels[label]);
  }

  // [upper bound, count up to it], in order, the last bound infinite
  buckets(name) {
    const samples = this.#samples.get(`${name}_bucket`) ?? [];
    return samples.map(({ labels, value }) => [numberIn(labels.le), value]).sort((a, b) => a[0] - b[0]);
  }

  // Counters of another process start again from zero; most tell by a `_created` of their own.
  isRestartOf(earlier) {
    return [...this.#samples.keys()].some((name) => {
      if (!earlier.has(name)) return false;
      if (name.endsWith("_created")) return this.total(name) !== earlier.total(name) && this.#samples.get(name).length === 1;
      return /_(total|count)$/.test(name) && this.total(name) < earlier.total(name);
    });
  }
}

function labelsIn(text) {
  const unescaped = { "\\\\": "\\", '\\"': '"', "\\n": "\n" };
  const pairs = text.matchAll(/([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g);
  return Object.fromEntries([...pairs].map(([, key, value]) => [key, value.replace(/\\[\\"n]/g, (one) => unescaped[one])]));
}

function numberIn(text) {
  return Number(text.replace(/^([+-]?)Inf$/, "$1Infinity"));
}

// The readings of the last `span` seconds. Rates and the like are over the last `window` of them.
export class History {
  #readings = [];

  constructor(span, window) {
    this.span = span;
    this.window = window;
  }

  get last() {
    return this.#readings.at(-1)?.reading ?? null;
  }

  // Whether the service has been started anew since the last reading.
  add(reading) {
    const restarted = this.last !== null && reading.isRestartOf(this.last);
    const life = (this.#readings.at(-1)?.life ?? 0) + (restarted ? 1 : 0);
    this.#readings.push({ reading, life });
    this.#readings = this.#readings.filter((one) => one.reading.time >= reading.time - this.span);
    return restarted;
  }

  // How much a counter has grown within the last `seconds`; of each life of the service what was seen of it.
  grown(name, labels = {}, seconds = this.span) {
    const lives = Map.groupBy(this.#within(seconds), ({ life }) => life).values();
    const growth = (life) => life.at(-1).reading.total(name, labels) - life[0].reading.total(name, labels);
    return [...lives].reduce((sum, life) => sum + growth(life), 0);
  }

  // A second. Null until there are two readings in the window.
  rate(name, labels = {}) {
    const pair = this.#pair();
    return pair && (pair.last.total(name, labels) - pair.first.total(name, labels)) / (pair.last.time - pair.first.time);
  }

  // Of what a histogram observed in the window. Null where it observed nothing.
  mean(name) {
    const pair = this.#pair();
    const growth = (part) => pair.last.total(`${name}_${part}`) - pair.first.total(`${name}_${part}`);
    return pair && growth("count") > 0 ? growth("sum") / growth("count") : null;
  }

  // As Prometheus' histogram_quantile: even within a bucket, and at most the last finite bound.
  quantile(share, name) {
    const pair = this.#pair();
    if (!pair) return null;
    const before = new Map(pair.first.buckets(name));
    const grown = pair.last.buckets(name).map(([bound, count]) => [bound, count - (before.get(bound) ?? 0)]);
    const rank = share * (grown.at(-1)?.[1] ?? 0);
    if (!rank) return null;
    const index = grown.findIndex(([, count]) => count >= rank);
    const [low, below] = index ? grown[index - 1] : [0, 0];
    const [high, upTo] = grown[index];
    return high === Infinity ? low : low + ((high - low) * (rank - below)) / (upTo - below);
  }

  // [upper bound, observations in that bucket alone] within the span
  spread(name) {
    const bounds = this.last ? this.last.buckets(name).map(([bound]) => bound) : [];
    const text = (bound) => this.last.labelled(`${name}_bucket`, "le").find((le) => numberIn(le) === bound);
    const upTo = bounds.map((bound) => this.grown(`${name}_bucket`, { le: text(bound) }));
    return bounds.map((bound, index) => [bound, upTo[index] - (upTo[index - 1] ?? 0)]);
  }

  #within(seconds) {
    return this.#readings.filter(({ reading }) => reading.time >= this.last.time - seconds);
  }

  #pair() {
    const { life } = this.#readings.at(-1) ?? {};
    // Half a second more: readings come a little late.
    const readings = this.#readings.length ? this.#within(this.window + 0.5).filter((one) => one.life === life) : [];
    return readings.length < 2 ? null : { first: readings[0].reading, last: readings.at(-1).reading };
  }
}
