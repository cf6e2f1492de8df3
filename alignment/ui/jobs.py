"""Top floor, long work on files: they come in parts, say how long it will take, and the visitor may stop it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from alignment.engine import MAX_ZIP_MB
from alignment.ui.strings import text


@dataclass
class Job:
    """What a visitor wants of a long task of theirs; it looks here between two steps.

    Attributes:
        stopped: that it ends.
        removed: that these photos are left out.
    """

    stopped: bool = False
    removed: set[str] = field(default_factory=set)


class Tasks:
    """The long tasks under way, one a session."""

    def __init__(self) -> None:
        self._tasks: dict[str | None, Job] = {}

    @contextmanager
    def begin(self, session: str | None) -> Iterator[Job]:
        """Be reachable for as long as the task takes."""
        task = self._tasks[session] = Job()
        try:
            yield task
        finally:
            if self._tasks.get(session) is task:
                del self._tasks[session]

    def of(self, session: str | None) -> Job:
        """Find a session's task; where there is none, nobody hears what is wanted."""
        return self._tasks.get(session, Job())


def parts_value(lang: str, batch: int, run: int) -> dict[str, Any]:
    """Lay out what `drop.js` needs to send files in parts, to say how long it will take, and to stop.

    Args:
        lang: of the page.
        batch: files in a part.
        run: number of the part that has been dealt with; 0 for none.
    """
    return {
        "batch": batch,
        "run": run,
        "maxZipBytes": MAX_ZIP_MB * 2**20,
        "reading": text(lang, "drop.reading", done="{done}", total="{total}"),
        "stop": text(lang, "drop.stop"),
        "stopping": text(lang, "drop.stopping"),
        "stopped": text(lang, "drop.stopped"),
        "left": {
            "seconds": text(lang, "drop.left.seconds", count="{count}"),
            "minutes": text(lang, "drop.left.minutes", count="{count}"),
        },
    }


def run_of(data: object) -> tuple[int, bool]:
    """Read which part of its files a page has sent, and whether it is the first."""
    sent = data if isinstance(data, dict) else {}
    run = sent.get("run")
    return run if type(run) is int and 0 <= run < 2**31 else 0, sent.get("first") is not False
