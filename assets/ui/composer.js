// How a query was read: its terms as chips, or the short help. Sends the events "edit" and "pick".

const step = (label, index, act, sign, disabled) =>
  make(
    "button",
    { type: "button", "data-act": act, "data-index": index, "data-focus": `${act} ${index}`, "aria-label": label, title: label, disabled },
    make("span", { "aria-hidden": "true" }, sign),
  );

const chip = (term, index, labels) => {
  const name = (label) => label.replace("{name}", () => term.name);
  return make(
    "li",
    { class: `al-part${term.wanted ? "" : " al-minus"}` },
    hidden(`${term.says} ${term.weight}`),
    step(name(term.wanted ? labels["term.avoid"] : labels["term.want"]), index, "flip", term.wanted ? "+" : "−"),
    make(
      "span",
      { class: "al-part-name", "aria-hidden": "true" },
      term.image ? make("img", { src: term.image, alt: "", title: term.name }) : make("span", { title: term.name, dir: "auto" }, term.name),
    ),
    make(
      "span",
      { class: "al-weight" },
      step(name(labels["term.less"]), index, "less", "‹", term.least),
      make("span", { "aria-hidden": "true" }, term.weight),
      step(name(labels["term.more"]), index, "more", "›", term.most),
    ),
    step(name(labels["term.remove"]), index, "remove", "×"),
  );
};

const example = (query, says) =>
  make(
    "li",
    {},
    make("button", { type: "button", class: "al-chip", "data-query": query, "data-focus": query }, query),
    make("span", {}, says),
  );

const guide = ({ help, labels }) =>
  make(
    "details",
    { class: "al-guide", open: element.querySelector("details")?.open },
    make("summary", { "data-focus": "help" }, help),
    make(
      "ul",
      {},
      example(labels["help.both.query"], labels["help.both"]),
      example(labels["help.without.query"], labels["help.without"]),
      example(labels["help.weight.query"], labels["help.weight"]),
    ),
    make("p", { class: "al-note" }, labels["help.picture"]),
    make("p", { class: "al-note" }, labels["help.literal"]),
  );

keep((value) =>
  show(
    value.help ? guide(value) : null,
    value.terms?.length ? make("ul", { class: "al-parts", "aria-label": value.labels.terms }, ...value.terms.map((term, index) => chip(term, index, value.labels))) : null,
  ),
);

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.query) trigger("pick", { id: button.dataset.query });
  else if (button?.dataset.act) {
    const index = Number(button.dataset.index);
    const { text, picture } = current().terms[index];
    trigger("edit", { act: button.dataset.act, index, text, picture });
  }
});

// A picture may be dropped anywhere on the tab: it is handed to the place for files there.
const panel = element.closest('[role="tabpanel"]');
const place = () => panel.querySelector(".al-compose .al-drop");
const brings = (event) => !event.defaultPrevented && [...(event.dataTransfer?.types || [])].includes("Files");
if (panel && !panel.dataset.drops) {
  panel.dataset.drops = "here"; // once, though two of these elements are on the tab
  panel.addEventListener("dragover", (event) => {
    if (!brings(event)) return;
    event.preventDefault();
    place()?.classList.add("al-over");
  });
  panel.addEventListener("dragleave", (event) => {
    if (!panel.contains(event.relatedTarget)) place()?.classList.remove("al-over");
  });
  panel.addEventListener("drop", (event) => {
    if (!brings(event)) return;
    event.preventDefault();
    place()?.classList.remove("al-over");
    const input = place()?.querySelector("input");
    if (!input || !event.dataTransfer.files.length) return;
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change"));
  });
}

// The Enter that takes over what an input method has composed is not meant for the search, in any box of the page.
if (!document.documentElement.dataset.composing) {
  document.documentElement.dataset.composing = "guarded";
  for (const kind of ["keydown", "keypress"])
    document.addEventListener(
      kind,
      (event) => event.key === "Enter" && (event.isComposing || event.keyCode === 229) && event.stopPropagation(),
      true,
    );
}
