"""Floor 1: the processes that torchrun starts, and what they tell each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

from torch import distributed

_START = timedelta(minutes=10)  # that all processes of a torchrun have to come together
_LONGEST = timedelta(days=30)  # that a process waits for the others


class WorkerGroup(NamedTuple):
    """The processes of one torchrun: which of how many this one is, from 0, and their gloo group."""

    rank: int
    size: int
    group: Any

    def gather(self, value: Any) -> list[Any]:
        """Wait for all processes; returns their values by rank, ChildProcessError when one of them has ended."""
        values = [None] * self.size
        try:
            distributed.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            ended = f"Another process of this torchrun has ended ({str(error).splitlines()[0]})."
            kept = "What was embedded by then is kept: run the same command again, and it goes on from there."
            raise ChildProcessError(f"{ended} {kept}") from error
        return values


@contextmanager
def worker_group() -> Iterator[WorkerGroup | None]:
    """Join the processes of this torchrun, TimeoutError when they do not come; None when this process is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    try:
        distributed.init_process_group("gloo", timeout=_START)
        group = distributed.new_group(timeout=_LONGEST)
    except distributed.DistError as error:
        raise TimeoutError(f"The processes of this torchrun did not come together: {error}") from error
    try:
        yield WorkerGroup(distributed.get_rank(), distributed.get_world_size(), group)
    finally:
        distributed.destroy_process_group()
