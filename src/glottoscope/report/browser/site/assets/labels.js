// labels.html: what people said of the features, how far they agree, and how far the measures agree with them.
import { styled } from "./charts.js";
import { labels as loadLabels, live, setupById, site as loadSite } from "./data.js";
import { labelOf, meaningOf } from "./looks.js";
import { visible } from "./text.js";
import { encode, fail, featureAddress, fill, h, page, setupWords } from "./ui.js";

/**
 * @typedef {{setup: string, feature: number, rater: string, granularity: number|null, note: string, time: string, blind: boolean}} Label
 * @typedef {Object<string, any>} Pair  agreement of two raters
 */

const FIRST = 100; // rows shown before one asks for more
const GRADES = ["1", "2", "3", "4"];

const count = (/** @type {number} */ n) => n.toLocaleString("en");
const many = (/** @type {number} */ n, /** @type {string} */ word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
const two = (/** @type {number} */ value) => value.toFixed(2).replace("-", "−");

/** A value with its interval. @param {number|null|undefined} value @param {number|null|undefined} low @param {number|null|undefined} high */
const interval = (value, low, high) => (value === null || value === undefined ? "undefined" : two(value) + (low === null || low === undefined || high === null || high === undefined ? "" : ` (${two(low)} to ${two(high)})`));

/** @param {string|HTMLElement} caption @param {(string|HTMLElement)[]} head @param {HTMLElement[]} rows @param {string} name @param {Object<string, any>} [more] */
const table = (caption, head, rows, name, more = {}) =>
  h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, h("table", more, h("caption", null, caption), h("thead", null, h("tr", null, head.map((cell) => h("th", { scope: "col" }, cell)))), h("tbody", null, rows)));

/** @param {boolean} served */
const how = (served) =>
  h(
    "div",
    { id: "how" },
    h("p", null, served ? "Open a feature and press 1, 2, 3 or 4, or choose a grade under “Label”. A whole sample, in random order and without class, measures or step:" : "To make labels, run one of these beside the run directory, and export the site again:"),
    h("pre", null, h("code", null, served ? "glottoscope label RUN --sample 100 --blind" : "glottoscope browse RUN\nglottoscope label RUN --sample 100 --blind")),
    h("p", { class: "caption" }, "Labels are kept beside the run with rater and time; two raters of the same sample show how far the grades can be trusted."),
  );

/** @param {Pair} pair @param {Object<string, string>} names */
function confusion(pair, names) {
  const [a, b] = [visible(pair.a), visible(pair.b)];
  const most = Math.max(1, ...pair.confusion.flat());
  const rows = pair.confusion.map((/** @type {number[]} */ row, /** @type {number} */ i) =>
    h("tr", null, h("th", { scope: "row" }, `${a}: ${i + 1} ${names[i + 1] ?? ""}`), row.map((n, j) => h("td", { class: `num${i === j ? " same" : ""}`, style: `--part: ${Math.round((60 * n) / most)}%` }, n))));
  return table(`Grades of ${a} (rows) and ${b} (columns)`, [`grade of ${a}`, ...GRADES.map((grade) => h("span", { title: names[grade] }, `${b}: ${grade}`))], rows, `Grades of ${a} and ${b}`, { class: "confusion" });
}

/** @param {Pair[]} pairs @param {Object<string, string>} names */
function raters(pairs, names) {
  if (!pairs.length) return h("p", { class: "soft" }, "Agreement between raters needs two raters who graded the same features.");
  return h("div", null, pairs.map((pair) =>
    h(
      "section",
      { class: "pair", "aria-label": `${visible(pair.a)} and ${visible(pair.b)}`, "data-a": pair.a, "data-b": pair.b },
      h("h3", null, h("bdi", null, visible(pair.a)), " and ", h("bdi", null, visible(pair.b))),
      h("p", null, `${many(pair.n, "feature")} graded by both: the same grade for `, h("b", null, `${Math.round(100 * pair.agreement)} %`), ". Cohen’s kappa ", h("b", null, interval(pair.kappa, pair.kappa_low, pair.kappa_high)), ", weighted by distance ", h("b", null, interval(pair.weighted_kappa, pair.weighted_kappa_low, pair.weighted_kappa_high)), "."),
      confusion(pair, names),
    )),
    h("p", { class: "caption" }, "Kappa is agreement beyond chance: 0 is what the raters’ habits alone give, 1 is the same grade always. In brackets a 95 % interval, bootstrap over features."));
}

/** @param {any} row */
function direction(row) {
  if (row.auc === null) return "undefined: all features are of one kind";
  if (row.low !== null && row.high !== null && row.low <= 0.5 && row.high >= 0.5) return "no clear direction";
  return row.auc > 0.5 ? "higher where people say so" : "lower where people say so";
}

/** @param {any[]} measures */
function machines(measures) {
  if (!measures.length) return h("p", { class: "soft" }, "Agreement with the measures needs grades of both kinds: some 1 and some 2 to 4.");
  const questions = [...new Set(measures.map((row) => row.against))];
  return h("div", null, questions.map((question) => {
    const rows = measures.filter((row) => row.against === question).sort((a, b) => Math.abs((b.auc ?? 0.5) - 0.5) - Math.abs((a.auc ?? 0.5) - 0.5));
    return table(`Labelled ${visible(question)}`, ["measure", "AUC", "direction", "features", "labelled so"], rows.map((row) =>
      h("tr", { "data-measure": row.measure }, h("th", { scope: "row", title: meaningOf(row.measure) || null }, labelOf(row.measure)), h("td", { class: "num" }, interval(row.auc, row.low, row.high)), h("td", { class: "words" }, direction(row)), h("td", { class: "num" }, count(row.n)), h("td", { class: "num" }, count(row.n_positive)))), `Measures against ${question}`, { class: "auc" });
  }),
  h("p", { class: "caption" }, "AUC: how often a feature that people labelled so has the larger value than one that they did not, ties counting half. 0.5 is chance, 1 means always larger, 0 always smaller: a measure far below 0.5 tells as much as one far above. In brackets a 95 % interval, bootstrap over features; no clear direction: it holds 0.5."));
}

/** @param {Label} label @param {Object<string, string>} names */
function row(label, names) {
  const setup = setupById(label.setup);
  const where = setup ? [h("a", { href: featureAddress(label.setup, label.feature) }, `feature ${label.feature}`), h("span", { class: "soft block" }, setupWords(setup))] : [`feature ${label.feature}`, h("span", { class: "soft block" }, visible(label.setup), ", not on this site")];
  return h(
    "tr",
    { "data-setup": label.setup, "data-feature": label.feature, "data-rater": label.rater },
    h("th", { scope: "row" }, where),
    h("td", null, label.granularity === null ? h("span", { class: "soft" }, "no grade") : `${label.granularity} ${names[label.granularity] ?? ""}`),
    h("td", { class: "note", dir: "auto" }, visible(label.note)),
    h("td", null, h("bdi", null, visible(label.rater)), label.blind ? h("span", { class: "soft" }, " · blind") : null),
    h("td", { class: "num" }, h("time", { datetime: label.time }, visible(label.time.replace("T", " ").replace(/(:\d\d)Z$/, "")))),
  );
}

async function start() {
  const main = page({ title: "Labels", here: "labels.html" });
  const [, known, session] = await Promise.all([loadSite(), loadLabels(), live(), styled()]);
  const names = known.names ?? {};
  const all = /** @type {Label[]} */ ([...known.labels]).sort((a, b) => b.time.localeCompare(a.time) || a.setup.localeCompare(b.setup) || a.feature - b.feature);
  if (!all.length) {
    fill(main, h("h1", null, "Labels"), h("p", { id: "none" }, "No feature of this run has a label yet."), how(session.live));
    return;
  }
  const everyone = [...new Set(all.map((label) => label.rater))].sort();
  const kinds = /** @type {[string, string][]} */ ([["", "all"], ...GRADES.map((grade) => [grade, `${grade} ${names[grade] ?? ""}`]), ["none", "no grade"], ["note", "with a note"]]);
  const rater = h("select", { id: "rater" }, h("option", { value: "" }, "all"), everyone.map((name) => h("option", { value: name }, visible(name))));
  const grade = h("select", { id: "grade" }, kinds.map(([value, words]) => h("option", { value }, words)));
  const said = h("p", { id: "shown", role: "status" });
  const body = h("tbody", null);
  const more = h("button", { type: "button", id: "more" }, "Show all");
  const holds = (/** @type {Label} */ label) => (!rater.value || label.rater === rater.value) && (!grade.value || (grade.value === "note" ? label.note !== "" : grade.value === "none" ? label.granularity === null : label.granularity === Number(grade.value)));
  const show = (/** @type {number} */ limit) => {
    const some = all.filter(holds);
    fill(said, some.length === all.length ? `${many(all.length, "label")} by ${many(everyone.length, "rater")}` : `${count(some.length)} of ${many(all.length, "label")}`);
    fill(body, some.slice(0, limit).map((label) => row(label, names)));
    more.hidden = some.length <= limit;
    fill(more, `Show all ${count(some.length)}`);
  };
  const read = () => {
    const given = new URLSearchParams(location.search);
    rater.value = everyone.includes(given.get("rater") ?? "") ? given.get("rater") : "";
    grade.value = kinds.some(([value]) => value === given.get("label")) ? given.get("label") : "";
    show(FIRST);
  };
  const changed = () => {
    const parts = [["rater", rater.value], ["label", grade.value]].filter(([, value]) => value).map(([name, value]) => `${name}=${encode(value)}`);
    history.pushState(null, "", parts.length ? `?${parts.join("&")}` : "labels.html");
    show(FIRST);
  };
  rater.addEventListener("change", changed);
  grade.addEventListener("change", changed);
  more.addEventListener("click", () => show(Infinity));
  addEventListener("popstate", read);
  fill(
    main,
    h("h1", null, "Labels"),
    h("section", { id: "agreement", "aria-labelledby": "agreement-title" },
      h("h2", { id: "agreement-title", class: "first" }, "Agreement"),
      h("div", { class: "halves even" }, h("div", { id: "between-raters" }, h("h3", null, "Between raters"), raters(known.agreement?.pairs ?? [], names)), h("div", { id: "with-measures" }, h("h3", null, "With the measures"), machines(known.agreement?.measures ?? [])))),
    h("section", { "aria-labelledby": "all-title" },
      h("h2", { id: "all-title" }, "All labels"),
      h("div", { class: "controls" }, h("label", { for: "rater" }, h("span", null, "Rater"), rater), h("label", { for: "grade" }, h("span", null, "Label"), grade), h("a", { href: "labels.csv", class: "button", id: "csv", download: "labels.csv" }, "labels.csv")),
      said,
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of the labels" }, h("table", { id: "labels", class: "labels" }, h("thead", null, h("tr", null, ["feature", "label", "note", "rater", "time (UTC)"].map((words) => h("th", { scope: "col" }, words)))), body)),
      more),
    h("details", null, h("summary", null, "How to make labels"), how(session.live)),
  );
  read();
}

start().catch((error) => fail(error));
