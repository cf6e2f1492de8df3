// A place for files: choose, drop or paste. Uploads them a few at a time, then sends the event "files".
// Where the value has a `batch`, many files go in parts: while one is read the next waits, what is there can be used
// already ("grown" says that there is more), and "halt" ends it. A zip file is a part of its own. `run` in the value says which part it answers.

const AT_ONCE = 4;
const PATIENCE = 2000; // milliseconds before the time left is worth a guess
const GROWTH = 3000; // milliseconds between two signs of growth within a part
let busy = "";
let waiting = []; // files that came while others were being read
let job = null; // { files, at, size, run, begun, from, stopped, progress }
let runs = 0;
let grown = 0;
let ended = ""; // said of a job that was stopped
// One for good: a file dialogue may be open while everything around it is drawn anew.
const input = make("input", { type: "file", class: "al-hidden" });

const fill = (template, values) => template.replace(/\{(\w+)\}/g, (_, name) => values[name]);
const isZip = (file) => /\.zip$/i.test(file.name || "");

const area = (value) => {
  input.multiple = Boolean(value.many);
  input.accept = value.accept || "image/*";
  const title = make("span", { class: "al-drop-title" }, busy || value.title);
  const how = busy ? null : make("span", { class: "al-drop-how" }, value.how);
  const picture = value.preview ? make("img", { src: value.preview, alt: value.alt }) : null;
  const words = make("span", { class: "al-drop-words" }, title, how);
  return make("label", { class: `al-drop${picture ? " al-filled" : ""}${busy ? " al-busy" : ""}` }, input, picture, words);
};

const skipped = (value) =>
  make(
    "div",
    { class: "al-problem" },
    make("p", {}, value.skippedTitle),
    make("ul", {}, ...value.skipped.map(([name, reason]) => make("li", {}, make("strong", {}, make("bdi", {}, name)), ` ${reason}`))),
  );

// How far all files are, of which a part is being read.
const overall = (progress) => {
  if (!job || job.files.length === 1 || !current().batch) return progress;
  const done = job.at + (job.size * progress.done) / progress.total;
  const total = job.files.length;
  const text = fill(current().labels.reading, { done: Math.min(Math.floor(done) + 1, total), total });
  return { done, total, text };
};

const timeLeft = (progress, labels) => {
  const spent = performance.now() - job.begun;
  const share = (progress.done - job.from) / (progress.total - job.from);
  if (spent < PATIENCE || !(share > 0.02)) return "";
  const seconds = (spent * (1 - share)) / share / 1000;
  const [template, count] = seconds > 90 ? [labels["left.minutes"], seconds / 60] : [labels["left.seconds"], Math.ceil(seconds / 5) * 5];
  return fill(template, { count: Math.round(count) });
};

const leftOf = (progress, value) => (job && value.batch && !job.stopped ? timeLeft(progress, value.labels) : "");

const underway = (value) => {
  const progress = job?.progress || value.progress;
  if (!progress) return null;
  const stop =
    job && value.batch
      ? make(
          "button",
          { type: "button", class: "al-plain-button", "data-act": "stop", "data-focus": "stop", disabled: job.stopped },
          job.stopped ? value.labels.stopping : value.labels.stop,
        )
      : null;
  return make(
    "div",
    { class: "al-underway" },
    make("progress", { max: progress.total, value: progress.done, "aria-label": progress.text }),
    stop ? make("div", { class: "al-underway-words" }, make("span", {}, leftOf(progress, value)), stop) : null,
  );
};

// Show progress without drawing anything anew: else a click on "stop" gets lost half-way.
const tick = (value) => {
  const bar = element.querySelector(".al-underway progress");
  if (!bar) return render();
  const progress = job?.progress || value.progress;
  busy = progress.text;
  bar.max = progress.total;
  bar.value = progress.done;
  bar.setAttribute("aria-label", progress.text);
  element.querySelector(".al-drop-title").textContent = busy;
  const left = element.querySelector(".al-underway-words span");
  if (left) left.textContent = leftOf(progress, value);
};

const render = () => {
  const value = current();
  if (value.progress) busy = job?.progress?.text || value.progress.text;
  const focused = document.activeElement === input;
  const status = busy ? "" : [ended, value.status].filter(Boolean).join(" ");
  show(
    area(value),
    underway(value),
    make("p", { class: "al-status", role: "status" }, status),
    problem(busy ? "" : value.error),
    value.skipped?.length ? make("div", { role: "alert" }, skipped(value)) : null,
  );
  if (focused) input.focus({ preventScroll: true });
};

const begin = (files) => {
  job = { files, at: 0, size: 0, run: 0, begun: performance.now(), from: 0, stopped: false, progress: null };
  ended = "";
  sendPart();
};

const finish = () => {
  if (job?.stopped) ended = current().labels.stopped;
  if (job?.stopped) waiting = [];
  job = null;
  busy = "";
  render();
  const files = waiting.splice(0);
  if (files.length) begin(files);
};

// The files that go next: all of them, or so many, or one zip file.
const nextFiles = (value) => {
  const rest = job.files.slice(job.at);
  if (!value.batch) return rest;
  const zip = rest.findIndex(isZip);
  return rest.slice(0, zip < 0 ? value.batch : Math.min(Math.max(zip, 1), value.batch));
};

const problemOf = (file, place, value) => {
  if (!file.size) return "empty";
  if (file.size > ((isZip(file) && value.maxZipBytes) || value.maxBytes)) return "size";
  return place >= value.maxFiles ? "limit" : "";
};

// What the service said of an upload it did not take.
const refusalOf = (error) => {
  const said = /^HTTP \d+: (\{.*\})/s.exec(String(error?.message));
  try {
    return `refused.${JSON.parse(said[1]).code}`;
  } catch {
    return "lost";
  }
};

const sendPart = async () => {
  const value = current();
  const files = nextFiles(value);
  const sent = [];
  const mine = job;
  mine.size = files.length;
  let next = 0;
  let done = 0;
  const say = () => {
    const total = mine.files.length;
    busy = total > 1 ? fill(value.labels.uploading, { done: Math.min(mine.at + done + 1, total), total }) : value.labels.busy;
    const title = element.querySelector(".al-drop-title");
    if (title) title.textContent = busy;
  };
  const work = async () => {
    while (next < files.length && !mine.stopped) {
      const place = next++;
      const file = files[place];
      const entry = { name: file.name || "", problem: problemOf(file, mine.at + place, value) };
      sent[place] = entry;
      if (!entry.problem) {
        try {
          entry.path = (await upload(file)).path;
        } catch (error) {
          entry.problem = refusalOf(error);
        }
      }
      done++;
      say();
    }
  };
  if (value.batch && mine.files.length > 1) mine.progress = overall({ done: 0, total: 1 });
  say();
  render();
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  if (!sent.length) return finish();
  mine.run = ++runs;
  trigger("files", { files: sent, run: mine.run, first: mine.at === 0 });
};

const send = (list) => {
  const files = [...list].slice(0, current().many ? list.length : 1);
  if (!files.length) return;
  if (busy) waiting = current().many ? [...waiting, ...files] : files;
  else begin(files);
};

const grow = () => {
  grown = performance.now();
  trigger("grown", {});
};

const advance = () => {
  job.run = 0; // its answer may be shown more than once
  grow();
  job.at += job.size;
  if (job.at < job.files.length && !job.stopped) sendPart();
  else finish();
};

render();
watch("value", () => {
  const value = current();
  if (value.progress) {
    if (job?.files.length === 1 && !job.progress) Object.assign(job, { begun: performance.now(), from: value.progress.done });
    if (job) job.progress = overall(value.progress);
    if (job && value.batch && value.progress.done && performance.now() - grown > GROWTH) grow();
    tick(value);
  } else if (!job || (value.batch && !(job.run && value.run === job.run))) {
    if (!job) busy = "";
    render(); // the same in another language, say
  } else if (value.batch) advance();
  else finish();
});

// The event "files" itself was refused: there will be no answer.
window.addEventListener("al-refused", () => {
  if (element.isConnected && job?.run) finish();
});
element.addEventListener("click", (event) => {
  if (!job || !event.target.closest("button[data-act=stop]")) return;
  job.stopped = true;
  trigger("halt", {});
  render();
});
input.addEventListener("change", () => {
  send(input.files);
  input.value = ""; // the same file may be chosen again
});
for (const name of ["dragenter", "dragover"])
  element.addEventListener(name, (event) => {
    event.preventDefault();
    element.querySelector(".al-drop")?.classList.add("al-over");
  });
for (const name of ["dragleave", "drop"])
  element.addEventListener(name, (event) => {
    event.preventDefault();
    if (!element.contains(event.relatedTarget)) element.querySelector(".al-drop")?.classList.remove("al-over");
  });
element.addEventListener("drop", (event) => send(event.dataTransfer.files));
// Only the place on the open tab takes what is pasted.
document.addEventListener("paste", (event) => {
  if (element.isConnected && element.offsetParent !== null && event.clipboardData?.files.length) {
    event.preventDefault();
    send(event.clipboardData.files);
  }
});
