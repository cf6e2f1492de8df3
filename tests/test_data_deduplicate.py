"""Duplicates found by content and by difference hash in pictures drawn here, and the report about them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from alignment.data import (
    ImageHash,
    Pair,
    ReadResult,
    drop_leaked,
    hash_images,
    merge_duplicates,
    read_data,
    summarize_data,
)
from alignment.data.deduplicate import MAX_HAMMING_DISTANCE, close_hashes, near_duplicates

SIDE = 96


def scene(seed: int) -> Image.Image:
    """Draw smooth random colours; no two seeds look alike."""
    colours = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def saved(path: Path, image: Image.Image, **options: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return str(path)


@pytest.fixture
def scenes(tmp_path: Path) -> list[str]:
    return [saved(tmp_path / f"{seed}.png", scene(seed)) for seed in range(6)]


# ---------------------------------------------------------------- prints


def test_prints_know_content_from_look(tmp_path: Path, scenes: list[str]) -> None:
    copy = tmp_path / "copy of 0.png"
    copy.write_bytes(Path(scenes[0]).read_bytes())
    anew = saved(tmp_path / "0.bmp", scene(0))
    prints = hash_images([*scenes, str(copy), anew])
    assert prints[str(copy)] == prints[scenes[0]]
    assert prints[anew].difference == prints[scenes[0]].difference != prints[scenes[1]].difference
    assert prints[anew].content != prints[scenes[0]].content
    assert len({print.difference for print in prints.values()}) == 6


def test_the_look_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    upright = saved(tmp_path / "upright.png", scene(0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = saved(tmp_path / "turned.png", scene(0).transpose(Image.Transpose.ROTATE_90), exif=exif)
    prints = hash_images([upright, turned])
    assert prints[upright].difference == prints[turned].difference


def test_the_bits_say_where_it_gets_brighter_to_the_right(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 240, 9).astype(np.uint8), (8, 1))
    rows = np.where(np.arange(8)[:, None] < 2, ramp, ramp[:, ::-1])
    path = saved(tmp_path / "ramps.png", Image.fromarray(rows))
    assert hash_images([path])[path].difference == 0xFFFF << 48


def test_what_cannot_be_opened_has_no_print_and_one_sentence_in_the_log(
    tmp_path: Path, scenes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(scenes[0]).read_bytes()[:500])
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    broken = [str(cut), str(pipe), str(tmp_path / "gone.png"), str(tmp_path)]
    prints = hash_images([scenes[0], *broken])
    assert [prints[path] for path in broken] == [None] * 4
    assert prints[scenes[0]] is not None
    assert len(caplog.records) == 1
    assert "cannot be opened: 4, cut.png (The picture is damaged" in caplog.text


def test_each_picture_is_opened_once_and_progress_is_told(scenes: list[str]) -> None:
    told: list[tuple[int, int]] = []
    prints = hash_images(scenes + scenes, progress=lambda done, total: told.append((done, total)))
    assert list(prints) == scenes
    assert told == [(done, 6) for done in range(1, 7)]


def test_an_interrupted_run_does_not_open_the_rest(scenes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_slowly(path: str) -> Image.Image:
        opened.append(path)
        return Image.open(path)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("alignment.data.deduplicate.open_image", open_slowly)
    folder, name = os.path.split(scenes[0])
    many = [f"{folder}/{'./' * number}{name}" for number in range(500)]
    with pytest.raises(KeyboardInterrupt):
        hash_images(many, progress=interrupt)
    assert len(opened) < len(many)


def test_no_pictures_no_prints() -> None:
    assert hash_images([]) == {}
    assert near_duplicates({}) == []


# ---------------------------------------------------------------- look-alikes


def test_a_photograph_saved_anew_is_found_and_nothing_else(tmp_path: Path, scenes: list[str]) -> None:
    again = [
        saved(tmp_path / "0.jpg", scene(0), quality=40),
        saved(tmp_path / "1.webp", scene(1).resize((48, 48))),
        saved(tmp_path / "2 in grey.png", scene(2).convert("L")),
    ]
    found = near_duplicates(hash_images([*scenes, *again]))
    assert found == list(zip(scenes, again, strict=False))


def test_plain_pictures_are_not_all_one(tmp_path: Path) -> None:
    images = []
    for number in range(12):
        flat = Image.new("RGB", (SIDE, SIDE), (20 * number,) * 3)
        images.append(saved(tmp_path / f"flat{number}.png", flat))
        product = Image.new("RGB", (SIDE, SIDE), "white")
        ImageDraw.Draw(product).ellipse((30, 30, 60 + number, 60 + 2 * number), fill=(20 * number, 0, 0))
        images.append(saved(tmp_path / f"product{number}.png", product))
        night = np.random.default_rng(number).normal(2, 1, (SIDE, SIDE)).clip(0, 5).astype(np.uint8)
        images.append(saved(tmp_path / f"night{number}.png", Image.fromarray(night)))
        sky = np.tile(np.linspace(200, 200 + number, SIDE).astype(np.uint8), (SIDE, 1))
        images.append(saved(tmp_path / f"sky{number}.png", Image.fromarray(sky)))
    prints = hash_images(images)
    assert all(found and found.difference == 0 for found in prints.values())
    assert near_duplicates(prints) == []


def test_equal_contents_are_compared_as_one() -> None:
    look = 0x0123456789ABCDEF
    prints = {"a": ImageHash("1", look), "b": ImageHash("1", look), "c": ImageHash("2", look ^ 1), "d": None}
    assert near_duplicates(prints) == [("a", "c")]


def slowly(hashes: list[int]) -> list[list[int]]:
    """Compare all with all."""
    return [
        [one, other]
        for one, other in combinations(range(len(hashes)), 2)
        if hashes[one] and hashes[other] and (hashes[one] ^ hashes[other]).bit_count() <= MAX_HAMMING_DISTANCE
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_fast_search_finds_what_the_slow_one_does(seed: int) -> None:
    random = np.random.default_rng(seed)
    seeds = [int(value) for value in random.integers(1, 2**63, 40)]
    hashes = [0, 0]
    for number in range(300):
        mask = sum(1 << int(bit) for bit in random.choice(64, int(random.integers(0, 4)), replace=False))
        hashes.append(seeds[number % 40] ^ mask)
    found = close_hashes(np.array(hashes, dtype=np.uint64))
    assert found.tolist() == slowly(hashes)
    assert len(found) > 100


def test_bits_in_each_of_the_parts_may_differ() -> None:
    near = [2**64 - 1 - (1 << 3) - (1 << 20) - (1 << 40), 2**64 - 1]
    far = [2**64 - 1 - (1 << 3) - (1 << 20) - (1 << 40) - (1 << 60), 2**64 - 1]
    assert close_hashes(np.array(near, dtype=np.uint64)).tolist() == [[0, 1]]
    assert close_hashes(np.array(far, dtype=np.uint64)).tolist() == []


def test_a_film_does_not_fill_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    assert len(close_hashes(np.full(1000, 5, dtype=np.uint64), limit=2000)) == 2000
    assert "More than 2000 pairs of pictures look alike" in caplog.text


# ---------------------------------------------------------------- what is done about doubles


def prints_of(*pairs: Pair, same: str = "") -> dict[str, ImageHash | None]:
    """Give every picture a hash of its own, and those whose names end in a letter of `same` a common one."""
    return {pair.image: ImageHash("same" if pair.image[-1] in same else pair.image, difference=0) for pair in pairs}


def test_doubles_become_one_picture_with_all_captions() -> None:
    pairs = [Pair("/a", ("1", "2"), "train", "A"), Pair("/b", ("3",)), Pair("/c", ("2", "4"), "train", "C")]
    assert merge_duplicates(pairs, prints_of(*pairs, same="ac")) == [
        Pair("/a", ("1", "2", "4"), "train", "A"),
        Pair("/b", ("3",)),
    ]


def test_what_is_of_no_use_is_dropped() -> None:
    pairs = [Pair("/a", ()), Pair("/b", ("1",)), Pair("/c", ("2", "2"))]
    assert merge_duplicates(pairs, {**prints_of(*pairs), "/b": None}) == [Pair("/c", ("2",))]


def test_a_double_without_captions_does_not_stand_for_the_one_with() -> None:
    pairs = [Pair("/a", ()), Pair("/b", ("1",))]
    assert merge_duplicates(pairs, prints_of(*pairs, same="ab")) == [Pair("/b", ("1",))]


def test_what_is_evaluated_on_is_not_learnt_from() -> None:
    train = [Pair("/a", ("1",)), Pair("/b", ("2",)), Pair("/c", ("3",)), Pair("/d", ("4",))]
    evaluation = [Pair("/x", ("5",)), Pair("/d", ("6",)), Pair("/y", ("7",))]
    prints = {**prints_of(*train, *evaluation, same="bx"), "/c": None, "/y": None}
    assert drop_leaked(train, evaluation, prints) == [train[0], train[2]]
    assert drop_leaked(train, [], prints) == train


# ---------------------------------------------------------------- the report


@pytest.fixture
def untidy(tmp_path: Path) -> Path:
    """A data set with one of everything that can be wrong with one."""
    folder = tmp_path / "untidy"
    for seed in range(4):
        saved(folder / f"{seed}.png", scene(seed))
    (folder / "double.png").write_bytes((folder / "0.png").read_bytes())
    saved(folder / "again.jpg", scene(1), quality=60)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    saved(folder / "eval" / "same.png", scene(2))
    saved(folder / "eval" / "alike.jpg", scene(3), quality=60)
    saved(folder / "eval" / "own.png", scene(9))
    rows = [
        *("0.png,A dog runs .", "0.png,A brown dog", "1.png,a dog runs", "2.png,Two cats", "3.png,"),
        *("double.png,Woof", "again.jpg,A hill", "broken.png,Nobody sees it", "gone.png,x", "gone too.png,x"),
    ]
    (folder / "train.csv").write_text("image,caption\n" + "\n".join(rows))
    (folder / "eval" / "test.csv").write_text("image,caption\nsame.png,two cats .\nalike.jpg,y\nown.png,z\n")
    return folder


def summary(pairs: list[Pair], evaluation: Sequence[Pair] = ()) -> list[str]:
    hashes = hash_images(pair.image for pair in (*pairs, *evaluation))
    return summarize_data(ReadResult(pairs=pairs, format=""), evaluation, hashes).splitlines()


def test_the_summary_names_what_is_wrong(untidy: Path) -> None:
    train, evaluation = read_data(untidy / "train.csv"), read_data(untidy / "eval" / "test.csv").pairs
    hashes = hash_images(pair.image for pair in (*train.pairs, *evaluation))
    assert summarize_data(train, evaluation, hashes).splitlines() == [
        "7 pictures with 7 captions: 0 to 2, half of them up to 1, each.",
        "- left out, missing pictures: 2 (gone.png, gone too.png)",
        "- left out, empty captions: 1 (3.png)",
        "- pictures that cannot be opened: 1 (broken.png)",
        "- pictures without a caption: 1 (3.png)",
        "- same file under several names: 1 (0.png = double.png)",
        "- pairs that look the same: 1 (1.png ~ again.jpg)",
        "- captions that belong to several pictures: 1 ('A dog runs .' on 2)",
        "Evaluated on 3 pictures:",
        "- pictures that are in the training part too: 1 (2.png = same.png)",
        "- pictures that look the same as one in the training part: 1 (3.png ~ alike.jpg)",
        "- captions that the training part has too: 1 ('two cats .')",
    ]


def test_an_overlap_is_found_from_both_sides_of_a_double(tmp_path: Path) -> None:
    """The training picture is there in both parts; what looks like it is in both parts too."""
    names = ("train.png", "train again.jpg", "eval.png", "eval again.jpg")
    pairs = [Pair(path, (path,)) for path in (saved(tmp_path / name, scene(0)) for name in names)]
    assert summary(pairs[:2], pairs[2:])[-3:] == [
        "Evaluated on 2 pictures:",
        "- pictures that are in the training part too: 2 (train.png = eval.png, train again.jpg = eval again.jpg)",
        "- pictures that look the same as one in the training part: 2 "
        "(train.png ~ eval again.jpg, train again.jpg ~ eval.png)",
    ]


def test_the_summary_of_a_tidy_data_set(scenes: list[str]) -> None:
    pairs = [Pair(path, (path, f"{path} again")) for path in scenes]
    assert summary(pairs[:4], pairs[4:]) == [
        "4 pictures with 8 captions: 2 each.",
        "Nothing is missing, unreadable or there twice.",
        "Evaluated on 2 pictures, none of them in the training part.",
    ]
    assert summary([])[0] == "0 pictures with 0 captions: 0 each."


def test_the_summary_gives_three_examples_at_most() -> None:
    pairs = [Pair(f"/x/{number}.png", (str(number),)) for number in range(1200)]
    hashes = dict.fromkeys((pair.image for pair in pairs), None)
    lines = summarize_data(ReadResult(pairs=pairs, format=""), (), hashes)
    assert "- pictures that cannot be opened: 1,200 (0.png, 1.png, 2.png, ...)" in lines


def test_a_caption_on_two_copies_of_one_picture_is_not_repeated(untidy: Path) -> None:
    pairs = [Pair(str(untidy / name), ("A dog",)) for name in ("0.png", "double.png")]
    assert not [line for line in summary(pairs) if "several pictures" in line]
