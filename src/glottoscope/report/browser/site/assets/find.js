// find.html: the list of features that a query finds, and the controls that change the query.
import { labels, list, live, site, tokens } from "./data.js";
import { begin, found, main, pager, problems, read, refresh, results } from "./desk.js";
import {
  activeLine,
  classFacet,
  clearButton,
  flagFacet,
  jsonLink,
  labelFacet,
  rangeControl,
  scopeControl,
  searchRow,
  sortControl,
} from "./filters.js";
import { parse, RANGES, SCOPES, setupsOf } from "./query.js";
import { drawRows } from "./rows.js";
import { fail, fill, h, keys, put } from "./ui.js";

/** @typedef {import("./query.js").Scope} Scope */

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
  const index = await site();
  begin(index, drawRows);
  // The lists come while the tokens are still on their way.
  for (const setup of setupsOf(parse(location.search, index).query, index).slice(0, 6)) list(setup.id).catch(() => {});
  const [session, known] = await others;
  const served = session.live;
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
    h(
      "div",
      { class: "scopes", role: "group", "aria-label": "Setups" },
      /** @type {Scope[]} */ (Object.keys(SCOPES)).map(scopeControl),
    ),
    classFacet(),
    flagFacet(),
    h(
      "fieldset",
      { "data-facet": "range" },
      h("legend", null, "Measures"),
      Object.keys(RANGES).slice(0, 4).map(rangeControl),
      h("details", { class: "more" }, h("summary", null, "More measures"), Object.keys(RANGES).slice(4).map(rangeControl)),
    ),
    labelFacet(known),
  );
  wide.addEventListener("change", () => (filters.open = wide.matches));
  put(
    main,
    h("h1", null, "Find features"),
    problems,
    searchRow(),
    activeLine(),
    h(
      "div",
      { class: "find" },
      filters,
      h(
        "section",
        { id: "results", "aria-label": "Features found" },
        h(
          "div",
          { class: "row bar" },
          found,
          clearButton(),
          h("span", { class: "row end" }, served ? jsonLink() : null, sortControl()),
        ),
        results,
        pager,
      ),
    ),
  );
  addEventListener("popstate", read);
  // Shown again as it was left: labels may have been given since.
  addEventListener("pageshow", (event) => {
    if (event.persisted && served) labels({ fresh: true }).then(refresh, fail);
  });
  read();
  keys({
    "/": [() => document.getElementById("q")?.focus(), "search"],
    j: [() => move(1), "next feature of the list"],
    k: [() => move(-1), "previous feature of the list"],
    "]": [() => document.getElementById("page-next")?.click(), "next page"],
    "[": [() => document.getElementById("page-previous")?.click(), "previous page"],
  });
}

start().catch(fail);
