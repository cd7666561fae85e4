// feature.html: one feature, its text, its measures, its neighbours, and the form that labels it.
import { DataError, block, feature as loadFeature, labels, list, live, pair, saveLabel, setupById, setupNumber, shardAddress, site, tokens } from "./data.js";
import { histogram } from "./histogram.js";
import { loadTable, search } from "./list.js";
import { classSentence, measureList, notable } from "./measures.js";
import { parse, setupsOf } from "./query.js";
import { levels, shaded, visible } from "./text.js";
import { chip, classBadge, encode, fail, featureAddress, fill, format, h, keys, languageName, page, parseFeature, put, retitle, setupWords } from "./ui.js";

const main = page({ title: "Feature", here: "feature.html" });
const FIRST = 5;
const MORE = 10;

/**
 * What the page shows now.
 * @typedef {{setup: import("./data.js").Setup, f: number, from: string|null, blind: boolean, columns: any, top: any, record: any}} Shown
 */
/** @type {Shown|null} */
let shown = null;
/** @type {import("./data.js").Site} */
let index;
let turn = 0;
/** @type {Promise<any>} */
let saving = Promise.resolve();

/** Rows of the list that the reader came from, kept while its query stays. @type {{query: string, rows: Promise<{ids: string[], features: number[]}>}|null} */
let walked = null;

/** Value of a column for the feature shown; null where the list lacks the column. @param {any} columns @param {string} name @param {number} f */
const value = (columns, name, f) => columns[name]?.[f] ?? null;

// ------------------------------------------------------------------------------------------------------------ previous, next

/** @param {string} from @returns {Promise<{ids: string[], features: number[]}>} */
async function listOf(from) {
  const { query } = parse(from, index);
  const setups = setupsOf(query, index);
  const table = await loadTable(index, setups);
  const { rows } = await search(table, query, index, await tokens(), (await labels()).labels);
  const alive = Array.from(rows).filter((row) => table.alive[row]);
  return { ids: alive.map((row) => table.setups[table.setup[row]].id), features: alive.map((row) => table.feature[row]) };
}

/**
 * The features before and after this one: of the list the reader came from, else by number.
 * @param {Shown} now
 * @returns {Promise<{before: [string, number]|null, after: [string, number]|null, words: string}>}
 */
async function around(now) {
  if (now.from) {
    if (walked?.query !== now.from) walked = { query: now.from, rows: listOf(now.from) };
    const { ids, features } = await walked.rows;
    const at = features.findIndex((f, i) => f === now.f && ids[i] === now.setup.id);
    const one = (/** @type {number} */ i) => /** @type {[string, number]|null} */ (i >= 0 && i < ids.length ? [ids[i], features[i]] : null);
    if (at >= 0) return { before: one(at - 1), after: one(at + 1), words: `${(at + 1).toLocaleString("en")} of ${ids.length.toLocaleString("en")} in your list` };
  }
  const alive = now.columns.alive;
  const one = (/** @type {number} */ by) => {
    for (let f = now.f + by; f >= 0 && f < alive.length; f += by) if (alive[f]) return /** @type {[string, number]} */ ([now.setup.id, f]);
    return null;
  };
  return { before: one(-1), after: one(1), words: now.from ? "not in the list you came from: by number" : "by number" };
}

/** @param {Shown} now */
function walk(now) {
  const words = h("span", { class: "soft small", id: "place" });
  const link = (/** @type {string} */ id, /** @type {string} */ text) => h("a", { class: "button", id, "aria-disabled": "true" }, text);
  const [before, after] = [link("prev", "← Previous"), link("next", "Next →")];
  const bar = h("nav", { class: "row walk", "aria-label": "Features" }, h("a", { href: `find.html${now.from ? `?${now.from}` : `?model=${encode(now.setup.name)}&control=${encode(now.setup.control)}&step=${now.setup.step}&layer=${now.setup.layer}&lm_seed=${now.setup.lm_seed}&seed=${now.setup.sae_seed}`}`, id: "back" }, now.from ? "Back to the list" : now.blind ? "To a list" : "All features of this setup"), words, h("span", { class: "row end" }, before, after));
  around(now).then(
    (found) => {
      fill(words, found.words);
      for (const [element, target] of /** @type {[HTMLAnchorElement, [string, number]|null][]} */ ([[before, found.before], [after, found.after]])) {
        if (!target) continue;
        element.removeAttribute("aria-disabled");
        element.href = featureAddress(target[0], target[1], { from: now.from, blind: now.blind ? "1" : null });
        element.addEventListener("click", (event) => follow(event, element.href));
      }
    },
    (error) => fail(error),
  );
  return bar;
}

/** Show another feature without loading the page again. @param {MouseEvent} event @param {string} address */
function follow(event, address) {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey || event.button) return;
  event.preventDefault();
  history.pushState(null, "", address);
  window.scrollTo({ top: 0 });
  show();
}

// --------------------------------------------------------------------------------------------------------------------- text

/**
 * Marks for the clusters that hold several of the tokens shown: A, B, C ... by the positions they cover.
 * @param {Object<string, [number, number, number|null][]>} byLanguage @returns {Map<number, string>}
 */
function clusterMarks(byLanguage) {
  /** @type {Map<number, {tokens: Set<number>, count: number}>} */
  const clusters = new Map();
  for (const entries of Object.values(byLanguage))
    for (const [rank, count, cluster] of entries) {
      if (cluster === null || cluster === undefined) continue;
      const known = clusters.get(cluster) ?? { tokens: new Set(), count: 0 };
      known.tokens.add(rank);
      known.count += count;
      clusters.set(cluster, known);
    }
  const several = [...clusters].filter(([, { tokens }]) => tokens.size > 1).sort((a, b) => b[1].count - a[1].count || a[0] - b[0]);
  return new Map(several.slice(0, 26).map(([cluster], i) => [cluster, String.fromCharCode(65 + i)]));
}

/** @param {Shown} now */
function tokenSection(now) {
  const byLanguage = now.record.tokens;
  const section = h("section", { id: "tokens", "aria-labelledby": "tokens-title" }, h("h2", { id: "tokens-title" }, "Top tokens"));
  if (!byLanguage) {
    put(section, h("p", { class: "soft" }, "No tokens are known: this run has no histogram of the setup. Run the study again."));
    return section;
  }
  const marks = now.blind ? new Map() : clusterMarks(byLanguage);
  const columns = index.languages.map((language) => {
    const entries = /** @type {[number, number, number|null][]} */ (byLanguage[language] ?? []);
    const total = value(now.columns, `n_${language}`, now.f);
    const clusters = now.blind ? null : now.record.clusters?.[language];
    const most = Math.max(1, ...entries.map(([, count]) => count));
    if (now.blind && entries.length) return h("div", { class: "bylanguage", "data-language": language }, h("h3", null, languageName(language)), h("div", { class: "chips" }, entries.map(([rank]) => chip(rank, { lang: language, limit: 60 }))));
    if (!entries.length) return h("div", { class: "bylanguage", "data-language": language }, h("h3", null, languageName(language)), h("p", { class: "soft" }, `No counted position in ${languageName(language)} text.`));
    return h(
      "div",
      { class: "bylanguage", "data-language": language },
      h("h3", null, languageName(language), now.blind || total === null ? null : h("span", { class: "soft small" }, ` ${total.toLocaleString("en")} positions${clusters ? `, ${clusters} ${clusters === 1 ? "cluster" : "clusters"} in all` : ""}`)),
      h(
        "table",
        { class: "tokens" },
        h("thead", { class: "sr" }, h("tr", null, h("th", { scope: "col" }, "Token"), h("th", { scope: "col" }, "Positions"), marks.size ? h("th", { scope: "col" }, "Cluster") : null)),
        h(
          "tbody",
          null,
          entries.map(([rank, count, cluster]) => {
            const mark = cluster === null ? null : marks.get(cluster);
            return h(
              "tr",
              { "data-token": rank, "data-cluster": cluster },
              h("th", { scope: "row" }, chip(rank, { lang: language, limit: 60 })),
              h("td", { class: "bar" }, h("span", { class: "fill", style: `width:${Math.max(1, (100 * count) / most).toFixed(1)}%` }), h("span", { class: "num" }, count.toLocaleString("en"))),
              marks.size ? h("td", null, mark ? h("span", { class: "cluster-mark", title: `one of several tokens in cluster ${mark}` }, mark) : null) : null,
            );
          }),
        ),
      ),
    );
  });
  put(section, h("div", { class: "languages" }, columns));
  if (marks.size) put(section, h("p", { class: "caption" }, "Tokens with the same letter are in one cluster of the layer's hidden states, in whatever language."));
  return section;
}

/** One example as an item of a list, its text loaded. @param {Shown} now @param {number} i @returns {Promise<HTMLElement>} */
async function example(now, i) {
  const all = now.record.examples;
  const { ranks, documents } = await block(all.block[i]);
  const start = all.start[i];
  const shownRanks = ranks.slice(start, start + all.length[i]);
  const document = documents.filter(([first]) => first <= all.at[i]).at(-1);
  const language = index.languages[all.language[i]] ?? index.languages[0];
  const max = value(now.columns, "max_activation", now.f);
  return h(
    "li",
    { class: "example", "data-example": i, "data-language": language, tabindex: "-1" },
    shaded({
      ranks: shownRanks,
      levels: levels(all.on[i], shownRanks.length),
      peak: all.at[i] - start,
      lang: language,
      max,
      breaks: documents.map(([first]) => first - start).filter((at) => at > 0 && at < shownRanks.length),
    }),
    h("p", { class: "caption" }, "document ", h("code", null, visible(document?.[1] ?? "?")), now.blind ? null : ` · activation ${format("max_activation", all.value[i])}${max ? ` (${Math.round((100 * all.value[i]) / max)} % of the maximum)` : ""}`),
  );
}

/** @param {Shown} now */
function exampleSection(now) {
  const all = now.record.examples;
  const section = h("section", { id: "examples", "aria-labelledby": "examples-title" }, h("h2", { id: "examples-title" }, "Examples"));
  if (!all?.block?.length) {
    const some = now.columns.examples?.some((/** @type {number} */ n) => n > 0);
    put(section, h("p", { class: "soft" }, some ? "No example of this feature was kept: the study keeps those of some features only (example_features in the study file)." : "This setup has no examples. Run the study again, with top_examples above 0."));
    return section;
  }
  put(section, h("p", { class: "scale" }, "Share of the maximum: ", [1, 3, 5, 7, 10].map((level) => h("span", { class: `l${level}` }, `${level * 10} %`)), " · ", h("mark", { class: "peak" }, "▲ strongest"), " in its window. Each text is one window of the test text; the strongest come first."));
  const numbers = index.languages.map((_, language) => Array.from(all.block.keys()).filter((i) => all.language[i] === language));
  const total = all.block.length;
  const columns = index.languages.map((language, number) => {
    const mine = numbers[number];
    const others = index.languages.filter((_, other) => numbers[other].length).map(languageName);
    const column = h("div", { class: "bylanguage", "data-language": language }, h("h3", null, `${languageName(language)} `, h("span", { class: "soft small" }, `${mine.length} of ${total} examples`)));
    if (!mine.length) {
      put(column, h("p", { class: "soft" }, `None of the examples kept is ${languageName(language)}: all are ${others.join(" or ")}.`));
      return column;
    }
    const items = h("ol", { class: "examples" });
    const button = h("button", { type: "button", class: "showmore", "data-language": language });
    let done = 0;
    const more = async (/** @type {number} */ many, /** @type {boolean} */ focus) => {
      const next = mine.slice(done, done + many);
      done += next.length;
      button.disabled = true;
      try {
        const made = await Promise.all(next.map((i) => example(now, i)));
        put(items, made);
        if (focus) made[0]?.focus({ preventScroll: false });
      } catch (error) {
        done -= next.length;
        fail(error, column);
      }
      button.disabled = false;
      const left = mine.length - done;
      fill(button, left ? `Show ${Math.min(MORE, left)} more` : null);
      button.hidden = !left;
    };
    button.addEventListener("click", () => more(MORE, true));
    put(column, items, button);
    more(numbers.filter((some) => some.length).length === 1 ? 2 * FIRST : FIRST, false);
    return column;
  });
  const alone = numbers.filter((some) => some.length).length === 1;
  put(section, h("div", { class: `languages${alone ? " alone" : ""}` }, columns));
  return section;
}

/** @param {Shown} now */
function pairSection(now) {
  const section = h("section", { id: "pairs", "aria-labelledby": "pairs-title" }, h("h2", { id: "pairs-title" }, "Aligned sentences in which it fires on both sides"));
  const all = now.record.pairs;
  if (!all) put(section, h("p", { class: "soft" }, value(now.columns, "n_pairs_a", now.f) === null ? "The study has no aligned sentences." : "Not recorded: this run is from before pairs were kept. Run the study again."));
  else if (!all.length && !now.record.examples) put(section, h("p", { class: "soft" }, "Not kept: pairs are kept of the features whose examples are."));
  else if (!all.length) {
    const [a, b] = [value(now.columns, "n_pairs_a", now.f) ?? 0, value(now.columns, "n_pairs_b", now.f) ?? 0];
    put(section, h("p", { class: "soft" }, `None. Among the aligned test sentences it fires in ${a.toLocaleString("en")} ${languageName(index.languages[0])} and ${b.toLocaleString("en")} ${languageName(index.languages[1])} ones, but in no sentence and its translation both.`));
  } else {
    const rows = h("ol", { class: "pairs" });
    Promise.all(all.map((/** @type {any} */ one) => pair(one.pair))).then(
      (sides) =>
        put(
          rows,
          sides.map((ranks, n) =>
            h(
              "li",
              { "data-pair": all[n].pair },
              ranks.map((side, k) => {
                const strength = levels(all[n].on[k], side.length);
                return shaded({ ranks: side, levels: strength, peak: strength.indexOf(Math.max(...strength)), lang: index.languages[k], max: value(now.columns, "max_activation", now.f) });
              }),
            ),
          ),
        ),
      (error) => fail(error, section),
    );
    put(section, rows, h("p", { class: "caption" }, `Up to eight pairs of the aligned test sentences, those that fire most on their weaker side first. Shades are the positions above the firing threshold${index.thresholds.phi_firing ? ` (${Math.round(100 * index.thresholds.phi_firing)} % of the maximum)` : ""}.`));
  }
  return section;
}

// --------------------------------------------------------------------------------------------------------------- neighbours

/** @param {Shown} now */
function nearSection(now) {
  const section = h("section", { id: "near", "aria-labelledby": "near-title" }, h("h2", { id: "near-title" }, "Nearest decoder directions in this setup"));
  const near = /** @type {[number, number][]} */ (now.record.near ?? []);
  if (!near.length) {
    put(section, h("p", { class: "soft" }, "Not known: the weights of this SAE are not in the run, or no other feature is alive."));
    return section;
  }
  put(
    section,
    h(
      "ol",
      { class: "near" },
      near.map(([f, cosine]) => {
        const address = featureAddress(now.setup.id, f);
        return h(
          "li",
          { "data-feature": f },
          h("a", { href: address, onclick: (/** @type {MouseEvent} */ event) => follow(event, address), "aria-label": `Feature ${f}, cosine ${cosine.toFixed(2)}` }, String(f)),
          h("span", { class: "num soft" }, cosine.toFixed(2).replace("-", "−")),
          classBadge(index.classes[now.columns.class[f]] ?? "unclassified", now.columns.bilingual?.[f]),
          h("span", { class: "chips" }, index.languages.flatMap((language) => (now.top[language]?.[f] ?? []).slice(0, 3).map((/** @type {number} */ rank) => chip(rank, { lang: language, limit: 14 })))),
        );
      }),
    ),
    h("p", { class: "caption" }, "Cosine of the two features' decoder vectors."),
  );
  return section;
}

/** @param {Shown} now */
function overSection(now) {
  const section = h("section", { id: "over", "aria-labelledby": "over-title" }, h("h2", { id: "over-title" }, "Counterparts at other checkpoints"));
  const over = /** @type {[number, number, number, number][]} */ (now.record.over ?? []);
  if (!over.length) {
    put(section, h("p", { class: "soft" }, "None: this is the only checkpoint of its model, layer and seeds, or the weights of the others are not in the run."));
    return section;
  }
  const sorted = [...over].sort((a, b) => index.setups[a[0]].step - index.setups[b[0]].step);
  const line = (/** @type {[number, number, number, number]} */ [number, f, cosine, back]) => {
    const setup = index.setups[number];
    const address = featureAddress(setup.id, f);
    return h("tr", { "data-setup": setup.id, "data-feature": f }, h("th", { scope: "row", class: "num" }, setup.step.toLocaleString("en")), h("td", null, h("a", { href: address, onclick: (/** @type {MouseEvent} */ event) => follow(event, address) }, `feature ${f}`)), h("td", { class: "num" }, cosine.toFixed(2).replace("-", "−")), h("td", null, back ? h("span", { title: "each is the other's best counterpart" }, "↔", h("span", { class: "sr" }, " mutual")) : null));
  };
  put(
    section,
    h("table", null, h("thead", null, h("tr", null, h("th", { scope: "col", class: "num" }, "Step"), h("th", { scope: "col" }, "Best counterpart"), h("th", { scope: "col", class: "num" }, "Cosine"), h("th", { scope: "col" }, h("span", { class: "sr" }, "Mutual")))), h("tbody", null, sorted.map(line))),
    h("p", null, h("a", { href: compareAddress(now), class: "button", id: "compare" }, "Compare side by side")),
    h("p", { class: "caption" }, "↔: each is the other's best counterpart."),
  );
  return section;
}

/** @param {Shown} now */
const compareAddress = (now) => `compare.html?f=${encode(`${now.setup.id}:${now.f}`)}`;

// -------------------------------------------------------------------------------------------------------------------- labels

/** @param {any} label @param {Object<string, string>} names */
const labelWords = (label, names) => (label.granularity === null ? "no grade" : `${label.granularity} ${names[label.granularity] ?? ""}`.trim());

/** @param {Shown} now @param {any} known @param {{live: boolean, rater?: string}} session */
function labelSection(now, known, session) {
  const section = h("section", { id: "labels", "aria-labelledby": "labels-title" }, h("h2", { id: "labels-title" }, "Label"));
  const ofThis = () => known.labels.filter((/** @type {any} */ label) => label.setup === now.setup.id && label.feature === now.f);
  const others = h("ul", { class: "labels" });
  const drawOthers = () => {
    const rows = now.blind ? [] : ofThis().filter((/** @type {any} */ label) => !session.live || label.rater !== session.rater);
    const granularity = now.blind ? null : value(now.columns, "granularity", now.f);
    fill(
      others,
      granularity === null ? null : h("li", null, `The study's own label: ${granularity} ${known.names[granularity] ?? ""}`),
      rows.map((/** @type {any} */ label) => h("li", { "data-rater": label.rater }, h("b", null, h("bdi", null, visible(label.rater))), `: ${labelWords(label, known.names)}${label.blind ? ", blind" : ""} `, h("span", { class: "soft small" }, String(label.time).slice(0, 10)), label.note ? h("p", { class: "note", dir: "auto" }, visible(label.note)) : null)),
    );
    return rows.length + (granularity === null ? 0 : 1);
  };
  if (!session.live) {
    const n = drawOthers();
    put(section, others, n ? null : h("p", { class: "soft" }, now.blind ? "Labels are hidden while labelling blind." : ["No label yet. ", h("code", null, "glottoscope browse"), " or ", h("code", null, "glottoscope label"), " on the run directory adds some."]));
    return section;
  }
  const own = () => ofThis().find((/** @type {any} */ label) => label.rater === session.rater);
  const status = h("p", { role: "status", class: "small", id: "label-status" });
  const note = h("textarea", { id: "note", rows: 3, maxlength: 10000, "aria-label": "Note", placeholder: "A note (n)" });
  note.value = own()?.note ?? "";
  const grades = ["1", "2", "3", "4"].map((grade) => h("button", { type: "button", class: "grade", "data-grade": grade, onclick: () => save(own()?.granularity === Number(grade) ? null : Number(grade)) }, h("kbd", null, grade), ` ${known.names[grade] ?? ""}`));
  const draw = () => {
    for (const button of grades) button.setAttribute("aria-pressed", String(own()?.granularity === Number(button.dataset.grade)));
    drawOthers();
  };
  const save = (/** @type {number|null} */ granularity) => {
    const label = { setup: now.setup.id, feature: now.f, granularity, note: note.value.trim(), blind: now.blind };
    fill(status, "Saving…");
    // One after the other, so that the last click is the last line of the file.
    saving = saving.then(() => saveLabel(label)).then(
      () => {
        fill(status, label.granularity === null && !label.note ? "Label withdrawn." : `Saved: ${labelWords(label, known.names)}${label.note ? ", with a note" : ""}.`);
        draw();
      },
      (error) => {
        fill(status);
        fail(error, section);
      },
    );
    return saving;
  };
  note.addEventListener("change", () => {
    if (note.value.trim() !== (own()?.note ?? "")) save(own()?.granularity ?? null);
  });
  note.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Escape" || (event.key === "Enter" && (event.ctrlKey || event.metaKey))) note.blur();
  });
  draw();
  put(
    section,
    h("form", { id: "label-form", onsubmit: (/** @type {Event} */ event) => event.preventDefault() }, h("div", { role: "group", "aria-label": "Granularity", class: "grades" }, grades), note, h("p", { class: "caption" }, "Saved at once, as ", h("b", { id: "label-rater" }, visible(session.rater ?? "")), now.blind ? ", blind" : "", ". The chosen grade again takes it back; a note is saved when you leave the field."), status),
    others,
  );
  return section;
}

// ---------------------------------------------------------------------------------------------------------------------- JSON

/** Flags of a list: numbers there, truth values in words. */
const FLAG_COLUMNS = ["alive", "bilingual", "bilingual_paper", "supportable", "single_token"];

/** The feature with names, texts and numbers in place of codes, as the server's features/F.json has it. @param {Shown} now */
async function expanded(now) {
  const table = await tokens();
  const { setup, f, record } = now;
  const token = (/** @type {number} */ rank) => table.text[rank];
  const max = value(now.columns, "max_activation", f) ?? 0;
  const shades = (/** @type {number[]} */ on, /** @type {number} */ length) => Array.from(levels(on, length), (level) => Number(((level / 100) * max).toPrecision(3)));
  const measures = Object.entries(now.columns).map(([name, column]) => {
    const found = /** @type {any} */ (column)[f];
    return [name, found === null ? null : name === "class" ? index.classes[found] : FLAG_COLUMNS.includes(name) ? Boolean(found) : found];
  });
  const all = record.examples;
  const examples = Array.from(all?.block.keys() ?? [], async (i) => {
    const { ranks, documents } = await block(all.block[i]);
    const some = ranks.slice(all.start[i], all.start[i] + all.length[i]);
    return { block: all.block[i], position: all.at[i], document: documents.filter(([first]) => first <= all.at[i]).at(-1)?.[1], language: index.languages[all.language[i]] ?? null, value: all.value[i], tokens: some.map(token), activations: shades(all.on[i], some.length) };
  });
  const pairs = (record.pairs ?? []).map(async (/** @type {any} */ one) => ({ pair: one.pair, sides: (await pair(one.pair)).map((ranks, k) => ({ language: index.languages[k], tokens: ranks.map(token), activations: shades(one.on[k], ranks.length) })) }));
  const { n_features: _n, n_alive: _a, n_bilingual: _b, counts: _c, final: _f, middle: _m, ...words } = setup;
  return {
    schema: 1,
    feature: f,
    id: `${setup.id}:${f}`,
    setup: words,
    measures: Object.fromEntries(measures),
    tokens: Object.fromEntries(Object.entries(record.tokens ?? {}).map(([language, rows]) => [language, /** @type {any[]} */ (rows).map(([rank, count, cluster]) => ({ token: token(rank), count, cluster }))])),
    clusters: record.clusters ?? {},
    activations: record.activations ?? null,
    examples: await Promise.all(examples),
    pairs: record.pairs ? await Promise.all(pairs) : null,
    near: (record.near ?? []).map((/** @type {number[]} */ [other, cosine]) => ({ id: `${setup.id}:${other}`, cosine })),
    over: (record.over ?? []).map((/** @type {number[]} */ [number, other, cosine, back]) => ({ id: `${index.setups[number].id}:${other}`, step: index.setups[number].step, cosine, mutual: back === 1 })),
    labels: (await labels()).labels.filter((/** @type {any} */ label) => label.setup === setup.id && label.feature === f),
  };
}

/** @param {Shown} now @param {boolean} served */
function jsonLink(now, served) {
  if (served) return h("a", { id: "json", class: "button", href: `data/cells/${now.setup.id}/features/${now.f}.json` }, "JSON");
  return h("button", {
    type: "button",
    id: "json",
    title: "Download what this page shows as JSON",
    onclick: async () => {
      try {
        const address = URL.createObjectURL(new Blob([JSON.stringify(await expanded(now), null, 1)], { type: "application/json" }));
        h("a", { href: address, download: `${now.setup.id.replaceAll("/", "-")}-feature-${now.f}.json` }).click();
        setTimeout(() => URL.revokeObjectURL(address), 10_000);
      } catch (error) {
        fail(error);
      }
    },
  }, "JSON");
}

// ---------------------------------------------------------------------------------------------------------------------- page

/** @param {boolean} blind */
function setBlind(blind) {
  const parameters = new URLSearchParams(location.search);
  const f = parseFeature(parameters.get("f"));
  if (!f) return;
  history.pushState(null, "", featureAddress(f.setup, f.feature, { from: parameters.get("from"), blind: blind ? "1" : null }));
  show().then(() => document.getElementById("blind")?.focus());
}

async function show() {
  const own = ++turn;
  const parameters = new URLSearchParams(location.search);
  const asked = parseFeature(parameters.get("f"));
  try {
    index = await site();
    if (!asked) throw new DataError(parameters.get("f") ? `“${parameters.get("f")}” names no feature.` : "The address names no feature.", "Write feature.html?f=SETUP:NUMBER, as in feature.html?f=d128@600/layer_02/seed_0:17, or choose one on the page Find.");
    shardAddress(asked.setup, asked.feature);
    const setup = setupById(asked.setup);
    if (!setup || setupNumber(asked.setup) < 0) return;
    const [{ columns, top }, record, known, session] = await Promise.all([list(setup.id), loadFeature(setup.id, asked.feature), labels(), live(), tokens()]);
    if (own !== turn) return;
    shown = { setup, f: asked.feature, from: parameters.get("from"), blind: parameters.get("blind") === "1", columns, top, record };
    if (session.live) keys(labelKeys);
    draw(shown, known, session);
  } catch (error) {
    if (own !== turn) return;
    shown = null;
    fill(main, h("h1", null, "Feature"), h("p", null, h("a", { href: "find.html" }, "Find features")));
    fail(error);
  }
}

/** @param {Shown} now @param {any} known @param {{live: boolean, rater?: string}} session */
function draw(now, known, session) {
  const { setup, f, blind, columns } = now;
  const cls = index.classes[columns.class[f]] ?? "unclassified";
  const title = blind ? `Feature ${f} · blind` : `Feature ${f} · ${setupWords(setup)}`;
  retitle(title);
  const toggle = h("button", { type: "button", id: "blind", "aria-pressed": String(blind), title: "Hide class, measures, step and neighbours while labelling", onclick: () => setBlind(!blind) }, "Blind");
  const alive = columns.alive[f];
  fill(
    main,
    walk(now),
    h("div", { class: "titlebar" }, h("h1", { id: "title" }, title), h("span", { class: "row end" }, alive && !blind ? h("a", { href: compareAddress(now), class: "button", id: "to-compare" }, "Compare") : null, toggle, blind ? null : jsonLink(now, session.live))),
    blind ? h("p", { class: "soft" }, "Class, measures, step and neighbours are hidden. The address still names the setup.") : h("div", { id: "summary" }, h("p", { id: "class-words", "data-class": cls }, classBadge(cls, columns.bilingual?.[f]), " ", classSentence(now, index)), alive ? notable(now, index) : null),
    alive
      ? h(
          "div",
          { class: `featuregrid${blind ? " blind" : ""}` },
          h("div", { class: "left" }, tokenSection(now), exampleSection(now), blind ? null : pairSection(now)),
          h("div", { class: "right" }, session.live ? labelSection(now, known, session) : null, blind ? null : [histogramSection(now), measureSection(now), nearSection(now), overSection(now)], session.live ? null : labelSection(now, known, session)),
        )
      : h("div", { class: "featuregrid" }, h("p", { id: "dead" }, "It was among the active features of no position of the test text, so it has no tokens, examples, measures or neighbours."), labelSection(now, known, session)),
  );
}

/** @param {Shown} now */
function histogramSection(now) {
  const section = h("section", { id: "histogram", "aria-labelledby": "histogram-title" }, h("h2", { id: "histogram-title" }, "Activations"));
  const counts = now.record.activations;
  if (!counts) put(section, h("p", { class: "soft" }, "Not recorded: this run is from before activations were counted. Run the study again."));
  else put(section, histogram(counts, index, value(now.columns, "max_activation", now.f)));
  return section;
}

/** @param {Shown} now */
const measureSection = (now) => h("section", { id: "measures", "aria-labelledby": "measures-title" }, h("h2", { id: "measures-title" }, "Measures"), measureList(now, index));

/** @param {string} id */
const press = (id) => () => document.getElementById(id)?.click();
const [previous, next] = [press("prev"), press("next")];

/** @type {any} */
const labelKeys = {
  ...Object.fromEntries(["1", "2", "3", "4"].map((grade) => [grade, [() => document.querySelector(`[data-grade="${grade}"]`)?.dispatchEvent(new MouseEvent("click")), "label"]])),
  n: [() => document.getElementById("note")?.focus(), "write a note"],
};

addEventListener("popstate", show);
keys({
  j: [next, "next feature"],
  ArrowRight: [next, "next feature"],
  k: [previous, "previous feature"],
  ArrowLeft: [previous, "previous feature"],
  "/": [() => (location.href = "find.html"), "search"],
  c: [() => shown && !shown.blind && (location.href = compareAddress(shown)), "compare with other checkpoints"],
  b: [() => shown && setBlind(!shown.blind), "blind: hide class and measures"],
});
show();
