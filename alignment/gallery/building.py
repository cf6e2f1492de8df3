"""Embed pictures and captions into a gallery folder; what has not changed is kept.

Place in the flow: `SOURCE -> records (pairs, catalogue) -> embeddings (here) -> gallery folder`. Threads read, hash and
decode ahead of the model: each file once, for its fingerprint, its thumbnail and the model's input together.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from alignment.ahead import ahead
from alignment.atomic import exclusive_lock
from alignment.calibration import Background
from alignment.catalogue import (
    Caption,
    Catalogue,
    FileState,
    Picture,
    Stamp,
    finish_writing,
    is_hand_written,
    read_captioned,
    read_hand_written,
)
from alignment.gallery.judging import background_name, build_background, fit_calibration
from alignment.gallery.looking import Look, Looker
from alignment.gallery.remote import Remote
from alignment.gallery.search import Gallery
from alignment.gallery.storage import Rows, open_gallery, tidy, write_gallery
from alignment.gallery.unfinished import THUMBNAILS, Unfinished
from alignment.model import DualEncoder
from alignment.pairs import Share, read_data
from alignment.preprocess import InputError, legible

logger = logging.getLogger(__name__)

_TEXTS_AT_ONCE = 4096  # after which some are written down
_FIRST_SHOWN = 32  # pictures from which a gallery that grows is worth a look
_AHEAD = 64  # pictures under way or waiting for the model, a megabyte each; only those under way are held decoded


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        encoded: how many "pictures" and "captions" went through the model.
        reused: how many kept the embedding they had.
        skipped: name and reason of each picture that could not be read.
        errors: what was raised for those whose file is to blame, by their name.
        left_out: reason -> what reading the source left out for it.
        repaired: what was read although something is wrong with it -> where.
        unread: files of captions in the source of which nothing could be read -> why.
        cut: captions that are longer than the model reads.
        unlisted: folders of the source that could not be listed.
        held: pictures, in those folders or not readable now, that the gallery keeps as they were.
    """

    encoded: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    errors: dict[str, InputError] = field(default_factory=dict)
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    repaired: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    cut: Sequence[str] = ()
    unlisted: Sequence[str] = ()
    held: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether all of the source could be looked at."""
        return not (self.unlisted or self.held or self.unread)


def build_gallery(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encoder: DualEncoder,
    *,
    format: str | None = None,
    split: str | None = None,
    calibrate: bool = True,
    progress: Callable[[int, int], None] | None = None,
    report: BuildReport | None = None,
    remote: Remote | None = None,
    growing: Callable[[Gallery], None] | None = None,
    like: Gallery | None = None,
    patience: float = 0,
) -> Gallery:
    """Embed pictures and captions into a gallery folder; what is in it already and has not changed is kept.

    A file counts as unchanged by size and time, then by content. Nothing is kept of another model. A picture that
    cannot be read is skipped, logged and reported; one that may not be read now, or lies in a folder that cannot be
    listed, stays as it was in the gallery. Until all is embedded, a gallery that lies there is not touched; a
    build that was killed, or ran out of room, is gone on with by the next one.

    Args:
        source: a folder of pictures, whatever `read_pairs` reads, or a hand-written list (see `read_hand_written`).
        out: the gallery folder, new or old.
        encoder: embeds.
        format: of the data set, where the found one is wrong.
        split: only this one of the data set.
        calibrate: embed the background too, so that the gallery can tell when nothing fits.
        progress: called with (done, total) items.
        report: filled in as the build goes.
        remote: the server that gets the embeddings, instead of the folder.
        growing: called now and then with a gallery in memory of the pictures that are embedded so far.
        like: a gallery of the same model; it lends the background it was judged by.
        patience: seconds to wait while another process builds there.

    Raises:
        FileNotFoundError: when there is no such source.
        ValueError: when it cannot be read, holds nothing that can, or is the gallery folder itself.
        BlockingIOError: when another process is building there.
        OSError: when the gallery cannot be written, or the server does not answer.
    """
    out = Path(out)
    if remote is not None:
        remote.check()
    report = report or BuildReport()
    pictures, captions, stamp = _read_source(os.fspath(source), out, encoder, format, split, report)
    report.cut = encoder.preprocessor.cut(caption.text for caption in captions)
    with exclusive_lock(out, timeout=patience):
        finish_writing(out)
        arguments = progress or (lambda done, total: None), report, calibrate, remote
        _Builder(out, encoder, stamp, *arguments, growing=growing, like=like).build(pictures, captions)
    return Gallery.load(out, encoder, remote)


def embed_share(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encoder: DualEncoder,
    share: Share,
    *,
    format: str | None = None,
    split: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    report: BuildReport | None = None,
    remote: Remote | None = None,
) -> None:
    """Embed a share of a source for a gallery that `build_gallery` finishes, which then finds all of it done.

    Any number of processes may do so at once, on several machines as well if these see the same folders. A share that
    was killed is gone on with by doing it again. Arguments and errors are those of `build_gallery`.
    """
    out = Path(out)
    if remote is not None:
        remote.check()
    report = report or BuildReport()
    pictures, captions, stamp = _read_source(os.fspath(source), out, encoder, format, split, report, share)
    arguments = progress or (lambda done, total: None), report, False, remote
    builder = _Builder(out, encoder, stamp, *arguments, alone=False)
    builder.embed(pictures, captions)
    builder.unfinished.keep()


def _read_source(
    source: str,
    out: Path,
    encoder: DualEncoder,
    format: str | None,
    split: str | None,
    report: BuildReport,
    share: Share | None = None,
) -> tuple[list[Picture], list[Caption], Stamp]:
    """List what is to be embedded, and report what is not; the stamp says where it comes from, a path or Hub id."""
    folder, gallery = Path(source), os.path.join(os.path.abspath(out), "")
    origin = os.path.abspath(folder) if folder.exists() else source
    if os.path.join(origin, "") == gallery:
        raise ValueError(f"{source} cannot be the source and the gallery at once: choose another folder for --out.")
    options = [word for name, value in (("--format", format), ("--split", split)) if value for word in (name, value)]
    stamp = Stamp(
        encoder.fingerprint, encoder.name, encoder.logit_scale, encoder.logit_bias, origin, shlex.join(options)
    )
    if folder.is_dir() and format is None and split is None and is_hand_written(folder):
        pictures, captions = read_hand_written(folder)
        return (share.of(pictures), share.of(captions), stamp) if share else (pictures, captions, stamp)
    reading = read_data(source, format=format, split=split, share=share)
    report.left_out, report.repaired = reading.left_out, reading.repaired
    report.unlisted, report.unread = reading.unlisted, reading.unread
    images = [(pair.image, pair.captions) for pair in reading.pairs if not pair.image.startswith(gallery)]
    if inside := [pair.id for pair in reading.pairs if pair.image.startswith(gallery)]:
        if not images:
            raise ValueError(f"All pictures of {source} lie in the gallery folder {out}: choose another one for --out.")
        report.left_out = {**report.left_out, "pictures in the folder of the gallery itself": inside}
    return *read_captioned(images, origin if folder.is_dir() else ""), stamp


class _Builder:
    """One build: what is known from the last one, and what becomes of it."""

    def __init__(
        self,
        out: Path,
        encoder: DualEncoder,
        stamp: Stamp,
        progress: Callable[[int, int], None],
        report: BuildReport,
        calibrate: bool,
        remote: Remote | None = None,
        *,
        alone: bool = True,
        growing: Callable[[Gallery], None] | None = None,
        like: Gallery | None = None,
    ) -> None:
        self.out, self.encoder, self.stamp, self.progress, self.report = out, encoder, stamp, progress, report
        self.calibrate, self.remote = calibrate, remote
        self.growing, self.like, self.grown = growing, like, 0  # so many pictures had the last one shown
        self.files: dict[str, FileState] = {}  # of a picture, by its source
        self.waiting: dict[str, int] = {}  # the number of a picture that is with the model, by the hash of its file
        self.looked = 0  # how many pictures have been looked at
        self.unfinished = Unfinished(out, stamp, encoder.embed_dim, alone=alone)
        self.rows, self.texts = self.unfinished.rows, self.unfinished.texts
        if alone and len(self.unfinished):
            logger.warning("%d embeddings that were made before are taken over.", len(self.unfinished))
        self.old = self._reusable()

    def _reusable(self) -> Catalogue | None:
        """Take over what this model made before; anything else is built anew."""
        try:
            old, images, texts = open_gallery(self.out, self.encoder.name, self.remote)
        except FileNotFoundError:
            return None
        except ValueError as error:
            logger.warning("It is built anew: %s", str(error).partition(" Rebuild it with")[0])
            return None
        if old.stamp.fingerprint != self.stamp.fingerprint:
            return None
        states = [picture.file or FileState(0, 0, "") for picture in old.pictures]
        self.rows.include([state.sha256 for state in states], images)
        self.texts.include([caption.text for caption in old.captions], texts)
        if old.stamp.source == self.stamp.source:
            self.files = {picture.source: state for picture, state in zip(old.pictures, states, strict=True)}
        return old

    def build(self, pictures: Sequence[Picture], captions: Sequence[Caption]) -> None:
        """Embed everything, then put it in place."""
        read, kept = self.embed(*self._with_unlisted(pictures, captions))
        if not read and not kept:
            self.unfinished.clear()
            raise ValueError(f"Nothing in {self.stamp.source} could be read, so no gallery was made.")
        self.unfinished.keep()  # what comes may take long, and may fail for lack of room
        self._put_in_place(read, kept)

    def _with_unlisted(
        self, pictures: Sequence[Picture], captions: Sequence[Caption]
    ) -> tuple[Sequence[Picture], Sequence[Caption]]:
        """Add what the gallery holds of folders that cannot be listed now."""
        if self.old is None or not self.files or self.old.stamp.options != self.stamp.options:
            return pictures, captions
        listed = {picture.source for picture in pictures}
        away = [picture for picture in self.old.pictures if self._is_away(picture) and picture.source not in listed]
        scenes = {picture.id for picture in away}
        return [*pictures, *away], [*captions, *(each for each in self.old.captions if each.scene in scenes)]

    def _is_away(self, picture: Picture) -> bool:
        """Whether a picture lies in a folder that could not be listed."""
        return not picture.package and any(picture.path.is_relative_to(folder) for folder in self.report.unlisted)

    def embed(
        self, pictures: Sequence[Picture], captions: Sequence[Caption]
    ) -> tuple[Sequence[Picture], Sequence[Caption]]:
        """Embed everything; returns what could be read, and the captions that do not belong to what could not."""
        try:
            read = self._encode_pictures(pictures, len(captions))
            lost = {picture.id for picture in pictures} - {picture.id for picture in read}
            kept = [caption for caption in captions if caption.scene not in lost]
            self._encode_captions(kept, len(read))
            return read, kept
        except BaseException:
            with suppress(OSError):  # what went wrong is worth more than what could be kept
                self.unfinished.close()
            raise

    def _encode_pictures(self, pictures: Sequence[Picture], num_captions: int) -> list[Picture]:
        """Embed those that can be read and return them, each with the state of its file."""
        read: list[Picture] = []
        total = len(pictures) + num_captions
        looker = Looker(self.out, self.unfinished, self.files, self._is_known, self.encoder.preprocessor)
        with closing(ahead(looker, pictures, depth=_AHEAD)) as looks:
            for row in self.encoder.encode_prepared(self._unseen(looks, read, total)):
                sha256 = next(iter(self.waiting))
                self.unfinished.add("rows", [sha256], [row.half()])
                del self.waiting[sha256]
                self.report.encoded["pictures"] += 1
                self.progress(next(iter(self.waiting.values()), self.looked), total)
                self._show_growth(read)
        self.report.reused["pictures"] = len(read) - self.report.encoded["pictures"] - len(self.report.held)
        return read

    def _show_growth(self, read: Sequence[Picture]) -> None:
        """Show what can be searched already, each time it has grown by half."""
        ready = len(read) - len(self.waiting)
        if self.growing is None or ready < max(_FIRST_SHOWN, 1.5 * self.grown):
            return
        self.grown = ready
        known = [picture for picture in read if picture.file and picture.file.sha256 in self.rows]
        images = self.rows.of(picture.file.sha256 for picture in known if picture.file)
        judge = self.like.judge if self.like else None
        none = torch.empty(0, self.encoder.embed_dim)
        self.growing(Gallery(known, (), images[torch.arange(len(known))], none, self.stamp, judge=judge))

    def _unseen(self, looks: Iterable[Look], read: list[Picture], total: int) -> Iterator[Mapping[str, Tensor]]:
        """Pass on the inputs of pictures that no embedding is known of; list in `read` those that can be read."""
        for number, look in enumerate(looks):
            self.looked = number + 1
            before = self.files.get(look.picture.source)
            if before and (look.is_shut or (look.refusal and self._is_away(look.picture))):
                self.report.held.append(look.picture.source)
                read.append(replace(look.picture, file=before))
            elif look.refusal:
                self.report.skipped.append((look.picture.source, look.refusal))
                if look.error:
                    self.report.errors[look.picture.source] = look.error
                logger.warning("Skipped %s: %s", legible(look.picture.source), look.refusal)
            else:
                read.append(look.picture)
                if look.picture.file is not before:
                    self.unfinished.note(look.picture)
            # Of two files with the same content, both may have been opened before the first came here.
            if look.inputs is not None and look.picture.file and not self._is_known(look.picture.file.sha256):
                self.waiting[look.picture.file.sha256] = number
                yield look.inputs
            elif not self.waiting:
                self.progress(self.looked, total)

    def _is_known(self, sha256: str) -> bool:
        return sha256 in self.rows or sha256 in self.waiting

    def _encode_captions(self, captions: Sequence[Caption], num_pictures: int) -> None:
        texts = dict.fromkeys(caption.text for caption in captions)
        fresh = [text for text in texts if text not in self.texts]
        done, total = num_pictures + len(captions) - len(fresh), num_pictures + len(captions)
        for start in range(0, len(fresh), _TEXTS_AT_ONCE):
            some = fresh[start : start + _TEXTS_AT_ONCE]

            def show(count: int, _: int, done: int = done + start) -> None:
                self.progress(done + count, total)

            self.unfinished.add("texts", some, self.encoder.encode_texts(some, progress=show).half())
        self.report.encoded["captions"] = len(fresh)
        self.report.reused["captions"] = len(captions) - len(fresh)
        self.progress(total, total)

    def _put_in_place(self, pictures: Sequence[Picture], captions: Sequence[Caption]) -> None:
        images = self.rows.of(picture.file.sha256 for picture in pictures if picture.file)
        texts = self.texts.of(caption.text for caption in captions)
        none = torch.empty(0, self.encoder.embed_dim, dtype=torch.float16)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        stamp = replace(self.stamp, num_pictures=len(pictures), num_captions=len(captions), built=now)
        new = Catalogue(pictures, captions, none, none, stamp)
        if self.calibrate:
            new = self._calibrated(new, images, texts)
        more = self.unfinished.gathered(pictures)
        if self.remote is not None or self.old is None or not _same(self.old, new):
            write_gallery(self.out, new, (images, texts), more, self.remote)
        else:
            for thumbnail in more.rglob("*.webp"):  # of the same pictures: they were lost
                (self.out / THUMBNAILS).mkdir(exist_ok=True)
                os.replace(thumbnail, self.out / THUMBNAILS / thumbnail.name)
            tidy(self.out, new)
        wanted = {f"{picture.id}.webp" for picture in pictures if not picture.package}
        for thumbnail in (self.out / THUMBNAILS).glob("*.webp"):
            if thumbnail.name not in wanted:
                thumbnail.unlink() if thumbnail.is_file() else shutil.rmtree(thumbnail)
        self.unfinished.clear()

    def _calibrated(self, new: Catalogue, images: Rows, texts: Rows) -> Catalogue:
        """Add what tells matches from accidents; the background of an earlier build is kept while it is the same."""
        name = background_name()
        if self.old is not None and self.old.background and self.old.stamp.judged_by.endswith(name):
            background = Background(**{key: embeds.float() for key, embeds in self.old.background.items()})
        elif self.like is not None and self.like.judge and self.like.stamp.judged_by.endswith(name):
            background = self.like.judge.background
        else:
            background = build_background(self.encoder)
        calibration, how = fit_calibration(new.pictures, new.captions, images, texts, background)
        stamp = replace(new.stamp, calibration=calibration.to_dict(), judged_by=f"{how}; background {name}")
        return replace(new, stamp=stamp, background=background.tensors())


def _same(old: Catalogue, new: Catalogue) -> bool:
    """Whether only the date would change; such a gallery is left alone, for the sake of version control."""
    return replace(old.stamp, built=new.stamp.built) == new.stamp and old.lines() == new.lines()
