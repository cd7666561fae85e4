// Active positions of a feature by strength: one row of bars a language, over a logarithmic axis.
import { classLook, format, h, languageName, svg } from "./ui.js";

const WIDTH = 400;
const ROW = 62;
const TOP = 16;
const LEFT = 6;

/** Where a value lies on the axis; the bins are half octaves, linear within each. @param {number} value @param {number[]} edges @param {number} left @param {number} width */
function placeOf(value, edges, left, width) {
  const bin = edges.findIndex((edge, i) => i + 1 < edges.length && value >= edge && value < edges[i + 1]);
  return bin < 0 ? null : left + width * (bin + (value - edges[bin]) / (edges[bin + 1] - edges[bin]));
}

/**
 * @param {{edges: number[], [language: string]: number[]}} counts edges: one more than bins
 * @param {import("./data.js").Site} index @param {number|null} max the feature's maximum
 * @returns {HTMLElement}
 */
export function histogram(counts, index, max) {
  const { edges } = counts;
  const n = edges.length - 1;
  const rows = index.languages.map((language) => ({
    language,
    bars: counts[language] ?? [],
    total: (counts[language] ?? []).reduce((sum, count) => sum + count, 0),
  }));
  const most = Math.max(1, ...rows.flatMap(({ bars }) => bars));
  const width = (WIDTH - 2 * LEFT) / n;
  const height = rows.length * ROW + 22;
  const threshold = index.thresholds.activation && max ? index.thresholds.activation * max : null;
  const at = threshold === null ? null : placeOf(threshold, edges, LEFT, width);
  const every = Math.max(1, Math.ceil(n / 6));
  const words = rows.map(({ language, total }) => `${languageName(language)} ${total.toLocaleString("en")}`).join(", ");
  const picture = svg(
    "svg",
    {
      viewBox: `0 0 ${WIDTH} ${height}`,
      class: "histogram",
      role: "img",
      "aria-label": `Active positions by activation: ${words}. The table below has the numbers.`,
    },
    rows.map(({ language, bars, total }, row) => {
      const base = (row + 1) * ROW;
      return svg(
        "g",
        { class: classLook(language).css },
        svg(
          "text",
          { x: LEFT, y: base - ROW + 12, class: "name" },
          `${classLook(language).shape} ${languageName(language)}: ${total.toLocaleString("en")} active positions`,
        ),
        bars.map((count, i) =>
          svg(
            "rect",
            {
              x: LEFT + i * width + 0.6,
              y: base - ((ROW - TOP - 4) * count) / most,
              width: Math.max(0.5, width - 1.2),
              height: ((ROW - TOP - 4) * count) / most,
            },
            svg(
              "title",
              null,
              `${languageName(language)}: ${count.toLocaleString("en")} positions from ${format("", edges[i])} to ${edges[i + 1]}`,
            ),
          ),
        ),
        svg("line", { x1: LEFT, x2: WIDTH - LEFT, y1: base, y2: base, class: "axis" }),
      );
    }),
    at === null ? null : [svg("line", { x1: at, x2: at, y1: TOP, y2: rows.length * ROW, class: "threshold" })],
    edges.map((edge, i) =>
      i % every
        ? null
        : svg(
            "text",
            {
              x: LEFT + i * width,
              y: rows.length * ROW + 14,
              class: "tick",
              "text-anchor": i === 0 ? "start" : i === n ? "end" : "middle",
            },
            Number(edge.toPrecision(2)).toString(),
          ),
    ),
  );
  return h(
    "figure",
    { class: "plain" },
    picture,
    h(
      "figcaption",
      null,
      "Positions of the test text at which the feature is active, by activation (each bin is half an octave).",
      at === null
        ? ""
        : ` Dashed: ${Math.round(100 * index.thresholds.activation)} % of the maximum, above which positions are counted.`,
    ),
    h(
      "details",
      { class: "small" },
      h("summary", null, "Numbers"),
      h(
        "table",
        null,
        h(
          "thead",
          null,
          h(
            "tr",
            null,
            h("th", { scope: "col", class: "num" }, "Activation from"),
            rows.map(({ language }) => h("th", { scope: "col", class: "num" }, languageName(language))),
          ),
        ),
        h(
          "tbody",
          null,
          Array.from({ length: n }, (_, i) =>
            h(
              "tr",
              null,
              h("th", { scope: "row", class: "num" }, String(edges[i])),
              rows.map(({ bars }) => h("td", { class: "num" }, (bars[i] ?? 0).toLocaleString("en"))),
            ),
          ),
        ),
      ),
    ),
  );
}
