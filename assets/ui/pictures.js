// Ranked pictures: a grid of cards with thumbnail, rank, verdict, bar, match probability, cosine and caption; under a
// card, folded, those that are nearly the same. Sends the events "why", "more", "less" and "remove".

const SIGNS = { more: "+", less: "−" };

const act = (name, item, labels) =>
  make(
    "button",
    {
      type: "button",
      "data-act": name,
      "data-id": item.id,
      "data-focus": `${name} ${item.id}`,
      "aria-label": `${labels[name]} · ${item.rankText}`,
      title: labels[name],
    },
    SIGNS[name] ? make("span", { "aria-hidden": "true" }, SIGNS[name]) : null,
    labels[`${name}.short`] || labels[name],
  );

const thumb = (item) => make("img", { src: item.image, alt: item.alt, title: item.text, loading: "lazy", decoding: "async" });

const card = (item, value) =>
  make(
    "li",
    { class: "al-card" },
    make(
      "div",
      { class: "al-thumb" },
      thumb(item),
      make("span", { class: "al-rank" }, hidden(item.rankText), make("span", { "aria-hidden": "true" }, String(item.rank))),
    ),
    make(
      "div",
      { class: "al-under" },
      judged(item),
      scores(item, value.labels),
      item.text ? make("p", { class: "al-text", lang: item.lang, dir: "auto" }, item.text) : null,
      item.credit ? make("p", { class: "al-credit", title: item.credit, lang: "en" }, item.credit) : null,
      alike(item, (same) => [thumb(same), scores(same, value.labels)]),
      make("div", { class: "al-acts" }, ...value.actions.map((name) => act(name, item, value.labels))),
    ),
  );

keep((value) =>
  show(
    value.heading ? heading(value) : null,
    problem(value.error),
    value.rows?.length ? answer(value, make("ol", { class: "al-grid" }, ...value.rows.map((item) => card(item, value)))) : null,
    value.note ? make("p", { class: "al-note" }, value.note) : null,
  ),
);

element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-act]");
  if (!button) return;
  const asked = { id: button.dataset.id };
  if (button.dataset.act === "why") trigger("why", asked);
  else if (button.dataset.act === "more") trigger("more", asked);
  else if (button.dataset.act === "remove") trigger("remove", asked);
  else trigger("less", asked);
});
