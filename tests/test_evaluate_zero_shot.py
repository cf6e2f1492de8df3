"""Zero-shot classification by hand, with an encoder that reads colours, and the files it takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from alignment.evaluate import Estimate
from alignment.evaluate.zero_shot import (
    CHINESE_TEMPLATES,
    ENGLISH_TEMPLATES,
    LabelledImages,
    class_embeddings,
    class_ranks,
    compare_zero_shot,
    read_class_folders,
    read_class_names,
    read_templates,
    zero_shot_line,
    zero_shot_metrics,
)
from alignment.preprocess import InputError

WORDS = {"red": 0, "rose": 0, "红": 0, "green": 1, "绿": 1, "blue": 2, "photo": 3, "照片": 3}


def classify(encoder: Any, data: LabelledImages, *, resamples: int = 1000, **options: Any) -> dict[str, Estimate]:
    return zero_shot_metrics(class_ranks(encoder, data, **options), resamples=resamples)


class ColourEncoder:
    """Sees the colour of a picture; reads colours and the word photo in a sentence, one axis each."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def encode_images(
        self, images: Sequence[str], *, batch_size: int = 16, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        try:
            colours = [(*Image.open(image).convert("RGB").getpixel((0, 0)), 0) for image in images]
        except OSError as error:
            raise InputError("The picture is damaged.", "image.truncated") from error
        return functional.normalize(torch.tensor(colours, dtype=torch.float32), dim=-1)

    def encode_texts(self, texts: Sequence[str], *, progress: Callable[[int, int], None] | None = None) -> Tensor:
        self.read = list(texts)
        rows = torch.zeros(len(texts), 4)
        for row, text in zip(rows, texts, strict=True):
            for word, axis in WORDS.items():
                row[axis] += word in text
        if progress:
            progress(len(texts), len(texts))
        return rows  # not normalised on purpose


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two red pictures, one of them sorted in with the blue one, and one green."""
    for name, colour in (("red/1", "red"), ("blue/1", "blue"), ("blue/deep/2", "red"), ("light_green/1", "lime")):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(path)
    (tmp_path / "photos" / "empty").mkdir()
    (tmp_path / "photos" / "readme.txt").write_text("not a class", encoding="utf-8")
    (tmp_path / "photos" / "red" / "notes.txt").write_text("not a picture", encoding="utf-8")
    return tmp_path / "photos"


# ---------------------------------------------------------------- figures


def test_by_hand(folder: Path) -> None:
    data = read_class_folders(folder)
    assert data.class_names == [["blue"], ["light green"], ["red"]]
    assert [Path(image).relative_to(folder).as_posix() for image in data.images] == [
        "blue/1.png",
        "blue/deep/2.png",
        "light_green/1.png",
        "red/1.png",
    ]
    metrics = classify(ColourEncoder(), data, resamples=200)
    top = metrics["zero_shot_top1"]
    assert top.value == 0.75, "the red picture among the blue ones"
    assert metrics["zero_shot_top5"].value == 1.0
    assert 0 <= top.low < top.value < top.high == 1.0
    line = zero_shot_line(metrics, 4, 3)
    assert line.startswith("zero-shot     top-1 75.0% [")
    assert line.endswith("; 4 pictures, 3 classes")


def test_classes_that_score_equally_stand_before_the_right_one(folder: Path) -> None:
    data = read_class_folders(folder)
    ranks = class_ranks(ColourEncoder(), data)
    assert ranks.tolist() == [1, 3, 1, 1], "its own class and another score 0 with a red picture"
    same = LabelledImages(data.images, data.labels, [["red"], ["red"], ["red"]])
    assert classify(ColourEncoder(), same, resamples=0)["zero_shot_top1"].value == 0.0


def test_a_class_is_the_mean_of_all_its_names_in_all_templates() -> None:
    encoder = ColourEncoder()
    classes = class_embeddings(encoder, [["red", "green"], ["blue"]], ["{}", "a photo of a {}"])
    assert encoder.read == ["red", "a photo of a red", "green", "a photo of a green", "blue", "a photo of a blue"]
    half = 2**-0.5
    mean = torch.tensor([[1 + half, 1 + half, 0, 2 * half], [0, 0, 1 + half, half]])
    assert torch.allclose(classes, functional.normalize(mean, dim=-1))


def test_templates_follow_the_script_of_the_name() -> None:
    encoder = ColourEncoder()
    class_embeddings(encoder, [["red", "红"]])
    assert encoder.read == [
        *(template.replace("{}", "red") for template in ENGLISH_TEMPLATES),
        *(template.replace("{}", "红") for template in CHINESE_TEMPLATES),
    ]
    assert all(template.count("{}") == 1 for template in (*ENGLISH_TEMPLATES, *CHINESE_TEMPLATES))


def test_pictures_that_cannot_be_opened_are_left_out_with_their_labels(folder: Path) -> None:
    (folder / "blue" / "1.png").write_bytes(b"\x89PNG")
    data = read_class_folders(folder)
    assert class_ranks(ColourEncoder(), data).tolist() == [3, 1, 1]


def test_two_models_are_compared_picture_by_picture() -> None:
    before, after = torch.tensor([1, 2, 6, 1] * 20), torch.tensor([1, 1, 5, 7] * 20)
    found = compare_zero_shot(before, after, resamples=300)
    top1, top5 = found["zero_shot_top1"], found["zero_shot_top5"]
    assert (top1.before, top1.after, top1.value) == (0.5, 0.5, 0.0)
    assert top1.low < 0 < top1.high
    assert (top5.before, top5.after, top5.value) == (0.75, 0.75, 0.0)
    with pytest.raises(ValueError, match="different pictures"):
        compare_zero_shot(before, after[1:])


def test_a_model_that_was_never_taught_stays_at_chance(checkpoint: Callable[[str], Path], folder: Path) -> None:
    """The whole flow with a real tiny model: shapes fit, and figures are shares."""
    from alignment.model import DualEncoder

    data = read_class_folders(folder)
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    told: list[str] = []
    metrics = classify(encoder, data, resamples=10, progress=lambda *what: told.append(what[0]))
    assert metrics["zero_shot_top1"].value in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert set(told) == {"pictures", "class names"}


# ---------------------------------------------------------------- files


def test_class_names_from_a_table_and_from_json(tmp_path: Path) -> None:
    table = tmp_path / "names.tsv"
    table.write_text("n01\tcat\thouse cat\nn02\t狗\n\n", encoding="utf-8")
    assert read_class_names(table) == {"n01": ["cat", "house cat"], "n02": ["狗"]}
    user_errors = tmp_path / "names.json"
    user_errors.write_text(json.dumps({"n01": ["cat", "house cat"], "n02": "狗"}), encoding="utf-8")
    assert read_class_names(user_errors) == read_class_names(table)


def test_a_file_of_names_says_what_the_candidates_are(folder: Path) -> None:
    names = folder / "names.tsv"
    names.write_text("red\trose\nviolet\tviolet\nblue\tblue\nlight_green\tgreen\n", encoding="utf-8")
    data = read_class_folders(folder, names)
    assert data.class_names == [["rose"], ["violet"], ["blue"], ["green"]]
    assert data.labels == [2, 2, 3, 0]
    names.write_text("red\trose\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no name for the folder blue \(and 1 more\)"):
        read_class_folders(folder, names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("names.tsv", "cat\n", "no name for the class 'cat'"),
        ("names.tsv", "cat\t \n", "no name for the class 'cat'"),
        ("names.json", "[1, 2]", "not a JSON object"),
        ("names.json", "{", "not a JSON object"),
        ("names.json", '{"cat": [1]}', "no name for the class 'cat'"),
        ("names.json", '{"cat": 7}', "not a JSON object"),
    ],
)
def test_names_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_class_names(tmp_path / name)


def test_templates_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("\ufeffa {} here\n\n有一只{}\n", encoding="utf-8")
    assert read_templates(file) == ["a {} here", "有一只{}"]
    for wrong in ("a photo\n", "{} {}\n", "\n"):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match="a template a line"):
            read_templates(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_templates(file)
    with pytest.raises(FileNotFoundError, match="cannot be read"):
        read_templates(tmp_path / "none.txt")


def test_folders_without_classes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_class_folders(tmp_path / "none")
    Image.new("RGB", (8, 8)).save(tmp_path / "lone.png")
    with pytest.raises(ValueError, match="one per class"):
        read_class_folders(tmp_path)
