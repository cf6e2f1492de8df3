"""Floor 3, the gallery: precompute, persist, stamp and search embeddings.

Place in the flow: `SOURCE -> records (pairs, catalogue) -> embeddings -> gallery (here) -> matches -> engine`. A
gallery knows which model made it and refuses to be searched with the embeddings of another.

    python -m alignment.gallery build SOURCE --out DIR [--model PATH_OR_HUB_ID]
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from alignment.catalogue import (
    Caption,
    Catalogue,
    FileState,
    Picture,
    Stamp,
    is_hand_written,
    read_captioned,
    read_catalogue,
    read_hand_written,
    rebuild_command,
    write_catalogue,
)
from alignment.index import Index
from alignment.model import DualEncoder
from alignment.pairs import read_pairs
from alignment.preprocess import InputError, open_image
from alignment.similarity import logits_per_image, match_probabilities

logger = logging.getLogger(__name__)

Item = TypeVar("Item", Picture, Caption)

THUMBNAIL_PIXELS = 320
DEFAULT_MODEL = "checkpoints/compact"
_CHUNK = 16  # pictures held decoded at a time; one of 50 megapixels takes 150 MB
_THUMBNAILS = "thumbnails"


@dataclass(frozen=True)
class Match(Generic[Item]):
    """One search result.

    Attributes:
        rank: from 1.
        item: what was found.
        similarity: cosine, in [-1, 1].
        probability: the model's softmax over all candidates of the search, or its sigmoid for this one alone.
    """

    rank: int
    item: Item
    similarity: float
    probability: float


class Gallery:
    """Pictures and captions with their embeddings: the candidates of every search.

    Attributes:
        pictures: in the order of the rows of `image_embeds`.
        captions: in the order of the rows of `text_embeds`.
        image_embeds: (num_pictures, embed_dim) float32, unit norm.
        text_embeds: (num_captions, embed_dim) float32, unit norm.
        stamp: the model they belong to.
        folder: where the thumbnails lie, if there are any.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        captions: Sequence[Caption],
        image_embeds: Tensor,
        text_embeds: Tensor,
        stamp: Stamp,
        *,
        folder: Path | None = None,
    ) -> None:
        """Put the pieces together; embeddings may be half precision.

        Raises:
            ValueError: when there is not one embedding for each item.
        """
        if len(pictures) != len(image_embeds) or len(captions) != len(text_embeds):
            raise ValueError(
                f"{len(pictures)} pictures have {len(image_embeds)} embeddings and {len(captions)} captions "
                f"{len(text_embeds)}: each item needs one."
            )
        self.pictures, self.captions = tuple(pictures), tuple(captions)
        self.image_embeds = functional.normalize(image_embeds.float(), dim=-1)
        self.text_embeds = functional.normalize(text_embeds.float(), dim=-1)
        self.stamp = replace(stamp, num_pictures=len(pictures), num_captions=len(captions))
        self.folder = folder
        self._image_index, self._text_index = Index(self.image_embeds), Index(self.text_embeds)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: DualEncoder) -> Gallery:
        """Read a gallery that this encoder made.

        Pictures inside a package that is not installed here are left out, with a line in the log.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when another model made it, or it is damaged. Both errors say what to run.
        """
        folder = Path(folder)
        stored = read_catalogue(folder, encoder.name)
        stamp = stored.stamp
        if stamp.fingerprint != encoder.fingerprint:
            raise ValueError(
                f"The gallery in {folder} was made by the model {stamp.model} ({stamp.fingerprint[:12]}), but the one "
                f"in use is {encoder.name} ({encoder.fingerprint[:12]}), and their embeddings cannot be compared. "
                f"Rebuild it with: {rebuild_command(folder, encoder.name, stamp)}"
            )
        rows = _rows_at_hand(stored.pictures)
        pictures = [stored.pictures[row] for row in rows]
        return cls(pictures, stored.captions, stored.image_embeds[rows], stored.text_embeds, stamp, folder=folder)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the gallery with its thumbnails; what lay there before stays usable until the last moment."""
        folder = Path(folder)
        write_catalogue(
            folder, Catalogue(self.pictures, self.captions, self.image_embeds, self.text_embeds, self.stamp)
        )
        if self.folder and (self.folder / _THUMBNAILS).is_dir() and self.folder.resolve() != folder.resolve():
            shutil.copytree(self.folder / _THUMBNAILS, folder / _THUMBNAILS, dirs_exist_ok=True)

    @property
    def languages(self) -> tuple[str, ...]:
        """The known languages of the captions, in order of appearance."""
        return tuple(dict.fromkeys(caption.lang for caption in self.captions if caption.lang))

    def thumbnail(self, picture: Picture) -> Path:
        """Find what to show of a picture: its thumbnail, or the file itself if it is a package's."""
        if picture.package or self.folder is None:
            return picture.path
        return self.folder / _THUMBNAILS / f"{picture.id}.webp"

    def search_images(self, text_embed: Tensor, k: int) -> list[Match[Picture]]:
        """Find the k pictures that fit a caption best; fewer where the gallery holds fewer.

        Args:
            text_embed: (embed_dim,) or (1, embed_dim), unit norm.
            k: how many.

        Raises:
            ValueError: on an embedding of another shape, or a negative k.
        """
        return self._search(self._image_index, self.pictures, text_embed, k)

    def search_captions(self, image_embed: Tensor, k: int, *, lang: str | None = None) -> list[Match[Caption]]:
        """Find the k captions that fit a picture best; as `search_images`.

        Args:
            image_embed: (embed_dim,) or (1, embed_dim), unit norm.
            k: how many.
            lang: let only captions of this language compete; no match when there are none.
        """
        subset = None if lang is None else [row for row, caption in enumerate(self.captions) if caption.lang == lang]
        return self._search(self._text_index, self.captions, image_embed, k, subset)

    def _search(
        self, index: Index, items: Sequence[Item], query: Tensor, k: int, subset: list[int] | None = None
    ) -> list[Match[Item]]:
        if k < 0 or query.dim() > 2 or (query.dim() == 2 and len(query) != 1):
            raise ValueError(f"A search takes one embedding and a k of at least 0, not {tuple(query.shape)} and {k}.")
        rows = None if subset is None else torch.tensor(subset, dtype=torch.int64)
        # All candidates are asked for, not only k: the softmax runs over all of them.
        similarity, ids = index.search(query.reshape(1, -1), len(index), subset=rows)
        bias = self.stamp.logit_bias
        logits = logits_per_image(similarity, self.stamp.logit_scale, bias)
        probabilities = match_probabilities(logits, dim=1, logit_bias=bias)
        best = zip(ids[0, :k].tolist(), similarity[0, :k].tolist(), probabilities[0, :k].tolist(), strict=True)
        return [Match(rank, items[row], cosine, share) for rank, (row, cosine, share) in enumerate(best, 1)]


def _rows_at_hand(pictures: Sequence[Picture]) -> list[int]:
    """Leave out pictures of packages that are not there; the user's own have thumbnails and are kept anyway."""
    missing: Counter[str] = Counter()
    rows = []
    for row, picture in enumerate(pictures):
        if picture.package and not _exists(picture):
            missing[picture.package] += 1
        else:
            rows.append(row)
    for package, count in missing.items():
        logger.warning("%d pictures of the package %s are left out: it is not installed here.", count, package)
    return rows


def _exists(picture: Picture) -> bool:
    try:
        return picture.path.is_file()
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- building


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        encoded: how many "pictures" and "captions" went through the model.
        reused: how many kept the embedding they had.
        skipped: name and reason of each picture that could not be read.
    """

    encoded: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def build_gallery(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encoder: DualEncoder,
    *,
    format: str | None = None,
    split: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    report: BuildReport | None = None,
) -> Gallery:
    """Embed pictures and captions into a gallery folder; what is in it already and has not changed is kept.

    A file counts as unchanged by size and time, then by content. Nothing is kept of another model. A picture that
    cannot be read is skipped, logged and reported. Until all is embedded, a gallery that lies there is not touched.

    Args:
        source: a folder of pictures, whatever `read_pairs` reads, or a hand-written list (see `read_hand_written`).
        out: the gallery folder, new or old.
        encoder: embeds.
        format: of the data set, where the found one is wrong.
        split: only this one of the data set.
        progress: called with (done, total) items.
        report: filled in as the build goes.

    Raises:
        FileNotFoundError: when there is no such source.
        ValueError: when it cannot be read, holds nothing that can, or is the gallery folder itself.
    """
    out = Path(out)
    pictures, captions, origin = _read_source(os.fspath(source), out, format, split)
    options = [word for name, value in (("--format", format), ("--split", split)) if value for word in (name, value)]
    stamp = Stamp(
        encoder.fingerprint, encoder.name, encoder.logit_scale, encoder.logit_bias, origin, shlex.join(options)
    )
    builder = _Builder(out, encoder, stamp, progress or (lambda done, total: None), report or BuildReport())
    builder.build(pictures, captions)
    return Gallery.load(out, encoder)


def _read_source(
    source: str, out: Path, format: str | None, split: str | None
) -> tuple[list[Picture], list[Caption], str]:
    """List what is to be embedded; also where it comes from, as an absolute path or Hub id."""
    folder, gallery = Path(source), os.path.join(os.path.abspath(out), "")
    origin = os.path.abspath(folder) if folder.exists() else source
    if os.path.join(origin, "") == gallery:
        raise ValueError(f"{source} cannot be the source and the gallery at once: choose another folder for --out.")
    if folder.is_dir() and format is None and split is None and is_hand_written(folder):
        return *read_hand_written(folder), origin
    pairs = read_pairs(source, format=format, split=split)
    images = [(pair.image, pair.captions) for pair in pairs if not pair.image.startswith(gallery)]
    return *read_captioned(images, origin if folder.is_dir() else ""), origin


class _Builder:
    """One build: what is known from the last one, and what becomes of it."""

    def __init__(
        self,
        out: Path,
        encoder: DualEncoder,
        stamp: Stamp,
        progress: Callable[[int, int], None],
        report: BuildReport,
    ) -> None:
        self.out, self.encoder, self.stamp, self.progress, self.report = out, encoder, stamp, progress, report
        self.old = self._reusable()
        self.rows: dict[str, Tensor] = {}  # of a picture, by the hash of its file
        self.texts: dict[str, Tensor] = {}  # of a caption, by its text
        self.files: dict[str, FileState] = {}  # of a picture, by its source
        if self.old is not None:
            states = [picture.file or FileState(0, 0, "") for picture in self.old.pictures]
            self.rows = {state.sha256: row for state, row in zip(states, self.old.image_embeds, strict=True)}
            texts = (caption.text for caption in self.old.captions)
            self.texts = dict(zip(texts, self.old.text_embeds, strict=True))
            sources = (picture.source for picture in self.old.pictures)
            self.files = dict(zip(sources, states, strict=True)) if self.old.stamp.source == stamp.source else {}

    def _reusable(self) -> Catalogue | None:
        """Read what this model made before; anything else is built anew."""
        try:
            old = read_catalogue(self.out, self.encoder.name)
        except (FileNotFoundError, ValueError) as error:
            logger.debug("Nothing to reuse: %s", error)
            return None
        return old if old.stamp.fingerprint == self.stamp.fingerprint else None

    def build(self, pictures: Sequence[Picture], captions: Sequence[Caption]) -> None:
        """Embed everything, then put it in place."""
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=self.out) as aside:
            read = self._encode_pictures(pictures, Path(aside), len(captions))
            lost = {picture.id for picture in pictures} - {picture.id for picture in read}
            kept = [caption for caption in captions if caption.scene not in lost]
            self._encode_captions(kept, len(read))
            if not read and not kept:
                raise ValueError(f"Nothing in {self.stamp.source} could be read, so no gallery was made.")
            self._put_in_place(read, kept, Path(aside))

    def _encode_pictures(self, pictures: Sequence[Picture], aside: Path, num_captions: int) -> list[Picture]:
        """Embed those that can be read and return them, each with the state of its file."""
        read: list[Picture] = []
        for start in range(0, len(pictures), _CHUNK):
            fresh: dict[str, Image.Image] = {}
            for picture in pictures[start : start + _CHUNK]:
                try:
                    read.append(self._look_at(picture, fresh, aside))
                except (InputError, OSError) as error:
                    self.report.skipped.append((picture.source, str(error)))
                    logger.warning("Skipped %s: %s", picture.source, error)
            rows = self.encoder.encode_images(list(fresh.values())).half()
            self.rows.update(zip(fresh, rows, strict=True))
            self.report.encoded["pictures"] += len(fresh)
            self.progress(min(start + _CHUNK, len(pictures)), len(pictures) + num_captions)
        self.report.reused["pictures"] = len(read) - self.report.encoded["pictures"]
        return read

    def _look_at(self, picture: Picture, fresh: dict[str, Image.Image], aside: Path) -> Picture:
        """Find out whether a picture's file has changed; if so, open it into `fresh` and make a thumbnail."""
        path, before = picture.path, self.files.get(picture.source)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        stat = path.stat()
        time = 0 if picture.package else stat.st_mtime_ns  # when a package was installed says nothing
        shown = bool(picture.package) or (self.out / _THUMBNAILS / f"{picture.id}.webp").is_file()
        if before and shown and time and (before.size, before.mtime_ns) == (stat.st_size, time):
            return replace(picture, file=before)
        with path.open("rb") as file:
            state = FileState(stat.st_size, time, hashlib.file_digest(file, "sha256").hexdigest())
        known = state.sha256 in self.rows or state.sha256 in fresh
        shown = shown and (bool(picture.package) or (before is not None and before.sha256 == state.sha256))
        if not (known and shown):
            image = open_image(path)
            if not picture.package:
                thumbnail = image.copy()
                thumbnail.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
                thumbnail.save(aside / f"{picture.id}.webp", quality=80)
            if not known:
                fresh[state.sha256] = image
        return replace(picture, file=state)

    def _encode_captions(self, captions: Sequence[Caption], num_pictures: int) -> None:
        texts = dict.fromkeys(caption.text for caption in captions)
        fresh = [text for text in texts if text not in self.texts]
        done, total = num_pictures + len(captions) - len(fresh), num_pictures + len(captions)
        embeds = self.encoder.encode_texts(fresh, progress=lambda count, _: self.progress(done + count, total)).half()
        self.texts.update(zip(fresh, embeds, strict=True))
        self.report.encoded["captions"] = len(fresh)
        self.report.reused["captions"] = len(captions) - len(fresh)
        self.progress(total, total)

    def _put_in_place(self, pictures: Sequence[Picture], captions: Sequence[Caption], aside: Path) -> None:
        image_embeds = [self.rows[picture.file.sha256] for picture in pictures if picture.file]
        text_embeds = [self.texts[caption.text] for caption in captions]
        none = torch.empty(0, self.encoder.embed_dim, dtype=torch.float16)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        new = Catalogue(
            pictures,
            captions,
            torch.stack(image_embeds) if image_embeds else none,
            torch.stack(text_embeds) if text_embeds else none,
            replace(self.stamp, num_pictures=len(pictures), num_captions=len(captions), built=now),
        )
        folder = self.out / _THUMBNAILS
        for thumbnail in aside.iterdir():
            folder.mkdir(exist_ok=True)
            os.replace(thumbnail, folder / thumbnail.name)
        if self.old is None or not _same(self.old, new):
            write_catalogue(self.out, new)
        wanted = {f"{picture.id}.webp" for picture in pictures if not picture.package}
        for thumbnail in folder.glob("*.webp"):
            if thumbnail.name not in wanted:
                thumbnail.unlink()


def _same(old: Catalogue, new: Catalogue) -> bool:
    """Whether only the date would change; such a gallery is left alone, for the sake of version control."""
    return replace(old.stamp, built=new.stamp.built) == new.stamp and old.lines() == new.lines()


# ---------------------------------------------------------------- command


_HELP = """\
Embed pictures and captions once, so that the app can search them at once.

SOURCE may be
  a folder of pictures    such as ~/Photos; everything below it counts, but hidden files and folders do not
  a captioned data set    a CSV, TSV or JSON-lines file with the columns `image` and `caption`, or the folder or the
                          annotation file of Flickr8k, Flickr30k or COCO; its captions can then be found as well
  OWNER/NAME[@REVISION]   a data set on the Hugging Face Hub (pip install '.[hub]')
  a hand-written list     a folder with pictures.jsonl and captions.jsonl, such as assets/gallery/sources
"""
_EXAMPLES = """\
examples:
  python -m alignment.gallery build ~/Photos --out my_gallery
  python app.py --gallery my_gallery

  python -m alignment.gallery build captions.csv --out my_gallery --model openai/clip-vit-base-patch32
  python app.py --gallery my_gallery --model openai/clip-vit-base-patch32

Run the same command again after pictures came, went or changed: only new ones are encoded. A gallery belongs to the
model that made it; with another --model everything is encoded again. Pictures that cannot be read are named and
skipped, and until the end of a build the old gallery stays as it is. Your pictures are not copied; DIR gets small
thumbnails.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return _build(args)
    except KeyboardInterrupt:
        print(f"\nInterrupted; what lay in {args.out} is as it was.", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:  # what the person who typed the command can mend
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m alignment.gallery", description="Make galleries to search.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser(
        "build",
        help="embed pictures and captions (build --help says more)",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("source", metavar="SOURCE", help="what to embed, see above")
    build.add_argument(
        "--out", metavar="DIR", required=True, help="the gallery folder, new or to be brought up to date"
    )
    build.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id (default: %(default)s)")
    build.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    build.add_argument("--split", help="only this part of a data set, such as train, dev or test")
    build.add_argument("--format", help="of the data set, where the found one is wrong: csv, jsonl, coco, folder, ...")
    return parser


def _build(args: argparse.Namespace) -> int:
    encoder = DualEncoder.load(args.model, revision=args.revision)
    report = BuildReport()
    with tqdm(desc="Embedding", unit=" items", dynamic_ncols=True) as bar, logging_redirect_tqdm():

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        gallery = build_gallery(
            args.source, args.out, encoder, format=args.format, split=args.split, progress=show, report=report
        )
    print(f"{args.out}: {len(gallery.pictures)} pictures and {len(gallery.captions)} captions, by {encoder.name}.")
    for kind in ("pictures", "captions"):
        print(f"  {kind}: {report.encoded[kind]} encoded, {report.reused[kind]} reused")
    print(f"  skipped: {len(report.skipped)}{', named above' if report.skipped else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
