"""The model of a Space: a folder that is sent along, or a model of the Hub that the Space fetches at one commit.

Place in the flow: `--model, --revision -> choice (here) -> folder, card`. Nothing is fetched: whoever has built a
gallery with a model of the Hub has it, and the commit that made the gallery is the one that the Space has to run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from alignment.bundled import MODEL, ROOT
from alignment.model.checkpoints import checkpoint_files, checkpoint_folder


@dataclass(frozen=True)
class ModelSource:
    """The model of a Space.

    Attributes:
        name: what the Space calls it: a folder of its own, or a Hub id.
        folder: where it lies here.
        files: the names of its files.
        revision: the commit on the Hub; "" for a model that is sent along.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    revision: str = ""


def choose_model(name: str, revision: str | None = None) -> ModelSource:
    """Find a model on this machine.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit on the Hub; by default what was fetched last.

    Raises:
        FileNotFoundError: when there is none.
    """
    sent = Path(name).is_dir()
    try:
        folder = checkpoint_folder(name, revision, fetch=False)
    except FileNotFoundError as error:
        if sent:
            raise
        wanted = f"{name} --revision {revision}" if revision else name
        raise FileNotFoundError(
            f"The model {name} is not on this machine: check the spelling, and run `hf download {wanted}`, or build "
            "the gallery with it, before the Space is published."
        ) from error
    files = checkpoint_files(folder)
    if not sent:
        return ModelSource(name, folder, tuple(files), folder.name)
    card = ["README.md"] if (folder / "README.md").is_file() else []
    return ModelSource(_place(folder), folder, (*card, *files))


def _place(folder: Path) -> str:
    """Say where a model lies in the Space; only the one that comes along may go by its name."""
    if folder.resolve() == (ROOT / MODEL).resolve():
        return MODEL
    place = f"checkpoints/{safe_name(folder, 'model')}"
    return f"{place}-2" if place == MODEL else place


def safe_name(folder: Path, otherwise: str) -> str:
    """Name a folder of the Space after one of this machine, in letters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip(".-") or otherwise
