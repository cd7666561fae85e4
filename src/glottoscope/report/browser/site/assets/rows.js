// The rows of the list of find.html: as a table, as cards where it is narrow, and its pages.
import { snippets } from "./data.js";
import { addressOf, changed, clear, follow, go, index, pager, query, result, results, table, turn } from "./desk.js";
import { PER, RANGES, SCOPES, serialise, SORTS } from "./query.js";
import { folded, snippetLine, unmarked, visible } from "./text.js";
import { chip, classBadge, fail, featureAddress, fill, h, languageName, measure, measureOf, setupWords } from "./ui.js";

/** @typedef {import("./query.js").Scope} Scope */

/** Heading that was pressed: the new one takes the focus. */
let sorted = "";

/** Columns of numbers: the four main ones, and any other that the query filters or sorts by. */
function numberColumns() {
  const shown = ["R", "coherence", "phi", "density"];
  for (const name of Object.keys(RANGES))
    if (!shown.includes(name) && (query.ranges[name] || query.sort.replace("-", "") === name)) shown.push(name);
  return shown;
}

const SHORT = /** @type {Object<string, string>} */ ({
  R: "R",
  coherence: "Coherence",
  phi: "Phi",
  density: "Density",
  hidden: "R hidden",
  share: "Share",
  max: "Maximum",
  positions: "Positions",
});

/** Heading that sorts. @param {string} name @param {string} words @param {string|null} [css] */
function sortable(name, words, css = null) {
  const by = query.sort.replace("-", "");
  const down = query.sort.startsWith("-");
  // Numbers are asked for from the top, names and numbers of features from the beginning.
  const first = name in RANGES || name === "label" ? `-${name}` : name;
  const next = by === name ? (down ? name : `-${name}`) : first;
  const meaning = name in RANGES ? measureOf(RANGES[name].column)?.meaning : null;
  return h(
    "th",
    { scope: "col", role: "columnheader", class: css, "aria-sort": by === name ? (down ? "descending" : "ascending") : null },
    h(
      "button",
      {
        type: "button",
        class: "sort",
        "data-sort": name,
        title: meaning ?? null,
        onclick: () => {
          sorted = name;
          go(changed({ sort: next }));
        },
      },
      words,
      h("span", { "aria-hidden": "true" }, by === name ? (down ? " ▼" : " ▲") : ""),
    ),
  );
}

export function drawRows() {
  if (!table || !result) return;
  const { setups, setup: setupOf, feature, cls, flags, num, top } = table;
  const varies = (/** @type {Scope} */ scope) => new Set(setups.map((setup) => setup[SCOPES[scope].field])).size > 1;
  // A control that is a model of its own is told by the model's name.
  const ambiguous = setups.some((setup) => setups.some((other) => other.name === setup.name && other.control !== setup.control));
  const places = /** @type {Scope[]} */ (Object.keys(SCOPES)).filter(
    (scope) => varies(scope) && (scope !== "control" || ambiguous || !varies("model")),
  );
  const numbers = numberColumns();
  const pages = Math.max(1, Math.ceil(result.rows.length / query.per));
  const current = Math.min(query.page, pages);
  const rows = result.rows.subarray((current - 1) * query.per, current * query.per);
  const from = serialise({ ...query, page: 1, per: PER });
  const labelled = query.sort.endsWith("label") || rows.some((row) => result?.labels.has(row));
  if (!setups.length) {
    fill(
      results,
      h(
        "p",
        { class: "notice" },
        `No setup of this run has ${Object.entries(query.scope)
          .map(
            ([name, value]) =>
              `${SCOPES[/** @type {Scope} */ (name)].words.toLowerCase()} ${value === "all" ? "(any)" : value?.join(" or ")}`,
          )
          .join(" and ")}. `,
        h("button", { type: "button", onclick: () => go(changed({ scope: {} })) }, "Go back to the main setup"),
      ),
    );
    fill(pager);
    return;
  }
  if (!rows.length) {
    fill(
      results,
      h(
        "p",
        { class: "notice", id: "nothing" },
        "No feature passes all filters. The counts beside the filters say which one to loosen. ",
        h("button", { type: "button", onclick: clear }, "Clear filters"),
      ),
    );
    fill(pager);
    return;
  }
  const tops = (/** @type {string} */ language, /** @type {number} */ row) =>
    top[language][setupOf[row]]?.[feature[row]]?.filter((rank) => rank >= 0) ?? [];
  const cell = (/** @type {string} */ label, /** @type {string} */ css, /** @type {any[]} */ ...children) =>
    h("td", { role: "cell", class: css, "data-label": label }, children);
  const line = (/** @type {number} */ row) => {
    const setup = setups[setupOf[row]];
    const f = feature[row];
    const marks = (result?.labels.get(row) ?? []).map((label) => `${label.granularity ?? "–"}${label.note ? "✎" : ""}`);
    return h(
      "tr",
      { role: "row", "data-feature": f, "data-setup": setup.id },
      h(
        "th",
        { scope: "row", role: "rowheader", class: "f" },
        h(
          "a",
          {
            href: featureAddress(setup.id, f, { from }),
            "aria-label": `Feature ${f}${setups.length > 1 ? ` of ${setupWords(setup)}` : ""}`,
          },
          String(f),
        ),
      ),
      cell("", "class", classBadge(index.classes[cls[row]], flags.bilingual[row] === 1)),
      places.map((scope) =>
        cell(
          SCOPES[scope].words,
          "num place",
          scope === "step" ? setup.step.toLocaleString("en") : visible(String(setup[SCOPES[scope].field])),
        ),
      ),
      numbers.map((name) => cell(SHORT[name], "num", measure(RANGES[name].column, num[name][row]))),
      labelled ? cell("Label", `label${marks.length ? "" : " none"}`, marks.join(" ")) : null,
      index.languages.map((language) =>
        h(
          "td",
          {
            role: "cell",
            class: `words${tops(language, row).length ? "" : " none"}`,
            "data-language": language,
            "data-label": languageName(language),
          },
          h(
            "div",
            { class: "chips" },
            tops(language, row).map((rank) => chip(rank, { lang: language, limit: 18 })),
          ),
          h("div", { class: "snippets", "data-snippet": language }),
        ),
      ),
    );
  };
  fill(
    results,
    h(
      "table",
      { role: "table", class: "features", "aria-label": "Features found" },
      h(
        "thead",
        { role: "rowgroup" },
        h(
          "tr",
          { role: "row" },
          sortable("feature", "Feature"),
          sortable("class", "Class"),
          places.map((scope) =>
            scope in SORTS
              ? sortable(scope, SCOPES[scope].words, "num")
              : h("th", { scope: "col", role: "columnheader" }, SCOPES[scope].words),
          ),
          numbers.map((name) => sortable(name, SHORT[name], "num")),
          labelled ? sortable("label", "Label") : null,
          index.languages.map((language) =>
            h("th", { scope: "col", role: "columnheader", class: "words" }, languageName(language), ": tokens, strongest text"),
          ),
        ),
      ),
      h("tbody", { role: "rowgroup" }, Array.from(rows, line)),
    ),
  );
  if (sorted) results.querySelector(`[data-sort="${sorted}"]`)?.focus();
  sorted = "";
  drawPager(pages, current);
  fillSnippets(turn);
}

/** @param {number} own the turn that the rows belong to */
async function fillSnippets(own) {
  const needle = folded(query.q || query.text);
  // The list itself is on the screen before the pieces of text are unpacked.
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 0)));
  const ids = [...new Set([...results.querySelectorAll("tr[data-setup]")].map((row) => row.getAttribute("data-setup") ?? ""))];
  for (const id of ids) {
    let texts;
    try {
      texts = (await snippets(id)).snippets;
    } catch (error) {
      if (own === turn) fail(error);
      return;
    }
    if (own !== turn) return;
    for (const row of results.querySelectorAll("tr[data-setup]")) {
      if (row.getAttribute("data-setup") !== id) continue;
      const f = Number(row.getAttribute("data-feature"));
      for (const place of row.querySelectorAll("[data-snippet]")) {
        const language = place.getAttribute("data-snippet") ?? "";
        const some = texts[language]?.[f] ?? [];
        const best = (needle && some.find((/** @type {string} */ text) => folded(unmarked(text)).includes(needle))) || some[0];
        fill(place, best ? snippetLine(best, language, needle) : null);
      }
    }
  }
}

/** @param {number} pages @param {number} current */
function drawPager(pages, current) {
  const link = (/** @type {number} */ number, /** @type {string} */ words, /** @type {string} */ id) => {
    if (number < 1 || number > pages) return h("span", { class: "button", id, "aria-disabled": "true" }, words);
    const next = { ...query, page: number };
    return h(
      "a",
      { class: "button", id, href: addressOf(next), onclick: (/** @type {MouseEvent} */ event) => follow(event, next) },
      words,
    );
  };
  const per = h(
    "select",
    { id: "per", "aria-label": "Features per page", onchange: () => go(changed({ per: Number(per.value) })) },
    [...new Set([25, 50, 100, 200, query.per])]
      .sort((a, b) => a - b)
      .map((n) => h("option", { value: n, selected: n === query.per }, `${n} a page`)),
  );
  fill(
    pager,
    pages > 1
      ? [
          link(current - 1, "← Previous", "page-previous"),
          h("span", { class: "soft", id: "page" }, `page ${current.toLocaleString("en")} of ${pages.toLocaleString("en")}`),
          link(current + 1, "Next →", "page-next"),
        ]
      : null,
    per,
  );
}
