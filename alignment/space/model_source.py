"""Find the model of a Space: a folder that is sent along, or a model on the Hub that the Space fetches at one commit.

Place in the flow: `--model, --revision -> ModelSource (here) -> folder, card`. Nothing is fetched: the Space has to run
the commit that made the gallery, and the build of the gallery has left that on this machine.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from alignment.bundled import MODEL, ROOT
from alignment.model.checkpoints import checkpoint_files, checkpoint_folder


@dataclass(frozen=True)
class ModelSource:
    """The model of a Space.

    Attributes:
        name: folder in the Space, or Hub id.
        folder: on this machine, with `files`.
        revision: commit on the Hub; "" for a model that is sent along.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    revision: str = ""


def choose_model(name: str, revision: str | None = None) -> ModelSource:
    """Find a model on this machine by folder or Hub id; FileNotFoundError when there is none.

    `revision` is a branch, tag or commit on the Hub; by default the one fetched last.
    """
    is_local = Path(name).is_dir()
    try:
        folder = checkpoint_folder(name, revision, fetch=False)
    except FileNotFoundError as error:
        if is_local:
            raise
        wanted = f"{name} --revision {revision}" if revision else name
        raise FileNotFoundError(
            f"The model {name} is not on this machine: check the spelling, and run `hf download {wanted}`, or build "
            "the gallery with it, before the Space is published."
        ) from error
    files = checkpoint_files(folder)
    if not is_local:
        return ModelSource(name, folder, tuple(files), folder.name)
    card = ["README.md"] if (folder / "README.md").is_file() else []
    place = f"checkpoints/{safe_name(folder, 'model')}"
    is_bundled = folder.resolve() == (ROOT / MODEL).resolve()
    if place == MODEL and not is_bundled:
        place += "-2"
    return ModelSource(MODEL if is_bundled else place, folder, (*card, *files))


def safe_name(folder: Path, otherwise: str) -> str:
    """Return the name of a folder in characters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip(".-") or otherwise
