// The data files: loaded once, unpacked where a static host sends them packed, checked, with errors in plain words.

import { unpackFeature } from "./packed.js";

/**
 * @typedef {{id: string, control: string, family: string, model: string, name: string, d_model: number, n_params: number,
 *   step: number, tokens_seen: number, layer: number, lm_seed: number, sae_seed: number, n_features: number, middle?: boolean,
 *   n_alive: number, n_bilingual: number|null, counts: Object<string, number>, final: boolean}} Setup
 * @typedef {{schema: number, study: string, languages: string[], language_names: Object<string, string>, classes: string[],
 *   thresholds: Object<string, number>, measures: {name: string, label: string, unit: string, meaning: string,
 *   digits: number}[], controls: Object<string, string>, shard: number, text_file: number, partial: string[],
 *   setups: Setup[], [key: string]: any}} Site
 * @typedef {{text: string[], bytes: Map<number, Uint8Array>, special: Set<number>, cut: Map<number, number>}} Tokens
 */

const SCHEMA = 1;
const EXPORT_AGAIN = "Export the site again with `glottoscope export`, or start `glottoscope browse` again.";

/** What is wrong with a data file, and what the reader can do. */
export class DataError extends Error {
  /** @param {string} message @param {string} remedy @param {number} [status] */
  constructor(message, remedy, status = 0) {
    super(message);
    this.name = "DataError";
    this.remedy = remedy;
    this.status = status;
  }
}

/** @type {Map<string, Promise<any>>} */
const cache = new Map();
/** @type {Site|null} */
let loadedSite = null;
/** @type {Tokens|null} */
let loadedTokens = null;

/** @param {Promise<Response>} request @param {string} address */
async function answer(request, address) {
  try {
    return await request;
  } catch {
    throw new DataError(
      `${address} could not be read: the server does not answer.`,
      "Is the web server (or `glottoscope browse`) still running? Start it and load the page again.",
    );
  }
}

/** @param {ArrayBuffer} packed */
async function unpacked(packed) {
  const head = new Uint8Array(packed, 0, Math.min(2, packed.byteLength));
  if (head[0] !== 0x1f || head[1] !== 0x8b) return new TextDecoder().decode(packed);
  if (typeof DecompressionStream === "undefined")
    throw new DataError(
      "This browser cannot unpack gzip.",
      "Use a browser of 2023 or newer (Firefox 113, Safari 16.4, Chromium 80).",
    );
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

/** What a server says of a request that it refused. @param {Response} response */
async function refusal(response) {
  try {
    const said = JSON.parse(await response.text()).error;
    if (typeof said === "string") return said;
  } catch {
    // Another server says it in its own way.
  }
  return `the server answered ${response.status} ${response.statusText}`.trimEnd();
}

/** @param {string} address */
async function fetched(address) {
  const response = await answer(fetch(address.split("/").map(encodeURIComponent).join("/").replaceAll("%40", "@")), address);
  if (response.status === 404) throw new DataError(`${address} is missing.`, EXPORT_AGAIN, 404);
  if (!response.ok)
    throw new DataError(
      `${address}: ${await refusal(response)}.`,
      "The terminal of `glottoscope browse` may say more.",
      response.status,
    );
  let data;
  try {
    data = JSON.parse(await unpacked(await response.arrayBuffer()));
  } catch (error) {
    if (error instanceof DataError) throw error;
    throw new DataError(`${address} is damaged: it is no JSON.`, EXPORT_AGAIN);
  }
  if (data === null || typeof data !== "object") throw new DataError(`${address} is damaged: it is no object.`, EXPORT_AGAIN);
  if (data.schema !== undefined && data.schema !== SCHEMA)
    throw new DataError(
      `${address} has schema ${String(data.schema)}; these pages know schema ${SCHEMA}.`,
      "The data and the pages come from different versions of glottoscope: export the site again into an empty folder.",
    );
  return data;
}

/**
 * A data file as parsed JSON; a second call gives the same object. A failure is not remembered.
 * @param {string} address relative to the site, as `data/site.json`
 * @returns {Promise<any>}
 */
export function load(address) {
  let promise = cache.get(address);
  if (!promise) {
    promise = fetched(address);
    promise.catch(() => cache.delete(address));
    cache.set(address, promise);
  }
  return promise;
}

/** @returns {Promise<Site>} */
export async function site() {
  const data = await load("data/site.json");
  if (!Array.isArray(data.setups) || !Array.isArray(data.languages))
    throw new DataError("data/site.json is damaged: it names no setups.", EXPORT_AGAIN);
  loadedSite = data;
  return data;
}

/** The index of the site where it was loaded before, else null. @returns {Site|null} */
export const siteNow = () => loadedSite;

/** Whether labels can be saved. A site without the file is a static one. @returns {Promise<{live: boolean, rater?: string, token?: string}>} */
export async function live() {
  try {
    return await load("data/live.json");
  } catch (error) {
    if (error instanceof DataError && error.status === 404) return { live: false };
    throw error;
  }
}

/** Measures of every setup. @returns {Promise<{measures: Object<string, {value: (number|null)[], low?: (number|null)[], high?: (number|null)[]}>}>} */
export const overview = () => load("data/overview.json.gz");

/** @param {string} hex */
const bytesOf = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));

/** The tokens of the site. @returns {Promise<Tokens>} */
export async function tokens() {
  const data = await load("data/tokens.json.gz");
  loadedTokens ??= {
    text: data.text,
    bytes: new Map(Object.entries(data.bytes ?? {}).map(([rank, hex]) => [Number(rank), bytesOf(String(hex))])),
    special: new Set(data.special ?? []),
    cut: new Map(Object.entries(data.cut ?? {}).map(([rank, length]) => [Number(rank), Number(length)])),
  };
  return loadedTokens;
}

/** The tokens where they were loaded before. @returns {Tokens} */
export function tokensNow() {
  if (!loadedTokens) throw new Error("tokens() was not awaited");
  return loadedTokens;
}

/** All features of a setup, one column per measure. @param {string} id */
export const list = (id) => load(`data/cells/${id}/list.json.gz`);

/** @param {string} id */
export const snippets = (id) => load(`data/cells/${id}/snippets.json.gz`);

/** @param {string} id @returns {Setup|undefined} */
export const setupById = (id) => loadedSite?.setups.find((setup) => setup.id === id);

/** Number of a setup in site.json; -1 where there is none. @param {string} id */
export const setupNumber = (id) => loadedSite?.setups.findIndex((setup) => setup.id === id) ?? -1;

/** Address of the shard that holds a feature. @param {string} id @param {number} f */
export function shardAddress(id, f) {
  const setup = setupById(id);
  if (!loadedSite || !setup) throw new DataError(`This site has no setup ${id}.`, "Choose one on the page Find.");
  if (!Number.isInteger(f) || f < 0 || f >= setup.n_features)
    throw new DataError(`${id} has no feature ${f}.`, `Its features are numbered 0 to ${setup.n_features - 1}.`);
  const first = Math.floor(f / loadedSite.shard) * loadedSite.shard;
  return `data/cells/${id}/features/${first}-${Math.min(first + loadedSite.shard, setup.n_features) - 1}.json.gz`;
}

/** Examples, tokens, pairs and neighbours of one feature; {} where it is dead. @param {string} id @param {number} f */
export async function feature(id, f) {
  await site();
  return unpackFeature(await load(shardAddress(id, f)), f);
}

/** Tokens and documents of one block. @param {number} n @returns {Promise<{ranks: number[], documents: [number, string, number][]}>} */
export async function block(n) {
  const size = (await site()).text_file;
  const address = `data/text/${Math.floor(n / size)}.json.gz`;
  const data = await load(address);
  const ranks = data.blocks?.[n];
  if (!ranks) throw new DataError(`${address} has no block ${n}.`, EXPORT_AGAIN);
  return { ranks, documents: data.documents?.[n] ?? [] };
}

/** One aligned sentence pair. @param {number} p @returns {Promise<[number[], number[]]>} */
export async function pair(p) {
  const address = `data/pairs/${Math.floor(p / (await site()).text_file)}.json.gz`;
  const sides = (await load(address)).pairs?.[p];
  if (!sides) throw new DataError(`${address} has no pair ${p}.`, EXPORT_AGAIN);
  return sides;
}

/** Labels and agreement. A site without the file has none. @param {{fresh?: boolean}} [how] fresh: whatever was loaded before */
export async function labels({ fresh = false } = {}) {
  if (fresh) cache.delete("data/labels.json");
  try {
    return await load("data/labels.json");
  } catch (error) {
    if (error instanceof DataError && error.status === 404)
      return { schema: SCHEMA, names: {}, raters: [], labels: [], agreement: { pairs: [], measures: [] } };
    throw error;
  }
}

/**
 * Save a label on the server; the labels loaded before are brought up to date.
 * @param {{setup: string, feature: number, granularity: number|null, note: string, blind: boolean}} label
 */
export async function saveLabel(label) {
  const { live: served, token = "" } = await live();
  if (!served)
    throw new DataError(
      "This is an exported site: it cannot save labels.",
      "Run `glottoscope browse` on the run directory and label there.",
    );
  const response = await answer(
    // Alive beyond the page: a note may be saved by the very click that leaves it.
    fetch("labels", {
      method: "POST",
      keepalive: true,
      headers: { "Content-Type": "application/json", "X-Glottoscope": token },
      body: JSON.stringify(label),
    }),
    "labels",
  );
  if (response.status !== 201)
    throw new DataError(
      `The label was not saved: ${await refusal(response)}.`,
      "If the server was started again since this page was opened, load the page again.",
      response.status,
    );
  const entry = await response.json();
  const known = await labels();
  known.labels = known.labels.filter(
    (/** @type {any} */ other) => !(other.setup === entry.setup && other.feature === entry.feature && other.rater === entry.rater),
  );
  // A label with neither grade nor note withdraws what was said.
  if (entry.granularity !== null || entry.note) known.labels.push(entry);
  if (!known.raters.includes(entry.rater)) known.raters.push(entry.rater);
  return entry;
}
