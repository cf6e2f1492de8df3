"""The result folder: who may write to it, and what an interrupted run notes down in it.

Place in the flow: `run` claims the folder first of all, and reads the notes where it is to go on.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from alignment.durable import ASIDE, LOCK, read_sealed, write_sealed
from alignment.model import best_device
from alignment.train.prepare import Prepared
from alignment.train.settings import Recipe, TrainConfig

SETTINGS = "settings.json"  # what a resumed run goes on with
RECORD = "run.json"  # what a finished run leaves
_FREE = ("output", "minutes")  # options that may change when a run is gone on with


@dataclass(frozen=True)
class ResumeState:
    """What a run noted down at its start, so that it can be gone on with.

    Attributes:
        config: as given.
        recipe: with every choice made.
        started: ISO 8601.
        command: that began it, for the report.
        data_digest: of what it learns from and is measured on.
        base_fingerprint: of the start weights.
    """

    config: TrainConfig
    recipe: Recipe
    started: str
    command: str
    data_digest: str
    base_fingerprint: str

    def write(self, folder: Path) -> None:
        """Note it down; whoever is killed meanwhile leaves no half of it."""
        write_sealed(folder / SETTINGS, asdict(self))

    def check_options(self, config: TrainConfig) -> None:
        """Refuse options that differ from what the run began with; what is None was not given.

        Raises:
            ValueError: naming them.
        """
        given = {name: value for name, value in config.as_dict().items() if value not in (None, "")}
        began, chosen = self.config.as_dict(), asdict(self.recipe)
        began["device"] = began["device"] or best_device()
        differing = [
            f"--{name.replace('_', '-')} {value} (it began with {began[name] if began[name] else chosen.get(name)})"
            for name, value in given.items()
            if name not in _FREE and not any(_is_same(value, settled.get(name)) for settled in (began, chosen))
        ]
        if differing:
            raise ValueError(
                f"--resume goes on with the options of the start, and these differ: {', '.join(differing)}. Leave them "
                "out, or start a new run with another --output."
            )

    def resume_config(self, config: TrainConfig) -> TrainConfig:
        """Return the settings to go on with: all as they were, but for the folder and the minutes."""
        return replace(self.config, output=config.output, minutes=config.minutes)

    def check(self, prepared: Prepared, base_fingerprint: str) -> None:
        """Refuse to go on with other data or from other weights.

        Raises:
            ValueError: saying which.
        """
        if self.data_digest != prepared.digest:
            raise ValueError("The data have changed since this run began; start a new one with another --output.")
        if self.base_fingerprint != base_fingerprint:
            raise ValueError("The start model has changed since this run began; start a new one with another --output.")


def _is_same(one: object, other: object) -> bool:
    """Whether two values of an option mean the same, be it by different paths."""
    return one == other or (
        isinstance(one, str) and isinstance(other, str) and Path(one).resolve() == Path(other).resolve()
    )


def acquire(folder: Path, *, resume: bool) -> None:
    """Make the result folder, or make sure that it holds a run to go on with.

    Raises:
        FileExistsError: when it holds something and this is to be a new run, or the run is finished.
        FileNotFoundError: when there is no run to go on with.
    """
    begun, finished = (folder / SETTINGS).exists(), (folder / RECORD).exists()
    if begun and finished:  # killed while it cleared away
        clear_away(folder)
    if resume and finished:
        raise FileExistsError(f"The run in {folder} is finished; fine-tune further with --model {folder}.")
    if resume and not begun:
        raise FileNotFoundError(f"There is no run in {folder} to go on with; leave --resume out to begin one.")
    if begun and not finished and not resume:
        raise FileExistsError(f"{folder} holds an unfinished run: go on with --resume, or choose another --output.")
    # A run killed before its first step leaves kept images, which the next one takes over, or half a note.
    if not resume and folder.exists() and (not folder.is_dir() or any(map(_is_foreign, folder.iterdir()))):
        raise FileExistsError(
            f"{folder} is not an empty folder, and nothing in it is overwritten: choose another --output."
        )
    folder.mkdir(parents=True, exist_ok=True)


def _is_foreign(path: Path) -> bool:
    return path.name not in ("kept", LOCK) and not path.name.startswith(ASIDE)


def clear_away(folder: Path) -> None:
    """Delete what only training needed, the note of how to go on last."""
    for leftover in ("checkpoints", "kept"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    (folder / SETTINGS).unlink(missing_ok=True)


def read_resume_state(folder: Path) -> ResumeState:
    """Read what an interrupted run noted down.

    Raises:
        ValueError: when the file is damaged.
    """
    try:
        values = read_sealed(folder / SETTINGS)
        config, recipe = TrainConfig.from_dict(values["config"]), Recipe(**values["recipe"])
        return ResumeState(**values | {"config": config, "recipe": recipe})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / SETTINGS} is damaged ({error}); start a new run with another --output.") from error
