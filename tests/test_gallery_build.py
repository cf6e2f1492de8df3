"""Builds of a gallery: what is new is embedded, what has not changed is kept, what is damaged mended."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from alignment.gallery import BuildReport, Gallery, build_gallery, main, scan
from alignment.gallery.database import DATABASE, GalleryDatabase
from alignment.gallery.records import CAPTIONS, PICTURES
from alignment.model import DualEncoder
from alignment.preprocess import open_image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def encoder(checkpoint: Callable[[str], Path]) -> DualEncoder:
    return DualEncoder.load(checkpoint("clip"), device="cpu")


@pytest.fixture(scope="module")
def other(checkpoint: Callable[[str], Path]) -> DualEncoder:
    return DualEncoder.load(checkpoint("siglip"), device="cpu")


@pytest.fixture
def photos(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    """A folder of three photos, one of them deeper down."""
    folder = tmp_path / "photos"
    (folder / "holiday" / "day 1").mkdir(parents=True)
    pictures[0].save(folder / "a.png")
    pictures[1].save(folder / "holiday" / "b.png")
    pictures[2].resize((800, 400)).save(folder / "holiday" / "day 1" / "c.JPG")
    return folder


def build(source: Path, out: Path, encoder: DualEncoder, **options: object) -> tuple[Gallery, BuildReport]:
    report = BuildReport()
    return build_gallery(source, out, encoder, report=report, **{"calibrate": False, **options}), report


def counts(report: BuildReport) -> tuple[int, int, int]:
    return report.encoded["pictures"], report.reused["pictures"], len(report.skipped)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Everything in a folder: content and time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def stored(folder: Path) -> dict[str, int]:
    """Count the rows of the tables that records refer to."""
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        counted = (
            connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("embedding", "thumbnail")
        )
        return dict(zip(("embedding", "thumbnail"), counted, strict=True))


def touch(path: Path, seconds: int = 10) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + seconds * 10**9))


# ---------------------------------------------------------------- building


def test_a_folder_is_read_to_the_bottom(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    gallery, report = build(photos, tmp_path / "out", encoder)
    assert [picture.source for picture in gallery.pictures] == ["a.png", "holiday/b.png", "holiday/day 1/c.JPG"]
    assert counts(report) == (3, 0, 0)
    expected = encoder.encode_images([picture.path for picture in gallery.pictures])
    torch.testing.assert_close(gallery.images.embeds, expected, atol=1e-3, rtol=0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [DATABASE]


def test_a_gallery_among_its_own_pictures_does_not_eat_itself(photos: Path, encoder: DualEncoder) -> None:
    build(photos, photos / "gallery", encoder)
    gallery, report = build(photos, photos / "gallery", encoder)
    assert len(gallery.pictures) == 3
    assert counts(report) == (0, 3, 0)


def test_thumbnails_are_small_upright_and_never_enlarged(tmp_path: Path, encoder: DualEncoder) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (1000, 400), "red").save(folder / "large.jpg")
    Image.new("RGB", (60, 30), "red").save(folder / "small.jpg")
    turned = Image.new("RGB", (800, 400), "red")
    turned.getexif()[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=turned.getexif())
    gallery, _ = build(folder, tmp_path / "out", encoder)
    thumbnails = [gallery.thumbnail(picture) for picture in gallery.pictures]
    assert [open_image(path).size for path in thumbnails] == [(320, 128), (60, 30), (160, 320)]
    assert all(webp[8:12] == b"WEBP" for webp in thumbnails)


def test_bad_files_are_named_and_skipped(
    photos: Path, tmp_path: Path, encoder: DualEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "empty.jpg").touch()
    (photos / "letter.png").write_text("Dear all,")
    (photos / "half.png").write_bytes((photos / "a.png").read_bytes()[:3000])
    with caplog.at_level(logging.WARNING):
        gallery, report = build(photos, tmp_path / "out", encoder)
    assert len(gallery.pictures) == 3
    assert counts(report) == (3, 0, 3)
    reasons = dict(report.skipped)
    assert sorted(reasons) == ["empty.jpg", "half.png", "letter.png"]
    assert "empty" in reasons["empty.jpg"]
    assert "damaged" in reasons["half.png"]
    assert "not a picture" in reasons["letter.png"]
    assert all(any(name in record.getMessage() for record in caplog.records) for name in reasons)


def test_nothing_readable_is_an_error_that_leaves_the_old_gallery(
    photos: Path, tmp_path: Path, encoder: DualEncoder
) -> None:
    build(photos, tmp_path / "out", encoder)
    before = snapshot(tmp_path / "out")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"Nothing in .*bad could be read"):
        build(bad, tmp_path / "out", encoder)
    assert snapshot(tmp_path / "out") == before


def test_what_has_not_changed_is_not_touched(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    build(photos, tmp_path / "out", encoder)
    before = snapshot(tmp_path / "out")
    _, report = build(photos, tmp_path / "out", encoder)
    assert counts(report) == (0, 3, 0)
    assert snapshot(tmp_path / "out") == before


def test_a_gallery_without_the_table_of_scanned_files_is_brought_up_to_date(
    photos: Path, tmp_path: Path, encoder: DualEncoder
) -> None:
    """Earlier versions made that table for the time of a build only."""
    first, _ = build(photos, tmp_path / "out", encoder)
    with closing(sqlite3.connect(tmp_path / "out" / DATABASE)) as connection, connection:
        connection.execute("DROP TABLE scanned")
    assert GalleryDatabase(tmp_path / "out").check() == []
    second, report = build(photos, tmp_path / "out", encoder)
    assert counts(report) == (0, 3, 0)
    assert list(second.pictures) == list(first.pictures)


def test_a_new_date_alone_is_no_change(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    first, _ = build(photos, tmp_path / "out", encoder)
    touch(photos / "a.png")
    second, report = build(photos, tmp_path / "out", encoder)
    assert counts(report) == (0, 3, 0)
    assert torch.equal(first.images.embeds, second.images.embeds)
    assert second.pictures[0].file.mtime_ns == (photos / "a.png").stat().st_mtime_ns


def test_changed_new_moved_and_removed_pictures_are_followed(
    photos: Path, tmp_path: Path, encoder: DualEncoder, pictures: list[Image.Image]
) -> None:
    name = build(photos, tmp_path / "out", encoder)[0].pictures[0].id
    pictures[0].rotate(180).save(photos / "a.png")
    touch(photos / "a.png")
    pictures[1].rotate(180).save(photos / "new.png")
    (photos / "holiday" / "b.png").rename(photos / "moved.png")
    (photos / "holiday" / "day 1" / "c.JPG").unlink()
    second, report = build(photos, tmp_path / "out", encoder)
    assert [picture.source for picture in second.pictures] == ["a.png", "moved.png", "new.png"]
    assert counts(report) == (2, 1, 0)
    expected = encoder.encode_images([picture.path for picture in second.pictures])
    torch.testing.assert_close(second.images.embeds, expected, atol=1e-3, rtol=0)
    assert stored(tmp_path / "out") == {"embedding": 3, "thumbnail": 3}  # nothing of what is gone
    assert second.pictures[0].id == name
    thumbnail = np.asarray(open_image(second.thumbnail(second.pictures[0])), dtype=float)
    new, old = (np.abs(thumbnail - np.asarray(picture)).mean() for picture in (pictures[0].rotate(180), pictures[0]))
    assert new < old / 2


def test_pictures_that_trade_places_trade_thumbnails_without_encoding(
    photos: Path, tmp_path: Path, encoder: DualEncoder
) -> None:
    first, _ = build(photos, tmp_path / "out", encoder)
    thumbnails = [first.thumbnail(picture) for picture in first.pictures]
    (photos / "a.png").rename(photos / "spare")
    (photos / "holiday" / "b.png").rename(photos / "a.png")
    (photos / "spare").rename(photos / "holiday" / "b.png")
    second, report = build(photos, tmp_path / "out", encoder)
    assert counts(report) == (0, 3, 0)
    assert torch.equal(second.images.embeds, first.images.embeds[[1, 0, 2]])
    traded = [second.thumbnail(picture) for picture in second.pictures]
    assert traded == [thumbnails[1], thumbnails[0], thumbnails[2]]


def test_the_same_picture_twice_is_encoded_once(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    (photos / "again.png").write_bytes((photos / "a.png").read_bytes())
    gallery, report = build(photos, tmp_path / "out", encoder)
    assert counts(report) == (3, 1, 0)
    assert torch.equal(gallery.images.embeds[0], gallery.images.embeds[1])
    assert stored(tmp_path / "out") == {"embedding": 3, "thumbnail": 3}
    assert gallery.thumbnail(gallery.pictures[0]) == gallery.thumbnail(gallery.pictures[1])


def test_a_lost_thumbnail_is_made_again_without_encoding(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    gallery, _ = build(photos, tmp_path / "out", encoder)
    before = gallery.thumbnail(gallery.pictures[1])
    with closing(sqlite3.connect(tmp_path / "out" / DATABASE)) as connection, connection:
        connection.execute("DELETE FROM thumbnail WHERE id = 2")
    gallery, report = build(photos, tmp_path / "out", encoder)
    assert counts(report) == (0, 3, 0)
    assert gallery.thumbnail(gallery.pictures[1]) == before


def test_another_model_encodes_everything_again(
    photos: Path, tmp_path: Path, encoder: DualEncoder, other: DualEncoder
) -> None:
    build(photos, tmp_path / "out", encoder)
    gallery, report = build(photos, tmp_path / "out", other)
    assert counts(report) == (3, 0, 0)
    torch.testing.assert_close(
        gallery.images.embeds, other.encode_images([p.path for p in gallery.pictures]), atol=1e-3, rtol=0
    )


def test_times_are_not_trusted_across_sources(
    photos: Path, tmp_path: Path, encoder: DualEncoder, pictures: list[Image.Image]
) -> None:
    build(photos, tmp_path / "out", encoder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    data = bytearray((photos / "a.png").read_bytes())
    (elsewhere / "a.png").write_bytes(data)
    Image.new("RGB", (40, 40), "blue").save(elsewhere / "a.png")
    padding = len(data) - (elsewhere / "a.png").stat().st_size
    with (elsewhere / "a.png").open("ab") as file:
        file.write(bytes(padding))  # the same name, size and time, but not the same picture
    stat = (photos / "a.png").stat()
    os.utime(elsewhere / "a.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    gallery, report = build(elsewhere, tmp_path / "out", encoder)
    assert counts(report) == (1, 0, 0)
    torch.testing.assert_close(gallery.images.embeds, encoder.encode_images([elsewhere / "a.png"]), atol=1e-3, rtol=0)


@pytest.mark.usefixtures("no_thread_stays")
def test_an_interrupted_build_leaves_the_old_gallery(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    before = list(build(photos, tmp_path / "out", encoder)[0].pictures)
    for row, path in enumerate(photos.rglob("*.*")):
        Image.new("RGB", (50, 50 + row), "green").save(path)
        touch(path)

    def ctrl_c(done: int, total: int) -> None:
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(photos, tmp_path / "out", encoder, progress=ctrl_c)
    loaded = Gallery.load(tmp_path / "out", encoder)
    assert list(loaded.pictures) == before
    assert all(isinstance(loaded.thumbnail(picture), bytes) for picture in before)
    _, report = build(photos, tmp_path / "out", encoder)
    assert report.encoded["pictures"] < 3  # what had been embedded was kept
    assert stored(tmp_path / "out") == {"embedding": 3, "thumbnail": 3}


def test_a_captioned_data_set_can_be_found_from_both_sides(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    (photos / "bad.png").touch()
    table = tmp_path / "photos" / "table.csv"
    table.write_text(
        "image,caption\na.png,two cats\na.png,一只猫在奔跑\nholiday/b.png,pasta\nbad.png,a lost dog\n", "utf-8"
    )
    gallery, report = build(table, tmp_path / "out", encoder)
    assert [picture.path.name for picture in gallery.pictures] == ["a.png", "b.png"]
    assert [(caption.text, caption.lang) for caption in gallery.captions] == [
        ("two cats", ""),
        ("一只猫在奔跑", "zh"),
        ("pasta", ""),
    ]
    assert gallery.languages == ("zh",)
    assert gallery.pictures[0].caption("zh") == "一只猫在奔跑"
    assert {caption.scene for caption in gallery.captions[:2]} == {gallery.pictures[0].id}
    texts = [caption.text for caption in gallery.captions]
    torch.testing.assert_close(gallery.texts.embeds, encoder.encode_texts(texts), atol=1e-3, rtol=0)
    assert report.encoded["captions"] == 3
    assert [name.endswith("bad.png") for name, _ in report.skipped] == [True]
    table.write_text("image,caption\na.png,two cats\na.png,two dogs\n", "utf-8")
    _, report = build(table, tmp_path / "out", encoder)
    assert (report.encoded["captions"], report.reused["captions"]) == (1, 1)


def test_a_split_is_remembered_in_the_rebuild_command(
    photos: Path, tmp_path: Path, encoder: DualEncoder, other: DualEncoder
) -> None:
    table = photos / "table.csv"
    table.write_text("image,caption,split\na.png,two cats,train\nholiday/b.png,pasta,dev\n")
    gallery, _ = build(table, tmp_path / "out", encoder, split="dev", format="csv")
    assert [caption.text for caption in gallery.captions] == ["pasta"]
    with pytest.raises(ValueError, match=r"--format csv --split dev$"):
        Gallery.load(tmp_path / "out", other)


def test_pictures_in_packages_need_no_thumbnails_and_missing_ones_are_skipped(
    tmp_path: Path, encoder: DualEncoder
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    lines = [
        {"id": "lion", "source": "package:gradio/media_assets/images/lion.jpg", "en": "a lion", "credit": "gradio"},
        {"id": "gone", "source": "package:not_installed_here/a.png", "en": "nothing"},
        {"id": "lost", "source": "package:gradio/not/there.png", "en": "nothing else"},
    ]
    (source / PICTURES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    gallery, report = build(source, tmp_path / "out", encoder)
    assert [picture.id for picture in gallery.pictures] == ["lion"]
    assert [caption.id for caption in gallery.captions] == ["lion.en"]
    assert "package not_installed_here is not installed" in dict(report.skipped)["package:not_installed_here/a.png"]
    assert "no file" in dict(report.skipped)["package:gradio/not/there.png"]
    assert stored(tmp_path / "out") == {"embedding": 2, "thumbnail": 0}
    assert gallery.pictures[0].file.mtime_ns == 0
    _, report = build(source, tmp_path / "out", encoder)
    assert counts(report) == (0, 1, 2)


def test_captions_alone_make_a_gallery(tmp_path: Path, encoder: DualEncoder) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / CAPTIONS).write_text('{"id": "a", "topic": "pets", "en": "two cats", "zh": "一只猫"}\n', "utf-8")
    gallery, _ = build(source, tmp_path / "out", encoder)
    assert gallery.images.embeds.shape == (0, encoder.embed_dim)
    assert [match.item.id for match in gallery.search_captions(gallery.texts.embeds[1], 1, lang="zh").matches] == [
        "a.zh"
    ]


def test_a_scene_has_one_embedding_in_all_its_languages(tmp_path: Path, encoder: DualEncoder) -> None:
    source, texts = tmp_path / "source", {"en": "two cats", "zh": "一只猫"}
    source.mkdir()
    Image.new("RGB", (9, 9)).save(source / "cat.png")
    (source / PICTURES).write_text(json.dumps({"id": "cat", "source": "cat.png", **texts}), "utf-8")
    scenes = [{"id": "a", "topic": "pets", **texts}, {"id": "b", "topic": "pets", "en": "a dog"}]
    (source / CAPTIONS).write_text("\n".join(map(json.dumps, scenes)), "utf-8")
    gallery, report = build(source, tmp_path / "out", encoder)
    english, chinese, dog, *of_picture = gallery.texts.embeds
    alone = encoder.encode_texts([*texts.values(), "a dog"])
    mean = torch.nn.functional.normalize(alone[:2].mean(0), dim=0)
    torch.testing.assert_close(
        torch.stack([english, chinese, dog]), torch.stack([mean, mean, alone[2]]), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(torch.stack(of_picture), alone[:2], atol=1e-3, rtol=0)
    assert report.encoded["captions"] == 5
    assert build(source, tmp_path / "out", encoder)[1].encoded["captions"] == 0
    assert stored(tmp_path / "out")["embedding"] == 5


def test_source_and_gallery_must_differ(photos: Path, encoder: DualEncoder) -> None:
    with pytest.raises(ValueError, match="another folder for --out"):
        build(photos, photos, encoder)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A folder of forty photos of which every third is damaged, and one that is there twice."""
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        if number % 3 == 1:
            data = (folder / f"{number:02}.png").read_bytes()
            (folder / f"{number:02}.png").write_bytes(data[: len(data) // 2])
    (folder / "again.png").write_bytes((folder / "02.png").read_bytes())
    return folder


def test_a_file_is_read_once_and_decoded_once(
    many: Path, tmp_path: Path, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    decoded: list[bytes] = []
    open_path, open_picture = Path.open, scan.open_image

    def noted_path(path: Path, *rest: object, **more: object) -> object:
        read.update([path.name])
        return open_path(path, *rest, **more)  # type: ignore[arg-type]

    def noted_picture(data: bytes, draft_size: int) -> Image.Image:
        decoded.append(data)
        return open_picture(data, draft_size=draft_size)

    monkeypatch.setattr(Path, "open", noted_path)
    monkeypatch.setattr(scan, "open_image", noted_picture)
    _, report = build(many, tmp_path / "out", encoder)
    assert counts(report) == (27, 1, 13)
    assert {read[path.name] for path in many.iterdir()} == {1}
    assert 40 <= len(decoded) <= 41  # the one that is there twice may be decoded twice
    read.clear()
    decoded.clear()
    _, report = build(many, tmp_path / "out", encoder)
    assert counts(report) == (0, 28, 13)
    assert len(decoded) == sum(read[path.name] for path in many.iterdir()) == 13  # the damaged ones, in case they heal


def test_the_model_gets_one_stream_of_new_pictures_whatever_lies_between(
    many: Path, tmp_path: Path, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[int] = []
    prepared = encoder.encode_prepared

    def counted(inputs: Iterator[dict]) -> Iterator[torch.Tensor]:
        streams.append(0)

        def each() -> Iterator[dict]:
            for one in inputs:
                assert one["pixel_values"].shape == (1, 3, 32, 32)
                streams[-1] += 1
                yield one

        return prepared(each())

    monkeypatch.setattr(encoder, "encode_prepared", counted)
    build(many, tmp_path / "out", encoder)
    for number in range(0, 40, 2):
        Image.new("RGB", (50, 50), (number, 0, 0)).save(many / f"{number:02}.png")
        touch(many / f"{number:02}.png")
    gallery, report = build(many, tmp_path / "out", encoder)
    assert streams == [27, 20]
    assert counts(report) == (20, 14, 7)
    expected = encoder.encode_images([picture.path for picture in gallery.pictures])
    torch.testing.assert_close(gallery.images.embeds, expected, atol=1e-3, rtol=0)


def test_threads_change_nothing_about_the_order(many: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    seen: list[tuple[int, int]] = []
    gallery, report = build(many, tmp_path / "out", encoder, progress=lambda done, total: seen.append((done, total)))
    bad = [f"{number:02}.png" for number in range(1, 40, 3)]
    assert [name for name, _ in report.skipped] == bad
    assert [picture.source for picture in gallery.pictures] == sorted({path.name for path in many.iterdir()} - set(bad))
    looked = [done for done, total in seen if total == 41]
    assert looked == sorted(looked)
    assert looked[-1] == 41
    assert seen[len(looked) :] == [(28, 28)]  # the damaged ones count until all have been looked at


def test_a_file_too_large_to_hold_gives_the_same_gallery(
    photos: Path, tmp_path: Path, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = build(photos, tmp_path / "out", encoder)
    monkeypatch.setattr(scan, "_MAX_IN_MEMORY", 0)
    second, report = build(photos, tmp_path / "other", encoder)
    assert counts(report) == (3, 0, 0)
    assert list(second.pictures) == list(first.pictures)
    assert torch.equal(second.images.embeds, first.images.embeds)


def test_a_large_photo_is_decoded_in_reduced_size_and_looks_the_same(
    tmp_path: Path, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Image.open(Path(skimage.data.__file__).parent / "rocket.jpg") as image:
        photo = image.resize((2562, 1921), Image.Resampling.BICUBIC)
    folder = tmp_path / "photos"
    folder.mkdir()
    photo.save(folder / "a.jpg", quality=95)
    sizes: list[tuple[int, int]] = []
    open_picture = scan.open_image

    def noted(data: bytes, draft_size: int) -> Image.Image:
        image = open_picture(data, draft_size=draft_size)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(scan, "open_image", noted)
    gallery, _ = build(folder, tmp_path / "out", encoder)
    assert sizes == [(640, 480)]  # a quarter: an eighth would be smaller than the thumbnail
    thumbnail = open_image(gallery.thumbnail(gallery.pictures[0]))
    assert thumbnail.size == (320, 240)
    expected = np.asarray(photo.resize((320, 240), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(thumbnail, dtype=float) - expected).mean() < 3


@pytest.mark.usefixtures("no_thread_stays")
def test_of_a_build_that_fails_only_what_is_embedded_is_left(
    many: Path, tmp_path: Path, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(inputs: Iterator[dict]) -> Iterator[torch.Tensor]:
        yield from prepared(islice(inputs, 3))
        raise RuntimeError("the model")

    prepared = encoder.encode_prepared
    monkeypatch.setattr(encoder, "encode_prepared", fails)
    with pytest.raises(RuntimeError, match="the model"):
        build(many, tmp_path / "out", encoder)
    with pytest.raises(FileNotFoundError):  # no gallery yet
        Gallery.load(tmp_path / "out", encoder)
    monkeypatch.undo()
    gallery, report = build(many, tmp_path / "out", encoder)
    assert report.encoded["pictures"] == 27 - 3
    assert len(gallery.pictures) == 28


def test_progress_counts_up_to_the_end(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    (photos / "table.csv").write_text("image,caption\na.png,two cats\nholiday/b.png,pasta\n")
    seen: list[tuple[int, int]] = []
    build(photos / "table.csv", tmp_path / "out", encoder, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (4, 4)


# ---------------------------------------------------------------- what grows, what is lent, what is damaged


def test_a_growing_gallery_is_shown_and_a_cohort_can_be_lent(many: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    lender = build_gallery(many, tmp_path / "lender", encoder)
    shown: list[Gallery] = []
    gallery = build_gallery(many, tmp_path / "out", encoder, growing=shown.append, like=lender)
    assert [len(part.pictures) for part in shown] == []  # 28 pictures are too few
    for number in range(40, 80):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(many / f"{number:02}.png")
    grown = build_gallery(many, tmp_path / "grown", encoder, growing=shown.append, like=lender)
    assert [len(part.pictures) for part in shown] == sorted({len(part.pictures) for part in shown})
    assert len(shown) >= 2
    assert set(shown[-1].pictures) < set(grown.pictures)
    assert shown[-1].judge is lender.judge
    for built in (gallery, grown):
        assert built.judge is not None
        assert lender.judge is not None
        for name, embeds in lender.judge.cohort.tensors().items():
            torch.testing.assert_close(built.judge.cohort.tensors()[name], embeds)


def test_damaged_rows_are_made_again_and_the_rest_is_kept(
    photos: Path, tmp_path: Path, encoder: DualEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = build(photos, tmp_path / "out", encoder)
    thumbnails = [first.thumbnail(picture) for picture in first.pictures]
    with closing(sqlite3.connect(tmp_path / "out" / DATABASE)) as connection, connection:
        connection.execute("UPDATE embedding SET embeds = zeroblob(length(embeds)) WHERE id = 1")
        connection.execute("UPDATE thumbnail SET webp = zeroblob(length(webp)) WHERE id = 2")
        connection.execute("UPDATE picture SET credit = 'me' WHERE name = ?", (first.pictures[2].id,))
    assert main(["check", str(tmp_path / "out")]) == 2
    with caplog.at_level(logging.WARNING):
        second, report = build(photos, tmp_path / "out", encoder)
    assert "damaged in 3 places" in caplog.text
    assert counts(report) == (1, 2, 0)
    assert main(["check", str(tmp_path / "out")]) == 0
    assert list(second.pictures) == list(first.pictures)
    assert [second.thumbnail(picture) for picture in second.pictures] == thumbnails
    torch.testing.assert_close(second.images.embeds, first.images.embeds, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["caf\udce9.png", "a\n'\"b.png", "雪 %41?.png"], ids=ascii)
def test_any_name_of_a_file_will_do(
    name: str, photos: Path, tmp_path: Path, encoder: DualEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)  # xdist cannot send a report whose log has names that are not UTF-8
    (photos / "a.png").rename(photos / name)
    folder = tmp_path / name.replace("png", "out")
    for _ in range(2):
        gallery, report = build(photos, folder, encoder)
        assert name in [picture.source for picture in gallery.pictures]
        assert all(picture.path.is_file() for picture in gallery.pictures)
    assert counts(report) == (0, 3, 0)
