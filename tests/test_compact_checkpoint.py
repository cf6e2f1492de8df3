"""The committed checkpoint: its files, its frozen weights against the packages, and that it knows what it sees."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from alignment.compact.convert import convert_image_tower, convert_text_tower, convert_tokenizer
from alignment.gallery import Picture
from alignment.model import DualEncoder

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "checkpoints" / "compact"
SOURCES = ROOT / "assets" / "gallery" / "sources" / "pictures.jsonl"
FILES = {
    "README.md",
    "config.json",
    "frozen.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "trained.safetensors",
}
# Photographs that leave no doubt: in each of these comparisons the right answer led by 0.1 when this was written.
CLEAR = ("cheetah-running", "cat", "coffee", "cameraman", "motorcycle", "rocket")


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.load(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def pictures() -> dict[str, dict[str, str]]:
    rows = [json.loads(line) for line in SOURCES.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row for row in rows if row["id"] in CLEAR}


@pytest.fixture(scope="module")
def image_embeds(encoder: DualEncoder, pictures: dict[str, dict[str, str]]) -> Tensor:
    return encoder.encode_images([Picture(name, pictures[name]["source"], {}).path for name in CLEAR])


# ---------------------------------------------------------------- files


def test_the_files_keep_to_their_limits() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sizes.keys() >= FILES
    assert {name for name in sizes if name.endswith(".safetensors")} == {"frozen.safetensors", "trained.safetensors"}
    assert max(sizes.values()) < 95e6
    assert sum(sizes.values()) <= 110e6
    assert not [name for name in sizes if Path(name).suffix in {".bin", ".pt", ".pth", ".pkl", ".npz", ".py"}]


def test_the_index_lists_every_weight_once() -> None:
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text(encoding="utf-8"))
    listed, total = {}, 0
    for file in ("frozen.safetensors", "trained.safetensors"):
        with safe_open(FOLDER / file, "pt") as part:
            for name in part.keys():  # noqa: SIM118 - a method, not a dictionary
                assert name not in listed
                listed[name] = file
                tensor = part.get_tensor(name)
                total += tensor.numel() * tensor.element_size()
                small = name.endswith((".table.scale", ".table.offset", "logit_scale"))
                assert tensor.dtype == torch.uint8 or small or tensor.dtype == torch.float16, name
                assert tensor.dtype == torch.uint8 or tensor.isfinite().all(), name
    assert index["weight_map"] == listed
    assert index["metadata"]["total_size"] == total


def test_the_frozen_weights_are_the_packages() -> None:
    image, text = convert_image_tower().state_dict(), convert_text_tower().state_dict()
    expected = {f"text_model.{name}": value for name, value in text.items()}
    for name, value in image.items():
        branch = "concept." if name.startswith(("tail.", "classifier.")) else ""
        expected[f"vision_model.{branch}{name}"] = value
    with safe_open(FOLDER / "frozen.safetensors", "pt") as part:
        found = {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118 - a method, not a dictionary
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # One step of half precision apart: processors differ in the last bit of the square root that folds a norm.
        torch.testing.assert_close(value, expected[name].to(value.dtype), rtol=1e-3, atol=1e-7, msg=name)
    assert found["text_model.table.codes"].dtype == torch.uint8


def test_the_tokenizer_is_the_conversion(encoder: DualEncoder) -> None:
    texts = [
        "A dog on a beach.",
        "一只狗在沙滩上。",
        "Ein Hund am Strand",
        "犬が浜辺を走る",
        "ＡＢＣ ﬁne  ①",
        "🐕 كلب หมา",
    ]
    assert encoder.preprocessor.tokenizer(texts)["input_ids"] == convert_tokenizer()(texts)["input_ids"]


def test_the_image_processor_keeps_the_whole_picture_at_260() -> None:
    config = json.loads((FOLDER / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert config["size"] == {"height": 260, "width": 260}
    assert (config["image_mean"], config["image_std"], config["resample"]) == ([0.5] * 3, [0.5] * 3, 3)
    assert not config.get("do_center_crop")


def test_the_model_card_says_what_it_must() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n"), "the Hub reads licence and languages from the YAML at the top"
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "license:" in header
    lower = body.lower()
    for wanted in ("flickr8k", "apache-2.0", "python -m alignment.compact", "chinese"):
        assert wanted in lower, f"the card does not mention {wanted}"
    headings = " ".join(line.lower() for line in body.splitlines() if line.startswith("#"))
    for title in ("data", "licence", "recipe", "measured", "bad at"):
        assert title in headings, f"no heading about {title}"
    assert not re.search(r"^[A-Z]{4,}$", body, re.MULTILINE), "a table is still to be filled in"
    measured = lower.split("## measured", 1)[1].split("\n## ", 1)[0]
    assert "dev" in measured
    assert "r@1" in measured
    assert len(re.findall(r"\b(?:0?\.\d{2,}|\d{2}\.\d)\b", measured)) >= 6, "recall in both directions, at 1, 5 and 10"


# ---------------------------------------------------------------- meaning


def test_embeddings_have_unit_norm(encoder: DualEncoder, image_embeds: Tensor) -> None:
    texts = encoder.encode_texts(["a dog", "狗"])
    for embeds in (image_embeds, texts):
        assert embeds.shape[1] == encoder.embed_dim
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(embeds)))
    assert 1 < encoder.logit_scale <= 100.01
    assert encoder.logit_bias is None


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("cat", "a cat looks at the camera", "a plate of pasta"),
        ("cat", "一只猫看着镜头", "一盘意大利面"),
        ("coffee", "a cup of coffee on a table", "a dog runs on the beach"),
        ("coffee", "桌上的一杯咖啡", "一只狗在海滩上奔跑"),
        ("motorcycle", "a parked motorcycle", "a cat looks at the camera"),
        ("motorcycle", "一辆停着的摩托车", "一只猫看着镜头"),
    ],
)
def test_a_picture_prefers_the_caption_that_fits(
    name: str, right: str, wrong: str, encoder: DualEncoder, image_embeds: Tensor
) -> None:
    fits, does_not = (encoder.encode_texts([right, wrong]) @ image_embeds[CLEAR.index(name)]).tolist()
    assert fits > does_not + 0.05


@pytest.mark.parametrize("language", ["en", "zh"])
def test_photographs_find_their_captions_and_captions_their_photographs(
    language: str, encoder: DualEncoder, pictures: dict[str, dict[str, str]], image_embeds: Tensor
) -> None:
    texts = encoder.encode_texts([pictures[name][language] for name in CLEAR])
    similarity = image_embeds @ texts.T
    own = torch.arange(len(CLEAR))
    assert similarity.argmax(1).tolist() == own.tolist()
    assert similarity.argmax(0).tolist() == own.tolist()


def test_a_chinese_caption_means_what_the_english_one_means(
    encoder: DualEncoder, pictures: dict[str, dict[str, str]]
) -> None:
    english, chinese = (encoder.encode_texts([pictures[name][key] for name in CLEAR]) for key in ("en", "zh"))
    assert (english @ chinese.T).argmax(1).tolist() == list(range(len(CLEAR)))
