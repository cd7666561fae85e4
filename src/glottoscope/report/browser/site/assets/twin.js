// A feature as JSON: the server's file, or the same made here.
import { block, labels, pair, tokens } from "./data.js";
import { value } from "./shown.js";
import { levels } from "./text.js";
import { fail, h } from "./ui.js";

/** @typedef {import("./shown.js").Shown} Shown */

/** Flags of a list: numbers there, truth values in words. */
const FLAG_COLUMNS = ["alive", "bilingual", "bilingual_paper", "supportable", "single_token"];

/** The feature with names, texts and numbers in place of codes, as the server's features/F.json has it. @param {Shown} now */
async function expanded(now) {
  const table = await tokens();
  const { setup, f, record } = now;
  const token = (/** @type {number} */ rank) => table.text[rank];
  const max = value(now, "max_activation") ?? 0;
  const shades = (/** @type {number[]} */ on, /** @type {number} */ length) =>
    Array.from(levels(on, length), (level) => Number(((level / 100) * max).toPrecision(3)));
  const measures = Object.entries(now.columns).map(([name, column]) => {
    const found = /** @type {any} */ (column)[f];
    return [
      name,
      found === null ? null : name === "class" ? now.site.classes[found] : FLAG_COLUMNS.includes(name) ? Boolean(found) : found,
    ];
  });
  const all = record.examples;
  const examples = Array.from(all?.block.keys() ?? [], async (i) => {
    const { ranks, documents } = await block(all.block[i]);
    const some = ranks.slice(all.start[i], all.start[i] + all.length[i]);
    return {
      block: all.block[i],
      position: all.at[i],
      document: documents.filter(([first]) => first <= all.at[i]).at(-1)?.[1],
      language: now.site.languages[all.language[i]] ?? null,
      value: all.value[i],
      tokens: some.map(token),
      activations: shades(all.on[i], some.length),
    };
  });
  const pairs = (record.pairs ?? []).map(async (/** @type {any} */ one) => ({
    pair: one.pair,
    sides: (await pair(one.pair)).map((ranks, k) => ({
      language: now.site.languages[k],
      tokens: ranks.map(token),
      activations: shades(one.on[k], ranks.length),
    })),
  }));
  const { n_features: _n, n_alive: _a, n_bilingual: _b, counts: _c, final: _f, middle: _m, ...words } = setup;
  return {
    schema: 1,
    feature: f,
    id: `${setup.id}:${f}`,
    setup: words,
    measures: Object.fromEntries(measures),
    tokens: Object.fromEntries(
      Object.entries(record.tokens ?? {}).map(([language, rows]) => [
        language,
        /** @type {any[]} */ (rows).map(([rank, count, cluster]) => ({ token: token(rank), count, cluster })),
      ]),
    ),
    clusters: record.clusters ?? {},
    activations: record.activations ?? null,
    examples: await Promise.all(examples),
    pairs: record.pairs ? await Promise.all(pairs) : null,
    near: (record.near ?? []).map((/** @type {number[]} */ [other, cosine]) => ({ id: `${setup.id}:${other}`, cosine })),
    over: (record.over ?? []).map((/** @type {any[]} */ [number, other, cosine, back, nearest]) => ({
      id: `${now.site.setups[number].id}:${other}`,
      step: now.site.setups[number].step,
      cosine,
      mutual: back === 1,
      nearest: nearest
        ? Object.fromEntries(now.site.languages.map((/** @type {string} */ language, /** @type {number} */ n) => [language, nearest[n] && { id: `${now.site.setups[number].id}:${nearest[n][0]}`, cosine: nearest[n][1] }]))
        : null,
    })),
    labels: (await labels()).labels.filter((/** @type {any} */ label) => label.setup === setup.id && label.feature === f),
  };
}

/** @param {Shown} now @param {boolean} served */
export function jsonLink(now, served) {
  if (served) return h("a", { id: "json", class: "button", href: `data/cells/${now.setup.id}/features/${now.f}.json` }, "JSON");
  return h(
    "button",
    {
      type: "button",
      id: "json",
      title: "Download what this page shows as JSON",
      onclick: async () => {
        try {
          const address = URL.createObjectURL(
            new Blob([JSON.stringify(await expanded(now), null, 1)], { type: "application/json" }),
          );
          h("a", { href: address, download: `${now.setup.id.replaceAll("/", "-")}-feature-${now.f}.json` }).click();
          setTimeout(() => URL.revokeObjectURL(address), 10_000);
        } catch (error) {
          fail(error);
        }
      },
    },
    "JSON",
  );
}
