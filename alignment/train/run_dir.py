"""The result folder: acquired by one run, with the state that a resumed run needs.

Place in the flow: `run` acquires the folder first, and reads the state when it resumes.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from alignment.atomic import LOCK, TEMP_PREFIX, read_json_checksummed, write_json_checksummed
from alignment.model import best_device
from alignment.train.config import TrainConfig
from alignment.train.settings import TrainRecipe

SETTINGS = "settings.json"  # written before training begins, deleted when it is finished
RECORD = "run.json"  # written when it is finished
CHECKPOINTS = "checkpoints"
FEATURES = "kept"
_HASHES = {"data_digest": "data have", "base_fingerprint": "start model has"}
_FREE = ("output", "minutes")  # options that a resumed run may change


@dataclass(frozen=True)
class ResumeState:
    """The settings of a run, saved before training begins: options as given, with every choice made, and hashes."""

    config: TrainConfig
    recipe: TrainRecipe
    started: str
    command: str
    data_digest: str
    base_fingerprint: str

    def write(self, folder: Path) -> None:
        """Write `settings.json` atomically."""
        write_json_checksummed(folder / SETTINGS, asdict(self))

    def resume(self, config: TrainConfig) -> ResumeState:
        """Return the state to resume with: as saved, but for the folder and the minutes of `config`.

        Raises ValueError naming the options of `config` that differ from those saved; None was not given.
        """
        saved, chosen = asdict(self.config), asdict(self.recipe)
        saved["device"] = saved["device"] or best_device()
        differing = [
            f"--{name.replace('_', '-')} {value} (it began with {saved[name] if saved[name] else chosen.get(name)})"
            for name, value in asdict(config).items()
            if value not in (None, "")
            and name not in _FREE
            and not any(_is_same(value, known.get(name)) for known in (saved, chosen))
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


def _is_same(one: object, other: object) -> bool:
    """Whether two values of an option are equal, or paths of the same file."""
    are_texts = isinstance(one, str) and isinstance(other, str)
    return one == other or (are_texts and Path(str(one)).resolve() == Path(str(other)).resolve())


def acquire(folder: Path, *, resume: bool) -> None:
    """Create the result folder, or check that it holds a run to resume.

    Raises:
        FileExistsError: when a new run finds the folder in use, or the run to resume is finished.
        FileNotFoundError: when there is no run to resume.
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
    if not resume and folder.exists() and (not folder.is_dir() or any(map(_is_foreign, folder.iterdir()))):
        raise FileExistsError(
            f"{folder} is not an empty folder, and nothing in it is overwritten: choose another --output."
        )
    folder.mkdir(parents=True, exist_ok=True)


def _is_foreign(path: Path) -> bool:
    return path.name not in (FEATURES, LOCK) and not path.name.startswith(TEMP_PREFIX)


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
