// The report on a data set, and what a zip must hold.

const cell = (item, head) =>
  make(
    "td",
    { "data-head": head },
    make("span", { class: "al-figure" }, item.value),
    make("span", { class: "al-interval" }, item.interval),
    item.share === undefined
      ? null
      : make(
          "span",
          { class: "al-bar al-against-chance", "aria-hidden": "true" },
          make("span", { style: { width: `${(item.share * 100).toFixed(1)}%` } }),
          make("i", { style: { left: `${(item.chance * 100).toFixed(1)}%` } }),
        ),
    make("span", { class: "al-interval" }, item.chanceText),
  );

const table = (value) =>
  make(
    "table",
    { class: "al-report" },
    make("caption", { class: "al-hidden" }, value.caption),
    make(
      "thead",
      {},
      make("tr", {}, make("td", {}), ...value.heads.map((head) => make("th", { scope: "col" }, head))),
    ),
    make(
      "tbody",
      {},
      ...value.rows.map((row) => make("tr", {}, make("th", { scope: "row" }, row.title), ...row.cells.map((item, column) => cell(item, value.heads[column])))),
    ),
  );

// Names beside each other, none of which turns the next one round.
const apart = (names) => names.flatMap((name, place) => [place ? " · " : null, make("bdi", {}, name)]);

const leftOut = (value) =>
  make(
    "details",
    { class: "al-left-out" },
    make("summary", { "data-focus": "left" }, value.title),
    make(
      "ul",
      {},
      ...value.items.map((item) =>
        make("li", {}, item.reason, make("span", {}, ...apart([...item.names, item.more].filter(Boolean)))),
      ),
    ),
  );

const picture = (item) =>
  make(
    "figure",
    {},
    make("img", { src: item.image, alt: item.alt, loading: "lazy", decoding: "async" }),
    make("figcaption", {}, make("span", {}, item.label), item.name ? make("bdi", { title: item.name }, item.name.split("/").pop()) : null),
  );

const example = (item) =>
  make(
    "li",
    {},
    make("div", { class: "al-example-pictures" }, ...item.images.map(picture)),
    make(
      "div",
      { class: "al-example-words" },
      make("dl", {}, ...item.lines.map((line) => make("div", {}, make("dt", {}, line.label), make("dd", { dir: "auto" }, line.text)))),
      item.rank ? make("p", { class: "al-example-rank" }, item.rank) : null,
    ),
  );

const section = (value) =>
  make(
    "section",
    { class: "al-section" },
    make("h3", {}, value.title),
    make("p", { class: "al-note" }, value.note),
    ...value.groups
      .filter((group) => group.items.length)
      .flatMap((group) => [
        group.title ? make("h4", {}, group.title) : null,
        make("ul", { class: "al-report-examples" }, ...group.items.map(example)),
      ])
      .filter(Boolean),
  );

const guide = (value) =>
  make(
    "section",
    { class: "al-zip-help" },
    make("h3", {}, value.help),
    make("pre", { tabindex: "0", role: "img", "aria-label": value.help }, value.tree),
    make("ul", {}, ...value.forms.map((form) => make("li", {}, form))),
    make("p", { class: "al-note" }, value.note),
  );

keep((value) =>
  show(
    value.help ? guide(value) : null,
    value.heading ? heading(value) : null,
    value.intro ? make("p", { class: "al-note al-intro" }, value.intro) : null,
    value.table ? make("div", { class: "al-report-frame" }, table(value.table)) : null,
    value.meaning ? make("p", { class: "al-note" }, value.meaning) : null,
    value.leftOut ? leftOut(value.leftOut) : null,
    value.worst?.groups.length ? section(value.worst) : null,
    value.suspects ? section(value.suspects) : null,
    value.heading && value.note ? make("p", { class: "al-note" }, value.note) : null,
  ),
);
