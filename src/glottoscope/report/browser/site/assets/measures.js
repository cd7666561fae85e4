// A feature's class and measures in words.
import { format, h, languageName, measureOf, className, put } from "./ui.js";

/** @typedef {import("./data.js").Site} Site */
/** @typedef {{f: number, columns: Object<string, (number|null)[]>}} Shown */

/** Measures of a feature in the order of the page; those that the study lacks are left out. */
const ORDER = [
  "share",
  "monosemanticity",
  "monosemanticity_hidden",
  "coherence",
  "coherence_token",
  "phi",
  "phi_null",
  "density",
  "max_activation",
  "n_positions",
  "n_neutral",
  "h_token",
  "h_semantic",
  "n_pairs_a",
  "n_pairs_b",
];

/** @param {Shown} now @param {string} name */
const of = ({ columns, f }, name) => columns[name]?.[f] ?? null;

/** @param {number|null} share */
const percent = (share) => (share === null ? "?" : `${Math.round(100 * share)}`);

/** The class in words. @param {Shown} now @param {Site} index */
export function classSentence(now, index) {
  const cls = index.classes[of(now, "class") ?? -1] ?? "unclassified";
  const [share, low, high] = [of(now, "share"), of(now, "share_low"), of(now, "share_high")];
  const n = (of(now, "n_positions") ?? 0).toLocaleString("en");
  const interval = `${percent(share)} %${low === null ? "" : ` [${percent(low)}–${percent(high)}]`}`;
  if (index.languages.includes(cls)) return `${languageName(cls)}: ${interval} of its positions (weighted by exposure).`;
  const counts = index.languages
    .map((language) => `${(of(now, `n_${language}`) ?? 0).toLocaleString("en")} ${languageName(language)}`)
    .join(", ");
  if (cls === "mixed")
    return `Mixed: no language has more than ${interval} of its positions (weighted by exposure); a language needs more than ${percent(index.thresholds.language_share ?? null)} %. Positions: ${counts}.`;
  if (cls === "neutral")
    return `Neutral: ${(of(now, "n_neutral") ?? 0).toLocaleString("en")} of its ${n} positions are tokens of no language, as digits and punctuation.`;
  if (cls === "dead") return "Dead: never active on the test text.";
  if (cls === "unclassified")
    return `Unclassified: ${n} counted ${n === "1" ? "position is" : "positions are"} too few to say (${counts}).`;
  return className(cls);
}

/** What one should know before reading the numbers. @param {Shown} now @param {Site} index @returns {HTMLElement|null} */
export function notable(now, index) {
  const lines = [];
  const cls = index.classes[of(now, "class") ?? -1];
  const [a, b] = index.languages.map(languageName);
  const [phi, none] = [of(now, "phi"), of(now, "phi_null")];
  const sentences = `${(of(now, "n_pairs_a") ?? 0).toLocaleString("en")} ${a} and ${(of(now, "n_pairs_b") ?? 0).toLocaleString("en")} ${b} aligned sentences`;
  const threshold = format("phi", index.thresholds.phi ?? null);
  if (of(now, "single_token"))
    lines.push("A single-token feature: all its counted positions hold one token. R is then 1 by definition and says nothing.");
  if (of(now, "n_pairs_a") === null) lines.push("Bilingual or not is unknown: the study has no aligned sentences.");
  else if (phi === null) lines.push(`Phi is undefined: it fires in ${sentences}, none or all of a side.`);
  else {
    const above = phi - (none ?? 0);
    const words = `phi ${format("phi", phi)} is ${format("phi", above)} above what wrong pairs of like length give (${format("phi", none)}); the threshold is ${threshold}`;
    if (of(now, "bilingual")) lines.push(`Bilingual: ${words}. It fires in ${sentences}.`);
    else if (of(now, "supportable") === 0)
      lines.push(`Phi cannot decide: it fires in ${sentences}, and ${index.thresholds.min_firings ?? 10} of each are needed.`);
    else if (cls === "mixed") lines.push(`Mixed, but not bilingual: ${words}. It fires in ${sentences}.`);
    else if (above >= (index.thresholds.phi ?? 1))
      lines.push(`It fires in sentences and their translations (${words}), though its class is not mixed.`);
  }
  if (of(now, "bilingual_paper"))
    lines.push(
      `Bilingual by the paper's reading: mixed, and R is at least ${format("monosemanticity", index.thresholds.monosemanticity ?? null)}.`,
    );
  if (of(now, "coherence") === null && "coherence" in now.columns)
    lines.push("Coherence is unknown: it needs ten counted positions.");
  return lines.length
    ? h(
        "ul",
        { id: "notable" },
        lines.map((line) => h("li", null, line)),
      )
    : null;
}

/** All measures: name, number, and what it means. @param {Shown} now @param {Site} index @returns {HTMLElement} */
export function measureList(now, index) {
  const languages = index.languages.map((language) => `n_${language}`);
  const names = [...ORDER.slice(0, 10), ...languages, ...ORDER.slice(10)].filter((name) => name in now.columns);
  const list = h("dl", { class: "measures" });
  for (const name of names) {
    const known = measureOf(name);
    const label =
      known?.label ??
      (name.startsWith("n_") && index.languages.includes(name.slice(2))
        ? `${languageName(name.slice(2))} positions`
        : name.replaceAll("_", " "));
    const number = format(name, of(now, name));
    const interval =
      name === "share" && of(now, "share_low") !== null
        ? ` [${format(name, of(now, "share_low"))}–${format(name, of(now, "share_high"))}]`
        : "";
    put(
      list,
      h(
        "div",
        { "data-measure": name },
        h("dt", null, label),
        h(
          "dd",
          { class: "num" },
          number === "–" ? h("span", null, "unknown") : number,
          interval ? h("small", null, interval) : null,
        ),
        known?.meaning ? h("dd", { class: "meaning" }, known.meaning) : null,
      ),
    );
  }
  return list;
}
