// "Why this match": a dialog with the picture under its relevance, the caption in tinted words, and the cosine on a
// scale. A value with a new serial number opens it; one with the same only says it anew.

const title = make("h2", { id: "explanation-title" });
const close = make("button", { type: "button", class: "al-explain-close" }, make("span", { "aria-hidden": "true" }, "×"));
const status = make("p", { class: "al-hidden", role: "status" });
const body = make("div", { class: "al-explain-body" });
const slider = make("input", { type: "range", min: "0", max: "100", step: "5", value: "100", id: "explanation-slider" });
const dialog = make(
  "dialog",
  { class: "al-explain", "aria-labelledby": "explanation-title" },
  make("div", { class: "al-explain-page" }, make("div", { class: "al-explain-head" }, title, close), status, body),
);
let opened = 0;
let opener = null; // where the focus goes back to, also if it has been drawn anew

const percent = (share) => `${(share * 100).toFixed(1)}%`;

const picture = (value) =>
  make(
    "div",
    { class: "al-explain-photo" },
    make("img", { src: value.plain, alt: value.alt }),
    value.overlay ? make("img", { src: value.overlay, alt: "", class: "al-explain-overlay" }) : null,
  );

const blend = (labels) =>
  make(
    "div",
    { class: "al-explain-blend" },
    make("label", { for: "explanation-slider", class: "al-hidden" }, labels["places.slider"]),
    make("span", { "aria-hidden": "true" }, labels["places.plain"]),
    slider,
    make("span", { "aria-hidden": "true" }, labels["places.overlay"]),
  );

const section = (heading, ...nodes) => make("section", {}, make("h3", {}, heading), ...nodes);

const legend = (kind, words, style = {}) =>
  make(
    "p",
    { class: "al-explain-legend" },
    make("span", {}, words.low),
    make("i", { class: kind, "aria-hidden": "true", style }),
    make("span", {}, words.high),
  );

const places = (value) =>
  value.places
    ? [
        blend(value.labels),
        legend("al-heat-key", value.places, { "--stops": value.places.colours.join(", ") }),
        make("p", { class: "al-note" }, value.labels["places.note"]),
      ]
    : [];

// A line as long as what cosines of this model come to, with the band where unrelated pairs lie.
const axis = (scale) => {
  const left = (share) => ({ "--at": percent(share) });
  const [start, end] = scale.band;
  return make(
    "div",
    { class: "al-axis", "aria-hidden": "true" },
    make("span", { class: "al-axis-pair", style: left(scale.at) }, scale.pair),
    make(
      "div",
      { class: "al-axis-line" },
      make("i", { class: "al-axis-band", style: { left: percent(start), width: percent(end - start) } }),
      make("i", { class: "al-axis-mean", style: left(scale.mean) }),
      make("i", { class: "al-axis-mark", style: left(scale.at) }),
    ),
    make("span", { class: "al-axis-unrelated", style: left(scale.mean) }, scale.unrelated),
  );
};

const score = (value) =>
  section(
    value.labels.score,
    axis(value.score.axis),
    make("p", { class: "al-explain-verdict" }, value.score.verdict),
    make("p", { class: "al-note" }, value.labels["score.note"]),
  );

const term = (item) =>
  item.number === undefined
    ? make("span", { class: "al-weighed-gap" }, item.text)
    : make(
        "span",
        { class: `al-weighed al-weighed-${item.kind}`, style: { "--share": percent(item.share) } },
        make("span", {}, item.text),
        hidden(" "),
        make("small", {}, item.number),
      );

const words = (value) =>
  section(
    value.labels.words,
    make("p", { class: "al-explain-terms", lang: value.lang, dir: "auto" }, ...value.terms.map(term)),
    legend("al-weighed-key", value.words),
    make("p", { class: "al-note" }, value.labels["words.note"]),
  );

// What is shown while the answer is worked out stays where it is when that arrives.
const waiting = (value) =>
  make(
    "div",
    {},
    make("p", { class: "al-explain-caption", lang: value.lang, dir: "auto" }, value.caption),
    make("progress", { "aria-hidden": "true" }),
    make("p", { class: "al-note", "aria-hidden": "true" }, value.labels.busy),
  );

const columns = (value) =>
  make(
    "div",
    { class: "al-explain-columns" },
    section(value.labels.places, picture(value), ...places(value)),
    value.score ? make("div", {}, score(value), words(value)) : value.busy ? waiting(value) : null,
  );

const fill = (value) => {
  const focused = document.activeElement === slider;
  title.textContent = value.labels.title;
  close.setAttribute("aria-label", value.labels.close);
  close.title = value.labels.close;
  status.textContent = value.busy ? value.labels.busy : value.score?.said || "";
  const parts = [problem(value.error), value.plain ? columns(value) : null, value.score ? make("p", { class: "al-note" }, value.labels.fixed) : null];
  body.replaceChildren(...parts.filter(Boolean));
  if (focused) slider.focus();
};

const blended = () => dialog.style.setProperty("--blend", slider.value / 100);

const open = (serial) => {
  opened = serial;
  if (dialog.open) return;
  const button = document.activeElement;
  opener = [button, button?.dataset.focus, button?.closest("[id]")?.id];
  slider.value = 100;
  blended();
  dialog.showModal();
  dialog.scrollTop = 0;
};

element.querySelector(".al-root").append(dialog);
keep((value) => {
  if (value.serial < opened) return; // a late answer to an earlier question
  fill(value);
  if (value.serial > opened) open(value.serial);
});

slider.addEventListener("input", blended);
close.addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog.addEventListener("close", () => {
  const [button, name, id] = opener;
  const again = [...(document.getElementById(id)?.querySelectorAll("[data-focus]") || [])].find((node) => node.dataset.focus === name);
  (button?.isConnected ? button : again)?.focus();
});
