"""Where a gallery's embeddings lie: those of few items in one file beside the catalogue, those of many in an index.

Place in the flow: `gallery folder <-> catalogue and sides (here) <-> Gallery`. A side of many items is a folder such as
`image_embeds-0123456789ab`, called by the model's fingerprint, see `alignment.index.files`. Its rows go by ids made of
what they belong to, so that a row vouches for itself: a picture that changed has another id. When a gallery is
brought up to date, the new rows are added first, then the catalogue is replaced, and then the old rows are taken out.
Whoever is killed in between leaves rows that no item asks for, and these are overlooked, until `tidy` takes them out.
The large files are not written again. Or all of it lies on a Milvus server, see `alignment.gallery.remote`, under the
same ids.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from alignment.atomic import remove_stale_temp
from alignment.catalogue import (
    Caption,
    Catalogue,
    Picture,
    read_catalogue,
    rebuild_command,
    write_catalogue,
)
from alignment.gallery.remote import Filled, Remote
from alignment.gallery.sides import Rows, Side, has_many
from alignment.index import EmbeddedIndex

SIDES = ("image_embeds", "text_embeds")
_AT_ONCE = 16_384  # rows added at a time
_IN_MEMORY = 262_144  # rows after which those added are written down; an index holds twice as many while it does so


def open_sides(
    folder: Path, catalogue: Catalogue, pictures: Sequence[int] | None = None, remote: Remote | None = None
) -> tuple[Side, Side]:
    """Find the embeddings of a gallery's pictures and captions, wherever they lie.

    Args:
        folder: the gallery's.
        catalogue: what was read from it.
        pictures: only these of them; all if left out.
        remote: the server where they lie, if not in the folder.

    Raises:
        ValueError: when they are damaged, or not on the server; says what to run.
        OSError: when the server does not answer or refuses us.
    """
    if remote is not None:
        return _open_remote(catalogue, "image_embeds", remote, pictures), _open_remote(catalogue, "text_embeds", remote)
    try:
        return _open_side(folder, catalogue, "image_embeds", pictures), _open_side(folder, catalogue, "text_embeds")
    except PermissionError:  # not for a rebuild to mend
        raise
    except (OSError, ValueError) as error:
        raise _damaged(folder, catalogue, error) from error


def _open_side(folder: Path, catalogue: Catalogue, name: str, chosen: Sequence[int] | None = None) -> Side:
    items = items_of(catalogue, name)
    rows = range(len(items)) if chosen is None else chosen
    if name not in catalogue.elsewhere:
        embeds: Tensor = getattr(catalogue, name)
        tags = tags_of(items)
        return Side.in_memory(embeds[list(rows)], [tags[row] for row in rows])
    index = EmbeddedIndex.open(_place(folder, catalogue, name))
    if index.about.get("fingerprint") != catalogue.stamp.fingerprint:
        raise ValueError("Its embeddings were made by another model.")
    return Side.of_own(index, item_ids(items)[list(rows)])


def _open_remote(catalogue: Catalogue, name: str, remote: Remote, chosen: Sequence[int] | None = None) -> Side:
    items = items_of(catalogue, name)
    if not items:
        return Side.in_memory(getattr(catalogue, name))
    ids = item_ids(items)
    index = remote.open(name, catalogue.stamp.fingerprint, ids)
    shown = items if chosen is None else [items[row] for row in chosen]
    return Side(index, ids if chosen is None else ids[list(chosen)], lambda: (_tags(item) for item in shown))


def read_gallery(folder: Path, model: str) -> Catalogue:
    """Read a gallery folder with all embeddings, and every byte of them, to make another of it; as `read_catalogue`."""
    catalogue, images, texts = open_gallery(folder, model)
    rows = {"image_embeds": images, "text_embeds": texts}
    whole = {name: _halves(rows[name]) for name in catalogue.elsewhere}
    return replace(catalogue, elsewhere=(), **whole)  # type: ignore[arg-type]


def open_gallery(folder: Path, model: str, remote: Remote | None = None) -> tuple[Catalogue, Rows, Rows]:
    """Read a gallery folder to make another of it, with the embeddings of its pictures and captions.

    Every byte of these is looked at, but those of many items stay on the disk, or on the server; what is not there yet
    is looked for in the folder. Errors as of `check_gallery`.
    """
    try:
        catalogue = check_gallery(folder, model, remote)
    except ValueError:
        if remote is None:
            raise
        return open_gallery(folder, model)
    rows: dict[str, Rows] = {name: getattr(catalogue, name) for name in SIDES}
    if catalogue.elsewhere:
        sides = dict(zip(SIDES, open_sides(folder, catalogue, remote=remote), strict=True))
        rows |= {name: sides[name] for name in catalogue.elsewhere}
    return catalogue, rows["image_embeds"], rows["text_embeds"]


def check_gallery(folder: Path, model: str = "MODEL", remote: Remote | None = None) -> Catalogue:
    """Read every byte of a gallery folder but its thumbnails; which model made it does not matter.

    What lies on a server is only asked for.

    Raises:
        FileNotFoundError: when there is no gallery.
        ValueError: when it is damaged. Both say what to run.
        OSError: when the server does not answer or refuses us.
    """
    catalogue = read_catalogue(folder, model)
    sides = open_sides(folder, catalogue, remote=remote)
    try:
        for index in (side.index for side in sides):
            if isinstance(index, EmbeddedIndex):
                index.verify()
    except (OSError, ValueError) as error:
        raise _damaged(folder, catalogue, error) from error
    return catalogue


def _damaged(folder: Path, catalogue: Catalogue, error: Exception) -> ValueError:
    command = rebuild_command(folder, catalogue.stamp.model, catalogue.stamp)
    hint = " If it lies on a Milvus server, say --index." if isinstance(error, FileNotFoundError) else ""
    return ValueError(f"The gallery in {folder} is damaged. {error}{hint} Rebuild it with: {command}")


def _halves(rows: Rows) -> Tensor:
    parts = torch.arange(len(rows)).split(_AT_ONCE)
    return torch.cat([rows[positions].half() for positions in parts])


def write_gallery(
    folder: Path,
    catalogue: Catalogue,
    rows: tuple[Rows, Rows] | None = None,
    more: Path | None = None,
    remote: Remote | None = None,
) -> None:
    """Write a gallery folder; what lay there before stays usable until the last moment.

    Args:
        folder: new or old; nobody else writes to it, see `alignment.atomic.exclusive_lock`.
        catalogue: all of it; the embeddings may be left empty if `rows` are given.
        rows: embeddings of pictures and captions.
        more: a folder of files that go with it, see `write_catalogue`.
        remote: the server that gets the embeddings, instead of the folder.
    """
    both = dict(zip(SIDES, rows or (catalogue.image_embeds, catalogue.text_embeds), strict=True))
    if remote is not None:
        _write_remote(folder, catalogue, both, more, remote)
        return
    many = tuple(name for name, side in both.items() if has_many(len(side)))
    for name in many:
        _add(folder, catalogue, name, both[name])
    few = {name: _halves(side) for name, side in both.items() if name not in many and len(side)}
    write_catalogue(folder, replace(catalogue, elsewhere=many, **few), more)  # type: ignore[arg-type]
    tidy(folder, catalogue)


def _write_remote(
    folder: Path, catalogue: Catalogue, both: Mapping[str, Rows], more: Path | None, remote: Remote
) -> None:
    filled = {name: fill(catalogue, name, side, remote) for name, side in both.items() if len(side)}
    few = {name: _halves(side) for name, side in both.items() if not len(side)}
    write_catalogue(folder, replace(catalogue, elsewhere=tuple(filled), **few), more)  # type: ignore[arg-type]
    for side in filled.values():
        side.settle()
    for old in (old for name in SIDES for old in folder.glob(f"{name}-*")):
        shutil.rmtree(old, ignore_errors=os.name == "nt")


def fill(
    catalogue: Catalogue, name: str, rows: Rows, remote: Remote, progress: Callable[[int], object] | None = None
) -> Filled:
    """Put on the server what it lacks of a side.

    Args:
        catalogue: what the rows belong to.
        name: of the side.
        rows: of the side, by position; only those that are missing are looked up.
        remote: the server.
        progress: called with the number of rows that were added.

    Returns:
        The side, with `settle` yet to be called, once the catalogue is in its place.
    """
    items = items_of(catalogue, name)
    filled = remote.fill(name, catalogue.stamp.fingerprint, item_ids(items), rows)
    for positions in filter(len, filled.missing.split(_AT_ONCE)):
        filled.add(positions, rows[positions], [_tags(items[row]) for row in positions.tolist()])
        if progress is not None:
            progress(len(positions))
    filled.mark()
    return filled


def tidy(folder: Path, catalogue: Catalogue) -> None:
    """Take away what no item of a gallery asks for: rows, other models' indexes, what was left half-written."""
    for name in SIDES:
        place, items = _place(folder, catalogue, name), items_of(catalogue, name)
        for old in folder.glob(f"{name}-*"):
            if old != place or not has_many(len(items)):
                # Windows: the build that made few of many has the old rows mapped; the next one takes them away.
                shutil.rmtree(old, ignore_errors=os.name == "nt") if old.is_dir() else old.unlink()
        if has_many(len(items)):
            index = EmbeddedIndex.open(place)
            there = index.ids()
            if index.delete(there[~torch.isin(there, item_ids(items))]):
                index.save()
    remove_stale_temp(folder, age=0)


def _add(folder: Path, catalogue: Catalogue, name: str, rows: Rows) -> None:
    """Add the rows of a side that its index lacks."""
    place, items = _place(folder, catalogue, name), items_of(catalogue, name)
    ids, tags = item_ids(items), tags_of(items)
    try:
        index = EmbeddedIndex.open(place)
        index.verify()
    except PermissionError:
        raise
    except (OSError, ValueError):  # new, or so damaged that it has to be written anew
        if place.exists() and not place.is_dir():
            place.unlink()
        index = EmbeddedIndex(rows[torch.empty(0, dtype=torch.int64)])
    there, about, waiting = index.ids(), {"fingerprint": catalogue.stamp.fingerprint}, 0
    for positions in (~torch.isin(ids, there)).nonzero().flatten().split(_AT_ONCE):
        index.upsert(ids[positions], rows[positions].half(), [tags[row] for row in positions.tolist()])
        waiting += len(positions)
        if waiting >= _IN_MEMORY:
            index.save(place, about=about)
            waiting = 0
    index.save(place, about=about)


def _place(folder: Path, catalogue: Catalogue, name: str) -> Path:
    return folder / f"{name}-{catalogue.stamp.fingerprint[:12]}"


def items_of(catalogue: Catalogue, name: str) -> Sequence[Picture] | Sequence[Caption]:
    """List what the rows of a side belong to."""
    return catalogue.pictures if name == "image_embeds" else catalogue.captions


def item_ids(items: Sequence[Picture] | Sequence[Caption]) -> Tensor:
    """Name rows by what they belong to: (n,) int64, not negative; two items never share one.

    A collision among a million items has a chance of one in twenty million, and is refused by the index.
    """
    seen: Counter[str] = Counter()
    ids = []
    for item in items:
        if isinstance(item, Picture):
            text = f"{item.id}\0{item.source}\0{item.file.sha256 if item.file else ''}"
        else:
            text = f"{item.id}\0{item.lang}\0{item.text}"
        seen[text] += 1
        digest = hashlib.blake2b(f"{seen[text]}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        ids.append(int.from_bytes(digest, "big") >> 1)
    return torch.tensor(ids, dtype=torch.int64)


def tags_of(items: Sequence[Picture] | Sequence[Caption]) -> list[Collection[str]]:
    """Tag pictures with the folders they lie in, and captions with their language, "" if it is unknown."""
    return [_tags(item) for item in items]


def _tags(item: Picture | Caption) -> Collection[str]:
    return folders_of(item.source) if isinstance(item, Picture) else [item.lang]


def folders_of(source: str) -> list[str]:
    """List the folders around a picture: "holiday/2024/beach.jpg" lies in "holiday/2024" and in "holiday".

    A picture of an installed package, or far away from the folder that the gallery was built from, lies in none.
    """
    if os.path.isabs(source) or source.startswith("package:"):
        return []
    names = source.split("/")[:-1]
    return ["/".join(names[:end]) for end in range(len(names), 0, -1)]
