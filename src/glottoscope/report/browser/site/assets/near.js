// The features near this one: in its setup, and at the other checkpoints.
import { compareAddress } from "./shown.js";
import { chip, classBadge, featureAddress, h, put } from "./ui.js";

/** @typedef {import("./shown.js").Shown} Shown */

/** @param {Shown} now */
export function nearSection(now) {
  const section = h(
    "section",
    { id: "near", "aria-labelledby": "near-title" },
    h("h2", { id: "near-title" }, "Nearest decoder directions in this setup"),
  );
  const near = /** @type {[number, number][]} */ (now.record.near ?? []);
  if (!near.length) {
    put(section, h("p", { class: "soft" }, "Not known: the weights of this SAE are not in the run, or no other feature is alive."));
    return section;
  }
  put(
    section,
    h(
      "ol",
      { class: "near" },
      near.map(([f, cosine]) => {
        const address = featureAddress(now.setup.id, f);
        return h(
          "li",
          { "data-feature": f },
          h(
            "a",
            {
              href: address,
              onclick: (/** @type {MouseEvent} */ event) => now.follow(event, address),
              "aria-label": `Feature ${f}, cosine ${cosine.toFixed(2)}`,
            },
            String(f),
          ),
          h("span", { class: "num soft" }, cosine.toFixed(2).replace("-", "−")),
          classBadge(now.site.classes[now.columns.class[f] ?? -1] ?? "unclassified", now.columns.bilingual?.[f]),
          h(
            "span",
            { class: "chips" },
            now.site.languages.flatMap((language) =>
              (now.top[language]?.[f] ?? [])
                .slice(0, 3)
                .map((/** @type {number} */ rank) => chip(rank, { lang: language, limit: 14 })),
            ),
          ),
        );
      }),
    ),
    h("p", { class: "caption" }, "Cosine of the two features' decoder vectors."),
  );
  return section;
}

/** @param {Shown} now */
export function overSection(now) {
  const section = h(
    "section",
    { id: "over", "aria-labelledby": "over-title" },
    h("h2", { id: "over-title" }, "Counterparts at other checkpoints"),
  );
  const over = /** @type {[number, number, number, number][]} */ (now.record.over ?? []);
  if (!over.length) {
    put(
      section,
      h(
        "p",
        { class: "soft" },
        "None: this is the only checkpoint of its model, layer and seeds, or the weights of the others are not in the run.",
      ),
    );
    return section;
  }
  const sorted = [...over].sort((a, b) => now.site.setups[a[0]].step - now.site.setups[b[0]].step);
  const line = (/** @type {[number, number, number, number]} */ [number, f, cosine, back]) => {
    const setup = now.site.setups[number];
    const address = featureAddress(setup.id, f);
    return h(
      "tr",
      { "data-setup": setup.id, "data-feature": f },
      h("th", { scope: "row", class: "num" }, setup.step.toLocaleString("en")),
      h(
        "td",
        null,
        h("a", { href: address, onclick: (/** @type {MouseEvent} */ event) => now.follow(event, address) }, `feature ${f}`),
      ),
      h("td", { class: "num" }, cosine.toFixed(2).replace("-", "−")),
      h(
        "td",
        null,
        back ? h("span", { title: "each is the other's best counterpart" }, "↔", h("span", { class: "sr" }, " mutual")) : null,
      ),
    );
  };
  put(
    section,
    h(
      "table",
      null,
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          h("th", { scope: "col", class: "num" }, "Step"),
          h("th", { scope: "col" }, "Best counterpart"),
          h("th", { scope: "col", class: "num" }, "Cosine"),
          h("th", { scope: "col" }, h("span", { class: "sr" }, "Mutual")),
        ),
      ),
      h("tbody", null, sorted.map(line)),
    ),
    h("p", null, h("a", { href: compareAddress(now), class: "button", id: "compare" }, "Compare side by side")),
    h("p", { class: "caption" }, "↔: each is the other's best counterpart."),
  );
  return section;
}
