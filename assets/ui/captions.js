// Ranked captions: rank, caption, verdict, bar, match probability, cosine; under a caption, folded, those that say the
// same. Sends the event "why".

const words = (item) => make("p", { lang: item.lang, dir: "auto" }, item.text);

const row = (item, labels) =>
  make(
    "li",
    { class: "al-caption" },
    make("span", { class: "al-rank" }, hidden(item.rankText), make("span", { "aria-hidden": "true" }, String(item.rank))),
    make("div", { class: "al-words" }, words(item), judged(item), alike(item, (same) => [words(same), scores(same, labels)])),
    make("div", { class: "al-numbers" }, scores(item, labels), actions(item, labels, ["why"])),
  );

keep((value) => {
  element.querySelector(".al-root").dataset.link = value.link || ""; // for link.js
  show(
    value.heading ? heading(value) : null,
    problem(value.error),
    value.rows?.length ? answer(value, make("ol", { class: "al-captions" }, ...value.rows.map((item) => row(item, value.labels)))) : null,
    value.note ? make("p", { class: "al-note" }, value.note) : null,
  );
});

element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-act=why]");
  if (button) trigger("why", { id: button.dataset.id });
});
