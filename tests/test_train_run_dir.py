"""The result folder of a run: what is complete is on the disk, and errors of writing name the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignment.file_errors import describe_error
from alignment.train.run_dir import is_complete, mark_complete, wrap_write_errors

FULL = Path("/dev/full")  # writing to it fails as on a full disk


def test_a_complete_folder_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino) or fsync(handle))
    mark_complete(tmp_path)
    assert synced >= {path.stat().st_ino for path in (tmp_path, *tmp_path.iterdir())}
    assert is_complete(tmp_path)
    (tmp_path / "b").write_text("x")
    assert not is_complete(tmp_path)


@pytest.mark.parametrize(
    "write",
    [lambda: FULL.write_bytes(b"content"), lambda: torch.save(torch.zeros(10**6), FULL)],
    ids=["python", "torch"],
)
def test_a_full_disk_is_told_in_the_same_words_whatever_writes(write: Callable[[], object]) -> None:
    with pytest.raises(OSError, match=r"full|No space") as met, wrap_write_errors(FULL):
        write()
    assert met.value.errno in (errno.ENOSPC, errno.EIO)  # PyTorch does not say why
    assert str(FULL) in describe_error(met.value) or "no room left" in describe_error(met.value)


def test_safetensors_errors_are_errors_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="a'") as met, wrap_write_errors(tmp_path / "a"):
        save_file({"x": torch.zeros(3)}, tmp_path / "a")
    assert met.value.errno == errno.EISDIR


def test_other_errors_of_libraries_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="CUDA out of memory"), wrap_write_errors(FULL):
        raise RuntimeError("CUDA out of memory")
