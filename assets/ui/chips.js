// Examples to click: words or small pictures. Sends the event "pick".

keep((value) =>
  show(
    value.items?.length
      ? make(
          "div",
          { class: "al-chips", role: "group", "aria-label": value.label },
          make("span", { class: "al-chips-label", "aria-hidden": "true" }, value.label),
          ...value.items.map((item) =>
            make(
              "button",
              { type: "button", class: item.image ? "al-chip-picture" : "al-chip", "data-id": item.id, "data-focus": item.id },
              item.image ? make("img", { src: item.image, alt: item.text, title: item.text }) : item.text,
            ),
          ),
        )
      : null,
  ),
);

element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-id]");
  if (button) trigger("pick", { id: button.dataset.id });
});

// On a phone the row scrolls, and browsers leave what is half in sight where it is. Under a finger it has to stay.
element.addEventListener("focusin", ({ target }) => {
  if (target.matches(":focus-visible")) target.scrollIntoView({ block: "nearest", inline: "nearest" });
});
