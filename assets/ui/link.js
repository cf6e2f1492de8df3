// Copies a link to what is on the page: the open tab, what was asked there, the language.

const asked = (key) => {
  const box = document.querySelector(`#${key}-query textarea, #${key}-query input, #${key}-captions textarea`);
  return box ? box.value.trim() : document.querySelector(`#${key}-results [data-link]`)?.dataset.link || "";
};

const address = () => {
  const inSight = (key) => [...document.querySelectorAll(`[id^="${key}-"]`)].some((node) => node.offsetParent);
  const key = current().tabs.find(inSight);
  const query = new URLSearchParams({ tab: key });
  if (asked(key)) query.set("q", asked(key));
  query.set("lang", current().lang);
  return `${location.origin}${location.pathname}?${query}`;
};

let copied = ""; // the link just copied, or to be copied by hand
let byHand = false;
let timer = 0;

const render = () => {
  const { labels } = current();
  const done = copied && !byHand;
  show(
    make(
      "button",
      { type: "button", class: `al-link${done ? " al-done" : ""}`, title: labels.copy, "data-focus": "link" },
      make("span", {}, done ? labels.copied : labels.copy),
    ),
    make("span", { class: "al-hidden", role: "status" }, done ? labels.copied : ""),
    copied && byHand ? make("input", { class: "al-link-text", type: "text", readonly: true, value: copied, "aria-label": labels.by_hand }) : null,
  );
};

render();
watch("value", render);

element.addEventListener("click", async (event) => {
  if (!event.target.closest("button.al-link")) return;
  copied = address();
  try {
    await navigator.clipboard.writeText(copied);
    byHand = false;
  } catch {
    byHand = true; // no leave, or no https
  }
  render();
  if (byHand) element.querySelector("input").select();
  clearTimeout(timer);
  timer = setTimeout(() => {
    if (byHand) return;
    copied = "";
    render();
  }, 2500);
});
