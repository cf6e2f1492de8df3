"""Stage all files of a Space in a folder: the same for a dry run, for an export and for the Hub.

Place in the flow: `model, gallery -> folder (here) -> checks -> the Hub`. Files are chosen by name: those of the app,
its gallery and its model. Hidden files, caches, tests and the packages that only training needs are left out.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from alignment.bundled import GALLERY, MODEL, ROOT
from alignment.space.gallery import copy_gallery
from alignment.space.model_source import ModelSource, safe_name

TITLE = "Image-Text Alignment"
THUMBNAIL = "assets/screenshots/search_en.png"

_FILES = (
    "app.py", "LICENSE", "alignment/**/*.py", "alignment/sample_pictures/*", "assets/ui/**/*",
    "assets/parallel_captions.jsonl", THUMBNAIL,
)  # fmt: skip
_STARTER, _SOURCES = "assets/gallery/**/*", "assets/gallery/sources/*"  # sources: the cohort of another model
_NOT_SERVED = ("alignment/train/", "alignment/compact/", "alignment/space/")
_PREINSTALLED = ("gradio", "huggingface-hub")
_CPU_TORCH = "https://download.pytorch.org/whl/cpu"  # the wheels on PyPI depend on gigabytes of CUDA libraries
_FRONT: dict[str, Any] = {
    "emoji": "🔎", "colorFrom": "indigo", "colorTo": "gray", "license": "apache-2.0",
    "sdk": "gradio", "python_version": "3.12", "app_file": "app.py",
    "short_description": "Search pictures by caption and captions by picture",  # the Hub refuses over 60 characters
    "tags": ["image-text-retrieval", "cross-modal-retrieval", "contrastive-learning"],
}  # fmt: skip
_CARD = """\
---
{front}
---

# {title}

Drop in a picture and read the captions that fit. Type a caption, in English or Chinese, and see the pictures that fit.
Look at the similarity matrix that decides both. What you drop in is kept for your visit alone.

Model: {model}.
"""


@dataclass(frozen=True)
class Space:
    """What is to be published.

    Attributes:
        repo_id: "USER/NAME".
        gallery: the gallery's folder; None for the bundled one.
        hardware: such as "zero-a10g"; None for the Hub's default.
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
        """Folder of the gallery in the Space."""
        return f"galleries/{safe_name(self.gallery, 'gallery')}" if self.gallery else GALLERY

    @property
    def variables(self) -> dict[str, str]:
        """The Space's environment variables, which are public."""
        revision = {"ALIGNMENT_REVISION": self.model.revision} if self.model.revision else {}
        own = {"ALIGNMENT_MODEL": self.model.name, **revision, "ALIGNMENT_GALLERY": self.place}
        return {**own, "GRADIO_SSR_MODE": "False", **self.more}


def stage(space: Space, folder: Path) -> str:
    """Write the Space into a new folder; returns a sentence that says what becomes public, "" if nothing new does.

    Raises:
        FileNotFoundError: when a source file is missing.
        FileExistsError: when the folder exists.
        ValueError: when another model made the gallery, or the title is empty.
    """
    if space.gallery is None and space.model.name != MODEL:
        raise ValueError(
            "The gallery that comes along belongs to the compact model; another one needs its own. Build it, and name "
            f"it with --gallery: python -m alignment.gallery build PHOTOS --out my_gallery --model {space.model.name}"
        )
    if not (ROOT / "requirements.txt").is_file():
        raise FileNotFoundError("A Space is published from a clone of the repository; an installed wheel lacks a part.")
    folder.mkdir(parents=True)
    for path in _chosen(*_FILES, _SOURCES if space.gallery else _STARTER):
        _copy(ROOT / path, folder / path)
    if not space.model.revision:
        for name in space.model.files:
            _copy(space.model.folder / name, folder / space.model.name / name)
    note = copy_gallery(space.gallery, folder / space.place, space.model) if space.gallery else ""
    (folder / "README.md").write_text(card(space), "utf-8", newline="\n")
    (folder / "requirements.txt").write_text(requirements(space.hardware), "utf-8", newline="\n")
    return note


def contents(folder: Path) -> dict[str, int]:
    """List a folder's files with their sizes in bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def card(space: Space) -> str:
    """Return README.md: the configuration, which the Hub reads, and a description; ValueError without a title."""
    title, model = " ".join(space.title.split()), space.model  # a line break could end the front matter
    if not title:
        raise ValueError("A Space needs a title.")
    data = SpaceCardData(
        title=title,
        sdk_version=version("gradio"),
        thumbnail=f"https://huggingface.co/spaces/{space.repo_id}/resolve/main/{THUMBNAIL}",
        **_FRONT,
        models=[model.name] if model.revision else None,
        preload_from_hub=[f"{model.name} {','.join(model.files)} {model.revision}"] if model.revision else None,
        suggested_hardware=space.hardware or "cpu-basic",
    )
    link = f"[{model.name}](https://huggingface.co/{model.name})" if model.revision else f"`{model.name}`"
    return _CARD.format(front=data.to_yaml(), title=title, model=link)


def requirements(hardware: str | None) -> str:
    """Return the Space's requirements.txt: the versions that are installed on this machine."""
    lines = ["# What the app needs, in the versions that it was tried with; the Space itself brings Gradio along."]
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        name = re.split(r"[^A-Za-z0-9._-]", line)[0]
        if name and name not in _PREINSTALLED:
            on_cpu = name == "torch" and (hardware or "cpu").startswith("cpu")
            lines += [f"--extra-index-url {_CPU_TORCH}"] * on_cpu
            lines.append(f"{name}=={version(name).partition('+')[0]}{'+cpu' * on_cpu}")
    return "".join(f"{line}\n" for line in lines)


def _chosen(*patterns: str) -> Iterator[str]:
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            hidden = any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
            if path.is_file() and not path.is_symlink() and not hidden and not name.startswith(_NOT_SERVED):
                yield name


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(os.path.realpath(source), target)  # the Hub's cache consists of links
