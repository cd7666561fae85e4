// index.html: what the study is, its curves over training, layers and sizes, and a map that leads to the features behind them.
import { linearAxis, logAxis } from "./axes.js";
import { lines, rangeOf, styled, twin } from "./charts.js";
import { overview, site as loadSite } from "./data.js";
import { heat } from "./heat.js";
import { bundles, controlLook, findAddress, firstSetup, groups, labelOf, look, meaningOf, measured, middleLayer, modelLook } from "./looks.js";
import { readState, writeState } from "./state.js";
import { visible } from "./text.js";
import { fail, fill, format, h, page, setupWords } from "./ui.js";

/**
 * @typedef {import("./data.js").Setup} Setup
 * @typedef {import("./data.js").Site} Site
 * @typedef {import("./charts.js").Series} Series
 * @typedef {import("./state.js").State} State
 * @typedef {import("./state.js").Choices} Choices
 */

const count = (/** @type {number} */ n) => n.toLocaleString("en");
const many = (/** @type {number} */ n, /** @type {string} */ one, more = `${one}s`) => `${count(n)} ${n === 1 ? one : more}`;
const listed = (/** @type {string[]} */ words) => (words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words[words.length - 1]}`);

/** What the study is, in a sentence and in numbers. @param {Site} site */
function headline(site) {
  const { setups } = site;
  const distinct = (/** @type {(setup: Setup) => any} */ value, of = setups) => [...new Set(of.map(value))];
  const own = setups.filter((setup) => setup.control === "none");
  const controls = distinct((setup) => setup.name, setups.filter((setup) => setup.control !== "none"));
  const sum = (/** @type {(setup: Setup) => number} */ value) => setups.reduce((total, setup) => total + value(setup), 0);
  const steps = distinct((setup) => setup.step).sort((a, b) => a - b);
  const layers = distinct((setup) => setup.layer).sort((a, b) => a - b);
  const seeds = [...new Set(setups.map((setup) => `${setup.lm_seed} ${setup.sae_seed}`))].length;
  const bilingual = setups.some((setup) => setup.n_bilingual !== null) ? sum((setup) => setup.n_bilingual ?? 0) : null;
  const range = (/** @type {number[]} */ values) => (values.length > 1 ? `${count(values[0])} to ${count(values[values.length - 1])}` : count(values[0]));
  const models = distinct((setup) => setup.name, own);
  const tiles = /** @type {[string, string, string][]} */ ([
    [many(models.length, "model"), listed(models.map(visible)), "models"],
    ...(controls.length ? [[many(controls.length, "control"), listed(controls.map(visible)), "controls"]] : []),
    [many(steps.length, "checkpoint"), `step ${range(steps)}`, "checkpoints"],
    [many(layers.length, "layer"), `layer ${range(layers)}`, "layers"],
    [many(seeds, "seed"), seeds > 1 ? "language model x SAE" : "of language model and SAE", "seeds"],
    [many(sum((setup) => setup.n_features), "feature"), `${count(sum((setup) => setup.n_alive))} alive${bilingual === null ? "" : `, ${count(bilingual)} bilingual`}`, "features"],
  ]);
  const languages = listed(site.languages.map((code) => site.language_names[code] ?? code));
  return [
    h("h1", null, visible(site.title ?? site.study)),
    h("p", { class: "lead" }, `How language lives inside language models that learn ${languages}: ${many(setups.length, "sparse autoencoder")}, one for each model, checkpoint, layer and seed, and every feature of them.`),
    h("dl", { class: "stats", id: "headline" }, tiles.map(([value, words, name]) => h("div", { "data-stat": name }, h("dt", null, words), h("dd", null, value)))),
  ];
}

/** The figures of one state. @param {Site} site @param {{measures: Object<string, any>}} data */
function figures(site, data) {
  const names = measured(data);
  const together = bundles(site, names);
  const numbers = new Map(site.setups.map((setup, n) => [setup, n]));
  const models = [...new Set(site.setups.map((setup) => setup.name))];
  const own = new Map(models.map((name) => [name, site.setups.filter((setup) => setup.name === name)]));
  const middles = new Map(models.map((name) => [name, middleLayer(own.get(name) ?? [])]));
  const value = (/** @type {string} */ measure, /** @type {Setup} */ setup, /** @type {"value"|"low"|"high"} */ part) => data.measures[measure]?.[part]?.[numbers.get(setup) ?? -1] ?? null;
  const isControl = (/** @type {string} */ name) => own.get(name)?.[0].control !== "none";
  const layerOf = (/** @type {State} */ state, /** @type {string} */ name) => (state.layer === "middle" ? middles.get(name) : Number(state.layer));
  const seeded = (/** @type {State} */ state, /** @type {Setup} */ setup) => state.seed === "all" || state.seed === `${setup.lm_seed}/${setup.sae_seed}`;
  const atStep = (/** @type {State} */ state, /** @type {Setup} */ setup) => (state.step === "last" ? setup.final : setup.step === Number(state.step));

  /** Points of one line: several seeds at one place are their mean with the band from the smallest to the largest. */
  const points = (/** @type {string} */ measure, /** @type {Setup[]} */ setups, /** @type {(setup: Setup) => number} */ x) => {
    /** @type {Map<number, Setup[]>} */
    const at = new Map();
    for (const setup of setups) if (value(measure, setup, "value") !== null) at.set(x(setup), [...(at.get(x(setup)) ?? []), setup]);
    return [...at]
      .sort(([a], [b]) => a - b)
      .map(([place, some]) => {
        const address = findAddress(site, some[0], measure);
        if (some.length === 1)
          return { x: place, value: value(measure, some[0], "value"), low: value(measure, some[0], "low"), high: value(measure, some[0], "high"), note: `${count(some[0].n_alive)} alive`, address };
        const values = some.map((setup) => value(measure, setup, "value"));
        return { x: place, value: values.reduce((a, b) => a + b, 0) / values.length, low: Math.min(...values), high: Math.max(...values), note: `${values.length} seeds`, address };
      });
  };

  const measuresOf = (/** @type {State} */ state) => together.find((bundle) => bundle.name === state.measure)?.measures ?? [state.measure];
  const headOf = (/** @type {State} */ state) => together.find((bundle) => bundle.name === state.measure)?.head ?? state.measure;
  const titleOf = (/** @type {State} */ state) => (together.find((bundle) => bundle.name === state.measure)?.label ?? labelOf(state.measure));
  const controlsOf = (/** @type {State} */ state) => {
    if (!state.controls) return [];
    const like = (/** @type {string} */ name) => own.get(name)?.[0];
    const all = models.filter((name) => isControl(name) && !state.models.includes(name));
    const near = all.filter((name) => state.models.some((other) => like(other)?.n_params === like(name)?.n_params && like(other)?.family === like(name)?.family));
    return near.length ? near : all;
  };
  const layerWords = (/** @type {State} */ state, some = state.models) => {
    if (state.layer !== "middle") return `layer ${state.layer}`;
    const middle = [...new Set(some.map((name) => middles.get(name)))];
    return middle.length === 1 ? `middle layer (${middle[0]})` : "middle layer of each";
  };
  const stepWords = (/** @type {State} */ state, some = state.models) => {
    if (state.step !== "last") return `step ${count(Number(state.step))}`;
    const last = [...new Set(some.flatMap((name) => (own.get(name) ?? []).filter((setup) => setup.final).map((setup) => setup.step)))];
    return last.length === 1 ? `last checkpoint (step ${count(last[0])})` : "last checkpoint of each";
  };
  const bandWords = (/** @type {State} */ state) => (state.seed === "all" ? "Lines: mean of the seeds; bands: from the smallest to the largest. " : "Bands: 95 % intervals, bootstrap over the features of one SAE. ");
  const about = (/** @type {State} */ state) => {
    const measures = measuresOf(state);
    const meaning = measures.length === 1 ? meaningOf(measures[0]) : "";
    return [meaning && `${meaning} `, measures.length > 1 && measures.includes("share_mixed") && "Mixed is not bilingual: a feature of random tokens meets both languages too. "];
  };

  const axis = (/** @type {State} */ state, /** @type {Setup[]} */ setups) => {
    if (state.x === "layers") return linearAxis(setups.map((setup) => setup.layer), { label: "layer (0: embeddings)", words: (x) => `layer ${x}` });
    const steps = new Map(setups.map((setup) => [setup.tokens_seen, setup.step]));
    if (state.x === "tokens")
      return logAxis(setups.map((setup) => setup.tokens_seen), { label: "tokens seen", decades: true, words: (x) => `step ${count(steps.get(x) ?? 0)} · ${count(x)} tokens` });
    const seen = new Map(setups.map((setup) => [setup.step, setup.tokens_seen]));
    const words = (/** @type {number} */ x) => `step ${count(x)} · ${count(seen.get(x) ?? 0)} tokens`;
    return state.x === "steps" ? logAxis(setups.map((setup) => setup.step), { label: "step", decades: false, words }) : linearAxis(setups.map((setup) => setup.step), { label: "step", words });
  };
  const xOf = (/** @type {State} */ state) => (/** @type {Setup} */ setup) => (state.x === "layers" ? setup.layer : state.x === "tokens" ? setup.tokens_seen : setup.step);
  const chosen = (/** @type {State} */ state, /** @type {string} */ name) =>
    (own.get(name) ?? []).filter((setup) => seeded(state, setup) && (state.x === "layers" ? atStep(state, setup) : setup.layer === layerOf(state, name)));

  /** The figure over training, or over layers: one panel, or one for each model where each shows several measures. @param {State} state */
  const evolution = (state) => {
    const measures = measuresOf(state);
    const controls = controlsOf(state);
    const line = (/** @type {string} */ measure, /** @type {string} */ name, /** @type {any} */ drawn) => ({ measure, ...drawn, points: points(measure, chosen(state, name), xOf(state)) });
    const ofControls = controls.map((name) => line(headOf(state), name, { ...controlLook(), thin: true, label: `${measures.length > 1 ? `${look(headOf(state), site).label}, ` : ""}${visible(name)}` }));
    const panels =
      measures.length > 1
        ? state.models.map((name) => ({ title: visible(name), series: [...measures.map((measure) => line(measure, name, look(measure, site))), ...ofControls] }))
        : [{ title: labelOf(measures[0]), series: [...state.models.map((name) => line(measures[0], name, { ...modelLook(models.indexOf(name)), label: visible(name) })), ...ofControls] }];
    for (const panel of panels) panel.series = panel.series.filter((one) => one.points.length);
    const every = panels.flatMap((panel) => panel.series);
    const shared = axis(state, [...state.models, ...controls].flatMap((name) => chosen(state, name)));
    const missing = state.models.filter((name) => !chosen(state, name).length);
    const where = state.x === "layers" ? stepWords(state) : layerWords(state);
    const title = `${titleOf(state)}: ${listed(state.models.map(visible))}, ${where}`;
    if (!every.length) return [h("h3", null, title), h("p", null, "Nothing was measured here.")];
    const domain = rangeOf(every);
    const shownLast = panels[panels.length - 1];
    const main = shownLast.series.filter((one) => !ofControls.includes(one));
    const first = main.filter((one) => one.measure === headOf(state)).at(-1) ?? main.at(-1) ?? shownLast.series[0];
    const [from, to] = [first.points[0], first.points[first.points.length - 1]];
    const said = (/** @type {any} */ point) => `${format(first.measure, point.value)}${point.low === null || point.low === undefined ? "" : ` (${format(first.measure, point.low)} to ${format(first.measure, point.high)})`}`;
    const answer = `${panels.length > 1 ? `${shownLast.title}, ` : ""}${first.label}: ${said(from)} at ${shared.words(from.x)}${from === to ? "" : `; ${said(to)} at ${shared.words(to.x)}`}.`;
    const kinds = [...new Set(controls.map((name) => own.get(name)?.[0].control ?? ""))].map((control) => site.controls?.[control] ?? control);
    return [
      h("h3", null, title),
      h("p", { class: "answer" }, answer),
      h("div", { class: "panels" }, panels.map((panel, n) =>
        h("div", null, panels.length > 1 ? h("h4", null, panel.title) : null, lines({ series: panel.series, axis: shared, domain, label: panel.title, id: `evolution-chart${n || ""}`, summary: `${title}${panels.length > 1 ? `; ${panel.title}` : ""}. ${answer} The table below has every value.` })))),
      h("figcaption", null, about(state), bandWords(state), ofControls.length ? `Dotted: ${listed(kinds.map(visible))}. ` : null, missing.length ? h("span", { class: "missing" }, `Not measured there: ${listed(missing.map(visible))}. `) : null),
      twin({ series: every.map((one) => ({ ...one, label: panels.length > 1 ? `${panels.find((panel) => panel.series.includes(one))?.title}: ${one.label}` : one.label })), axis: shared, label: title, summary: "" }, title, "evolution-table"),
    ];
  };

  /** The map of steps by layers of one model and measure. @param {State} state */
  const map = (state) => {
    const measure = state.heat;
    const setups = own.get(state.heat_model) ?? [];
    const seed = state.seed === "all" ? `${setups[0].lm_seed}/${setups[0].sae_seed}` : state.seed;
    const some = setups.filter((setup) => `${setup.lm_seed}/${setup.sae_seed}` === seed);
    const cells = (some.length ? some : setups).map((setup) => ({
      step: setup.step, layer: setup.layer, value: value(measure, setup, "value"), low: value(measure, setup, "low"), high: value(measure, setup, "high"),
      address: findAddress(site, setup, measure), title: `${count(setup.n_alive)} of ${count(setup.n_features)} features alive`,
    }));
    const caption = `${labelOf(measure)}: ${visible(state.heat_model)}, every step and layer`;
    return [
      h("h3", null, caption),
      heat({ cells, measure, caption }),
      h("figcaption", null, meaningOf(measure) && `${meaningOf(measure)} `, "Each cell is one SAE", state.seed === "all" ? `, of the first seed (${seed.replace("/", ", ")})` : "", "."),
    ];
  };

  /** A measure by size of the model. @param {State} state */
  const sizes = (state) => {
    const at = site.setups.filter((setup) => seeded(state, setup) && atStep(state, setup) && setup.layer === layerOf(state, setup.name));
    const families = [...new Set(at.filter((setup) => setup.control === "none").map((setup) => setup.family))];
    const measures = measuresOf(state);
    const series = families
      .flatMap((family, n) =>
        measures.map((measure) => ({
          measure,
          ...(measures.length > 1 ? look(measure, site) : { ...modelLook(n) }),
          ...(families.length > 1 && measures.length > 1 && n ? { dash: "1.5 3" } : {}),
          label: [measures.length > 1 || families.length === 1 ? look(measure, site).label : "", families.length > 1 ? visible(family) : ""].filter(Boolean).join(", "),
          points: points(measure, at.filter((setup) => setup.family === family && setup.control === "none"), (setup) => setup.n_params),
        })),
      )
      .concat(
        (state.controls ? models.filter(isControl) : []).map((name) => ({
          measure: headOf(state), ...controlLook(), label: `${measures.length > 1 ? `${look(headOf(state), site).label}, ` : ""}${visible(name)}`, points: points(headOf(state), at.filter((setup) => setup.name === name), (setup) => setup.n_params),
        })),
      )
      .filter((one) => one.points.length);
    const every = models.filter((name) => !isControl(name));
    const title = `${titleOf(state)} by size: ${stepWords(state, every)}, ${layerWords(state, every)}`;
    const named = new Map(at.filter((setup) => setup.control === "none").map((setup) => [setup.n_params, setup]));
    if (!series.length) return [h("h3", null, title), h("p", null, "Nothing was measured here: choose another step or layer.")];
    if (new Set(site.setups.map((setup) => setup.n_params)).size < 2) return [h("h3", null, "One size"), h("p", null, `The models of this study have one size, ${count(site.setups[0].n_params)} parameters: there is nothing to compare.`)];
    const shared = logAxis([...new Set(series.flatMap((one) => one.points.map((point) => point.x)))], {
      label: "parameters of the language model", decades: false,
      words: (x) => `${named.has(x) ? `${visible(named.get(x)?.name ?? "")} · ` : ""}${count(x)} parameters`,
    });
    return [
      h("h3", null, title),
      lines({ series, axis: shared, label: titleOf(state), id: "sizes-chart", height: 300, summary: `${title}. The table below has every value.` }),
      h("figcaption", null, bandWords(state), layerWords(state, every) === "middle layer of each" ? "Models differ in depth: each is read at its own middle layer. " : null),
      twin({ series, axis: shared, label: title, summary: "" }, title, "sizes-table"),
    ];
  };

  return { names, together, models, isControl, evolution, map, sizes };
}

/** @param {HTMLSelectElement} select @param {[string, string][]} options */
const options = (select, options) => fill(select, options.map(([value, words]) => h("option", { value }, words)));

async function start() {
  const main = page({ title: "Overview", here: "index.html" });
  const [site, data] = await Promise.all([loadSite(), overview(), styled()]);
  const { names, together, models, isControl, evolution, map, sizes } = figures(site, data);
  fill(main, headline(site));
  if (!names.length) {
    main.append(h("p", { class: "notice" }, "This run has no measures of its setups yet: run the study to its end. The features that it has are under ", h("a", { href: "find.html" }, "Find"), "."));
    return;
  }
  const first = firstSetup(site);
  const pick = models.filter((name) => !isControl(name));
  const numbers = (/** @type {(setup: Setup) => number} */ value) => [...new Set(site.setups.map(value))].sort((a, b) => a - b).map(String);
  /** @type {Choices} */
  const choices = {
    measure: [...together.map((bundle) => bundle.name), ...names],
    model: pick.length ? pick : models,
    layer: ["middle", ...numbers((setup) => setup.layer)],
    seeds: [...new Set(site.setups.map((setup) => `${setup.lm_seed}/${setup.sae_seed}`))],
    x: ["tokens", "steps", "linear", "layers"],
    step: ["last", ...numbers((setup) => setup.step)],
    heat: names,
    heat_model: models,
    first: { model: first.name, seed: `${first.lm_seed}/${first.sae_seed}`, x: numbers((setup) => setup.step).length > 1 || numbers((setup) => setup.layer).length < 2 ? "tokens" : "layers", heat: together[0]?.head ?? names[0] },
  };

  const controlled = models.some(isControl) && pick.length > 0;
  const select = (/** @type {string} */ id, /** @type {string} */ words, /** @type {[string, string][]} */ values) => {
    const field = h("select", { id });
    options(field, values);
    return { field, label: h("label", { for: id }, h("span", null, words), field) };
  };
  const grouped = (/** @type {string} */ id, /** @type {string} */ words, withBundles = true) => {
    const field = h("select", { id }, withBundles && together.length ? h("optgroup", { label: "Several together" }, together.map((bundle) => h("option", { value: bundle.name }, bundle.label))) : null,
      groups(site, names).map(([label, some]) => h("optgroup", { label }, some.map((name) => h("option", { value: name }, labelOf(name))))));
    return { field, label: h("label", { for: id }, h("span", null, words), field) };
  };
  const seedWords = (/** @type {string} */ seed) => `LM ${seed.split("/")[0]}, SAE ${seed.split("/")[1]}`;
  const fields = {
    measure: grouped("measure", "Measure"),
    layer: select("layer", "Layer", choices.layer.map((value) => [value, value === "middle" ? "middle" : value])),
    seed: select("seed", "Seed", [...choices.seeds.map((/** @type {string} */ seed) => /** @type {[string, string]} */ ([seed, seedWords(seed)])), .../** @type {[string, string][]} */ (choices.seeds.length > 1 ? [["all", "all: mean and range"]] : [])]),
    x: select("x", "Across", [["tokens", "tokens seen, log"], ["steps", "steps, log"], ["linear", "steps, linear"], ["layers", "layers"]]),
    step: select("step", "Checkpoint", choices.step.map((value) => [value, value === "last" ? "last" : `step ${count(Number(value))}`])),
    heat: grouped("heat-measure", "Measure of the map", false),
    heat_model: select("heat-model", "Model of the map", models.map((name) => [name, visible(name)])),
  };
  const boxes = choices.model.map((name) => h("input", { type: "checkbox", name: "model", value: name }));
  const model = h("fieldset", { id: "model", class: "choice" }, h("legend", null, choices.model.length > 1 ? "Models" : "Model"), h("div", { class: "boxes" }, choices.model.map((name, n) => h("label", null, boxes[n], ` ${visible(name)}`))));
  const controls = h("input", { type: "checkbox", id: "controls" });
  const problems = h("div", { id: "problems", role: "status" });
  const evolutionFigure = h("figure", { id: "evolution" });
  const heatFigure = h("figure", { id: "heatmap" });
  const sizesFigure = h("figure", { id: "sizes" });
  main.append(
    h("section", { "aria-labelledby": "over-training" },
      h("h2", { id: "over-training" }, "Over training"),
      problems,
      h("div", { class: "controls" }, fields.measure.label, model, fields.layer.label, fields.seed.label, fields.x.label, fields.step.label, controlled ? h("label", { class: "check" }, controls, " Controls") : null),
      evolutionFigure),
    h("div", { class: choices.step.length > 24 ? "halves wide" : "halves" },
      h("section", { "aria-labelledby": "by-layer" }, h("h2", { id: "by-layer" }, "Step by layer"), h("div", { class: "controls" }, fields.heat.label, models.length > 1 ? fields.heat_model.label : null), heatFigure),
      h("section", { "aria-labelledby": "by-size" }, h("h2", { id: "by-size" }, "By model size"), sizesFigure)),
    h("p", { class: "onward" }, h("a", { class: "button", href: findAddress(site, first) }, `Features of ${setupWords(first)}`)),
  );

  /** @type {State} */
  let state;
  const show = () => {
    for (const name of /** @type {const} */ (["measure", "layer", "seed", "x", "step", "heat", "heat_model"])) fields[name].field.value = state[name];
    for (const box of boxes) box.checked = state.models.includes(box.value);
    controls.checked = state.controls;
    fill(evolutionFigure, evolution(state));
    fill(heatFigure, map(state));
    fill(sizesFigure, sizes(state));
  };
  const read = () => {
    const found = readState(location.search, choices);
    state = found.state;
    fill(problems, found.problems.map((line) => h("p", { class: "notice" }, visible(line))));
    show();
  };
  const change = (/** @type {Partial<State>} */ part) => {
    state = { ...state, ...part };
    history.pushState(null, "", writeState(state, choices) || location.pathname.split("/").pop() || "index.html");
    fill(problems);
    show();
  };
  const isSingle = (/** @type {string} */ measure) => names.includes(measure);
  fields.measure.field.addEventListener("change", () => change({ measure: fields.measure.field.value, ...(isSingle(fields.measure.field.value) ? { heat: fields.measure.field.value } : {}) }));
  for (const name of /** @type {const} */ (["layer", "seed", "x", "step", "heat", "heat_model"])) fields[name].field.addEventListener("change", () => change({ [name]: fields[name].field.value }));
  for (const box of boxes)
    box.addEventListener("change", () => {
      const wanted = boxes.filter((other) => other.checked).map((other) => other.value);
      // One model stays: a figure of none says nothing.
      if (wanted.length) change({ models: wanted, ...(wanted.includes(state.heat_model) || isControl(state.heat_model) ? {} : { heat_model: wanted.includes(first.name) ? first.name : wanted[wanted.length - 1] }) });
      else box.checked = true;
    });
  controls.addEventListener("change", () => change({ controls: controls.checked }));
  addEventListener("popstate", read);
  read();
}

start().catch((error) => fail(error));
