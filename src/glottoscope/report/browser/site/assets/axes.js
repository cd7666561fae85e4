// Horizontal axes of the charts: tokens and steps on a logarithm that has a place for 0, layers, sizes, checkpoints in order.

/**
 * @typedef {{label: string, place: (x: number) => number, ticks: {at: number, label: string}[], low: number, high: number, zero: number|null,
 *   words: (x: number) => string}} Axis
 *   place: where a value stands; low and high: range of the places; zero: the place between 0 and the logarithm, null without 0;
 *   words: what a value is called
 */

const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

/** A count in few characters: 1,500 and 614K. @param {number} value */
export const compact = (value) => (Math.abs(value) < 10_000 ? value.toLocaleString("en") : COMPACT.format(value));

/** @param {number[]} places @returns {[number, number]} */
function padded(places) {
  const low = Math.min(...places);
  const high = Math.max(...places);
  const pad = high > low ? (high - low) * 0.025 : 0.5;
  return [low - pad, high + pad];
}

/**
 * A logarithmic axis; 0 stands left of the smallest positive value.
 * @param {number[]} values @param {{label: string, words: (x: number) => string, decades: boolean}} what
 *   decades: ticks at powers of ten, else at the values
 * @returns {Axis}
 */
export function logAxis(values, { label, words, decades }) {
  const positive = values.filter((value) => value > 0);
  const least = positive.length ? Math.log10(Math.min(...positive)) : 0;
  const most = positive.length ? Math.log10(Math.max(...positive)) : 0;
  const zero = least - Math.max(0.3, 0.12 * (most - least));
  const place = (/** @type {number} */ x) => (x > 0 ? Math.log10(x) : zero);
  const [low, high] = padded(values.map(place));
  let marks = [...new Set(values)].sort((a, b) => a - b);
  if (decades) {
    const powers = [];
    for (let power = Math.ceil(least - 1e-9); power <= most + 1e-9; power++) powers.push(10 ** power);
    if (powers.length > 1) marks = marks[0] === 0 ? [0, ...powers] : powers;
  }
  const ticks = marks.map((value) => ({ at: place(value), label: compact(value) }));
  return { label, place, ticks, low, high, zero: values.includes(0) && positive.length ? (zero + least) / 2 : null, words };
}

/**
 * @param {number[]} values @param {{label: string, words: (x: number) => string, names?: Map<number, string>}} what names: shown at the ticks
 * @returns {Axis}
 */
export function linearAxis(values, { label, words, names }) {
  const marks = [...new Set(values)].sort((a, b) => a - b);
  const [low, high] = padded(marks);
  return { label, place: (x) => x, ticks: marks.map((at) => ({ at, label: names?.get(at) ?? compact(at) })), low, high, zero: null, words };
}

/**
 * The ticks that fit: the ends first, then from the left. @param {Axis} axis @param {number} width pixels between `low` and `high`
 */
export function ticksThatFit(axis, width) {
  const scale = width / (axis.high - axis.low);
  const half = (/** @type {{label: string}} */ tick) => 3.6 * tick.label.length + 5;
  const last = axis.ticks[axis.ticks.length - 1];
  /** @type {typeof axis.ticks} */
  const kept = [];
  for (const tick of axis.ticks) {
    const before = kept[kept.length - 1];
    if (before && (tick.at - before.at) * scale < half(tick) + half(before)) continue;
    if (tick !== last && (last.at - tick.at) * scale < half(tick) + half(last)) continue;
    kept.push(tick);
  }
  return kept;
}
