// The state of the overview, read from its address and written back; what is the default is left out.
import { encode } from "./ui.js";

/**
 * @typedef {{measure: string, models: string[], layer: string, seed: string, x: string, step: string, controls: boolean, heat: string, heat_model: string}} State
 *   layer: a number or "middle"; seed: "LM/SAE" or "all"; step: a number or "last"
 * @typedef {{measure: string[], model: string[], layer: string[], seeds: string[], x: string[], step: string[], heat: string[], heat_model: string[],
 *   first: {model: string, seed: string, x: string, heat: string}}} Choices
 */

const NAMES = ["measure", "model", "layer", "lm_seed", "seed", "x", "step", "controls", "heat", "heat_model"];

/** What the map shows where nothing else is asked for. @param {Choices} choices @param {string} measure @param {string[]} models */
const follow = (choices, measure, models) => ({ heat: choices.heat.includes(measure) ? measure : choices.first.heat, heat_model: models.includes(choices.first.model) ? choices.first.model : models[models.length - 1] });

/**
 * @param {string} search @param {Choices} choices
 * @returns {{state: State, problems: string[]}}
 */
export function readState(search, choices) {
  const given = new URLSearchParams(search);
  /** @type {string[]} */
  const problems = [];
  for (const name of given.keys()) if (!NAMES.includes(name)) problems.push(`${name} is no choice of this page.`);
  const one = (/** @type {string} */ name, /** @type {string[]} */ known, /** @type {string} */ otherwise) => {
    const value = given.get(name);
    if (value === null || value === "") return otherwise;
    if (known.includes(value)) return value;
    problems.push(`${name}=${value} is unknown here: choose from ${known.join(", ")}.`);
    return otherwise;
  };
  const measure = one("measure", choices.measure, choices.measure[0]);
  const first = choices.model.includes(choices.first.model) ? choices.first.model : choices.model[0];
  const asked = [...new Set((given.get("model") ?? "").split(",").filter(Boolean))];
  for (const name of asked) if (name !== "all" && !choices.model.includes(name)) problems.push(`model=${name} is unknown here: choose from ${choices.model.join(", ")}.`);
  const models = choices.model.filter((name) => asked.includes(name) || asked.includes("all"));
  if (!models.length) models.push(first);
  const [lm, sae] = choices.first.seed.split("/");
  const seed = given.get("seed") === "all" ? "all" : `${given.get("lm_seed") ?? lm}/${given.get("seed") ?? sae}`;
  const known = seed === "all" ? choices.seeds.length > 1 : choices.seeds.includes(seed);
  if (!known) problems.push(`lm_seed and seed: this study has ${choices.seeds.map((pair) => `lm_seed=${pair.replace("/", "&seed=")}`).join(", ")}.`);
  const map = follow(choices, measure, models);
  return {
    state: {
      measure,
      models,
      layer: one("layer", choices.layer, "middle"),
      seed: known ? seed : choices.first.seed,
      x: one("x", choices.x, choices.first.x),
      step: one("step", choices.step, "last"),
      controls: one("controls", ["0", "1"], "1") === "1",
      heat: one("heat", choices.heat, map.heat),
      heat_model: one("heat_model", choices.heat_model, map.heat_model),
    },
    problems,
  };
}

/** The address of a state, from "?" on; empty where all is the default. @param {State} state @param {Choices} choices */
export function writeState(state, choices) {
  const first = choices.model.includes(choices.first.model) ? choices.first.model : choices.model[0];
  const map = follow(choices, state.measure, state.models);
  const [lm, sae] = state.seed.split("/");
  /** @type {[string, string, boolean][]} */
  const parts = [
    ["measure", state.measure, state.measure !== choices.measure[0]],
    ["model", state.models.join(","), state.models.join() !== first],
    ["layer", state.layer, state.layer !== "middle"],
    ["lm_seed", lm, state.seed !== "all" && state.seed !== choices.first.seed],
    ["seed", state.seed === "all" ? "all" : sae, state.seed !== choices.first.seed],
    ["x", state.x, state.x !== choices.first.x],
    ["step", state.step, state.step !== "last"],
    ["controls", "0", !state.controls],
    ["heat", state.heat, state.heat !== map.heat],
    ["heat_model", state.heat_model, state.heat_model !== map.heat_model],
  ];
  const written = parts.filter(([, , put]) => put).map(([name, value]) => `${name}=${encode(value)}`);
  return written.length ? `?${written.join("&")}` : "";
}
