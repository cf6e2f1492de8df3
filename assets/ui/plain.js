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
