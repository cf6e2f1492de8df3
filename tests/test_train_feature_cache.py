"""Cached features against the images they stand for, their files, and validation with and without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_train_presets import compact_like
from torch import Tensor, nn

from alignment.data import Pair
from alignment.evaluate import embed_pairs, evaluate_embedded
from alignment.model import DualEncoder
from alignment.preprocess import open_image
from alignment.train.dataset import CaptionIndex, ContrastiveDataset
from alignment.train.feature_cache import CachedFeatures, find_freeze_point, random_window
from alignment.train.objective import Batch, Objective
from alignment.train.presets import Preset, Towers, apply_preset
from alignment.train.trainer import Validator

Checkpoint = Callable[[str], Path]

COMPACT = "compact-like"
CUTS = {  # model, preset -> where it is cut
    **dict.fromkeys(
        [(name, "lit") for name in ("clip", "siglip", "siglip2-naflex", "vit-bert", "composed", COMPACT)],
        "finished embeddings",
    ),
    **dict.fromkeys(
        [(name, "heads") for name in ("clip", "chinese-clip", "vit-bert", "composed")], "features before the projection"
    ),
    **dict.fromkeys([(COMPACT, preset) for preset in ("heads", "full")], "maps before the trained layers"),
}
HALF = {"rtol": 2e-3, "atol": 2e-3}  # what is kept is kept in half precision


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    texts = ["a dog", "two cats", "pasta", "a dog on the left", "the beach", "a fox"]
    for row in range(len(texts)):
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60)).save(folder / f"{row}.png")
    return [Pair(str(folder / f"{row}.png"), (text, f"{text} runs")) for row, text in enumerate(texts)]


@pytest.fixture
def build(checkpoint: Checkpoint) -> Callable[..., tuple[DualEncoder, Towers]]:
    def build(name: str, preset: Preset) -> tuple[DualEncoder, Towers]:
        encoder = compact_like() if name == COMPACT else DualEncoder.load(checkpoint(name), device="cpu")
        for layer in encoder.module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        apply_preset(encoder, preset)
        return encoder, Towers(encoder)

    return build


Build = Callable[..., tuple[DualEncoder, Towers]]


def keep(
    encoder: DualEncoder, pairs: list[Pair], folder: Path, *, augment: bool = False, batch_size: int = 4
) -> CachedFeatures:
    cut = find_freeze_point(encoder)
    assert cut is not None
    kept = CachedFeatures(cut, encoder, [pair.image for pair in pairs], folder, augment=augment)
    kept.fill(batch_size=batch_size)
    return kept


def gradients(encoder: DualEncoder) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in encoder.module.named_parameters() if weight.grad is not None}
    encoder.module.zero_grad()
    return found


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Length of the difference between two gradients, as a share of the gradient's."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[name] - slope).square().sum()) for name, slope in expected.items())
    return (apart / sum(float(slope.square().sum()) for slope in expected.values())) ** 0.5


# ---------------------------------------------------------------- in place of the pictures


@pytest.mark.parametrize(("name", "preset"), CUTS, ids=lambda value: value)
def test_cached_features_give_the_embeddings_and_gradients_of_the_images(
    name: str, preset: Preset, build: Build, pairs: list[Pair], tmp_path: Path
) -> None:
    encoder, towers = build(name, preset)
    expected = encoder.encode_images([pair.image for pair in pairs])
    assert expected.std(dim=0).max() > 0.02
    captions = CaptionIndex(pairs)
    options: dict[str, Any] = {"batch_size": 6, "num_steps": 1, "augment": False, "captions_per_image": 2}
    plain = ContrastiveDataset(pairs, captions, encoder.preprocessor, **options).batch(0)
    objective = Objective(towers, captions.positive_mask)
    towers.train()
    loss = objective.backward(plain)
    slopes = gradients(encoder)
    cut = towers.cache_features(augment=False)
    assert cut is not None
    assert cut.name == CUTS[name, preset]
    with torch.no_grad():
        exactly = Batch(cut.before(plain.images), plain.texts, plain.rows, plain.captions)
    torch.testing.assert_close(objective.backward(exactly), loss, rtol=1e-5, atol=1e-5)
    assert distance(gradients(encoder), slopes) < 1e-4
    kept = keep(encoder, pairs, tmp_path)
    torch.testing.assert_close(kept.embed(range(len(pairs))), expected, **HALF)
    torch.testing.assert_close(kept.embed([4, 1]), expected[[4, 1]], **HALF)
    assert kept.embed([]).shape == (0, encoder.embed_dim)
    towers.train()
    batch = ContrastiveDataset(pairs, captions, encoder.preprocessor, **options, cache=kept).batch(0)
    assert torch.equal(batch.rows, plain.rows)
    assert batch.images.keys() == exactly.images.keys()
    for part, value in exactly.images.items():
        torch.testing.assert_close(batch.images[part], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(objective.backward(batch), loss, **HALF)
    slopes_of_kept = gradients(encoder)
    if not CUTS[name, preset].startswith("maps"):  # relu6's kinks make much of what half precision moves a little
        assert distance(slopes_of_kept, slopes) < 0.01


@pytest.mark.parametrize(
    ("name", "preset"),
    [("clip", "full"), ("siglip", "full"), ("siglip", "heads"), ("clip", "lora"), ("composed", "full")],
)
def test_there_is_no_freeze_point_where_the_first_layers_are_trained(name: str, preset: Preset, build: Build) -> None:
    encoder, towers = build(name, preset)
    assert find_freeze_point(encoder) is None
    assert towers.cache_features(augment=True) is None


def test_a_plain_tower_of_ours_has_nothing_to_keep_before_its_tail(checkpoint: Checkpoint, build: Build) -> None:
    """Composed anew, EfficientNet-Lite has no concepts beside its maps."""
    encoder, _ = build(COMPACT, "full")
    encoder.module.vision_model.config.embed_dim = 0
    assert find_freeze_point(encoder) is None


@pytest.mark.parametrize(("preset", "name"), [("full", "trunk_maps"), ("heads", "last_maps")])
def test_of_the_compact_model_as_much_is_kept_as_can_be(
    preset: Preset, name: str, build: Build, pairs: list[Pair], tmp_path: Path
) -> None:
    encoder, _ = build(COMPACT, preset)
    kept = keep(encoder, pairs, tmp_path)
    assert {path.stem for path in kept.folder.glob("*.npy")} == {name, "concepts", "certainty"}
    maps = np.load(kept.folder / f"{name}.npy")
    assert maps.dtype == np.float16
    assert maps.shape[:2] == (len(pairs), 1)
    assert (maps.shape[2] == 1280) == (name == "last_maps")


# ---------------------------------------------------------------- views


def test_a_kept_picture_comes_as_it_is_and_mirrored(build: Build, pairs: list[Pair], tmp_path: Path) -> None:
    encoder, _ = build("clip", "lit")
    kept = keep(encoder, pairs, tmp_path, augment=True)
    for row, pair in enumerate(pairs):
        picture = open_image(pair.image)
        plain, mirrored = encoder.encode_images([picture, ImageOps.mirror(picture)])
        assert (plain - mirrored).abs().max() > 0.02
        views = [kept(row, np.random.default_rng(seed))["embeds"][0] for seed in range(12)]
        of_each = [
            sum(torch.allclose(view, expected, rtol=0, atol=2e-3) for view in views) for expected in (plain, mirrored)
        ]
        assert sum(of_each) == 12
        assert min(of_each) > 0
        torch.testing.assert_close(kept.embed([row])[0], plain, **HALF)


def test_cached_features_of_an_image_whose_caption_names_a_side_are_not_mirrored(
    build: Build, pairs: list[Pair], tmp_path: Path
) -> None:
    encoder, _ = build("clip", "lit")
    kept = keep(encoder, pairs, tmp_path, augment=True)
    plain = encoder.encode_images([pair.image for pair in pairs])
    examples = ContrastiveDataset(
        pairs, CaptionIndex(pairs), encoder.preprocessor, batch_size=6, num_steps=10, cache=kept
    )
    mirrored = set()
    for number in range(len(examples)):
        example = examples[number]
        if (example["images"]["embeds"][0] - plain[example["row"]]).abs().max() > 0.01:
            mirrored.add(example["row"])
    assert mirrored == {0, 1, 2, 4, 5}  # number 3 is "a dog on the left"


def test_windows_are_squares_of_three_quarters_at_least() -> None:
    maps = torch.arange(16.0 * 16).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    concepts = torch.rand(2, 5)
    torch.manual_seed(0)
    sides, corners = set(), set()
    for _ in range(300):
        cut = random_window({"trunk_maps": maps, "concepts": concepts})
        window = cut["trunk_maps"]
        assert torch.equal(cut["concepts"], concepts)
        assert window.shape[:2] == (2, 3)
        assert window.shape[2] == window.shape[3]
        top, left = divmod(int(window[0, 0, 0, 0]), 16)
        side = window.shape[-1]
        assert torch.equal(window, maps[:, :, top : top + side, left : left + side])
        sides.add(side)
        corners.add((top, left))
    assert sides == {12, 13, 14, 15, 16}
    assert corners == {(top, left) for top in range(5) for left in range(5)}


def test_windows_are_cut_in_training_alone(build: Build, pairs: list[Pair], tmp_path: Path) -> None:
    encoder, towers = build(COMPACT, "full")
    towers.cache_features(augment=True)
    kept = keep(encoder, pairs, tmp_path)
    images = kept.batch(range(6))
    texts = encoder.preprocessor.texts(["a dog"])
    towers.eval()
    torch.testing.assert_close(towers(images, texts)[0], kept.embed(range(6)))
    wide = {**images, "trunk_maps": images["trunk_maps"].repeat(1, 1, 4, 4)}
    torch.manual_seed(0)
    towers.train()
    views = [towers(wide, texts)[0].detach() for _ in range(6)]
    assert any((view - views[0]).abs().max() > 1e-4 for view in views)
    towers.cache_features(augment=False)
    assert torch.equal(towers(wide, texts)[0], towers(wide, texts)[0])


# ---------------------------------------------------------------- files


def test_a_second_run_finds_the_files(
    build: Build, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[int, int]] = []
    encoder, _ = build("clip", "heads")
    cut = find_freeze_point(encoder)
    assert cut is not None
    kept = CachedFeatures(cut, encoder, [pair.image for pair in pairs], tmp_path, augment=True)
    kept.fill(batch_size=4, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(4, 6), (6, 6)]
    assert [path.name for path in tmp_path.iterdir()] == [kept.folder.name]
    written = {path: path.stat().st_mtime_ns for path in kept.folder.iterdir()}
    again, _ = build("clip", "heads")
    with torch.no_grad():  # what is trained does not matter
        again.module.visual_projection.weight.mul_(2)
        again.module.text_model.final_layer_norm.weight.mul_(2)
        again.module.logit_scale.zero_()
    monkeypatch.setattr(CachedFeatures, "_compute", lambda *_: pytest.fail("nothing is computed again"))
    found = keep(again, pairs, tmp_path, augment=True)
    assert found.folder == kept.folder
    assert {path: path.stat().st_mtime_ns for path in kept.folder.iterdir()} == written
    rng = np.random.default_rng(0)
    assert torch.equal(found(2, rng)["features"], kept(2, np.random.default_rng(0))["features"])


def test_an_interrupted_computation_starts_again(
    build: Build, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, _ = build("clip", "lit")
    compute, calls = CachedFeatures._compute, []

    def dying(self: CachedFeatures, rows: Any) -> dict[str, Tensor]:
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(CachedFeatures, "_compute", dying)
        with pytest.raises(KeyboardInterrupt):
            keep(encoder, pairs, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    kept = keep(encoder, pairs, tmp_path)
    assert list(tmp_path.iterdir()) == [kept.folder]
    expected = encoder.encode_images([pair.image for pair in pairs])
    torch.testing.assert_close(kept.embed(range(6)), expected, **HALF)


def test_other_weights_images_or_views_have_a_folder_of_their_own(
    build: Build, pairs: list[Pair], tmp_path: Path
) -> None:
    def folder(preset: Preset, pairs: list[Pair], *, augment: bool = False, change: str = "") -> Path:
        encoder, _ = build("clip", preset)
        if change:
            with torch.no_grad():
                encoder.module.get_parameter(change).view(-1)[-1] += 1e-3
        cut = find_freeze_point(encoder)
        assert cut is not None
        return CachedFeatures(cut, encoder, [pair.image for pair in pairs], tmp_path, augment=augment).folder

    first = folder("lit", pairs)
    assert folder("lit", pairs) == first
    others = [
        folder("heads", pairs),
        folder("lit", pairs[:-1]),
        folder("lit", pairs[::-1]),
        folder("lit", pairs, augment=True),
        folder("lit", pairs, change="vision_model.post_layernorm.weight"),
        folder("lit", pairs, change="visual_projection.weight"),
    ]
    assert len({first, *others}) == 7
    assert folder("lit", pairs, change="text_projection.weight") == first
    assert folder("heads", pairs, change="visual_projection.weight") == others[0]


# ---------------------------------------------------------------- measurement


@pytest.mark.parametrize("name", ["siglip", "vit-bert"])
def test_measured_figures_are_those_of_an_evaluation(
    name: str, build: Build, pairs: list[Pair], tmp_path: Path
) -> None:
    encoder, towers = build(name, "lit")
    expected = evaluate_embedded(embed_pairs(encoder, pairs), resamples=20)
    measure = Validator(encoder, pairs)
    towers.train()
    assert measure.metrics() == {figure: estimate.value for figure, estimate in expected.metrics.items()}
    assert towers.module.training, "a measurement in the middle of training leaves it at that"
    report = evaluate_embedded(measure.embed(), resamples=20)
    assert (report.num_images, report.num_texts) == (6, 12)
    assert report.metrics == expected.metrics
    embedded = measure.embed()
    assert embedded.texts == [text for pair in pairs for text in pair.captions]
    assert embedded.image_of_text.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    torch.testing.assert_close(embedded.text_embeds, encoder.encode_texts(embedded.texts))
    kept = Validator(encoder, pairs, keep(encoder, pairs, tmp_path)).embed()
    torch.testing.assert_close(kept.image_embeds, embedded.image_embeds, **HALF)


def test_validation_uses_the_current_weights(build: Build, pairs: list[Pair]) -> None:
    encoder, _ = build("clip", "full")
    measure = Validator(encoder, pairs)
    before = measure.embed().text_embeds
    with torch.no_grad():
        encoder.module.text_projection.weight.neg_()
    torch.testing.assert_close(measure.embed().text_embeds, -before)
