// The controls of find.html: each follows the query, and makes another one.
import { changed, clear, found, go, index, query, table, updates } from "./desk.js";
import { BINS } from "./list.js";
import { aliveOf, chosen, FLAGS, LABELS, RANGES, SCOPES, scopeValues, serialise, setupsOf, SORTS } from "./query.js";
import { visible } from "./text.js";
import { classLook, className, fill, format, h, languageName, measureOf, svg } from "./ui.js";

/** @typedef {import("./query.js").Query} Query */
/** @typedef {import("./query.js").Scope} Scope */
/** @typedef {import("./list.js").Result} Result */

/** A choice of several values, or of all. @param {Scope} scope */
export function scopeControl(scope) {
  const values = scopeValues(index, scope);
  if (values.length < 2) return null;
  const { words, field } = SCOPES[scope];
  const shown = h("b", { class: "value" });
  const set = (/** @type {"all"|string[]|undefined} */ value) =>
    go(chosen(query, index, scope, Array.isArray(value) && value.length === values.length ? "all" : value));
  const ticked = () => values.filter((value) => boxes.get(value).checked);
  const boxes = new Map(values.map((value) => [value, h("input", { type: "checkbox", value, onchange: () => set(ticked()) })]));
  const all = h("input", { type: "checkbox", value: "all", onchange: () => set(all.checked ? "all" : undefined) });
  const name = (/** @type {string} */ value) =>
    field === "step"
      ? Number(value).toLocaleString("en")
      : scope === "control" && value === "none"
        ? "none (trained model)"
        : visible(value);
  updates.push((now) => {
    const meant = new Set(setupsOf(now, index).map((setup) => String(setup[field])));
    for (const [value, box] of boxes) box.checked = meant.has(value);
    all.checked = now.scope[scope] === "all";
    const some = values.filter((value) => meant.has(value));
    fill(
      shown,
      now.scope[scope] === "all"
        ? "all"
        : some.length
          ? some.map((value) => (value === "none" ? "none" : name(value))).join(", ")
          : "–",
    );
  });
  return h(
    "details",
    { class: "scope", "data-scope": scope },
    h("summary", null, h("span", null, words), shown),
    h(
      "div",
      { role: "group", "aria-label": words },
      h("div", { class: "option" }, h("label", null, all, " all")),
      values.map((value) =>
        h(
          "div",
          { class: "option" },
          h("label", null, boxes.get(value), ` ${name(value)}`),
          h(
            "button",
            {
              type: "button",
              class: "only",
              "data-value": value,
              "aria-label": `only ${words.toLowerCase()} ${value}`,
              onclick: () => set([value]),
            },
            "only",
          ),
        ),
      ),
    ),
  );
}

/** A button with a count that is on or off. @param {string} value @param {any} words @param {(now: Query) => boolean} isOn @param {(all: Result) => number} count @param {() => Query} next */
function toggle(value, words, isOn, count, next) {
  const n = h("span", { class: "n" });
  const button = h(
    "button",
    { type: "button", class: "facet", "data-value": value, "aria-pressed": "false", onclick: () => go(next()) },
    h("span", null, words),
    n,
  );
  updates.push((now, all) => {
    button.setAttribute("aria-pressed", String(isOn(now)));
    if (!all) return;
    fill(n, count(all).toLocaleString("en"));
    button.classList.toggle("empty", count(all) === 0);
  });
  return button;
}

/** @param {string[]} some @param {string} value */
const flipped = (some, value) => (some.includes(value) ? some.filter((other) => other !== value) : [...some, value]);

export function classFacet() {
  return h(
    "fieldset",
    { "data-facet": "class" },
    h("legend", null, "Class"),
    index.classes.map((cls, number) => {
      const { shape, css } = classLook(cls);
      const next = () => changed({ class: flipped(query.class, cls) });
      return toggle(
        cls,
        [h("span", { class: `shape ${css}`, "aria-hidden": "true" }, shape), ` ${className(cls)}`],
        (now) => now.class.includes(cls),
        (all) => all.counts.class[number],
        next,
      );
    }),
    h("label", { class: "option", "data-facet": "alive" }, dead(), " show dead features too"),
  );
}

function dead() {
  const box = h("input", {
    type: "checkbox",
    id: "alive",
    onchange: () => go(changed({ alive: box.checked ? "all" : aliveOf({ ...query, alive: "" }) === "1" ? "" : "1" })),
  });
  updates.push((now) => (box.checked = aliveOf(now) !== "1"));
  return box;
}

export function flagFacet() {
  const one = (/** @type {string} */ name, /** @type {string} */ value, /** @type {string} */ words) =>
    toggle(
      value,
      words,
      (now) => now.flag.includes(value),
      (all) => all.counts.flag[value],
      () =>
        changed({
          flag: flipped(
            query.flag.filter((other) => other === value || other.replace("!", "") !== name),
            value,
          ),
        }),
    );
  return h(
    "fieldset",
    { "data-facet": "flag" },
    h("legend", null, "Flags"),
    Object.entries(FLAGS).map(([name, words]) =>
      h("div", { class: "yesno", title: measureOf(name)?.meaning ?? null }, one(name, name, words), one(name, `!${name}`, "not")),
    ),
  );
}

/** @param {string} name */
export function rangeControl(name) {
  const { column, words, log } = RANGES[name];
  const ends = /** @type {const} */ (["low", "high"]);
  const inputs = ends.map((end, side) => {
    const input = h("input", {
      type: "number",
      step: "any",
      inputmode: "decimal",
      "data-end": end,
      "aria-label": `${words}: ${side ? "at most" : "at least"}`,
      onchange: () => {
        const range = /** @type {[number|null, number|null]} */ (
          inputs.map((other) => (other.value === "" ? null : Number(other.value)))
        );
        const next = { ...query.ranges };
        if (range[0] === null && range[1] === null) delete next[name];
        else next[name] = range;
        if (range[0] !== null && range[1] !== null && range[0] > range[1])
          return fill(note, "The first number is larger than the second.");
        go(changed({ ranges: next }));
      },
    });
    return input;
  });
  const note = h("span", { class: "small soft", role: "status" });
  const bars = svg("svg", { viewBox: `0 0 ${BINS * 4} 24`, preserveAspectRatio: "none", class: "bars", "aria-hidden": "true" });
  updates.push((now, all) => {
    const range = now.ranges[name] ?? [null, null];
    inputs.forEach((input, side) => {
      if (document.activeElement !== input || Number(input.value) !== range[side]) input.value = range[side] ?? "";
    });
    fill(note);
    if (!all || !table) return;
    const { low, high } = table.domains[name];
    const counts = all.bars[name];
    const most = Math.max(1, ...counts);
    const edge = (/** @type {number} */ i) => (log ? low * (high / low) ** (i / BINS) : low + ((high - low) * i) / BINS);
    fill(
      bars,
      Array.from(counts, (count, i) => {
        const inside = edge(i + 1) >= (range[0] ?? -Infinity) && edge(i) <= (range[1] ?? Infinity);
        const height = count ? Math.max(1.5, (22 * count) / most) : 0;
        return svg("rect", { x: i * 4, y: 24 - height, width: 3.4, height, class: inside ? "in" : "out" });
      }),
    );
    if (high >= low) inputs.forEach((input, side) => (input.placeholder = format(column, side ? high : low)));
    else inputs.forEach((input) => (input.placeholder = "none"));
  });
  const meaning = measureOf(column)?.meaning;
  return h(
    "div",
    { class: "range", "data-range": name, role: "group", "aria-label": words, title: meaning ?? null },
    h("span", { class: "legend" }, words, log ? h("span", { class: "soft small" }, " (log)") : null),
    bars,
    h("div", { class: "ends" }, inputs[0], h("span", { class: "soft" }, "to"), inputs[1]),
    note,
  );
}

/** @param {{names: Object<string, string>, raters: string[]}} known */
export function labelFacet(known) {
  const words = (/** @type {string} */ value) =>
    known.names[value]
      ? `${value} ${known.names[value]}`
      : ({ any: "any label", none: "no label", note: "with a note" }[value] ?? value);
  const select = h("select", { id: "rater", "aria-label": "Labels of", onchange: () => go(changed({ rater: select.value })) });
  updates.push((now) => {
    const raters = [...new Set([...known.raters, now.rater].filter(Boolean))];
    fill(
      select,
      h("option", { value: "" }, "all raters"),
      raters.map((rater) => h("option", { value: rater }, visible(rater))),
    );
    select.value = now.rater;
    select.hidden = raters.length < 2 && !now.rater;
  });
  return h(
    "fieldset",
    { "data-facet": "label" },
    h("legend", null, "Label"),
    select,
    LABELS.map((value) =>
      toggle(
        value,
        words(value),
        (now) => now.label === value,
        (all) => all.counts.label[value],
        () => changed({ label: query.label === value ? "" : value }),
      ),
    ),
  );
}

export function searchRow() {
  const input = h("input", {
    type: "search",
    id: "q",
    placeholder: index.languages.includes("ja") ? "a token or text, as dog or 犬" : "a token or text",
    "aria-label": "Search tokens and text",
    autocomplete: "off",
    spellcheck: "false",
    maxlength: 500,
  });
  const lang = h(
    "select",
    { id: "lang", "aria-label": "Language searched", onchange: () => go(changed({ lang: lang.value })) },
    h("option", { value: "" }, "any language"),
    index.languages.map((code) => h("option", { value: code }, languageName(code))),
  );
  let typed = false;
  /** @type {any} */
  let timer = 0;
  const commit = () => {
    clearTimeout(timer);
    if (input.value.trim() === query.q) return;
    // One entry of the history for all that is typed in one go.
    go(changed({ q: input.value.trim() }), typed);
    typed = true;
  };
  input.addEventListener("input", (/** @type {InputEvent} */ event) => {
    clearTimeout(timer);
    if (!event.isComposing) timer = setTimeout(commit, 250);
  });
  input.addEventListener("compositionend", () => (timer = setTimeout(commit, 250)));
  input.addEventListener("change", commit);
  input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") commit();
    if (event.key === "Escape" && input.value === "") input.blur();
  });
  input.addEventListener("blur", () => (typed = false));
  updates.push((now) => {
    if (input.value.trim() !== now.q) input.value = now.q;
    lang.value = now.lang;
  });
  return h("div", { class: "searchrow", role: "search" }, input, lang);
}

/** Filters that have no control of their own. */
export function activeLine() {
  const line = h("div", { class: "row active" });
  updates.push((now) => {
    const words = /** @type {[("token"|"text"), string][]} */ ([
      ["token", "token contains"],
      ["text", "text contains"],
    ]);
    fill(
      line,
      words
        .filter(([name]) => now[name])
        .map(([name, said]) =>
          h(
            "button",
            { type: "button", "data-remove": name, onclick: () => go(changed({ [name]: "" })) },
            `${said} “${visible(now[name])}” `,
            h("span", { "aria-hidden": "true" }, "×"),
            h("span", { class: "sr" }, " remove"),
          ),
        ),
    );
    line.hidden = !line.childElementCount;
  });
  return line;
}

export function clearButton() {
  const button = h(
    "button",
    {
      type: "button",
      id: "clear",
      onclick: () => {
        clear();
        found.focus();
      },
    },
    "Clear filters",
  );
  updates.push((now) => {
    button.hidden = !(
      now.class.length + now.flag.length + Object.keys(now.ranges).length > 0 ||
      now.q ||
      now.token ||
      now.text ||
      now.lang ||
      now.label ||
      now.rater ||
      now.alive
    );
  });
  return button;
}

export function sortControl() {
  const select = h("select", { id: "sort", "aria-label": "Sort by", onchange: () => go(changed({ sort: select.value })) });
  const options = [
    ["", "setup and number"],
    ...Object.entries(SORTS).flatMap(([name, words]) =>
      name in RANGES || name === "label"
        ? [
            [`-${name}`, `${words}, highest first`],
            [name, `${words}, lowest first`],
          ]
        : [
            [name, words],
            [`-${name}`, `${words}, backwards`],
          ],
    ),
  ];
  fill(
    select,
    options.map(([value, words]) => h("option", { value }, words)),
  );
  updates.push((now) => (select.value = now.sort));
  return h("label", { class: "sortby" }, h("span", { class: "soft small" }, "Sort by "), select);
}

export function jsonLink() {
  const link = h("a", { id: "json", class: "small" }, "this list as JSON");
  updates.push((now) => (link.href = `data/find.json${serialise(now) ? `?${serialise(now)}` : ""}`));
  return link;
}
