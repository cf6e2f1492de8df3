"""Floor 1, prefetching: compute in threads what a consumer will ask for next, in order and within a bound.

Place in the flow: `files -> prefetch_map (open, hash, resize) -> model`, so that one picture is decoded while another
is embedded. Threads suffice: decoders, resizing and hashing release Python's global lock.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_WORKERS = 16  # a thread that decodes may hold 400 MB: 50 megapixels, twice


def num_workers() -> int:
    """Return one thread for each processor that this process may run on, at most 16."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _MAX_WORKERS)


def prefetch_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None, depth: int | None = None
) -> Generator[Result]:
    """Yield `function(item)` for every item in order, computed in threads before it is asked for.

    An error is raised when its item's turn comes, and ends the series; results of later items are dropped.
    Close the generator (`contextlib.closing`) to stop early: calls that have not begun are cancelled, others finish.

    Items are read in the consumer's thread, no more than `depth` ahead of what was yielded; that is sixteen for each of
    the `workers` when None, and these are `num_workers()` when None. ValueError when either is below one.
    """
    workers = num_workers() if workers is None else workers
    depth = 16 * workers if depth is None else depth
    if workers < 1 or depth < 1:
        raise ValueError(f"Prefetching needs at least one thread and a depth of one, not {workers} and {depth}.")
    return _prefetch(function, items, workers, depth)


def _prefetch(function: Callable[[Item], Result], items: Iterable[Item], workers: int, depth: int) -> Generator[Result]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
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
