// Single-key shortcuts: never inside fields, never with a modifier, and off for those who turn them off.
import { h } from "./dom.js";

const STORE = "glottoscope-keys";
/** @type {Map<string, {run: (event: KeyboardEvent) => void, help: string, shown: string}>} */
const bindings = new Map();
let listening = false;

function enabled() {
  try {
    return localStorage.getItem(STORE) !== "off";
  } catch {
    return true;
  }
}

/** @param {KeyboardEvent} event */
function isTyping(event) {
  const target = event.target;
  if (!(target instanceof Element)) return false;
  if (target.closest("input, textarea, select, [contenteditable], dialog")) return true;
  // Arrows move within these, and scroll what is too wide.
  return (
    event.key.startsWith("Arrow") &&
    target.closest(".scroll, [role=slider], [role=tablist], [role=radiogroup], [role=grid]") !== null
  );
}

/** @param {KeyboardEvent} event */
function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.defaultPrevented || event.repeat) return;
  const binding = bindings.get(event.key);
  if (!binding || isTyping(event) || document.querySelector("dialog[open]")) return;
  if (event.key !== "?" && !enabled()) return;
  event.preventDefault();
  binding.run(event);
}

/**
 * Bind keys: `keys({ j: [next, "next feature"], "1": [...] })`. Keys with the same help share a line of the help.
 * @param {Object<string, [(event: KeyboardEvent) => void, string]>} table
 */
export function keys(table) {
  const names = /** @type {Object<string, string>} */ ({
    ArrowLeft: "←",
    ArrowRight: "→",
    ArrowUp: "↑",
    ArrowDown: "↓",
    Escape: "Esc",
  });
  for (const [key, [run, help]] of Object.entries(table)) bindings.set(key, { run, help, shown: names[key] ?? key });
  if (!listening) document.addEventListener("keydown", pressed);
  listening = true;
}

/** The dialog that lists the keys of this page. */
export function help() {
  /** @type {Map<string, string[]>} */
  const lines = new Map();
  const last = [...bindings.entries()].sort((a, b) => Number(a[0] === "?") - Number(b[0] === "?"));
  for (const [, { help, shown }] of last) lines.set(help, [...(lines.get(help) ?? []), shown]);
  const box = h("input", { type: "checkbox", id: "keys-on", checked: enabled() });
  box.addEventListener("change", () => {
    try {
      localStorage.setItem(STORE, box.checked ? "on" : "off");
    } catch {
      // Without storage the choice cannot be kept.
    }
  });
  const dialog = h(
    "dialog",
    { id: "help", "aria-labelledby": "help-title" },
    h("h2", { id: "help-title" }, "Keys of this page"),
    h(
      "dl",
      { class: "keys" },
      [...lines].map(([words, list]) =>
        h(
          "div",
          null,
          h(
            "dt",
            null,
            list.map((key) => [h("kbd", null, key), " "]),
          ),
          h("dd", null, words),
        ),
      ),
    ),
    h("p", null, h("label", { for: "keys-on" }, box, " Keys are on (? always works)")),
    h("form", { method: "dialog" }, h("button", { type: "submit", autofocus: true }, "Close")),
  );
  dialog.addEventListener("close", () => dialog.remove());
  // CSP forbids forms to be sent, a dialog's own included in some browsers.
  dialog.querySelector("form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    dialog.close();
  });
  document.body.append(dialog);
  dialog.showModal();
}
