// Line charts over a common axis: bands, marks, labels at the ends, a cursor for pointer and keyboard, and a table that says the same.
import { ticksThatFit } from "./axes.js";
import { fill, format, h, svg } from "./ui.js";

/**
 * @typedef {import("./axes.js").Axis} Axis
 * @typedef {{symbol: string, colour: string, hollow?: boolean}} Mark
 * @typedef {{x: number, value: number, low?: number|null, high?: number|null, note: string, address?: string, mark?: Mark}} Point
 *   low, high: ends of the band; note: what the value rests on, as "181 alive"; mark: where it differs from the line's
 * @typedef {{label: string, measure: string, colour: string, ink: string, symbol: string, dash?: string, thin?: boolean, bare?: boolean, points: Point[]}} Series
 *   bare: a line without marks
 * @typedef {{series: Series[], axis: Axis, label: string, summary: string, domain?: [number, number], height?: number, id?: string}} Chart
 *   label: of the vertical axis; summary: the chart in a sentence for those who do not see it
 */

/** The two libraries, loaded as classic scripts before the modules run. */
const library = () => /** @type {{d3: any, Plot: any}} */ (/** @type {any} */ (globalThis));

/** @type {Promise<void>|null} */
let styles = null;

/** The style sheet of charts, overview, compare and labels; awaited before anything is measured. */
export function styled() {
  styles ??= new Promise((resolve) => {
    const link = h("link", { rel: "stylesheet", href: new URL("charts.css", import.meta.url).href });
    link.addEventListener("load", () => resolve());
    link.addEventListener("error", () => resolve());
    document.head.append(link);
  });
  return styles;
}

/** Range of values that a chart shows: 0 is in it where it is near. @param {Series[]} series @returns {[number, number]} */
export function rangeOf(series) {
  let low = Infinity;
  let high = -Infinity;
  for (const { points } of series)
    for (const point of points) {
      low = Math.min(low, point.low ?? point.value);
      high = Math.max(high, point.high ?? point.value);
    }
  if (low > high) return [0, 1];
  if (low >= 0 && low < 0.5 * high) low = 0;
  const pad = (high - low || Math.abs(high) || 1) * 0.05;
  return [low === 0 ? 0 : low - pad, high + pad];
}

/**
 * A line with its mark, as a legend shows it. @param {Mark & {dash?: string, thin?: boolean, bare?: boolean}} series
 * @param {"line"|"mark"|"both"} [part]
 */
export function swatch(series, part = series.bare ? "line" : "both") {
  const { d3 } = library();
  const kind = d3[`symbol${series.symbol[0].toUpperCase()}${series.symbol.slice(1)}`] ?? d3.symbolCircle;
  return svg(
    "svg",
    { class: "swatch", viewBox: "-14 -6 28 12", width: 28, height: 12, "aria-hidden": "true" },
    part === "mark" ? null : svg("line", { x1: -14, x2: 14, stroke: series.colour, "stroke-width": series.thin ? 1.2 : 2, "stroke-dasharray": series.dash ?? null }),
    part === "line" ? null : svg("path", { d: d3.symbol(kind, part === "mark" ? 70 : 36)(), fill: series.hollow ? "var(--card)" : series.colour, stroke: series.colour, "stroke-width": 1 }),
  );
}

/** The interval or band of a point in words. @param {Series} series @param {Point} point */
const band = (series, point) => (point.low === null || point.low === undefined || point.high === null || point.high === undefined ? "" : `${format(series.measure, point.low)} to ${format(series.measure, point.high)}`);

/**
 * Places for labels of one height, in order and as near as can be to where they belong.
 * @param {number[]} wanted @param {number} gap @param {number} low @param {number} high
 */
function spread(wanted, gap, low, high) {
  const order = wanted.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b]);
  const places = order.map((i) => wanted[i]);
  for (let n = 0; n < places.length; n++) places[n] = Math.max(places[n], n ? places[n - 1] + gap : low);
  for (let n = places.length - 1; n >= 0; n--) places[n] = Math.min(places[n], n < places.length - 1 ? places[n + 1] - gap : high);
  const result = wanted.slice();
  order.forEach((i, n) => (result[i] = places[n]));
  return result;
}

/** @param {Chart} chart @param {number} width */
function drawn(chart, width) {
  const { Plot } = library();
  const { axis, series } = chart;
  const height = chart.height ?? Math.round(Math.min(540, Math.max(240, width * 0.42)));
  const [low, high] = chart.domain ?? rangeOf(series);
  const labelled = series.filter((one) => one.points.length);
  const room = Math.max(...labelled.map((one) => 7 * one.label.length + 20), 20);
  const atEnds = labelled.length > 1 && room < width * 0.3 && labelled.length * 15 < height - 50;
  const [marginLeft, marginRight, marginTop, marginBottom] = [46, atEnds ? room : 14, 14, 44];
  const ticks = ticksThatFit(axis, width - marginLeft - marginRight);
  const names = new Map(ticks.map((tick) => [tick.at, tick.label]));
  const at = (/** @type {Point} */ point) => axis.place(point.x);
  const marks = [Plot.ruleY([Math.max(0, low)], { stroke: "var(--edge)" })];
  for (const one of series) {
    const banded = one.points.filter((point) => point.low !== null && point.low !== undefined && point.high !== null && point.high !== undefined);
    if (banded.length > 1) marks.push(Plot.areaY(banded, { x: at, y1: "low", y2: "high", fill: one.colour, fillOpacity: 0.16 }));
    else marks.push(Plot.ruleX(banded, { x: at, y1: "low", y2: "high", stroke: one.colour, strokeWidth: 2 }));
  }
  for (const one of series) {
    marks.push(Plot.lineY(one.points, { x: at, y: "value", stroke: one.colour, strokeWidth: one.thin ? 1.3 : 2.1, strokeDasharray: one.dash }));
    const plain = one.bare ? [] : one.points.filter((point) => !point.mark);
    marks.push(Plot.dot(plain, { x: at, y: "value", symbol: one.symbol, fill: one.colour, stroke: one.colour, strokeWidth: 1, r: one.thin ? 2.4 : 3 }));
    for (const point of one.points)
      if (point.mark) marks.push(Plot.dot([point], { x: at, y: "value", symbol: point.mark.symbol, fill: point.mark.hollow ? "var(--card)" : point.mark.colour, stroke: point.mark.colour, strokeWidth: 2, r: 5.5 }));
  }
  if (axis.zero !== null) marks.push(Plot.text([axis.zero], { x: (/** @type {number} */ x) => x, text: () => "//", frameAnchor: "bottom", dy: 4, fill: "var(--soft)", stroke: "var(--card)", strokeWidth: 4 }));
  const plot = Plot.plot({
    width, height, marginLeft, marginRight, marginTop, marginBottom,
    x: { type: "linear", domain: [axis.low, axis.high], ticks: ticks.map((tick) => tick.at), tickFormat: (/** @type {number} */ x) => names.get(x) ?? "", label: axis.label, labelAnchor: "center", labelArrow: "none", labelOffset: 40 },
    y: { domain: [low, high], grid: true, ticks: Math.max(3, Math.round(height / 60)), label: null },
    marks,
  });
  // Inside an image names of groups say nothing to anyone; the style sheet knows them by another attribute.
  for (const group of plot.querySelectorAll("[aria-label]")) {
    group.setAttribute("data-mark", group.getAttribute("aria-label"));
    group.removeAttribute("aria-label");
  }
  for (const group of plot.querySelectorAll("[aria-description]")) group.removeAttribute("aria-description");
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", chart.summary);
  const [px, py] = [plot.scale("x").apply, plot.scale("y").apply];
  if (atEnds) {
    const last = (/** @type {Series} */ one) => one.points[one.points.length - 1];
    const places = spread(labelled.map((one) => py(last(one).value)), 14, marginTop, height - marginBottom);
    labelled.forEach((one, n) => {
      const end = px(at(last(one)));
      const right = width - marginRight;
      plot.append(
        svg("polyline", { points: `${end + 5},${py(last(one).value)} ${right + 2},${places[n]} ${right + 8},${places[n]}`, fill: "none", stroke: one.colour, "stroke-width": 0.7, opacity: 0.7 }),
        svg("text", { x: right + 11, y: places[n], dy: "0.32em", fill: one.ink, "text-anchor": "start" }, one.label),
      );
    });
  }
  return { plot, px, py, atEnds, top: marginTop, bottom: height - marginBottom };
}

/**
 * A chart that follows the width of its place. The cursor is a slider: arrow keys move it from value to value.
 * @param {Chart} chart @returns {HTMLElement}
 */
export function lines(chart) {
  const { axis, series } = chart;
  const xs = [...new Set(series.flatMap((one) => one.points.map((point) => point.x)))].sort((a, b) => axis.place(a) - axis.place(b));
  const place = h("div", { class: "plot" });
  const legend = h("ul", { class: "legend" }, series.map((one) => h("li", null, swatch(one), one.label)));
  const tip = h("div", { class: "tip", hidden: true });
  const slider = h("div", {
    class: "cursor", tabindex: "0", role: "slider", "aria-label": `${chart.label}: values by ${axis.label}`,
    "aria-valuemin": 0, "aria-valuemax": Math.max(0, xs.length - 1), "aria-valuenow": Math.max(0, xs.length - 1), "aria-valuetext": "arrow keys move",
  });
  const box = h("div", { class: "chart", id: chart.id }, legend, place, slider, tip);
  /** @type {ReturnType<typeof drawn>|null} */
  let now = null;
  let chosen = -1;
  let pinned = false;
  let width = 0;

  const found = (/** @type {number} */ x) =>
    series
      .flatMap((one) => one.points.filter((point) => point.x === x).map((point) => ({ one, point })))
      .sort((a, b) => b.point.value - a.point.value);

  const hide = () => {
    tip.hidden = true;
    pinned = false;
    chosen = -1;
    tip.classList.remove("pinned");
    place.querySelector(".at")?.remove();
  };

  const show = (/** @type {number} */ n) => {
    if (!now || !xs.length || (n === chosen && !tip.hidden)) return;
    chosen = n;
    const x = xs[n];
    const rows = found(x);
    const left = now.px(axis.place(x));
    place.querySelector(".at")?.remove();
    now.plot.append(
      svg(
        "g",
        { class: "at" },
        svg("line", { x1: left, x2: left, y1: now.top, y2: now.bottom }),
        rows.map(({ one, point }) => svg("circle", { cx: left, cy: now?.py(point.value), r: 5.5, stroke: one.colour })),
      ),
    );
    fill(
      tip,
      h("p", null, axis.words(x)),
      h(
        "table",
        null,
        h("tbody", null, rows.map(({ one, point }) =>
          h("tr", null, h("td", null, point.mark ? swatch(point.mark, "mark") : swatch(one)), h("th", { scope: "row" }, point.address ? h("a", { href: point.address }, one.label) : one.label), h("td", { class: "num" }, format(one.measure, point.value)), h("td", { class: "num soft" }, band(one, point)), h("td", { class: "soft" }, point.note)))),
      ),
      h("p", { class: "soft small hint" }, pinned ? "Each name leads to its features. Esc closes." : "Click or Enter: keep, with links to the features."),
    );
    slider.setAttribute("aria-valuenow", String(n));
    slider.setAttribute("aria-valuetext", `${axis.words(x)}: ${rows.map(({ one, point }) => [`${one.label} ${format(one.measure, point.value)}`, band(one, point) && `from ${band(one, point)}`, point.note].filter(Boolean).join(", ")).join("; ")}`);
    tip.hidden = false;
    tip.classList.toggle("under", width < 560);
    const right = left > width / 2;
    tip.style.left = right ? "auto" : `${left + 14}px`;
    tip.style.right = right ? `${width - left + 14}px` : "auto";
  };

  const pin = () => {
    if (chosen < 0) show(xs.length - 1);
    const n = chosen;
    pinned = true;
    chosen = -1;
    show(n);
    tip.classList.add("pinned");
  };

  const nearest = (/** @type {PointerEvent} */ event) => {
    const x = event.clientX - place.getBoundingClientRect().left;
    const gaps = xs.map((value) => Math.abs((now?.px(axis.place(value)) ?? 0) - x));
    return gaps.indexOf(Math.min(...gaps));
  };
  slider.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => !pinned && show(nearest(event)));
  slider.addEventListener("pointerleave", () => !pinned && document.activeElement !== slider && hide());
  slider.addEventListener("click", (/** @type {PointerEvent} */ event) => {
    hide();
    show(nearest(event));
    pin();
  });
  slider.addEventListener("focus", () => chosen < 0 && slider.matches(":focus-visible") && show(xs.length - 1));
  box.addEventListener("focusout", (/** @type {FocusEvent} */ event) => !box.contains(/** @type {Node|null} */ (event.relatedTarget)) && hide());
  box.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Escape" && !tip.hidden) {
      const inside = tip.contains(document.activeElement);
      hide();
      if (inside) slider.focus();
    } else if (event.target !== slider) return;
    else if (event.key === "Enter" || event.key === " ") pin();
    else {
      const start = chosen < 0 ? xs.length - 1 : chosen;
      const next = { ArrowLeft: start - 1, ArrowDown: start - 1, ArrowRight: start + 1, ArrowUp: start + 1, Home: 0, End: xs.length - 1 }[event.key];
      if (next === undefined) return;
      pinned = false;
      tip.classList.remove("pinned");
      show(Math.min(xs.length - 1, Math.max(0, next)));
    }
    event.preventDefault();
  });

  new ResizeObserver(([entry]) => {
    const next = Math.round(entry.contentRect.width);
    if (!next || next === width) return;
    width = next;
    hide();
    now = drawn(chart, width);
    legend.hidden = now.atEnds || series.length < 2;
    fill(place, now.plot);
    slider.style.top = `${place.offsetTop}px`;
    slider.style.height = `${place.offsetHeight}px`;
  }).observe(place);
  return box;
}

/**
 * A chart as a table: one row per value of the axis, one column per series; numbers lead to the features behind them.
 * @param {Chart} chart @param {string} caption @param {string} id
 */
export function twin({ series, axis }, caption, id) {
  const xs = [...new Set(series.flatMap((one) => one.points.map((point) => point.x)))].sort((a, b) => axis.place(a) - axis.place(b));
  const rows = xs.map((x) =>
    h(
      "tr",
      null,
      h("th", { scope: "row" }, axis.words(x)),
      series.map((one) => {
        const point = one.points.find((other) => other.x === x);
        if (!point) return h("td", { class: "num" }, "–");
        const text = format(one.measure, point.value);
        return h("td", { class: "num", title: point.note }, point.address ? h("a", { href: point.address }, text) : text, band(one, point) && h("span", { class: "soft" }, ` ${band(one, point)}`));
      }),
    ),
  );
  const head = h("tr", null, h("th", { scope: "col" }, axis.label), series.map((one) => h("th", { scope: "col", class: "num" }, one.label)));
  return asTable(id, caption, head, rows);
}

/** A closed box that holds a table. @param {string} id @param {string} caption @param {HTMLElement} head @param {HTMLElement[]} rows */
export function asTable(id, caption, head, rows) {
  const table = h("table", null, h("caption", null, caption), h("thead", null, head), h("tbody", null, rows));
  return h("details", { class: "twin", id }, h("summary", null, "As a table"), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table));
}
