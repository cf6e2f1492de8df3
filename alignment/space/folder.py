"""All files of a Space, laid out in a folder: the same for a look, for a trial run and for the Hub.

Place in the flow: `model, gallery -> folder (here) -> checks -> the Hub`. Files are chosen by name. What is not the
app's, its gallery's or its model's stays behind, and so do hidden files, caches, tests and what only training needs.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from alignment.bundled import GALLERY, MODEL, ROOT
from alignment.space.card import THUMBNAIL, TITLE, card
from alignment.space.gallery import copy_gallery
from alignment.space.model_source import ModelSource, safe_name

_FILES = (
    "app.py",
    "LICENSE",
    "alignment/**/*.py",
    "alignment/sample_pictures/*",
    "assets/ui/**/*",
    "assets/parallel_captions.jsonl",
    THUMBNAIL,
)
_STARTER = ("assets/gallery/**/*",)
_BACKGROUND = ("assets/gallery/sources/*",)  # of a second model, and of galleries that are built
_NOT_SERVED = ("alignment/train/", "alignment/compact/", "alignment/space/")
_OF_THE_SPACE = ("gradio", "huggingface-hub")  # it brings these along
_CPU_TORCH = "https://download.pytorch.org/whl/cpu"  # PyPI's brings gigabytes of CUDA libraries


@dataclass(frozen=True)
class Space:
    """What is to be published.

    Attributes:
        repo_id: "USER/NAME".
        model: what it runs.
        gallery: the gallery's folder; None for the one that comes along.
        title: shown on its card and tab.
        hardware: what it runs on, such as "zero-a10g"; None for what the Hub gives.
        more: further variables.
    """

    repo_id: str
    model: ModelSource
    gallery: Path | None = None
    title: str = TITLE
    hardware: str | None = None
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where the gallery lies in the Space."""
        return f"galleries/{safe_name(self.gallery, 'gallery')}" if self.gallery else GALLERY

    @property
    def variables(self) -> dict[str, str]:
        """The Space's environment; everybody may read it."""
        revision = {"ALIGNMENT_REVISION": self.model.revision} if self.model.revision else {}
        own = {"ALIGNMENT_MODEL": self.model.name, **revision, "ALIGNMENT_GALLERY": self.place}
        return {**own, "GRADIO_SSR_MODE": "False", **self.more}


def stage(space: Space, folder: Path) -> list[str]:
    """Write the Space into a new folder.

    Returns:
        Sentences on what becomes public.

    Raises:
        FileNotFoundError: when something is missing.
        ValueError: when gallery and model do not belong together.
        FileExistsError: when there is such a folder.
    """
    if space.gallery is None and space.model.name != MODEL:
        raise ValueError(
            "The gallery that comes along belongs to the compact model; another one needs its own. Build it, and name "
            f"it with --gallery: python -m alignment.gallery build PHOTOS --out my_gallery --model {space.model.name}"
        )
    if not (ROOT / "requirements.txt").is_file():
        raise FileNotFoundError("A Space is published from a clone of the repository; an installed wheel lacks a part.")
    folder.mkdir(parents=True)
    for path in _chosen(*_FILES, *(_BACKGROUND if space.gallery else _STARTER)):
        _copy(ROOT / path, folder / path)
    if not space.model.revision:
        for name in space.model.files:
            _copy(space.model.folder / name, folder / space.model.name / name)
    notes = copy_gallery(space.gallery, folder / space.place, space.model) if space.gallery else []
    text = card(space.repo_id, space.title, space.model, space.hardware)
    (folder / "README.md").write_text(text, "utf-8", newline="\n")
    (folder / "requirements.txt").write_text(requirements(space.hardware), "utf-8", newline="\n")
    return notes


def contents(folder: Path) -> dict[str, int]:
    """List a folder's files with their sizes in bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def requirements(hardware: str | None) -> str:
    """Write the Space's requirements.txt: the versions that are installed here, with which it was tried."""
    lines = ["# What the app needs, in the versions that it was tried with; the Space itself brings Gradio along."]
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        name = re.split(r"[^A-Za-z0-9._-]", line)[0]
        if name and name not in _OF_THE_SPACE:
            lines += _pinned(name, on_cpu=(hardware or "cpu").startswith("cpu"))
    return "".join(f"{line}\n" for line in lines)


def _pinned(name: str, *, on_cpu: bool) -> list[str]:
    number = version(name).partition("+")[0]
    if name == "torch" and on_cpu:
        return [f"--extra-index-url {_CPU_TORCH}", f"torch=={number}+cpu"]
    return [f"{name}=={number}"]


def _chosen(*patterns: str) -> Iterator[str]:
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            hidden = any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
            if path.is_file() and not path.is_symlink() and not hidden and not name.startswith(_NOT_SERVED):
                yield name


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(os.path.realpath(source), target)  # what the Hub's cache holds is links
