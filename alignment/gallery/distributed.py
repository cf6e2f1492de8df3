"""Divide a build among the processes of one `torchrun`.

Place in the flow: `command -> distributed (here) -> embed_share`. Each process embeds its share; the first one gathers
what the others report and finishes the gallery. When a process fails, torchrun ends the others.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import distributed

from alignment.pairs import Share

START = timedelta(minutes=10)
"""Time that all processes have to come together."""

_LONGEST = timedelta(days=30)  # that a process waits for the others


@dataclass(frozen=True)
class WorkerGroup:
    """The processes of one torchrun: the rank of this one, from 0, how many there are, and their gloo group."""

    rank: int
    size: int
    group: Any

    @property
    def share(self) -> Share:
        """What this process embeds."""
        return Share(self.rank + 1, self.size)

    def gather(self, value: Any) -> list[Any]:
        """Wait for all processes; returns their values by rank, ChildProcessError when one of them has ended."""
        values = [None] * self.size
        try:
            distributed.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise ChildProcessError(
                f"Another process of this torchrun has ended ({str(error).splitlines()[0]}). What was embedded by then "
                "is kept: run the same command again, and it goes on from there."
            ) from error
        return values

    def check_same_model(self, fingerprint: str) -> None:
        """Raise a ValueError when a process has another model than the first."""
        for rank, other in enumerate(found := self.gather(fingerprint)):
            if other != found[0]:
                ours = f"Process {rank} has another model ({other[:12]}) than process 0 ({found[0][:12]})"
                raise ValueError(f"{ours}: give all of them the same files.")


@contextmanager
def worker_group() -> Iterator[WorkerGroup | None]:
    """Join the processes of this torchrun, TimeoutError when they do not come; None when this process is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    try:
        distributed.init_process_group("gloo", timeout=START)
        group = distributed.new_group(timeout=_LONGEST)
    except distributed.DistError as error:
        raise TimeoutError(f"The processes of this torchrun did not come together: {error}") from error
    try:
        yield WorkerGroup(distributed.get_rank(), distributed.get_world_size(), group)
    finally:
        distributed.destroy_process_group()


def own_device() -> str | None:
    """Name the GPU of this process, one each; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM, as torchrun sends it when another process has failed, like Ctrl-C: what is embedded is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
