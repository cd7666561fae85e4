// What the page of a feature shows now, as its sections are given it.
import { encode } from "./ui.js";

/**
 * @typedef {{site: import("./data.js").Site, setup: import("./data.js").Setup, f: number, from: string|null, blind: boolean,
 *   columns: Object<string, (number|null)[]>, top: Object<string, number[][]>, record: any,
 *   follow: (event: MouseEvent, address: string) => void}} Shown
 *   from: query of the list that the reader came from; columns, top: of the setup's list; record: of the shard; follow: to
 *   another feature without loading the page again
 */

/** Value of a column for the feature shown; null where the list lacks the column. @param {Shown} now @param {string} name */
export const value = (now, name) => now.columns[name]?.[now.f] ?? null;

/** @param {Shown} now */
export const compareAddress = (now) => `compare.html?f=${encode(`${now.setup.id}:${now.f}`)}`;
