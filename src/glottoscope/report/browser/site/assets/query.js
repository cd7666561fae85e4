// The query of find.html: one table of parameters, read from an address and written back; also which setups it means.
import { encode } from "./ui.js";

/**
 * @typedef {"model"|"control"|"step"|"layer"|"lm_seed"|"seed"} Scope
 * @typedef {{scope: Partial<Record<Scope, "all"|string[]>>, class: string[], flag: string[], alive: ""|"1"|"0"|"all",
 *   ranges: Object<string, [number|null, number|null]>, token: string, text: string, q: string, lang: string, label: string,
 *   rater: string, sort: string, page: number, per: number}} Query
 * @typedef {import("./data.js").Setup} Setup
 * @typedef {import("./data.js").Site} Site
 */

/** Parameters that choose setups: the field of a setup, and its name on the page. @type {Record<Scope, {field: keyof Setup, words: string}>} */
export const SCOPES = {
  model: { field: "name", words: "Model" },
  control: { field: "control", words: "Control" },
  step: { field: "step", words: "Step" },
  layer: { field: "layer", words: "Layer" },
  lm_seed: { field: "lm_seed", words: "LM seed" },
  seed: { field: "sae_seed", words: "SAE seed" },
};

/** Parameters that are ranges: the column of a list, its name on the page, and whether its bars are over the logarithm. */
export const RANGES = /** @type {Object<string, {column: string, words: string, log?: boolean}>} */ ({
  R: { column: "monosemanticity", words: "R (monosemanticity)" },
  coherence: { column: "coherence", words: "Coherence" },
  phi: { column: "phi", words: "Phi" },
  density: { column: "density", words: "Density", log: true },
  hidden: { column: "monosemanticity_hidden", words: "R in hidden states" },
  share: { column: "share", words: "Language share" },
  max: { column: "max_activation", words: "Maximum activation" },
  positions: { column: "n_positions", words: "Positions", log: true },
});

export const FLAGS = /** @type {Object<string, string>} */ ({
  bilingual: "bilingual",
  bilingual_paper: "bilingual (paper's rule)",
  supportable: "supportable",
  single_token: "single token",
});

export const LABELS = ["1", "2", "3", "4", "any", "none", "note"];

/** What rows can be sorted by in the page's menu; the empty name is the order of the setups, then of the features. */
export const SORTS = /** @type {Object<string, string>} */ ({
  feature: "feature number",
  class: "class",
  model: "model",
  step: "step",
  layer: "layer",
  ...Object.fromEntries(Object.entries(RANGES).map(([name, { words }]) => [name, words])),
  label: "label",
});
/** Columns of a list by which an address may sort too. */
const MORE_SORTS = [
  "setup",
  "h_token",
  "h_semantic",
  "phi_null",
  "n_pairs_a",
  "n_pairs_b",
  "granularity",
  "examples",
  ...Object.values(RANGES).map(({ column }) => column),
];

const NUMBER = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i;
export const PER = 50;
const MOST_PER = 1000;

/** @returns {Query} */
const empty = () => ({
  scope: {},
  class: [],
  flag: [],
  alive: "",
  ranges: {},
  token: "",
  text: "",
  q: "",
  lang: "",
  label: "",
  rater: "",
  sort: "",
  page: 1,
  per: PER,
});

/** @param {string} value */
const items = (value) => [
  ...new Set(
    value
      .split(",")
      .map((item) => item.trim())
      .filter(Boolean),
  ),
];

/**
 * A range as "0.2..0.8", "0.5.." or "..0.2"; null where it is none.
 * @param {string} value @returns {[number|null, number|null]|null}
 */
export function parseRange(value) {
  const ends = value.split("..");
  if (ends.length !== 2) return null;
  const [low, high] = ends.map((end) => end.trim());
  if ((low && !NUMBER.test(low)) || (high && !NUMBER.test(high)) || (!low && !high)) return null;
  const range = /** @type {[number|null, number|null]} */ ([low ? Number(low) : null, high ? Number(high) : null]);
  return range[0] !== null && range[1] !== null && range[0] > range[1] ? null : range;
}

/**
 * Read a query; what cannot be read is left out and named.
 * @param {string|URLSearchParams} search @param {Site} site
 * @returns {{query: Query, problems: string[]}}
 */
export function parse(search, site) {
  const query = empty();
  /** @type {string[]} */
  const problems = [];
  const some = (/** @type {string} */ name, /** @type {string[]} */ given, /** @type {string[]} */ known) =>
    given.filter((item) => {
      if (!known.includes(item)) problems.push(`${name}=${item} is unknown: choose from ${known.join(", ")}.`);
      return known.includes(item);
    });
  // A parameter that is repeated counts as its last.
  for (const [name, given] of new Map(new URLSearchParams(search))) {
    const value = given.trim();
    if (value === "") continue;
    if (name in SCOPES) {
      const scope = /** @type {Scope} */ (name);
      if (value === "all") query.scope[scope] = "all";
      else {
        const chosen = items(value).filter((item) => {
          const fine = scope === "model" || scope === "control" || /^\d{1,15}$/.test(item);
          if (!fine) problems.push(`${name}=${item} is not a whole number, or all.`);
          return fine;
        });
        if (chosen.length)
          query.scope[scope] = scope === "model" || scope === "control" ? chosen : chosen.map((item) => String(Number(item)));
      }
    } else if (name in RANGES) {
      const range = parseRange(value);
      if (range) query.ranges[name] = range;
      else problems.push(`${name}=${value} is not a range like 0.2..0.8.`);
    } else if (name === "class") query.class = some(name, items(value), site.classes);
    else if (name === "flag")
      query.flag = some(
        name,
        items(value),
        Object.keys(FLAGS).flatMap((flag) => [flag, `!${flag}`]),
      );
    else if (name === "label") query.label = some(name, [value], LABELS)[0] ?? "";
    else if (name === "lang") query.lang = some(name, [value], site.languages)[0] ?? "";
    else if (name === "alive") query.alive = /** @type {any} */ (some(name, [value], ["1", "0", "all"])[0] ?? "");
    else if (name === "sort")
      query.sort = some(name, [value.replace(/^-/, "")], [...Object.keys(SORTS), ...MORE_SORTS]).length ? value : "";
    else if (name === "page" || name === "per") {
      if (/^0*[1-9]\d{0,8}$/.test(value)) query[name] = name === "per" ? Math.min(MOST_PER, Number(value)) : Number(value);
      else problems.push(`${name}=${value} is not a whole number above 0.`);
    } else if (name === "q" || name === "token" || name === "text" || name === "rater") query[name] = value;
    else problems.push(`${name} is not a parameter of this page.`);
  }
  return { query, problems };
}

/** The query as the part of an address after "?"; defaults are left out. @param {Query} query */
export function serialise(query) {
  /** @type {[string, string][]} */
  const parts = [];
  const put = (/** @type {string} */ name, /** @type {string} */ value) => value && parts.push([name, value]);
  for (const name of /** @type {Scope[]} */ (Object.keys(SCOPES))) {
    const value = query.scope[name];
    if (value) put(name, value === "all" ? "all" : value.join(","));
  }
  put("q", query.q);
  put("lang", query.lang);
  put("class", query.class.join(","));
  put("flag", query.flag.join(","));
  put("alive", query.alive);
  for (const name of Object.keys(RANGES)) {
    const range = query.ranges[name];
    if (range) put(name, `${range[0] ?? ""}..${range[1] ?? ""}`);
  }
  put("token", query.token);
  put("text", query.text);
  put("label", query.label);
  put("rater", query.rater);
  put("sort", query.sort);
  if (query.page > 1) put("page", String(query.page));
  if (query.per !== PER) put("per", String(query.per));
  return parts.map(([name, value]) => `${name}=${encode(value)}`).join("&");
}

/** Values that a scope can have, in the order of the setups (numbers rising). @param {Site} site @param {Scope} scope */
export function scopeValues(site, scope) {
  const values = [...new Set(site.setups.map((setup) => setup[SCOPES[scope].field]))];
  if (typeof values[0] === "number") values.sort((a, b) => Number(a) - Number(b));
  return values.map(String);
}

/** Whether dead features, alive ones, or both are meant: who asks for the class "dead" wants to see them. @param {Query} query @returns {"1"|"0"|"all"} */
export const aliveOf = (query) => query.alive || (query.class.includes("dead") ? "all" : "1");

/**
 * The setups that a query means, in the order of the site. What it does not name is the main model; the trained one, where
 * the models named have one; and of each model the last step, the middle layer and the first seeds.
 * @param {Query} query @param {Site} site
 * @returns {Setup[]}
 */
export function setupsOf(query, site) {
  const { scope } = query;
  const main =
    site.default?.model ??
    site.setups.reduce((best, setup) => (setup.n_params >= best.n_params ? setup : best), site.setups[0]).name;
  const model = scope.model ?? [main];
  let setups = site.setups.filter((setup) => model === "all" || model.includes(setup.name));
  const control = scope.control ?? (setups.some((setup) => setup.control === "none") ? ["none"] : "all");
  const first = (/** @type {Setup} */ setup, /** @type {"lm_seed"|"sae_seed"} */ field, /** @type {"name"|"model"} */ of) =>
    setup[field] === Math.min(...site.setups.filter((other) => other[of] === setup[of]).map((other) => other[field]));
  const defaults = /** @type {Object<string, (setup: Setup) => boolean>} */ ({
    step: (setup) => setup.final,
    layer: (setup) => setup.middle ?? true,
    lm_seed: (setup) => first(setup, "lm_seed", "name"),
    seed: (setup) => first(setup, "sae_seed", "model"),
  });
  setups = setups.filter((setup) => control === "all" || control.includes(setup.control));
  for (const name of /** @type {Scope[]} */ (Object.keys(defaults))) {
    const values = scope[name];
    if (values === undefined) setups = setups.filter(defaults[name]);
    else if (values !== "all") setups = setups.filter((setup) => values.includes(String(setup[SCOPES[name].field])));
  }
  return setups;
}

/**
 * A query with another choice of setups. Where the choice and what stands beside it have nothing in common, what stands
 * beside it gives way: the control whose model is another one brings that model.
 * @param {Query} query @param {Site} site @param {Scope} scope @param {"all"|string[]|undefined} value
 * @returns {Query}
 */
export function chosen(query, site, scope, value) {
  const next = { ...query, page: 1, scope: { ...query.scope } };
  if (value === undefined || value.length === 0) delete next.scope[scope];
  else next.scope[scope] = value;
  const { field } = SCOPES[scope];
  const holds = () => {
    const setups = setupsOf(next, site);
    return (
      setups.length > 0 &&
      (value === undefined || value === "all" || value.every((one) => setups.some((setup) => String(setup[field]) === one)))
    );
  };
  if (holds() || !Array.isArray(value)) return next;
  if (scope === "control") {
    const setups = site.setups.filter((setup) => value.includes(setup.control));
    const kept =
      query.scope.model === "all" ? [] : (query.scope.model ?? []).filter((name) => setups.some((setup) => setup.name === name));
    const main = setups.some((setup) => setup.name === site.default?.model)
      ? undefined
      : setups.reduce((best, setup) => (setup.n_params > best.n_params ? setup : best), setups[0]).name;
    if (kept.length || main) next.scope.model = kept.length ? kept : [/** @type {string} */ (main)];
    else delete next.scope.model;
    if (holds()) return next;
  }
  for (const other of /** @type {Scope[]} */ (["control", "lm_seed", "seed", "layer", "step"])) {
    if (other === scope) continue;
    delete next.scope[other];
    if (holds()) break;
  }
  return next;
}
