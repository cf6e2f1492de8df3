// The report on a data set, and what a zip must hold.

const fill = (template, values) => template.replace(/\{(\w+)\}/g, (_, name) => values[name]);

const cell = (item, head, labels) =>
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
    make("span", { class: "al-interval" }, fill(labels.chance, { value: item.random })),
  );

const table = ({ labels, ks, rows }) => {
  const heads = [...ks.map((k) => fill(labels.recall, { k })), labels.median];
  const row = ([direction, cells]) =>
    make("tr", {}, make("th", { scope: "row" }, labels[direction]), ...cells.map((item, column) => cell(item, heads[column], labels)));
  return make(
    "table",
    { class: "al-report" },
    make("caption", { class: "al-hidden" }, labels.table),
    make("thead", {}, make("tr", {}, make("td", {}), ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...Object.entries(rows).map(row)),
  );
};

// Names beside each other, none of which turns the next one round.
const apart = (names) => names.flatMap((name, place) => [place ? " · " : null, make("bdi", {}, name)]);

const leftOut = (value) =>
  make(
    "details",
    { class: "al-left-out" },
    make("summary", { "data-focus": "left" }, value.labels.left),
    make(
      "ul",
      {},
      ...value.leftOut.map((item) =>
        make("li", {}, item.reason, make("span", {}, ...apart([...item.names, item.more].filter(Boolean)))),
      ),
    ),
  );

const picture = (item, labels) =>
  make(
    "figure",
    {},
    make("img", { src: item.image, alt: item.alt, loading: "lazy", decoding: "async" }),
    make("figcaption", {}, make("span", {}, labels[item.label]), item.name ? make("bdi", { title: item.name }, item.name.split("/").pop()) : null),
  );

const example = (item, labels) =>
  make(
    "li",
    {},
    make("div", { class: "al-example-pictures" }, ...item.images.map((image) => picture(image, labels))),
    make(
      "div",
      { class: "al-example-words" },
      make("dl", {}, ...Object.entries(item.lines).map(([label, line]) => make("div", {}, make("dt", {}, labels[label]), make("dd", { dir: "auto" }, line)))),
      item.rank ? make("p", { class: "al-example-rank" }, fill(labels.rank, { rank: item.rank })) : null,
    ),
  );

const section = (title, note, ...nodes) =>
  make("section", { class: "al-section" }, make("h3", {}, title), make("p", { class: "al-note" }, note), ...nodes.flat());

const examples = (items, labels) => make("ul", { class: "al-report-examples" }, ...items.map((item) => example(item, labels)));

const worst = ({ labels, rows, worst }) => {
  const groups = Object.keys(rows)
    .map((direction) => [direction, worst.filter((item) => item.direction === direction)])
    .filter(([, items]) => items.length);
  const nodes = groups.map(([direction, items]) => [make("h4", {}, labels[direction]), examples(items, labels)]);
  return section(labels.worst, labels["worst.note"], ...nodes);
};

const suspects = ({ labels, suspects }) =>
  section(
    labels.suspects,
    suspects.length ? labels["suspects.note"] : labels["suspects.none"],
    ...(suspects.length ? [examples(suspects, labels)] : []),
  );

const guide = ({ labels, limits }) =>
  make(
    "section",
    { class: "al-zip-help" },
    make("h3", {}, labels.help),
    make("pre", { tabindex: "0", role: "img", "aria-label": labels.help }, labels.tree),
    make(
      "ul",
      {},
      make("li", {}, labels["form.table"]),
      make("li", {}, labels["form.lines"]),
      make("li", {}, labels["form.beside"]),
      make("li", {}, labels["form.published"]),
    ),
    make("p", { class: "al-note" }, limits),
  );

keep((value) =>
  show(
    value.limits ? guide(value) : null,
    value.heading ? heading(value) : null,
    value.intro ? make("p", { class: "al-note al-intro" }, value.intro) : null,
    value.rows ? make("div", { class: "al-report-frame" }, table(value)) : null,
    value.rows ? make("p", { class: "al-note" }, value.labels.meaning) : null,
    value.leftOut?.length ? leftOut(value) : null,
    value.worst?.length ? worst(value) : null,
    value.suspects ? suspects(value) : null,
    value.heading && value.note ? make("p", { class: "al-note" }, value.note) : null,
  ),
);
