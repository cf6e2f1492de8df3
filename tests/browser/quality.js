// What tests/browser/test_quality.py asks of a page: what it says, where Tab should stop, and how the focus looks.
window.quality = (() => {
  const seen = (node) => node.checkVisibility({ visibilityProperty: true });

  // Every text, label and title that can be seen or heard, but what is marked as English.
  const said = () => {
    const found = [];
    const note = (kind, words) => words?.trim() && found.push([kind, words.trim().replace(/\s+/g, " ")]);
    for (const node of document.body.querySelectorAll("*")) {
      if (!seen(node) || node.closest("body [lang=en], #language, script, style")) continue;
      for (const name of ["aria-label", "aria-description", "aria-valuetext", "title", "alt", "placeholder"])
        note(name, node.getAttribute(name));
      for (const child of node.childNodes) if (child.nodeType === Node.TEXT_NODE) note("text", child.data);
    }
    return found;
  };

  // One of a group of radio buttons is a stop, and what hands its place on to another (tabindex -1) is none.
  const stops = () => {
    const kinds = "a[href], button, input, textarea, select, summary, [tabindex], [contenteditable=true]";
    const found = [...document.querySelectorAll(kinds)].filter(
      (node) => node.tabIndex >= 0 && !node.disabled && !node.closest("[inert]") && seen(node) && (node.type !== "radio" || node.checked),
    );
    return found.map((node, place) => {
      node.dataset.stop = place;
      const name = node.ariaLabel || node.innerText || node.placeholder || "";
      return `${node.tagName.toLowerCase()}#${node.id}.${node.className} ${name.slice(0, 40)}`;
    });
  };

  // How an element and what lies around it are framed.
  const frame = (node) =>
    [node, node.nextElementSibling, node.closest("label"), node.parentElement, node.parentElement?.parentElement]
      .filter(Boolean)
      .map((one) => {
        const style = getComputedStyle(one);
        const outline = style.outlineStyle === "none" || parseFloat(style.outlineWidth) === 0 ? "" : style.outline;
        return [outline, style.boxShadow, style.borderColor, style.borderWidth].join(" ");
      })
      .join("\n");

  // Whether the outline lies outside of what cuts it off.
  const cut = (node) => {
    const style = getComputedStyle(node);
    const out = style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth) + parseFloat(style.outlineOffset);
    const { left, top, right, bottom } = node.getBoundingClientRect();
    for (let around = node.parentElement; around && around !== document.body; around = around.parentElement) {
      if (getComputedStyle(around).overflow === "visible") continue;
      const frame = around.getBoundingClientRect();
      const over = Math.max(frame.left - left, frame.top - top, right - frame.right, bottom - frame.bottom) + out;
      if (out > 0 && over > 1) return true;
    }
    return false;
  };

  // After Tab was pressed: the stop that has the focus now, and the one that had it if it looks as it did then
  // or its outline was cut off.
  let before = null;
  const step = async () => {
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))); // it scrolls into view
    const unseen = before?.node.isConnected && (before.cut || frame(before.node) === before.frame);
    const bare = unseen ? before.node.dataset.stop : null;
    const node = document.activeElement;
    before = node === document.body ? null : { node, frame: frame(node), cut: cut(node) };
    return [before && (node.dataset.stop ?? "?"), bare];
  };

  // From the top of the page, as if it had just been opened.
  const start = () => {
    before = null;
    document.body.tabIndex = -1;
    document.body.focus();
    document.body.removeAttribute("tabindex");
  };

  return { said, stops, step, start };
})();
