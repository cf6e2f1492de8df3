"""A gallery on a Milvus server: pushed, brought up to date, fetched back, and kept apart from other galleries."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from index_contract import search_all
from torch import Tensor

from alignment.gallery.command import build_parser
from alignment.gallery.database import DATABASE, GalleryDatabase
from alignment.gallery.milvus_sync import Remote
from alignment.gallery.records import Caption, FileFingerprint, GalleryMetadata, Picture
from alignment.gallery.writer import write_gallery
from alignment.index import MilvusIndex, Server
from alignment.index.server import Connection

DIM, COUNT = 24, 3000
FINGERPRINT = "f00d" * 16
NUMBERS = count()


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pictures(count: int = COUNT, prefix: str = "p") -> list[Picture]:
    return [
        Picture(
            f"{prefix}{row}",
            f"trip {row % 3}/{row // 100}/{row}.jpg",
            file=FileFingerprint(1, 1, f"{ord(prefix[0]):02x}{row:062x}"),
        )
        for row in range(count)
    ]


CAPTIONS = [Caption(f"c{row}", f"caption {row}", ("en", "zh", "")[row % 3]) for row in range(20)]


def write(
    folder: Path, items: Sequence[Picture], embeds: Tensor | None = None, captions: Sequence[Caption] = CAPTIONS, **more
) -> None:
    metadata = replace(GalleryMetadata(FINGERPRINT, "some/model", 20.0, None), **more)
    rows = unit(len(items), DIM) if embeds is None else embeds
    write_gallery(folder, items, captions, {"picture": [rows], "caption": [unit(20, DIM, seed=1)]}, DIM, metadata, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A gallery folder; no other gallery on the server has its name."""
    folder = tmp_path / f"album_{next(NUMBERS)}"
    write(folder, pictures())
    return folder


@pytest.fixture
def remote(folder: Path, place: Server) -> Iterator[Remote]:
    """Its collections on the server; deleted afterwards."""
    remote = Remote(place, folder.name, folder)
    yield remote
    remote.drop(FINGERPRINT)


def run(command: str, folder: Path, remote: Remote, *options: str) -> None:
    args = build_parser().parse_args([command, str(folder), "--index", remote.server.uri, *options])
    assert args.run(args, Remote.of(args.index, args.folder, args.index_name)) == 0


def push(folder: Path, remote: Remote, *options: str) -> None:
    run("push", folder, remote, *options)


def opened(folder: Path, remote: Remote) -> MilvusIndex:
    """Open the pictures' collection as the app does."""
    with closing(GalleryDatabase(folder)) as database:
        return replace(remote, folder=folder).open("picture", database.metadata.fingerprint, database.ids("picture"))


def exists(place: Server, name: str) -> bool:
    with closing(Connection(place)) as connection:
        return bool(connection.call("has_collection", name))


def test_a_push_says_what_it_does_and_a_second_one_does_nothing(
    folder: Path, remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{folder.name}_image_embeds_f00df00df00d"
    push(folder, remote, "--dry-run")
    assert f"{name}: {COUNT} rows, {COUNT} to be sent, 0 to be taken out" in capsys.readouterr().out
    assert not exists(remote.server, name)
    push(folder, remote)
    assert f"{name}: {COUNT} rows, {COUNT} sent, 0 were there, 0 taken out" in capsys.readouterr().out
    push(folder, remote)
    assert f"{name}: {COUNT} rows, 0 sent, {COUNT} were there, 0 taken out" in capsys.readouterr().out
    push(folder, remote, "--drop")
    assert f"{name}: deleted, {COUNT} rows" in capsys.readouterr().out
    assert not exists(remote.server, name)


def test_rows_and_tags_of_the_folder_are_on_the_server(folder: Path, remote: Remote) -> None:
    push(folder, remote)
    with closing(GalleryDatabase(folder)) as database, closing(opened(folder, remote)) as index:
        ids = database.ids("picture")
        torch.testing.assert_close(index.embeds(ids), database.embeds("picture", ids).float())
        for tag in (None, "trip 1", "trip 1/7", "trip", "nowhere"):
            assert index.ids(tag).equal(database.ids("picture", tag).sort().values)
        ids = database.ids("caption")
        with closing(remote.open("caption", FINGERPRINT, ids)) as captions:
            for lang in ("zh", ""):
                assert captions.ids(lang).equal(database.ids("caption", lang).sort().values)


def test_a_push_that_was_interrupted_goes_on(
    folder: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upsert = MilvusIndex.upsert

    def half(index: MilvusIndex, ids: Tensor, embeds: Tensor, tags: list) -> None:
        upsert(index, ids[:2000], embeds[:2000], tags[:2000])
        raise KeyboardInterrupt

    monkeypatch.setattr(MilvusIndex, "upsert", half)
    with pytest.raises(KeyboardInterrupt):
        push(folder, remote)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"gallery push {folder} --index"):
        opened(folder, remote)
    push(folder, remote)
    assert f"{COUNT} rows, {COUNT - 2000} sent, 2000 were there" in capsys.readouterr().out
    opened(folder, remote).close()


def test_a_changed_gallery_is_brought_up_to_date(folder: Path, remote: Remote) -> None:
    push(folder, remote)
    with closing(opened(folder, remote)) as old:
        items = [*pictures()[3:], *pictures(4, "new")]
        items[10] = replace(items[10], file=FileFingerprint(2, 2, "ab" * 32))
        write(folder, items, torch.cat([unit(COUNT, DIM)[3:], unit(4, DIM, seed=7)]))
        with pytest.raises(ValueError, match="bring the server up to date"):
            opened(folder, remote)
        push(folder, remote)
        with closing(GalleryDatabase(folder)) as database, closing(opened(folder, remote)) as new:
            ids = database.ids("picture")
            assert new.ids().equal(ids.sort().values)
            assert search_all(old, unit(4, DIM, seed=7), 1)[1].flatten().equal(ids[-4:])


def test_a_gallery_that_was_never_pushed_says_how(folder: Path, remote: Remote) -> None:
    with pytest.raises(ValueError, match=f"gallery push {folder} --index {remote.server.uri}"):
        opened(folder, remote)


def test_rows_that_were_deleted_on_the_server_are_sent_again(folder: Path, remote: Remote) -> None:
    push(folder, remote)
    with closing(opened(folder, remote)) as index:
        index.delete(index.ids()[:1])
        with pytest.raises(ValueError, match="bring the server up to date"):
            opened(folder, remote)
        push(folder, remote)
        assert len(index) == COUNT


def test_damaged_rows_are_not_sent_and_can_be_fetched_back(
    folder: Path, remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    push(folder, remote)
    with closing(GalleryDatabase(folder)) as database:
        expected = database.embeds("picture", database.ids("picture"))
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        connection.execute("UPDATE embedding SET embeds = zeroblob(?) WHERE id IN (5, 7)", (2 * DIM,))
        connection.execute("DELETE FROM embedding WHERE id > 2000")
        connection.commit()
    with closing(GalleryDatabase(folder)) as database:
        assert database.check()
    with pytest.raises(ValueError, match="damaged"):
        push(folder, Remote(remote.server, "elsewhere", folder), "--index-name", "elsewhere")
    Remote(remote.server, "elsewhere", folder).drop(FINGERPRINT)
    run("pull", folder, remote)
    assert f"{COUNT} pictures and {len(CAPTIONS)} captions are here again" in capsys.readouterr().out
    with closing(GalleryDatabase(folder)) as database:
        assert database.check() == []
        assert database.embeds("picture", database.ids("picture")).equal(expected)


@pytest.mark.parametrize("prefix", ["p", "x"], ids=["with a picture in both", "of other pictures"])
def test_another_gallery_of_the_same_name_is_not_changed(
    prefix: str, folder: Path, remote: Remote, tmp_path: Path
) -> None:
    push(folder, remote)
    other = tmp_path / "elsewhere" / folder.name
    write(other, pictures(50, prefix))
    for options in ((), ("--dry-run",)):
        with pytest.raises(ValueError, match=f"holds {COUNT} rows of another gallery"):
            push(other, remote, *options)
    with pytest.raises(ValueError, match="is not what"):
        opened(other, remote)
    assert len(opened(folder, remote)) == COUNT


def test_a_copy_of_the_folder_belongs_to_the_same_gallery(
    folder: Path, remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(folder, remote)
    copy = tmp_path / "copy" / folder.name
    shutil.copytree(folder, copy)
    push(copy, remote)
    assert "0 sent" in capsys.readouterr().out.splitlines()[-2]
    opened(copy, remote).close()


def test_collections_of_an_earlier_model_are_named_and_deleted(
    folder: Path, remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    push(folder, remote)
    old, new = (remote.collection("picture", fingerprint) for fingerprint in (FINGERPRINT, "beef" * 16))
    foreign = MilvusIndex.create(remote.server, f"{remote.name}_image_embeds_0123456789ab", DIM, {"owner": "else"})
    write(folder, pictures(30), fingerprint="beef" * 16)
    try:
        push(folder, remote)
        assert f"there is still {old} ({COUNT} rows)" in capsys.readouterr().out
        push(folder, remote, "--drop")
        assert [exists(remote.server, name) for name in (old, new, foreign.name)] == [False, False, True]
    finally:
        foreign.drop()
        foreign.close()


def test_a_collection_of_another_model_is_refused(folder: Path, remote: Remote) -> None:
    name = remote.collection("picture", FINGERPRINT)
    with closing(MilvusIndex.create(remote.server, name, DIM, {"fingerprint": "f00df00df00d" + "0" * 52})) as index:
        for attempt in (opened, push):
            with pytest.raises(ValueError, match="made by another model"):
                attempt(folder, remote)
        index.drop()
