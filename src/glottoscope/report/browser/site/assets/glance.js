// A feature at a glance, as the columns of the page Compare show it: class, three measures, top tokens, a few examples.
import { block, feature as loadFeature, list, site as loadSite, siteNow } from "./data.js";
import { levels, shaded } from "./text.js";
import { chip, classBadge, fail, featureAddress, fill, format, h, languageName, measureOf } from "./ui.js";

/**
 * @typedef {import("./data.js").Setup} Setup
 * @typedef {{setup: Setup, f: number, columns: Object<string, (number|null)[]>, top: Object<string, number[][]>, record: any}} Feature
 */

const TOKENS = 6;
const EXAMPLES = 2;
const AROUND = 14; // tokens kept on each side of an example's strongest one
const SHORT = /** @type {Object<string, string>} */ ({ monosemanticity: "R", coherence: "coherence", phi: "phi" });

/** All that is known of a feature. @param {Setup} setup @param {number} f @returns {Promise<Feature>} */
export async function glimpse(setup, f) {
  await loadSite();
  const [{ columns, top }, record] = await Promise.all([list(setup.id), loadFeature(setup.id, f)]);
  return { setup, f, columns, top: top ?? {}, record };
}

/** A feature's number; null where it is unknown. @param {Feature} feature @param {string} name */
export const numberOf = (feature, name) => feature.columns[name]?.[feature.f] ?? null;

/** @param {Feature} feature */
export const classOf = (feature) => siteNow()?.classes[numberOf(feature, "class") ?? -1] ?? "unclassified";

/** @param {Feature} feature */
export const isBilingual = (feature) => numberOf(feature, "bilingual") === 1;

/** @param {Feature} feature */
export const badge = (feature) => classBadge(classOf(feature), isBilingual(feature));

/** @param {Feature} feature @param {string} [words] */
export const link = (feature, words = `feature ${feature.f}`) => h("a", { href: featureAddress(feature.setup.id, feature.f) }, words);

/** Top tokens of a feature in a language. @param {Feature} feature @param {string} language @param {number} [most] */
export function tokenChips(feature, language, most = TOKENS) {
  const entries = feature.record.tokens?.[language] ?? (feature.top[language]?.[feature.f] ?? []).map((/** @type {number} */ rank) => [rank, null]);
  if (!entries.length) return null;
  return h("span", { class: "chips" }, entries.slice(0, most).map((/** @type {[number, number|null]} */ [rank, count]) => chip(rank, { lang: language, count })));
}

/** One example, cut around its strongest token. @param {Feature} feature @param {number} i */
async function example(feature, i) {
  const all = feature.record.examples;
  const { ranks } = await block(all.block[i]);
  const start = all.start[i];
  const length = Array.isArray(all.length) ? all.length[i] : all.length;
  const strength = levels(all.on[i], length);
  const peak = all.at[i] - start;
  const [from, to] = [Math.max(0, peak - AROUND), Math.min(length, peak + AROUND + 1)];
  const language = siteNow()?.languages[all.language[i]] ?? "";
  return h("li", { "data-language": language }, shaded({ ranks: ranks.slice(start + from, start + to), levels: strength.slice(from, to), peak: peak - from, lang: language, max: numberOf(feature, "max_activation") }));
}

/**
 * Tokens and examples of each language, as far as there are any. @param {Feature} feature @param {{examples?: number, level?: string}} [what] level: tag of the headings
 * @returns {HTMLElement[]}
 */
export function evidence(feature, { examples = EXAMPLES, level = "h4" } = {}) {
  const languages = siteNow()?.languages ?? [];
  const all = feature.record.examples;
  return languages.map((language, n) => {
    const mine = all ? Array.from(all.block.keys()).filter((i) => all.language[i] === n).slice(0, examples) : [];
    const chips = tokenChips(feature, language);
    const items = h("ol", { class: "glances" });
    Promise.all(mine.map((i) => example(feature, i))).then((made) => fill(items, made), (error) => fail(error, items.parentElement ?? undefined));
    return h("div", { class: "evidence", "data-language": language }, h(level, null, languageName(language)), chips, mine.length ? items : h("p", { class: "soft small" }, chips ? "no example kept" : `no ${languageName(language)} text`));
  });
}

/** The three measures that a column has room for. @param {Feature} feature */
export const shortMeasures = (feature) =>
  h("dl", { class: "short" }, Object.entries(SHORT).filter(([name]) => feature.columns[name]).map(([name, words]) => h("div", { title: measureOf(name)?.meaning }, h("dt", null, words), h("dd", { class: "num", "data-measure": name }, format(name, numberOf(feature, name))))));

/**
 * What chance gives: sqrt(2 ln n / d) bounds the expected largest of n cosines with random directions in d dimensions, as each
 * is sub-Gaussian with variance 1 / d.
 * @param {Setup} setup where the counterpart was looked for
 */
export const byChance = (setup) => Math.min(1, Math.sqrt((2 * Math.log(Math.max(2, setup.n_alive))) / setup.d_model));

/** A cosine as text. @param {number} value */
export const cosine = (value) => value.toFixed(2).replace("-", "−");
