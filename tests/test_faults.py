"""Damaged, missing and unwritable files: what is wrong and what mends it is said, and nothing wrong is ever used."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from fault_injection import HARMS
from PIL import Image
from test_kills import Contents, paint

from alignment.data import read_data
from alignment.engine import AlignmentEngine
from alignment.file_errors import describe_error
from alignment.gallery import Gallery, build_gallery, main
from alignment.gallery.database import DATABASE
from alignment.model import DualEncoder
from alignment.model.graph_cache import GraphCache, ModelInfo

Checkpoint = Callable[[str], Path]


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
