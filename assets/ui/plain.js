// Words between the controls: a title with a line below it, or notes.

keep((value) => {
  if (value.lang) {
    document.documentElement.lang = value.lang;
    document.title = value.title;
  }
  show(
    value.title ? make("h1", {}, value.title) : null,
    value.line ? make("p", { class: "al-tagline" }, value.line) : null,
    ...(value.notes || []).map((note) => make("p", { class: "al-note" }, note)),
    value.link ? make("p", { class: "al-note" }, make("a", { href: value.link.href }, value.link.text)) : null,
  );
});

// Gradio describes the API behind a button of its own, which page.css hides; an address alone does not open it.
element.addEventListener("click", (event) => {
  const button = document.querySelector("footer .show-api");
  if (!button || !event.target.closest("a[href='?view=api']")) return;
  event.preventDefault();
  const stale = new URLSearchParams(location.search).get("view") === "api"; // after a reload Gradio takes it for open
  if (stale) button.click();
  button.click();
});
