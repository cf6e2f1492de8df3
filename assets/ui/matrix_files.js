// The matrix as files: a table for spreadsheets, a picture for slides.

const save = (blob, name) => {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
};

// A cell that begins like a formula must not become one.
const csvCell = (cell) => {
  if (typeof cell === "number") return String(Number(cell.toFixed(6)));
  const text = /^\s*[=+\-@＝＋－＠]/.test(cell) ? `'${cell}` : cell;
  return `"${text.replaceAll('"', '""')}"`;
};

// With a mark at the front by which Excel knows that Chinese is coming.
const csv = (rows) => new Blob([`\ufeff${rows.map((row) => row.map(csvCell).join(",")).join("\r\n")}\r\n`], { type: "text/csv;charset=utf-8" });

const FONT = '"Inter", system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif';

// Break a text into at most `most` lines of a width; what is left over ends in an ellipsis.
const lines = (brush, text, width, most) => {
  const parts = text.match(/[\u2e80-\u9fff\uff00-\uffef]|[^\s\u2e80-\u9fff\uff00-\uffef]+\s*|\s+/g) || [];
  const found = [""];
  for (const part of parts) {
    if (found.at(-1) && brush.measureText(found.at(-1) + part.trimEnd()).width > width) found.push("");
    found[found.length - 1] += part;
  }
  const kept = found.slice(0, most);
  const fits = (line) => brush.measureText(line).width <= width;
  return kept.map((line, place) => {
    let short = line.trimEnd();
    if (fits(short) && !(place === most - 1 && found.length > most)) return short;
    while (short && !fits(`${short}…`)) short = short.slice(0, -1);
    return `${short}…`;
  });
};

const triangle = (brush, x, y, size, down) => {
  brush.beginPath();
  brush.moveTo(x, y);
  brush.lineTo(x + (down ? size * 1.6 : 0), y + (down ? 0 : size * 1.6));
  brush.lineTo(x + size * 0.8 * (down ? 1 : 1.25), y + size * 0.8 * (down ? 1.25 : 1));
  brush.fill();
};

// Fill a square with the middle of a picture.
const square = (brush, image, x, y, side) => {
  const part = Math.min(image.naturalWidth, image.naturalHeight);
  if (!part) return;
  const [left, top] = [(image.naturalWidth - part) / 2, (image.naturalHeight - part) / 2];
  brush.save();
  brush.beginPath();
  brush.roundRect(x, y, side, side, 6);
  brush.clip();
  brush.drawImage(image, left, top, part, part, x, y, side, side);
  brush.restore();
};

// `sheet`: { rows, columns: [images], panels: [{ title, cells: [[{ text, paint, ink, marks }]] }], ramps: [{ title, ends,
// colours }], notes, page, ink, soft }.
const drawing = (sheet) => {
  const many = sheet.columns.length * sheet.panels.length;
  const [wide, high] = many > 16 ? [44, 34] : many > 8 ? [56, 44] : [84, 60];
  const [edge, head, gap] = [24, many > 8 ? wide : 84, 18];
  const title = sheet.panels.some((panel) => panel.title) ? 26 : 0;
  const panelWidth = sheet.columns.length * wide;
  const words = 320;
  const width = edge * 2 + words + sheet.panels.length * (panelWidth + gap);
  const top = edge + title + head + 8;
  const foot = top + sheet.rows.length * high + 24;
  const height = foot + (sheet.ramps.length + sheet.notes.length) * 22 + edge;
  const scale = Math.max(width, height) > 2000 ? 1 : 2;
  const canvas = make("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  const brush = canvas.getContext("2d");
  brush.scale(scale, scale);
  brush.fillStyle = sheet.page;
  brush.fillRect(0, 0, width, height);
  brush.textBaseline = "middle";
  const write = (text, x, y, size, ink, align = "left", weight = 400) => {
    brush.font = `${weight} ${size}px ${FONT}`;
    brush.textAlign = align;
    brush.fillStyle = ink;
    brush.fillText(text, x, y);
  };
  sheet.rows.forEach((row, i) => {
    brush.font = `400 13px ${FONT}`;
    const broken = lines(brush, row, words - 16, high > 40 ? 2 : 1);
    broken.forEach((line, n) => write(line, edge, top + (i + 0.5) * high + (n - (broken.length - 1) / 2) * 18, 13, sheet.ink));
  });
  sheet.panels.forEach((panel, p) => {
    const left = edge + words + p * (panelWidth + gap);
    if (panel.title) write(panel.title, left, edge + 8, 14, sheet.ink, "left", 600);
    sheet.columns.forEach((image, j) => square(brush, image, left + j * wide + (wide - head) / 2 + 1.5, edge + title + 1.5, head - 3));
    panel.cells.forEach((row, i) =>
      row.forEach((cell, j) => {
        const [x, y] = [left + j * wide, top + i * high];
        brush.fillStyle = cell.paint;
        brush.beginPath();
        brush.roundRect(x + 1, y + 1, wide - 2, high - 2, 4);
        brush.fill();
        write(cell.text, x + wide / 2, y + high / 2, many > 16 ? 11 : 13, cell.ink, "center", cell.marks.picture ? 700 : 400);
        const size = many > 8 ? 5 : 6;
        if (cell.marks.picture) triangle(brush, x + 4, y + high / 2 - size * 0.8, size, false);
        if (cell.marks.caption) triangle(brush, x + wide / 2 - size * 0.8, y + 4, size, true);
        if (!cell.marks.pair) return;
        brush.strokeStyle = cell.ink;
        brush.lineWidth = 1.5;
        brush.beginPath();
        brush.roundRect(x + 3, y + 3, wide - 6, high - 6, 8);
        brush.stroke();
      }),
    );
  });
  sheet.ramps.forEach((ramp, n) => {
    const y = foot + n * 22;
    write(ramp.ends[0], edge + 44, y, 13, sheet.soft, "right");
    ramp.colours.forEach((colour, step) => {
      brush.fillStyle = colour;
      brush.fillRect(edge + 52 + step / 2, y - 5, 1, 10);
    });
    write([ramp.ends[1], ramp.title].filter(Boolean).join("  "), edge + 188, y, 13, sheet.soft);
  });
  sheet.notes.forEach((note, n) => write(note, edge, foot + (sheet.ramps.length + n) * 22, 13, sheet.soft));
  return new Promise((done) => canvas.toBlob(done, "image/png"));
};
