"""UI, drop: what the area for files (`drop.js`) shows, and the parts in which it sends them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

from alignment.engine import MAX_ZIP_MB, Skipped
from alignment.preprocess import sanitize_text
from alignment.ui.strings import count_text, error_text, labels, text
from alignment.ui.uploads import MAX_FILE_MB, PhotoState
from alignment.ui.widgets import Value

SHOWN_PROBLEMS = 10
MAX_SKIPPED_NAME = 200

_serial = count()  # the page redraws on a new value only, also when the same file is wrong twice


def drop_value(lang: str, title: str, *, max_files: int = 1, **more: Any) -> Value:
    """Lay the area out; `more` replaces or adds to its value."""
    many = max_files > 1
    return {
        "serial": next(_serial),
        "title": title,
        "how": text(lang, "drop.how.many" if many else "drop.how"),
        "many": many,
        "maxFiles": max_files,
        "maxBytes": MAX_FILE_MB * 2**20,
        "labels": labels(lang, "drop."),
        **more,
    }


def photos_drop_value(lang: str, title: str, state: PhotoState, max_files: int) -> Value:
    """Lay the area of a photo collection out, with what became of the last files."""
    status = count_text(lang, "drop.added", state.added) if state.added else ""
    skipped = skipped_value(lang, state.skipped, SHOWN_PROBLEMS)
    return drop_value(lang, title, max_files=max_files, status=status, **skipped)


def skipped_value(lang: str, skipped: Sequence[Skipped], most: int) -> Value:
    """Name files that were left out, `most` of them, and count the rest."""
    shown = [[sanitize_text(skip.name, MAX_SKIPPED_NAME), error_text(lang, skip.error)] for skip in skipped[:most]]
    if rest := len(skipped) - len(shown):
        shown.append(["…", text(lang, "drop.more", count=rest)])
    return {"skippedTitle": count_text(lang, "drop.skipped", len(skipped)) if skipped else "", "skipped": shown}


def progress_value(lang: str, title: str, done: int, total: int, max_files: int) -> Value:
    """Lay the area out while files are being read."""
    progress = {"done": done, "total": total, "text": text(lang, "drop.reading", done=done, total=total)}
    return drop_value(lang, title, max_files=max_files, progress=progress)


def parts_value(batch: int, run: int) -> Value:
    """Let the area send files in parts of `batch`, which it can stop; `run` is the last part that was dealt with."""
    return {"batch": batch, "run": run, "maxZipBytes": MAX_ZIP_MB * 2**20}


def part_of(data: object) -> tuple[int, bool]:
    """Parse the number of the part that the untrusted event "files" brings, and whether it is the first."""
    sent = data if isinstance(data, dict) else {}
    run = sent.get("run")
    return run if type(run) is int and 0 <= run < 2**31 else 0, sent.get("first") is not False
