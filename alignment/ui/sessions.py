"""Top floor, what the server remembers of a visitor, and that it costs no more than it is worth.

Gradio describes every element of the page anew for each session, keeps that for ten thousand sessions, and opens one
for every call of the API that names none: 15 ms and a third of a megabyte for a query of one millisecond. Such a
description is read only for a link to all of a page's state, and this page makes no such links.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, Self

import gradio as gr
from gradio.state_holder import SessionState, StateHolder
from torch import Tensor


class Unchanging:
    """A value that is only ever replaced: whoever wants a copy may have itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def kept(value: Unchanging) -> gr.State:
    """Keep something for each visitor for as long as their session is remembered; `value` at first."""
    state = gr.State()
    state.value = lambda: value  # a dataclass itself would be taken apart and copied at every event that renews it
    return state


def weight(value: object) -> int:
    """Estimate how many bytes a session's value keeps in memory that are the visitor's own."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(weight, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(weight, value))
    return sum(map(weight, vars(value).values())) if is_dataclass(value) else 0


class Sessions(StateHolder):
    """The sessions of a page, without descriptions of its elements; of calls without a session nothing is kept."""

    most_bytes = 10**9
    """All of them together; where there are more, those that nobody has used for longest are forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[str, int] = {}

    @classmethod
    def instead_of(cls, holder: StateHolder) -> Sessions:
        """Take over from Gradio's own."""
        sessions = cls()
        vars(sessions).update(vars(holder))
        sessions._weights = dict.fromkeys(holder.session_data, 0)
        holder.blocks.state_holder = sessions
        return sessions

    def update(self, session_id: str) -> None:
        """Put a session in front, weigh what it has come to hold, and forget the last ones where it is too much."""
        with self.lock:
            if session_id in self.session_data:
                self.session_data.move_to_end(session_id)
                # What the elements show of it is as much again, twice: as it is, and as it was described.
                self._weights[session_id] = 3 * weight(list(self.session_data[session_id].state_data.values()))
            while len(self.session_data) > 1 and self._too_much():
                oldest = next(iter(self.session_data))
                empty = (name for name in self.session_data if not self._weights.get(name) and name != session_id)
                # Whoever opens many for nothing shall not take what others have brought.
                self._drop(oldest if self._too_heavy() else next(empty, oldest))

    def _too_much(self) -> bool:
        return len(self.session_data) > self.capacity or self._too_heavy()

    def _too_heavy(self) -> bool:
        return sum(self._weights.values()) > self.most_bytes

    def _drop(self, session_id: str) -> None:
        for kept in (self.session_data, self._weights, self.time_last_used):
            kept.pop(session_id, None)

    def forget(self, seconds: float) -> None:
        """Forget sessions that nobody has used for so long, with all that was shown in them."""
        long_ago = datetime.now() - timedelta(seconds=seconds)
        with self.lock:
            for session, used in list(self.time_last_used.items()):
                if used < long_ago:
                    self._drop(session)

    def __getitem__(self, session_id: str) -> SessionState:
        """Find or open a session."""
        if session_id in self.session_data:
            return super().__getitem__(session_id)
        session = SessionState(SimpleNamespace(default_config=self.blocks.default_config, blocks={}))  # type: ignore[arg-type]
        if session_id in self.blocks._queue.event_ids_to_events:  # an event that came without one lends its own id
            return session
        self.session_data[session_id] = session
        return super().__getitem__(session_id)
