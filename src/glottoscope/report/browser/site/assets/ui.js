// What all pages share: elements, header and footer, failures in words, badges, numbers, chips of tokens.
import { DataError, live, site, siteNow, tokensNow } from "./data.js";
import { fill, h, put, svg } from "./dom.js";
import { help, keys } from "./keys.js";
import { tokenText, visible } from "./text.js";

export { fill, h, keys, put, svg };

const PAGES = /** @type {const} */ ([
  ["index.html", "Overview"],
  ["find.html", "Find"],
  ["compare.html", "Compare"],
  ["labels.html", "Labels"],
]);
const THEMES = /** @type {const} */ ({ auto: "as the system", light: "light", dark: "dark" });

function theme() {
  return document.documentElement.dataset.theme ?? "auto";
}

/** @param {HTMLElement} button */
function nextTheme(button) {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(theme()) + 1) % names.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("glottoscope-theme", next);
  } catch {
    // Without storage the choice holds for this page.
  }
  labelTheme(button);
}

/** @param {HTMLElement} button */
function labelTheme(button) {
  const name = /** @type {keyof typeof THEMES} */ (theme());
  fill(
    button,
    h("span", { "aria-hidden": "true" }, { auto: "◐", light: "☀", dark: "☾" }[name]),
    h("span", { class: "sr" }, `Colours: ${THEMES[name]}. Change`),
  );
  button.title = `Colours: ${THEMES[name]}`;
}

/**
 * Header, footer and title of a page -> its empty <main>. Removes what the shell says to those who open it as a file.
 * @param {{title: string, here: string}} what `here`: the file name of this page, as "find.html"
 * @returns {HTMLElement}
 */
export function page({ title, here }) {
  document.getElementById("start")?.remove();
  const name = h("a", { class: "study", href: "index.html" }, "…");
  const button = h("button", { type: "button", class: "quiet", id: "theme", onclick: () => nextTheme(button) });
  labelTheme(button);
  const notices = h("aside", { id: "notices", "aria-label": "About this run", hidden: true });
  const header = h(
    "header",
    { class: "site" },
    h("a", { class: "skip", href: "#main" }, "To the content"),
    name,
    h(
      "nav",
      { "aria-label": "Pages" },
      PAGES.map(([address, words]) => h("a", { href: address, "aria-current": address === here ? "page" : null }, words)),
    ),
    h(
      "span",
      { class: "tools" },
      button,
      h(
        "button",
        { type: "button", class: "quiet", id: "keys", title: "Keys of this page", onclick: help },
        h("span", { "aria-hidden": "true" }, "?"),
        h("span", { class: "sr" }, "Keys of this page"),
      ),
    ),
  );
  const main = document.getElementById("main") ?? h("main", { id: "main" });
  main.tabIndex = -1;
  const footer = h("footer", { class: "site" });
  document.body.prepend(header, notices);
  document.body.append(main, footer);
  retitle(title);
  keys({ "?": [help, "this help"] });
  Promise.all([site(), live()]).then(
    ([data, { live: served, rater }]) => {
      fill(name, visible(data.title ?? data.study));
      retitle(title);
      if (data.partial?.length) {
        const lines = data.partial.map((line) => h("li", null, visible(line)));
        notices.append(
          h(
            "details",
            { class: "notice", id: "partial", open: here === "index.html" },
            h("summary", null, h("strong", null, "This run is not complete"), ` (${lines.length})`),
            h("ul", null, lines),
          ),
        );
        notices.hidden = false;
      }
      put(
        footer,
        h(
          "p",
          null,
          `glottoscope ${visible(data.glottoscope ?? "")} · study ${visible(data.study)}`,
          served ? ` · served here, labels are saved as ${visible(rater ?? "")}` : " · exported: labels are read-only",
        ),
        data.notes?.length
          ? h(
              "div",
              null,
              data.notes.map((/** @type {string} */ note) => h("p", null, visible(note))),
            )
          : null,
        data.licences?.length
          ? h(
              "ul",
              { class: "licences" },
              data.licences.map((/** @type {string[]} */ line) => h("li", null, line.filter(Boolean).map(visible).join(" · "))),
            )
          : null,
      );
    },
    (error) => fail(error),
  );
  return main;
}

/** The page's title before the study's name. @param {string} title */
export function retitle(title) {
  const data = siteNow();
  document.title = data ? `${title} · ${visible(data.title ?? data.study)}` : title;
}

/**
 * Say in words what is wrong and what to do; the same failure is said once.
 * @param {unknown} error @param {Element} [where] default: the top of <main>
 */
export function fail(error, where) {
  if (!(error instanceof DataError)) console.error(error);
  const message = error instanceof Error ? error.message : String(error);
  const remedy =
    error instanceof DataError ? error.remedy : "This is a fault of the page. Please report it with the address of the page.";
  const place = where ?? document.getElementById("main") ?? document.body;
  if ([...place.querySelectorAll(".failure")].some((other) => other.getAttribute("data-message") === message)) return;
  place.prepend(
    h(
      "div",
      { class: "failure", role: "alert", "data-message": message },
      h("strong", null, visible(message)),
      " ",
      visible(remedy),
    ),
  );
}

/** Name of a language of the study. @param {string} code */
export const languageName = (code) => siteNow()?.language_names?.[code] ?? code;

/** @param {string} cls */
export const className = (cls) => (siteNow()?.languages.includes(cls) ? languageName(cls) : cls);

const SHAPES = ["■", "▲", "◆", "▼", "✚"];
const OTHERS = /** @type {Object<string, string>} */ ({ mixed: "●", neutral: "○", unclassified: "?", dead: "×" });

/** Shape and CSS class of a class; shapes are those of the report's figures. @param {string} cls */
export function classLook(cls) {
  const index = siteNow()?.languages.indexOf(cls) ?? -1;
  return index >= 0
    ? { shape: SHAPES[index % SHAPES.length], css: `lang-${index % 5}` }
    : { shape: OTHERS[cls] ?? "?", css: OTHERS[cls] ? cls : "unclassified" };
}

/**
 * A feature's class by shape, word and colour. @param {string} cls @param {boolean|number|null} [bilingual]
 * @returns {HTMLElement}
 */
export function classBadge(cls, bilingual = false) {
  const { shape, css } = classLook(cls);
  return h(
    "span",
    { class: "badges" },
    h(
      "span",
      { class: `badge ${css}`, "data-class": cls, title: className(cls) },
      h("span", { "aria-hidden": "true" }, shape),
      ` ${cls}`,
    ),
    bilingual
      ? h(
          "span",
          { class: "badge bilingual", title: "bilingual: fires in a sentence and in its translation" },
          h("span", { "aria-hidden": "true" }, "◈"),
          " bilingual",
        )
      : null,
  );
}

/** Definition of a measure in site.json. @param {string} name */
export const measureOf = (name) => siteNow()?.measures?.find((measure) => measure.name === name);

/** @type {Map<number, Intl.NumberFormat>} */
const formatters = new Map();

/** @param {number} digits */
function formatter(digits) {
  let known = formatters.get(digits);
  if (!known)
    formatters.set(digits, (known = new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })));
  return known;
}

/** A number as text: an en dash where it is null. @param {string} name @param {number|null|undefined} value */
export function format(name, value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const digits = measureOf(name)?.digits ?? (Number.isInteger(value) ? 0 : 2);
  const least = 10 ** -digits;
  // A share that is not 0 is not shown as 0.
  if (value > 0 && value < least / 2) return `<${least.toFixed(digits)}`;
  return formatter(digits).format(value).replace("-", "−");
}

/** A measure's value with its meaning at hand. @param {string} name @param {number|null|undefined} value @returns {HTMLElement} */
export function measure(name, value) {
  const known = measureOf(name);
  const text = format(name, value);
  return h(
    "span",
    { class: "num", title: known ? `${known.label}: ${known.meaning}` : null, "data-measure": name },
    text,
    text === "–" ? h("span", { class: "sr" }, "unknown") : null,
  );
}

/**
 * A token as a chip. @param {number} rank @param {{lang?: string, count?: number|null, cluster?: string|null, limit?: number}} [more]
 * @returns {HTMLElement}
 */
export function chip(rank, { lang, count = null, cluster = null, limit = 32 } = {}) {
  const table = tokensNow();
  const text = tokenText(rank, limit);
  const full = tokenText(rank, 400);
  const space = text.length > text.trimStart().length;
  const shown = text.trim() || "␣".repeat(Math.max(1, text.length));
  const bytes = table.bytes.has(rank);
  return h(
    "span",
    {
      class: ["chip", space && shown === text.trim() && "sp", bytes && "bytes", table.special.has(rank) && "special"]
        .filter(Boolean)
        .join(" "),
      title: bytes
        ? `bytes ${full}: part of a character`
        : space
          ? `“${full}”, with a space before it`
          : full === text
            ? null
            : full,
    },
    h("bdi", { lang: bytes ? null : lang }, shown),
    count === null ? null : h("span", { class: "n" }, count.toLocaleString("en")),
    cluster === null ? null : h("span", { class: "cluster", title: `cluster ${cluster}` }, cluster),
  );
}

/** A setup in words: "d128 · step 600 · layer 2", with control and seeds where they matter. @param {import("./data.js").Setup} setup */
export function setupWords(setup) {
  const all = siteNow()?.setups ?? [];
  const several = (/** @type {"lm_seed"|"sae_seed"} */ name) => all.some((other) => other[name] !== setup[name]);
  return [
    visible(setup.name),
    setup.control === "none" ? null : `control: ${visible(setup.control)}`,
    `step ${setup.step.toLocaleString("en")}`,
    `layer ${setup.layer}`,
    several("lm_seed") ? `LM seed ${setup.lm_seed}` : null,
    several("sae_seed") ? `SAE seed ${setup.sae_seed}` : null,
  ]
    .filter(Boolean)
    .join(" · ");
}

/** A value of an address: escaped, but what is harmless stays readable. @param {string|number} value */
export const encode = (value) =>
  encodeURIComponent(value).replace(
    /%(?:2C|2F|3A|40|20)/g,
    (code) => ({ "%2C": ",", "%2F": "/", "%3A": ":", "%40": "@", "%20": "+" })[code] ?? code,
  );

/** Address of a feature's page. @param {string} id @param {number} f @param {Object<string, string|null|undefined>} [more] */
export const featureAddress = (id, f, more = {}) =>
  `feature.html?f=${encode(`${id}:${f}`)}${Object.entries(more)
    .map(([name, value]) => (value ? `&${name}=${encode(value)}` : ""))
    .join("")}`;

/** The setup and feature of "ID:F"; null where it is no such thing. @param {string|null} value */
export function parseFeature(value) {
  const match = /^(.+):(\d{1,9})$/.exec(value ?? "");
  return match ? { setup: match[1], feature: Number(match[2]) } : null;
}
