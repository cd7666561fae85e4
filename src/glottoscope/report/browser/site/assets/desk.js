// What find.html shows now: the query, the table it is asked of, what it found; and how another query takes over.
import { labels, tokens } from "./data.js";
import { LIMIT, loadTable, search } from "./list.js";
import { aliveOf, parse, serialise, setupsOf } from "./query.js";
import { visible } from "./text.js";
import { fail, fill, h, page, put, retitle, setupWords } from "./ui.js";

/** @typedef {import("./query.js").Query} Query */
/** @typedef {import("./list.js").Table} Table */
/** @typedef {import("./list.js").Result} Result */

export const main = page({ title: "Find features", here: "find.html" });

/** @type {import("./data.js").Site} */
export let index;
/** @type {Query} */
export let query;
/** @type {Table|null} */
export let table = null;
/** @type {Result|null} */
export let result = null;
let tableKey = "";
export let turn = 0;
/** @type {((query: Query, result: Result|null) => void)[]} */
export const updates = [];
/** Draws the rows. @type {() => void} */
let drawRows = () => {};

export const found = h("p", { id: "found", role: "status", "aria-live": "polite", tabindex: "-1" }, "Loading…");
export const problems = h("div", { id: "problems", role: "status" });
export const results = h("div", { id: "rows" });
export const pager = h("nav", { class: "pager row", "aria-label": "Pages of the list" });

/** @param {Partial<Query>} change */
export const changed = (change) => ({ ...query, page: 1, ...change });

/** @param {Query} some */
export const addressOf = (some) => `find.html${serialise(some) ? `?${serialise(some)}` : ""}`;

/** Take another query over: into the address and onto the page. @param {Query} next @param {boolean} [replace] */
export function go(next, replace = false) {
  query = next;
  fill(problems);
  if (replace) history.replaceState(null, "", addressOf(query));
  else history.pushState(null, "", addressOf(query));
  refresh();
}

/** Read the address and show what it says. */
export function read() {
  const parsed = parse(location.search, index);
  query = parsed.query;
  fill(
    problems,
    parsed.problems.length
      ? h(
          "div",
          { class: "notice" },
          h(
            "ul",
            null,
            parsed.problems.map((line) => h("li", null, visible(line.length > 300 ? `${line.slice(0, 300)}…` : line))),
          ),
        )
      : null,
  );
  refresh();
}

export async function refresh() {
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
  fill(
    found,
    h("strong", null, result.rows.length.toLocaleString("en")),
    ` of ${of.toLocaleString("en")} ${{ 1: "alive ", 0: "dead ", all: "" }[alive]}features · ${setupsWords}`,
  );
  if (table.left)
    put(
      found,
      h(
        "span",
        { class: "notice", id: "limit" },
        ` At most ${LIMIT.toLocaleString("en")} features are loaded for one list: ${table.left} of ${wanted} setups are left out. Choose fewer models, steps or layers.`,
      ),
    );
  drawRows();
}

/** Filters off; the setups stay. */
export const clear = () => go({ ...parse("", index).query, scope: query.scope, sort: query.sort, per: query.per });

/** Follow a link to another query inside the page, unless another tab or window is wanted. @param {MouseEvent} event @param {Query} next */
export function follow(event, next) {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey || event.button) return;
  event.preventDefault();
  go(next);
  window.scrollTo({ top: 0 });
  found.scrollIntoView({ block: "nearest" });
}

/**
 * Begin: the index is there, and who draws.
 * @param {import("./data.js").Site} data @param {() => void} draws the rows of `result`
 */
export function begin(data, draws) {
  index = data;
  drawRows = draws;
}
