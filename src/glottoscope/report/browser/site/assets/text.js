// Text of the corpus on the page: hidden characters shown, tokens merged to characters, activations as shades.
import { tokensNow } from "./data.js";
import { h } from "./dom.js";

// Control, bidi, zero-width, private-use and unpaired characters, which hide, reorder or fake the text around them. The
// joiners U+200C and U+200D stay: scripts and emoji need them.
const HIDDEN =
  /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]|\p{Noncharacter_Code_Point}|\p{Co}|\p{Cs}/gu;

/**
 * Text with every character shown that would otherwise hide or reorder: a line break as "⏎" and the break itself, control,
 * bidi and private-use characters by their code point, ‹U+202E›, as in the report; unpaired surrogates as U+FFFD.
 * @param {string} text
 */
export function visible(text) {
  return String(text).replace(HIDDEN, (character) => {
    const code = character.codePointAt(0) ?? 0;
    if (code === 0x0a) return "⏎\n";
    if (code >= 0xd800 && code <= 0xdfff) return "\ufffd";
    return `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
  });
}

// Above this a cut token is so long that its length is worth saying.
const LONG = 100;

/** Text of at most `limit` characters; where a long one was cut, its length is said. @param {string} text @param {number} limit @param {number} [length] */
export function shortened(text, limit, length = text.length) {
  const full = Math.max(length, text.length);
  if (full <= limit) return text;
  let end = Math.min(limit, text.length);
  if (end < text.length && /[\ud800-\udbff]/.test(text[end - 1])) end -= 1;
  return `${text.slice(0, end)}…${full > LONG ? ` (${full.toLocaleString("en")} characters)` : ""}`;
}

/** Whether bytes at the end of `bytes` are the beginning of a character that further bytes could complete. @param {number[]} bytes */
function open(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const lead = bytes[bytes.length - back];
    if (lead >= 0x80 && lead < 0xc0) continue;
    const need = lead >= 0xf0 && lead <= 0xf4 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc2 ? 2 : 1;
    if (lead > 0xf4 || need <= back) return false;
    return back === 1 || follows(lead, bytes[bytes.length - back + 1]);
  }
  return false;
}

/** Whether `byte` may be the second byte after this lead byte. @param {number} lead @param {number} byte */
function follows(lead, byte) {
  const low = lead === 0xe0 ? 0xa0 : lead === 0xf0 ? 0x90 : 0x80;
  const high = lead === 0xed ? 0x9f : lead === 0xf4 ? 0x8f : 0xbf;
  return byte >= low && byte <= high;
}

/** @param {number[]} bytes @param {number} byte */
function continues(bytes, byte) {
  const last = bytes[bytes.length - 1];
  return last >= 0xc0 ? follows(last, byte) : byte >= 0x80 && byte < 0xc0;
}

/**
 * The smallest runs of tokens that are complete characters; bytes that can never become one are U+FFFD.
 * @param {ArrayLike<number>} ranks
 * @param {import("./data.js").Tokens} [table]
 * @returns {{start: number, end: number, text: string}[]} ends are exclusive; every token is in one span
 */
export function spans(ranks, table = tokensNow()) {
  const found = [];
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  /** @type {number[]} */
  let waiting = [];
  let start = 0;
  const close = (/** @type {number} */ end) => {
    if (waiting.length) found.push({ start, end, text: decoder.decode(Uint8Array.from(waiting)) });
    waiting = [];
    start = end;
  };
  for (let at = 0; at < ranks.length; at++) {
    const bytes = table.bytes.get(ranks[at]);
    if (waiting.length && !(bytes && bytes.length && continues(waiting, bytes[0]))) close(at);
    if (!bytes) {
      found.push({ start: at, end: at + 1, text: table.text[ranks[at]] ?? "\ufffd" });
      start = at + 1;
      continue;
    }
    waiting.push(...bytes);
    if (!open(waiting)) close(at + 1);
  }
  close(ranks.length);
  return found;
}

/**
 * Percent of the feature's maximum at every position, from the pairs [gap, level, gap, level ...].
 * @param {ArrayLike<number>} on @param {number} length
 */
export function levels(on, length) {
  const values = new Uint8Array(length);
  let at = 0;
  for (let i = 0; i + 1 < on.length; i += 2) {
    at += on[i];
    if (at < length) values[at] = on[i + 1];
  }
  return values;
}

/** A token by itself as text: its bytes where it is only part of a character. @param {number} rank @param {number} [limit] */
export function tokenText(rank, limit = 60) {
  const table = tokensNow();
  const bytes = table.bytes.get(rank);
  if (bytes) return `‹${Array.from(bytes, (byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ")}›`;
  const text = table.text[rank] ?? "\ufffd";
  return visible(shortened(text, limit, table.cut.get(rank)));
}

/**
 * Text with activations as shades; the peak is bold, underlined and marked by ▲, so that colour is not needed.
 * @param {{ranks: ArrayLike<number>, levels: ArrayLike<number>, peak?: number, lang: string, max?: number|null, breaks?: number[]}} what
 *   levels: 0-100, percent of the maximum `max`; peak: index into ranks; breaks: where another document begins
 * @returns {HTMLElement}
 */
export function shaded({ ranks, levels, peak = -1, lang, max = null, breaks = [] }) {
  const table = tokensNow();
  const line = h("div", { class: "text", lang, dir: "auto" });
  for (const { start, end, text } of spans(ranks, table)) {
    let level = 0;
    for (let at = start; at < end; at++) level = Math.max(level, levels[at] ?? 0);
    if (breaks.some((at) => at >= start && at < end))
      line.append(h("span", { class: "docbreak", title: "another document begins here" }, "¶"));
    const isPeak = peak >= start && peak < end;
    const length = Math.max(...Array.from({ length: end - start }, (_, i) => table.cut.get(ranks[start + i]) ?? 0), text.length);
    const shown = visible(shortened(text, 300, length));
    // The space before a word stays outside of its shade and underline.
    const space = shown.length - shown.trimStart().length;
    const lead = space < shown.length ? shown.slice(0, space) : "";
    if (lead) line.append(lead);
    const special = end === start + 1 && table.special.has(ranks[start]);
    const value =
      max === null || max === undefined ? `${level} % of the maximum` : `${((level / 100) * max).toPrecision(2)} (${level} %)`;
    if (isPeak) line.append(h("span", { class: "sr" }, " strongest: "));
    line.append(
      h(
        isPeak ? "mark" : "span",
        {
          class:
            [isPeak && "peak", level > 0 && `l${Math.min(10, Math.ceil(level / 10))}`, special && "special"]
              .filter(Boolean)
              .join(" ") || null,
          title: level > 0 ? `activation ${value}` : "not active",
        },
        shown.slice(lead.length),
      ),
    );
  }
  return line;
}

const START = "\ue000";
const END = "\ue001";

/** A snippet without its marks. @param {string} text */
export const unmarked = (text) => text.replaceAll(START, "").replaceAll(END, "");

/** Text as it is compared: compatibility forms folded, no case. @param {string} text */
export const folded = (text) => text.normalize("NFKC").toLowerCase();

/**
 * One line of a snippet as a concordance shows it, around what was searched, else around the peak: what stands before is
 * cut at its beginning, what follows at its end.
 * @param {string} text the peak stands between U+E000 and U+E001 @param {string} lang @param {string} [needle] folded
 * @returns {HTMLElement}
 */
export function snippetLine(text, lang, needle = "") {
  const plain = unmarked(text);
  const marked = text.indexOf(START) >= 0 && text.indexOf(END) > text.indexOf(START);
  const end = marked ? text.indexOf(END) - 1 : 0;
  let start = marked ? text.indexOf(START) : 0;
  // The space before a word stays outside of its underline.
  while (start < end && plain[start] === " ") start += 1;
  // Folding may change the number of characters: the place is then not known, and the line is around the peak.
  const lower = needle ? folded(plain) : "";
  const hit = lower.length === plain.length ? lower.indexOf(needle) : -1;
  const [from, to] = needle && hit >= 0 ? [hit, hit + needle.length] : [start, end];
  const flat = (/** @type {string} */ part) => visible(shortened(part, 300).replace(/\s*\n\s*/g, " ⏎ "));
  const part = (/** @type {number} */ a, /** @type {number} */ b) => {
    const [low, high] = [Math.max(a, start), Math.min(b, end)];
    if (low >= high) return [flat(plain.slice(a, b))];
    return [flat(plain.slice(a, low)), h("mark", { class: "peak" }, flat(plain.slice(low, high))), flat(plain.slice(high, b))];
  };
  return h(
    "span",
    { class: "snippet", lang },
    h("span", { class: "before" }, h("bdi", null, part(Math.max(0, from - 200), from))),
    h("span", { class: needle && hit >= 0 ? "centre hit" : "centre" }, part(from, to)),
    h("span", { class: "after" }, part(to, plain.length)),
  );
}
