"""Builds and trainings that are killed where it hurts most, that find a full disk, or another in their folder.

What was there stays whole, and the next run ends as if undisturbed.

`tests/long/test_random_kills.py` does so at more moments, before every change to the folder or the database, and at
random.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_injection import FEW, HARMS, NEVER, Fault, Runner, flip, runner
from PIL import Image
from test_train_run import paint as paint_flags
from test_train_run import record_of, same
from torch import Tensor

from alignment.atomic import LOCK, exclusive_lock
from alignment.engine import AlignmentEngine
from alignment.file_errors import describe_error
from alignment.gallery import Caption, Gallery, Picture, modality
from alignment.gallery.database import DATABASE, GalleryDatabase
from alignment.model import DualEncoder
from alignment.train.run_dir import RECORD, SETTINGS, last_checkpoint, read_resume_state

Checkpoint = Callable[[str], Path]
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with runner(tmp_path_factory.mktemp("logs")) as made:
        yield made


# ---------------------------------------------------------------- galleries


@dataclass(frozen=True)
class Contents:
    """All that a gallery folder holds, but for when it was built."""

    pictures: tuple[Picture, ...]
    captions: tuple[Caption, ...]
    files: list[object]
    metadata: dict[str, object]
    images: Tensor
    texts: Tensor
    thumbnails: dict[str, object]

    @classmethod
    def of(cls, folder: Path, encoder: DualEncoder) -> Contents:
        gallery = Gallery.load(folder, encoder)
        pictures, captions = tuple(gallery.pictures), tuple(gallery.captions)
        thumbnails = {picture.id: gallery.thumbnail(picture) for picture in pictures}
        assert all(isinstance(thumbnail, bytes) for thumbnail in thumbnails.values())
        metadata = asdict(gallery.metadata) | {"built": ""}
        return cls(
            pictures, captions, [picture.file for picture in pictures], metadata,
            gallery.images.embeds, gallery.texts.embeds, thumbnails,
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        """Compare everything; embeddings as far as half precision goes, for batches differ after a kill."""
        if not isinstance(other, Contents) or len(self.pictures) != len(other.pictures):
            return False
        same = all(
            getattr(self, name) == getattr(other, name)
            for name in ("pictures", "captions", "files", "metadata", "thumbnails")
        )
        sides = (self.images, other.images), (self.texts, other.texts)
        return same and all(torch.allclose(one, two, atol=1e-3, rtol=0) for one, two in sides)

    __hash__ = None  # type: ignore[assignment]


class Galleries:
    """A gallery before and after its source has changed, and what an undisturbed build makes of it."""

    def __init__(self, root: Path, model: Path, run: Runner) -> None:
        self.root, self.model, self.run = root, model, run
        self.source = root / "source"
        (self.source / "trip").mkdir(parents=True)
        for row in range(7):
            paint(self.source / "trip" / f"{row}.png", row)
        self.describe(range(7))
        self.old = root / "old"
        assert self.build(self.old) == 0, run.said
        self.first = run.changes
        (self.source / "trip" / "0.png").unlink()
        paint(self.source / "trip" / "1.png", 11)
        for row in (7, 8):
            paint(self.source / "trip" / f"{row}.png", row)
        self.describe(range(1, 9))
        self.new = self.copy("new")
        assert self.build(self.new) == 0, run.said
        self.update = run.changes
        self.fresh = root / "fresh"  # made of the changed source at once
        assert self.build(self.fresh) == 0, run.said

    def describe(self, rows: range) -> None:
        lines = [f"trip/{row}.png,picture {row}" for row in rows]
        (self.source / "captions.csv").write_text("image,caption\n" + "\n".join(lines) + "\n")

    def copy(self, name: str, *, of: Path | None = None) -> Path:
        return Path(shutil.copytree(of or self.old, self.root / name))

    def build(self, out: Path, fault: Fault = NEVER) -> int:
        return self.run.end(self.start(out, fault))

    def start(self, out: Path, fault: Fault = NEVER, *options: str) -> BaseProcess:
        words = ["build", self.source / "captions.csv", "--out", out, "--model", self.model, "--no-calibration"]
        return self.run.start("gallery", *words, *options, folder=out, fault=fault)

    @cached_property
    def shared(self) -> Path:
        """A folder in which two shares wait to be merged."""
        for share in ("1/2", "2/2"):
            assert self.run.end(self.start(self.root / "shared", NEVER, "--share", share)) == 0, self.run.said
        return self.root / "shared"

    @cached_property
    def encoder(self) -> DualEncoder:
        return DualEncoder.load(self.model, device="cpu")

    def contents(self, folder: Path) -> Contents:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modality, "EXACT_ROWS", FEW)
            patch.setattr(modality, "LARGE", FEW)
            return Contents.of(folder, self.encoder)

    @cached_property
    def before(self) -> Contents:
        return self.contents(self.old)

    @cached_property
    def after(self) -> Contents:
        return self.contents(self.new)

    def assert_old_or_new(self, folder: Path) -> bool:
        """Return whether it is the new one."""
        found = self.contents(folder)
        if len(found.pictures) == len(self.before.pictures):
            assert found == self.before
            return False
        assert found == self.after
        return True

    def assert_finishes(self, folder: Path, like: Path | None = None) -> int:
        """Build again: all is as if nothing had happened, and nothing is left behind. Returns how many are encoded."""
        assert self.build(folder) == 0, self.run.said
        assert self.contents(folder) == self.after
        assert layout(folder) == layout(like or self.new)
        return int(re.findall(r"pictures: (\d+) encoded", self.run.said)[-1])


def paint(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((60, 40)).save(path)


def layout(folder: Path) -> dict[str, object]:
    """List all files, and count the rows of each table; nothing is damaged."""
    with closing(GalleryDatabase(folder)) as database:
        assert database.check() == []
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        rows = {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone() for name in tables}
    return {"files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")), **rows}


@pytest.fixture(scope="module")
def galleries(checkpoint: Callable[[str], Path], run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Galleries:
    return Galleries(tmp_path_factory.mktemp("galleries"), checkpoint("clip"), run)


Moment = tuple[Fault, bool, int]

MOMENTS: dict[str, Moment] = {  # when it dies, whether it is the new gallery then, and how many are embedded again
    "within the file": (Fault(size=200_000), False, 3),
    "all is committed, not packed": (Fault(before=("sql", "VACUUM")), True, 0),
}


def assert_old_or_new_when_killed(galleries: Galleries, name: str, moment: Moment) -> None:
    fault, new, most = moment
    folder = galleries.copy(name)
    assert galleries.build(folder, fault) in KILLED
    assert galleries.assert_old_or_new(folder) is new
    assert galleries.assert_finishes(folder) <= most  # what was embedded is not embedded again


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_is_brought_up_to_date_a_gallery_is_the_old_one_or_the_new(
    moment: str, galleries: Galleries
) -> None:
    assert_old_or_new_when_killed(galleries, moment, MOMENTS[moment])


@pytest.mark.parametrize(
    "fault",
    [
        Fault(before=("sql", "INSERT OR IGNORE INTO thumbnail")),
        Fault(before=("os.remove", "share-1-of-2.db")),
        Fault(before=("sql", "INSERT INTO meta")),
    ],
    ids=["within a merge", "merged, not deleted", "all merged"],
)
def test_killed_while_shares_are_merged_nothing_is_embedded_again(fault: Fault, galleries: Galleries) -> None:
    folder = galleries.copy(f"merged {fault.before}".replace("/", " "), of=galleries.shared)
    assert galleries.build(folder, fault) in KILLED
    with pytest.raises(FileNotFoundError):  # no gallery yet
        galleries.contents(folder)
    assert galleries.assert_finishes(folder, galleries.fresh) == 0


# ---------------------------------------------------------------- galleries that cannot be written


@pytest.mark.parametrize("size", [150, 70_000, 300_000])
def test_a_full_disk_is_told_and_the_old_gallery_stays(size: int, galleries: Galleries) -> None:
    folder = galleries.copy(f"full {size}")
    assert galleries.build(folder, Fault(size=size, full=True)) == 2
    assert "error: There is no room left" in galleries.run.said
    assert "Traceback" not in galleries.run.said
    assert "skipped" not in galleries.run.said.lower()  # no picture is left out for lack of room
    assert galleries.assert_old_or_new(folder) is False
    galleries.assert_finishes(folder)


def test_a_folder_that_may_not_be_written_is_told(run: Runner, checkpoint: Checkpoint) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shutil.copytree(checkpoint("clip"), root / "model")
        for path in (root / "model").iterdir():
            path.chmod(0o644)
        (root / "photos").mkdir()
        paint(root / "photos" / "a.png", 1)
        (root / "out").mkdir(mode=0o555)
        os.chmod(root, 0o755)
        words = ["build", root / "photos", "--out", root / "out", "--model", root / "model", "--no-calibration"]
        assert run("gallery", *words, folder=root / "out", fault=Fault(nobody=True)) == 2
        assert "out" in run.said
        assert "may not be read or written (Permission denied): change its permissions" in run.said
        (root / "file").touch()
        words[3] = root / "file" / "out"
        assert run("gallery", *words, folder=root / "file") == 2
        assert "is in the way (Not a directory): move it" in run.said
        os.chmod(root / "out", 0o755)


def test_two_builds_of_one_gallery_do_not_mix(galleries: Galleries, tmp_path: Path) -> None:
    folder = galleries.copy("written by several")
    with exclusive_lock(folder):
        assert galleries.build(folder) == 2
        assert f"error: Another process ({os.getpid()} on " in galleries.run.said
        assert f"is writing to {folder} now: wait until it is done" in galleries.run.said
        assert galleries.assert_old_or_new(folder) is False
    started = [galleries.start(folder) for _ in range(3)]
    ended = [galleries.run.end(process) for process in started]
    assert 0 in ended
    assert set(ended) <= {0, 2}
    galleries.assert_finishes(folder)
    assert not (folder / LOCK).exists()


def test_who_loads_while_another_builds_gets_the_old_gallery_or_the_new(galleries: Galleries) -> None:
    folder = galleries.copy("loaded")
    stop, wrong, seen = threading.Event(), list[object](), set[bool]()

    def load() -> None:
        while not stop.is_set():
            try:
                gallery = Gallery.load(folder, galleries.encoder)
                seen.add(len(gallery.pictures) == len(galleries.after.pictures))
            except Exception as error:
                wrong.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modality, "EXACT_ROWS", FEW)
        thread = threading.Thread(target=load)
        thread.start()
        assert galleries.build(folder) == 0
        stop.set()
        thread.join()
    assert not wrong
    assert seen


def test_the_app_goes_on_with_its_gallery_while_another_process_builds_it_anew(galleries: Galleries) -> None:
    folder = galleries.copy("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modality, "EXACT_ROWS", FEW)
        gallery = Gallery.load(folder, galleries.encoder)
    engine = AlignmentEngine(galleries.encoder, gallery)
    found = engine.search_images("a dog", 5).matches
    embeds = gallery.images.embeds.clone()
    assert galleries.build(folder) == 0
    left = {picture.id for picture in galleries.after.pictures if picture in [match.item for match in found]}
    assert [match.item.id for match in engine.search_images("a dog", 5).matches if match.item.id in left]
    assert torch.equal(gallery.images[torch.arange(len(embeds))], embeds)
    for match in found:  # one picture is gone, and its thumbnail with it
        if engine.can_show(match.item.id):
            assert engine.thumbnail(match.item.id)


# ---------------------------------------------------------------- training

OPTIONS = "--preset full --learning-rate 1e-3 --batch-size 8 --epochs 4 --measure-every 3 --no-interpolate --device cpu"


class Trainings:
    """A training that nothing disturbed, and others to compare with it."""

    def __init__(self, root: Path, model: Path, run: Runner) -> None:
        self.root, self.run = root, run
        self.words = ["--model", model, "--data", paint_flags(root / "flags", 44), *OPTIONS.split()]
        self.whole = root / "whole"
        assert self.begin(self.whole) == 0, run.said
        self.changes = run.changes

    def begin(self, folder: Path, fault: Fault = NEVER) -> int:
        return self.run("train", *self.words, "--output", folder, folder=folder, fault=fault)

    def go_on(self, folder: Path) -> int:
        return self.run.end(self.start(folder))

    def start(self, folder: Path) -> BaseProcess:
        """Do what a person does: go on if there is something to go on with, else begin."""
        words = ["--output", folder, "--resume", "--device", "cpu"]
        if not (folder / SETTINGS).exists() and not (folder / RECORD).exists():
            words = [*self.words, "--output", folder]
        return self.run.start("train", *words, folder=folder)

    def assert_undisturbed(self, folder: Path) -> None:
        """Weights to the last bit, every metric, the last loss, and nothing left behind."""
        assert same(folder, self.whole)
        one, other = record_of(folder), record_of(self.whole)
        assert (one.fingerprint, one.best_step, one.stopped) == (other.fingerprint, other.best_step, other.stopped)
        assert (one.before, one.after, one.difference) == (other.before, other.after, other.difference)
        losses = [[entry["loss"] for entry in run.history if "loss" in entry][-1] for run in (one, other)]
        assert losses[0] == losses[1]
        here, there = ({path.name for path in where.iterdir()} for where in (folder, self.whole))
        assert here == there


@pytest.fixture(scope="module")
def trainings(checkpoint: Callable[[str], Path], run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("trainings"), checkpoint("clip"), run)


def test_killed_while_a_checkpoint_is_written_a_run_goes_on_from_the_one_before(trainings: Trainings) -> None:
    folder = trainings.root / "half"
    fault = Fault(before=("os.rename", "/complete"), after=1)
    assert trainings.begin(folder, fault) in KILLED
    assert trainings.go_on(folder) == 0, trainings.run.said
    trainings.assert_undisturbed(folder)


def test_killed_at_its_very_end_a_run_is_finished_and_clears_away(trainings: Trainings) -> None:
    folder = trainings.root / "end"
    fault = Fault(before=("os.remove", "/settings.json"))
    assert trainings.begin(folder, fault) in KILLED
    assert trainings.go_on(folder) == 1
    assert "is finished; fine-tune further with --model" in trainings.run.said
    trainings.assert_undisturbed(folder)


@pytest.fixture(scope="module")
def killed(trainings: Trainings) -> Path:
    """Provide a run that was killed while it wrote its third checkpoint."""
    folder = trainings.root / "killed"
    assert trainings.begin(folder, Fault(before=("os.rename", "/complete"), after=2)) in KILLED
    return folder


def test_of_damaged_checkpoints_the_one_before_is_gone_on_with(
    killed: Path, trainings: Trainings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    whole = sorted((folder / "checkpoints").glob("*/complete"))
    assert [path.parent.name for path in whole] == ["checkpoint-3", "checkpoint-6"]
    names = {path.name for path in whole[1].parent.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} <= names
    for name in names:
        for harm in HARMS.values():
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder / "checkpoints", copy)
            harm(copy / "checkpoint-6" / name)
            assert last_checkpoint(copy) == copy / "checkpoint-3"
            assert not (copy / "checkpoint-6").exists()
    assert "is damaged, and is removed" in caplog.text
    flip(folder / "checkpoints" / "checkpoint-6" / "optimizer.pt", 999)
    assert trainings.go_on(folder) == 0, trainings.run.said
    assert "checkpoint-6 was not finished or is damaged" in trainings.run.said
    trainings.assert_undisturbed(folder)


@pytest.mark.parametrize("harm", [name for name in HARMS if name != "missing"])
def test_a_damaged_note_of_a_run_is_told(harm: str, killed: Path, tmp_path: Path) -> None:
    shutil.copy(killed / SETTINGS, tmp_path)
    assert read_resume_state(tmp_path).recipe.max_steps == 12
    HARMS[harm](tmp_path / SETTINGS)
    with pytest.raises((ValueError, IsADirectoryError)) as met:
        read_resume_state(tmp_path)
    wanted = "is in the way (Is a directory)" if harm == "a folder" else "start a new run with another --output"
    assert str(tmp_path / SETTINGS) in describe_error(met.value)
    assert wanted in describe_error(met.value)


@pytest.mark.parametrize("size", [60_000])
def test_a_training_on_a_full_disk_says_so_and_can_be_gone_on_with(
    size: int, trainings: Trainings, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert trainings.begin(folder, Fault(size=size, full=True)) == 1
    assert "train: There is no room left" in trainings.run.said
    assert "Traceback" not in trainings.run.said
    assert trainings.go_on(folder) == 0, trainings.run.said
    trainings.assert_undisturbed(folder)


def test_a_second_training_does_not_write_into_the_folder_of_the_first(trainings: Trainings, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with exclusive_lock(folder):
        assert trainings.begin(folder) == 1
        assert f"train: Another process ({os.getpid()} on " in trainings.run.said
        assert [path.name for path in folder.iterdir()] == [LOCK]
