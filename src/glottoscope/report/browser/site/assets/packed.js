// The packed examples of a shard: report/browser/packing.py says how numbers become characters.

let alphabet = "";
for (let code = 0x21; code < 0x100; code++) {
  if ((code < 0x7f || code > 0xa0) && code !== 0x22 && code !== 0x5c && code !== 0xad) alphabet += String.fromCharCode(code);
}
const BASE = alphabet.length - 2;
const digitOf = new Uint8Array(256);
for (let digit = 0; digit < alphabet.length; digit++) digitOf[alphabet.charCodeAt(digit)] = digit;

/** The numbers of a packed string. @param {string} text @returns {number[]} */
export function numbers(text) {
  const values = [];
  for (let at = 0; at < text.length; ) {
    const head = digitOf[text.charCodeAt(at++)];
    if (head < BASE) {
      values.push(head);
      continue;
    }
    const size = head - BASE + 2;
    let value = 0;
    for (let i = 0; i < size; i++) value = value * BASE + digitOf[text.charCodeAt(at++)];
    values.push(value + BASE + (size === 3 ? BASE * BASE : 0));
  }
  return values;
}

/** @param {number[]} counts @param {number} end */
const sum = (counts, end) => counts.slice(0, end).reduce((total, count) => total + count, 0);

/**
 * The examples of one feature of a shard in plain numbers; undefined where it has none.
 * @param {any} shard @param {number} f
 * @returns {{block: number[], at: number[], start: number[], length: number[], language: number[], value: number[],
 *   on: number[][]}|undefined} on: [gap, level, gap, level ...] of each example
 */
export function unpackExamples(shard, f) {
  const packed = shard.examples;
  const place = f - shard.first;
  if (!packed || !packed.count[place]) return undefined;
  const begin = sum(packed.count, place);
  const end = begin + packed.count[place];
  /** @param {string|number} column */
  const part = (column) => (typeof column === "string" ? numbers(column).slice(begin, end) : new Array(end - begin).fill(column));
  const gaps = packed.gap.split(" ").slice(0, end).map(numbers);
  const levels = numbers(packed.level);
  let level = sum(gaps.map((/** @type {number[]} */ row) => row.length), begin);
  let permille = 1000;
  return {
    block: packed.block.slice(begin, end),
    at: part(packed.at),
    start: part(packed.start),
    length: part(packed.length),
    language: part(packed.language),
    value: part(packed.value).map((step) => {
      permille -= step % 2 ? -(step + 1) / 2 : step / 2;
      return Number(((packed.max[place] * permille) / 1000).toPrecision(4));
    }),
    on: gaps.slice(begin).map((/** @type {number[]} */ row) => row.flatMap((gap) => [gap, levels[level++]])),
  };
}

/**
 * One feature of a shard: its record, with its examples in plain numbers; {} where it is dead. The examples of a shard lie
 * together beside the records (`shard.examples`), so the shard is needed, not the record alone.
 * @param {any} shard @param {number} f
 */
export function unpackFeature(shard, f) {
  if (!shard.features) return shard;
  const record = shard.features[f] ?? {};
  const examples = unpackExamples(shard, f);
  return examples ? { ...record, examples } : record;
}
