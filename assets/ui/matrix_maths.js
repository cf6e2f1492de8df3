// What the matrix is made of: pure functions of the cosines. A row is a caption, a column a picture.

const TIE = 1e-6; // cosines closer than this are equal
const transposed = (rows) => (rows[0] || []).map((_, column) => rows.map((row) => row[column]));
const each = (rows, change) => rows.map((row, i) => row.map((number, j) => change(number, i, j)));
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const mean = (numbers) => sum(numbers) / numbers.length;

const logSumExp = (numbers) => {
  const top = Math.max(...numbers);
  return top + Math.log(sum(numbers.map((number) => Math.exp(number - top))));
};
const softmax = (numbers) => {
  const whole = logSumExp(numbers);
  return numbers.map((number) => Math.exp(number - whole));
};
const softplus = (number) => Math.max(number, 0) + Math.log1p(Math.exp(-Math.abs(number)));

// `heat` times the model's own temperature.
const logits = (model, heat) => each(model.cosines, (cosine) => (cosine * model.scale) / heat + (model.bias ?? 0));

const VIEWS = {
  cosine: (model) => model.cosines,
  captions: (model, heat) => transposed(transposed(logits(model, heat)).map(softmax)),
  pictures: (model, heat) => logits(model, heat).map(softmax),
  sigmoid: (model, heat) => each(logits(model, heat), (logit) => 1 / (1 + Math.exp(-logit))),
};

// The first of equals, as in Python.
const best = (numbers) => numbers.indexOf(Math.max(...numbers));
const rank = (numbers, place) => 1 + numbers.filter((number) => number > numbers[place]).length;

// Which pictures (columns) belong to which captions (rows): `owners` holds the picture of each caption, or -1.
const pairsOf = (owners, numPictures) => owners.map((owner) => Array.from({ length: numPictures }, (_, column) => owner === column));

// Does each query find one of its own before all others? Ties count against it; null for a query that owns nothing.
const finds = (scores, own) =>
  scores.map((row, query) => {
    const mine = row.filter((_, place) => own[query][place]);
    const foreign = row.filter((_, place) => !own[query][place]);
    return mine.length ? Math.max(...mine) - Math.max(-Infinity, ...foreign) > TIE : null;
  });

const oneWay = (rows, own) => {
  const losses = rows.flatMap((row, query) => {
    const mine = row.filter((_, place) => own[query][place]);
    return mine.length ? [logSumExp(row) - mean(mine)] : [];
  });
  return mean(losses);
};

// `softmax_loss` or `sigmoid_loss` of alignment/losses.py, whichever the model was trained with; null without pairs.
const loss = (model, heat, own) => {
  if (!own.some((row) => row.includes(true))) return null;
  const rows = logits(model, heat);
  if (model.bias === null) return (oneWay(rows, own) + oneWay(transposed(rows), transposed(own))) / 2;
  return sum(each(rows, (logit, i, j) => softplus(own[i][j] ? -logit : logit)).flat()) / rows[0].length;
};

const figures = (model, heat, own) => ({
  pictures: finds(model.cosines, own), // of each caption
  captions: finds(transposed(model.cosines), transposed(own)), // of each picture
  loss: loss(model, heat, own),
});

// The order that puts the strongest pairs on the diagonal, one after the other; other captions follow their best
// picture, other pictures come last.
const strongestFirst = (cosines) => {
  const cells = each(cosines, (cosine, row, column) => ({ cosine, row, column })).flat();
  const columns = [];
  const place = new Map(); // of a caption's row
  for (const { row, column } of cells.sort((one, other) => other.cosine - one.cosine)) {
    if (place.has(row) || columns.includes(column)) continue;
    place.set(row, columns.length);
    columns.push(column);
  }
  const paired = new Set(place.keys());
  cosines.forEach((row, index) => paired.has(index) || place.set(index, columns.indexOf(best(row)) + 0.5));
  const rest = cosines[0].map((_, column) => column).filter((column) => !columns.includes(column));
  return { rows: cosines.map((_, row) => row).sort((one, other) => place.get(one) - place.get(other)), columns: [...columns, ...rest] };
};
