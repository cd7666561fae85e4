// One feature and its best counterparts at the other checkpoints: a strip of cosines and classes, and columns side by side.
import { compact, linearAxis } from "./axes.js";
import { asTable, lines, swatch } from "./charts.js";
import { feature as loadFeature, siteNow } from "./data.js";
import { badge, byChance, classOf, cosine, evidence, glimpse, isBilingual, link, numberOf, shortMeasures, tokenChips } from "./glance.js";
import { look } from "./looks.js";
import { className, encode, fail, fill, format, h, languageName, put, setupWords } from "./ui.js";

/**
 * @typedef {import("./data.js").Setup} Setup
 * @typedef {import("./glance.js").Feature} Feature
 * @typedef {{setup: Setup, f: number, cosine: number, mutual: boolean, own: boolean, chance: number,
 *   nearest: ([number, number]|null)[], feature: Feature|null}} Stop
 *   nearest: the feature of each language's class that is nearest here, and its cosine; feature: null until it is loaded
 */

const EAGER = 200_000; // features of all checkpoints together, up to which their lists are loaded at once

const count = (/** @type {number} */ n) => n.toLocaleString("en");

/** Setups of the same SAE at every checkpoint, in the order of training. @param {Setup} setup */
function trajectory(setup) {
  const same = (siteNow()?.setups ?? []).filter((other) => other.model === setup.model && other.layer === setup.layer && other.sae_seed === setup.sae_seed && other.lm_seed === setup.lm_seed && other.control === setup.control);
  return same.sort((a, b) => a.tokens_seen - b.tokens_seen || a.step - b.step);
}

/** @param {Setup} setup @param {number} f @param {any} record @returns {Stop[]} */
function stops(setup, f, record) {
  const site = siteNow();
  /** @type {Map<string|undefined, any[]>} */
  const over = new Map((record.over ?? []).map((/** @type {any[]} */ entry) => [site?.setups[entry[0]]?.id, entry]));
  /** @type {Stop[]} */
  const found = [];
  for (const other of trajectory(setup)) {
    const entry = other === setup ? [0, f, 1, 1] : over.get(other.id);
    if (entry) found.push({ setup: other, f: entry[1], cosine: entry[2], mutual: entry[3] === 1, own: other === setup, chance: byChance(other), nearest: entry[4] ?? [], feature: null });
  }
  return found;
}

/** Whether a counterpart is nearer than chance gives. @param {Stop} stop */
const isFound = (stop) => stop.own || stop.cosine > stop.chance;

/** What a class is called in the story. @param {Stop} stop */
const kind = (stop) => (stop.feature ? (isBilingual(stop.feature) ? "bilingual" : className(classOf(stop.feature))) : "?");

/** Classes over the checkpoints in one line: "English at steps 30 to 200, then bilingual at steps 300 to 1,500". @param {Stop[]} all */
function story(all) {
  /** @type {{words: string, first: number, last: number}[]} */
  const runs = [];
  for (const stop of all) {
    const words = isFound(stop) ? kind(stop) : "no counterpart";
    const last = runs[runs.length - 1];
    if (last?.words === words) last.last = stop.setup.step;
    else runs.push({ words, first: stop.setup.step, last: stop.setup.step });
  }
  return runs.map(({ words, first, last }) => `${words} at ${first === last ? `step ${count(first)}` : `steps ${count(first)} to ${count(last)}`}`).join(", then ");
}

/** Symbol and colour of a class in the strip. @param {Stop} stop */
function markOf(stop) {
  const site = siteNow();
  if (!site || !stop.feature) return { symbol: "circle", colour: "var(--faint)" };
  const { symbol, colour } = look(isBilingual(stop.feature) ? "share_bilingual" : `share_${classOf(stop.feature)}`, site);
  return { symbol, colour };
}

/** @param {Stop[]} all @param {string} title */
function strip(all, title) {
  const site = siteNow();
  const languages = site?.languages ?? [];
  const names = new Map(all.map((stop, n) => [n, compact(stop.setup.step)]));
  const axis = linearAxis([...names.keys()], { label: "step, checkpoints evenly spaced", names, words: (x) => `step ${count(all[x].setup.step)} · ${count(all[x].setup.tokens_seen)} tokens` });
  const note = (/** @type {Stop} */ stop) => (stop.own ? "this feature" : [kind(stop), `feature ${stop.f}`, stop.mutual && "mutual"].filter(Boolean).join(", "));
  const best = all.map((stop, n) => ({ x: n, value: stop.cosine, note: note(stop), mark: { ...markOf(stop), hollow: !stop.mutual } }));
  const near = languages.map((language, n) => ({
    ...look(`share_${language}`, /** @type {any} */ (site)), measure: "", thin: true, label: `nearest ${languageName(language)}`,
    points: all.flatMap((stop, x) => (stop.nearest[n] ? [{ x, value: stop.nearest[n][1], note: `feature ${stop.nearest[n][0]}` }] : [])),
  }));
  const chance = { measure: "", label: "by chance", colour: "var(--faint)", ink: "var(--soft)", symbol: "times", dash: "2 3", thin: true, bare: true, points: all.flatMap((stop, x) => (stop.own ? [] : [{ x, value: stop.chance, note: `best of ${count(stop.setup.n_alive)}` }])) };
  const series = [{ measure: "", label: "best counterpart", colour: "var(--text)", ink: "var(--text)", symbol: "circle", points: best }, ...near, chance].filter((one) => one.points.length);
  const summary = `${title}: cosine of the best counterpart at each checkpoint. ${story(all)}. The table below has every value.`;
  const low = Math.min(0, ...series.flatMap((one) => one.points.map((point) => point.value)));
  return lines({ series, axis, label: "cosine of decoder directions", summary, domain: [low, 1.04], height: 250, id: "strip-chart" });
}

/** The classes that the strip shows, by their marks. @param {Stop[]} all */
function marks(all) {
  const kinds = new Map(all.filter((stop) => stop.feature).map((stop) => [kind(stop), stop]));
  return h("ul", { class: "legend" }, [...kinds].map(([words, stop]) => h("li", null, swatch(markOf(stop), "mark"), words)), h("li", { class: "soft" }, "filled: mutual; hollow: one way"));
}

/** @param {Stop[]} all @param {string} caption */
function table(all, caption) {
  const names = ["monosemanticity", "coherence", "phi"].filter((name) => all.some((stop) => stop.feature?.columns[name]));
  const head = h("tr", null, ["step", "feature", "class"].map((words) => h("th", { scope: "col" }, words)), h("th", { scope: "col", class: "num" }, "cosine"), h("th", { scope: "col", class: "num" }, "by chance"), h("th", { scope: "col" }, "mutual"), names.map((name) => h("th", { scope: "col", class: "num" }, name === "monosemanticity" ? "R" : name)));
  const rows = all.map((stop) =>
    h("tr", null, h("th", { scope: "row", class: "num" }, count(stop.setup.step)), h("td", null, stop.feature ? link(stop.feature) : `feature ${stop.f}`, stop.own && " (this)"), h("td", null, stop.feature ? badge(stop.feature) : "?"),
      h("td", { class: "num" }, stop.own ? "–" : cosine(stop.cosine)), h("td", { class: "num" }, stop.own ? "–" : cosine(stop.chance)), h("td", null, stop.own ? "–" : stop.mutual ? "yes" : "no"), names.map((name) => h("td", { class: "num" }, stop.feature ? format(name, numberOf(stop.feature, name)) : "?"))));
  return asTable("strip-table", caption, head, rows);
}

/** The nearest feature of each language where the best one is of another class. @param {Stop} stop @param {Feature} feature */
function parents(stop, feature) {
  const site = siteNow();
  const rows = stop.nearest.flatMap((entry, n) => {
    const language = site?.languages[n] ?? "";
    if (!entry || classOf(feature) === language) return [];
    const [f, value] = entry;
    if (value <= stop.chance) return [h("p", { class: "soft small" }, `No ${languageName(language)} feature nearer than chance (${cosine(value)}).`)];
    const other = { ...feature, f, record: {} };
    return [h("p", { class: "parent", "data-language": language }, `Nearest ${languageName(language)}: `, link(other), ` ${cosine(value)} `, tokenChips(other, language, 4))];
  });
  return rows.length ? h("div", { class: "parents" }, rows) : null;
}

/** @param {Stop} stop @param {HTMLElement} box */
function fillColumn(stop, box) {
  const feature = /** @type {Feature} */ (stop.feature);
  const found = isFound(stop);
  const content = [
    h("p", null, h("b", null, link(feature)), " ", badge(feature)),
    shortMeasures(feature),
    parents(stop, feature),
    evidence(feature),
    stop.own ? null : h("p", { class: "small" }, h("a", { href: `compare.html?f=${encode(`${stop.setup.id}:${stop.f}`)}` }, "its counterparts")),
  ];
  fill(
    box,
    h("h3", null, `step ${count(stop.setup.step)} `, h("span", { class: "soft small" }, `${compact(stop.setup.tokens_seen)} tokens`)),
    stop.own
      ? h("p", { class: "cosine" }, h("b", null, "this feature"))
      : h("p", { class: "cosine" }, found ? ["cosine ", h("b", { class: "num" }, cosine(stop.cosine)), stop.mutual ? " · ↔ mutual" : " · one way"] : [h("b", null, "no counterpart"), `: best cosine ${cosine(stop.cosine)}, chance alone gives up to ${cosine(stop.chance)}`]),
    found ? content : h("details", null, h("summary", null, "The best one all the same"), content),
  );
}

/**
 * The view of one feature over the checkpoints.
 * @param {Setup} setup @param {number} f @param {HTMLElement} place
 */
export async function counterparts(setup, f, place) {
  const record = await loadFeature(setup.id, f);
  const all = stops(setup, f, record);
  const title = `Feature ${f} of ${setupWords(setup)} over the checkpoints`;
  const lead = h("p", { id: "story" });
  const figure = h("figure", { id: "strip" });
  const columns = h("ol", { class: "counterparts", id: "columns" });
  const missing = trajectory(setup).length - all.length;
  const alone = all.length < 2;
  const words = h("div", { class: "words" });
  fill(place, h("h1", null, title), lead, alone ? null : figure, h("h2", { class: "sr" }, "Side by side"), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Counterparts side by side", id: "side-by-side" }, columns), words);
  if (alone) fill(lead, !record.over && !record.tokens ? "This feature is dead here: it was never active on the test text, so it has no counterparts." : `${setupWords(setup)} has no other checkpoint with an SAE on this site: there is nothing to compare over training.`);
  else {
    const same = all.filter((stop) => !stop.own && stop.f === f && isFound(stop)).length;
    put(
      words,
      h("p", { class: "caption" }, `A counterpart is the feature of that checkpoint whose decoder direction has the largest cosine with this one's; dead features are left out. By chance: the largest of n cosines with random directions in d dimensions is expected to be at most √(2 ln n / d), ${cosine(all[0].chance)} for ${count(all[0].setup.n_alive)} features in ${count(setup.d_model)} dimensions; a counterpart below that is none. Mutual: each is the other's best.`),
      same ? h("p", { class: "caption" }, `${count(same)} of ${count(all.length - 1)} counterparts have this feature's number. The SAEs of one layer and seed start from the same weights, so a part of such a cosine can be that common start.`) : null,
      missing ? h("p", { class: "caption" }, `${count(missing)} ${missing === 1 ? "checkpoint has" : "checkpoints have"} no SAE or no alive feature to compare with.`) : null,
    );
  }

  const boxes = all.map((stop) => h("li", { class: `counterpart${stop.own ? " own" : ""}${isFound(stop) ? "" : " none"}`, "data-step": stop.setup.step, "data-feature": stop.f, "data-cosine": stop.cosine }, h("h3", null, `step ${count(stop.setup.step)}`), h("p", { class: "soft" }, "loading…")));
  fill(columns, boxes);
  const draw = () => {
    if (alone) return;
    if (all.every((stop) => stop.feature)) fill(lead, `Over training: ${story(all)}.`);
    fill(figure, h("h2", { class: "plain" }, "Nearest direction at each checkpoint"), marks(all), strip(all, title), table(all, title));
  };
  const show = async (/** @type {number} */ n) => {
    if (all[n].feature) return;
    all[n].feature = await glimpse(all[n].setup, all[n].f);
    fillColumn(all[n], boxes[n]);
  };
  const tried = (/** @type {number} */ n) => show(n).catch((error) => fail(error, boxes[n]));
  const own = all.findIndex((stop) => stop.own);
  const reveal = () => {
    const scroller = columns.parentElement;
    if (scroller && own >= 0) scroller.scrollLeft = boxes[own].offsetLeft - (scroller.clientWidth - boxes[own].offsetWidth) / 2;
  };
  if (all.reduce((total, stop) => total + stop.setup.n_features, 0) <= EAGER) {
    await Promise.all(all.map((_, n) => tried(n)));
    draw();
    reveal();
    return;
  }
  // Large studies: a column's list is loaded when the column comes into view.
  if (!alone) fill(lead, "Classes appear as the columns come into view: scroll through them.");
  draw();
  reveal();
  const watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        watch.unobserve(entry.target);
        tried(boxes.indexOf(/** @type {HTMLElement} */ (entry.target))).then(draw);
      }
    },
    { root: columns.parentElement, rootMargin: "0px 200px" },
  );
  for (const box of boxes) watch.observe(box);
}
