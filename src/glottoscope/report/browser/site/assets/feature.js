// feature.html: one feature, its text, its measures, its neighbours, and the form that labels it.
import {
  DataError,
  feature as loadFeature,
  labels,
  list,
  live,
  setupById,
  setupNumber,
  shardAddress,
  site,
  tokens,
} from "./data.js";
import { histogram } from "./histogram.js";
import { labelSection } from "./labelling.js";
import { classSentence, measureList, notable } from "./measures.js";
import { nearSection, overSection } from "./near.js";
import { exampleSection, pairSection, tokenSection } from "./passages.js";
import { compareAddress, value } from "./shown.js";
import { jsonLink } from "./twin.js";
import { classBadge, fail, featureAddress, fill, h, keys, page, parseFeature, put, retitle, setupWords } from "./ui.js";
import { walk } from "./walking.js";

/** @typedef {import("./shown.js").Shown} Shown */

const main = page({ title: "Feature", here: "feature.html" });

/** @type {Shown|null} */
let shown = null;
let turn = 0;

/** Show another feature without loading the page again. @param {MouseEvent} event @param {string} address */
function follow(event, address) {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey || event.button) return;
  event.preventDefault();
  history.pushState(null, "", address);
  window.scrollTo({ top: 0 });
  show();
}

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
    const index = await site();
    if (!asked)
      throw new DataError(
        parameters.get("f") ? `“${parameters.get("f")}” names no feature.` : "The address names no feature.",
        "Write feature.html?f=SETUP:NUMBER, as in feature.html?f=d128@600/layer_02/seed_0:17, or choose one on the page Find.",
      );
    shardAddress(asked.setup, asked.feature);
    const setup = setupById(asked.setup);
    if (!setup || setupNumber(asked.setup) < 0) return;
    const [{ columns, top }, record, known, session] = await Promise.all([
      list(setup.id),
      loadFeature(setup.id, asked.feature),
      labels(),
      live(),
      tokens(),
    ]);
    if (own !== turn) return;
    shown = {
      site: index,
      setup,
      f: asked.feature,
      from: parameters.get("from"),
      blind: parameters.get("blind") === "1",
      columns,
      top,
      record,
      follow,
    };
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
  const { site: index, setup, f, blind, columns } = now;
  const cls = index.classes[columns.class[f] ?? -1] ?? "unclassified";
  const title = blind ? `Feature ${f} · blind` : `Feature ${f} · ${setupWords(setup)}`;
  retitle(title);
  const toggle = h(
    "button",
    {
      type: "button",
      id: "blind",
      "aria-pressed": String(blind),
      title: "Hide class, measures, step and neighbours while labelling",
      onclick: () => setBlind(!blind),
    },
    "Blind",
  );
  const alive = columns.alive[f];
  fill(
    main,
    walk(now),
    h(
      "div",
      { class: "titlebar" },
      h("h1", { id: "title" }, title),
      h(
        "span",
        { class: "row end" },
        alive && !blind ? h("a", { href: compareAddress(now), class: "button", id: "to-compare" }, "Compare") : null,
        toggle,
        blind ? null : jsonLink(now, session.live),
      ),
    ),
    blind
      ? h("p", { class: "soft" }, "Class, measures, step and neighbours are hidden. The address still names the setup.")
      : h(
          "div",
          { id: "summary" },
          h(
            "p",
            { id: "class-words", "data-class": cls },
            classBadge(cls, columns.bilingual?.[f]),
            " ",
            classSentence(now, now.site),
          ),
          alive ? notable(now, now.site) : null,
        ),
    alive
      ? h(
          "div",
          { class: `featuregrid${blind ? " blind" : ""}` },
          h("div", { class: "left" }, tokenSection(now), exampleSection(now), blind ? null : pairSection(now)),
          h(
            "div",
            { class: "right" },
            session.live ? labelSection(now, known, session) : null,
            blind ? null : [histogramSection(now), measureSection(now), nearSection(now), overSection(now)],
            session.live ? null : labelSection(now, known, session),
          ),
        )
      : h(
          "div",
          { class: "featuregrid" },
          h(
            "p",
            { id: "dead" },
            "It was among the active features of no position of the test text, so it has no tokens, examples, measures or neighbours.",
          ),
          labelSection(now, known, session),
        ),
  );
}

/** @param {Shown} now */
function histogramSection(now) {
  const section = h(
    "section",
    { id: "histogram", "aria-labelledby": "histogram-title" },
    h("h2", { id: "histogram-title" }, "Activations"),
  );
  const counts = now.record.activations;
  if (!counts)
    put(section, h("p", { class: "soft" }, "Not recorded: this run is from before activations were counted. Run the study again."));
  else put(section, histogram(counts, now.site, value(now, "max_activation")));
  return section;
}

/** @param {Shown} now */
const measureSection = (now) =>
  h(
    "section",
    { id: "measures", "aria-labelledby": "measures-title" },
    h("h2", { id: "measures-title" }, "Measures"),
    measureList(now, now.site),
  );

/** @param {string} id */
const press = (id) => () => document.getElementById(id)?.click();
const [previous, next] = [press("prev"), press("next")];

/** @type {any} */
const labelKeys = {
  ...Object.fromEntries(
    ["1", "2", "3", "4"].map((grade) => [
      grade,
      [() => document.querySelector(`[data-grade="${grade}"]`)?.dispatchEvent(new MouseEvent("click")), "label"],
    ]),
  ),
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
