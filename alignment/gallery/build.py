"""Embed pictures and captions into a gallery folder; what has not changed is kept.

Place in the flow: `SOURCE -> records -> embeddings (here) -> gallery.db`. Threads scan files ahead of the model.
What is embedded goes into the database at once, the records at the end.
"""

import logging
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from alignment.atomic import exclusive_lock, remove_stale_temp
from alignment.confidence import Cohort, build_cohort, cohort_version, fit_calibration
from alignment.data import Partition, read_data
from alignment.data.collector import ReadIssues
from alignment.gallery import records
from alignment.gallery.database import DATABASE, KINDS, GalleryDatabase
from alignment.gallery.milvus_sync import Remote
from alignment.gallery.modality import write_index
from alignment.gallery.old_format import import_gallery
from alignment.gallery.records import Caption, GalleryMetadata, Picture
from alignment.gallery.scan import ScannedImage, scan_image
from alignment.gallery.search import Gallery
from alignment.gallery.writer import GalleryWriter, content_of, delete_database
from alignment.index.server import Connection
from alignment.model import DualEncoder
from alignment.model.dual_encoder import Progress
from alignment.prefetch import prefetch_map
from alignment.preprocess import InputError, message_with_option, sanitize_text

logger = logging.getLogger(__name__)

Growing: TypeAlias = Callable[[Gallery], None]
_Scan: TypeAlias = tuple[Picture, ScannedImage | InputError | OSError]
_Items: TypeAlias = tuple[Sequence[Picture], Sequence[Caption]]

COMMIT_S = 2.0  # between two commits: what was embedded since then is lost if the process is killed
_CAPTION_BATCH = 4096
_MIN_GROWING = 32  # pictures from which a growing gallery is shown
_AHEAD = 64  # pictures under way or waiting for the model, a megabyte each; only those under way are held decoded


@dataclass
class BuildReport:
    """What a build did."""

    encoded: Counter[str] = field(default_factory=Counter)  # how many "pictures" and "captions" went through the model
    reused: Counter[str] = field(default_factory=Counter)  # how many kept the embedding they had
    skipped: list[tuple[str, str]] = field(default_factory=list)  # pictures that could not be read: name, reason
    errors: dict[str, InputError] = field(default_factory=dict)  # raised for those whose file is to blame, by name
    reading: ReadIssues = field(default_factory=ReadIssues)  # what reading the source had to leave out
    cut: Sequence[str] = ()  # captions that are longer than the model reads
    held: list[str] = field(default_factory=list)  # pictures, there or not readable now, kept as they were

    @property
    def is_complete(self) -> bool:
        """Whether all of the source could be read."""
        return self.reading.is_complete and not self.held


def build_gallery(
    source: str | os.PathLike[str], out: str | os.PathLike[str], encoder: DualEncoder, *,
    format: str | None = None, split: str | None = None, calibrate: bool = True, progress: Progress | None = None,
    report: BuildReport | None = None, remote: Remote | None = None, growing: Growing | None = None,
    like: Gallery | None = None, timeout: float = 0,
) -> Gallery:  # fmt: skip
    """Embed pictures and captions into a gallery folder; what is in it already and has not changed is kept.

    A file counts as unchanged by size and time, then by content. A picture that cannot be read is skipped, logged and
    reported; one that may not be read now, or lies in a folder that cannot be listed, stays as it was in the gallery.
    Readers see the old gallery until all is embedded; a build that was killed, or ran out of room, is resumed.

    `source` is what `read_data` reads with `format` and `split`, or a hand-written list, see `read_hand_written`. With
    `calibrate` the cohort is embedded too, or taken over from `like`, a gallery of the same model. `progress` is called
    with (done, total) items, and `growing` now and then with a gallery in memory of what is embedded so far. `remote`
    gets a copy of the embeddings and searches them. Waits `timeout` seconds while another process builds there.

    FileNotFoundError without the source; ValueError when it cannot be read, holds nothing that can, or is the gallery
    folder; BlockingIOError when another process builds there; OSError when it cannot be written or no server answers.
    """
    out, report = Path(out), report or BuildReport()
    if remote is not None:
        Connection(remote.server).close()  # an error if it cannot be used
    pictures, captions, metadata = _read_source(os.fspath(source), out, encoder, format, split, report)
    report.cut = encoder.preprocessor.truncated(caption.text for caption in captions)
    with exclusive_lock(out, timeout=timeout):
        import_gallery(out, remote.embeds if remote else None)
        remove_stale_temp(out, age=0)
        with closing(_open_writer(out / DATABASE, encoder)) as writer:
            if count := writer.count_unused():
                logger.warning("%d embeddings that were made before are taken over.", count)
            for share in sorted(out.glob("share-*.db")):
                _open_writer(share, encoder).close()  # undoes what a killed process left half written, and repairs it
                if share.exists():  # it was not empty
                    writer.merge(share)
                    delete_database(share)
            build = _Build(writer, encoder, metadata, report, progress, growing, like)
            build.finish(*build.embed(*build.with_unlisted(pictures, captions)), calibrate)
    with closing(GalleryDatabase(out, encoder.name)) as database:
        if remote is not None:
            remote.push(database, lambda done, total, what: progress(done, total) if progress else None)
        for kind in KINDS if remote is None else ():
            write_index(database, kind)
    return Gallery.load(out, encoder, remote)


def embed_share(
    source: str | os.PathLike[str], out: str | os.PathLike[str], encoder: DualEncoder, share: Partition, *,
    format: str | None = None, split: str | None = None, progress: Progress | None = None,
    report: BuildReport | None = None,
) -> None:  # fmt: skip
    """Embed a share of a source into a file of its own, which the next `build_gallery` merges into the gallery.

    Several processes may do so at once, also on several machines. A killed share is resumed by running it again.
    Arguments and errors are those of `build_gallery`.
    """
    out, report = Path(out), report or BuildReport()
    pictures, captions, metadata = _read_source(os.fspath(source), out, encoder, format, split, report, share)
    out.mkdir(parents=True, exist_ok=True)
    name = f"share-{share.number}-of-{share.count}.db"
    with closing(_open_writer(out / name, encoder, base=out / DATABASE)) as writer:
        _Build(writer, encoder, metadata, report, progress).embed(pictures, captions)


def _read_source(
    source: str, out: Path, encoder: DualEncoder, format: str | None, split: str | None, report: BuildReport,
    share: Partition | None = None,
) -> tuple[list[Picture], list[Caption], GalleryMetadata]:  # fmt: skip
    """List what is to be embedded, and report what is not; the metadata say where it comes from, a path or Hub id."""
    folder, gallery = Path(source), os.path.join(os.path.abspath(out), "")
    origin = os.path.abspath(folder) if folder.exists() else source
    if os.path.join(origin, "") == gallery:
        raise ValueError(f"{source} cannot be the source and the gallery at once: choose another folder for --out.")
    options = [word for name, value in (("--format", format), ("--split", split)) if value for word in (name, value)]
    model = encoder.fingerprint, encoder.name, encoder.logit_scale, encoder.logit_bias
    metadata = GalleryMetadata(*model, origin, shlex.join(options))
    if folder.is_dir() and not options and records.is_hand_written(folder):
        pictures, captions = records.read_hand_written(folder)
        return (share.select(pictures), share.select(captions), metadata) if share else (pictures, captions, metadata)
    reading = read_data(source, format=format, split=split, partition=share)
    images = [(pair.image, pair.captions) for pair in reading.pairs if not pair.image.startswith(gallery)]
    inside = tuple(pair.id for pair in reading.pairs if pair.image.startswith(gallery))
    if inside and not images:
        raise ValueError(f"All pictures of {source} lie in the gallery folder {out}: choose another one for --out.")
    left_out = {"pictures in the folder of the gallery itself": inside} if inside else {}
    report.reading = replace(reading, pairs=[], left_out={**reading.left_out, **left_out})
    return *records.read_captioned(images, origin if folder.is_dir() else ""), metadata


def _open_writer(path: Path, encoder: DualEncoder, base: Path | None = None) -> GalleryWriter:
    """Open a database; one that is damaged beyond repair is made anew."""
    try:
        return GalleryWriter(path, encoder.fingerprint, encoder.embed_dim, base)
    except ValueError as error:
        logger.warning("%s is damaged (%s): what it holds is embedded again.", path, error)
        delete_database(path)
        return GalleryWriter(path, encoder.fingerprint, encoder.embed_dim, base)


class _Build:
    """Embeds a source into one database; what is there already, or in the gallery, is not embedded again."""

    def __init__(
        self, writer: GalleryWriter, encoder: DualEncoder, metadata: GalleryMetadata, report: BuildReport,
        progress: Progress | None, growing: Growing | None = None, like: Gallery | None = None,
    ) -> None:  # fmt: skip
        self.writer, self.encoder, self.metadata, self.report = writer, encoder, metadata, report
        self.progress = progress or (lambda done, total: None)
        self.growing, self.like, self.grown = growing, like, 0  # number of pictures shown last
        self.before: GalleryMetadata | None = None  # of the gallery in the folder, if this model made it
        self.pictures, self.captions, self.cohort = list[Picture](), list[Caption](), dict[str, Tensor]()
        try:
            with closing(GalleryDatabase(writer.path.parent, encoder.name)) as database:
                if database.metadata.fingerprint == encoder.fingerprint:
                    self.pictures, self.captions = database.records()
                    self.before, self.cohort = database.metadata, database.cohort()
        except FileNotFoundError:
            pass
        except (ValueError, KeyError) as error:
            logger.warning("Its records are made anew: %s", str(error).partition(" Rebuild it with")[0])
        is_same = self.before and self.before.source == metadata.source
        self.files = {picture.source: picture.file for picture in self.pictures if picture.file and is_same}
        self.scanned = {**self.files, **writer.scanned()}
        self.read: list[Picture] = []  # those that can be read, each with the state of its file
        self.waiting: dict[str, int] = {}  # number of a picture that is with the model, by the hash of its file
        self.num_scanned = self.total = 0
        self.committed = time.monotonic()

    def with_unlisted(self, pictures: Sequence[Picture], captions: Sequence[Caption]) -> _Items:
        if not self.before or not self.files or self.before.options != self.metadata.options:
            return pictures, captions
        listed = {picture.source for picture in pictures}
        away = [picture for picture in self.pictures if self._is_away(picture) and picture.source not in listed]
        scenes = {picture.id for picture in away}
        return [*pictures, *away], [*captions, *(caption for caption in self.captions if caption.scene in scenes)]

    def _is_away(self, picture: Picture) -> bool:
        return not picture.package and any(map(picture.path.is_relative_to, self.report.reading.unlisted))

    def embed(self, pictures: Sequence[Picture], captions: Sequence[Caption]) -> _Items:
        """Embed everything; returns what could be read, and the captions that do not belong to what could not."""
        try:
            self.total = len(pictures) + len(captions)
            self._encode_pictures(pictures)
            lost = {picture.id for picture in pictures} - {picture.id for picture in self.read}
            kept = [caption for caption in captions if caption.scene not in lost]
            self.total = len(self.read) + len(kept)
            self._encode_captions(kept)
        except BaseException:
            with suppress(OSError, ValueError):  # the first error is the one to report
                self.writer.commit()
            raise
        self.writer.commit()
        return self.read, kept

    def _encode_pictures(self, pictures: Sequence[Picture]) -> None:
        with closing(prefetch_map(self._scan, pictures, depth=_AHEAD)) as scans:
            for row in self.encoder.encode_prepared(self._unseen(scans)):
                sha256 = next(iter(self.waiting))
                self.writer.add("picture", [sha256], row[None])
                del self.waiting[sha256]
                self.report.encoded["pictures"] += 1
                self._advance()
        self.report.reused["pictures"] = len(self.read) - self.report.encoded["pictures"] - len(self.report.held)

    def _scan(self, picture: Picture) -> _Scan:
        try:
            before = self.scanned.get(picture.source)
            return picture, scan_image(picture, before, self._known, self.encoder.preprocessor)
        except (InputError, OSError) as error:
            return picture, error

    def _unseen(self, scans: Iterable[_Scan]) -> Iterator[Mapping[str, Tensor]]:
        """Pass on the inputs of pictures that no embedding is known of."""
        for self.num_scanned, (picture, scan) in enumerate(scans, 1):
            if not isinstance(scan, ScannedImage):
                self._skip(picture, scan)
            else:
                file = scan.file
                self.read.append(replace(picture, file=file))
                if file.mtime_ns and file != self.scanned.get(picture.source):
                    self.writer.add_scanned(picture.source, file)
                if scan.thumbnail is not None:
                    self.writer.add_thumbnail(file.sha256, scan.thumbnail)
                # Of two files with the same content, both may have been opened before the first came here.
                if scan.inputs is not None and not self._known(file.sha256)[0]:
                    self.waiting[file.sha256] = self.num_scanned - 1
                    yield scan.inputs
                    continue
            self._advance()

    def _skip(self, picture: Picture, failure: InputError | OSError) -> None:
        """Report a picture that cannot be read; what is there but may not be read stays as it was in the gallery."""
        name, before = picture.source, self.files.get(picture.source)
        is_there = isinstance(failure, OSError) and not isinstance(failure, FileNotFoundError)
        if before and (is_there or self._is_away(picture)):
            self.report.held.append(name)
            self.read.append(replace(picture, file=before))
            return
        if isinstance(failure, InputError):
            self.report.errors[name], reason = failure, message_with_option(failure)
        else:
            reason = failure.strerror or str(failure)
        self.report.skipped.append((name, reason))
        logger.warning("Skipped %s: %s", sanitize_text(name), reason)

    def _known(self, sha256: str) -> tuple[bool, bool]:
        return sha256 in self.waiting or self.writer.has("picture", sha256), self.writer.has_thumbnail(sha256)

    def _advance(self) -> None:
        """Commit now and then, and show how far the build is and what can be searched already."""
        if time.monotonic() - self.committed >= COMMIT_S:
            self.writer.commit()
            self.committed = time.monotonic()
        self.progress(next(iter(self.waiting.values()), self.num_scanned), self.total)
        if self.growing and len(self.read) - len(self.waiting) >= max(_MIN_GROWING, 1.5 * self.grown):
            self.grown = len(self.read) - len(self.waiting)
            known = [picture for picture in self.read if picture.file and picture.file.sha256 not in self.waiting]
            images = self.writer.embeds("picture", known, torch.arange(len(known)))
            judge, none = self.like.judge if self.like else None, torch.empty(0, self.encoder.embed_dim)
            self.growing(Gallery(known, (), images, none, self.metadata, judge=judge))

    def _encode_captions(self, captions: Sequence[Caption]) -> None:
        texts = {content_of(caption): caption.translations or (caption.text,) for caption in captions}
        fresh = [content for content in texts if not self.writer.has("caption", content)]
        todo = count = sum(len(texts[content]) for content in fresh)
        for start in range(0, len(fresh), _CAPTION_BATCH):
            batch = fresh[start : start + _CAPTION_BATCH]
            sizes = [len(texts[content]) for content in batch]

            def show(done: int, _: int, before: int = self.total - todo) -> None:
                self.progress(before + done, self.total)

            embeds = self.encoder.encode_texts([text for content in batch for text in texts[content]], progress=show)
            means = torch.stack([embeds_of.mean(0) for embeds_of in embeds.split(sizes)])
            self.writer.add("caption", batch, functional.normalize(means, dim=-1))
            self.writer.commit()
            todo -= sum(sizes)
        self.report.encoded["captions"] = count
        self.report.reused["captions"] = len(captions) - count
        self.progress(self.total, self.total)

    def finish(self, pictures: Sequence[Picture], captions: Sequence[Caption], calibrate: bool) -> None:
        if not pictures and not captions:
            raise ValueError(f"Nothing in {self.metadata.source} could be read, so no gallery was made.")
        metadata = replace(self.metadata, built=datetime.now(UTC).isoformat(timespec="seconds"))
        cohort = self._cohort() if calibrate else None
        if cohort:
            images = partial(self.writer.embeds, "picture", pictures)
            texts = partial(self.writer.embeds, "caption", captions)
            ids, scenes = [picture.id for picture in pictures], [caption.scene for caption in captions]
            calibration, how = fit_calibration(ids, scenes, images, texts, cohort)
            judged_by = f"{how}; background {cohort_version()}"
            metadata = replace(metadata, calibration=calibration.to_dict(), judged_by=judged_by)
        self.writer.finish(pictures, captions, metadata, cohort.tensors() if cohort else {})

    def _cohort(self) -> Cohort:
        """Take over the cohort of the gallery, or of the one that lends it, while it is up to date."""
        version = cohort_version()
        if self.before and self.cohort and self.before.judged_by.endswith(version):
            return Cohort(**{name: embeds.float() for name, embeds in self.cohort.items()})
        if self.like and self.like.judge and self.like.metadata.judged_by.endswith(version):
            return self.like.judge.cohort
        return build_cohort(self.encoder)
