"""UI, jobs: lets a visitor's other events reach an upload that is being processed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Job:
    """Requests to a running job, which checks them between two steps."""

    stopped: bool = False
    removed: set[str] = field(default_factory=set)  # ids of photos to leave out


class Jobs:
    """The running jobs, one for each session."""

    def __init__(self) -> None:
        self._jobs: dict[str | None, Job] = {}

    @contextmanager
    def start(self, session: str | None) -> Iterator[Job]:
        """Register a job for as long as it runs."""
        job = self._jobs[session] = Job()
        try:
            yield job
        finally:
            if self._jobs.get(session) is job:
                del self._jobs[session]

    def of(self, session: str | None) -> Job:
        """Return the session's job; a new one, without effect, if there is none."""
        return self._jobs.get(session, Job())
