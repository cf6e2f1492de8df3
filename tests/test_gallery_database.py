"""A gallery's SQLite file: what is written is read back, and damage is found."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fault_injection import obey_permissions
from torch import Tensor

from alignment.gallery.database import DATABASE, GalleryDatabase, Kind
from alignment.gallery.records import Caption, FileFingerprint, GalleryMetadata, Picture, item_ids
from alignment.gallery.writer import GalleryWriter, write_gallery

METADATA = GalleryMetadata("f" * 64, "my/model", 12.5, None, source="/far/away", built="now", calibration={"a": [1.5]})
PICTURES = [
    Picture("one", "caf\udce9/a/1.jpg", {"en": "雪 A cat."}, "me", file=FileFingerprint(3, 2**60, "01" * 32)),
    Picture("two", "package:skimage/data/cat.png", file=FileFingerprint(3, 0, "02" * 32)),
    Picture("three", "caf\udce9/b 3.jpg", file=FileFingerprint(3, 5, "03" * 32)),
    Picture("four", "a'b/4.jpg", file=FileFingerprint(3, 5, "01" * 32)),  # the same content as the first
]
CAPTIONS = [Caption("one.en", "A cat.", "en", "one", "pets"), Caption("x", "雪。", "zh"), Caption("y", "A cat.")]


def unit(count: int, seed: int = 0) -> Tensor:
    rows = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1).half()


ROWS = {"picture": unit(3)[[0, 1, 2, 0]], "caption": unit(2, 1)[[0, 1, 0]]}
COHORT = {"image_embeds": unit(5, 2), "nonsense_embeds": unit(0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    batches: dict[Kind, Sequence[Tensor]] = {"picture": ROWS["picture"].split(3), "caption": ROWS["caption"].split(2)}
    shown = {"one": b"RIFF one", "three": b"RIFF three"}
    write_gallery(tmp_path, PICTURES, CAPTIONS, batches, 16, METADATA, COHORT, lambda picture: shown.get(picture.id))
    return tmp_path


def test_everything_is_read_as_it_was_written(folder: Path) -> None:
    database = GalleryDatabase(folder)
    assert database.metadata == replace(METADATA, num_pictures=4, num_captions=3)
    ids = database.ids("picture")
    assert ids.equal(item_ids(PICTURES))
    assert database.ids("caption").equal(item_ids(CAPTIONS))
    rooted = [replace(picture, root="/far/away") for picture in PICTURES]
    assert database.pictures(ids.tolist()) == rooted
    assert [picture.file for picture in database.pictures(ids.tolist())] == [picture.file for picture in PICTURES]
    assert database.pictures(ids[[2, 0, 2]].tolist()) == [rooted[2], rooted[0], rooted[2]]
    assert database.captions(database.ids("caption").tolist()) == CAPTIONS
    assert database.embeds("picture", ids[[3, 1]]).equal(ROWS["picture"][[3, 1]])
    assert database.embeds("picture", ids[[]]).shape == (0, 16)
    batches = list(database.batches("caption", 2))
    assert torch.cat([ids for ids, _ in batches]).equal(database.ids("caption"))
    assert torch.cat([rows for _, rows in batches]).equal(ROWS["caption"])
    assert {name: part.shape for name, part in database.cohort().items()} == {
        "image_embeds": (5, 16),
        "nonsense_embeds": (0, 16),
    }
    assert database.cohort()["image_embeds"].equal(COHORT["image_embeds"])
    assert [database.thumbnail(picture) for picture in PICTURES] == [b"RIFF one", None, b"RIFF three", b"RIFF one"]
    assert database.id_of("picture", "two") == ids[1]
    assert database.id_of("caption", "y") == database.ids("caption")[2]
    assert database.id_of("picture", "none") is None
    assert database.check() == []


def test_folders_and_languages_are_tags(folder: Path) -> None:
    database = GalleryDatabase(folder)
    pictures, captions = database.ids("picture"), database.ids("caption")
    assert database.tags("picture") == {"a'b": 1, "caf\udce9": 2, "caf\udce9/a": 1}
    assert database.tags("caption") == {"": 1, "en": 1, "zh": 1}
    assert database.ids("picture", "caf\udce9").equal(pictures[[0, 2]])
    assert database.ids("picture", "caf\udce9/a").equal(pictures[[0]])
    assert database.ids("picture", "caf").equal(pictures[[]])
    assert database.ids("caption", "zh").equal(captions[[1]])


def test_an_id_that_is_gone_is_an_error(folder: Path) -> None:
    database = GalleryDatabase(folder)
    for fetch in (database.pictures, database.captions):
        with pytest.raises(KeyError):
            fetch([1])
    with pytest.raises(KeyError):
        database.embeds("picture", torch.tensor([1]))


def test_no_gallery_and_no_finished_gallery_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / DATABASE).touch()
    (tmp_path / "file").touch()
    for name in ("none", "begun", "file"):
        with pytest.raises(FileNotFoundError, match=r"gallery build SOURCE --out .*--model my/model"):
            GalleryDatabase(tmp_path / name, "my/model")


def test_no_flipped_bit_is_served(folder: Path) -> None:
    """Each of some thousand bits, in every table: it is found, or nothing that is read has changed."""
    path, draw = folder / DATABASE, random.Random(0)
    whole = path.read_bytes()
    used = [place for place in range(len(whole)) if whole[place]]  # most of these small pages is empty
    sound = _content(folder)
    found = 0
    for place in draw.sample(used, 700) + draw.sample(range(len(whole)), 50):
        data = bytearray(whole)
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            database = GalleryDatabase(folder)
            faults = database.check()
            database.close()
            if not faults:
                assert _content(folder) == sound
            found += bool(faults)
        except (ValueError, FileNotFoundError, OSError):
            found += 1
    assert found > 300


def _content(folder: Path) -> list[object]:
    database = GalleryDatabase(folder)
    pictures = database.pictures(database.ids("picture").tolist())
    everything = [
        database.metadata,
        pictures,
        [picture.file for picture in pictures],
        [database.thumbnail(picture) for picture in pictures],
        database.captions(database.ids("caption").tolist()),
        *(part.tolist() for kind in ("picture", "caption") for batch in database.batches(kind) for part in batch),
        {name: part.tolist() for name, part in database.cohort().items()},
    ]
    database.close()
    return everything


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE embedding SET embeds = zeroblob(32) WHERE id = 1",
        "UPDATE embedding SET key = key + 1 WHERE id = 1",
        "UPDATE thumbnail SET webp = 'x' WHERE id = 1",
        "UPDATE picture SET credit = 'you' WHERE name = 'two'",
        "UPDATE picture SET embedding = 99 WHERE name = 'two'",
        "UPDATE caption SET text = 'A dog.' WHERE name = 'y'",
        "UPDATE meta SET value = zeroblob(32) WHERE key = 'cohort.image_embeds'",
        "DELETE FROM embedding WHERE id = 2",
        "DELETE FROM caption WHERE name = 'x'",
    ],
)
def test_check_finds_damage_in_every_table(damage: str, folder: Path) -> None:
    with sqlite3.connect(folder / DATABASE) as connection:
        assert connection.execute(damage).rowcount == 1
    connection.close()
    assert GalleryDatabase(folder).check()


@pytest.mark.parametrize("size", [0, 100, 70_000, -1])
def test_what_is_cut_short_or_no_database_is_damaged(size: int, folder: Path) -> None:
    path = folder / DATABASE
    path.write_bytes(path.read_bytes()[:size] if size >= 0 else os.urandom(200_000))
    with pytest.raises((ValueError, FileNotFoundError), match="gallery build"):
        GalleryDatabase(folder)


def test_a_source_beside_the_gallery_moves_with_it(tmp_path: Path) -> None:
    photos, gallery = tmp_path / "here" / "photos", tmp_path / "here" / "gallery"
    photos.mkdir(parents=True)
    metadata = replace(METADATA, source=str(photos))
    write_gallery(gallery, PICTURES[:1], [], {"picture": [ROWS["picture"][:1]]}, 16, metadata, {})
    (tmp_path / "here").rename(tmp_path / "there")
    database = GalleryDatabase(tmp_path / "there" / "gallery")
    assert database.metadata.source == str(tmp_path / "there" / "photos")
    [picture] = database.pictures(database.ids("picture").tolist())
    assert picture.path == tmp_path / "there" / "photos" / PICTURES[0].source


def test_a_gallery_of_nothing_but_captions_is_one(tmp_path: Path) -> None:
    write_gallery(tmp_path, [], CAPTIONS, {"caption": [ROWS["caption"]]}, 16, METADATA, {})
    database = GalleryDatabase(tmp_path)
    assert database.cohort() == {}
    assert database.embeds("picture", database.ids("picture")).shape == (0, 16)
    assert list(database.batches("picture")) == []
    assert database.check() == []


def test_a_gallery_on_a_read_only_medium_can_be_read(folder: Path) -> None:
    (folder / DATABASE).chmod(0o444)
    folder.chmod(0o555)
    try:
        obey_permissions()
        assert GalleryDatabase(folder).check() == []
        (folder / DATABASE).chmod(0)
        with pytest.raises(PermissionError):
            GalleryDatabase(folder)
    finally:
        obey_permissions(False)
        folder.chmod(0o755)


def test_what_a_killed_process_left_half_written_is_undone(folder: Path) -> None:
    """The transaction is in the middle of its commit: the journal is complete, the file half new."""
    expected, copy = _content(folder), folder.parent / "copy"
    copy.mkdir()
    with closing(sqlite3.connect(folder / DATABASE, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size=1")
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            connection.execute("INSERT INTO thumbnail(sha256, webp) VALUES (randomblob(32), zeroblob(200000))")
        connection.execute("UPDATE picture SET credit = zeroblob(200000)")
        shutil.copy(folder / DATABASE, copy)
        shutil.copy(folder / f"{DATABASE}-journal", copy)
    copy.chmod(0o555)
    try:
        obey_permissions()
        with pytest.raises(PermissionError):  # it cannot be undone here, and is not served
            GalleryDatabase(copy)
    finally:
        obey_permissions(False)
        copy.chmod(0o755)
    assert _content(copy) == expected
    assert [path.name for path in copy.iterdir()] == [DATABASE]


def test_threads_read_while_another_connection_writes(folder: Path) -> None:
    database = GalleryDatabase(folder)
    ids, wrong = database.ids("picture"), list[object]()

    def read() -> None:
        try:
            for _ in range(100):
                assert len(database.pictures(ids.tolist())) == 4
                assert database.embeds("picture", ids).equal(ROWS["picture"])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    with closing(GalleryWriter(folder / DATABASE, METADATA.fingerprint, 16)) as writer:
        for row in range(20):
            writer.add("caption", [f"new {row}"], unit(1, row))
            writer.commit()
    for thread in threads:
        thread.join()
    assert wrong == []
