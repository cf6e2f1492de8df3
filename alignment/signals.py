"""Run a command, and handle signals while a block runs, so that it ends in good order."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn


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


def run_command(package: str) -> NoReturn:
    """Run `main` of a package's module `command`, and exit with its status; 130 after an interrupt, also of imports."""
    try:
        sys.exit(import_module(f"{package}.command").main())
    except KeyboardInterrupt:
        sys.exit(130)
