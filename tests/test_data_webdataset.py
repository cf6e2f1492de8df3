"""WebDataset shards as published, packed by hand, and hostile."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignment.data import Partition, read_data
from alignment.data.image_store import MAX_SHARDS, MAX_TEXT_BYTES, expand_braces
from tests.data_sets import read_pairs

Parts = Mapping[str, bytes | str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def photo(seed: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def shard(path: Path, parts: Parts | list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Pack members, given as name -> content or as headers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        if isinstance(parts, Mapping):
            for name, content in parts.items():
                data = content.encode() if isinstance(content, str) else content
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        else:
            for member, data in parts:
                tar.addfile(member, io.BytesIO(data))
    return path


def captions(source: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    """Id -> captions."""
    return {pair.id: pair.captions for pair in read_pairs(source, **options)}


# ---------------------------------------------------------------- what a sample is


def test_a_shard_is_read_and_its_pictures_lie_in_the_store_under_their_hash(tmp_path: Path, cache: Path) -> None:
    file = shard(tmp_path / "00000.tar", {"0.jpg": photo(0, "JPEG"), "0.txt": "a dog", "1.png": photo(1), "1.txt": "b"})
    reading = read_data(file)
    assert reading.format == "webdataset"
    assert [(pair.id, pair.captions, pair.split) for pair in reading.pairs] == [
        ("0", ("a dog",), ""),
        ("1", ("b",), ""),
    ]
    assert [Path(pair.image).read_bytes() for pair in reading.pairs] == [photo(0, "JPEG"), photo(1)]
    assert {Path(pair.image).parent for pair in reading.pairs} == {cache / "pictures"}


@pytest.mark.parametrize(
    ("encoding", "caption"), [("gb18030", "一只狗在跑"), ("shift_jis", "犬が走っている"), ("cp1252", "un café à côté")]
)
def test_captions_are_read_in_their_encoding(tmp_path: Path, encoding: str, caption: str) -> None:
    inner = json.dumps({"caption": caption}, ensure_ascii=False).encode(encoding)
    parts: Parts = {"0.jpg": photo(0), "0.txt": caption.encode(encoding), "1.jpg": photo(1), "1.json": inner}
    for _ in range(2):  # from the shard, then from its index
        reading = read_data(shard(tmp_path / "a.tar", parts))
        assert [pair.captions for pair in reading.pairs] == [(caption,), (caption,)]
        assert reading.left_out == {}
        assert reading.repaired == {"files not in UTF-8": (f"0.txt as {encoding}", f"1.json as {encoding}")}


@pytest.mark.parametrize("part", ["txt", "caption", "captions", "TXT"])
def test_each_line_of_a_text_part_is_a_caption(tmp_path: Path, part: str) -> None:
    file = shard(tmp_path / "a.tar", {"0.jpg": photo(0), f"0.{part}": "\ufeffone\r\ntwo\n\n三\n"})
    assert captions(file) == {"0": ("one", "two", "三")}


def test_json_gives_captions_split_and_id(tmp_path: Path) -> None:
    inner = {"captions": ["one", "two"], "split": "val", "image_id": 7, "url": "u"}
    file = shard(tmp_path / "a.tar", {"0.webp": photo(0, "WEBP"), "0.json": json.dumps(inner)})
    pair = read_pairs(file)[0]
    assert (pair.id, pair.captions, pair.split) == ("7", ("one", "two"), "dev")


def test_the_caption_img2dataset_repeats_in_its_json_counts_once(tmp_path: Path) -> None:
    inner = {"caption": "a dog", "key": "000", "status": "success", "title": "IMG_1"}
    file = shard(tmp_path / "a.tar", {"000.jpg": photo(0), "000.txt": "a dog", "000.json": json.dumps(inner)})
    assert captions(file) == {"000": ("a dog",)}


def test_json_may_be_a_list_of_captions(tmp_path: Path) -> None:
    assert captions(shard(tmp_path / "a.tar", {"0.jpg": photo(0), "0.json": '["one", "two"]'})) == {"0": ("one", "two")}


def test_members_may_come_in_any_order_and_in_folders(tmp_path: Path) -> None:
    parts: Parts = {
        "./x/1.txt": "x one",
        "y/1.txt": "y one",
        "README": "nothing",
        "y/1.jpg": photo(1),
        "y/1.seg.png": photo(3),
        "./x/1.jpg": photo(2),
        "y/._1.jpg": b"resource fork",
        "__MACOSX/y/2.jpg": b"resource fork",
    }
    assert captions(shard(tmp_path / "a.tar", parts)) == {"x/1": ("x one",), "y/1": ("y one",)}


def test_keys_in_composed_and_decomposed_form_are_one(tmp_path: Path) -> None:
    file = shard(tmp_path / "a.tar", {"cafe\u0301.jpg": photo(0), "caf\u00e9.txt": "one"})
    assert captions(file) == {"caf\u00e9": ("one",)}


def test_samples_without_a_picture_or_with_two_are_counted(tmp_path: Path) -> None:
    parts: Parts = {"0.jpg": photo(0), "0.png": photo(1), "0.txt": "a", "1.txt": "lost"}
    reading = read_data(shard(tmp_path / "a.tar", parts))
    assert [pair.captions for pair in reading.pairs] == [("a",)]
    assert reading.left_out == {"further pictures of a sample": ("0.png",), "samples without a picture": ("1",)}


def test_a_key_that_comes_again_never_brings_a_picture_another_ones_caption(tmp_path: Path) -> None:
    members = [member for n in range(3) for member in (header("0.png", photo(n)), header("0.txt", f"n{n}".encode()))]
    reading = read_data(shard(tmp_path / "a.tar", members))
    (pair,) = reading.pairs
    assert (Path(pair.image).read_bytes(), pair.captions) == (photo(0), ("n0",))
    assert reading.left_out == {
        "further pictures of a sample": ("0.png", "0.png"),
        "further captions of a sample": ("0.txt", "0.txt"),
    }


def test_pictures_that_belong_to_no_key_are_counted(tmp_path: Path) -> None:
    parts: dict[str, bytes | str] = {"0.png": photo(9), "0.txt": "t"}
    for name in ("trip.2024-05", "../2", ".c/3"):
        parts |= {f"{name}.png": photo(0), f"{name}.txt": "t"}
    reading = read_data(shard(tmp_path / "a.tar", parts))
    assert [pair.id for pair in reading.pairs] == ["0"]
    reason = "pictures that are hidden, or whose name is not KEY.jpg"
    assert reading.left_out == {reason: ("trip.2024-05.png", "../2.png", ".c/3.png")}


def test_shards_that_hold_nothing_do_not_hide_the_others(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.tar").touch()
    shard(tmp_path / "set" / "z.tar", {"0.png": photo(0), "0.txt": "one"})
    assert captions(tmp_path / "set") == {"0": ("one",)}


def test_unreadable_captions_leave_the_picture_without_any(tmp_path: Path) -> None:
    parts: Parts = {"0.jpg": photo(0), "0.json": "{broken", "1.jpg": photo(1), "1.txt": bytes(range(256))}
    reading = read_data(shard(tmp_path / "a.tar", parts))
    assert [pair.captions for pair in reading.pairs] == [(), ()]
    assert reading.left_out == {"unreadable captions": ("0.json", "1.txt")}


def test_one_picture_under_two_keys_is_one(tmp_path: Path, cache: Path) -> None:
    file = shard(tmp_path / "a.tar", {"0.jpg": photo(0), "0.txt": "one", "1.jpg": photo(0), "1.txt": "two"})
    assert captions(file) == {"0": ("one", "two")}
    assert len(list((cache / "pictures").iterdir())) == 1


# ---------------------------------------------------------------- which shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two training shards, and one to test on in a folder of its own."""
    folder = tmp_path / "set"
    shard(folder / "flickr-train-0000.tar", {"0.jpg": photo(0), "0.txt": "a"})
    shard(folder / "flickr-train-0001.tar", {"1.jpg": photo(1), "1.txt": "b", "1.json": '{"split": "test"}'})
    shard(folder / "test" / "0.tar", {"2.jpg": photo(2), "2.txt": "c"})
    return folder


def test_the_split_comes_from_the_shards_name_or_folder(shards: Path) -> None:
    assert {pair.id: pair.split for pair in read_pairs(shards)} == {"0": "train", "1": "train", "2": "test"}
    assert captions(shards, split="test") == {"2": ("c",)}
    with pytest.raises(ValueError, match=r"no pictures of split 'dev'; its splits are test, train"):
        read_pairs(shards, split="val")


def test_a_shard_of_another_split_is_not_unpacked(shards: Path, cache: Path) -> None:
    read_pairs(shards, split="test")
    assert len(list((cache / "pictures").iterdir())) == 1


def test_a_pattern_in_braces(shards: Path) -> None:
    assert captions(shards / "flickr-train-{0000..0001}.tar") == {"0": ("a",), "1": ("b",)}
    assert captions(shards / "{flickr-train-0001,test/0}.tar") == {"1": ("b",), "2": ("c",)}
    with pytest.raises(FileNotFoundError, match=r"Of the 12 shards .*, 10 are not there \(the first is .*0002\.tar\)"):
        read_pairs(shards / "flickr-train-{0000..0011}.tar")


def test_patterns_are_spelled_out() -> None:
    assert expand_braces("a/{08..11}-{x,y}.tar")[:3] == ["a/08-x.tar", "a/08-y.tar", "a/09-x.tar"]
    assert expand_braces("{9..10}") == ["9", "10"]
    assert expand_braces("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize("pattern", ["{0..99999999999999}.tar", "{0..999}{0..999}.tar", "{9..1}.tar"])
def test_patterns_without_end_or_content_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=f"none or more than {MAX_SHARDS:,} shards"):
        expand_braces(pattern)


def test_a_packed_copy_of_the_pictures_does_not_hide_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo(0))
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.jpg,one\n")
    shard(tmp_path / "images.tar", {"a.jpg": photo(0), "b.jpg": photo(1)})
    assert read_data(tmp_path).format == "folder"
    assert captions(tmp_path) == {"a.jpg": ("one",)}


# ---------------------------------------------------------------- reading again


def test_a_second_read_opens_no_shard(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_data(shards)
    opened: list[object] = []
    monkeypatch.setattr("alignment.data.image_store._unpack", lambda *arguments: opened.append(arguments))
    assert read_data(shards) == before
    assert opened == []


def test_a_changed_shard_or_a_cleared_store_is_read_anew(tmp_path: Path, cache: Path) -> None:
    file = shard(tmp_path / "a.tar", {"0.jpg": photo(0), "0.txt": "before"})
    assert captions(file) == {"0": ("before",)}
    shard(file, {"0.jpg": photo(0), "0.txt": "after it"})
    os.utime(file, ns=(1, 1))
    assert captions(file) == {"0": ("after it",)}
    for picture in (cache / "pictures").iterdir():
        picture.unlink()
    assert Path(read_pairs(file)[0].image).read_bytes() == photo(0)


@pytest.mark.parametrize("content", ["", "[]", '{"rows": 5}', '{"other": 1}', "{broken"])
def test_a_spoilt_index_is_written_anew(tmp_path: Path, cache: Path, content: str) -> None:
    file = shard(tmp_path / "a.tar", {"0.jpg": photo(0), "0.txt": "a"})
    read_pairs(file)
    for index in (cache / "shards").iterdir():
        index.write_text(content)
    assert captions(file) == {"0": ("a",)}


# ---------------------------------------------------------------- hostile shards


def header(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, data


def test_names_never_become_paths(tmp_path: Path, cache: Path) -> None:
    names = ["../../escape", "/tmp/absolute-escape", "a/../../b"]
    members = [header(f"{name}.{part}", data) for name in names for part, data in (("png", photo(1)), ("txt", b"x"))]
    before = set(tmp_path.parent.rglob("*"))
    read_pairs(shard(tmp_path / "a.tar", members))
    new = {path for path in set(tmp_path.parent.rglob("*")) - before if path.is_file()}
    assert {path.parent for path in new} == {tmp_path, cache / "pictures", cache / "shards"}
    assert not Path("/tmp/absolute-escape.png").exists()


def test_links_and_devices_are_left_out(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(photo(9))
    members = [
        header("0.png", photo(0)),
        header("0.txt", b"a"),
        header("1.png", type=tarfile.SYMTYPE, linkname=str(secret)),
        header("2.png", type=tarfile.LNKTYPE, linkname="0.png"),
        header("3.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        header("4.png", type=tarfile.FIFOTYPE),
        header("5.png", type=tarfile.DIRTYPE),
    ]
    reading = read_data(shard(tmp_path / "a.tar", members))
    assert [pair.id for pair in reading.pairs] == ["0"]
    assert reading.left_out == {"links and other members that are no files": tuple(f"{n}.png" for n in range(1, 6))}


def test_members_of_too_many_bytes_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignment.data.image_store.MAX_PICTURE_BYTES", 5000)
    parts: Parts = {
        "0.jpg": photo(0),
        "0.txt": "x" * (MAX_TEXT_BYTES + 1),
        "1.jpg": photo(1) + bytes(5000),
        "2.jpg": photo(2),
        "2.txt": "after them",
    }
    reading = read_data(shard(tmp_path / "a.tar", parts))
    assert {pair.id: pair.captions for pair in reading.pairs} == {"0": (), "2": ("after them",)}
    assert reading.left_out["members of too many bytes"] == ("0.txt", "1.jpg")


@pytest.mark.parametrize("name", ["1.jpg", "passed over.bin"])
def test_a_header_that_promises_more_than_there_is(tmp_path: Path, name: str) -> None:
    good = shard(tmp_path / "good.tar", {"0.jpg": photo(0), "0.txt": "a"}).read_bytes().rstrip(b"\0")
    good += bytes(-len(good) % 512)
    member = tarfile.TarInfo(name)
    member.size = 2**60
    file = tmp_path / "a.tar"
    file.write_bytes(good + member.tobuf(tarfile.GNU_FORMAT) + b"little")
    reading = read_data(file)
    assert [pair.id for pair in reading.pairs] == ["0"]
    assert reading.left_out == {"shards damaged or cut off, read up to there": ("a.tar",)}


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_that_promises_gigabytes(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("pax")
    member.type, member.size = kind, 2**36
    file = tmp_path / "a.tar"
    file.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + b"little")
    with pytest.raises(ValueError, match="damaged or cut off"):
        read_pairs(file)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_shard_cut_off_is_read_up_to_there(tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture) -> None:
    parts = {f"{n}.{part}": data for n in range(40) for part, data in (("jpg", photo(n)), ("txt", f"{n}".encode()))}
    file = shard(tmp_path / "a.tar", parts)
    whole = file.read_bytes().rstrip(b"\0")
    file.write_bytes(whole[: int(len(whole) * share)])
    found = captions(file)
    assert abs(len(found) - 40 * share) <= 1
    assert all(texts in ((key,), ()) for key, texts in found.items())
    assert "damaged or cut off" in caplog.text


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", bytes(range(256)) * 40, b"\x1f\x8b\x08" + bytes(600)])
def test_what_is_no_tar_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.tar"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="has no pictures; left out: 1 shards damaged"):
        read_pairs(file)
    with pytest.raises(ValueError, match="has no pictures"):
        read_pairs(tmp_path)


def test_any_damage_ends_in_a_reading_or_one_sentence(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", {"0.jpg": photo(0), "0.txt": "a", "1.jpg": photo(1), "1.txt": "b"}).read_bytes()
    random = np.random.default_rng(0)
    outcomes = set()
    for number in range(150):
        spoilt = bytearray(whole[:4096])
        for at in random.integers(0, len(spoilt), 6):
            spoilt[at] = random.integers(256)
        file = tmp_path / f"{number}.tar"
        file.write_bytes(spoilt)
        try:
            outcomes.add(len(read_pairs(file)))
        except ValueError as error:
            outcomes.add(str(error).partition("; left out")[0].removeprefix(f"{file} (webdataset) "))
    assert outcomes <= {1, 2, "has no pictures"}


def test_names_of_any_bytes_can_be_written(tmp_path: Path) -> None:
    name = b"\xff\xfe".decode(errors="surrogateescape")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for part, data in ((".jpg", photo(0)), (".txt", b"a")):
            tar.addfile(header(name + part, data)[0], io.BytesIO(data))
    assert read_pairs(tmp_path / "a.tar")[0].id.encode()


# ---------------------------------------------------------------- the same from the Hub


def test_a_web_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the network is left out: the library itself lays the shard out as a table."""
    import datasets

    inner = {"caption": "a dog", "url": "u"}
    parts: Parts = {
        **{"0.jpg": photo(0, "JPEG"), "0.txt": "a dog\na hound", "0.json": json.dumps(inner)},
        **{"1.jpg": photo(1, "JPEG"), "1.txt": "a cat", "1.json": json.dumps(inner)},
    }
    file = shard(tmp_path / "shards" / "train-0.tar", parts)
    load = datasets.load_dataset

    def load_dataset(name: str, revision: str | None, split: str) -> Any:
        assert name == "someone/shards"
        return load("webdataset", data_files={"train": str(file)}, split=split, cache_dir=str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, revision: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    pairs = read_pairs("someone/shards")
    assert [(pair.captions, pair.split) for pair in pairs] == [(("a dog", "a hound"), "train"), (("a cat",), "train")]
    assert [pair.id for pair in pairs] == ["0", "1"]
    assert Path(pairs[0].image).read_bytes() == photo(0, "JPEG")


# ---------------------------------------------------------------- patterns and shares


def test_a_pattern_may_have_wildcards_and_braces(tmp_path: Path) -> None:
    for seed, name in enumerate(("a-00", "a-01", "b-00", "c-00")):
        key = name[0] + name[-1]
        shard(tmp_path / "shards" / f"{name}.tar", {f"{key}.png": photo(seed), f"{key}.txt": name})
    assert sorted(captions(tmp_path / "shards" / "a-*.tar")) == ["a0", "a1"]
    assert sorted(captions(tmp_path / "shards" / "{b,a}-0?.tar")) == ["a0", "a1", "b0"]
    with pytest.raises(FileNotFoundError, match=r"Of the 2 shards .*, 1 are not there \(the first is x-\*\.tar\)"):
        read_pairs(tmp_path / "shards" / "{a,x}-*.tar")


def test_a_share_opens_only_its_own_shards(tmp_path: Path, cache: Path) -> None:
    for number in range(5):
        shard(tmp_path / "shards" / f"{number}.tar", {"0.png": photo(number), "0.txt": str(number)})
    parts = [read_data(tmp_path / "shards", partition=Partition(number, 2)).pairs for number in (1, 2)]
    assert [[pair.captions[0] for pair in part] for part in parts] == [["0", "2", "4"], ["1", "3"]]
    assert len(list((cache / "shards").iterdir())) == 5
    assert read_data(tmp_path / "shards", partition=Partition(7, 7)).pairs == []  # more shares than shards
    one = [read_data(tmp_path / "shards" / "0.tar", partition=Partition(number, 2)).pairs for number in (1, 2)]
    assert [len(part) for part in one] == [1, 0]
