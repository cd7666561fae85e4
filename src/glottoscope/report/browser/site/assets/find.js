// find.html: the list of features that a query finds, and the controls that change the query.
import { labels, list, live, site, snippets, tokens } from "./data.js";
import { BINS, LIMIT, loadTable, search } from "./list.js";
import { FLAGS, LABELS, PER, RANGES, SCOPES, SORTS, aliveOf, chosen, parse, scopeValues, serialise, setupsOf } from "./query.js";
import { folded, snippetLine, unmarked, visible } from "./text.js";
import { chip, classBadge, className, classLook, fail, featureAddress, fill, format, h, keys, languageName, measure, measureOf, page, put, retitle, setupWords, svg } from "./ui.js";

/** @typedef {import("./query.js").Query} Query */
/** @typedef {import("./query.js").Scope} Scope */
/** @typedef {import("./list.js").Table} Table */
/** @typedef {import("./list.js").Result} Result */

const main = page({ title: "Find features", here: "find.html" });

/** @type {import("./data.js").Site} */
let index;
/** @type {Query} */
let query;
/** @type {Table|null} */
let table = null;
/** @type {Result|null} */
let result = null;
let tableKey = "";
/** Heading that was pressed: the new one takes the focus. */
let sorted = "";
let turn = 0;
let served = false;
/** @type {((query: Query, result: Result|null) => void)[]} */
const updates = [];

const found = h("p", { id: "found", role: "status", "aria-live": "polite", tabindex: "-1" }, "Loading…");
const problems = h("div", { id: "problems", role: "status" });
const results = h("div", { id: "rows" });
const pager = h("nav", { class: "pager row", "aria-label": "Pages of the list" });

// ---------------------------------------------------------------------------------------------------------------- state

/** @param {Partial<Query>} change */
const changed = (change) => ({ ...query, page: 1, ...change });

/** @param {Query} some */
const addressOf = (some) => `find.html${serialise(some) ? `?${serialise(some)}` : ""}`;

/** Take another query over: into the address and onto the page. @param {Query} next @param {boolean} [replace] */
function go(next, replace = false) {
  query = next;
  fill(problems);
  if (replace) history.replaceState(null, "", addressOf(query));
  else history.pushState(null, "", addressOf(query));
  refresh();
}

/** Read the address and show what it says. */
function read() {
  const parsed = parse(location.search, index);
  query = parsed.query;
  fill(problems, parsed.problems.length ? h("div", { class: "notice" }, h("ul", null, parsed.problems.map((line) => h("li", null, visible(line.length > 300 ? `${line.slice(0, 300)}…` : line))))) : null);
  refresh();
}

async function refresh() {
  const own = ++turn;
  for (const update of updates) update(query, null);
  const setups = setupsOf(query, index);
  retitle(query.q ? `${visible(query.q)} · Find features` : "Find features");
  try {
    const key = setups.map((setup) => setup.id).join("\n");
    if (key !== tableKey || !table) {
      results.setAttribute("aria-busy", "true");
      const loaded = await loadTable(index, setups, (done, of) => {
        if (own === turn && of > 3) fill(found, `Loading ${done} of ${of} lists…`);
      });
      if (own !== turn) return;
      [table, tableKey] = [loaded, key];
    }
    if (query.q || query.text) fill(found, "Searching the text…");
    const known = await labels();
    const next = await search(table, query, index, await tokens(), known.labels);
    if (own !== turn) return;
    result = next;
    draw(setups.length);
  } catch (error) {
    if (own !== turn) return;
    fill(found, "The list could not be loaded.");
    fill(results);
    fill(pager);
    fail(error);
  } finally {
    if (own === turn) results.removeAttribute("aria-busy");
  }
}

/** @param {number} wanted number of setups that the query means */
function draw(wanted) {
  if (!table || !result) return;
  main.querySelectorAll(".failure").forEach((element) => element.remove());
  for (const update of updates) update(query, result);
  const alive = aliveOf(query);
  const living = table.alive.reduce((sum, value) => sum + value, 0);
  const of = { 1: living, 0: table.n - living, all: table.n }[alive];
  const setupsWords = table.setups.length === 1 ? setupWords(table.setups[0]) : `${table.setups.length} setups`;
  fill(found, h("strong", null, result.rows.length.toLocaleString("en")), ` of ${of.toLocaleString("en")} ${{ 1: "alive ", 0: "dead ", all: "" }[alive]}features · ${setupsWords}`);
  if (table.left)
    put(found, h("span", { class: "notice", id: "limit" }, ` At most ${LIMIT.toLocaleString("en")} features are loaded for one list: ${table.left} of ${wanted} setups are left out. Choose fewer models, steps or layers.`));
  drawRows();
}

// ----------------------------------------------------------------------------------------------------------------- rows

/** Columns of numbers: the four main ones, and any other that the query filters or sorts by. */
function numberColumns() {
  const shown = ["R", "coherence", "phi", "density"];
  for (const name of Object.keys(RANGES)) if (!shown.includes(name) && (query.ranges[name] || query.sort.replace("-", "") === name)) shown.push(name);
  return shown;
}

const SHORT = /** @type {Object<string, string>} */ ({ R: "R", coherence: "Coherence", phi: "Phi", density: "Density", hidden: "R hidden", share: "Share", max: "Maximum", positions: "Positions" });

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
    h("button", { type: "button", class: "sort", "data-sort": name, title: meaning ?? null, onclick: () => { sorted = name; go(changed({ sort: next })); } }, words, h("span", { "aria-hidden": "true" }, by === name ? (down ? " ▼" : " ▲") : "")),
  );
}

function drawRows() {
  if (!table || !result) return;
  const { setups } = table;
  const varies = (/** @type {Scope} */ scope) => new Set(setups.map((setup) => setup[SCOPES[scope].field])).size > 1;
  const places = /** @type {Scope[]} */ (Object.keys(SCOPES)).filter(varies);
  const numbers = numberColumns();
  const pages = Math.max(1, Math.ceil(result.rows.length / query.per));
  const current = Math.min(query.page, pages);
  const rows = result.rows.subarray((current - 1) * query.per, current * query.per);
  const from = serialise({ ...query, page: 1, per: PER });
  const labelled = result.labels.size > 0;
  if (!setups.length) {
    fill(results, h("p", { class: "notice" }, `No setup of this run has ${Object.entries(query.scope).map(([name, value]) => `${SCOPES[/** @type {Scope} */ (name)].words.toLowerCase()} ${value === "all" ? "(any)" : value?.join(" or ")}`).join(" and ")}. `, h("button", { type: "button", onclick: () => go(changed({ scope: {} })) }, "Go back to the main setup")));
    fill(pager);
    return;
  }
  if (!rows.length) {
    fill(results, h("p", { class: "notice", id: "nothing" }, "No feature passes all filters. The counts beside the filters say which one to loosen. ", h("button", { type: "button", onclick: clear }, "Clear filters")));
    fill(pager);
    return;
  }
  const tops = (/** @type {string} */ language, /** @type {number} */ row) => table?.top[language][table.setup[row]]?.[table.feature[row]]?.filter((rank) => rank >= 0) ?? [];
  const cell = (/** @type {string} */ label, /** @type {string} */ css, /** @type {any[]} */ ...children) => h("td", { role: "cell", class: css, "data-label": label }, children);
  const line = (/** @type {number} */ row) => {
    const setup = setups[table.setup[row]];
    const f = table.feature[row];
    const marks = (result?.labels.get(row) ?? []).map((label) => `${label.granularity ?? "–"}${label.note ? "✎" : ""}`);
    return h(
      "tr",
      { role: "row", "data-feature": f, "data-setup": setup.id },
      h("th", { scope: "row", role: "rowheader", class: "f" }, h("a", { href: featureAddress(setup.id, f, { from }), "aria-label": `Feature ${f}${setups.length > 1 ? ` of ${setupWords(setup)}` : ""}` }, String(f))),
      cell("", "class", classBadge(index.classes[table.cls[row]], table.flags.bilingual[row] === 1)),
      places.map((scope) => cell(SCOPES[scope].words, "num place", scope === "step" ? setup.step.toLocaleString("en") : visible(String(setup[SCOPES[scope].field])))),
      numbers.map((name) => cell(SHORT[name], "num", measure(RANGES[name].column, table.num[name][row]))),
      labelled ? cell("Label", `label${marks.length ? "" : " none"}`, marks.join(" ")) : null,
      index.languages.map((language) =>
        h(
          "td",
          { role: "cell", class: `words${tops(language, row).length ? "" : " none"}`, "data-language": language, "data-label": languageName(language) },
          h("div", { class: "chips" }, tops(language, row).map((rank) => chip(rank, { lang: language, limit: 18 }))),
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
          places.map((scope) => (scope in SORTS ? sortable(scope, SCOPES[scope].words, "num") : h("th", { scope: "col", role: "columnheader" }, SCOPES[scope].words))),
          numbers.map((name) => sortable(name, SHORT[name], "num")),
          labelled ? sortable("label", "Label") : null,
          index.languages.map((language) => h("th", { scope: "col", role: "columnheader", class: "words" }, languageName(language), ": tokens, strongest text")),
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
    return h("a", { class: "button", id, href: addressOf(next), onclick: (/** @type {MouseEvent} */ event) => follow(event, next) }, words);
  };
  const per = h("select", { id: "per", "aria-label": "Features per page", onchange: () => go(changed({ per: Number(per.value) })) }, [...new Set([25, 50, 100, 200, query.per])].sort((a, b) => a - b).map((n) => h("option", { value: n, selected: n === query.per }, `${n} a page`)));
  fill(pager, pages > 1 ? [link(current - 1, "← Previous", "page-previous"), h("span", { class: "soft", id: "page" }, `page ${current.toLocaleString("en")} of ${pages.toLocaleString("en")}`), link(current + 1, "Next →", "page-next")] : null, per);
}

/** Follow a link inside the page, unless another tab or window is wanted. @param {MouseEvent} event @param {Query} next */
function follow(event, next) {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey || event.button) return;
  event.preventDefault();
  go(next);
  window.scrollTo({ top: 0 });
  found.scrollIntoView({ block: "nearest" });
}

// ------------------------------------------------------------------------------------------------------------- controls

/** Filters off; the setups stay. */
const clear = () => go({ ...parse("", index).query, scope: query.scope, sort: query.sort, per: query.per });

/** A choice of several values, or of all. @param {Scope} scope */
function scopeControl(scope) {
  const values = scopeValues(index, scope);
  if (values.length < 2) return null;
  const { words, field } = SCOPES[scope];
  const shown = h("b", { class: "value" });
  const set = (/** @type {"all"|string[]|undefined} */ value) => go(chosen(query, index, scope, Array.isArray(value) && value.length === values.length ? "all" : value));
  const ticked = () => values.filter((value) => boxes.get(value).checked);
  const boxes = new Map(values.map((value) => [value, h("input", { type: "checkbox", value, onchange: () => set(ticked()) })]));
  const all = h("input", { type: "checkbox", value: "all", onchange: () => set(all.checked ? "all" : undefined) });
  const name = (/** @type {string} */ value) => (field === "step" ? Number(value).toLocaleString("en") : scope === "control" && value === "none" ? "none (trained model)" : visible(value));
  updates.push((now) => {
    const meant = new Set(setupsOf(now, index).map((setup) => String(setup[field])));
    for (const [value, box] of boxes) box.checked = meant.has(value);
    all.checked = now.scope[scope] === "all";
    const some = values.filter((value) => meant.has(value));
    fill(shown, now.scope[scope] === "all" ? "all" : some.length ? some.map((value) => (value === "none" ? "none" : name(value))).join(", ") : "–");
  });
  return h(
    "details",
    { class: "scope", "data-scope": scope },
    h("summary", null, h("span", null, words), shown),
    h(
      "div",
      { role: "group", "aria-label": words },
      h("div", { class: "option" }, h("label", null, all, " all")),
      values.map((value) => h("div", { class: "option" }, h("label", null, boxes.get(value), ` ${name(value)}`), h("button", { type: "button", class: "only", "data-value": value, "aria-label": `only ${words.toLowerCase()} ${value}`, onclick: () => set([value]) }, "only"))),
    ),
  );
}

/** A button with a count that is on or off. @param {string} value @param {any} words @param {(now: Query) => boolean} isOn @param {(all: Result) => number} count @param {() => Query} next */
function toggle(value, words, isOn, count, next) {
  const n = h("span", { class: "n" });
  const button = h("button", { type: "button", class: "facet", "data-value": value, "aria-pressed": "false", onclick: () => go(next()) }, h("span", null, words), n);
  updates.push((now, all) => {
    button.setAttribute("aria-pressed", String(isOn(now)));
    if (!all) return;
    fill(n, count(all).toLocaleString("en"));
    button.classList.toggle("empty", count(all) === 0);
  });
  return button;
}

/** @param {string[]} some @param {string} value */
const flipped = (some, value) => (some.includes(value) ? some.filter((other) => other !== value) : [...some, value]);

function classFacet() {
  return h(
    "fieldset",
    { "data-facet": "class" },
    h("legend", null, "Class"),
    index.classes.map((cls, number) => {
      const { shape, css } = classLook(cls);
      const next = () => changed({ class: flipped(query.class, cls) });
      return toggle(cls, [h("span", { class: `shape ${css}`, "aria-hidden": "true" }, shape), ` ${className(cls)}`], (now) => now.class.includes(cls), (all) => all.counts.class[number], next);
    }),
    h("label", { class: "option", "data-facet": "alive" }, dead(), " show dead features too"),
  );
}

function dead() {
  const box = h("input", { type: "checkbox", id: "alive", onchange: () => go(changed({ alive: box.checked ? "all" : aliveOf({ ...query, alive: "" }) === "1" ? "" : "1" })) });
  updates.push((now) => (box.checked = aliveOf(now) !== "1"));
  return box;
}

function flagFacet() {
  const one = (/** @type {string} */ name, /** @type {string} */ value, /** @type {string} */ words) =>
    toggle(
      value,
      words,
      (now) => now.flag.includes(value),
      (all) => all.counts.flag[value],
      () => changed({ flag: flipped(query.flag.filter((other) => other === value || other.replace("!", "") !== name), value) }),
    );
  return h("fieldset", { "data-facet": "flag" }, h("legend", null, "Flags"), Object.entries(FLAGS).map(([name, words]) => h("div", { class: "yesno", title: measureOf(name)?.meaning ?? null }, one(name, name, words), one(name, `!${name}`, "not"))));
}

/** @param {string} name */
function rangeControl(name) {
  const { column, words, log } = RANGES[name];
  const ends = /** @type {const} */ (["low", "high"]);
  const inputs = ends.map((end, side) => {
    const input = h("input", {
      type: "number",
      step: "any",
      inputmode: "decimal",
      "data-end": end,
      "aria-label": `${words}: ${side ? "at most" : "at least"}`,
      onchange: () => {
        const range = /** @type {[number|null, number|null]} */ (inputs.map((other) => (other.value === "" ? null : Number(other.value))));
        const next = { ...query.ranges };
        if (range[0] === null && range[1] === null) delete next[name];
        else next[name] = range;
        if (range[0] !== null && range[1] !== null && range[0] > range[1]) return fill(note, "The first number is larger than the second.");
        go(changed({ ranges: next }));
      },
    });
    return input;
  });
  const note = h("span", { class: "small soft", role: "status" });
  const bars = svg("svg", { viewBox: `0 0 ${BINS * 4} 24`, preserveAspectRatio: "none", class: "bars", "aria-hidden": "true" });
  updates.push((now, all) => {
    const range = now.ranges[name] ?? [null, null];
    inputs.forEach((input, side) => {
      if (document.activeElement !== input || Number(input.value) !== range[side]) input.value = range[side] ?? "";
    });
    fill(note);
    if (!all || !table) return;
    const { low, high } = table.domains[name];
    const counts = all.bars[name];
    const most = Math.max(1, ...counts);
    const edge = (/** @type {number} */ i) => (log ? low * (high / low) ** (i / BINS) : low + ((high - low) * i) / BINS);
    fill(
      bars,
      Array.from(counts, (count, i) => {
        const inside = edge(i + 1) >= (range[0] ?? -Infinity) && edge(i) <= (range[1] ?? Infinity);
        const height = count ? Math.max(1.5, (22 * count) / most) : 0;
        return svg("rect", { x: i * 4, y: 24 - height, width: 3.4, height, class: inside ? "in" : "out" });
      }),
    );
    if (high >= low) inputs.forEach((input, side) => (input.placeholder = format(column, side ? high : low)));
    else inputs.forEach((input) => (input.placeholder = "none"));
  });
  const meaning = measureOf(column)?.meaning;
  return h("div", { class: "range", "data-range": name, role: "group", "aria-label": words, title: meaning ?? null }, h("span", { class: "legend" }, words, log ? h("span", { class: "soft small" }, " (log)") : null), bars, h("div", { class: "ends" }, inputs[0], h("span", { class: "soft" }, "to"), inputs[1]), note);
}

/** @param {{names: Object<string, string>, raters: string[]}} known */
function labelFacet(known) {
  const words = (/** @type {string} */ value) => (known.names[value] ? `${value} ${known.names[value]}` : { any: "any label", none: "no label", note: "with a note" }[value] ?? value);
  const select = h("select", { id: "rater", "aria-label": "Labels of", onchange: () => go(changed({ rater: select.value })) });
  updates.push((now) => {
    const raters = [...new Set([...known.raters, now.rater].filter(Boolean))];
    fill(select, h("option", { value: "" }, "all raters"), raters.map((rater) => h("option", { value: rater }, visible(rater))));
    select.value = now.rater;
    select.hidden = raters.length < 2 && !now.rater;
  });
  return h(
    "fieldset",
    { "data-facet": "label" },
    h("legend", null, "Label"),
    select,
    LABELS.map((value) => toggle(value, words(value), (now) => now.label === value, (all) => all.counts.label[value], () => changed({ label: query.label === value ? "" : value }))),
  );
}

function searchRow() {
  const input = h("input", { type: "search", id: "q", placeholder: index.languages.includes("ja") ? "a token or text, as dog or 犬" : "a token or text", "aria-label": "Search tokens and text", autocomplete: "off", spellcheck: "false", maxlength: 500 });
  const lang = h("select", { id: "lang", "aria-label": "Language searched", onchange: () => go(changed({ lang: lang.value })) }, h("option", { value: "" }, "any language"), index.languages.map((code) => h("option", { value: code }, languageName(code))));
  let typed = false;
  /** @type {any} */
  let timer = 0;
  const commit = () => {
    clearTimeout(timer);
    if (input.value.trim() === query.q) return;
    // One entry of the history for all that is typed in one go.
    go(changed({ q: input.value.trim() }), typed);
    typed = true;
  };
  input.addEventListener("input", (/** @type {InputEvent} */ event) => {
    clearTimeout(timer);
    if (!event.isComposing) timer = setTimeout(commit, 250);
  });
  input.addEventListener("compositionend", () => (timer = setTimeout(commit, 250)));
  input.addEventListener("change", commit);
  input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") commit();
    if (event.key === "Escape" && input.value === "") input.blur();
  });
  input.addEventListener("blur", () => (typed = false));
  updates.push((now) => {
    if (input.value.trim() !== now.q) input.value = now.q;
    lang.value = now.lang;
  });
  return h("div", { class: "searchrow", role: "search" }, input, lang);
}

/** Filters that have no control of their own. */
function activeLine() {
  const line = h("div", { class: "row active" });
  updates.push((now) => {
    const words = /** @type {[("token"|"text"), string][]} */ ([["token", "token contains"], ["text", "text contains"]]);
    fill(line, words.filter(([name]) => now[name]).map(([name, said]) => h("button", { type: "button", "data-remove": name, onclick: () => go(changed({ [name]: "" })) }, `${said} “${visible(now[name])}” `, h("span", { "aria-hidden": "true" }, "×"), h("span", { class: "sr" }, " remove"))));
    line.hidden = !line.childElementCount;
  });
  return line;
}

function clearButton() {
  const button = h("button", { type: "button", id: "clear", onclick: () => { clear(); found.focus(); } }, "Clear filters");
  updates.push((now) => {
    button.hidden = !(now.class.length + now.flag.length + Object.keys(now.ranges).length > 0 || now.q || now.token || now.text || now.lang || now.label || now.rater || now.alive);
  });
  return button;
}

function sortControl() {
  const select = h("select", { id: "sort", "aria-label": "Sort by", onchange: () => go(changed({ sort: select.value })) });
  const options = [["", "setup and number"], ...Object.entries(SORTS).flatMap(([name, words]) => (name in RANGES || name === "label" ? [[`-${name}`, `${words}, highest first`], [name, `${words}, lowest first`]] : [[name, words], [`-${name}`, `${words}, backwards`]]))];
  fill(select, options.map(([value, words]) => h("option", { value }, words)));
  updates.push((now) => (select.value = now.sort));
  return h("label", { class: "sortby" }, h("span", { class: "soft small" }, "Sort by "), select);
}

function jsonLink() {
  const link = h("a", { id: "json", class: "small" }, "this list as JSON");
  updates.push((now) => (link.href = `data/find.json${serialise(now) ? `?${serialise(now)}` : ""}`));
  return link;
}

// ----------------------------------------------------------------------------------------------------------------- start

/** Focus the link of the next or previous row. @param {number} by */
function move(by) {
  const links = [...results.querySelectorAll("tr[data-feature] th a")];
  const at = links.indexOf(document.activeElement?.closest("tr")?.querySelector("th a") ?? document.body);
  const next = links[Math.min(links.length - 1, Math.max(0, at + by))];
  if (next instanceof HTMLElement) next.focus();
}

async function start() {
  const others = Promise.all([live(), labels(), tokens()]);
  // Its failure is told where it is awaited.
  others.catch(() => {});
  index = await site();
  // The lists come while the tokens are still on their way.
  for (const setup of setupsOf(parse(location.search, index).query, index).slice(0, 6)) list(setup.id).catch(() => {});
  const [session, known] = await others;
  served = session.live;
  if (!index.setups.length) {
    fill(found, "This site has no setups yet.");
    put(main, found);
    return;
  }
  const wide = matchMedia("(min-width: 60rem)");
  const filters = h(
    "details",
    { id: "filters", open: wide.matches },
    h("summary", null, "Filters"),
    h("div", { class: "scopes", role: "group", "aria-label": "Setups" }, /** @type {Scope[]} */ (Object.keys(SCOPES)).map(scopeControl)),
    classFacet(),
    flagFacet(),
    h("fieldset", { "data-facet": "range" }, h("legend", null, "Measures"), Object.keys(RANGES).slice(0, 4).map(rangeControl), h("details", { class: "more" }, h("summary", null, "More measures"), Object.keys(RANGES).slice(4).map(rangeControl))),
    labelFacet(known),
  );
  wide.addEventListener("change", () => (filters.open = wide.matches));
  put(
    main,
    h("h1", null, "Find features"),
    problems,
    searchRow(),
    activeLine(),
    h("div", { class: "find" }, filters, h("section", { id: "results", "aria-label": "Features found" }, h("div", { class: "row bar" }, found, clearButton(), h("span", { class: "row end" }, served ? jsonLink() : null, sortControl())), results, pager)),
  );
  addEventListener("popstate", read);
  read();
  keys({
    "/": [() => main.querySelector("#q")?.focus(), "search"],
    j: [() => move(1), "next feature of the list"],
    k: [() => move(-1), "previous feature of the list"],
    "]": [() => main.querySelector("a#page-next")?.click(), "next page"],
    "[": [() => main.querySelector("a#page-previous")?.click(), "previous page"],
  });
}

start().catch(fail);
