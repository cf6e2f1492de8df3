// Shared by the scripts of this folder; each is put behind this one and run by Gradio once per component, with
// `element`, `props`, `trigger`, `upload` and `watch` in scope. Text only ever enters the page as text nodes.

const make = (tag, options = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "style") for (const [key, setting] of Object.entries(value)) node.style.setProperty(key, setting);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
};

const hidden = (text) => make("span", { class: "al-hidden" }, text);

// Replace what is shown, and put the keyboard focus back where it was.
const show = (...nodes) => {
  const root = element.querySelector(".al-root");
  const focused = root.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
  root.replaceChildren(...nodes.filter(Boolean));
  if (focused) [...root.querySelectorAll("[data-focus]")].find((node) => node.dataset.focus === focused)?.focus();
};

const problem = (text) => (text ? make("p", { class: "al-problem", role: "alert" }, text) : null);

const bar = (share) =>
  make("span", { class: "al-bar", "aria-hidden": "true" }, make("span", { style: { width: `${(share * 100).toFixed(1)}%` } }));

const scores = (row, labels) =>
  make(
    "dl",
    { class: "al-scores" },
    row.probability ? make("div", { class: "al-match" }, make("dt", {}, labels.match), make("dd", {}, row.probability)) : null,
    make("div", {}, make("dt", {}, labels.cosine), make("dd", {}, row.cosine)),
  );

// What can be done with a result; each sends the event of its name with the result's id.
const actions = (row, labels, names) =>
  make(
    "div",
    { class: "al-result-actions" },
    ...names.map((name) =>
      make(
        "button",
        { type: "button", "data-act": name, "data-id": row.id, "data-focus": `${name} ${row.id}`, "aria-label": `${labels[name]} ${row.rankText}` },
        labels[name],
      ),
    ),
  );

// The word for a verdict, in a colour and a shape of its own; see page.css.
const badge = (verdict) => (verdict.word ? make("span", { class: "al-step", "data-step": verdict.step }, verdict.word) : null);

const judged = (item) => make("div", { class: "al-judged" }, badge(item), bar(item.bar));

// Results that are nearly the same as the one they are folded under.
const alike = (item, draw) =>
  item.alike?.length
    ? make(
        "details",
        { class: "al-alike" },
        make("summary", { "data-focus": `alike ${item.id}` }, item.alikeText),
        make("ul", {}, ...item.alike.map((same) => make("li", {}, ...draw(same)))),
      )
    : null;

// What to think of the whole answer, and then the results: grey where nothing is close, folded away where the query has
// no meaning.
const answer = ({ verdict }, list) => {
  if (!verdict) return list;
  const words = make("p", { class: "al-answer", role: "status" }, badge(verdict), make("span", {}, verdict.text));
  if (verdict.anyway) {
    const folded = make("details", {}, make("summary", { "data-focus": "anyway" }, verdict.anyway), list);
    return make("div", { class: "al-verdict" }, words, folded);
  }
  return make("div", { class: verdict.step === "nothing_close" ? "al-far" : null }, words, list);
};

const heading = (value) =>
  make(
    "div",
    { class: "al-heading" },
    make("h2", {}, value.heading),
    value.count ? make("p", { "aria-live": "polite" }, value.count) : null,
  );

// What the element shows; see `as_json` in alignment/ui/widgets.py.
const current = () => JSON.parse(props.value?.json || "{}");

const keep = (render) => {
  render(current());
  watch("value", () => render(current()));
};
