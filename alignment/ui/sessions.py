"""Top floor, what the server remembers of a visitor, and that it costs no more than it is worth.

Gradio describes every element of the page anew for each session, keeps that for ten thousand sessions, and opens one
for every call of the API that names none: 15 ms and a third of a megabyte for a query of one millisecond. Such a
description is read only for a link to all of a page's state, and this page makes no such links.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, Self

import gradio as gr
from gradio.state_holder import SessionState, StateHolder


class Unchanging:
    """A value that is only ever replaced: whoever wants a copy may have itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def kept(value: Unchanging) -> gr.State:
    """Keep something for each visitor for as long as their session is remembered; `value` at first."""
    state = gr.State()
    state.value = lambda: value  # a dataclass itself would be taken apart and copied at every event that renews it
    return state


class Sessions(StateHolder):
    """The sessions of a page, without descriptions of its elements; of calls without a session nothing is kept."""

    @classmethod
    def instead_of(cls, holder: StateHolder) -> Sessions:
        """Take over from Gradio's own."""
        sessions = cls()
        vars(sessions).update(vars(holder))
        holder.blocks.state_holder = sessions
        return sessions

    def forget(self, seconds: float) -> None:
        """Forget sessions that nobody has used for so long, with all that was shown in them."""
        long_ago = datetime.now() - timedelta(seconds=seconds)
        with self.lock:
            for session, used in list(self.time_last_used.items()):
                if used < long_ago:
                    self.session_data.pop(session, None)
                    del self.time_last_used[session]

    def __getitem__(self, session_id: str) -> SessionState:
        """Find or open a session."""
        if session_id in self.session_data:
            return super().__getitem__(session_id)
        session = SessionState(SimpleNamespace(default_config=self.blocks.default_config, blocks={}))  # type: ignore[arg-type]
        if session_id in self.blocks._queue.event_ids_to_events:  # an event that came without one lends its own id
            return session
        self.session_data[session_id] = session
        return super().__getitem__(session_id)
