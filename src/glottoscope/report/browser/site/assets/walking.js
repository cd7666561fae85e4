// Previous and next: in the order of the list that the reader came from, else by number.
import { labels, tokens } from "./data.js";
import { loadTable, search } from "./list.js";
import { parse, setupsOf } from "./query.js";
import { encode, fail, featureAddress, fill, h } from "./ui.js";

/** @typedef {import("./shown.js").Shown} Shown */

/** Rows of the list, kept while its query stays. @type {{query: string, rows: Promise<{ids: string[], features: number[]}>}|null} */
let walked = null;

/** @param {string} from @param {import("./data.js").Site} index @returns {Promise<{ids: string[], features: number[]}>} */
async function listOf(from, index) {
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
    if (walked?.query !== now.from) walked = { query: now.from, rows: listOf(now.from, now.site) };
    const { ids, features } = await walked.rows;
    const at = features.findIndex((f, i) => f === now.f && ids[i] === now.setup.id);
    const one = (/** @type {number} */ i) =>
      /** @type {[string, number]|null} */ (i >= 0 && i < ids.length ? [ids[i], features[i]] : null);
    if (at >= 0)
      return {
        before: one(at - 1),
        after: one(at + 1),
        words: `${(at + 1).toLocaleString("en")} of ${ids.length.toLocaleString("en")} in your list`,
      };
  }
  const alive = now.columns.alive;
  const one = (/** @type {number} */ by) => {
    for (let f = now.f + by; f >= 0 && f < alive.length; f += by)
      if (alive[f]) return /** @type {[string, number]} */ ([now.setup.id, f]);
    return null;
  };
  return { before: one(-1), after: one(1), words: now.from ? "not in the list you came from: by number" : "by number" };
}

/** @param {Shown} now */
export function walk(now) {
  const words = h("span", { class: "soft small", id: "place" });
  const link = (/** @type {string} */ id, /** @type {string} */ text) =>
    h("a", { class: "button", id, "aria-disabled": "true" }, text);
  const [before, after] = [link("prev", "← Previous"), link("next", "Next →")];
  // Who walks by Tab and Enter stays on the link that was followed.
  const focused = document.activeElement?.id;
  const bar = h(
    "nav",
    { class: "row walk", "aria-label": "Features" },
    h(
      "a",
      {
        href: `find.html${now.from ? `?${now.from}` : `?model=${encode(now.setup.name)}&control=${encode(now.setup.control)}&step=${now.setup.step}&layer=${now.setup.layer}&lm_seed=${now.setup.lm_seed}&seed=${now.setup.sae_seed}`}`,
        id: "back",
      },
      now.from ? "Back to the list" : now.blind ? "To a list" : "All features of this setup",
    ),
    words,
    h("span", { class: "row end" }, before, after),
  );
  around(now).then(
    (found) => {
      fill(words, found.words);
      for (const [element, target] of /** @type {[HTMLAnchorElement, [string, number]|null][]} */ ([
        [before, found.before],
        [after, found.after],
      ])) {
        if (!target) continue;
        element.removeAttribute("aria-disabled");
        element.href = featureAddress(target[0], target[1], { from: now.from, blind: now.blind ? "1" : null });
        element.addEventListener("click", (event) => now.follow(event, element.href));
      }
      if (focused === "prev" || focused === "next")
        (focused === "next" ? (found.after ? after : before) : found.before ? before : after).focus();
    },
    (error) => fail(error),
  );
  return bar;
}
