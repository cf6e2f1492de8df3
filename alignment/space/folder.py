"""Stage all files of a Space in a folder: the same for a dry run, for an export and for the Hub.

Place in the flow: `model, gallery -> folder (here) -> checks -> the Hub`. Files are chosen by name: those of the app,
its gallery and its model. Hidden files, caches, tests and the packages that only training needs are left out.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from alignment.bundled import GALLERY, MODEL, ROOT
from alignment.gallery.database import KINDS, GalleryDatabase
from alignment.gallery.records import FileFingerprint, Picture, rebuild_command
from alignment.gallery.writer import write_gallery
from alignment.model import DualEncoder
from alignment.model.checkpoints import checkpoint_files, checkpoint_folder
from alignment.space.checks import check_folder, private_paths

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
class ModelSource:
    """The model of a Space: sent along, or fetched there from the Hub at one commit, that of the gallery's build."""

    name: str  # folder in the Space, or Hub id
    folder: Path  # on this machine
    files: tuple[str, ...]  # in it
    revision: str = ""  # commit on the Hub; "" for a model that is sent along


def choose_model(name: str, revision: str | None = None) -> ModelSource:
    """Find a model on this machine by folder or Hub id, at the revision fetched last by default, and fetch nothing.

    Raises FileNotFoundError when there is none.
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


@dataclass(frozen=True)
class Space:
    """What is to be published."""

    repo_id: str  # "USER/NAME"
    model: ModelSource
    gallery: Path | None = None  # its folder; None for the bundled one
    title: str = TITLE
    hardware: str | None = None  # such as "zero-a10g"; None for the Hub's default
    more: Mapping[str, str] = field(default_factory=dict)  # further variables

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

    Raises FileNotFoundError when a source file is missing, FileExistsError when the folder exists, and ValueError when
    the title is empty or `copy_gallery` refuses the gallery.
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
    shutil.copyfile(source, target)  # follows links, of which the Hub's cache consists


def copy_gallery(source: Path, target: Path, model: ModelSource) -> str:
    """Write a gallery that may be public; returns a sentence that says what becomes public.

    A picture keeps its thumbnail, its captions, its credit and the bare name of its file. Its folder, size, date and
    hash are left out, and so are the source and the options of the build. The copy is a new database: the original's
    free pages may contain deleted rows. Raises FileNotFoundError without a gallery, and ValueError when another model
    made it, it is damaged, thumbnails are missing, or a caption contains a secret or the path it was built from.
    """
    database = GalleryDatabase(source, model.name)
    metadata = database.metadata
    if metadata.fingerprint != DualEncoder.load(model.folder, device="cpu").fingerprint:
        name, commit = (model.name, f" at {model.revision[:12]}") if model.revision else (str(model.folder), "")
        command = rebuild_command(source, name)
        raise ValueError(f"The gallery in {source} was not made by {name}{commit}. Build it anew with: {command}")
    originals, captions = database.records()
    by_id = {picture.id: picture for picture in originals}
    copies = (_public(picture, database.thumbnail(picture)) for picture in originals)
    pictures = [picture for picture in copies if picture]
    if missing := len(originals) - len(pictures):
        command = rebuild_command(source, metadata.model, metadata)
        raise ValueError(
            f"The gallery in {source} lacks the thumbnails of {missing} pictures. Rebuild it with: {command}"
        )
    embeds = {kind: (rows for _, rows in database.batches(kind)) for kind in KINDS}
    public, cohort = replace(metadata, model=model.name, source="", options=""), database.cohort()

    def thumbnail(picture: Picture) -> bytes | None:
        return database.thumbnail(by_id[picture.id])

    write_gallery(target, pictures, captions, embeds, database.embed_dim, public, cohort, thumbnail)
    check_folder(target, private_paths(Path(metadata.source)))
    return (
        f"Whoever may open the Space sees {sum(not picture.package for picture in pictures)} of your pictures as "
        f"thumbnails, with the names of their files, and {len(captions)} captions. The originals, and where they lie, "
        "stay on this machine."
    )


def _public(picture: Picture, webp: bytes | None) -> Picture | None:
    """Reduce a picture to its file name and a hash of its thumbnail; None if it has no thumbnail."""
    if picture.package:  # the Space installs the same package
        return picture
    if not webp:
        return None
    name = picture.source.replace("\\", "/").rpartition("/")[2]
    digest = hashlib.sha256(picture.id.encode() + webp).hexdigest()
    return replace(picture, source=name, root="", file=FileFingerprint(0, 0, digest))
