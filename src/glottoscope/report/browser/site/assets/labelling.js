// Labels of a feature: the form where the site is served, else what was said.
import { saveLabel } from "./data.js";
import { value } from "./shown.js";
import { visible } from "./text.js";
import { fail, fill, h, put } from "./ui.js";

/** @typedef {import("./shown.js").Shown} Shown */

/** @type {Promise<any>} */
let saving = Promise.resolve();

/** @param {any} label @param {Object<string, string>} names */
const labelWords = (label, names) =>
  label.granularity === null ? "no grade" : `${label.granularity} ${names[label.granularity] ?? ""}`.trim();

/** @param {Shown} now @param {any} known @param {{live: boolean, rater?: string}} session */
export function labelSection(now, known, session) {
  const section = h("section", { id: "labels", "aria-labelledby": "labels-title" }, h("h2", { id: "labels-title" }, "Label"));
  const ofThis = () => known.labels.filter((/** @type {any} */ label) => label.setup === now.setup.id && label.feature === now.f);
  const others = h("ul", { class: "labels" });
  const drawOthers = () => {
    const rows = now.blind ? [] : ofThis().filter((/** @type {any} */ label) => !session.live || label.rater !== session.rater);
    const granularity = now.blind ? null : value(now, "granularity");
    fill(
      others,
      granularity === null ? null : h("li", null, `The study's own label: ${granularity} ${known.names[granularity] ?? ""}`),
      rows.map((/** @type {any} */ label) =>
        h(
          "li",
          { "data-rater": label.rater },
          h("b", null, h("bdi", null, visible(label.rater))),
          `: ${labelWords(label, known.names)}${label.blind ? ", blind" : ""} `,
          h("span", { class: "soft small" }, String(label.time).slice(0, 10)),
          label.note ? h("p", { class: "note", dir: "auto" }, visible(label.note)) : null,
        ),
      ),
    );
    return rows.length + (granularity === null ? 0 : 1);
  };
  if (!session.live) {
    const n = drawOthers();
    put(
      section,
      others,
      n
        ? null
        : h(
            "p",
            { class: "soft" },
            now.blind
              ? "Labels are hidden while labelling blind."
              : [
                  "No label yet. ",
                  h("code", null, "glottoscope browse"),
                  " or ",
                  h("code", null, "glottoscope label"),
                  " on the run directory adds some.",
                ],
          ),
    );
    return section;
  }
  const own = () => ofThis().find((/** @type {any} */ label) => label.rater === session.rater);
  const status = h("p", { role: "status", class: "small", id: "label-status" });
  const note = h("textarea", { id: "note", rows: 3, maxlength: 10000, "aria-label": "Note", placeholder: "A note (n)" });
  note.value = own()?.note ?? "";
  const grades = ["1", "2", "3", "4"].map((grade) =>
    h(
      "button",
      {
        type: "button",
        class: "grade",
        "data-grade": grade,
        onclick: () => save(own()?.granularity === Number(grade) ? null : Number(grade)),
      },
      h("kbd", null, grade),
      ` ${known.names[grade] ?? ""}`,
    ),
  );
  const draw = () => {
    for (const button of grades) button.setAttribute("aria-pressed", String(own()?.granularity === Number(button.dataset.grade)));
    drawOthers();
  };
  const save = (/** @type {number|null} */ granularity) => {
    const label = { setup: now.setup.id, feature: now.f, granularity, note: note.value.trim(), blind: now.blind };
    fill(status, "Saving…");
    // One after the other, so that the last click is the last line of the file.
    saving = saving
      .then(() => saveLabel(label))
      .then(
        () => {
          fill(
            status,
            label.granularity === null && !label.note
              ? "Label withdrawn."
              : `Saved: ${labelWords(label, known.names)}${label.note ? ", with a note" : ""}.`,
          );
          draw();
        },
        (error) => {
          fill(status);
          fail(error, section);
        },
      );
    return saving;
  };
  note.addEventListener("change", () => {
    if (note.value.trim() !== (own()?.note ?? "")) save(own()?.granularity ?? null);
  });
  note.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Escape" || (event.key === "Enter" && (event.ctrlKey || event.metaKey))) note.blur();
  });
  draw();
  put(
    section,
    h(
      "form",
      { id: "label-form", onsubmit: (/** @type {Event} */ event) => event.preventDefault() },
      h("div", { role: "group", "aria-label": "Granularity", class: "grades" }, grades),
      note,
      h(
        "p",
        { class: "caption" },
        "Saved at once, as ",
        h("b", { id: "label-rater" }, visible(session.rater ?? "")),
        now.blind ? ", blind" : "",
        ". The chosen grade again takes it back; a note is saved when you leave the field.",
      ),
      status,
    ),
    others,
  );
  return section;
}
