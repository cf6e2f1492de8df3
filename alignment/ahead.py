"""Floor 1, work ahead: do in threads what a consumer will ask for next, in order and never too much of it.

Place in the flow: `files -> ahead (open, hash, resize) -> model`, so that one picture is decoded while another is
embedded. Threads are enough: decoders, resizing and hashing let go of Python's lock.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_WORKERS = 16  # while it decodes, each may hold 400 MB: 50 megapixels, twice


def num_workers() -> int:
    """Return how many threads make use of this machine: one for each processor that this process may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _MOST_WORKERS)


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None, depth: int | None = None
) -> Generator[Result]:
    """Yield `function(item)` for every item in order, computed in threads before it is asked for.

    An error is raised when its item's turn comes, and ends the series; of what was begun after it nothing is seen.
    Close the generator (`contextlib.closing`) to stop early: what has not begun is dropped, what has is waited for.

    Args:
        function: called in the threads, for several items at once.
        items: read in the consumer's thread, no more than `depth` ahead of what was yielded.
        workers: how many threads; `num_workers()` when None.
        depth: how many results may be under way or waiting; sixteen for each thread when None.

    Raises:
        ValueError: on fewer than one thread, or no depth.
    """
    workers = num_workers() if workers is None else workers
    depth = 16 * workers if depth is None else depth
    if workers < 1 or depth < 1:
        raise ValueError(f"Work ahead needs at least one thread and a depth of one, not {workers} and {depth}.")
    return _ahead(function, items, workers, depth)


def _ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int, depth: int) -> Generator[Result]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
