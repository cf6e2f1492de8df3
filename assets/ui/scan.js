// How far the scan of a folder is, and the button for the next one. Sends "rescan", and "renew" when the server searches
// another gallery than the page shows.

const EVERY = 1000; // milliseconds between two looks while a scan goes on
const PATIENCE = 8000; // milliseconds after which the page is asked again to show the new gallery
let value = {};
let renewed = { version: -1, at: 0 };
let timer = null;

const skipped = () =>
  make(
    "details",
    { class: "al-scan-skipped" },
    make("summary", { "data-focus": "skipped" }, value.skippedTitle),
    make("ul", {}, ...value.skipped.map(([name, reason]) => make("li", {}, make("strong", {}, make("bdi", {}, name)), ` ${reason}`))),
  );

const draw = () => {
  const open = element.querySelector("details")?.open;
  show(
    make(
      "div",
      { class: "al-scan" },
      make("div", { class: "al-scan-words" }, make("p", { role: "status" }, value.text), make("p", { class: "al-note" }, value.more)),
      value.button && make("button", { type: "button", class: "al-plain-button", "data-act": "rescan", "data-focus": "rescan", disabled: value.running }, value.button),
    ),
    value.running ? make("progress", { max: value.total || null, value: value.total ? value.done : null, "aria-label": value.text }) : null,
    value.skipped.length ? skipped() : null,
  );
  if (open) element.querySelector("details")?.setAttribute("open", "");
};

const tick = () => {
  const words = element.querySelectorAll(".al-scan-words p");
  const bar = element.querySelector("progress");
  if (!bar || !value.total) return draw();
  [words[0].textContent, words[1].textContent] = [value.text, value.more];
  bar.max = value.total;
  bar.value = value.done;
  bar.setAttribute("aria-label", value.text);
};

const look = async () => {
  clearTimeout(timer);
  try {
    const answer = await fetch(`${current().url}?lang=${current().lang}`);
    if (answer.ok) {
      const before = value;
      value = await answer.json();
      if (value.running && before.running && before.lang === value.lang) tick();
      else draw();
      const stale = value.version !== current().version;
      if (stale && (renewed.version !== value.version || Date.now() - renewed.at > PATIENCE)) {
        renewed = { version: value.version, at: Date.now() };
        trigger("renew", { lang: value.lang });
      }
    }
  } catch {
    // the server is not there just now
  }
  if (value.running || value.version !== current().version) timer = setTimeout(look, EVERY);
};

keep((now) => {
  if (!now.text) return;
  value = now;
  draw();
  if (now.ready) look();
});

element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act=rescan]");
  if (!button) return;
  button.disabled = true;
  trigger("rescan");
});

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && current().ready) look();
});
