"""Model inputs computed without transformers equal its own; unknown settings are left to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_preprocess import equal
from transformers import AutoImageProcessor, AutoTokenizer

from alignment.preprocess import InputError, Preprocessor, open_image
from alignment.preprocess.image_transform import ImageTransform
from alignment.preprocess.tokenizer import FileTokenizer, TokenizerSpec

ROOT = Path(__file__).parents[1]
COMPACT = ROOT / "checkpoints" / "compact"

# ---------------------------------------------------------------- pixels

SQUARE, TALL = {"height": 48, "width": 48}, {"height": 60, "width": 20}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPImageProcessor", {}),
    "clip-small": ("CLIPImageProcessor", {"size": {"shortest_edge": 33}, "crop_size": {"height": 33, "width": 33}}),
    "clip-crop-inside": ("CLIPImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": SQUARE}),
    "clip-crop-odd": ("CLIPImageProcessor", {"size": {"shortest_edge": 51}, "crop_size": {"height": 38, "width": 47}}),
    "clip-crop-beyond": (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 31}, "crop_size": {"height": 48, "width": 37}},
    ),
    "chinese-clip": ("ChineseCLIPImageProcessor", {"size": SQUARE, "do_center_crop": False}),
    "siglip": ("SiglipImageProcessor", {}),
    "siglip2": ("SiglipImageProcessor", {"size": {"height": 256, "width": 256}, "resample": 2}),
    "siglip-tall": ("SiglipImageProcessor", {"size": TALL, "rescale_factor": 1 / 127.5}),
    "vit": ("ViTImageProcessor", {"size": SQUARE}),
    "vit-lanczos": ("ViTImageProcessor", {"size": SQUARE, "resample": 1, "image_std": [0.2, 0.3, 0.7]}),
    "compact": ("SiglipImageProcessor", json.loads((COMPACT / "preprocessor_config.json").read_text("utf-8"))),
    # As older versions wrote them.
    "clip-2021": (
        "CLIPImageProcessor",
        {"size": 56, "crop_size": 56, "feature_extractor_type": "CLIPFeatureExtractor"},
    ),
    "vit-2021": ("ViTImageProcessor", {"size": 56, "feature_extractor_type": "ViTFeatureExtractor"}),
    "siglip-number": ("SiglipImageProcessor", {"size": 56, "do_center_crop": True, "crop_size": 40}),
}
SIZES = [(1, 1), (1, 40), (50, 1), (7, 3), (33, 33), (224, 224), (225, 223), (640, 427), (427, 640), (999, 41)]


def written(folder: Path, kind: str, config: dict[str, Any]) -> Path:
    """Write a `preprocessor_config.json` as its owner would."""
    named = config if "feature_extractor_type" in config else {"image_processor_type": kind, **config}
    (folder / "preprocessor_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text('{"model_type": "clip"}')
    return folder


def noise(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(sum(size))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_transformers_to_the_last_bit(name: str, tmp_path: Path) -> None:
    kind, config = PROCESSORS[name]
    folder = written(tmp_path, kind, config)
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    rules = [ImageTransform.load(folder), ImageTransform.from_config(theirs.to_dict())]
    for size in SIZES:
        expected = theirs([noise(size)], return_tensors="pt")["pixel_values"]
        for rule in rules:
            assert rule is not None
            torch.testing.assert_close(rule([noise(size)]), expected, rtol=0, atol=0)
    batch = [noise(size) for size in SIZES]
    ours = rules[0](batch)  # type: ignore[misc]
    torch.testing.assert_close(ours, theirs(batch, return_tensors="pt")["pixel_values"], rtol=0, atol=0)
    assert ours.is_contiguous()


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_the_names_of_the_other_back_ends_mean_the_same(suffix: str) -> None:
    kinds = ("CLIPImageProcessor", f"CLIPImageProcessor{suffix}")
    plain, other = (ImageTransform.from_config({"image_processor_type": kind}) for kind in kinds)
    assert plain is not None
    assert other == plain


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"image_processor_type": "Siglip2ImageProcessor"},
        {"image_processor_type": "ConvNextImageProcessor"},
        {"image_processor_type": "CLIPImageProcessorOfMine"},
        {"image_processor_type": "CLIP"},
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_center_crop": False},  # pictures of different shapes would not make a batch
        {"do_pad": True},
        {"size": {"shortest_edge": 224, "longest_edge": 300}},
        {"size": {"longest_edge": 224}},
        {"size": [224, 224]},
        {"crop_size": {"shortest_edge": 224}},
        {"image_mean": 0.5},
        {"image_std": [0.5]},
        {"something": "new"},
    ],
)
def test_what_is_not_known_here_is_left_to_transformers(config: dict[str, Any]) -> None:
    kind = {} if not config or "image_processor_type" in config else {"image_processor_type": "CLIPImageProcessor"}
    assert ImageTransform.from_config({**kind, **config}) is None


def test_a_processor_saved_with_others_in_one_file_is_found(tmp_path: Path) -> None:
    written(tmp_path, "CLIPImageProcessor", {"image_mean": [0.1, 0.2, 0.3]})
    nested = {"image_processor_type": "SiglipImageProcessor", "size": SQUARE}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = theirs([noise((70, 50))], return_tensors="pt")["pixel_values"]
    rules = ImageTransform.load(tmp_path)
    assert rules is not None
    torch.testing.assert_close(rules([noise((70, 50))]), expected, rtol=0, atol=0)


SIDES = {
    "clip": 32,
    "siglip": 32,
    "siglip2": 32,
    "chinese-clip": 32,
    "vit-bert": 32,
    "clip-roberta": 32,
    "composed": 32,
    "siglip2-naflex": None,
}


def test_a_preprocessor_tells_how_large_a_picture_it_needs(family: str, checkpoint: Callable) -> None:
    ours = Preprocessor.load(checkpoint(family))
    assert ours.image_side == SIDES[family]
    assert ours.draft_size == (320 if SIDES[family] else None)  # a thumbnail's size, for so small a model


def test_a_reduced_picture_keeps_almost_half_as_much_again_as_the_model_reads(tmp_path: Path) -> None:
    for name, size in (("CLIPImageProcessor", {"shortest_edge": 336}), ("ViTImageProcessor", 384)):
        rules = ImageTransform.load(written(tmp_path, name, {"size": size}))
        assert rules is not None
        tokenizer = AutoTokenizer.from_pretrained(COMPACT)
        near = Preprocessor(rules, tokenizer, TokenizerSpec()).draft_size
        assert near is not None
        assert 1.43 < near / rules.side < 1.45
    assert Preprocessor.load(COMPACT).draft_size == 375  # an eighth of twelve megapixels


@pytest.mark.parametrize("family", ["clip", "siglip2-naflex"])
def test_one_picture_is_opened_and_made_ready(family: str, checkpoint: Callable, encoded: Callable) -> None:
    ours = Preprocessor.load(checkpoint(family))
    data = encoded(noise((1600, 1200)).resize((2000, 1600)), "JPEG")
    reduced = open_image(data, draft_size=ours.draft_size)
    assert reduced.size == ((500, 400) if family == "clip" else (2000, 1600))
    equal(ours.image(data), ours.images([reduced]))
    with pytest.raises(InputError, match="empty"):
        ours.image(b"")


def test_many_threads_may_make_inputs_at_once(checkpoint: Callable, encoded: Callable) -> None:
    ours = Preprocessor.load(checkpoint("clip"))
    photos = [encoded(noise((100 + number, 80)), "JPEG") for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for inputs, photo in zip(pool.map(ours.image, photos), photos, strict=True):
            equal(inputs, ours.image(photo))


def test_a_picture_that_is_not_rgb_is_left_to_transformers(checkpoint: Callable) -> None:
    ours = Preprocessor.load(checkpoint("clip"))
    grey = Image.linear_gradient("L")
    equal(ours.images([grey]), ours.image_processor([grey], return_tensors="pt"))


# ---------------------------------------------------------------- tokens

TEXTS = [
    "A dog on a beach.",
    "一只狗在沙滩上。",
    "Ein Hund am Strand",
    "犬が浜辺を走る",
    "كلب على الشاطئ",
    "ＡＢＣ ﬁne  ①",
    "🐕 หมา คน",
    "<s> special </s> <unk> tokens </s>",
    "  spaces   and\ttabs\nlines ",
    "",
    "very long " * 100,
    "e\u0301 \u00e9 \u200b \ufffd",
]


@pytest.mark.parametrize("model_type", ["composed-dual-encoder", "vision-text-dual-encoder"])
@pytest.mark.parametrize("pad_to_max", [False, True])
def test_tokens_are_those_of_transformers(model_type: str, pad_to_max: bool, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(COMPACT / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    rules = TokenizerSpec(positions=40, pad_to_max=pad_to_max)
    ours = FileTokenizer.load(tmp_path, model_type, rules)
    assert ours is not None
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.max_length == 40
    padding = "max_length" if pad_to_max else "longest"
    for texts in (TEXTS, *([text] for text in TEXTS)):
        equal(ours(texts), theirs(texts, padding=padding, truncation=True, max_length=40, return_tensors="pt"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_sides_of_padding_and_truncation_are_kept(side: str, tmp_path: Path) -> None:
    folder = copied(tmp_path, {"padding_side": side, "truncation_side": side})
    ours = FileTokenizer.load(folder, "composed-dual-encoder", TokenizerSpec(positions=12))
    assert ours is not None
    theirs = AutoTokenizer.from_pretrained(folder)
    equal(ours(TEXTS), theirs(TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt"))


def copied(folder: Path, config: dict[str, Any]) -> Path:
    """Copy the compact tokenizer with another configuration; what is None is left out."""
    shutil.copy(COMPACT / "tokenizer.json", folder)
    shutil.copy(COMPACT / "config.json", folder)
    old = json.loads((COMPACT / "tokenizer_config.json").read_text("utf-8"))
    new = {name: value for name, value in {**old, **config}.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(new))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "CLIPTokenizer"},
        {"tokenizer_class": None},
        {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
        {"pad_token": None},
        {"pad_token": "[PAD]"},  # not in the file: transformers would add it
        {"mask_token": "<mask>"},
        {"eos_token": {"content": "</s>", "lstrip": True}},
        {"extra_special_tokens": ["<image>"]},
        {"added_tokens_decoder": {}},
        {"add_prefix_space": True},
        {"split_special_tokens": True},
        {"auto_map": {"AutoTokenizer": ["custom.Tokenizer", None]}},
    ],
)
def test_a_tokenizer_that_is_more_than_its_file_is_left_to_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    assert FileTokenizer.load(copied(tmp_path, config), "composed-dual-encoder", TokenizerSpec()) is None


def test_files_that_older_versions_wrote_are_left_to_transformers(tmp_path: Path) -> None:
    folder = copied(tmp_path, {})
    assert FileTokenizer.load(folder, "composed-dual-encoder", TokenizerSpec()) is not None
    assert FileTokenizer.load(folder, "llava", TokenizerSpec()) is None
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).write_text("{}")
        assert FileTokenizer.load(folder, "composed-dual-encoder", TokenizerSpec()) is None
        (folder / name).unlink()
    (folder / "tokenizer.json").unlink()
    assert FileTokenizer.load(folder, "composed-dual-encoder", TokenizerSpec()) is None


def test_a_damaged_tokenizer_is_missing_all_the_same(tmp_path: Path) -> None:
    folder = copied(tmp_path, {})
    shutil.copy(COMPACT / "preprocessor_config.json", folder)
    Preprocessor.load(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "preprocessor_config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FileNotFoundError, match="save_pretrained"):
            Preprocessor.load(folder)
        (folder / name).write_bytes(whole)


def test_many_threads_may_tokenize_from_the_file_at_once() -> None:
    ours = Preprocessor.load(COMPACT)
    texts = [["dog " * length] for length in range(1, 60)]
    with ThreadPoolExecutor(8) as pool:
        for ids, text in zip(pool.map(ours.texts, texts), texts, strict=True):
            equal(ids, ours.texts(text))


# ---------------------------------------------------------------- transformers, when it is asked for


def test_the_parts_of_transformers_are_there_when_asked_for() -> None:
    ours = Preprocessor.load(COMPACT)
    assert isinstance(ours.tokenizer, transformers.PreTrainedTokenizerBase)
    assert ours.tokenizer is ours.tokenizer
    assert ours.image_processor.backend == "pil"
    assert ours.tokenizer.backend_tokenizer.truncation["max_length"] == ours.max_length == 64
    wrapped = Preprocessor(ours.image_processor, ours.tokenizer, ours.tokenizer_spec)
    equal(ours.texts(TEXTS), wrapped.texts(TEXTS))
    equal(ours.images([noise((90, 60))]), wrapped.images([noise((90, 60))]))


def test_what_is_saved_is_what_transformers_saves(checkpoint: Callable, tmp_path: Path) -> None:
    for folder in (COMPACT, checkpoint("clip"), checkpoint("siglip2-naflex")):
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        Preprocessor.load(folder).save(ours)
        AutoImageProcessor.from_pretrained(folder, backend="pil").save_pretrained(theirs)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer(["a"], truncation=True, padding=True, max_length=min(tokenizer.model_max_length, 77))
        tokenizer.save_pretrained(theirs)
        names = {path.name for path in ours.iterdir()}
        assert names == {path.name for path in theirs.iterdir()}
        assert "preprocessor_config.json" in names
        for name in names - {"tokenizer.json"}:  # that one also keeps the length of the last call
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
        shutil.rmtree(ours)
        shutil.rmtree(theirs)
