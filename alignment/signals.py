"""Handle signals while a block runs, so that a command ends in good order."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], Any], *numbers: int) -> Iterator[Callable[[], None]]:
    """Handle these signals, in the main thread alone; yields a function that restores the former handlers early."""
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, former in before.items():
            signal.signal(number, former)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield restore
    finally:
        restore()
