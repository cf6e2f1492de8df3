"""Server, malloc: return freed memory to the system.

glibc gives each of forty threads an arena of its own, and each keeps what its largest request needed: a gigabyte that
is not in use. On other systems nothing is done.
"""

from __future__ import annotations

import ctypes
import sys

_MAX_ARENAS, _M_ARENA_MAX = 4, -8


def limit_arenas() -> None:
    """Let all threads share a few arenas; to be called before there are threads."""
    _call("mallopt", _M_ARENA_MAX, _MAX_ARENAS)


def trim() -> None:
    """Return what is free at present."""
    _call("malloc_trim", 0)


def _call(name: str, *args: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None  # musl has none of them
    if function is not None:
        function(*args)
