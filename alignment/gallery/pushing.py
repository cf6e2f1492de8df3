"""Move a gallery's embeddings to a Milvus server and back.

    python -m alignment.gallery push GALLERY --index http://host:19530
    python -m alignment.gallery pull GALLERY --index http://host:19530

A push that was interrupted goes on where it was, and one that is done finds nothing to do.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cached_property
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from alignment.atomic import exclusive_lock
from alignment.catalogue import Catalogue, read_catalogue
from alignment.gallery.remote import Remote, add_index_options
from alignment.gallery.sides import Rows
from alignment.gallery.storage import SIDES, fill, item_ids, items_of, open_gallery, open_sides, write_gallery

_PUSH = """\
Copy a gallery's embeddings and tags to a Milvus server. The gallery folder stays as it is and is still needed: it holds
captions, thumbnails and the model's stamp. What lies in its image_embeds-* and text_embeds-* folders may be deleted
afterwards. Run the command again after an interruption, or when the gallery has changed: only what is missing is sent,
and what is no longer in the gallery is taken out at the end.

User and password, or an API key, are read from the environment: ALIGNMENT_INDEX_TOKEN.
"""


def add_push(commands: Any) -> None:
    """Add the commands `push` and `pull`."""
    raw = argparse.RawDescriptionHelpFormatter
    push = commands.add_parser(
        "push", help="copy the embeddings to a Milvus server", description=_PUSH, formatter_class=raw
    )
    push.set_defaults(run=_push)
    push.add_argument("--dry-run", action="store_true", help="say what would be sent and taken out, and change nothing")
    push.add_argument("--drop", action="store_true", help="delete the gallery's collections on the server instead")
    pull = commands.add_parser("pull", help="copy the embeddings back from a Milvus server into the gallery folder")
    pull.set_defaults(run=_pull)
    for parser in (push, pull):
        parser.add_argument("gallery", type=expanduser, metavar="GALLERY", help="the gallery folder")
        add_index_options(parser, required=True)


def _opened(args: argparse.Namespace) -> tuple[Path, Catalogue, Remote]:
    folder = Path(args.gallery)
    remote = Remote.of(args.index, folder, args.index_name)
    assert remote is not None
    return folder, read_catalogue(folder, "MODEL"), remote


def _push(args: argparse.Namespace) -> int:
    folder, catalogue, remote = _opened(args)
    if args.drop:
        return _drop(catalogue, remote)
    for number, name in enumerate(SIDES):
        if items := items_of(catalogue, name):
            _push_side(name, catalogue, _Local(folder, catalogue, number, len(items)), remote, args.dry_run)
    if old := remote.left_behind(catalogue.stamp.fingerprint, SIDES):
        names = ", ".join(f"{index.name} ({len(index)} rows)" for index in old)
        print(f"Of earlier models there is still {names}: push --drop deletes all, and the next push sends anew.")
    return 0


def _push_side(name: str, catalogue: Catalogue, rows: _Local, remote: Remote, dry_run: bool) -> None:
    collection = remote.collection(name, catalogue.stamp.fingerprint)
    if dry_run:
        ids = item_ids(items_of(catalogue, name))
        there = [remote.held(index, ids) for index in remote.sides(catalogue.stamp.fingerprint, [name])]
        held = torch.cat([torch.empty(0, dtype=torch.int64), *there])
        sent, gone = int((~torch.isin(ids, held)).sum()), int((~torch.isin(held, ids)).sum())
        print(f"{collection}: {len(rows)} rows, {sent} to be sent, {gone} to be taken out; nothing was changed")
        return
    with tqdm(desc=collection, unit=" rows", total=len(rows), dynamic_ncols=True) as bar:
        filled = fill(catalogue, name, rows, remote, bar.update)
        filled.settle()
    sent, gone = len(filled.missing), len(filled.stale)
    print(f"{collection}: {len(rows)} rows, {sent} sent, {len(rows) - sent} were there, {gone} taken out")


def _drop(catalogue: Catalogue, remote: Remote) -> int:
    fingerprint = catalogue.stamp.fingerprint
    for index in [*remote.sides(fingerprint, SIDES), *remote.left_behind(fingerprint, SIDES)]:
        count = len(index)
        index.drop()
        print(f"{index.name}: deleted, {count} rows")
    return 0


def _pull(args: argparse.Namespace) -> int:
    folder, catalogue, remote = _opened(args)
    with exclusive_lock(folder):
        write_gallery(folder, replace(catalogue, elsewhere=()), open_sides(folder, catalogue, remote=remote))
    print(f"{folder}: {len(catalogue.pictures)} pictures and {len(catalogue.captions)} captions are here again")
    return 0


class _Local:
    """The embeddings of a side in the gallery folder; opened when the first is wanted, as they may be gone."""

    def __init__(self, folder: Path, catalogue: Catalogue, number: int, count: int) -> None:
        self._folder, self._catalogue, self._number, self._count = folder, catalogue, number, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, positions: Tensor) -> Tensor:
        return self._side[positions]

    @cached_property
    def _side(self) -> Rows:
        _, *sides = open_gallery(self._folder, "MODEL")  # with a look at every byte: damaged rows are not sent on
        return sides[self._number]
