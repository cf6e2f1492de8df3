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
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_ARENA_MAX, _MAX_ARENAS)


def trim() -> None:
    """Return what is free at present."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None  # musl has neither function
