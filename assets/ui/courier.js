// Brings a file: the value holds it, the browser saves it, and "saved" lets the page forget it. It is an element of its
// own because a value that is replaced at once may never be seen.

let saved = 0;

const save = (file) => {
  const bytes = Uint8Array.from(atob(file.data), (letter) => letter.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: file.kind }));
  make("a", { href: url, download: file.name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
};

keep((value) => {
  if (!value.data || value.serial === saved) return;
  saved = value.serial;
  save(value);
  trigger("saved", {});
});
