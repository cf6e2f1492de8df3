"""Divide a build among the processes of one `torchrun`.

Place in the flow: `command -> distributed (here) -> embed_share`. Each process embeds its share; the first one gathers
what the others report and finishes the gallery. When a process fails, torchrun ends the others.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import distributed

from alignment.data import Partition

_START = timedelta(minutes=10)  # that all processes have to come together
_LONGEST = timedelta(days=30)  # that a process waits for the others


class WorkerGroup(NamedTuple):
    """The processes of one torchrun: what this one embeds, and their gloo group."""

    share: Partition
    group: Any

    def gather(self, value: Any) -> list[Any]:
        """Wait for all processes; returns their values by rank, ChildProcessError when one of them has ended."""
        values = [None] * self.share.count
        try:
            distributed.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise ChildProcessError(
                f"Another process of this torchrun has ended ({str(error).splitlines()[0]}). What was embedded by then "
                "is kept: run the same command again, and it goes on from there."
            ) from error
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
        yield WorkerGroup(Partition(distributed.get_rank() + 1, distributed.get_world_size()), group)
    finally:
        distributed.destroy_process_group()


def own_device() -> str | None:
    """Name the GPU of this process, one each; None where there is none."""
    count = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else None


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM, as torchrun sends it when another process has failed, like Ctrl-C: what is embedded is kept."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
