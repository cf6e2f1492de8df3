"""Top floor, memory that is free given back to the machine.

glibc gives each of forty threads a heap of its own, and each keeps what its largest request once needed: a gigabyte
that nobody uses. Elsewhere than on Linux nothing is done.
"""

from __future__ import annotations

import ctypes
import sys

_HEAPS, _M_ARENA_MAX = 4, -8


def share_heaps() -> None:
    """Let all threads share a few heaps; to be called before there are threads."""
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_ARENA_MAX, _HEAPS)


def give_back() -> None:
    """Give the machine what is free at present."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None  # musl has neither
