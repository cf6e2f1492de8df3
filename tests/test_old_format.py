"""Galleries of the previous format are converted once, with all they hold; `old_gallery` was made by that version."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from fault_injection import obey_permissions

from alignment.gallery.database import DATABASE, GalleryDatabase
from alignment.gallery.records import Caption, FileFingerprint
from alignment.index import LocalIndex

OLD = Path(__file__).parent / "old_gallery"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "gallery"))


def test_a_gallery_is_converted_with_all_it_holds(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        database = GalleryDatabase(folder)
    assert "converted to gallery.db" in caplog.text
    assert [path.name for path in folder.iterdir()] == [DATABASE]
    assert database.check() == []
    metadata = database.metadata
    assert (metadata.fingerprint, metadata.model, metadata.options) == ("f00d" * 16, "some/model", "--split dev")
    assert (metadata.logit_scale, metadata.num_pictures, metadata.num_captions) == (12.5, 3, 5)
    assert metadata.calibration
    assert {name: len(part) for name, part in database.cohort().items()} == {"image_embeds": 4, "text_embeds": 5}
    pictures = database.pictures(database.ids("picture").tolist())
    sources = ["package:skimage/data/cat.png", "caf\udce9/1.jpg", "caf\udce9/2.jpg"]
    assert [picture.source for picture in pictures] == sources
    assert pictures[1].file == FileFingerprint(11, 10**18 + 1, "01" * 32)
    assert pictures[1].captions == {"en": "Picture 1."}
    assert pictures[1].credit == "me"
    captions = database.captions(database.ids("caption").tolist())
    assert captions[3:] == [Caption("s.zh", "一只猫。", "zh", "s", "pets"), Caption("x", "A dog.")]
    assert database.embeds("picture", database.ids("picture")).equal(torch.eye(8)[:3].half())
    rows = database.embeds("caption", database.ids("caption")).float()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5), atol=1e-3, rtol=0)
    assert [LocalIndex(rows).search(row, 1)[1].tolist() for row in rows] == [[row] for row in range(5)]
    thumbnail = database.thumbnail(pictures[1])
    assert thumbnail == (OLD / "thumbnails" / "p1.webp").read_bytes()
    database.close()
    caplog.clear()
    GalleryDatabase(folder).close()
    assert not caplog.records


@pytest.mark.parametrize(
    "name", ["captions.jsonl", "embeddings.safetensors", "gallery.json", "text_embeds-*/*.safetensors"]
)
def test_a_damaged_one_is_not(name: str, folder: Path) -> None:
    (path,) = folder.glob(name)
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileNotFoundError, match=r"alignment\.gallery build"):
        GalleryDatabase(folder)
    assert (folder / "gallery.json").exists()


def test_one_that_cannot_be_written_is_told(folder: Path) -> None:
    folder.chmod(0o555)
    try:
        obey_permissions()
        with pytest.raises(PermissionError):
            GalleryDatabase(folder)
    finally:
        obey_permissions(False)
        folder.chmod(0o755)
