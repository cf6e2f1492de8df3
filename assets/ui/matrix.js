// The similarity matrix: captions as rows, pictures as columns; with two models three tables beside each other.
// The page gives the cosines once; views, temperature, pairs and order are made here. Sends "remove" and "why".

const state = { view: "cosine", show: "all", pairing: "", heat: 0, sorted: false, at: { panel: 0, row: 0, column: 0 } };
const STEPS = 4; // the slider halves or doubles the temperature so many times
let value = {}; // what the page gave
let drawn = null; // what stands there: panels, order, pairs, and the nodes that change without being made anew

const fill = (words, numbers) => words.replace(/\{(\w+)\}/g, (all, name) => numbers[name] ?? all);
const unsigned = (words) => words.replace(/^[-+](0(\.0+)?)$/, "$1"); // no sign in front of nothing
const signed = (number, places) => unsigned(`${number > 0 ? "+" : ""}${number.toFixed(places)}`);
const significant = (number) => String(Number(number.toPrecision(3)));

const WRITE = {
  cosine: (number, short) => unsigned(number.toFixed(short ? 2 : 3)),
  share: (number, short) => {
    if (short) return String(Math.round(number * 100));
    if (number > 0 && number < 0.001) return "<0.1 %";
    return number < 1 && number > 0.999 ? ">99.9 %" : `${(number * 100).toFixed(1)} %`;
  },
  cosineChange: (number, short) => signed(number, short ? 2 : 3),
  shareChange: (number, short) => signed(number * 100, short ? 0 : 1),
};

// ---------------------------------------------------------------- what is shown

const heat = () => 2 ** state.heat;
const pairing = () => state.pairing || value.pairing;

const panels = () => {
  const shares = state.view !== "cosine";
  const write = shares ? WRITE.share : WRITE.cosine;
  const ones = value.models.map((model, place) => ({
    kind: place ? "after" : "before",
    model,
    values: VIEWS[state.view](model, heat()),
    limits: shares ? [0, 1] : model.limits,
    colours: "heat",
    write,
  }));
  if (ones.length === 1) return ones;
  const reach = shares ? 0.5 : value.reach;
  const values = each(ones[1].values, (number, i, j) => number - ones[0].values[i][j]);
  const change = { kind: "difference", values, limits: [-reach, reach], colours: "difference", write: shares ? WRITE.shareChange : WRITE.cosineChange };
  return [...ones, change].filter((panel) => state.show === "all" || panel.kind === state.show);
};

const titleOf = (panel) => {
  if (value.models.length === 1) return "";
  return panel.model ? `${value.labels[panel.kind]}: ${panel.model.name}` : value.labels.difference;
};

const ink = (colour) => {
  const [red, green, blue] = [1, 3, 5].map((at) => (parseInt(colour.slice(at, at + 2), 16) / 255) ** 2.2);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 ? "#000000" : "#ffffff"; // whichever contrasts more
};

// From negative to positive by way of the page's own colour: orange and violet, which colour-blind readers tell apart.
const DIFFERENCE = {
  light: ["#8f3f00", "#e5a063", "#f4f3f1", "#a7a1ea", "#3d33b4"],
  dark: ["#ffc48a", "#a3642e", "#26262d", "#5c57b3", "#c8c5ff"],
};

// 256 colours from a few, by linear interpolation.
const between = (stops) =>
  Array.from({ length: 256 }, (_, n) => {
    const at = (n / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const part = (colour, k) => parseInt(colour.slice(1 + 2 * k, 3 + 2 * k), 16);
    const mixed = [0, 1, 2].map((k) => part(stops[low], k) + (part(stops[low + 1], k) - part(stops[low], k)) * (at - low));
    return `#${mixed.map((number) => Math.round(number).toString(16).padStart(2, "0")).join("")}`;
  });

const differences = Object.fromEntries(Object.entries(DIFFERENCE).map(([name, stops]) => [name, between(stops)]));
const coloursOf = (panel) => (panel.colours === "difference" ? differences : value.colours);

// A style for each of the 256 colours, for a light and for a dark page.
const styles = (colours) =>
  colours.light.map((light, n) => `--light:${light};--light-ink:${ink(light)};--dark:${colours.dark[n]};--dark-ink:${ink(colours.dark[n])}`);

const shade = (number, [low, high]) => Math.round(255 * Math.min(Math.max(high > low ? (number - low) / (high - low) : 0.5, 0), 1));

const marksOf = (panel, row, column) => ({
  picture: Boolean(panel.model) && panel.model.bestPictures[row] === column,
  caption: Boolean(panel.model) && panel.model.bestCaptions[column] === row,
  pair: drawn.own[row][column],
});

// ---------------------------------------------------------------- controls

const choice = (name, label, options, chosen) =>
  make(
    "fieldset",
    { class: "al-choice" },
    make("legend", {}, label),
    make(
      "div",
      {},
      ...options.map(([key, words]) =>
        make(
          "label",
          {},
          make("input", { type: "radio", name: `${element.id || "matrix"}-${name}`, value: key, checked: key === chosen, "data-set": name, "data-focus": `${name} ${key}` }),
          make("span", {}, words),
        ),
      ),
    ),
  );

const tool = (name, words) => make("button", { type: "button", class: "al-tool", "data-tool": name, "data-focus": name }, words);

const labelled = (names) => names.map((name) => [name, value.labels[name]]);

const temperature = () => {
  const { labels } = value;
  drawn.heat = make("output", { class: "al-heat-now" });
  drawn.slider = make("input", { type: "range", min: -STEPS, max: STEPS, step: 0.05, value: state.heat, "aria-label": labels.temperature, "data-focus": "heat" });
  drawn.own_heat = make("button", { type: "button", class: "al-tool", "data-tool": "own", "data-focus": "own" }, labels.own);
  return make(
    "div",
    { class: "al-heat" },
    make("p", {}, labels.temperature, " ", drawn.heat),
    make("div", {}, drawn.slider, drawn.own_heat),
  );
};

const sayTemperature = () => {
  const own = state.heat === 0;
  const each = value.models.map((model) => significant(heat() / model.scale));
  const words = (new Set(each).size === 1 ? each.slice(0, 1) : each).join(" → ");
  drawn.heat.textContent = own ? `${words} · ${value.labels.ownNow}` : words;
  drawn.slider.setAttribute("aria-valuetext", drawn.heat.textContent);
  drawn.own_heat.disabled = own;
};

// ---------------------------------------------------------------- table

const head = (item, panel) =>
  make(
    "th",
    { scope: "col" },
    make(
      "div",
      { class: "al-column" },
      make("img", { src: item.image, alt: item.alt, title: item.alt }),
      panel === 0
        ? make("button", { type: "button", class: "al-remove", tabindex: "-1", "data-id": item.id, "data-focus": item.id, "aria-label": item.remove, title: item.remove }, "×")
        : null,
    ),
  );

// Keeps the tables of two models apart.
const gap = () => make("td", { class: "al-gap", "aria-hidden": "true" });
const apart = (groups) => groups.flatMap((group, place) => (place ? [gap(), ...group] : group));

const table = () => {
  const { rows, columns } = drawn.order;
  const titles = drawn.panels.map(titleOf);
  const titled = titles.some(Boolean);
  const corner = make("th", { scope: "col", class: "al-corner", rowspan: titled ? 2 : null }, hidden(value.labels.head));
  const heads = drawn.panels.map((_, panel) => columns.map((column) => head(value.columns[column], panel)));
  drawn.cells = drawn.panels.map(() => rows.map(() => columns.map(() => make("td", { class: "al-cell", tabindex: "-1" }, document.createTextNode("")))));
  drawn.places = new Map(); // of the cells
  drawn.cells.forEach((lines, panel) => lines.forEach((line, row) => line.forEach((cell, column) => drawn.places.set(cell, { panel, row, column }))));
  const body = rows.map((row, i) => {
    const name = make("th", { scope: "row", title: value.rows[row] }, make("div", { dir: "auto" }, value.rows[row]));
    return make("tr", {}, name, ...apart(drawn.cells.map((lines) => lines[i])));
  });
  const count = drawn.panels.length * columns.length;
  const size = count > 16 ? " al-dense" : count > 8 ? " al-compact" : "";
  drawn.short = count > 8;
  return make(
    "table",
    { class: `al-matrix${size}${count > 8 ? " al-wide" : ""}`, role: "grid", style: { "--columns": count } },
    make("caption", { class: "al-hidden" }, value.caption),
    make(
      "thead",
      {},
      titled
        ? make("tr", { class: "al-titles" }, corner, ...apart(titles.map((title) => [make("th", { scope: "colgroup", colspan: columns.length }, make("div", {}, title))])))
        : null,
      make("tr", {}, titled ? null : corner, ...apart(heads)),
    ),
    make("tbody", {}, ...body),
  );
};

const dress = (cell, panel, row, column, looks) => {
  const number = panel.values[row][column];
  const marks = marksOf(panel, row, column);
  const words = [];
  if (marks.picture) words.push(value.labels.bestPicture);
  if (marks.caption) words.push(value.labels.bestCaption);
  if (marks.pair) words.push(value.labels.pair);
  cell.className = `al-cell${marks.picture ? " al-best-picture" : ""}${marks.caption ? " al-best-caption" : ""}${marks.pair ? " al-pair" : ""}`;
  cell.style.cssText = looks[shade(number, panel.limits)];
  cell.firstChild.data = panel.write(number, drawn.short);
  cell.children[0]?.remove();
  if (words.length) cell.append(hidden(`, ${words.join(", ")}`));
};

// ---------------------------------------------------------------- below the table

const ends = (panel) => panel.limits.map((number) => panel.write(number, state.view === "cosine"));

const scale = (panel) => {
  const [low, high] = ends(panel);
  const ramp = (theme) => `linear-gradient(to right, ${coloursOf(panel)[theme].filter((_, n) => n % 15 === 0).join(", ")})`;
  return make(
    "span",
    { class: "al-ramp", role: "img", "aria-label": fill(value.labels.colours, { low, high }) },
    titleOf(panel) ? make("b", {}, value.labels[panel.kind]) : null,
    low,
    make("i", { style: { "--light": ramp("light"), "--dark": ramp("dark") } }),
    high,
  );
};

const legend = () =>
  make(
    "div",
    { class: "al-legend" },
    ...drawn.panels.map(scale),
    make(
      "p",
      { "aria-hidden": "true" },
      make("span", {}, make("i", { class: "al-key al-best-picture" }), value.labels.bestPicture),
      make("span", {}, make("i", { class: "al-key al-best-caption" }), value.labels.bestCaption),
      pairing() === "none" ? null : make("span", {}, make("i", { class: "al-key al-pair" }), value.labels.pair),
    ),
  );

const share = (found) => {
  const asked = found.filter((one) => one !== null);
  return { hits: asked.filter(Boolean).length, of: asked.length };
};
const percent = ({ hits, of }) => `${Number(((100 * hits) / of).toFixed(1))} % (${hits}/${of})`;

const change = (before, after) => {
  const flips = { gained: 0, lost: 0 };
  after.forEach((found, query) => {
    if (found && before[query] === false) flips.gained += 1;
    if (found === false && before[query]) flips.lost += 1;
  });
  return flips.gained || flips.lost ? fill(value.labels.flips, flips) : value.labels.same;
};

const measures = () => {
  const { labels } = value;
  const all = value.models.map((model) => figures(model, heat(), drawn.own));
  if (all[0].loss === null) return make("p", { class: "al-note" }, pairing() === "name" ? labels.noNames : labels.noPairs);
  const rows = [
    [labels.findPictures, ...all.map((one) => percent(share(one.pictures)))],
    [labels.findCaptions, ...all.map((one) => percent(share(one.captions)))],
    [labels.loss, ...all.map((one) => one.loss.toFixed(4))],
  ];
  if (all.length === 1) return make("dl", { class: "al-measures" }, ...rows.map(([name, figure]) => make("div", {}, make("dt", {}, name), make("dd", {}, figure))));
  rows[0].push(change(all[0].pictures, all[1].pictures));
  rows[1].push(change(all[0].captions, all[1].captions));
  rows[2].push(signed(all[1].loss - all[0].loss, 4));
  const heads = [labels.measure, labels.before, labels.after, labels.change];
  return make(
    "table",
    { class: "al-measures" },
    make("thead", {}, make("tr", {}, ...heads.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...rows.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, cell))))),
  );
};

// Everything about one cell; of both models where there are two.
const detail = (row, column) => {
  const { labels, models } = value;
  const item = (name, numbers) => make("div", {}, make("dt", {}, name), make("dd", {}, [...new Set(numbers)].join(" → ")));
  const figure = (view) => models.map((model) => (view === "cosine" ? WRITE.cosine : WRITE.share)(drawn.all[view](model)[row][column]));
  const place = (words, numbers, of) => make("p", {}, fill(words, { rank: [...new Set(numbers)].join(" → "), of }));
  const captions = models.map((model) => rank(model.cosines.map((line) => line[column]), row));
  const pictures = models.map((model) => rank(model.cosines[row], column));
  return [
    make("img", { src: value.columns[column].image, alt: value.columns[column].alt }),
    make(
      "div",
      {},
      make("p", { class: "al-detail-caption", dir: "auto" }, value.rows[row]),
      make("dl", {}, ...value.views.map((view) => item(value.names[view], figure(view)))),
      make("div", { class: "al-places" }, place(labels.rankCaption, captions, value.rows.length), place(labels.rankPicture, pictures, value.columns.length)),
    ),
  ];
};

const rest = () => make("p", { class: "al-note" }, value.labels.hint);

// ---------------------------------------------------------------- drawing

// Values, colours and marks, where the nodes stand already.
const paint = () => {
  drawn.panels = panels();
  const shown = new Map(); // the views are worked out once each, and only when they are asked for
  drawn.all = Object.fromEntries(
    value.views.map((key) => [
      key,
      (model) => {
        const name = `${key} ${value.models.indexOf(model)}`;
        if (!shown.has(name)) shown.set(name, VIEWS[key](model, heat()));
        return shown.get(name);
      },
    ]),
  );
  const { rows, columns } = drawn.order;
  drawn.panels.forEach((panel, p) => {
    const looks = drawn.looks[panel.colours];
    rows.forEach((row, i) => columns.forEach((column, j) => dress(drawn.cells[p][i][j], panel, row, column, looks)));
  });
  const difference = state.view === "cosine" ? value.labels.cosineChange : value.labels.shareChange;
  const notes = [value.meanings[state.view], drawn.panels.some((panel) => panel.kind === "difference") ? ` ${difference}` : ""];
  drawn.below.replaceChildren(legend(), make("p", { class: "al-note" }, ...notes));
  drawn.measures.replaceChildren(measures());
  sayTemperature();
  point(null);
};

const point = (cell) => {
  const place = drawn.places.get(cell);
  drawn.detail.replaceChildren(...(place ? detail(drawn.order.rows[place.row], drawn.order.columns[place.column]) : [rest()]));
};

// Table and all; keeps the keyboard where it was.
const draw = () => {
  const had = drawn?.scroll.contains(document.activeElement);
  drawn.order = state.sorted ? strongestFirst(value.models[0].cosines) : { rows: [...value.rows.keys()], columns: [...value.columns.keys()] };
  drawn.own = pairsOf(value.owners[pairing()], value.columns.length);
  drawn.panels = panels();
  drawn.scroll.replaceChildren(table());
  drawn.sort.textContent = state.sorted ? value.labels.unsort : value.labels.sort;
  paint();
  settle(had);
};

// The one cell that the Tab key reaches.
const settle = (focus) => {
  const at = state.at;
  drawn.cells[at.panel]?.[at.row]?.[at.column]?.setAttribute("tabindex", "-1");
  at.panel = Math.min(at.panel, drawn.cells.length - 1);
  at.row = Math.min(at.row, value.rows.length - 1);
  at.column = Math.min(at.column, value.columns.length - 1);
  const cell = drawn.cells[at.panel][at.row][at.column];
  cell.tabIndex = 0;
  if (focus) cell.focus();
};

const go = (place) => {
  drawn.cells[state.at.panel][state.at.row][state.at.column].tabIndex = -1;
  state.at = place;
  settle(true);
};

const STEP = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -Infinity], End: [0, Infinity] };
const within = (number, count) => Math.min(Math.max(number, 0), count - 1);

const walk = (event, cell) => {
  const step = STEP[event.key];
  if (!step) return;
  event.preventDefault();
  const at = drawn.places.get(cell);
  const width = value.columns.length;
  if (at.row === 0 && step[0] < 0) {
    drawn.scroll.querySelectorAll("thead .al-remove")[at.column]?.focus();
    return;
  }
  const flat = within(at.panel * width + at.column + step[1], drawn.panels.length * width);
  const row = event.ctrlKey && step[1] ? (step[1] < 0 ? 0 : value.rows.length - 1) : within(at.row + step[0], value.rows.length);
  go({ panel: Math.floor(flat / width), row, column: flat % width });
};

const ask = (cell) => {
  const { row, column } = drawn.places.get(cell);
  trigger("why", { caption: drawn.order.rows[row], picture: value.columns[drawn.order.columns[column]].id });
};

const build = () => {
  const { labels } = value;
  const two = value.models.length > 1;
  if (!value.views.includes(state.view)) state.view = "cosine";
  for (const model of value.models) {
    model.bestPictures = model.cosines.map(best);
    model.bestCaptions = transposed(model.cosines).map(best);
  }
  drawn = {
    looks: { heat: styles(value.colours), difference: styles(differences) },
    scroll: make("div", { class: "al-scroll", role: "region", "aria-label": value.caption }),
    detail: make("div", { class: "al-detail" }),
    below: make("div", { class: "al-below" }),
    measures: make("div", {}),
    sort: tool("sort", ""),
  };
  const views = choice("view", labels.view, value.views.map((view) => [view, value.names[view]]), state.view);
  show(
    make(
      "div",
      { class: "al-controls" },
      views,
      two ? choice("show", labels.show, labelled(["all", "before", "after", "difference"]), state.show) : null,
    ),
    drawn.scroll,
    drawn.detail,
    drawn.below,
    make("div", { class: "al-tools" }, drawn.sort, tool("csv", labels.csv), tool("png", labels.png)),
    make(
      "div",
      { class: "al-block" },
      make("div", { class: "al-controls" }, choice("pairing", labels.pairing, labelled(["order", "name", "none"]), pairing()), temperature()),
      drawn.measures,
    ),
  );
  draw();
};

keep((given) => {
  const asked = drawn?.scroll.contains(document.activeElement) && document.activeElement.matches(".al-cell");
  value = given;
  if (value.models?.length) {
    build();
    if (asked) settle(true);
    return;
  }
  drawn = null;
  show(problem(value.error), value.note ? make("p", { class: "al-note" }, value.note) : null);
});

// ---------------------------------------------------------------- files

const theme = () => (document.body.classList.contains("dark") ? "dark" : "light");
const named = (kind) => `${value.labels.file}-${state.view}.${kind}`;

const asTable = () => {
  const { rows, columns } = drawn.order;
  const view = value.names[state.view];
  const heads = drawn.panels.flatMap((panel) => columns.map((column) => [titleOf(panel), value.columns[column].alt].filter(Boolean).join(" · ")));
  return [[view, ...heads], ...rows.map((row) => [value.rows[row], ...drawn.panels.flatMap((panel) => columns.map((column) => panel.values[row][column]))])];
};

const asPicture = async () => {
  const { rows, columns } = drawn.order;
  const images = [...drawn.scroll.querySelectorAll("thead img")].slice(0, columns.length);
  await Promise.allSettled(images.map((image) => image.decode()));
  const look = getComputedStyle(element);
  const colour = (name) => look.getPropertyValue(name).trim();
  const shown = drawn.panels.map((panel) => ({
    title: titleOf(panel),
    cells: rows.map((row) =>
      columns.map((column) => {
        const paint = coloursOf(panel)[theme()][shade(panel.values[row][column], panel.limits)];
        return { text: panel.write(panel.values[row][column], drawn.short), paint, ink: ink(paint), marks: marksOf(panel, row, column) };
      }),
    ),
  }));
  const notes = [`${value.names[state.view]} · ${value.labels.temperature} ${drawn.heat.textContent} · ${value.models.map((model) => model.name).join(" → ")}`];
  for (const row of drawn.measures.querySelectorAll("dl > div, tbody tr")) notes.push([...row.children].map((node) => node.textContent).join(" · "));
  const ramps = drawn.panels.map((panel) => ({ title: titleOf(panel), ends: ends(panel), colours: coloursOf(panel)[theme()] }));
  return drawing({ ramps, rows: rows.map((row) => value.rows[row]), columns: images, panels: shown, notes, page: colour("--body-background-fill"), ink: colour("--al-ink"), soft: colour("--al-soft") });
};

const TOOLS = {
  sort: () => {
    state.sorted = !state.sorted;
    draw();
  },
  own: () => {
    state.heat = 0;
    drawn.slider.value = 0;
    paint();
    drawn.slider.focus();
  },
  csv: () => save(csv(asTable()), named("csv")),
  png: async () => save(await asPicture(), named("png")),
};

// ---------------------------------------------------------------- events

element.addEventListener("click", (event) => {
  const cell = event.target.closest(".al-cell");
  const remove = event.target.closest("button[data-id]");
  const named = event.target.closest("button[data-tool]");
  if (remove) trigger("remove", { id: remove.dataset.id });
  if (named) TOOLS[named.dataset.tool]();
  if (!cell) return;
  go(drawn.places.get(cell));
  ask(cell);
});
element.addEventListener("change", (event) => {
  const { set } = event.target.dataset;
  if (!set) return;
  state[set] = event.target.value;
  if (set === "show") draw();
  else {
    drawn.own = pairsOf(value.owners[pairing()], value.columns.length);
    paint();
  }
});
let waiting = 0;
element.addEventListener("input", (event) => {
  if (event.target !== drawn?.slider) return;
  state.heat = Number(event.target.value);
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(paint);
});
element.addEventListener("keydown", (event) => {
  const cell = event.target.closest(".al-cell");
  if (cell && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    ask(cell);
  } else if (cell) walk(event, cell);
  else if (event.key === "ArrowDown" && event.target.matches(".al-remove")) {
    event.preventDefault();
    const column = [...drawn.scroll.querySelectorAll("thead .al-remove")].indexOf(event.target);
    go({ panel: 0, row: 0, column });
  }
});
element.addEventListener("mouseover", (event) => {
  const cell = event.target.closest(".al-cell");
  if (cell) point(cell);
});
element.addEventListener("focusin", (event) => {
  const cell = event.target.closest(".al-cell");
  if (cell) point(cell);
});
