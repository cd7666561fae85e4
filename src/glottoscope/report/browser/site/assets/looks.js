// The measures of setups: how they are grouped, named and drawn, and which list of features stands behind a value.
import { setupsOf } from "./query.js";
import { encode, languageName, measureOf } from "./ui.js";

/**
 * @typedef {import("./data.js").Setup} Setup
 * @typedef {import("./data.js").Site} Site
 * @typedef {{value: (number|null)[], low?: (number|null)[], high?: (number|null)[]}} Column
 * @typedef {{label: string, colour: string, ink: string, symbol: string, dash?: string, thin?: boolean}} Look
 *   colour of lines and points, ink of words
 * @typedef {{name: string, label: string, measures: string[], head: string}} Bundle
 *   several measures in one figure; head: the one that controls are drawn for
 */

/** @param {string} colour @param {string} [ink] names of CSS variables */
const hue = (colour, ink = colour) => ({ colour: `var(--${colour})`, ink: `var(--${ink})` });

const SYMBOLS = ["square", "triangle", "diamond", "star", "plus"];

/** @type {Object<string, Look>} */
const LOOKS = {
  share_mixed: { label: "mixed", ...hue("mixed", "mixed-ink"), symbol: "circle", dash: "6 2" },
  share_bilingual: { label: "bilingual", ...hue("bilingual", "bilingual-ink"), symbol: "diamond" },
  share_bilingual_paper: { label: "bilingual, paper’s rule", ...hue("paper-rule", "paper-rule-ink"), symbol: "times", dash: "6 2 1.5 2", thin: true },
  share_supportable: { label: "supportable", ...hue("lang-3", "lang-3-ink"), symbol: "wye" },
  share_neutral: { label: "neutral", ...hue("neutral", "soft"), symbol: "asterisk", dash: "2 2", thin: true },
  share_unclassified: { label: "unclassified", ...hue("unclassified", "soft"), symbol: "plus", dash: "1.5 3", thin: true },
  monosemanticity: { label: "monosemanticity R", ...hue("monosemanticity", "text"), symbol: "circle" },
  monosemanticity_multi: { label: "R, no single-token features", ...hue("lang-2", "lang-2-ink"), symbol: "square" },
  monosemanticity_pooled: { label: "R, pooled", ...hue("lang-1", "lang-1-ink"), symbol: "triangle" },
  monosemanticity_hidden: { label: "R, hidden states", ...hue("lang-3", "lang-3-ink"), symbol: "diamond2" },
  monosemanticity_floor_shuffled: { label: "R floor, shuffled", ...hue("faint", "soft"), symbol: "times", dash: "4 3", thin: true },
  monosemanticity_floor_random: { label: "R floor, random", ...hue("faint", "soft"), symbol: "plus", dash: "1.5 3", thin: true },
  coherence: { label: "coherence", ...hue("coherence", "control-ink"), symbol: "triangle" },
  coherence_floor_shuffled: { label: "coherence floor", ...hue("coherence", "control-ink"), symbol: "times", dash: "4 3", thin: true },
  alignment: { label: "alignment, no SAE", ...hue("alignment", "lang-2-ink"), symbol: "square", dash: "6 2 1.5 2" },
  fvu: { label: "FVU", ...hue("lang-1", "lang-1-ink"), symbol: "circle" },
  alive: { label: "alive", ...hue("bilingual", "bilingual-ink"), symbol: "triangle" },
};

// Symbols and dashes repeat what the colours say.
/** @type {Omit<Look, "label">[]} */
const MODELS = [
  { ...hue("text"), symbol: "circle" },
  { ...hue("lang-3", "lang-3-ink"), symbol: "square", dash: "7 2" },
  { ...hue("lang-2", "lang-2-ink"), symbol: "triangle", dash: "3 2" },
  { ...hue("bilingual", "bilingual-ink"), symbol: "diamond", dash: "7 2 1.5 2" },
  { ...hue("lang-1", "lang-1-ink"), symbol: "times", dash: "1.5 2.5" },
];

/** Look of the nth model of a figure. @param {number} n @returns {Omit<Look, "label">} */
export const modelLook = (n) => MODELS[n % MODELS.length];

/** Look of a control's line. @returns {Omit<Look, "label">} */
export const controlLook = () => ({ ...hue("control", "control-ink"), symbol: "star", dash: "1.5 3", thin: true });

/** @param {string} name @param {Site} site @returns {Look} */
export function look(name, site) {
  if (name in LOOKS) return LOOKS[name];
  const language = site.languages.findIndex((code) => name.endsWith(`_${code}`));
  if (language < 0) return { label: labelOf(name), ...hue("text"), symbol: "circle" };
  const code = site.languages[language];
  const isNamed = name === `share_${code}` || name === `lm_loss_${code}`;
  return { label: isNamed ? languageName(code) : labelOf(name), ...hue(`lang-${language % 5}`, `lang-${language % 5}-ink`), symbol: SYMBOLS[language % SYMBOLS.length] };
}

/** What a measure is called. @param {string} name */
export const labelOf = (name) => measureOf(name)?.label ?? name.replaceAll("_", " ");

/** What a setup's value means. @param {string} name */
export function meaningOf(name) {
  const known = /** @type {any} */ (measureOf(name));
  return known?.setup_meaning ?? known?.meaning ?? "";
}

/** Measures that are not null everywhere. @param {{measures: Object<string, Column>}} overview */
export const measured = (overview) => Object.keys(overview.measures).filter((name) => overview.measures[name].value.some((value) => value !== null));

/**
 * Groups of measures, in the order in which they are offered. @param {Site} site @param {string[]} names
 * @returns {[string, string[]][]}
 */
export function groups(site, names) {
  const ends = (/** @type {string} */ stem) => site.languages.map((code) => `${stem}_${code}`);
  const quality = ["alive", "fvu", "cosine", "l0", ...ends("fvu"), ...ends("lm_loss")];
  /** @type {[string, (name: string) => boolean][]} */
  const kinds = [
    ["Class shares", (name) => name.startsWith("share_")],
    ["Monosemanticity", (name) => name.startsWith("monosemanticity")],
    ["Coherence", (name) => name.startsWith("coherence")],
    ["Alignment of languages (no SAE)", (name) => name.startsWith("alignment")],
    ["Quality", (name) => quality.includes(name)],
    ["Other", () => true],
  ];
  /** @type {[string, string[]][]} */
  const found = kinds.map(([label]) => [label, []]);
  for (const name of names) found[kinds.findIndex(([, holds]) => holds(name))][1].push(name);
  const order = [...ends("share"), ...Object.keys(LOOKS)];
  const rank = (/** @type {string} */ name) => (order.includes(name) ? order.indexOf(name) : order.length);
  for (const [, some] of found) some.sort((a, b) => rank(a) - rank(b));
  return found.filter(([, some]) => some.length);
}

/** Figures of several measures that the study has. @param {Site} site @param {string[]} names @returns {Bundle[]} */
export function bundles(site, names) {
  const all = [
    {
      name: "classes",
      label: "Class shares",
      head: names.includes("share_bilingual") ? "share_bilingual" : "share_mixed",
      measures: [...site.languages.map((code) => `share_${code}`), "share_mixed", "share_bilingual", "share_bilingual_paper"],
    },
    {
      name: "interpretability",
      label: "Interpretability",
      head: "monosemanticity",
      measures: ["monosemanticity", "monosemanticity_hidden", "coherence", "alignment", "monosemanticity_floor_shuffled", "monosemanticity_floor_random", "coherence_floor_shuffled"],
    },
    { name: "loss", label: "Loss of the language model", head: `lm_loss_${site.languages[0]}`, measures: site.languages.map((code) => `lm_loss_${code}`) },
  ];
  return all
    .map((bundle) => ({ ...bundle, measures: bundle.measures.filter((name) => names.includes(name)) }))
    .filter((bundle) => bundle.measures.length > 1)
    .map((bundle) => ({ ...bundle, head: bundle.measures.includes(bundle.head) ? bundle.head : bundle.measures[0] }));
}

/** @type {Object<string, string>} */
const BEHIND = {
  share_bilingual: "flag=bilingual&sort=-phi",
  share_bilingual_paper: "flag=bilingual_paper&sort=-R",
  share_supportable: "flag=supportable&sort=-phi",
  monosemanticity: "sort=-R",
  monosemanticity_multi: "flag=!single_token&sort=-R",
  monosemanticity_pooled: "sort=-R",
  monosemanticity_hidden: "sort=-hidden",
  coherence: "sort=-coherence",
  coherence_token: "sort=-coherence",
  alignment: "sort=-phi",
};

/**
 * Address of the list of the features behind a setup's value.
 * @param {Site} site @param {Setup} setup @param {string} [name] the measure
 */
export function findAddress(site, setup, name = "") {
  const scope = { model: setup.name, control: setup.control, step: setup.step, layer: setup.layer, lm_seed: setup.lm_seed, seed: setup.sae_seed };
  const cls = name.startsWith("share_") ? name.slice(6) : "";
  const filter = BEHIND[name] ?? (site.classes.includes(cls) ? `class=${cls}` : "");
  const where = Object.entries(scope).map(([key, value]) => `${key}=${encode(value)}`);
  return `find.html?${[...where, filter].filter(Boolean).join("&")}`;
}

/** The setup that a page shows first: main model, no control, last step, middle layer, first seeds. @param {Site} site @returns {Setup} */
export function firstSetup(site) {
  const blank = /** @type {import("./query.js").Query} */ ({ scope: {} });
  return setupsOf(blank, site)[0] ?? site.setups[0];
}

/** A model's middle layer: the one that the study names, else the nearest to half of the deepest. @param {Setup[]} setups of the model */
export function middleLayer(setups) {
  const named = setups.find((setup) => setup.middle);
  if (named) return named.layer;
  const half = Math.max(...setups.map((setup) => setup.layer)) / 2;
  return setups.reduce((best, setup) => (Math.abs(setup.layer - half) < Math.abs(best - half) ? setup.layer : best), setups[0].layer);
}
