"""Damaged, missing and unwritable files: what is wrong and what mends it is said, and nothing wrong is ever used."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from fault_injection import FEW, Fault, Runner
from PIL import Image
from test_kills import KILLED, Contents, Galleries, Trainings, galleries, paint, run, trainings

from alignment.atomic import LOCK, exclusive_lock
from alignment.data import read_data
from alignment.engine import AlignmentEngine
from alignment.file_errors import describe_error
from alignment.gallery import Gallery, build_gallery, main, modality
from alignment.gallery.database import DATABASE
from alignment.model import DualEncoder
from alignment.model.graph_cache import GraphCache, ModelInfo
from alignment.train.run_dir import SETTINGS, last_checkpoint, read_resume_state

__all__ = ["galleries", "run", "trainings"]

Checkpoint = Callable[[str], Path]
HARMS: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit flipped": lambda path: flip(path, path.stat().st_size * 4 + 1),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.unlink()  # it may be mapped
    path.write_bytes(data)


# ---------------------------------------------------------------- damaged galleries


@pytest.fixture(scope="module")
def encoder(checkpoint: Checkpoint) -> DualEncoder:
    return DualEncoder.load(checkpoint("clip"), device="cpu")


@pytest.fixture(scope="module")
def whole(encoder: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a gallery."""
    root = tmp_path_factory.mktemp("whole")
    for row in range(5):
        paint(root / f"{row}.png", row)
    lines = "".join(f"{row}.png,picture {row}\n" for row in range(5))
    (root / "captions.csv").write_text("image,caption\n" + lines)
    rebuild(root / "gallery", root, encoder)
    return root / "gallery"


def rebuild(folder: Path, source: Path, encoder: DualEncoder) -> Gallery:
    return build_gallery(source / "captions.csv", folder, encoder, calibrate=False)


@pytest.mark.parametrize("harm", [name for name in HARMS if name != "a bit flipped"])  # see test_gallery_database
def test_a_damaged_gallery_is_found_and_mended_by_the_command_named(
    harm: str, whole: Path, encoder: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = Contents.of(whole, encoder)
    folder = tmp_path / "gallery"
    shutil.copytree(whole, folder)
    HARMS[harm](folder / DATABASE)
    assert main(["check", str(folder)]) == 2
    assert ("python -m alignment.gallery build" in capsys.readouterr().err) is (harm != "a folder")
    if harm == "a folder":
        with pytest.raises(IsADirectoryError) as met:
            rebuild(folder, whole.parent, encoder)
        assert f"{folder / DATABASE} is in the way (Is a directory): move it" in describe_error(met.value)
        (folder / DATABASE).rmdir()
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=r"python -m alignment\.gallery build"):
            Contents.of(folder, encoder)
    rebuild(folder, whole.parent, encoder)
    mended = Contents.of(folder, encoder)
    assert (mended.pictures, mended.captions) == (expected.pictures, expected.captions)
    torch.testing.assert_close(mended.images, expected.images, atol=1e-3, rtol=0)
    torch.testing.assert_close(mended.texts, expected.texts, atol=1e-3, rtol=0)
    assert mended.thumbnails == expected.thumbnails
    assert main(["check", str(folder)]) == 0
    assert [path.name for path in folder.iterdir()] == [DATABASE]


def test_a_damaged_thumbnail_is_not_shown_but_the_picture_itself(
    whole: Path, encoder: DualEncoder, tmp_path: Path
) -> None:
    shutil.copytree(whole.parent, tmp_path, dirs_exist_ok=True)
    with closing(sqlite3.connect(tmp_path / "gallery" / DATABASE)) as connection, connection:
        connection.execute("UPDATE thumbnail SET webp = 'RIFFxxxxWEBP'")
    gallery = Gallery.load(tmp_path / "gallery", encoder)
    engine = AlignmentEngine(encoder, gallery)
    assert engine.can_show(gallery.pictures[2].id)
    shown = engine.thumbnail(gallery.pictures[2].id)
    assert shown[8:12] == b"WEBP"
    assert len(shown) > 100


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
    folder = galleries.copy("shared")
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


# ---------------------------------------------------------------- caches


INFO = ModelInfo("f00d" * 16, 12.5, None, 24)


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_facts_of_a_model_are_not_believed(harm: str, tmp_path: Path) -> None:
    GraphCache(tmp_path / "entry").write_info(INFO)
    assert GraphCache(tmp_path / "entry").info() == INFO
    HARMS[harm](tmp_path / "entry" / "facts.json")
    assert GraphCache(tmp_path / "entry").info() is None


def test_a_cache_that_cannot_be_written_is_told_and_done_without(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        GraphCache(tmp_path / "file" / "entry").write_info(INFO)
    assert "facts.json is not kept for the next start, which takes longer: [Errno 20] Not a directory" in caplog.text
    assert GraphCache(tmp_path / "file" / "entry").info() is None


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A WebDataset shard of three pictures, with a cache of its own."""
    import tarfile

    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "00000.tar"
    with tarfile.open(source, "w") as tar:
        for row in range(3):
            paint(tmp_path / f"{row}.png", row)
            (tmp_path / f"{row}.txt").write_text(f"picture {row}")
            for ending in ("png", "txt"):
                tar.add(tmp_path / f"{row}.{ending}", f"{row}.{ending}")
    return source


@pytest.mark.parametrize("harm", [name for name in HARMS if name != "a folder"])
def test_damaged_pictures_and_lists_of_a_converted_data_set_are_made_again(
    harm: str, shard: Path, tmp_path: Path
) -> None:
    expected = read_data(shard).pairs
    contents = [Path(pair.image).read_bytes() for pair in expected]
    for path in sorted((tmp_path / "cache").rglob("*.*")):
        HARMS[harm](path)
        later = path.parent.stat().st_mtime_ns + 10**9  # after the list was written
        if path.exists():
            os.utime(path, ns=(later, later))
        assert read_data(shard).pairs == expected
        assert [Path(pair.image).read_bytes() for pair in expected] == contents


def test_something_in_the_place_of_a_converted_picture_is_told(shard: Path) -> None:
    path = Path(read_data(shard).pairs[0].image)
    HARMS["a folder"](path)
    with pytest.raises(IsADirectoryError):
        read_data(shard)
    path.rmdir()
    with Image.open(read_data(shard).pairs[0].image) as image:
        assert image.size == (60, 40)
