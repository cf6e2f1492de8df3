// Ranked captions: rank, caption, bar, match probability, cosine.

const row = (item, labels) =>
  make(
    "li",
    { class: "al-caption" },
    make("span", { class: "al-rank" }, hidden(item.rankText), make("span", { "aria-hidden": "true" }, String(item.rank))),
    make("div", { class: "al-words" }, make("p", { lang: item.lang }, item.text), bar(item.bar)),
    scores(item, labels),
  );

keep((value) =>
  show(
    value.heading ? heading(value) : null,
    problem(value.error),
    value.rows?.length ? make("ol", { class: "al-captions" }, ...value.rows.map((item) => row(item, value.labels))) : null,
    value.note ? make("p", { class: "al-note" }, value.note) : null,
  ),
);
