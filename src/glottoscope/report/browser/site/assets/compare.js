// compare.html: one feature's counterparts over the checkpoints (?f=), or any two features side by side (?a=, ?b=).
import { styled } from "./charts.js";
import { counterparts } from "./counterparts.js";
import { DataError, list, setupById, shardAddress, site as loadSite, tokens } from "./data.js";
import { badge, byChance, classOf, cosine, evidence, glimpse, isBilingual, link, numberOf } from "./glance.js";
import { findAddress, firstSetup } from "./looks.js";
import { encode, fail, fill, format, h, languageName, page, parseFeature, retitle, setupWords } from "./ui.js";

/** @typedef {import("./glance.js").Feature} Feature */

const main = page({ title: "Compare", here: "compare.html" });
let turn = 0;

/** The feature that a reader wrote: "ID:F", or the address of a page that shows it. @param {string} text */
function meant(text) {
  const query = text.includes("?") ? new URLSearchParams(text.slice(text.indexOf("?") + 1).replace(/#.*$/, "")) : null;
  return parseFeature((query?.get("f") ?? query?.get("a") ?? text).trim());
}

/** @param {string|null} value */
function checked(value) {
  const found = meant(value ?? "");
  if (!found) throw new DataError(`“${value}” names no feature.`, "Write SETUP:NUMBER, as in d128@600/layer_02/seed_0:17, or paste the address of a feature's page.");
  shardAddress(found.setup, found.feature);
  const setup = setupById(found.setup);
  if (!setup) throw new DataError(`This site has no setup ${found.setup}.`, "Choose one on the page Find.");
  return { setup, f: found.feature };
}

/** The form that takes two features by address. @param {string} a @param {string} b */
function picker(a, b) {
  const field = (/** @type {string} */ id, /** @type {string} */ words, /** @type {string} */ value) => h("label", { for: id }, h("span", null, words), h("input", { id, name: id, value, autocomplete: "off", spellcheck: "false", size: 34, placeholder: "d128@600/layer_02/seed_0:17" }));
  const form = h("form", { id: "pick", class: "controls" }, field("a", "Feature, or the address of its page", a), field("b", "A second one, to compare with it (optional)", b), h("button", { type: "submit", class: "main" }, "Compare"));
  form.addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    const [first, second] = ["a", "b"].map((id) => form.querySelector(`#${id}`).value.trim());
    const names = [first, second].filter(Boolean).map((text) => {
      const found = meant(text);
      return encode(found ? `${found.setup}:${found.feature}` : text);
    });
    if (!names.length) return;
    history.pushState(null, "", names.length > 1 ? `compare.html?a=${names[0]}&b=${names[1]}` : `compare.html?f=${names[0]}`);
    show();
  });
  return form;
}

// --------------------------------------------------------------------------------------------------------------- two features

/** What is known of the cosine of two decoder directions, in words. @param {Feature} a @param {Feature} b */
function relation(a, b) {
  const [x, y] = [a.setup, b.setup];
  const same = x.model === y.model && x.layer === y.layer && x.sae_seed === y.sae_seed && x.lm_seed === y.lm_seed && x.control === y.control;
  if (x === y && a.f === b.f) return "This is one feature twice.";
  if (!same) return "No cosine is given: directions of different models, layers or seeds are not of one space, or not of one SAE's course.";
  const chance = `By chance, two random directions in ${x.d_model} dimensions have a cosine of about 0 ± ${cosine(1 / Math.sqrt(x.d_model))}`;
  if (x === y) {
    const near = /** @type {[number, number][]} */ (a.record.near ?? []);
    const known = near.find(([f]) => f === b.f) ?? /** @type {[number, number][]} */ (b.record.near ?? []).find(([f]) => f === a.f);
    if (known) return `Cosine of the decoder directions: ${cosine(known[1])}. ${chance}.`;
    const least = [a, b].flatMap((one) => /** @type {[number, number][]} */ (one.record.near ?? []).slice(-1).map(([, value]) => value));
    return near.length ? `Cosine of the decoder directions: at most ${cosine(Math.min(...least))}, as neither is among the ${near.length} nearest of the other. ${chance}.` : "The cosine of the decoder directions is not known.";
  }
  const site = /** @type {any} */ (loaded);
  const best = (/** @type {Feature} */ from, /** @type {Feature} */ to) => (from.record.over ?? []).find((/** @type {any[]} */ entry) => site.setups[entry[0]] === to.setup);
  const [there, back] = [best(a, b), best(b, a)];
  const exact = there?.[1] === b.f ? there[2] : back?.[1] === a.f ? back[2] : null;
  const largest = `Of ${y.n_alive.toLocaleString("en")} random directions the nearest would have up to about ${cosine(byChance(y))}.`;
  if (exact !== null) return `Cosine of the decoder directions: ${cosine(exact)}${there?.[1] === b.f && back?.[1] === a.f ? "; each is the other's best counterpart" : there?.[1] === b.f ? "; the second is the first one's best counterpart" : "; the first is the second one's best counterpart"}. ${largest}`;
  const most = [there?.[2], back?.[2]].filter((value) => value !== undefined);
  return most.length ? `Cosine of the decoder directions: at most ${cosine(Math.min(...most))}, as neither is the other's best counterpart. ${largest}` : "The cosine of the decoder directions is not known.";
}

/** @param {Feature} a @param {Feature} b */
function shared(a, b) {
  const site = /** @type {any} */ (loaded);
  const parts = site.languages.flatMap((/** @type {string} */ language) => {
    const [x, y] = [a, b].map((one) => new Set((one.record.tokens?.[language] ?? []).map((/** @type {number[]} */ entry) => entry[0])));
    if (!x.size || !y.size) return [];
    return [`${[...x].filter((rank) => y.has(rank)).length} of ${Math.min(x.size, y.size)} ${languageName(language)}`];
  });
  return parts.length ? `Top tokens in common: ${parts.join(", ")}.` : "";
}

/** @param {Feature} a @param {Feature} b */
function measureTable(a, b) {
  const site = /** @type {any} */ (loaded);
  const names = site.measures.map((/** @type {any} */ measure) => measure.name).filter((/** @type {string} */ name) => !["class", "alive", "examples", "granularity", "bilingual", "bilingual_paper", "supportable", "single_token"].includes(name) && (a.columns[name] || b.columns[name]));
  const flags = ["bilingual", "bilingual_paper", "supportable", "single_token"].filter((name) => a.columns[name] || b.columns[name]);
  const label = (/** @type {string} */ name) => site.measures.find((/** @type {any} */ measure) => measure.name === name)?.label ?? name.replaceAll("_", " ");
  const meaning = (/** @type {string} */ name) => site.measures.find((/** @type {any} */ measure) => measure.name === name)?.meaning ?? null;
  const yes = (/** @type {number|null} */ value) => (value === null ? "–" : value ? "yes" : "no");
  const row = (/** @type {string} */ name) => {
    const [x, y] = [numberOf(a, name), numberOf(b, name)];
    const cell = (/** @type {number|null} */ value, /** @type {number|null} */ other) => {
      const larger = value !== null && other !== null && format(name, value) !== format(name, other) && value > other;
      return h("td", { class: `num${larger ? " larger" : ""}` }, larger ? [h("span", { "aria-hidden": "true" }, "▲ "), h("span", { class: "sr" }, "larger: ")] : null, format(name, value));
    };
    return h("tr", { "data-measure": name }, h("th", { scope: "row", title: meaning(name) }, label(name)), cell(x, y), cell(y, x));
  };
  const head = (/** @type {Feature} */ one) => h("th", { scope: "col", class: "num" }, link(one), h("span", { class: "soft small block" }, setupWords(one.setup)));
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Measures of both" },
    h(
      "table",
      { id: "both" },
      h("caption", null, "Measures; ▲ marks the larger"),
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "measure"), head(a), head(b))),
      h("tbody", null, h("tr", null, h("th", { scope: "row" }, "class"), [a, b].map((one) => h("td", { class: "num" }, badge(one)))), flags.map((name) => h("tr", { "data-measure": name }, h("th", { scope: "row", title: meaning(name) }, label(name)), [a, b].map((one) => h("td", { class: "num" }, yes(numberOf(one, name)))))), names.map(row)),
    ),
  );
}

/** @param {Feature} a @param {Feature} b @param {HTMLElement} place */
function sideBySide(a, b, place) {
  const column = (/** @type {Feature} */ one, /** @type {string} */ id) =>
    h(
      "section",
      { class: "side", id, "aria-label": `feature ${one.f}, ${setupWords(one.setup)}` },
      h("h2", { class: "plain" }, link(one, `Feature ${one.f}`), " ", badge(one)),
      h("p", { class: "soft small" }, setupWords(one.setup), " · ", h("a", { href: `compare.html?f=${encode(`${one.setup.id}:${one.f}`)}` }, "its counterparts")),
      classOf(one) === "dead" ? h("p", null, "Dead: never active on the test text.") : evidence(one, { examples: 3, level: "h3" }),
    );
  const same = classOf(a) === classOf(b) && isBilingual(a) === isBilingual(b);
  fill(
    place,
    h("h1", null, `Feature ${a.f} and feature ${b.f}`),
    h("p", { id: "relation" }, relation(a, b), " ", shared(a, b), same ? "" : " They are of different classes."),
    h("div", { class: "sides" }, column(a, "side-a"), column(b, "side-b")),
    measureTable(a, b),
  );
}

// ----------------------------------------------------------------------------------------------------------------------- page

/** What the page is for, and a feature to begin with. @param {HTMLElement} place */
async function begin(place) {
  const first = firstSetup(/** @type {any} */ (loaded));
  const { columns } = await list(first.id);
  const score = columns.phi ?? columns.monosemanticity ?? [];
  let best = -1;
  for (let f = 0; f < first.n_features; f++) if (columns.alive[f] && score[f] !== null && score[f] !== undefined && (best < 0 || score[f] > score[best])) best = f;
  fill(
    place,
    h("h1", null, "Compare"),
    h("p", null, "Follow one feature through training: at every other checkpoint of its model, layer and seed, the feature whose decoder direction is nearest to it. Or put any two features side by side."),
    best < 0 ? null : h("p", null, "To begin with: ", h("a", { href: `compare.html?f=${encode(`${first.id}:${best}`)}`, id: "example" }, `feature ${best} of ${setupWords(first)}`), `, the one with the highest ${columns.phi ? "phi" : "R"} there. Others are under `, h("a", { href: findAddress(/** @type {any} */ (loaded), first, columns.phi ? "share_bilingual" : "") }, "Find"), "."),
  );
}

/** @type {import("./data.js").Site|null} */
let loaded = null;

async function show() {
  const own = ++turn;
  const given = new URLSearchParams(location.search);
  const [f, a, b] = ["f", "a", "b"].map((name) => given.get(name));
  const place = h("div", { id: "view" }, h("p", { class: "soft" }, "Loading…"));
  try {
    [loaded] = await Promise.all([loadSite(), tokens(), styled()]);
    if (own !== turn) return;
    fill(main, place, h("section", { class: "again", "aria-labelledby": "pick-title" }, h("h2", { id: "pick-title" }, "Compare others"), picker(a ?? f ?? "", b ?? "")));
    if (a && b) {
      const [one, two] = [checked(a), checked(b)];
      const [x, y] = await Promise.all([glimpse(one.setup, one.f), glimpse(two.setup, two.f)]);
      if (own !== turn) return;
      retitle(`Features ${one.f} and ${two.f}`);
      sideBySide(x, y, place);
    } else if (f || a || b) {
      const one = checked(f ?? a ?? b);
      retitle(`Feature ${one.f} over the checkpoints`);
      await counterparts(one.setup, one.f, place);
    } else {
      retitle("Compare");
      await begin(place);
    }
  } catch (error) {
    if (own !== turn) return;
    fill(place, h("h1", null, "Compare"));
    fail(error);
  }
}

addEventListener("popstate", show);
show();
