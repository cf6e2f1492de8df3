"""Prefetching: order, bounds, errors at their item, and nothing left running."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from alignment.prefetch import num_workers, prefetch_map


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")] == []


def late(number: int) -> int:
    """Take the longer the earlier it comes: threads finish in another order than they begin."""
    time.sleep(0.02 / (1 + number))
    return number * number


@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (1, 5), (3, 1), (3, 3), (3, 50), (None, None)])
def test_results_come_in_order(workers: int | None, depth: int | None) -> None:
    assert list(prefetch_map(late, range(20), workers=workers, depth=depth)) == [
        number * number for number in range(20)
    ]
    assert list(prefetch_map(late, [], workers=workers, depth=depth)) == []


def test_several_items_are_worked_on_at_once_and_no_more_than_there_are_threads() -> None:
    together, lock, running, most = threading.Barrier(3), threading.Lock(), 0, 0

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(timeout=60)  # breaks unless three are here at once
        with lock:
            running -= 1
        return number

    assert list(prefetch_map(work, range(12), workers=3, depth=12)) == list(range(12))
    assert most == 3


def test_no_more_is_read_than_was_asked_for() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    with closing(prefetch_map(late, items(), workers=2, depth=5)) as results:
        assert taken == 0  # nothing happens before the first is asked for
        for number in range(10):
            next(results)
            assert taken <= number + 5


def test_work_goes_on_while_the_consumer_is_busy() -> None:
    done = threading.Semaphore(0)

    def work(number: int) -> int:
        done.release()
        return number

    with closing(prefetch_map(work, range(9), workers=2, depth=6)) as results:
        next(results)
        for _ in range(6):  # all that fits the depth is done, though nobody asks for it
            assert done.acquire(timeout=60)


def test_an_error_comes_when_its_item_is_due_and_stops_the_rest() -> None:
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number >= 4:
            raise OSError(f"item {number}")
        return number

    results = prefetch_map(work, range(1000), workers=2, depth=8)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="item 4"):
        next(results)
    assert list(results) == []
    assert max(begun) < 20


def test_an_error_of_the_items_stops_the_threads() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(prefetch_map(late, items(), workers=2, depth=4))


def test_closing_drops_what_has_not_begun_and_waits_for_what_has() -> None:
    go, begun, finished = threading.Event(), [], []

    def work(number: int) -> int:
        begun.append(number)
        if number:
            go.wait(timeout=60)
        finished.append(number)
        return number

    def interrupted() -> None:
        with closing(prefetch_map(work, range(100), workers=2, depth=50)) as results:
            next(results)
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(begun) == sorted(finished)
    assert len(begun) < 50


@pytest.mark.parametrize(("workers", "depth"), [(0, 4), (2, 0), (-1, None)])
def test_bounds_below_one_are_refused_at_once(workers: int, depth: int | None) -> None:
    with pytest.raises(ValueError, match="at least one thread"):
        prefetch_map(late, [1], workers=workers, depth=depth)


def test_there_is_a_thread_for_every_processor_this_process_may_use() -> None:
    assert 1 <= num_workers() <= min(16, os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            assert num_workers() == 1
        finally:
            os.sched_setaffinity(0, allowed)
