// The arithmetic of find.html: features of several setups as plain columns, filtered, counted and sorted in one pass.
import { list, snippets } from "./data.js";
import { FLAGS, LABELS, RANGES, aliveOf } from "./query.js";
import { folded, unmarked } from "./text.js";

/**
 * @typedef {import("./data.js").Setup} Setup
 * @typedef {import("./data.js").Site} Site
 * @typedef {import("./data.js").Tokens} Tokens
 * @typedef {import("./query.js").Query} Query
 * @typedef {{setups: Setup[], left: number, n: number, setup: Uint16Array, feature: Uint32Array, alive: Uint8Array, cls: Uint8Array,
 *   flags: Object<string, Int8Array>, num: Object<string, Float64Array>, lists: any[], top: Object<string, number[][][]>,
 *   first: number[], domains: Object<string, Domain>, bins: Object<string, Uint8Array>}} Table
 *   left: setups that were too many; lists: as loaded; top[language][setup][feature] = ranks; first: row of each setup's feature 0;
 *   bins: of the bars, 255 where the value is unknown
 * @typedef {{low: number, high: number, log: boolean}} Domain
 * @typedef {{granularity: number|null, note: string, rater: string}} Label
 */

/** More features than this are not loaded for one list. */
export const LIMIT = 400_000;
export const BINS = 24;
const NONE = 255;

/** @param {(number|null)[]|undefined} values @param {Float64Array} into @param {number} at */
function copy(values, into, at) {
  if (!values) return;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    if (value !== null) into[at + i] = value;
  }
}

/**
 * The lists of setups as one table. Setups that would be too many are left out.
 * @param {Site} site @param {Setup[]} wanted @param {(done: number, of: number) => void} [progress]
 * @returns {Promise<Table>}
 */
export async function loadTable(site, wanted, progress = () => {}) {
  let n = 0;
  const setups = wanted.filter((setup, i) => {
    if (i > 0 && n + setup.n_features > LIMIT) return false;
    n += setup.n_features;
    return true;
  });
  let done = 0;
  const lists = await Promise.all(
    setups.map(async (setup) => {
      const data = await list(setup.id);
      progress(++done, setups.length);
      return data;
    }),
  );
  /** @type {Table} */
  const table = {
    setups,
    left: wanted.length - setups.length,
    n,
    setup: new Uint16Array(n),
    feature: new Uint32Array(n),
    alive: new Uint8Array(n),
    cls: new Uint8Array(n),
    flags: Object.fromEntries(Object.keys(FLAGS).map((name) => [name, new Int8Array(n).fill(-1)])),
    num: Object.fromEntries(Object.keys(RANGES).map((name) => [name, new Float64Array(n).fill(NaN)])),
    lists,
    top: Object.fromEntries(site.languages.map((language) => [language, lists.map((data) => data.top?.[language] ?? [])])),
    first: [],
    domains: {},
    bins: {},
  };
  const unknown = Math.max(0, site.classes.indexOf("unclassified"));
  let at = 0;
  for (const [number, { columns }] of lists.entries()) {
    const size = setups[number].n_features;
    table.first.push(at);
    table.setup.fill(number, at, at + size);
    for (let i = 0; i < size; i++) table.feature[at + i] = i;
    table.alive.set(columns.alive, at);
    for (let i = 0; i < size; i++) table.cls[at + i] = columns.class[i] ?? unknown;
    for (const name of Object.keys(FLAGS)) {
      const values = columns[name];
      if (values) for (let i = 0; i < size; i++) table.flags[name][at + i] = values[i] ?? -1;
    }
    for (const [name, { column }] of Object.entries(RANGES)) copy(columns[column], table.num[name], at);
    at += size;
  }
  for (const name of Object.keys(RANGES)) {
    table.domains[name] = domain(table.num[name], RANGES[name].log ?? false);
    table.bins[name] = binned(table.num[name], table.domains[name]);
  }
  return table;
}

/** Range of a column's values. @param {Float64Array} values @param {boolean} log @returns {Domain} */
function domain(values, log) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low && (!log || value > 0)) low = value;
    if (value > high) high = value;
  }
  return { low, high, log };
}

/** Bin of every value; NONE where it is null. @param {Float64Array} values @param {Domain} domain */
function binned(values, { low, high, log }) {
  const bins = new Uint8Array(values.length).fill(NONE);
  const start = log ? Math.log(low) : low;
  const scale = high > low ? BINS / ((log ? Math.log(high) : high) - start) : 0;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    if (!Number.isNaN(value))
      bins[i] = Math.max(0, Math.min(BINS - 1, Math.floor(((log ? Math.log(value) : value) - start) * scale)));
  }
  return bins;
}

/** @type {WeakMap<Tokens, string[]>} */
const foldedTokens = new WeakMap();
/** @type {Map<string, Object<string, string[]>>} */
const foldedSnippets = new Map();

/** Features with a top token that contains the needle. @param {Table} table @param {Tokens} tokens @param {string} needle @param {string[]} languages */
function byToken(table, tokens, needle, languages) {
  let texts = foldedTokens.get(tokens);
  if (!texts) foldedTokens.set(tokens, (texts = tokens.text.map(folded)));
  const wanted = new Uint8Array(texts.length);
  for (let rank = 0; rank < texts.length; rank++) if (texts[rank].includes(needle)) wanted[rank] = 1;
  const hits = new Uint8Array(table.n);
  for (const language of languages)
    for (const [number, features] of table.top[language].entries())
      for (let f = 0; f < features.length; f++)
        for (const rank of features[f] ?? []) if (wanted[rank]) hits[table.first[number] + f] = 1;
  return hits;
}

/** Features with a snippet that contains the needle. @param {Table} table @param {string} needle @param {string[]} languages */
async function byText(table, needle, languages) {
  const hits = new Uint8Array(table.n);
  await Promise.all(
    table.setups.map(async (setup, number) => {
      let texts = foldedSnippets.get(setup.id);
      if (!texts) {
        const data = (await snippets(setup.id)).snippets;
        // U+E000 stands in no snippet's text, so that no needle is found across two of them.
        texts = Object.fromEntries(
          Object.entries(data).map(([language, features]) => [
            language,
            /** @type {string[][]} */ (features).map((some) => folded(some.map(unmarked).join("\ue000"))),
          ]),
        );
        foldedSnippets.set(setup.id, texts);
      }
      for (const language of languages) {
        const features = texts[language] ?? [];
        for (let f = 0; f < features.length; f++) if (features[f].includes(needle)) hits[table.first[number] + f] = 1;
      }
    }),
  );
  return hits;
}

/**
 * Labels of the table's rows.
 * @param {Table} table @param {{setup: string, feature: number, rater: string, granularity: number|null, note: string}[]} labels
 * @param {string} rater only this rater's labels; all where empty
 * @returns {Map<number, Label[]>} by row
 */
export function labelsOf(table, labels, rater) {
  const numbers = new Map(table.setups.map((setup, number) => [setup.id, number]));
  /** @type {Map<number, Label[]>} */
  const rows = new Map();
  const add = (/** @type {number} */ row, /** @type {Label} */ label) => rows.set(row, [...(rows.get(row) ?? []), label]);
  for (const label of labels) {
    const number = numbers.get(label.setup);
    if (
      number === undefined ||
      label.feature >= table.setups[number].n_features ||
      (rater && label.rater !== rater) ||
      (label.granularity === null && !label.note)
    )
      continue;
    add(table.first[number] + label.feature, label);
  }
  return rows;
}

/** Whether labels of one feature are of this kind. @param {Label[]|undefined} labels @param {string} kind */
function isLabelled(labels, kind) {
  if (kind === "none") return !labels;
  if (!labels) return false;
  if (kind === "any") return true;
  if (kind === "note") return labels.some((label) => label.note);
  return labels.some((label) => label.granularity === Number(kind));
}

/**
 * @typedef {{rows: Uint32Array, counts: {class: number[], flag: Object<string, number>, label: Object<string, number>, dead: number},
 *   bars: Object<string, Uint32Array>, labels: Map<number, Label[]>}} Result
 *   rows: those found, sorted; counts and bars of a filter are under all the others; counts.dead: dead ones
 */

/**
 * Filter, count and sort.
 * @param {Table} table @param {Query} query @param {Site} site @param {Tokens} tokens
 * @param {{setup: string, feature: number, rater: string, granularity: number|null, note: string}[]} labels
 * @returns {Promise<Result>}
 */
export async function search(table, query, site, tokens, labels) {
  const languages = query.lang ? [query.lang] : site.languages;
  /** @type {[string, (row: number) => boolean][]} */
  const filters = [];
  if (query.class.length) {
    const wanted = site.classes.map((name) => query.class.includes(name));
    filters.push(["class", (row) => wanted[table.cls[row]]]);
  }
  for (const flag of query.flag) {
    const values = table.flags[flag.replace("!", "")];
    const wanted = flag.startsWith("!") ? 0 : 1;
    filters.push([`flag ${flag.replace("!", "")}`, (row) => values[row] === wanted]);
  }
  for (const [name, [low, high]] of Object.entries(query.ranges)) {
    const values = table.num[name];
    const [from, to] = [low ?? -Infinity, high ?? Infinity];
    filters.push([`range ${name}`, (row) => values[row] >= from && values[row] <= to]);
  }
  const byRow = labelsOf(table, labels, query.rater);
  const kind = query.label || (query.rater && "any");
  if (kind) filters.push(["label", (row) => isLabelled(byRow.get(row), kind)]);
  for (const name of /** @type {const} */ (["token", "text", "q"])) {
    const needle = folded(query[name].trim());
    if (!needle) continue;
    const hits = name === "text" ? null : byToken(table, tokens, needle, languages);
    const more = name === "token" ? null : await byText(table, needle, languages);
    filters.push([name, (row) => hits?.[row] === 1 || more?.[row] === 1]);
  }

  const flagNames = Object.keys(FLAGS);
  const rangeNames = Object.keys(RANGES);
  const counts = {
    class: site.classes.map(() => 0),
    flag: /** @type {Object<string, number>} */ (
      Object.fromEntries(
        flagNames.flatMap((name) => [
          [name, 0],
          [`!${name}`, 0],
        ]),
      )
    ),
    label: /** @type {Object<string, number>} */ (Object.fromEntries(LABELS.map((name) => [name, 0]))),
    dead: 0,
  };
  const bars = Object.fromEntries(rangeNames.map((name) => [name, new Uint32Array(BINS)]));
  const found = new Uint32Array(table.n);
  let n = 0;
  const dead = site.classes.indexOf("dead");
  const alive = aliveOf(query);
  for (let row = 0; row < table.n; row++) {
    let failed = "";
    let fails = 0;
    for (const [name, passes] of filters) {
      if (passes(row)) continue;
      failed = name;
      if (++fails > 1) break;
    }
    if (fails > 1) continue;
    const hidden = alive !== "all" && table.alive[row] !== Number(alive);
    // To choose the class "dead" is to show dead features, unless the address says otherwise.
    if ((!fails || failed === "class") && (!hidden || (table.cls[row] === dead && !query.alive))) counts.class[table.cls[row]]++;
    if (!fails && !table.alive[row]) counts.dead++;
    if (hidden) continue;
    if (fails === 0) found[n++] = row;
    if (!fails || failed === "label") {
      const labelled = byRow.get(row);
      if (!labelled) counts.label.none++;
      else for (const kind of LABELS) if (isLabelled(labelled, kind)) counts.label[kind]++;
    }
    for (const name of flagNames) {
      const value = table.flags[name][row];
      if (value >= 0 && (!fails || failed === `flag ${name}`)) counts.flag[value ? name : `!${name}`]++;
    }
    for (const name of rangeNames) {
      if (fails && failed !== `range ${name}`) continue;
      const at = table.bins[name][row];
      if (at !== NONE) bars[name][at]++;
    }
  }
  const rows = found.slice(0, n);
  sort(rows, table, query.sort, byRow);
  return { rows, counts, bars, labels: byRow };
}

/** Sort rows in place; unknown values come last, ties keep the order of setups and features. @param {Uint32Array} rows @param {Table} table @param {string} by @param {Map<number, Label[]>} labels */
function sort(rows, table, by, labels) {
  const name = by.replace(/^-/, "");
  if (!name) return;
  const sign = by.startsWith("-") ? -1 : 1;
  const key = sortKey(table, name, labels);
  // Ties of a descending order are in rising order too, so that a list and its reverse differ in them.
  rows.sort((a, b) => {
    const [x, y] = [key[a], key[b]];
    if (x === y) return a - b;
    if (Number.isNaN(x)) return Number.isNaN(y) ? a - b : 1;
    if (Number.isNaN(y)) return -1;
    return sign * (x - y);
  });
}

/** @param {Table} table @param {string} name @param {Map<number, Label[]>} labels @returns {ArrayLike<number>} */
function sortKey(table, name, labels) {
  if (name in table.num) return table.num[name];
  if (name === "feature") return table.feature;
  if (name === "class") return table.cls;
  const keys = new Float64Array(table.n).fill(NaN);
  if (name === "label") {
    for (const [row, some] of labels) keys[row] = Math.max(...some.map((label) => label.granularity ?? 0));
    return keys;
  }
  const names = [...new Set(table.setups.map((setup) => setup.name))].sort();
  for (const [number, setup] of table.setups.entries()) {
    const at = table.first[number];
    const whole = /** @type {Object<string, number>} */ ({
      setup: number,
      model: names.indexOf(setup.name),
      step: setup.step,
      layer: setup.layer,
    })[name];
    if (whole === undefined) copy(table.lists[number].columns[name], keys, at);
    else keys.fill(whole, at, at + setup.n_features);
  }
  return keys;
}
