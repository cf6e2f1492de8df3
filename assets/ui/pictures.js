// Ranked pictures: a grid of cards with thumbnail, rank, bar, match probability, cosine and caption.
// Sends the events "why", "more" and "less".

const card = (item, labels) =>
  make(
    "li",
    { class: "al-card" },
    make(
      "div",
      { class: "al-thumb" },
      make("img", { src: item.image, alt: item.alt, loading: "lazy", decoding: "async" }),
      make("span", { class: "al-rank" }, hidden(item.rankText), make("span", { "aria-hidden": "true" }, String(item.rank))),
    ),
    make(
      "div",
      { class: "al-under" },
      bar(item.bar),
      scores(item, labels),
      item.text ? make("p", { class: "al-text", lang: item.lang }, item.text) : null,
      item.credit ? make("p", { class: "al-credit", title: item.credit, lang: "en" }, item.credit) : null,
      actions(item, labels, ["why", "more", "less"]),
    ),
  );

keep((value) =>
  show(
    value.heading ? heading(value) : null,
    problem(value.error),
    value.cards?.length ? folded(value, make("ol", { class: "al-grid" }, ...value.cards.map((item) => card(item, value.labels)))) : null,
    value.note ? make("p", { class: "al-note" }, value.note) : null,
  ),
);

element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-act]");
  if (!button) return;
  const asked = { id: button.dataset.id };
  if (button.dataset.act === "why") trigger("why", asked);
  else if (button.dataset.act === "more") trigger("more", asked);
  else trigger("less", asked);
});
