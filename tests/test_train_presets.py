"""What each preset trains, for every family; what stays as it was; and the small model that starts from nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_train_trainer import RECIPE
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

from alignment.model import DualEncoder
from alignment.model.composition import ComposedConfig, ComposedModel
from alignment.preprocess import Preprocessor, TokenizerSpec
from alignment.towers import EfficientNetLiteConfig, EfficientNetLiteModel, NgramTextConfig, NgramTextModel
from alignment.train.presets import Preset, Towers, apply_preset, merge_lora, snapshot, trained_weights, weight_groups
from alignment.train.start import MAX_TOKENS, SIZES, build_scratch, learn_tokenizer

Checkpoint = Callable[[str], Path]
Pictures = list[Image.Image]

TEXTS = ["a dog runs on the beach", "a plate of pasta", "two cats"]
SIDE = 64


def load(folder: Path) -> DualEncoder:
    return DualEncoder.load(folder, device="cpu")


def compact_like() -> DualEncoder:
    """Compose the compact model's towers, two sizes smaller; it has no adapters, projections or poolers."""
    torch.manual_seed(0)
    image = EfficientNetLiteModel(
        EfficientNetLiteConfig(
            image_size=SIDE,
            width_multiplier=0.25,
            depth_multiplier=0.5,
            num_classes=7,
            embed_dim=16,
            concept_dim=12,
            tail_start=5,
            num_queries=4,
            hidden_dim=16,
        )
    )
    tokenizer = learn_tokenizer(TEXTS)
    text = NgramTextModel(
        NgramTextConfig(
            vocab_size=len(tokenizer),
            num_chunks=4,
            token_dim=16,
            gram_dim=8,
            sentence_dim=12,
            embed_dim=16,
            num_queries=4,
            hidden_dim=16,
        )
    )
    for parameter in (*image.parameters(), *text.parameters()):
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    text.table.codes.random_(0, 255)
    text.table.scale.fill_(0.01)
    config = ComposedConfig(
        vision_config=image.config.to_dict(),
        text_config=text.config.to_dict(),
        projection="none",
        projection_dim=28,
        vision_pooling="pooler",
        text_pooling="pooler",
        vision_width=28,
        text_width=28,
    )
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    preprocessor = Preprocessor(processor, tokenizer, TokenizerSpec(positions=64))
    return DualEncoder(ComposedModel(config, image, text), preprocessor, name="compact-like", device="cpu")


def step(encoder: DualEncoder, pictures: Pictures, rate: float = 0.1) -> set[str]:
    """Take one step of plain gradient descent; return the names of the weights that changed."""
    towers = Towers(encoder)
    towers.train()
    before = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    images, texts = towers(encoder.preprocessor.images(pictures), encoder.preprocessor.texts(TEXTS))
    logits = images @ texts.T * towers.logit_scale.exp()
    if towers.logit_bias is not None:
        logits = logits + towers.logit_bias
    # Not shifted away by anything: a softmax would give biases that all images share no gradient.
    (logits * torch.linspace(-1, 2, logits.numel()).view(logits.shape)).sum().backward()
    groups = weight_groups(encoder.module, replace(RECIPE, learning_rate=rate, head_learning_rate=rate))
    torch.optim.SGD(groups, lr=rate).step()
    encoder.module.zero_grad()
    after = encoder.module.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def embeds(encoder: DualEncoder, pictures: Pictures) -> Tensor:
    return torch.cat([encoder.encode_images(pictures), encoder.encode_texts(TEXTS)])


# ---------------------------------------------------------------- presets

# Of each preset: beginnings of the names of all it trains.
SIGLIP_HEADS = ("vision_model.head.", "text_model.head.", "logit_scale", "logit_bias")
PROJECTIONS = ("visual_projection.", "text_projection.", "logit_scale")
HEADS = {
    name: SIGLIP_HEADS if name.startswith("siglip") else PROJECTIONS
    for name in ("siglip", "siglip2", "siglip2-naflex", "clip", "chinese-clip", "vit-bert", "clip-roberta", "composed")
}
TEXT_SIDE = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
# Towers are pooled without these, so nothing ever moves them.
UNUSED = {
    "composed": ("text_model.pooler.",),  # pooled by the mean
    "chinese-clip": ("text_model.pooler.",),
}
# A softmax over keys is blind to what is added to all of them alike: a bias of the keys has no gradient but rounding.
BLIND = ("k_proj.bias", "key.bias")


@pytest.mark.parametrize("preset", ["full", "lit", "heads"])
def test_a_step_changes_what_the_preset_trains(
    family: str, preset: Preset, checkpoint: Checkpoint, pictures: Pictures
) -> None:
    encoder = load(checkpoint(family))
    names = [name for name, _ in encoder.module.named_parameters()]
    beginnings = {"full": ("",), "lit": TEXT_SIDE, "heads": HEADS[family]}[preset]
    expected = {name for name in names if name.startswith(beginnings)}
    apply_preset(encoder, preset)
    assert set(trained_weights(encoder.module)) == expected
    changed = step(encoder, pictures)
    assert changed <= expected
    still = {name for name in expected - changed if not name.endswith(BLIND)}
    assert all(name.startswith(UNUSED.get(family, ("-",))) for name in still), still
    for part in {name.split(".")[0] for name in expected}:
        assert any(name.startswith(part) for name in changed)


def test_adapters_are_trained_then_merged(
    family: str, checkpoint: Checkpoint, pictures: Pictures, tmp_path: Path
) -> None:
    encoder = load(checkpoint(family))
    names, start, before = list(encoder.module.state_dict()), snapshot(encoder.module), embeds(encoder, pictures)
    apply_preset(encoder, "lora")
    torch.testing.assert_close(embeds(encoder, pictures), before)  # an adapter begins as nothing
    trained = list(trained_weights(encoder.module))
    assert {name for name in trained if "lora_" not in name} == {
        n for n in names if n.startswith(HEADS[family]) and n in start
    }
    for side in ("vision_model", "text_model"):
        assert any(name.startswith(side) and "lora_A" in name for name in trained)
        assert not any(name.startswith(HEADS[family]) and "lora_" in name for name in trained)
    changed = step(encoder, pictures) | step(encoder, pictures)  # lora_A moves once lora_B is no longer zero
    assert changed <= set(trained)
    assert {name.split(".")[0] for name in changed if "lora_A" in name} == {"vision_model", "text_model"}
    after = embeds(encoder, pictures)
    assert (after - before).abs().max() > 1e-2
    merge_lora(encoder.module)
    assert list(encoder.module.state_dict()) == names
    assert not any("lora" in name or "base_layer" in name for name, _ in encoder.module.named_modules())
    torch.testing.assert_close(embeds(encoder, pictures), after, rtol=1e-4, atol=1e-5)
    moved = [name for name, weight in encoder.module.named_parameters() if not torch.equal(weight, start[name])]
    assert any(name.startswith("vision_model.") and not name.startswith(HEADS[family]) for name in moved)
    encoder.save(tmp_path)
    torch.testing.assert_close(embeds(load(tmp_path), pictures), after, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "adapter_config.json").exists()


def test_merging_leaves_a_module_without_adapters_alone(checkpoint: Checkpoint) -> None:
    encoder = load(checkpoint("clip"))
    layers, fingerprint = dict(encoder.module.named_modules()), encoder.fingerprint
    merge_lora(encoder.module)
    assert dict(encoder.module.named_modules()) == layers
    assert encoder.fingerprint == fingerprint


def test_a_preset_replaces_the_one_before(checkpoint: Checkpoint) -> None:
    encoder = load(checkpoint("siglip"))
    apply_preset(encoder, "heads")
    apply_preset(encoder, "full")
    assert len(trained_weights(encoder.module)) == len(list(encoder.module.parameters()))


@pytest.mark.parametrize("preset", ["heads", "full"])
def test_towers_without_heads_have_none_to_train(preset: Preset, checkpoint: Checkpoint) -> None:
    encoder = DualEncoder.compose(checkpoint("vit"), checkpoint("bert"), embed_dim=32, projection="none", device="cpu")
    if preset == "full":
        apply_preset(encoder, preset)
    else:
        with pytest.raises(ValueError, match="has no weights that preset 'heads' would train; choose another preset"):
            apply_preset(encoder, preset)


# ---------------------------------------------------------------- the compact model


@pytest.mark.parametrize(
    ("preset", "parts"),
    [
        ("full", ("vision_model.tail.", "vision_model.head.", "text_model.head.", "logit_scale")),
        ("lit", ("text_model.head.", "logit_scale")),
        ("heads", ("vision_model.head.", "text_model.head.", "logit_scale")),
    ],
)
def test_the_compact_model_holds_what_a_million_pictures_made(
    preset: Preset, parts: tuple[str, ...], pictures: Pictures
) -> None:
    encoder = compact_like()
    apply_preset(encoder, preset)
    expected = {name for name, _ in encoder.module.named_parameters() if name.startswith(parts)}
    assert set(trained_weights(encoder.module)) == expected
    changed = step(encoder, pictures)
    assert changed <= expected
    assert {name for name in expected - changed if not name.endswith(".key.bias")} == set()


def test_the_compact_model_has_no_place_for_adapters() -> None:
    with pytest.raises(ValueError, match="no linear layers outside its heads; choose another preset than 'lora'"):
        apply_preset(compact_like(), "lora")


# ---------------------------------------------------------------- evaluation mode


def with_resnet(checkpoint: Checkpoint) -> DualEncoder:
    """Compose a dual encoder whose image tower has batch normalisation, with a projection of its own."""
    torch.manual_seed(0)
    tower = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    text = load(checkpoint("vit-bert"))
    config = ComposedConfig(
        vision_config=tower.config.to_dict(),
        text_config=text.module.text_model.config.to_dict(),
        projection_dim=24,
        vision_pooling="pooler",
        text_pooling="mean",
        vision_width=16,
        text_width=32,
    )
    module = ComposedModel(config, tower, text.module.text_model)
    return DualEncoder(module, text.preprocessor, name="resnet + bert", device="cpu")


@pytest.mark.parametrize("preset", ["full", "lit"])
def test_batch_normalisation_keeps_its_statistics(preset: Preset, checkpoint: Checkpoint, pictures: Pictures) -> None:
    encoder = with_resnet(checkpoint)
    apply_preset(encoder, preset)
    changed = step(encoder, pictures)
    assert not any("running_" in name or "num_batches" in name for name in changed)
    trained = any("normalization.weight" in name for name in changed)
    assert trained == (preset == "full")  # its scale and offset are trained all the same
    norms = [layer for layer in encoder.module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    assert not any(layer.training for layer in norms)


def dropping(encoder: DualEncoder) -> None:
    for layer in encoder.module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.5


def twice(towers: Towers, encoder: DualEncoder, pictures: Pictures) -> tuple[bool, bool]:
    """Embed everything twice; say of both sides whether it came out the same."""
    inputs = encoder.preprocessor.images(pictures), encoder.preprocessor.texts(TEXTS)
    one, other = towers(*inputs), towers(*inputs)
    return torch.equal(one[0], other[0]), torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    ("preset", "steady"),
    [("full", (False, False)), ("lit", (True, False)), ("heads", (True, True)), ("lora", (False, False))],
)
def test_dropout_is_off_in_what_is_frozen(
    preset: Preset, steady: tuple[bool, bool], checkpoint: Checkpoint, pictures: Pictures
) -> None:
    encoder = load(checkpoint("vit-bert"))
    dropping(encoder)
    apply_preset(encoder, preset)
    towers = Towers(encoder)
    towers.train()
    assert twice(towers, encoder, pictures) == steady
    encoder.encode_texts(TEXTS)  # a measurement in the middle switches everything off and on
    towers.train()
    assert twice(towers, encoder, pictures) == steady
    towers.eval()
    assert twice(towers, encoder, pictures) == (True, True)


@pytest.mark.parametrize(
    ("preset", "steady"), [("full", (False, False)), ("lit", (True, False)), ("heads", (False, False))]
)
def test_dropout_of_the_compact_models_heads(preset: Preset, steady: tuple[bool, bool], pictures: Pictures) -> None:
    encoder = compact_like()
    apply_preset(encoder, preset)
    towers = Towers(encoder)
    towers.train()
    assert twice(towers, encoder, pictures) == steady


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize("preset", ["full", "lora"])
def test_heads_have_their_own_rate_and_vectors_no_decay(preset: Preset, checkpoint: Checkpoint) -> None:
    encoder = load(checkpoint("siglip"))
    apply_preset(encoder, preset)
    recipe = replace(RECIPE, learning_rate=1e-5, head_learning_rate=1e-3, weight_decay=0.1)
    groups = weight_groups(encoder.module, recipe)
    names = {id(weight): name for name, weight in encoder.module.named_parameters()}
    seen = []
    for group in groups:
        for weight in group["params"]:
            name = names[id(weight)]
            head = name.startswith(SIGLIP_HEADS) or "lora_" in name
            assert group["lr"] == (1e-3 if head else 1e-5), name
            assert group["weight_decay"] == (0.1 if weight.ndim > 1 else 0.0), name
            seen.append(name)
    assert sorted(seen) == sorted(trained_weights(encoder.module))
    assert len({group["lr"] for group in groups}) == (2 if preset == "full" else 1)


def test_the_start_is_a_copy(checkpoint: Checkpoint, pictures: Pictures) -> None:
    encoder = load(checkpoint("clip"))
    expected = {name: weight.detach().clone() for name, weight in encoder.module.named_parameters()}
    start = snapshot(encoder.module)
    apply_preset(encoder, "full")
    step(encoder, pictures)
    assert start.keys() == expected.keys()
    assert all(torch.equal(start[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- from nothing

CAPTIONS = [
    "A dog runs on the beach.",
    "Two dogs and a cat",
    "一只狗在海滩上奔跑",
    "the dog is running",
    "dogs run",
] * 3


@pytest.mark.parametrize("size", SIZES)
def test_a_small_model_is_built_saved_and_loaded(size: str, pictures: Pictures, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_scratch(CAPTIONS, size, device="cpu")
    assert encoder.name == f"scratch-{size}"
    assert encoder.embed_dim == SIZES[size][2]
    found = embeds(encoder, pictures)
    assert found.shape == (6, encoder.embed_dim)
    alone = torch.cat([encoder.encode_texts([text]) for text in TEXTS])
    torch.testing.assert_close(found[3:], alone, rtol=0, atol=1e-5)  # padding to the longest changes nothing
    encoder.save(tmp_path)
    loaded = load(tmp_path)
    torch.testing.assert_close(embeds(loaded, pictures), found)
    assert loaded.fingerprint == encoder.fingerprint
    texts = [encoder_.preprocessor.texts(["A cat, 一只狗 " * 40])["input_ids"] for encoder_ in (encoder, loaded)]
    assert texts[0].shape == (1, MAX_TOKENS)
    assert torch.equal(*texts)


def test_the_same_seed_gives_the_same_small_model() -> None:
    fingerprints = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        fingerprints.append(build_scratch(CAPTIONS, "tiny", device="cpu").fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_the_vocabulary_is_that_of_the_captions() -> None:
    tokenizer = learn_tokenizer(CAPTIONS)
    assert tokenizer.tokenize("Dog BEACH running") == ["dog", "beach", "running"]
    assert tokenizer.tokenize("海滩上的狗") == ["海", "滩", "上", "[UNK]", "狗"]
    assert tokenizer.tokenize("xylophone") == ["[UNK]"]
    assert tokenizer.model_max_length == MAX_TOKENS
    ids = tokenizer("a dog")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "dog", "[SEP]"]


def test_a_small_model_trains_everything_but_unused_poolers(pictures: Pictures) -> None:
    torch.manual_seed(0)
    encoder = build_scratch([*CAPTIONS, *TEXTS], "tiny", device="cpu")
    apply_preset(encoder, "full")
    changed = step(encoder, pictures)
    still = {name for name in trained_weights(encoder.module) if name not in changed and not name.endswith(BLIND)}
    assert all(".pooler." in name for name in still), still
