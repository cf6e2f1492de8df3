"""Files that are whole or not there, folders with one writer, and errors that say what to do."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignment.atomic import LOCK, TEMP_PREFIX, atomic_write, exclusive_lock, remove_stale_temp, write_file
from alignment.checksum import read_json_checksummed, write_json_checksummed
from alignment.file_errors import describe_error

# ---------------------------------------------------------------- files


def test_a_file_takes_the_place_of_another_only_when_it_is_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "new" / "a", "old")

    def break_off() -> None:
        with atomic_write(tmp_path / "new" / "a") as fresh:
            fresh.write_text("half")
            assert (tmp_path / "new" / "a").read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    assert (tmp_path / "new" / "a").read_text() == "old"
    write_file(tmp_path / "new" / "a", b"new")
    assert (tmp_path / "new" / "a").read_bytes() == b"new"


def test_whoever_the_umask_lets_may_read_it(tmp_path: Path) -> None:
    (tmp_path / "as usual").touch()
    with atomic_write(tmp_path / "a.safetensors") as fresh:
        save_file({"a": torch.zeros(3)}, fresh)
    write_file(tmp_path / "b", "b")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("lasting", [True, False])
def test_it_is_on_the_disk_before_it_gets_its_name(
    lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        happened.append(("sync", os.fstat(handle).st_ino))
        fsync(handle)

    def note_replace(source: Path, target: Path) -> None:
        happened.append(("replace", source.stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_file(tmp_path / "a", "content", fsync=lasting)
    file, folder = (tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino
    expected = [("sync", file), ("replace", file), ("sync", folder)]
    assert happened == (expected if lasting else [("replace", file)])


def test_a_sealed_object_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    content = {"scale": 12.5, "name": "雪", "none": None, "list": [1, 2, {"deep": True}]}
    write_json_checksummed(tmp_path / "a.json", content)
    assert read_json_checksummed(tmp_path / "a.json") == content
    whole = (tmp_path / "a.json").read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            (tmp_path / "a.json").write_bytes(data)
            with suppress(ValueError):
                assert read_json_checksummed(tmp_path / "a.json") == content  # only white space has changed
    for damaged in (b"", b"{}", b"[]", whole[: len(whole) // 2], b"\0" * len(whole)):
        (tmp_path / "a.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"written|Expecting|column"):
            read_json_checksummed(tmp_path / "a.json")


def test_what_was_left_behind_is_swept_but_not_what_is_being_written(tmp_path: Path) -> None:
    for name in (f"{TEMP_PREFIX}old", f"{TEMP_PREFIX}new", "mine"):
        (tmp_path / name).touch()
    os.utime(tmp_path / f"{TEMP_PREFIX}old", (0, 0))
    remove_stale_temp(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{TEMP_PREFIX}new", "mine"}
    remove_stale_temp(tmp_path, age=0)
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}


# ---------------------------------------------------------------- one writer


def hold(folder: Path, pipe: Connection) -> None:
    with exclusive_lock(folder):
        pipe.send("mine")
        pipe.recv()


def test_a_folder_has_one_writer_who_is_named_and_whose_end_frees_it(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path / "a", there))
    process.start()
    assert here.recv() == "mine"
    with pytest.raises(BlockingIOError) as refused, exclusive_lock(tmp_path / "a"):
        pass
    message = describe_error(refused.value)
    assert re.fullmatch(
        rf"Another process \({process.pid} on .+, since \d{{4}}-.+\) is writing to {tmp_path / 'a'} now: "
        "wait until it is done, or choose another folder.",
        message,
    )
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "a" / LOCK).exists()  # it could not clear away, and does no harm
    with exclusive_lock(tmp_path / "a"):
        assert json.loads((tmp_path / "a" / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / "a" / LOCK).exists()
    process.close()


def test_who_is_patient_gets_the_folder_after_the_other(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path, there))
    process.start()
    assert here.recv() == "mine"
    here.send("go")
    began = time.monotonic()
    with exclusive_lock(tmp_path, timeout=60):
        pass
    assert time.monotonic() - began < 60
    process.join()
    process.close()


def test_a_folder_made_for_nothing_is_taken_away_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), exclusive_lock(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    with exclusive_lock(tmp_path / "new"):
        (tmp_path / "new" / "a").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "There is no room left where /x/y lies: free some, or choose another folder, and try it again."),
        (errno.EDQUOT, "There is no room left where /x/y lies"),
        (errno.EACCES, "/x/y may not be read or written (Permission denied): change its permissions"),
        (errno.EROFS, "/x/y may not be read or written (Read-only file system)"),
        (errno.ENOTDIR, "/x/y is in the way (Not a directory): move it, or choose another folder, and try it again."),
        (errno.EIO, "[Errno 5] Input/output error: '/x/y'"),
    ],
)
def test_errors_say_what_mends_them(code: int, words: str) -> None:
    assert describe_error(OSError(code, os.strerror(code), "/x/y"), "try it again").startswith(words)
    assert describe_error(ValueError("just this")) == "just this"
