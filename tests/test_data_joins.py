"""Annotations joined to pictures by name: none to another picture, and what is ambiguous is reported."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from test_data_lenient import HEADED, NAMED, TEXTS, coco, dumped, expected, found, pictures

from alignment.data import read_data

# ---------------------------------------------------------------- joins


@pytest.mark.parametrize("form", ["json", "csv", "jsonl", "folders", "coco folders"])
@pytest.mark.parametrize(
    "names", [("train", "val"), ("images/train2017", "images/val2017"), ("Training", "validation")]
)
def test_the_split_of_an_annotation_decides_between_folders(tmp_path: Path, form: str, names: tuple[str, str]) -> None:
    for split, folder in zip(("train", "val"), names, strict=True):
        pictures(tmp_path / folder)
        texts = [f"{split} {text}" for text in TEXTS]
        table = [{"file_name": name, "caption": text} for name, text in zip(NAMED, texts, strict=True)]
        lines = "\n".join(["image,caption", *[f"{row['file_name']},{row['caption']}" for row in table]])
        if form == "json":
            dumped(tmp_path / f"captions_{split}.json", coco(list(NAMED), texts))
        elif form == "csv":
            (tmp_path / f"{split}.csv").write_text(lines)
        elif form == "jsonl":
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, table)))
        elif form == "folders":
            (tmp_path / folder / "captions.csv").write_text(lines)
        else:
            dumped(tmp_path / folder / "_annotations.coco.json", coco(list(NAMED), texts))
    captions = found(read_data(tmp_path), tmp_path)
    assert captions == {
        f"{folder}/{name}": (f"{split} {text}",)
        for split, folder in zip(("train", "val"), names, strict=True)
        for name, text in NAMED.items()
    }


def test_a_part_whose_pictures_are_not_there_gets_no_others(tmp_path: Path) -> None:
    pictures(tmp_path / "train")
    for split in ("train", "val"):
        dumped(tmp_path / f"captions_{split}.json", coco(list(NAMED), [f"{split} {text}" for text in TEXTS]))
    reading = read_data(tmp_path)
    assert found(reading, tmp_path) == {f"train/{name}": (f"train {text}",) for name, text in NAMED.items()}
    assert len(reading.left_out["missing pictures"]) == 12


@pytest.mark.parametrize("name", ["captions.json", "all.csv"])
def test_where_nothing_decides_the_ambiguity_is_named(tmp_path: Path, name: str) -> None:
    pictures(tmp_path / "a")
    pictures(tmp_path / "b")
    if name.endswith("json"):
        dumped(tmp_path / name, coco(list(NAMED), TEXTS))
    else:
        (tmp_path / name).write_text("\n".join(HEADED))
    with pytest.raises(ValueError, match=r"12 names: 0\.jpg \(a/0\.jpg, b/0\.jpg\)"):
        read_data(tmp_path)


def test_a_part_that_is_read_alone_keeps_to_its_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        pictures(tmp_path / split)
        (tmp_path / f"{split}.csv").write_text("\n".join(HEADED))
    assert found(read_data(tmp_path, split="dev"), tmp_path) == expected("val/")
    assert found(read_data(tmp_path / "val.csv"), tmp_path) == expected("val/")


@pytest.mark.parametrize(("one", "other"), [(str, int), (int, str), ("{:06}".format, int), (int, float)])
def test_ids_of_coco_are_joined_as_numbers_or_texts(tmp_path: Path, one: Any, other: Any) -> None:
    pictures(tmp_path)
    dumped(tmp_path / "captions.json", coco(list(NAMED), TEXTS, one, other))
    assert found(read_data(tmp_path), tmp_path) == expected()


def test_one_id_of_several_images_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path)
    dumped(tmp_path / "captions.json", coco(list(NAMED), TEXTS, lambda number: min(number, 11)))
    with pytest.raises(ValueError, match=r"id 11 stands for several images \(10\.jpg, 11\.jpg\)"):
        read_data(tmp_path)


def test_captions_of_images_that_are_not_listed_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path)
    dumped(tmp_path / "captions.json", coco(list(NAMED)[:11], TEXTS))
    assert read_data(tmp_path).left_out == {
        "captions of images that are not listed": ("captions.json: 12",),
        "pictures that no caption names": ("11.jpg",),
    }


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("written", "stored", "reason"),
    [
        ("my%20dog.jpg", "my dog.jpg", "names written as in an address, with % for letters"),
        ("img%2F%E7%8B%97.jpg", "img/狗.jpg", "names written as in an address, with % for letters"),
        (".\\img\\.\\a.jpg", "img/a.jpg", None),
        ("./img//a.jpg", "img/a.jpg", None),
        ('"a ""b"".jpg"', 'a "b".jpg', None),
        ('"a\nb.jpg"', "a\nb.jpg", None),
        ("a, b.jpg", "a, b.jpg", "lines with a delimiter in a value without quotation marks"),
        (" a.jpg\t", "a.jpg", None),
        ("100%25.jpg", "100%25.jpg", None),
    ],
)
def test_names_as_people_write_them(tmp_path: Path, written: str, stored: str, reason: str | None) -> None:
    pictures(tmp_path / Path(stored).parent, [Path(stored).stem, "z"])
    (tmp_path / "captions.csv").write_text(f"image,caption\n{written},a dog\nz.jpg,a cat\n")
    reading = read_data(tmp_path)
    assert found(reading, tmp_path)[stored] == ("a dog",)
    assert [*reading.repaired] == ([reason] if reason else [])


def test_addresses_on_the_network_are_called_so(tmp_path: Path) -> None:
    pictures(tmp_path, [0])
    (tmp_path / "captions.csv").write_text("image,caption\nhttps://example.org/0.jpg,a dog\n0.jpg,a cat\n")
    reading = read_data(tmp_path)
    assert reading.left_out == {"addresses on the network, which are not opened": ("https://example.org/0.jpg",)}


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("folder", ["", "Bücher/"])
def test_composed_and_decomposed_names_are_one(tmp_path: Path, written: str, stored: str, folder: str) -> None:
    names = [f"{folder}Hündchen", f"{folder}café", f"{folder}한국"]
    pictures(
        tmp_path / unicodedata.normalize(stored, folder), [unicodedata.normalize(stored, Path(n).name) for n in names]
    )
    lines = [f"{unicodedata.normalize(written, name)}.jpg,{text}" for name, text in zip(names, TEXTS, strict=False)]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *lines]), "utf-8")
    reading = read_data(tmp_path)
    assert [pair.captions[0] for pair in reading.pairs] == TEXTS[:3]
    assert (reading.left_out, reading.repaired) == ({}, {})


def test_names_that_differ_in_case_are_joined_and_told(tmp_path: Path) -> None:
    pictures(tmp_path, ["a", "B"], ".JPG")
    (tmp_path / "captions.csv").write_text("image,caption\nA.jpg,a dog\nb.JPG,a cat\n")
    reading = read_data(tmp_path)
    assert found(reading, tmp_path) == {"a.JPG": ("a dog",), "B.JPG": ("a cat",)}
    assert reading.repaired == {"names that differ from their pictures' in upper and lower case": ("A.jpg", "b.JPG")}


def test_names_that_differ_in_case_alone_are_ambiguous_where_neither_is_meant(tmp_path: Path) -> None:
    pictures(tmp_path, ["a", "A"])
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,a dog\na.JPG,a cat\n")
    with pytest.raises(ValueError, match=r"a\.JPG \(A\.jpg, a\.jpg\)"):
        read_data(tmp_path)


def test_missing_names_are_looked_up_in_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "x")
    for number in range(60):
        (tmp_path / f"folder {number}").mkdir()
    asked: list[str] = []
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path) or isfile(path))
    lines = [f"gone{number}.jpg,a dog" for number in range(100)]
    (tmp_path / "captions.csv").write_text("\n".join([*HEADED, *lines]))
    reading = read_data(tmp_path)
    assert found(reading, tmp_path) == expected("x/")
    assert len(reading.left_out["missing pictures"]) == 100
    assert len(asked) < 3 * 120
