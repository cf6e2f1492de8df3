// A place for files: choose, drop or paste. Uploads them a few at a time, then sends the event "files".

const AT_ONCE = 4;
let busy = "";
let waiting = []; // files that came while others were being read
// One for good: a file dialogue may be open while everything around it is drawn anew.
const input = make("input", { type: "file", accept: "image/*", class: "al-hidden" });

const area = (value) => {
  input.multiple = Boolean(value.many);
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
    make("ul", {}, ...value.skipped.map(([name, reason]) => make("li", {}, make("strong", {}, name), ` ${reason}`))),
  );

const render = () => {
  const value = props.value || {};
  const progress = value.progress;
  if (progress) busy = progress.text;
  const focused = document.activeElement === input;
  show(
    area(value),
    progress ? make("progress", { max: progress.total, value: progress.done, "aria-label": progress.text }) : null,
    make("p", { class: "al-status", role: "status" }, value.status || ""),
    problem(value.error),
    value.skipped?.length ? make("div", { role: "alert" }, skipped(value)) : null,
  );
  if (focused) input.focus({ preventScroll: true });
};

const send = async (list) => {
  const value = props.value || {};
  const files = [...list].slice(0, value.many ? list.length : 1);
  if (busy) waiting = value.many ? [...waiting, ...files] : files;
  if (busy || !files.length) return;
  const sent = new Array(files.length);
  let next = 0;
  let done = 0;
  const say = () => {
    busy = files.length > 1 ? value.uploading.replace("{done}", done + 1).replace("{total}", files.length) : value.busy;
    const title = element.querySelector(".al-drop-title");
    if (title) title.textContent = busy;
  };
  const work = async () => {
    while (next < files.length) {
      const place = next++;
      const file = files[place];
      const entry = { name: file.name || "" };
      if (file.size > value.maxBytes) entry.problem = "size";
      else if (place >= value.maxFiles) entry.problem = "limit";
      else {
        try {
          entry.path = file.size ? (await upload(file)).path : "";
          if (!file.size) entry.problem = "empty";
        } catch {
          entry.problem = "lost";
        }
      }
      sent[place] = entry;
      done = Math.min(done + 1, files.length - 1);
      say();
    }
  };
  say();
  render();
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  trigger("files", { files: sent });
};

render();
watch("value", () => {
  busy = "";
  render();
  if (!busy) send(waiting.splice(0));
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
