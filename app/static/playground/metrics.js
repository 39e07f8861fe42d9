// Parses Prometheus' text format, and computes what changed between readings. It knows neither the page nor any metric's name.

// One reading: numbers by name and labels. `time` is in seconds of a monotonic clock.
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

  // The sum of all samples with these labels, 0 if there are none.
  total(name, labels = {}) {
    const wanted = Object.entries(labels);
    const samples = (this.#samples.get(name) ?? []).filter((sample) => wanted.every(([key, value]) => sample.labels[key] === value));
    return samples.reduce((sum, { value }) => sum + value, 0);
  }

  labelled(name, label) {
    return (this.#samples.get(name) ?? []).map(({ labels }) => labels[label]);
  }

  // A histogram's buckets as [upper bound, count up to it], in order; the last bound is infinite.
  buckets(name) {
    const samples = this.#samples.get(`${name}_bucket`) ?? [];
    return samples.map(({ labels, value }) => [numberIn(labels.le), value]).sort((a, b) => a[0] - b[0]);
  }

  // Whether the service was restarted since an earlier reading: a counter is smaller, or was created at another time.
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

// The readings of the last `span` seconds. Rates, means and quantiles are over the last `window` seconds.
export class History {
  #readings = [];

  constructor(span, window) {
    this.span = span;
    this.window = window;
  }

  get last() {
    return this.#readings.at(-1)?.reading ?? null;
  }

  // Adds a reading. Returns whether the service was restarted since the last one.
  add(reading) {
    const restarted = this.last !== null && reading.isRestartOf(this.last);
    const life = (this.#readings.at(-1)?.life ?? 0) + (restarted ? 1 : 0);
    this.#readings.push({ reading, life });
    this.#readings = this.#readings.filter((one) => one.reading.time >= reading.time - this.span);
    return restarted;
  }

  // How much a counter has grown within the last `seconds`, added up over restarts of the service.
  grown(name, labels = {}, seconds = this.span) {
    const lives = Map.groupBy(this.#within(seconds), ({ life }) => life).values();
    const growth = (life) => life.at(-1).reading.total(name, labels) - life[0].reading.total(name, labels);
    return [...lives].reduce((sum, life) => sum + growth(life), 0);
  }

  // How much a counter grows a second; null until the window has two readings.
  rate(name, labels = {}) {
    const pair = this.#pair();
    return pair && (pair.last.total(name, labels) - pair.first.total(name, labels)) / (pair.last.time - pair.first.time);
  }

  // The mean of a histogram's observations in the window, null if there are none.
  mean(name) {
    const pair = this.#pair();
    const growth = (part) => pair.last.total(`${name}_${part}`) - pair.first.total(`${name}_${part}`);
    return pair && growth("count") > 0 ? growth("sum") / growth("count") : null;
  }

  // Like Prometheus' histogram_quantile: interpolates within a bucket, and returns the last finite bound at most.
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

  // A histogram's observations within the span, by bucket: [upper bound, observations in that bucket alone].
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
    // Readings come a little late, hence half a second more.
    const readings = this.#readings.length ? this.#within(this.window + 0.5).filter((one) => one.life === life) : [];
    return readings.length < 2 ? null : { first: readings[0].reading, last: readings.at(-1).reading };
  }
}
