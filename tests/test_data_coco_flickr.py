"""Flickr8k, Flickr30k and COCO in their usual layouts, whole and damaged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from test_data import flickr8k, karpathy_image, picture, read, splits, write

from alignment.data import Pair
from tests.data_sets import read_pairs

__all__ = ["flickr8k"]  # a fixture

# ---------------------------------------------------------------- Flickr


def test_flickr8k_is_read_whole(flickr8k: Path) -> None:
    assert read_pairs(flickr8k)[0] == Pair(
        image=str(flickr8k / "Flicker8k_Dataset" / "a.jpg"),
        captions=("a caption 0 .", "a caption 1 ."),
        split="train",
        id="a.jpg",
    )
    assert splits(flickr8k) == {"a.jpg": "train", "b.jpg": "dev", "c.jpg": ""}


@pytest.mark.parametrize("split", ["dev", "val", "validation", "DEV"])
def test_dev_and_val_are_one(flickr8k: Path, split: str) -> None:
    assert list(read(flickr8k, split=split)) == ["b.jpg"]


@pytest.mark.parametrize("source", [".", "Flickr8k_text", "Flickr8k_text/Flickr8k.token.txt"])
def test_flickr8k_is_found_from_any_of_its_paths(flickr8k: Path, source: str) -> None:
    assert set(read(flickr8k / source)) == {"a.jpg", "b.jpg", "c.jpg"}


def test_missing_pictures_are_logged_once_each(flickr8k: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        read_pairs(flickr8k)
    assert "left out 1 missing pictures (gone.jpg.1)" in caplog.text
    # A service logs what comes before the first argument.
    assert len(caplog.records) == 2
    assert all(str(record.msg).partition("%")[0].startswith("Read a data set") for record in caplog.records)


def test_what_is_missing_in_another_split_is_not_reported(flickr8k: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        read_pairs(flickr8k, split="dev")
    assert "1 pictures, 2 captions" in caplog.text
    assert "left out" not in caplog.text


def test_an_empty_split_names_those_there_are(flickr8k: Path) -> None:
    with pytest.raises(ValueError, match=r"no pictures of split 'test'; its splits are dev, train"):
        read_pairs(flickr8k, split="test")


def test_flickr30k_token_file_with_split_lists(tmp_path: Path) -> None:
    picture(tmp_path / "flickr30k-images" / "1.jpg")
    picture(tmp_path / "flickr30k-images" / "2.jpg")
    write(tmp_path / "results_20130124.token", "1.jpg#0\tOne dog .\n1.jpg#1\tA #1 dog .\n2.jpg#0\tTwo dogs .\n")
    write(tmp_path / "train.txt", "1\n")
    write(tmp_path / "test.txt", "2\n")
    assert read(tmp_path) == {"1.jpg": ("One dog .", "A #1 dog ."), "2.jpg": ("Two dogs .",)}
    assert splits(tmp_path) == {"1.jpg": "train", "2.jpg": "test"}


def test_flickr30k_results_with_bars_quotes_and_the_broken_line(tmp_path: Path) -> None:
    picture(tmp_path / "flickr30k_images" / "flickr30k_images" / "1.jpg")
    picture(tmp_path / "flickr30k_images" / "flickr30k_images" / "2199200615.jpg")
    lines = [
        "image_name| comment_number| comment",
        '1.jpg| 0| A sign says "open, come in .',
        "1.jpg| 1| 2 men , one | in red .",
        "2199200615.jpg| 4   A dog runs across the grass .",
        "nonsense",
    ]
    write(tmp_path / "flickr30k_images" / "results.csv", "\n".join(lines))
    assert read(tmp_path) == {
        "1.jpg": ('A sign says "open, come in .', "2 men , one | in red ."),
        "2199200615.jpg": ("A dog runs across the grass .",),
    }


def test_karpathy_flickr30k(tmp_path: Path) -> None:
    images = [karpathy_image("1.jpg", "train", "One.", "Uno."), karpathy_image("2.jpg", "val", "Two.", imgid=7)]
    for image in images:
        picture(tmp_path / "images" / str(image["filename"]))
    file = write(tmp_path / "dataset_flickr30k.json", json.dumps({"images": images, "dataset": "flickr30k"}))
    assert read(tmp_path) == read(file) == {"1.jpg": ("One.", "Uno."), "2.jpg": ("Two.",)}
    assert [pair.id for pair in read_pairs(file, split="dev")] == ["7"]


def test_karpathy_coco_uses_its_folders_and_counts_restval_as_train(tmp_path: Path) -> None:
    names = {"train": "train2014", "restval": "val2014", "val": "val2014", "test": "val2014"}
    images = []
    for number, (split, folder) in enumerate(names.items()):
        picture(tmp_path / folder / f"{number}.jpg")
        images.append(karpathy_image(f"{number}.jpg", split, split, filepath=folder, cocoid=100 + number))
    file = write(tmp_path / "annotations" / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))
    assert read(file, split="train") == {"0.jpg": ("train",), "1.jpg": ("restval",)}
    assert splits(tmp_path) == {"0.jpg": "train", "1.jpg": "train", "2.jpg": "dev", "3.jpg": "test"}
    assert [pair.id for pair in read_pairs(file)] == ["100", "101", "102", "103"]


# ---------------------------------------------------------------- COCO


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    for split, ids in {"train": (1, 2), "val": (3,)}.items():
        images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in ids]
        annotations = [
            {"id": 10 * number + turn, "image_id": number, "caption": f"{number} {turn}"}
            for turn in (0, 1)
            for number in ids
        ]
        content = {"info": {"year": 2017}, "images": images, "annotations": annotations}
        write(tmp_path / "annotations" / f"captions_{split}2017.json", json.dumps(content))
        write(tmp_path / "annotations" / f"instances_{split}2017.json", json.dumps({"images": images}))
        for number in ids:
            picture(tmp_path / f"{split}2017" / f"{number:012}.jpg")
    return tmp_path


def test_coco_joins_its_annotation_files(coco: Path) -> None:
    assert read(coco) == {f"{number:012}.jpg": (f"{number} 0", f"{number} 1") for number in (1, 2, 3)}
    assert [pair.id for pair in read_pairs(coco, split="val")] == ["3"]
    assert len(read_pairs(coco, split="train")) == 2


def test_coco_2014_names_its_pictures_after_their_folder(tmp_path: Path) -> None:
    name = "COCO_val2014_000000000042.jpg"
    picture(tmp_path / "val2014" / name)
    content = {"images": [{"id": 42, "file_name": name}], "annotations": [{"id": 1, "image_id": 42, "caption": "A."}]}
    write(tmp_path / "annotations" / "captions_val2014.json", json.dumps(content))
    assert read(tmp_path) == {name: ("A.",)}
    assert splits(tmp_path) == {name: "dev"}


def test_one_coco_file_may_be_named_anything(coco: Path) -> None:
    file = coco / "annotations" / "captions_val2017.json"
    assert read(file) == {"000000000003.jpg": ("3 0", "3 1")}
    assert read(file.rename(file.with_name("mine.json"))) == {"000000000003.jpg": ("3 0", "3 1")}


def test_coco_without_annotations_is_refused_in_one_sentence(tmp_path: Path) -> None:
    file = write(tmp_path / "captions_val2017.json", json.dumps({"images": [{"id": 1, "file_name": "1.jpg"}]}))
    with pytest.raises(ValueError, match=r"cannot be read as coco .*annotations"):
        read_pairs(file)
