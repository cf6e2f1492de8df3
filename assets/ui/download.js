// A button for a file to take home. Sends "wanted"; `courier.js` brings the file.

// One for good: a click gets lost when its button is drawn anew half-way.
const button = make("button", { type: "button", class: "al-button" });
const trouble = make("div");

show(button, trouble);
keep((value) => {
  button.textContent = value.label || "";
  button.disabled = Boolean(value.disabled);
  trouble.replaceChildren(...[problem(value.error)].filter(Boolean));
});

button.addEventListener("click", () => {
  button.disabled = true; // until there is an answer
  trigger("wanted", {});
});
