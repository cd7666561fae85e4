// The map of steps by layers: a table whose cells are links, coloured by value on cividis, which readers of any colour vision can order.
import { compact } from "./axes.js";
import { fill, format, h } from "./ui.js";

/** @typedef {{step: number, layer: number, value: number|null, low: number|null, high: number|null, address: string, title: string}} Cell */

const LEAST = 34; // pixels of a cell that holds a number

const cividis = (/** @type {number} */ share) => /** @type {any} */ (globalThis).d3.interpolateCividis(share);

/** Black or white, whichever is read better on a colour "rgb(r, g, b)". @param {string} colour */
function inkOn(colour) {
  const [r, g, b] = (colour.match(/[\d.]+/g) ?? []).map((part) => {
    const share = Number(part) / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  const light = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return (light + 0.05) / 0.05 > 1.05 / (light + 0.05) ? "#000000" : "#ffffff";
}

/**
 * The scale starts at 0 where that leaves room for the differences, else at the smallest value.
 * @param {{cells: Cell[], measure: string, caption: string}} what
 * @returns {HTMLElement}
 */
export function heat({ cells, measure, caption }) {
  const steps = [...new Set(cells.map((cell) => cell.step))].sort((a, b) => a - b);
  const layers = [...new Set(cells.map((cell) => cell.layer))].sort((a, b) => b - a);
  const values = cells.flatMap((cell) => (cell.value === null ? [] : [cell.value]));
  const high = values.length ? Math.max(...values) : 1;
  const least = values.length ? Math.min(...values) : 0;
  const low = least >= 0 && least < 0.5 * high ? 0 : least;
  const share = (/** @type {number} */ value) => (high > low ? (value - low) / (high - low) : 0.5);
  const at = new Map(cells.map((cell) => [`${cell.step} ${cell.layer}`, cell]));
  const readout = h("p", { class: "readout soft", id: "heat-readout", "aria-hidden": "true" }, "Point at a cell for its value; a cell leads to its features.");

  const link = (/** @type {Cell} */ cell) => {
    const text = format(measure, cell.value);
    const known = cell.value !== null;
    const words = `step ${cell.step.toLocaleString("en")}, layer ${cell.layer}: ${known ? text : "not measured"}${cell.low !== null && cell.high !== null ? `, from ${format(measure, cell.low)} to ${format(measure, cell.high)}` : ""}; ${cell.title}`;
    const colour = known ? cividis(share(/** @type {number} */ (cell.value))) : null;
    const say = () => fill(readout, words);
    return h(
      "a",
      {
        href: cell.address, "data-step": cell.step, "data-layer": cell.layer, "aria-label": words, tabindex: "-1",
        style: colour ? `background: ${colour}; color: ${inkOn(colour)}` : null, onfocus: say, onpointerenter: say,
      },
      h("span", { class: "value" }, text),
    );
  };

  const table = h(
    "table",
    { class: "heat", "aria-describedby": "heat-keys" },
    h("caption", { class: "sr" }, caption),
    h("thead", null, h("tr", null, h("th", { scope: "col" }, h("span", { class: "sr" }, "layer")), steps.map((step) => h("th", { scope: "col" }, h("span", { class: "sr" }, "step "), h("span", null, compact(step)))))),
    h("tbody", null, layers.map((layer) =>
      h("tr", null, h("th", { scope: "row" }, h("span", { class: "sr" }, "layer "), layer), steps.map((step) => {
        const cell = at.get(`${step} ${layer}`);
        return h("td", null, cell ? link(cell) : h("span", { class: "none" }, "–"));
      })))),
  );
  // One stop of the Tab key; arrow keys move inside.
  const links = /** @type {HTMLAnchorElement[]} */ ([...table.querySelectorAll("a")]);
  const reach = (/** @type {HTMLAnchorElement|undefined} */ next) => {
    if (!next) return false;
    for (const other of links) other.tabIndex = other === next ? 0 : -1;
    return true;
  };
  reach(links[0]);
  table.addEventListener("focusin", (/** @type {FocusEvent} */ event) => event.target instanceof HTMLAnchorElement && reach(event.target));
  table.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-steps.length, 0], End: [steps.length, 0] }[event.key] ?? [0, 0];
    if ((!dx && !dy) || event.ctrlKey || event.altKey || event.metaKey || !(event.target instanceof HTMLAnchorElement)) return;
    const [row, column] = [layers.indexOf(Number(event.target.dataset.layer)), steps.indexOf(Number(event.target.dataset.step))];
    const inside = (/** @type {number} */ n, /** @type {number} */ of) => Math.min(of - 1, Math.max(0, n));
    const next = links.find((other) => other.dataset.layer === String(layers[inside(row + dy, layers.length)]) && other.dataset.step === String(steps[inside(column + dx, steps.length)]));
    if (reach(next)) next?.focus();
    event.preventDefault();
  });
  const scroller = h("div", { class: "scroll" }, table);
  new ResizeObserver(([entry]) => table.classList.toggle("dense", (entry.contentRect.width - 48) / Math.max(1, steps.length) < LEAST)).observe(scroller);
  const stops = Array.from({ length: 9 }, (_, i) => cividis(i / 8)).join(", ");
  return h(
    "div",
    { class: "map", id: "heat" },
    scroller,
    readout,
    h(
      "p",
      { class: "ramp" },
      h("span", { class: "num" }, format(measure, low)),
      h("span", { class: "bar", style: `background: linear-gradient(to right, ${stops})`, "aria-hidden": "true" }),
      h("span", { class: "num" }, format(measure, high)),
      h("span", { class: "soft axis-words" }, "step →  layer ↑"),
      h("span", { class: "sr", id: "heat-keys" }, "Each cell leads to the features of its setup. Arrow keys move between cells, Enter opens."),
    ),
  );
}
