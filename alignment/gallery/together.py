"""The processes of one `torchrun`: each says that it lives and when it is done, and the first one waits for the rest.

Place in the flow: `command -> together (here)`. They share no computation, so all they need is a board to write on: the
key-value store that torchrun keeps anyway. A process that fails, or of which nothing is heard any more, ends the
waiting with an error; what it had embedded by then is in the gallery's folder.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

from alignment.data import Partition

logger = logging.getLogger(__name__)

BEAT = 2.0
"""Seconds between two signs of life."""

SILENCE = 60.0
"""Seconds without one after which a process counts as dead."""

START = 600.0
"""Seconds that all processes have to come together."""


class Together:
    """This process among those of its torchrun.

    Attributes:
        share: what this one is to do.
        is_first: whether this is the one that waits for the others.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        """Take a store that all of them see, and this one's place among them."""
        self.share, self.is_first = Partition(rank + 1, count), rank == 0
        self._store, self._rank, self._count = store, rank, count

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life for as long as this lasts; what goes wrong in it is told to the first one."""
        over = threading.Event()
        beats = threading.Thread(target=self._beat, args=(over,), name="together", daemon=True)
        beats.start()
        try:
            yield
        except BaseException as error:
            self._tell("failed", {"error": str(error) or type(error).__name__})
            raise
        finally:
            over.set()
            beats.join()

    def agree(self, fingerprint: str) -> None:
        """Make sure that all processes have the first one's model, before any of them embeds.

        Raises:
            ValueError: when this one has another.
            ChildProcessError: when the first one does not say which it has.
        """
        if self.is_first:
            self._store.set("model", fingerprint)
            return
        until = time.monotonic() + START
        while (wanted := self._read("model")) is None:
            if time.monotonic() > until:
                raise ChildProcessError(f"Process 0 did not say within {START:.0f} seconds which model it has.")
            time.sleep(BEAT / 10)
        if wanted != fingerprint:
            raise ValueError(
                f"Process {self._rank} has another model ({fingerprint[:12]}) than process 0 ({wanted[:12]}): "
                "give all of them the same files."
            )

    def done(self, **told: Any) -> None:
        """Say that this one's share is done, and whatever the first one should know."""
        self._tell("done", told)

    def others(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Wait for all other processes, and yield each one's number with what it told when it was done.

        Raises:
            ChildProcessError: when one failed, or nothing was heard of it for `SILENCE` seconds.
        """
        heard = {rank: ("", time.monotonic()) for rank in range(self._count) if rank != self._rank}
        while heard:
            for rank in list(heard):
                if (told := self._read(f"done/{rank}")) is not None:
                    del heard[rank]
                    yield rank, json.loads(told)
                    continue
                heard[rank] = self._listen(rank, *heard[rank])
            time.sleep(BEAT / 10)

    def _listen(self, rank: int, last: str, since: float) -> tuple[str, float]:
        """Return the last sign of life of a process and when it came."""
        if (failure := self._read(f"failed/{rank}")) is not None:
            raise ChildProcessError(f"Process {rank} failed: {json.loads(failure)['error']} {_GO_ON}")
        sign = self._read(f"alive/{rank}") or ""
        if sign != last:
            return sign, time.monotonic()
        if time.monotonic() - since > SILENCE:
            raise ChildProcessError(f"Nothing was heard of process {rank} for {SILENCE:.0f} seconds. {_GO_ON}")
        return last, since

    def _beat(self, over: threading.Event) -> None:
        count = 0
        while not over.is_set():
            count += 1
            try:
                self._store.set(f"alive/{self._rank}", str(count))
            except RuntimeError as error:  # whoever kept the store is gone, and with him the one who would listen
                logger.debug("Nobody hears this process any more: %s", error)
                return
            over.wait(BEAT)

    def _tell(self, what: str, told: Mapping[str, Any]) -> None:
        try:
            self._store.set(f"{what}/{self._rank}", json.dumps(told))
        except RuntimeError as error:
            logger.warning("The first process is gone (%s). %s", error, _GO_ON)

    def _read(self, key: str) -> str | None:
        try:
            text: str | None = self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            raise ChildProcessError(f"The other processes are out of reach ({error}). {_GO_ON}") from error
        return text


_GO_ON = "What was embedded by then is kept: run the same command again, and it goes on from there."


def of_torchrun() -> Together | None:
    """Find this process's place among those of its torchrun; None when it is alone.

    Raises:
        TimeoutError: when the others do not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from torch.distributed import DistError
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=timedelta(seconds=START))))
    except DistError as error:
        raise TimeoutError(f"The processes of this torchrun did not come together: {error}") from error
    return Together(store, rank, count)


def own_device() -> str | None:
    """Name the GPU of this process, one each; None where there is none, or all share whatever there is."""
    import torch

    if not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


@contextmanager
def stopping_politely() -> Iterator[None]:
    """Let a polite kill, such as torchrun's when another process has failed, end like Ctrl-C, and lose nothing."""
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
