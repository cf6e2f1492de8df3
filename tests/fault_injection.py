"""Commands in processes of their own that die at a chosen moment: before a chosen change to a folder, or within a file.

A process is forked from a server that has everything imported. What it does to the folder is seen by an audit hook, and
each statement that SQLite runs by a trace, so every change can be named, counted and made the last one.
"""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import resource
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from alignment.gallery import build, modality
from alignment.gallery import main as gallery_main
from alignment.train.command import main as train_main

transformers.CLIPModel, transformers.CLIPImageProcessorPil, transformers.AutoModel  # noqa: B018 - imported when asked for

FEW = 3  # pictures that are few here: more lie in an index
HARMS: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit flipped": lambda path: flip(path, path.stat().st_size * 4 + 1),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
_CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.unlink()  # it may be mapped
    path.write_bytes(data)


@dataclass(frozen=True)
class Fault:
    """When to die; never if all is left out.

    Attributes:
        at: before the change of this number.
        before: before the first change of this kind (an audit event) to a path that ends so, or ("sql") before a
            statement that begins so.
        after: not before this many changes of that kind to such a path.
        size: when a file grows beyond so many bytes; within the file.
        full: let the file not grow instead, as on a full disk.
        nobody: have no more rights than a file's permissions give, though this user may do everything.
    """

    at: int | None = None
    before: tuple[str, str] | None = None
    after: int = 0
    size: int | None = None
    full: bool = False
    nobody: bool = False


NEVER = Fault()


@dataclass
class Watch:
    """Counts what is changed below a folder, and ends the process at the fault."""

    folder: str
    fault: Fault
    seen: int = 0
    alike: int = 0
    changes: list[str] = field(default_factory=list)

    def __call__(self, event: str, args: tuple) -> None:
        """See an audit event."""
        if event not in _CHANGES or not self._concerns(event, args):
            return
        self.change(event, os.fsdecode(args[1] if event == "os.rename" else args[0]))

    def statement(self, sql: str) -> None:
        """See a statement of SQLite."""
        if not sql.startswith(("SELECT", "PRAGMA", "WITH", "--")) and self.folder != "\0":
            self.change("sql", sql)

    def change(self, event: str, target: str) -> None:
        """Count a change, or die before it."""
        wanted = self.fault.before
        if (
            wanted
            and event == wanted[0]
            and (target.endswith(wanted[1]) or (event == "sql" and target.startswith(wanted[1])))
        ):
            self.alike += 1
        if self.seen == self.fault.at or (wanted and self.alike > self.fault.after):
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1
        self.changes.append(f"{event} {target.removeprefix(self.folder)[:60]}")

    def _concerns(self, event: str, args: tuple) -> bool:
        path = args[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a descriptor
        if event == "os.mkdir" and os.path.isdir(path):
            return False  # it only looks whether it is there
        if event == "open" and not (args[2] or 0) & (os.O_CREAT | os.O_TRUNC):
            return False
        if event in ("os.remove", "os.rmdir") and args[-1] != -1:
            return True  # by rmtree, relative to an open folder
        return os.fspath(os.fsdecode(path)).startswith(self.folder)


def obey_permissions(obey: bool = True) -> None:
    """Give up what lets root pass over permissions (Linux), or take it back; its own files it may still read."""
    libc, words = ctypes.CDLL(None, use_errno=True), ctypes.c_uint32 * 6
    header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), words()  # version 3 of the call; this process
    if libc.capget(header, rights):
        raise OSError(ctypes.get_errno(), "capget")
    both = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: of those in effect, and of those permitted
    rights[0] = rights[0] & ~both if obey else rights[0] | (rights[1] & both)
    if libc.capset(header, rights):
        raise OSError(ctypes.get_errno(), "capset")


def run(command: str, arguments: list[str], folder: str, fault: Fault, log: Path) -> None:
    """Run one of the commands in this process, which watches itself."""
    told, noted = (os.open(path, os.O_CREAT | os.O_WRONLY) for path in (log, f"{log}.changes"))
    if fault.nobody and os.geteuid() == 0:
        obey_permissions()
    said = io.StringIO()  # no file: the limit is for all files
    sys.stdout = sys.stderr = said
    torch.set_num_threads(1)
    modality.EXACT_ROWS = modality.LARGE = FEW
    build.COMMIT_S = 0.0
    watch = Watch(folder, fault)
    connect = sqlite3.connect

    def traced(*args: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*args, **options)
        connection.set_trace_callback(watch.statement)
        return connection

    sqlite3.connect = traced  # type: ignore[assignment]
    sys.addaudithook(watch)
    if fault.size is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN if fault.full else signal.SIG_DFL)
    try:
        status = gallery_main(arguments) if command == "gallery" else train_main(arguments) or 0
    except SystemExit as error:
        status = 1
        said.write(f"{error.code}\n")
    except BaseException:
        status = 99
        said.write(traceback.format_exc())
    watch.folder = "\0"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.write(told, said.getvalue().encode())
    os.write(noted, "\n".join(watch.changes).encode())
    sys.exit(status)


def forkserver() -> ForkServerContext:
    """What starts processes with all imports done: one server for a worker's tests, with the environment it found."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_injection", "alignment.train.run"])
    return context


class Runner:
    """Starts commands; ends all of them at last."""

    def __init__(self, logs: Path) -> None:
        """Take a folder for what the commands say."""
        self.logs = logs
        self.context = forkserver()
        self.started: list[BaseProcess] = []

    def start(self, command: str, *arguments: object, folder: Path, fault: Fault = NEVER) -> BaseProcess:
        """Start a command that writes to a folder."""
        log = self.logs / f"{len(self.started)}.log"
        words = [str(argument) for argument in arguments]
        process = self.context.Process(target=run, args=(command, words, str(folder), fault, log))
        process.start()
        self.started.append(process)
        return process

    def end(self, process: BaseProcess) -> int:
        """Wait for a command; returns its exit status, -9 if it was killed."""
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    def __call__(self, command: str, *arguments: object, folder: Path, fault: Fault = NEVER) -> int:
        """Run a command to its end."""
        return self.end(self.start(command, *arguments, folder=folder, fault=fault))

    @property
    def said(self) -> str:
        """What the last command wrote to the terminal."""
        return (self.logs / f"{len(self.started) - 1}.log").read_text()

    @property
    def changes(self) -> list[str]:
        """What the last command did to its folder, if it came to its end."""
        return (self.logs / f"{len(self.started) - 1}.log.changes").read_text().split("\n")


@contextmanager
def runner(logs: Path) -> Iterator[Runner]:
    """Run commands, one thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        made = Runner(logs)
        yield made
        for process in made.started:
            process.kill()
            process.join()
            process.close()
