"""Several processes build one gallery: it is the same as one process makes.

`tests/long/test_torchrun.py` has torchrun start them, and processes that fail.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_injection import forkserver
from PIL import Image

from alignment.data import Partition
from alignment.engine import AlignmentEngine
from alignment.gallery import BuildReport, Gallery, build_gallery, main
from alignment.gallery.build import embed_share
from alignment.gallery.database import DATABASE, GalleryDatabase
from alignment.model import DualEncoder
from alignment.preprocess import open_image
from alignment.workers import worker_group

PER_SHARD = 50
LAST_BIT = {"atol": 1e-6, "rtol": 2**-10}  # of a half, as galleries keep them


@pytest.fixture(scope="module")
def encoder(checkpoint: Callable[[str], Path]) -> DualEncoder:
    return DualEncoder.load(checkpoint("clip"), device="cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((60, 48)).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, parts: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in parts:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of captioned pictures: one is in two of them, one is damaged, and the last shard is cut off."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        parts = []
        for row in range(PER_SHARD):
            number = shard * PER_SHARD + row
            data = photo(7 if number == 70 else number)
            parts.append((f"{number:04}.png", data[:100] if number == 60 else data))
            captions = {"captions": [f"picture number {number}", f"第{number}张照片"]}
            parts.append((f"{number:04}.json", json.dumps(captions).encode()))
        pack(folder / f"{shard:05}.tar", parts)
    last = folder / "00002.tar"
    last.write_bytes(last.read_bytes()[:-40_000])
    return folder


@dataclass(frozen=True)
class Done:
    """How several processes ended: the worst exit status, and what all of them said, by rank."""

    returncode: int
    stdout: str
    stderr: str


Together = Callable[..., Done]


def _begin(environment: dict[str, str], folder: Path, words: list[str]) -> None:
    os.environ |= environment
    rank = environment["RANK"]
    sys.stdout, sys.stderr = ((folder / f"{name}-{rank}").open("w", encoding="utf-8") for name in ("out", "err"))
    sys.exit(main(words))


@pytest.fixture
def two_processes(tmp_path: Path, cache: Path, free_port: str) -> Together:
    """Run the command in two processes that find what torchrun tells its own."""

    def run(*words: str | Path) -> Done:
        folder = tmp_path / "said"
        folder.mkdir()
        told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port, "ALIGNMENT_CACHE": str(cache)}
        started = []
        for rank in ("0", "1"):
            environment = told | {"RANK": rank, "LOCAL_RANK": rank}
            process = forkserver().Process(target=_begin, args=(environment, folder, list(map(str, words))))
            process.start()
            started.append(process)
        statuses = []
        for process in started:
            process.join(240)
            statuses.append(1 if process.exitcode is None else abs(process.exitcode))
            process.kill()
            process.join()
            process.close()
        said = {
            name: "".join((folder / f"{name}-{rank}").read_text("utf-8") for rank in "01") for name in ("out", "err")
        }
        return Done(max(statuses), said["out"], said["err"])

    return run


def numbers(tree: Any) -> list[float]:
    """List the numbers of a JSON value, from left to right."""
    if isinstance(tree, dict):
        return [number for key in sorted(tree) for number in numbers(tree[key])]
    return [float(tree)]


def same(one: Path, other: Path, encoder: DualEncoder) -> None:
    """Compare two galleries; what a row is embedded together with may show in its last bit, as on some CPUs."""
    first, second = Gallery.load(one, encoder), Gallery.load(other, encoder)
    assert list(first.pictures) == list(second.pictures)
    assert [picture.file for picture in first.pictures] == [picture.file for picture in second.pictures]
    assert list(first.captions) == list(second.captions)
    metadata = [asdict(gallery.metadata) | {"built": ""} for gallery in (first, second)]
    fitted = [torch.tensor(numbers(each.pop("calibration"))) for each in metadata]
    assert metadata[0] == metadata[1]
    torch.testing.assert_close(fitted[0], fitted[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(first.images.embeds, second.images.embeds, **LAST_BIT)
    torch.testing.assert_close(first.texts.embeds, second.texts.embeds, **LAST_BIT)
    databases = [GalleryDatabase(folder) for folder in (one, other)]
    cohorts = [database.cohort() for database in databases]
    for name in cohorts[0]:
        torch.testing.assert_close(cohorts[0][name], cohorts[1][name], **LAST_BIT)
    thumbnails = [[database.thumbnail(picture) for picture in first.pictures] for database in databases]
    assert thumbnails[0] == thumbnails[1]
    names = [{path.name for path in folder.iterdir()} for folder in (one, other)]
    assert names[0] == names[1]


# ---------------------------------------------------------------- the whole of it


def test_two_processes_make_the_gallery_of_one(
    two_processes: Together, shards: Path, tmp_path: Path, encoder: DualEncoder
) -> None:
    done = two_processes("build", shards, "--out", tmp_path / "two", "--model", encoder.name)
    assert_gallery_of_one(done, shards, tmp_path, encoder)


def assert_gallery_of_one(
    done: Done | subprocess.CompletedProcess[str], shards: Path, tmp_path: Path, encoder: DualEncoder
) -> None:
    """Compare what two processes made of the shards, in the folder `two`, and said, with what one makes."""
    assert done.returncode == 0, done.stderr
    report = BuildReport()
    gallery = build_gallery(shards, tmp_path / "one", encoder, report=report)
    same(tmp_path / "one", tmp_path / "two", encoder)
    assert 100 < len(gallery.pictures) < 148
    assert gallery.metadata.judged_by.startswith("fitted on")
    twice = next(picture for picture in gallery.pictures if "picture number 7" in picture.captions.values())
    texts = [caption.text for caption in gallery.captions if caption.scene == twice.id]
    assert texts == ["picture number 7", "第7张照片", "picture number 70", "第70张照片"]
    # Each did a share, the first one summed up, and both told of what cannot be read.
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in sorted(lines) if line.startswith("Share")] == ["Share 1/2", "Share 2/2"]
    told = f"{len(gallery.pictures)} pictures and {len(gallery.captions)} captions, by {encoder.name}."
    (first,) = (number for number, line in enumerate(lines) if line.endswith(told))
    # The one in two shards is embedded by both, unless one of them sees in time that the other has.
    encoded, reused = map(int, re.findall(r"\d+", lines[first + 1]))
    assert encoded + reused == report.encoded["pictures"] + 1
    assert reused <= 1
    assert "  skipped: 1, named above" in lines[first:]
    assert "shards damaged or cut off, read up to there (00002.tar)" in done.stderr
    assert report.encoded["pictures"] == len(gallery.pictures)


def test_each_shard_is_unpacked_by_one_process_alone(
    shards: Path, tmp_path: Path, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache each, one can see who unpacked what."""
    counts = []
    for number in (1, 2):
        monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / f"cache {number}"))
        embed_share(shards, tmp_path / "out", encoder, Partition(number, 2))
        counts.append(len(list((tmp_path / f"cache {number}" / "shards").iterdir())))
    assert counts == [2, 1]
    report = BuildReport()
    gallery = build_gallery(shards, tmp_path / "out", encoder, report=report)  # finds what the other machine has done
    assert (report.encoded["pictures"], report.encoded["captions"]) == (0, 0)
    assert len(gallery.pictures) > 100


def test_shares_and_a_command_without_one_make_the_gallery_too(
    shards: Path, cache: Path, tmp_path: Path, encoder: DualEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["build", str(shards), "--out", str(tmp_path / "out"), "--model", encoder.name]
    for number in range(1, 5):  # a fourth share of three shards is empty
        assert main([*common, "--share", f"{number}/4"]) == 0
    shared = capsys.readouterr().out.splitlines()
    assert shared[3].startswith("Share 4/4: 0 pictures and 0 captions encoded.")
    assert not (tmp_path / "out" / DATABASE).exists()
    assert main(common) == 0
    assert "  pictures: 0 encoded" in capsys.readouterr().out
    assert build_gallery(shards, tmp_path / "one", encoder).pictures
    same(tmp_path / "one", tmp_path / "out", encoder)
    assert GalleryDatabase(tmp_path / "out").check() == []


def test_a_share_that_was_broken_off_goes_on_without_reading_again(
    tmp_path: Path, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    for number in range(40):
        (source / f"{number:02}.png").write_bytes(photo(number))

    def ctrl_c(done: int, total: int) -> None:
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_share(source, out, encoder, Partition(1, 1), progress=ctrl_c)
    opened: list[Path] = []
    read = Path.open

    def noted(path: Path, *rest: object, **more: object) -> object:
        opened.append(path)
        return read(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", noted)
    report = BuildReport()
    embed_share(source, out, encoder, Partition(1, 1), report=report)
    kept = report.reused["pictures"]
    assert kept >= 8
    assert report.encoded["pictures"] == 40 - kept
    assert len([path for path in opened if path.parent == source]) == 40 - kept
    opened.clear()
    gallery = build_gallery(source, out, encoder, report=report)
    assert [path for path in opened if path.parent == source] == []
    torch.testing.assert_close(
        gallery.images.embeds, encoder.encode_images([p.path for p in gallery.pictures]), atol=1e-3, rtol=0
    )


def test_a_picture_that_changed_after_its_share_was_done_is_embedded_again(
    tmp_path: Path, encoder: DualEncoder
) -> None:
    source, out = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.png").write_bytes(photo(number))
    embed_share(source, out, encoder, Partition(1, 1))
    (source / "1.png").write_bytes(photo(99))
    os.utime(source / "1.png", ns=(0, 10**18))
    (source / "2.png").unlink()
    report = BuildReport()
    gallery = build_gallery(source, out, encoder, report=report)
    assert (report.encoded["pictures"], len(gallery.pictures)) == (1, 2)
    expected = encoder.encode_images([photo(0), photo(99)])
    torch.testing.assert_close(gallery.images.embeds, expected, atol=1e-3, rtol=0)
    thumbnail = np.asarray(open_image(gallery.thumbnail(gallery.pictures[1])), dtype=float)
    with Image.open(io.BytesIO(photo(99))) as image:
        assert np.abs(thumbnail - np.asarray(image)).mean() < 20


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_hold_everything_once(count: int) -> None:
    items = list(range(1000))
    parts = [Partition(number, count).select(items) for number in range(1, count + 1)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 64


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2"])
def test_what_is_no_share_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "photos", "--out", "out", f"--share={text}"]) == 2
    assert "the second of four is 2/4" in capsys.readouterr().err


# ---------------------------------------------------------------- one process, damaged shares, lost pictures


def test_a_process_alone_is_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for world_size in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        if not world_size:
            monkeypatch.delenv("WORLD_SIZE")
        with worker_group() as group:
            assert group is None


def test_a_damaged_share_is_embedded_again(tmp_path: Path, encoder: DualEncoder) -> None:
    source, out = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.png").write_bytes(photo(number))
    embed_share(source, out, encoder, Partition(1, 1))
    (share,) = out.iterdir()
    data = bytearray(share.read_bytes())
    data[len(data) // 3 :] = os.urandom(len(data) - len(data) // 3)
    share.write_bytes(data)
    report = BuildReport()
    build_gallery(source, out, encoder, calibrate=False, report=report)
    assert report.encoded["pictures"] == 3
    assert [path.name for path in out.iterdir()] == [DATABASE]
    assert GalleryDatabase(out).check() == []


def test_pictures_of_shards_are_shown_even_if_they_are_no_longer_unpacked(
    shards: Path, cache: Path, tmp_path: Path, encoder: DualEncoder
) -> None:
    gallery = build_gallery(shards, tmp_path / "out", encoder, calibrate=False)
    engine, picture = AlignmentEngine(encoder, gallery), gallery.pictures[0]
    assert engine.picture_image(picture.id).size == (60, 48)
    shutil.rmtree(cache / "pictures")
    assert engine.can_show(picture.id)
    assert engine.picture_image(picture.id).size == (60, 48)  # its thumbnail, which is never enlarged
    assert engine.thumbnail(picture.id)[8:12] == b"WEBP"
    report = BuildReport()
    build_gallery(shards, tmp_path / "out", encoder, calibrate=False, report=report)  # unpacks them again
    assert report.encoded["pictures"] == 0
    assert picture.path.is_file()
