// The similarity matrix: captions as rows, pictures as columns. Sends the event "remove".

const column = (item) =>
  make(
    "th",
    { scope: "col" },
    make(
      "div",
      { class: "al-column" },
      make("img", { src: item.image, alt: item.alt, title: item.alt }),
      item.remove
        ? make(
            "button",
            { type: "button", class: "al-remove", "data-id": item.id, "data-focus": item.id, "aria-label": item.remove, title: item.remove },
            "×",
          )
        : null,
    ),
  );

const cell = (item, labels) => {
  const marks = [];
  if (item.bestPicture) marks.push(labels.bestPicture);
  if (item.bestCaption) marks.push(labels.bestCaption);
  const [light, lightInk, dark, darkInk] = item.colours;
  return make(
    "td",
    {
      class: `al-cell${item.bestPicture ? " al-best-picture" : ""}${item.bestCaption ? " al-best-caption" : ""}`,
      style: { "--light": light, "--light-ink": lightInk, "--dark": dark, "--dark-ink": darkInk },
      title: marks.join(" · ") || null,
    },
    make("span", {}, item.text),
    marks.length ? hidden(`, ${marks.join(", ")}`) : null,
  );
};

const legend = (labels) =>
  make(
    "p",
    { class: "al-legend", "aria-hidden": "true" },
    make("span", {}, make("i", { class: "al-key al-best-picture" }), labels.bestPicture),
    make("span", {}, make("i", { class: "al-key al-best-caption" }), labels.bestCaption),
  );

const table = (value) =>
  make(
    "table",
    { class: "al-matrix" },
    make("caption", { class: "al-hidden" }, value.caption),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, hidden(value.labels.head)), ...value.columns.map(column))),
    make(
      "tbody",
      {},
      ...value.rows.map((row) =>
        make("tr", {}, make("th", { scope: "row" }, row.text), ...row.cells.map((item) => cell(item, value.labels))),
      ),
    ),
  );

keep((value) =>
  show(
    problem(value.error),
    value.columns?.length ? make("div", { class: "al-scroll", tabindex: "0", role: "region", "aria-label": value.caption }, table(value)) : null,
    value.rows?.length ? legend(value.labels) : null,
    value.note ? make("p", { class: "al-note" }, value.note) : null,
  ),
);

element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-id]");
  if (button) trigger("remove", { id: button.dataset.id });
});
