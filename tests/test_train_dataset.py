"""The series of examples and the data of a run: what belongs together, what is drawn, what is set apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from alignment.data import Pair
from alignment.model import DualEncoder
from alignment.preprocess import Preprocessor, open_image
from alignment.train.dataset import (
    MIN_CROP,
    MIN_HELD_OUT,
    CaptionIndex,
    ContrastiveDataset,
    Prepared,
    _augmented,
    prepare,
)
from alignment.train.settings import TrainConfig

Checkpoint = Callable[[str], Path]

SIDE = 48


def captioned(*captions: Sequence[str]) -> list[Pair]:
    return [Pair(f"{row}.png", tuple(texts)) for row, texts in enumerate(captions)]


def related(
    captions: CaptionIndex, rows: Sequence[int], numbers: Sequence[int]
) -> tuple[list[list[int]], list[list[int]]]:
    positives, ignored = captions.positive_mask(torch.tensor(rows), torch.tensor(numbers))
    assert positives.dtype == ignored.dtype == torch.bool
    return positives.int().tolist(), ignored.int().tolist()


# ---------------------------------------------------------------- what belongs together


def test_all_captions_of_an_image_are_its_positives() -> None:
    captions = CaptionIndex(captioned(["a", "b"], ["c"], ["d", "e", "f"]))
    assert captions.texts == ["a", "b", "c", "d", "e", "f"]
    assert captions.image_of_text.tolist() == [0, 0, 1, 2, 2, 2]
    positives, ignored = related(captions, [2, 0, 1], [0, 5, 3, 2, 1])
    assert positives == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 1, 0]]
    assert not np.any(ignored)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A dog runs.", "a  dog runs", True),
        ("a dog, runs!", "A DOG RUNS", True),
        ("«Straße» — hier", "STRASSE hier", True),
        ("一只狗在奔跑。", "一只狗，在奔跑", False),  # where the words part is not known
        ("一只狗在奔跑。", "一只狗在奔跑", True),
        ("a dog runs", "a dog ran", False),
        ("a dog's toy", "a dogs toy", False),
        ("🐕", "🐈", False),
        ("!!!", "???", False),
        ("लड़की", "लड़का", False),  # vowel signs are part of a word
        ("5 $ note", "5 € note", False),
    ],
)
def test_captions_with_the_same_words_are_positives_of_each_others_images(one: str, other: str, same: bool) -> None:
    captions = CaptionIndex(captioned([one, "x"], [other, "y"]))
    positives, ignored = related(captions, [0, 1], [0, 1, 2, 3])
    assert positives == [[1, 1, same, 0], [same, 0, 1, 1]]
    assert not np.any(ignored)


def test_look_alikes_are_ignored_but_never_an_images_own_captions() -> None:
    captions = CaptionIndex(captioned(["a"], ["b", "same"], ["c"], ["d", "Same."]), [(1, 3)])
    positives, ignored = related(captions, [0, 1, 2, 3], range(6))
    assert positives == [[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 1, 1]]
    assert ignored == [[0] * 6, [0, 0, 0, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]


def test_look_alikes_form_chains() -> None:
    captions = CaptionIndex(captioned(*([letter] for letter in "abcdefg")), [(0, 4), (6, 4), (1, 2), (6, 5)])
    _, ignored = related(captions, range(7), range(7))
    group = {0, 4, 5, 6}
    for row in range(7):
        expected = group - {row} if row in group else {1, 2} - {row} if row in (1, 2) else set()
        assert set(np.flatnonzero(ignored[row])) == expected


def test_what_a_look_alike_says_is_ignored_even_if_drawn_from_a_third_image() -> None:
    """Image 1 looks like image 0, and image 2 has a caption of image 0."""
    captions = CaptionIndex(captioned(["two dogs"], ["x"], ["Two dogs!"]), [(0, 1)])
    positives, ignored = related(captions, [0, 1, 2], [2, 1])
    assert positives == [[1, 0], [0, 1], [1, 0]]
    assert ignored == [[0, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("pairs", [[], captioned(["a"], [])])
def test_an_image_without_a_caption_is_refused(pairs: list[Pair]) -> None:
    with pytest.raises(ValueError, match="each needs a caption"):
        CaptionIndex(pairs)


def test_captions_are_drawn_without_repeats_while_they_last() -> None:
    captions = CaptionIndex(captioned(["x"], list("abc"), list("de")))
    draws = [captions.sample(1, 2, np.random.default_rng(seed)) for seed in range(60)]
    assert all(set(draw) <= {1, 2, 3} and len(set(draw)) == 2 for draw in draws)
    assert {tuple(draw) for draw in draws} == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3) if a != b}
    for seed in range(20):
        assert sorted(captions.sample(1, 3, np.random.default_rng(seed))) == [1, 2, 3]
        assert sorted(Counter(captions.sample(1, 7, np.random.default_rng(seed))).values()) == [2, 2, 3]
        assert sorted(captions.sample(2, 4, np.random.default_rng(seed))) == [4, 4, 5, 5]
        assert captions.sample(0, 2, np.random.default_rng(seed)) == [0, 0]


# ---------------------------------------------------------------- the series


@pytest.fixture(scope="module")
def preprocessor(checkpoint: Checkpoint) -> Preprocessor:
    return DualEncoder.load(checkpoint("vit-bert"), device="cpu").preprocessor


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Eleven pictures whose brightness rises to the right and whose green tells which one it is."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for row in range(11):
        pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        pixels[..., 0] = np.linspace(0, 255, SIDE)
        pixels[..., 1] = 20 * row
        Image.fromarray(pixels).save(folder / f"{row}.png")
        found.append(Pair(str(folder / f"{row}.png"), tuple(f"dog {row} {letter}" for letter in "abc")))
    return found


@pytest.fixture
def series(pairs: list[Pair], preprocessor: Preprocessor) -> Callable[..., ContrastiveDataset]:
    def build(pairs: list[Pair] = pairs, **options: Any) -> ContrastiveDataset:
        settings = {"batch_size": 4, "num_steps": 5, "captions_per_image": 2, "seed": 3} | options
        return ContrastiveDataset(pairs, CaptionIndex(pairs), preprocessor, **settings)

    return build


Series = Callable[..., ContrastiveDataset]


def rows_of(examples: ContrastiveDataset) -> list[list[int]]:
    return [examples.batch(step).rows.tolist() for step in range(examples.num_steps)]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        torch.equal(one[name], other[name])
        if isinstance(one[name], Tensor)
        else one[name].keys() == other[name].keys() and all(map(torch.equal, one[name].values(), other[name].values()))
        for name in one.keys() | other.keys()
    )


def test_each_image_comes_once_a_pass_and_never_twice_in_a_batch(series: Series) -> None:
    examples = series(num_steps=8)
    assert (examples.steps_per_epoch, len(examples)) == (2, 32)
    rows = rows_of(examples)
    for epoch in range(4):
        seen = rows[2 * epoch] + rows[2 * epoch + 1]
        assert len(set(seen)) == 8  # of 11: what is left over has its turn in another pass
    assert len({tuple(batch) for batch in rows}) == 8
    assert {row for batch in rows for row in batch} == set(range(11))


def test_a_batch_larger_than_the_data_is_all_of_it(series: Series) -> None:
    examples = series(batch_size=64, num_steps=3)
    assert (examples.batch_size, examples.steps_per_epoch, len(examples)) == (11, 1, 33)
    assert all(sorted(batch) == list(range(11)) for batch in rows_of(examples))


def test_a_batch_holds_pictures_with_their_captions(series: Series, pairs: list[Pair]) -> None:
    examples = series(augment=False)
    batch = examples.batch(1)
    pictures = [open_image(pairs[row].image) for row in batch.rows.tolist()]
    expected = examples.preprocessor.images(pictures)["pixel_values"]
    assert torch.equal(batch.images["pixel_values"], expected)
    assert examples.captions.image_of_text[batch.captions].tolist() == batch.rows.repeat_interleave(2).tolist()
    texts = examples.preprocessor.texts([examples.captions.texts[number] for number in batch.captions.tolist()])
    assert all(torch.equal(batch.texts[name], texts[name]) for name in texts)
    chunks = list(batch.chunks(3))
    assert [len(images["pixel_values"]) for images, _ in chunks] == [3, 1]
    assert [len(texts["input_ids"]) for _, texts in chunks] == [6, 2]


def test_the_seed_and_the_number_tell_everything(series: Series) -> None:
    one, again, other = series(), series(), series(seed=4)
    backwards = [again[number] for number in reversed(range(len(again)))][::-1]
    for number, example in enumerate(one[number] for number in range(len(one))):
        assert same(one.collate([example]), one.collate([backwards[number]]))
    assert rows_of(one) != rows_of(other)
    # Pictures, too, are cropped and captions drawn anew in each pass.
    views: dict[int, list[Tensor]] = {}
    for number in range(len(one)):
        views.setdefault(one[number]["row"], []).append(one[number]["images"]["pixel_values"])
    seen_twice = [found for found in views.values() if len(found) > 1]
    assert seen_twice
    assert not any(torch.equal(found[0], found[1]) for found in seen_twice)


def test_workers_processes_and_a_resumed_run_see_the_same_examples(series: Series) -> None:
    examples = series()
    alone = list(DataLoader(examples, batch_size=4, collate_fn=examples.collate))
    assert len(alone) == 5
    shared = DataLoader(examples, batch_size=4, collate_fn=examples.collate, num_workers=2)
    for step, (one, other) in enumerate(zip(alone, shared, strict=True)):
        assert same(one, other)
        assert same(one, vars(examples.batch(step)))
    halves = list(DataLoader(examples, batch_size=2, collate_fn=examples.collate))  # process r takes every second one
    for step, batch in enumerate(alone):
        rows = torch.cat([halves[2 * step]["rows"], halves[2 * step + 1]["rows"]])
        assert torch.equal(rows, batch["rows"])
    fresh = series()
    assert same(vars(fresh.batch(3)), alone[3])  # skipped to


# ---------------------------------------------------------------- crops and mirrors


def is_mirrored(example: dict[str, Any]) -> bool:
    red = example["images"]["pixel_values"][0, 0]
    return bool(red[:, 0].mean() > red[:, -1].mean())


@pytest.mark.parametrize(
    ("caption", "may_be"),
    [
        ("a dog on the left", False),
        ("RIGHT-hand side", False),
        ("一只狗在左边", False),
        ("右侧的猫", False),
        ("bright leftovers", True),
        ("一只狗", True),
    ],
)
def test_an_image_whose_caption_names_a_side_is_not_mirrored(
    series: Series, pairs: list[Pair], caption: str, may_be: bool
) -> None:
    told = [Pair(pair.image, ("a dog", caption)) for pair in pairs[:4]]  # whichever of the two is drawn
    examples = series(told, num_steps=6, captions_per_image=1)
    mirrored = [is_mirrored(examples[number]) for number in range(len(examples))]
    assert any(mirrored) == may_be
    assert not all(mirrored)


def test_without_augmentation_a_picture_is_as_it_is(series: Series, pairs: list[Pair]) -> None:
    examples = series(augment=False)
    for number in range(len(examples)):
        example = examples[number]
        plain = examples.preprocessor.images([open_image(pairs[example["row"]].image)])
        assert torch.equal(example["images"]["pixel_values"], plain["pixel_values"])


def test_crops_keep_the_shape_and_most_of_the_area() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 500, 3), dtype=np.uint8))
    shares, mirrored, places = [], 0, set()
    pixels = np.asarray(image)
    for _ in range(300):
        crop = _augmented(image, rng, mirror=True)
        shares.append(crop.width * crop.height / (500 * 300))
        assert crop.width / crop.height == pytest.approx(500 / 300, rel=0.01)
        view, flipped = np.asarray(crop), np.asarray(ImageOps.mirror(crop))
        spots = [spot for spot in (view, flipped) if _place(pixels, spot) is not None]
        assert len(spots) == 1
        mirrored += spots[0] is flipped
        places.add(_place(pixels, spots[0]))
    assert min(shares) > MIN_CROP - 0.005  # half a pixel a side
    assert min(shares) < MIN_CROP + 0.02
    assert max(shares) > 0.98
    assert 110 < mirrored < 190
    assert len({top for top, _ in places}) > 15
    assert len({left for _, left in places}) > 25
    assert _augmented(Image.new("RGB", (1, 1)), rng, mirror=True).size == (1, 1)


def _place(pixels: np.ndarray, crop: np.ndarray) -> tuple[int, int] | None:
    """Where a crop was cut: the place whose first pixels are its own."""
    high, wide = pixels.shape[0] - crop.shape[0] + 1, pixels.shape[1] - crop.shape[1] + 1
    for top, left in np.argwhere((pixels[:high, :wide] == crop[0, 0]).all(-1)):
        if np.array_equal(pixels[top : top + crop.shape[0], left : left + crop.shape[1]], crop):
            return int(top), int(left)
    return None


# ---------------------------------------------------------------- the data of a run


def scene(seed: int) -> Image.Image:
    """Paint something as soft as a photograph: no two seeds look alike."""
    colours = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def data_set(folder: Path, entries: Sequence[tuple[int | str, str, str]]) -> str:
    """Write a data set of (picture, caption, split); a picture is a scene's number, with a suffix for a copy."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for picture, caption, split in entries:
        number, _, suffix = str(picture).partition("-")
        name = f"{picture}.bmp" if suffix == "anew" else f"{picture}.png"
        scene(int(number)).save(folder / name)
        lines.append(json.dumps({"image": name, "caption": caption, **({"split": split} if split else {})}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def prepared(data: str, **options: Any) -> Prepared:
    return prepare(TrainConfig(data=data, output="unused", **options))


def names(pairs: Sequence[Pair]) -> list[str]:
    return [Path(pair.image).stem for pair in pairs]


def test_no_picture_is_both_learnt_from_and_measured_on(tmp_path: Path) -> None:
    train = [(number, f"caption {number}", "train") for number in range(6)]
    dev = [(f"{number}-copy", f"other {number}", "val") for number in (1, 4)]
    dev += [(number, f"caption {number}", "val") for number in (10, 11)]
    found = prepared(data_set(tmp_path, train + dev + [(20, "never", "test")]))
    assert names(found.train) == ["0", "2", "3", "5"]
    assert names(found.evaluation) == ["1-copy", "4-copy", "10", "11"]
    assert found.evaluation_name == "split dev"
    assert found.report.startswith("6 pictures")  # the report is of the training part as it was found
    assert "pictures that are in the training part too: 2" in found.report


def test_equal_pictures_are_one_with_the_captions_of_both(tmp_path: Path) -> None:
    entries = [(number, f"caption {number}", "train") for number in range(5)]
    entries += [("2-copy", "another", "train"), ("3-anew", "saved anew", "train")]
    entries += [(number, f"caption {number}", "dev") for number in range(10, 14)] + [("13-copy", "more", "dev")]
    found = prepared(data_set(tmp_path, entries))
    assert names(found.train) == ["0", "1", "2", "3", "4", "3-anew"]
    assert found.train[2].captions == ("caption 2", "another")
    assert [sorted(names([found.train[row] for row in pair])) for pair in found.near_duplicates] == [["3", "3-anew"]]
    assert found.evaluation[-1].captions == ("caption 13", "more")


def test_a_part_is_held_out_where_there_is_no_split(tmp_path: Path) -> None:
    entries = [(number, f"caption {number}", "") for number in range(60)]
    entries += [(f"{number}-anew", "again", "") for number in range(10)]
    found = prepared(data_set(tmp_path / "one", entries))
    assert set(names(found.train)).isdisjoint(names(found.evaluation))
    shifted = data_set(tmp_path / "two", [*reversed(entries)])
    assert set(names(prepared(shifted).evaluation)) == set(names(found.evaluation))
    held = set(names(found.evaluation))
    # Look-alikes of what is learnt from are no question.
    assert held.isdisjoint(name for number in range(10) for name in (f"{number}", f"{number}-anew"))
    assert MIN_HELD_OUT // 2 < len(held) < MIN_HELD_OUT
    assert found.evaluation_name == f"{len(held)} pictures held out"
    assert held != set(map(str, range(len(held))))
    assert prepared(shifted).digest != found.digest
    assert prepared(str(tmp_path / "one" / "data.jsonl")).digest == found.digest


def test_of_few_pictures_half_are_held_out(tmp_path: Path) -> None:
    found = prepared(data_set(tmp_path, [(number, "a", "") for number in range(8)]))
    assert (len(found.train), len(found.evaluation)) == (4, 4)


def test_splits_and_other_data_sets_are_taken_by_name(tmp_path: Path) -> None:
    splits = ("train", "dev", "test")
    one = data_set(tmp_path / "one", [(n, f"{n}", splits[n // 5]) for n in range(15)] + [(40, "40", "")])
    two = data_set(tmp_path / "two", [(n, f"{n}", "test" if n > 24 else "train") for n in range(20, 30)])
    assert names(prepared(one).train) == ["0", "1", "2", "3", "4", "40"]
    assert names(prepared(one, split="val", eval_split="test").train) == [f"{n}" for n in range(5, 10)]
    assert names(prepared(one, eval_split="test").evaluation) == [f"{n}" for n in range(10, 15)]
    assert names(prepared(one, eval_split="validation").evaluation) == [f"{n}" for n in range(5, 10)]
    found = prepared(one, eval_data=two, eval_split="test", second_data=two, second_split="train")
    assert names(found.evaluation) == [f"{n}" for n in range(25, 30)]
    assert found.evaluation_name == f"{two}, split test"
    assert names(found.second) == [f"{n}" for n in range(20, 25)]
    assert names(found.train) == ["0", "1", "2", "3", "4", "40"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "training-2"}, r"has no split 'training-2'; its splits are dev, train"),
        ({"eval_split": "test"}, r"has no split 'test'; its splits are dev, train"),
        ({"split": "dev", "eval_split": "train"}, "leaves 3 captioned pictures to learn from; 4 are needed"),
        ({}, "leaves 3 captioned pictures to measure on; 4 are needed"),
    ],
)
def test_what_cannot_work_is_said(tmp_path: Path, options: dict[str, str], message: str) -> None:
    entries = [(number, "a", "dev" if number > 4 else "train") for number in range(8)]
    with pytest.raises(ValueError, match=message):
        prepared(data_set(tmp_path, entries), **options)


def test_only_a_test_split_is_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no split 'train'; its splits are test"):
        prepared(data_set(tmp_path, [(number, "a", "test") for number in range(6)]))


def test_progress_is_told_of_every_picture(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    data = data_set(tmp_path, [(number, "a", "") for number in range(8)])
    prepare(TrainConfig(data=data, output="unused"), progress=lambda done, total: heard.append((done, total)))
    assert heard == [(done, 8) for done in range(1, 9)]
