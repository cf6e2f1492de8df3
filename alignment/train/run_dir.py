"""The result folder: acquired by one run, with the checkpoints and the settings that a resumed run needs.

Place in the flow: `run` acquires the folder first; `trainer` marks checkpoints and `feature_cache` its folders as
complete, by checksums that are written last.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from alignment.atomic import LOCK, TEMP_PREFIX, fsync_path
from alignment.checksum import read_json_checksummed, sha256_of, write_json_checksummed
from alignment.file_errors import FORBIDDEN, FULL
from alignment.model import best_device
from alignment.train.config import TrainConfig
from alignment.train.settings import TrainRecipe

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"  # written before training begins, deleted when it is finished
RECORD = "run.json"  # written when it is finished
CHECKPOINTS = "checkpoints"
FEATURES = "kept"
WEIGHTS = "model.safetensors"  # of a checkpoint
_CHECKSUMS = "complete"
_HASHES = {"data_digest": "data have", "base_fingerprint": "start model has"}
_FREE = ("output", "minutes")  # options that a resumed run may change
_NO_ROOM = 16 * 2**20  # bytes; PyTorch's write errors do not carry the error number
_WRITE_ERROR = re.compile(r"writ|inline_container|iostream")  # in the messages of PyTorch
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True)
class ResumeState:
    """The settings of a run, as `settings.json` has them: options as given, with every choice made, and hashes."""

    config: TrainConfig
    recipe: TrainRecipe
    started: str
    command: str
    data_digest: str
    base_fingerprint: str

    def resume(self, config: TrainConfig) -> ResumeState:
        """Return the state to resume with: as saved, but for the folder and the minutes of `config`.

        Raises ValueError naming the options of `config` that differ from those saved; None was not given.
        """
        saved, chosen = asdict(self.config), asdict(self.recipe)
        saved["device"] = saved["device"] or best_device()
        differing = [
            f"--{name.replace('_', '-')} {value} (it began with {saved[name] if saved[name] else chosen.get(name)})"
            for name, value in asdict(config).items()
            if name not in _FREE and not _is_same(value, None, "", saved[name], chosen.get(name))
        ]
        if differing:
            raise ValueError(
                f"--resume goes on with the options of the start, and these differ: {', '.join(differing)}. Leave them "
                "out, or start a new run with another --output."
            )
        return replace(self, config=replace(self.config, output=config.output, minutes=config.minutes))

    def check(self, now: ResumeState) -> None:
        """Raise ValueError when the data or the start weights have changed."""
        if changed := [what for name, what in _HASHES.items() if getattr(self, name) != getattr(now, name)]:
            raise ValueError(f"The {changed[0]} changed since this run began; start a new one with another --output.")


def _is_same(value: object, *others: object) -> bool:
    """Whether a value of an option is one of the others, or a path of the same file."""
    paths = [Path(other).resolve() for other in others if isinstance(other, str) and other]
    return value in others or (isinstance(value, str) and Path(value).resolve() in paths)


def acquire(folder: Path, *, resume: bool) -> None:
    """Create the result folder, or check that it holds a run to resume.

    Raises FileExistsError when a new run finds the folder in use, or the run to resume is finished, and
    FileNotFoundError when there is no run to resume.
    """
    begun, finished = (folder / SETTINGS).exists(), (folder / RECORD).exists()
    if begun and finished:  # killed during `clear_away`
        clear_away(folder)
    if resume and finished:
        raise FileExistsError(f"The run in {folder} is finished; fine-tune further with --model {folder}.")
    if resume and not begun:
        raise FileNotFoundError(f"There is no run in {folder} to go on with; leave --resume out to begin one.")
    if begun and not finished and not resume:
        raise FileExistsError(f"{folder} holds an unfinished run: go on with --resume, or choose another --output.")
    # A run killed before its first step leaves cached features, which the next one reuses, or a temporary file.
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    foreign = [name for name in names if name not in (FEATURES, LOCK) and not name.startswith(TEMP_PREFIX)]
    if not resume and (foreign or folder.is_file()):
        raise FileExistsError(
            f"{folder} is not an empty folder, and nothing in it is overwritten: choose another --output."
        )
    folder.mkdir(parents=True, exist_ok=True)


def clear_away(folder: Path) -> None:
    """Delete what only training needs, `settings.json` last."""
    for leftover in (CHECKPOINTS, FEATURES):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    (folder / SETTINGS).unlink(missing_ok=True)


def read_resume_state(folder: Path) -> ResumeState:
    """Read the state of an interrupted run; raises ValueError when the file is damaged."""
    try:
        values = read_json_checksummed(folder / SETTINGS)
        config, recipe = TrainConfig(**values["config"]), TrainRecipe(**values["recipe"])
        return ResumeState(**values | {"config": config, "recipe": recipe})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / SETTINGS} is damaged ({error}); start a new run with another --output.") from error


def mark_complete(folder: Path, name: str = _CHECKSUMS) -> None:
    """Flush a folder to disk and write the sha256 of its files to the file `name` in it."""
    for path in (*folder.rglob("*"), folder):
        fsync_path(path)
    write_json_checksummed(folder / name, {path.name: sha256_of(path) for path in sorted(folder.iterdir())})


def is_complete(folder: Path, name: str = _CHECKSUMS) -> bool:
    """Whether every file is there and as it was written."""
    try:
        return all(sha256_of(folder / file) == sha256 for file, sha256 in read_json_checksummed(folder / name).items())
    except (OSError, ValueError):
        return False


def last_checkpoint(folder: Path) -> Path | None:
    """Find the newest complete checkpoint, and delete incomplete and damaged ones."""
    last = None
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        if is_complete(path):
            last = path
        else:
            logger.warning("%s was not finished or is damaged, and is removed.", path)
            shutil.rmtree(path, ignore_errors=True)  # another process of the run may delete it at the same time
    return last


@contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Turn the write errors of safetensors and PyTorch into an `OSError` that names the file."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not _WRITE_ERROR.search(text):
            raise
        full = shutil.disk_usage(path.parent).free < _NO_ROOM
        named = (code for code in (*FULL, *FORBIDDEN) if os.strerror(code) in text)
        found = _RUST_ERRNO.search(text)
        code = int(found[1]) if found else next(named, errno.ENOSPC if full else errno.EIO)
        raise OSError(code, os.strerror(code), str(path)) from error
