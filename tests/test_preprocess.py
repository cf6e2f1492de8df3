"""Model inputs: pixels and tokens as each family's own processor makes them."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from alignment.preprocess import Preprocessor, TokenizerSpec

TEXTS = ["a dog runs on the beach", "A PLATE of pasta", "一只狗在海滩上奔跑"]
# How each family's own documentation calls its own processor.
OWN_TEXT = {
    "clip": {"padding": True, "truncation": True},
    "siglip": {"padding": "max_length", "truncation": True},
    "siglip2": {"padding": "max_length", "max_length": 64, "truncation": True},
    "siglip2-naflex": {},
    "chinese-clip": {"padding": True, "truncation": True, "max_length": 52},
    "vit-bert": {"padding": True, "truncation": True, "max_length": 512},
    "clip-roberta": {"padding": True, "truncation": True, "max_length": 64},
}


def equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == dict(theirs).keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", OWN_TEXT)
def test_inputs_equal_those_of_the_familys_own_processor(
    family: str, checkpoint: Callable, pictures: list[Image.Image]
) -> None:
    ours, own = Preprocessor.load(checkpoint(family)), AutoProcessor.from_pretrained(checkpoint(family))
    equal(ours.images(pictures), own(images=pictures, return_tensors="pt"))
    long = "two cats sleep " * 40
    for texts in (TEXTS, [long], [*TEXTS, long]):
        # Google lower-cased before this tokenizer; the published processor of the fixed sizes leaves it to the caller.
        theirs = [text.lower() for text in texts] if family == "siglip2" else texts
        equal(ours.texts(texts), own(text=theirs, return_tensors="pt", **OWN_TEXT[family]))


@pytest.mark.parametrize("family", ["siglip", "siglip2", "siglip2-naflex"])
def test_siglip_is_padded_to_64_and_lower_cased(family: str, checkpoint: Callable) -> None:
    ours = Preprocessor.load(checkpoint(family))
    lower, upper = ours.texts(["a dog"]), ours.texts(["A DOG"])
    assert lower["input_ids"].shape == (1, 64)
    assert ours.texts(["dog " * 200])["input_ids"].shape == (1, 64)
    equal(lower, upper)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
    assert lower["input_ids"][0].tolist() == tokenizer("a dog", padding="max_length", max_length=64)["input_ids"]


def test_the_tokenizer_of_fixed_siglip2_does_not_lower_case_by_itself(checkpoint: Callable) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("siglip2"))
    assert tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]  # or the test above could not fail


def test_case_is_kept_where_the_model_reads_it(checkpoint: Callable) -> None:
    ours = Preprocessor.load(checkpoint("clip-roberta"))
    assert ours.texts(["A"])["input_ids"].tolist() != ours.texts(["a"])["input_ids"].tolist()


def test_chinese_clip_reads_52_tokens(checkpoint: Callable) -> None:
    ids = Preprocessor.load(checkpoint("chinese-clip")).texts(["狗" * 100, "狗"])["input_ids"]
    assert ids.shape == (2, 52)
    assert ids[0, -1] == 3  # the end is kept: [SEP]


def test_naflex_keeps_the_shape_of_a_picture(checkpoint: Callable) -> None:
    inputs = Preprocessor.load(checkpoint("siglip2-naflex")).images(
        [Image.new("RGB", (320, 160)), Image.new("RGB", (64, 64))]
    )
    assert inputs.keys() == {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
    rows, columns = inputs["spatial_shapes"].unbind(dim=1)
    assert columns[0] > rows[0]
    assert columns[1] == rows[1]
    assert inputs["pixel_attention_mask"].sum(dim=1).tolist() == (rows * columns).tolist()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "clip"}, TokenizerSpec(77)),
        ({"model_type": "clip", "text_config": {"max_position_embeddings": 248}}, TokenizerSpec(248)),
        ({"model_type": "siglip", "text_config": {}}, TokenizerSpec(64, pad_to_max=True, lower=True)),
        ({"model_type": "chinese_clip", "text_config": {"max_position_embeddings": 512}}, TokenizerSpec(512, 0, 52)),
        ({"model_type": "bert", "max_position_embeddings": 40}, TokenizerSpec(40)),
        ({"model_type": "roberta", "max_position_embeddings": 514}, TokenizerSpec(512, 2)),
        (
            {"model_type": "vision-text-dual-encoder", "text_config": {"model_type": "siglip_text_model"}},
            TokenizerSpec(64, pad_to_max=True, lower=True),
        ),
        ({"model_type": "anything", "text_config": {"model_type": "new"}}, TokenizerSpec(512)),
        ({}, TokenizerSpec()),
    ],
)
def test_text_rules_follow_from_the_config(config: dict, expected: TokenizerSpec) -> None:
    assert TokenizerSpec.from_config(config) == expected


def test_a_caption_longer_than_the_tower_is_cut(checkpoint: Callable) -> None:
    assert Preprocessor.load(checkpoint("clip-roberta")).texts(["x" * 500])["input_ids"].shape == (1, 64)
    assert Preprocessor.load(checkpoint("clip")).texts(["x" * 500])["input_ids"].shape == (1, 77)


def test_a_saved_preprocessor_gives_the_same_inputs(
    family: str, checkpoint: Callable, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    first = Preprocessor.load(checkpoint(family))
    first.save(tmp_path)
    (tmp_path / "config.json").write_bytes((checkpoint(family) / "config.json").read_bytes())
    second = Preprocessor.load(tmp_path)
    equal(first.images(pictures), second.images(pictures))
    equal(first.texts(TEXTS), second.texts(TEXTS))


def test_two_towers_are_joined(checkpoint: Callable) -> None:
    joined = Preprocessor.load(checkpoint("vit"), checkpoint("siglip"))
    equal(joined.texts(TEXTS), Preprocessor.load(checkpoint("siglip")).texts(TEXTS))
    assert joined.images([Image.new("RGB", (9, 9))])["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_half_a_preprocessor_is_refused(name: str, checkpoint: Callable) -> None:
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        Preprocessor.load(checkpoint(name))


def test_many_threads_may_tokenize_at_once(checkpoint: Callable) -> None:
    ours = Preprocessor.load(checkpoint("clip"))
    # Set before the first caption comes: to change these while another thread reads them is an error.
    assert ours.tokenizer.backend_tokenizer.truncation["max_length"] == 77
    assert ours.tokenizer.backend_tokenizer.padding is not None
    texts = [["dog " * length] for length in range(1, 60)]
    with ThreadPoolExecutor(8) as pool:
        for ids, text in zip(pool.map(ours.texts, texts), texts, strict=True):
            equal(ids, ours.texts(text))


def test_torchvision_is_not_used(family: str, checkpoint: Callable) -> None:
    assert Preprocessor.load(checkpoint(family)).image_processor.backend == "pil"
    assert "torchvision" not in sys.modules
