// The text of a feature: its top tokens, its examples, and the sentence pairs in which it fires on both sides.
import { block, pair } from "./data.js";
import { value } from "./shown.js";
import { levels, shaded, visible } from "./text.js";
import { chip, fail, fill, format, h, languageName, put } from "./ui.js";

/** @typedef {import("./shown.js").Shown} Shown */

const FIRST = 5;
const MORE = 10;

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
export function tokenSection(now) {
  const byLanguage = now.record.tokens;
  const section = h("section", { id: "tokens", "aria-labelledby": "tokens-title" }, h("h2", { id: "tokens-title" }, "Top tokens"));
  if (!byLanguage) {
    put(section, h("p", { class: "soft" }, "No tokens are known: this run has no histogram of the setup. Run the study again."));
    return section;
  }
  const marks = now.blind ? new Map() : clusterMarks(byLanguage);
  const columns = now.site.languages.map((language) => {
    const entries = /** @type {[number, number, number|null][]} */ (byLanguage[language] ?? []);
    const total = value(now, `n_${language}`);
    const clusters = now.blind ? null : now.record.clusters?.[language];
    const most = Math.max(1, ...entries.map(([, count]) => count));
    if (now.blind && entries.length)
      return h(
        "div",
        { class: "bylanguage", "data-language": language },
        h("h3", null, languageName(language)),
        h(
          "div",
          { class: "chips" },
          entries.map(([rank]) => chip(rank, { lang: language, limit: 60 })),
        ),
      );
    if (!entries.length)
      return h(
        "div",
        { class: "bylanguage", "data-language": language },
        h("h3", null, languageName(language)),
        h("p", { class: "soft" }, `No counted position in ${languageName(language)} text.`),
      );
    return h(
      "div",
      { class: "bylanguage", "data-language": language },
      h(
        "h3",
        null,
        languageName(language),
        now.blind || total === null
          ? null
          : h(
              "span",
              { class: "soft small" },
              ` ${total.toLocaleString("en")} positions${clusters ? `, ${clusters} ${clusters === 1 ? "cluster" : "clusters"} in all` : ""}`,
            ),
      ),
      h(
        "table",
        { class: "tokens" },
        h(
          "thead",
          { class: "sr" },
          h(
            "tr",
            null,
            h("th", { scope: "col" }, "Token"),
            h("th", { scope: "col" }, "Positions"),
            marks.size ? h("th", { scope: "col" }, "Cluster") : null,
          ),
        ),
        h(
          "tbody",
          null,
          entries.map(([rank, count, cluster]) => {
            const mark = cluster === null ? null : marks.get(cluster);
            return h(
              "tr",
              { "data-token": rank, "data-cluster": cluster },
              h("th", { scope: "row" }, chip(rank, { lang: language, limit: 60 })),
              h(
                "td",
                { class: "bar" },
                h("span", { class: "fill", style: `width:${Math.max(1, (100 * count) / most).toFixed(1)}%` }),
                h("span", { class: "num" }, count.toLocaleString("en")),
              ),
              marks.size
                ? h(
                    "td",
                    null,
                    mark ? h("span", { class: "cluster-mark", title: `one of several tokens in cluster ${mark}` }, mark) : null,
                  )
                : null,
            );
          }),
        ),
      ),
    );
  });
  put(section, h("div", { class: "languages" }, columns));
  if (marks.size)
    put(
      section,
      h(
        "p",
        { class: "caption" },
        "Tokens with the same letter are in one cluster of the layer's hidden states, in whatever language.",
      ),
    );
  return section;
}

/** One example as an item of a list, its text loaded. @param {Shown} now @param {number} i @returns {Promise<HTMLElement>} */
async function example(now, i) {
  const all = now.record.examples;
  const { ranks, documents } = await block(all.block[i]);
  const start = all.start[i];
  const shownRanks = ranks.slice(start, start + all.length[i]);
  const document = documents.filter(([first]) => first <= all.at[i]).at(-1);
  const language = now.site.languages[all.language[i]] ?? now.site.languages[0];
  const max = value(now, "max_activation");
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
    h(
      "p",
      { class: "caption" },
      "document ",
      h("code", null, visible(document?.[1] ?? "?")),
      now.blind
        ? null
        : ` · activation ${format("max_activation", all.value[i])}${max ? ` (${Math.round((100 * all.value[i]) / max)} % of the maximum)` : ""}`,
    ),
  );
}

/** @param {Shown} now */
export function exampleSection(now) {
  const all = now.record.examples;
  const section = h(
    "section",
    { id: "examples", "aria-labelledby": "examples-title" },
    h("h2", { id: "examples-title" }, "Examples"),
  );
  if (!all?.block?.length) {
    const some = now.columns.examples?.some((n) => n !== null && n > 0);
    put(
      section,
      h(
        "p",
        { class: "soft" },
        some
          ? "No example of this feature was kept: the study keeps those of some features only (example_features in the study file)."
          : "This setup has no examples. Run the study again, with top_examples above 0.",
      ),
    );
    return section;
  }
  put(
    section,
    h(
      "p",
      { class: "scale" },
      "Share of the maximum: ",
      [1, 3, 5, 7, 10].map((level) => h("span", { class: `l${level}` }, `${level * 10} %`)),
      " · ",
      h("mark", { class: "peak" }, "▲ strongest"),
      " in its window. Each text is one window of the test text; the strongest come first.",
    ),
  );
  const numbers = now.site.languages.map((_, language) => Array.from(all.block.keys()).filter((i) => all.language[i] === language));
  const total = all.block.length;
  const columns = now.site.languages.map((language, number) => {
    const mine = numbers[number];
    const others = now.site.languages.filter((_, other) => numbers[other].length).map(languageName);
    const column = h(
      "div",
      { class: "bylanguage", "data-language": language },
      h("h3", null, `${languageName(language)} `, h("span", { class: "soft small" }, `${mine.length} of ${total} examples`)),
    );
    if (!mine.length) {
      put(
        column,
        h("p", { class: "soft" }, `None of the examples kept is ${languageName(language)}: all are ${others.join(" or ")}.`),
      );
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
export function pairSection(now) {
  const section = h(
    "section",
    { id: "pairs", "aria-labelledby": "pairs-title" },
    h("h2", { id: "pairs-title" }, "Aligned sentences in which it fires on both sides"),
  );
  const all = now.record.pairs;
  if (!all)
    put(
      section,
      h(
        "p",
        { class: "soft" },
        value(now, "n_pairs_a") === null
          ? "The study has no aligned sentences."
          : "Not recorded: this run is from before pairs were kept. Run the study again.",
      ),
    );
  else if (!all.length && !now.record.examples)
    put(section, h("p", { class: "soft" }, "Not kept: pairs are kept of the features whose examples are."));
  else if (!all.length) {
    const [a, b] = [value(now, "n_pairs_a") ?? 0, value(now, "n_pairs_b") ?? 0];
    put(
      section,
      h(
        "p",
        { class: "soft" },
        `None. Among the aligned test sentences it fires in ${a.toLocaleString("en")} ${languageName(now.site.languages[0])} and ${b.toLocaleString("en")} ${languageName(now.site.languages[1])} ones, but in no sentence and its translation both.`,
      ),
    );
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
              ranks.map((/** @type {number[]} */ side, /** @type {number} */ k) => {
                const strength = levels(all[n].on[k], side.length);
                return shaded({
                  ranks: side,
                  levels: strength,
                  peak: strength.indexOf(Math.max(...strength)),
                  lang: now.site.languages[k],
                  max: value(now, "max_activation"),
                });
              }),
            ),
          ),
        ),
      (error) => fail(error, section),
    );
    put(
      section,
      rows,
      h(
        "p",
        { class: "caption" },
        `Up to eight pairs of the aligned test sentences, those that fire most on their weaker side first. Shades are the positions above the firing threshold${now.site.thresholds.phi_firing ? ` (${Math.round(100 * now.site.thresholds.phi_firing)} % of the maximum)` : ""}.`,
      ),
    );
  }
  return section;
}
