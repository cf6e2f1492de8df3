"""Folders that may not be listed, links, loops, thumbnails and galleries while a data set is listed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from fault_injection import obey_permissions
from PIL import Image

from alignment.data import read_data
from alignment.evaluate.zero_shot import read_class_folders
from alignment.gallery import BuildReport, Gallery, build_gallery, main
from alignment.model import DualEncoder

Shut = Callable[[Path, int], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def encoder(checkpoint: Callable[[str], Path]) -> DualEncoder:
    return DualEncoder.load(checkpoint("clip"), device="cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for shade, name in enumerate(("a", "b/c", "b/d", "e/f")):
        picture(folder / f"{name}.png", 50 * shade)
    return folder


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)


def build(source: Path, out: Path, encoder: DualEncoder) -> tuple[Gallery, BuildReport]:
    report = BuildReport()
    return build_gallery(source, out, encoder, calibrate=False, report=report), report


def sources(gallery: Gallery) -> set[str]:
    return {picture.source for picture in gallery.pictures}


def ids(folder: Path) -> list[str]:
    return [pair.id for pair in read_data(folder).pairs]


@contextmanager
def shut(path: Path, mode: int) -> Iterator[None]:
    """Take permissions away, from root too."""
    path.chmod(mode)
    if os.geteuid() == 0:
        obey_permissions()
    try:
        yield
    finally:
        if os.geteuid() == 0:
            obey_permissions(False)
        path.chmod(0o755)


# ---------------------------------------------------------------- what may not be listed


def test_a_folder_that_cannot_be_listed_is_named(photos: Path) -> None:
    with shut(photos / "b", 0):
        reading = read_data(photos)
    assert [pair.id for pair in reading.pairs] == ["a.png", "e/f.png"]
    assert reading.unlisted == (str(photos / "b"),)
    assert reading.left_out == {"folders that cannot be listed": ("b",)}


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o311], ids=oct)
def test_its_pictures_stay_in_the_gallery(mode: int, photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    before, _ = build(photos, tmp_path / "out", encoder)
    row = [picture.source for picture in before.pictures].index("b/d.png")
    (photos / "a.png").unlink()
    with shut(photos / "b", mode):
        gallery, report = build(photos, tmp_path / "out", encoder)
    assert sources(gallery) == {"b/c.png", "b/d.png", "e/f.png"}
    assert sorted(report.held) == (["b/c.png", "b/d.png"] if mode != 0o311 else [])  # which may be read if known
    assert not report.is_complete
    again = [picture.source for picture in gallery.pictures].index("b/d.png")
    assert (gallery.images.embeds[again] == before.images.embeds[row]).all()
    assert all(isinstance(gallery.thumbnail(picture), bytes) for picture in gallery.pictures)
    healed, report = build(photos, tmp_path / "out", encoder)
    assert (sources(healed), sum(report.encoded.values()), report.is_complete) == (sources(gallery), 0, True)


def test_captions_of_what_cannot_be_listed_stay_too(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    (photos / "b" / "metadata.csv").write_text("file_name,caption\nc.png,a red square\n")
    build(photos, tmp_path / "out", encoder)
    with shut(photos / "b", 0):
        gallery, _ = build(photos, tmp_path / "out", encoder)
    assert [caption.text for caption in gallery.captions] == ["a red square"]


def test_the_exit_status_says_it(
    photos: Path, tmp_path: Path, encoder: DualEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(photos), "--out", str(tmp_path / "out"), "--model", encoder.name, "--no-calibration"]
    with shut(photos / "b", 0):
        assert main(command) == 1
    told = capsys.readouterr()
    assert "folders that cannot be listed: 1 (b)" in told.out
    assert "not complete" in told.err
    with shut(photos, 0):
        assert main(command) == 2
    assert f"{photos} may not be read" in capsys.readouterr().err
    assert main(command) == 0


def test_a_link_to_a_disk_that_is_away_keeps_its_pictures(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    disk = tmp_path / "disk"
    picture(disk / "g.png", 200)
    (photos / "link").symlink_to(disk)
    assert "link/g.png" in sources(build(photos, tmp_path / "out", encoder)[0])
    disk.rename(tmp_path / "unplugged")
    gallery, report = build(photos, tmp_path / "out", encoder)
    assert "link/g.png" in sources(gallery)
    assert report.reading.unlisted == (str(photos / "link"),)


def test_a_class_that_cannot_be_listed_stops_the_measuring(photos: Path) -> None:
    (photos / "e" / "@eaDir").mkdir()
    picture(photos / "@eaDir" / "thumb.png")
    assert read_class_folders(photos).class_names == [["b"], ["e"]]
    with shut(photos / "b", 0), pytest.raises(PermissionError, match=str(photos / "b")):
        read_class_folders(photos)


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("target", ["..", "../..", ".", "../photos", "loop"])
def test_a_link_leads_neither_out_nor_round(target: str, photos: Path, tmp_path: Path) -> None:
    picture(tmp_path / "private.png")
    (photos / "loop").symlink_to(target)
    (photos / "b" / "loop").symlink_to(Path("..") / target)
    assert ids(photos) == ["a.png", "b/c.png", "b/d.png", "e/f.png"]


def test_a_link_from_a_linked_folder_to_its_parent_is_not_followed(photos: Path, tmp_path: Path) -> None:
    picture(tmp_path / "shared" / "private.png")
    picture(tmp_path / "shared" / "album" / "g.png")
    (tmp_path / "shared" / "album" / "up").symlink_to("..")
    (photos / "z").symlink_to(tmp_path / "shared" / "album")
    assert ids(photos) == ["a.png", "b/c.png", "b/d.png", "e/f.png", "z/g.png"]


def test_a_folder_that_is_linked_from_beside_it_keeps_its_own_name(photos: Path) -> None:
    (photos / "a_link").symlink_to("e")
    (photos / ".kept").mkdir()
    picture(photos / ".kept" / "g.png")
    (photos / "shown").symlink_to(".kept")  # a hidden one is only listed by its link
    assert ids(photos) == ["a.png", "b/c.png", "b/d.png", "e/f.png", "shown/g.png"]


# ---------------------------------------------------------------- tables that name what may not be listed


@pytest.mark.parametrize("mode", [0o000, 0o444], ids=oct)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["below", "elsewhere"])
def test_pictures_that_a_table_names_in_a_shut_folder_are_not_called_missing(
    mode: int, elsewhere: bool, photos: Path, tmp_path: Path, encoder: DualEncoder
) -> None:
    folder = tmp_path / "elsewhere" if elsewhere else photos / "b"
    (photos / "b").rename(folder)
    start = f"{folder}/" if elsewhere else "b/"
    lines = [
        "image,caption",
        "a.png,one",
        f"{start}c.png,two",
        f"{start}d.png,three",
        "b/gone.png,four",
        "e/f.png,five",
    ]
    (photos / "captions.csv").write_text("\n".join(lines))
    build(photos, tmp_path / "out", encoder)
    with shut(folder, mode):
        reading = read_data(photos)
        gallery, report = build(photos, tmp_path / "out", encoder)
    if mode == 0 or elsewhere:
        gone = [] if elsewhere else ["b/gone.png"]
        assert reading.unlisted == (str(folder),)
        assert sorted(reading.left_out["pictures in folders that cannot be listed"]) == sorted(
            [f"{start}c.png", f"{start}d.png", *gone]
        )
        assert reading.left_out.get("missing pictures", ()) == (("b/gone.png",) if elsewhere else ())
    assert len(gallery.pictures) == 4
    assert {caption.text for caption in gallery.captions} == {"one", "two", "three", "five"}
    assert not report.is_complete


# ---------------------------------------------------------------- thumbnails and galleries


@pytest.mark.parametrize("name", ["@eaDir", ".thumbnails", "b/@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"])
def test_thumbnails_and_waste_are_no_photos(name: str, photos: Path) -> None:
    picture(photos / name / "a.png" / "SYNOPHOTO_THUMB_M.png")
    assert ids(photos) == ["a.png", "b/c.png", "b/d.png", "e/f.png"]
    left_out = dict(read_data(photos).left_out)
    assert left_out == ({} if name.startswith(".") else {"folders of thumbnails, waste or galleries": (name,)})


def test_galleries_built_into_the_source_do_not_count(photos: Path, encoder: DualEncoder) -> None:
    shutil.copytree(Path(__file__).parent / "old_gallery", photos / "b" / "old")  # which has thumbnails
    for out in ("gallery", "b/another", "again"):
        gallery, report = build(photos, photos / out, encoder)
        assert len(gallery.pictures) == 4
    assert report.reading.left_out["folders of thumbnails, waste or galleries"] == ("b/old",)


def test_pictures_in_the_folder_that_becomes_the_gallery_are_named(photos: Path, encoder: DualEncoder) -> None:
    gallery, report = build(photos, photos / "b", encoder)
    assert sources(gallery) == {"a.png", "e/f.png"}
    assert report.reading.left_out == {"pictures in the folder of the gallery itself": ("b/c.png", "b/d.png")}
    with pytest.raises(ValueError, match="choose another one for --out"):
        build(photos / "e", photos, encoder)
