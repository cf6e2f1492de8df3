"""Why a match: words left out and places traced, on every family, and that both mean something on photographs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from deletion import DeletionCurves, deletion_curves, filling
from PIL import Image, ImageDraw
from torch.nn import functional

from alignment.explain import UNIT, PatchRelevance, patch_relevance, word_contributions
from alignment.explain.patches import masked, shrunk, windows
from alignment.explain.words import split_words
from alignment.gallery import Picture
from alignment.model import DualEncoder
from alignment.preprocess import InputError, open_image

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "assets" / "gallery" / "sources" / "pictures.jsonl"
PHOTOGRAPHS = ("cheetah-running", "cat", "coffee", "cameraman", "motorcycle", "rocket")

Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def compact() -> DualEncoder:
    return DualEncoder.load(ROOT / "checkpoints" / "compact", device="cpu")


@pytest.fixture(scope="module")
def photographs() -> dict[str, tuple[Image.Image, dict[str, str]]]:
    rows = {row["id"]: row for row in map(json.loads, SOURCES.read_text(encoding="utf-8").splitlines())}
    return {name: (open_image(Picture(name, rows[name]["source"], {}).path), rows[name]) for name in PHOTOGRAPHS}


@pytest.fixture(scope="module")
def explained(
    compact: DualEncoder, photographs: dict[str, tuple[Image.Image, dict[str, str]]]
) -> dict[str, PatchRelevance]:
    """For each photograph its own caption's relevance and a foreign one's."""
    foreign = dict(zip(PHOTOGRAPHS, (*PHOTOGRAPHS[1:], PHOTOGRAPHS[0]), strict=True))
    return {
        name: patch_relevance(compact, image, [row["en"], photographs[foreign[name]][1]["en"]])
        for name, (image, row) in photographs.items()
    }


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog's T-shirt, the end - 2 cats.", ["A", "dog's", "T-shirt", "the", "end", "2", "cats"]),
        ("一只猎豹在褐色原野上全速奔跑。", ["一只", "猎豹", "在", "褐色", "原野", "上", "全速", "奔跑"]),
        ("红色上衣的女孩", ["红色", "上衣", "的", "女孩"]),
        ("穿橙色宇航服", ["穿", "橙色", "宇航服"]),
        ("カメラと猫", ["カメラ", "と", "猫"]),
        ("two 猫 and a 🐕‍🦺", ["two", "猫", "and", "a", "🐕‍🦺"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("cafe\u0301", ["cafe\u0301"]),
        ("'quoted' -", ["quoted"]),
        ("... !", []),
        ("", []),
    ],
)
def test_words_of_any_script(caption: str, words: list[str]) -> None:
    assert [caption[start:end] for start, end in split_words(caption)] == words


def test_a_word_adds_what_its_absence_costs(family: str, checkpoint: Checkpoint) -> None:
    encoder = DualEncoder.load(checkpoint(family), device="cpu")
    images = functional.normalize(torch.randn(3, encoder.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = word_contributions(encoder, images, "a dog, runs")
    assert [(word.word, word.start, word.end) for word in found] == [("a", 0, 1), ("dog", 2, 5), ("runs", 7, 11)]
    whole = encoder.encode_texts(["a dog, runs"]) @ images.T
    for word, rest in zip(found, ("dog, runs", "a , runs", "a dog,"), strict=True):
        lost = (whole - encoder.encode_texts([rest]) @ images.T)[0]
        torch.testing.assert_close(torch.tensor(word.contributions), lost, atol=1e-5, rtol=0)


def test_one_picture_may_come_without_a_batch(checkpoint: Checkpoint) -> None:
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    image = functional.normalize(torch.ones(encoder.embed_dim), dim=-1)
    assert word_contributions(encoder, image, "two cats") == word_contributions(encoder, image[None], "two cats")


def test_chinese_neighbours_close_up_and_words_stay_apart(checkpoint: Checkpoint) -> None:
    encoder = DualEncoder.load(checkpoint("vit-bert"), device="cpu")
    image = encoder.encode_texts(["a dog"])
    first = word_contributions(encoder, image, "狗在海滩")[1]
    assert first.word == "在"
    lost = image @ (encoder.encode_texts(["狗在海滩"]) - encoder.encode_texts(["狗海滩"])).T
    assert first.contributions[0] == pytest.approx(lost.item(), abs=1e-5)
    middle = word_contributions(encoder, image, "a/dog🐕cat")[2]
    lost = image @ (encoder.encode_texts(["a/dog🐕cat"]) - encoder.encode_texts(["a/dog cat"])).T
    assert middle.contributions[0] == pytest.approx(lost.item(), abs=1e-5)


def test_the_only_word_is_compared_with_the_background(checkpoint: Checkpoint) -> None:
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    texts = encoder.encode_texts(["dog!"])
    (alone,) = word_contributions(encoder, texts, "dog!")
    assert alone.contributions == pytest.approx((1,), abs=1e-5)
    (alone,) = word_contributions(encoder, torch.cat([texts, -texts]), "dog!", background=0.25)
    assert alone.contributions == pytest.approx((0.75, -1.25), abs=1e-5)


def test_a_caption_without_words_and_an_empty_one(checkpoint: Checkpoint) -> None:
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    image = torch.ones(encoder.embed_dim)
    assert word_contributions(encoder, image, "?!") == []
    with pytest.raises(InputError):
        word_contributions(encoder, image, "  ")


@pytest.mark.parametrize(
    ("name", "caption", "telling", "empty"),
    [
        ("cat", "a photo of a cat", "cat", "of"),
        ("motorcycle", "the motorcycle is in a garage", "motorcycle", "the"),
        ("coffee", "an espresso in a red cup", "cup", "in"),
        ("cat", "一只猫看着镜头", "猫看", "着"),
        ("motorcycle", "车库里的摩托车", "摩托车", "的"),
    ],
)
def test_telling_words_add_more_than_empty_ones(
    name: str,
    caption: str,
    telling: str,
    empty: str,
    compact: DualEncoder,
    photographs: dict[str, tuple[Image.Image, dict[str, str]]],
) -> None:
    found = word_contributions(compact, compact.encode_images([photographs[name][0]]), caption)
    added = {word.word: word.contributions[0] for word in reversed(found)}
    assert added[telling] > added[empty] + 0.02


def test_a_word_that_does_not_fit_adds_less_than_nothing(
    compact: DualEncoder, photographs: dict[str, tuple[Image.Image, dict[str, str]]]
) -> None:
    image = compact.encode_images([photographs["cat"][0]])
    added = {word.word: word.contributions[0] for word in word_contributions(compact, image, "a cat and a motorcycle")}
    assert added["cat"] > 0.1
    assert added["motorcycle"] < 0


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("method", ["gradient", "occlusion"])
def test_relevance_of_every_family(
    method: str, family: str, checkpoint: Checkpoint, pictures: list[Image.Image]
) -> None:
    encoder = DualEncoder.load(checkpoint(family), device="cpu")
    captions = ["a dog runs", "two cats", "pasta"]
    found, again = (patch_relevance(encoder, pictures[0], captions, resolution=3, method=method) for _ in range(2))
    assert (found.grid.shape, found.grid.dtype, found.method) == ((3, 8, 8), np.float32, method)
    assert np.isfinite(found.grid).all()
    assert np.ptp(found.grid, axis=(1, 2)).min() > 1e-6
    np.testing.assert_allclose(found.grid, again.grid, atol=1e-6)
    cosines = encoder.encode_images(pictures[:1]) @ encoder.encode_texts(captions).T
    assert found.cosines == pytest.approx(cosines[0].tolist(), abs=1e-5)
    alone = patch_relevance(encoder, pictures[0], captions[1:2], resolution=3, method=method)
    np.testing.assert_allclose(alone.grid[0], found.grid[1], atol=1e-5)


def test_towers_without_places_are_covered(checkpoint: Checkpoint, pictures: list[Image.Image]) -> None:
    encoder = DualEncoder.compose(checkpoint("convnext"), checkpoint("bert"), embed_dim=24, device="cpu")
    assert patch_relevance(encoder, pictures[0], ["a dog"], resolution=2).method == "occlusion"
    with pytest.raises(ValueError, match="occlusion"):
        patch_relevance(encoder, pictures[0], ["a dog"], method="gradient")


def test_what_the_encoder_crops_is_not_relevant(checkpoint: Checkpoint) -> None:
    """CLIP sees the middle square: of a picture twice as wide as high, the outer quarters are cut off."""
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    picture = Image.effect_noise((128, 64), 80).convert("RGB")
    grid = patch_relevance(encoder, picture, ["a dog"], resolution=7).grid[0]
    outside, inside = np.delete(grid, range(4, 12), axis=1), grid[:, 4:12]
    assert (outside == 0).all()
    assert (inside != 0).all()


def test_places_add_up_to_the_cosine(
    compact: DualEncoder, photographs: dict[str, tuple[Image.Image, dict[str, str]]]
) -> None:
    """Up to what smoothing moves over the border."""
    for name in ("cat", "motorcycle"):
        image, row = photographs[name]
        found = patch_relevance(compact, image, [row["en"], "a plate of pasta"])
        assert found.grid.mean((1, 2)) / UNIT == pytest.approx(np.array(found.cosines), abs=0.06)


def test_windows_cover_everything_in_two_sizes() -> None:
    masks = windows(5)
    assert masks.shape == (25 + 9, 12, 12)
    assert sorted({int(mask.sum()) for mask in masks}) == [16, 36]
    assert (masks[:25].any(0) & masks[25:].any(0)).all()


@pytest.mark.parametrize("fill", ["blur", "mean"])
def test_erasing_touches_nothing_else(fill: str, pictures: list[Image.Image]) -> None:
    picture = pictures[0]
    cells = np.zeros((4, 4), dtype=bool)
    cells[0, 3] = True
    before, after = np.asarray(picture), np.asarray(masked(picture, filling(picture, fill), cells))
    height, width = before.shape[0] // 4, before.shape[1] // 4
    changed = (before != after).any(-1)
    assert changed[:height, -width:].mean() > 0.9
    changed[:height, -width:] = False
    assert not changed.any()
    assert after[:height, -width:].std() < before[:height, -width:].std() / 2


def test_a_resolution_below_two_is_refused(checkpoint: Checkpoint, pictures: list[Image.Image]) -> None:
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    with pytest.raises(ValueError, match="resolution"):
        patch_relevance(encoder, pictures[0], ["a"], resolution=1)


# ---------------------------------------------------------------- the deletion test


def test_area_under_a_curve() -> None:
    curves = DeletionCurves(1.0, (0.5, 1.0), (0.0, 0.0), (0.5, 0.0), (1.0, 0.0))
    areas = [curves.area(curve) for curve in (curves.most, curves.random, curves.least)]
    assert areas == pytest.approx([0.25, 0.5, 0.75])


def test_curves_are_the_cosines_of_the_erased(checkpoint: Checkpoint, pictures: list[Image.Image]) -> None:
    encoder = DualEncoder.load(checkpoint("siglip"), device="cpu")
    relevance = np.arange(16.0).reshape(4, 4)
    found = deletion_curves(encoder, pictures[0], "two cats", relevance, (0.25, 1.0), fill="mean", random_orders=3)
    picture, text = shrunk(pictures[0]), encoder.encode_texts(["two cats"])[0]
    last, first = np.zeros((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)
    last[3], first[0] = True, True
    everything = np.ones((4, 4), dtype=bool)
    instead = filling(picture, "mean")
    embeds = encoder.encode_images([picture, *(masked(picture, instead, hole) for hole in (last, first, everything))])
    whole, most, least, nothing = (embeds @ text).tolist()
    assert (found.whole, found.fractions) == (pytest.approx(whole, abs=1e-5), (0.25, 1.0))
    assert found.most == pytest.approx((most, nothing), abs=1e-5)
    assert found.least == pytest.approx((least, nothing), abs=1e-5)
    assert found.random[1] == pytest.approx(nothing, abs=1e-5)
    assert found == deletion_curves(
        encoder, pictures[0], "two cats", relevance, (0.25, 1.0), fill="mean", random_orders=3
    )


def test_deleting_what_matters_costs_most(
    compact: DualEncoder,
    photographs: dict[str, tuple[Image.Image, dict[str, str]]],
    explained: dict[str, PatchRelevance],
) -> None:
    areas = []
    for name, (image, row) in photographs.items():
        curves = deletion_curves(compact, image, row["en"], explained[name].grid[0], (0.25, 0.5, 0.75))
        areas.append([curves.area(curve) for curve in (curves.most, curves.random, curves.least)])
    most, random, least = np.mean(areas, axis=0)
    assert most < random < least - 0.01, (most, random, least)
    assert most < least - 0.02


def test_a_wrong_caption_looks_wrong(explained: dict[str, PatchRelevance]) -> None:
    """On the one scale of all results."""
    for name, found in explained.items():
        assert found.grid[0].mean() > found.grid[1].mean(), name
    own, foreign = np.mean([found.grid.clip(min=0).mean((1, 2)) for found in explained.values()], axis=0)
    assert own > 2 * foreign


# ---------------------------------------------------------------- a ViT that has learnt something


COLOURS = {"cat": (230, 30, 30), "dog": (30, 60, 230), "fox": (30, 200, 60)}


def squares(rng: np.random.Generator, names: list[str]) -> tuple[Image.Image, dict[str, tuple[int, int]]]:
    """Paint a square for each name on one of the 4 x 4 patches of a tiny model's picture."""
    image, places = Image.new("RGB", (32, 32), (120, 120, 120)), {}
    for name, cell in zip(names, rng.permutation(16), strict=False):
        row, column = divmod(int(cell), 4)
        box = (column * 8, row * 8, column * 8 + 7, row * 8 + 7)
        ImageDraw.Draw(image).rectangle(box, fill=COLOURS[name])
        places[name] = (row, column)
    return image, places


def taught(folder: Path) -> DualEncoder:
    """Teach a tiny model which square is in a picture of one."""
    torch.manual_seed(0)
    encoder, rng = DualEncoder.load(folder, device="cpu"), np.random.default_rng(0)
    names = list(COLOURS)
    texts = encoder.preprocessor.texts(names)
    optimizer = torch.optim.AdamW(encoder.module.vision_model.parameters(), lr=2e-3)
    for _ in range(80):
        labels = torch.from_numpy(rng.integers(0, 3, 48))
        batch = [squares(rng, [names[label]])[0] for label in labels]
        logits = 10 * encoder.embed_images(encoder.preprocessor.images(batch)) @ encoder.embed_texts(texts).detach().T
        functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return encoder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_vit_points_at_the_square_that_is_named(kind: str, checkpoint: Checkpoint) -> None:
    """Two squares are in the picture; the place of the one that the caption names comes out on top."""
    encoder, rng = taught(checkpoint(kind)), np.random.default_rng(1)
    hits, gains = 0, []
    for _ in range(16):
        first, second = rng.permutation(list(COLOURS))[:2].tolist()
        image, places = squares(rng, [first, second])
        grid = patch_relevance(encoder, image, [first], resolution=3, method="gradient").grid[0]
        hits += tuple(int(cell) // 2 for cell in np.unravel_index(grid.argmax(), grid.shape)) == places[first]
        curves = deletion_curves(encoder, image, first, grid, (0.1, 0.3), fill="mean")
        gains.append(curves.area(curves.random) - curves.area(curves.most))
    assert hits >= 6  # 1 by chance; 10 and 9 when this was written
    assert kind != "clip" or np.mean(gains) > 0.02  # the tiny SigLIP's captions are too much alike to tell
