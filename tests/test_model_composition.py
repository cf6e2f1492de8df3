"""Two towers of one side each, composed to a dual encoder: saved, loaded, refused."""

import shutil
from itertools import product
from math import log
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_model import TEXTS, Checkpoint, Pictures, load
from transformers import BertModel, ViTConfig, ViTModel

from alignment.model import DualEncoder, composition

PAIRS = [
    ("vit", "bert", ("cls", "cls")),
    ("vit", "bert", "mean"),
    ("vit", "bert", "pooler"),
    ("clip", "bert", ("pooler", "mean")),  # the textbook pair
    ("siglip", "roberta", ("pooler", "mean")),
    ("siglip2-naflex", "distilbert", ("mean", "cls")),
    ("chinese-clip", "chinese-clip", ("pooler", "cls")),
    ("vit-bert", "siglip", ("cls", "pooler")),
    ("convnext", "t5", ("pooler", "mean")),
    ("convnext", "gpt2", ("mean", "mean")),
    ("clip-roberta", "clip", ("pooler", "pooler")),
]


@pytest.mark.parametrize(("vision", "text", "pooling"), PAIRS)
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_towers_of_any_kind_are_joined(
    vision: str,
    text: str,
    pooling: object,
    projection: str,
    checkpoint: Checkpoint,
    pictures: Pictures,
    tmp_path: Path,
) -> None:
    first = DualEncoder.compose(
        checkpoint(vision), checkpoint(text), embed_dim=20, pooling=pooling, projection=projection, device="cpu"
    )
    assert first.logit_scale == pytest.approx(1 / 0.07)
    assert (first.logit_bias, first.embed_dim) == (None, 20)
    images, texts = first.encode_images(pictures), first.encode_texts(TEXTS)
    assert (images.shape, texts.shape) == ((3, 20), (4, 20))
    torch.testing.assert_close(texts, first.encode_texts(TEXTS, batch_size=1), rtol=0, atol=1e-5)  # padding is left out
    first.save(tmp_path)
    assert str(checkpoint(vision).parent) not in (tmp_path / "config.json").read_text()
    second = load(tmp_path)
    assert torch.equal(second.encode_images(pictures), images)
    assert torch.equal(second.encode_texts(TEXTS), texts)
    assert second.fingerprint == first.fingerprint


def test_a_composition_has_exactly_the_towers_weights(checkpoint: Checkpoint) -> None:
    joined = DualEncoder.compose(checkpoint("clip"), checkpoint("bert"), device="cpu").module.state_dict()
    clip, bert = (load_file(checkpoint(name) / "model.safetensors") for name in ("clip", "bert"))
    ours = {f"text_model.{name}": tensor for name, tensor in bert.items()}
    ours |= {name: tensor for name, tensor in clip.items() if name.startswith("vision_model.")}
    for name, tensor in ours.items():
        assert torch.equal(joined.pop(name), tensor), name
    assert joined.keys() == {"visual_projection.weight", "text_projection.weight", "logit_scale"}
    assert joined["logit_scale"].item() == pytest.approx(log(1 / 0.07))


def test_pooling_means_what_it_says(checkpoint: Checkpoint) -> None:
    bert = BertModel.from_pretrained(checkpoint("bert")).eval()
    for pooling in ("mean", "cls", "pooler"):
        encoder = DualEncoder.compose(checkpoint("vit"), checkpoint("bert"), pooling=("cls", pooling), device="cpu")
        inputs = encoder.preprocessor.texts(["a dog runs", "a"])
        with torch.no_grad():
            output = bert(**inputs)
            tokens = output.last_hidden_state
            lengths = inputs["attention_mask"].sum(dim=1)
            expected = {
                "mean": torch.stack([row[:length].mean(dim=0) for row, length in zip(tokens, lengths, strict=True)]),
                "cls": tokens[:, 0],
                "pooler": output.pooler_output,
            }[pooling]
            features = encoder.module.get_text_features(**inputs).pooler_output
            torch.testing.assert_close(features, encoder.module.text_projection(expected))


def test_padding_on_the_left_is_left_out_too() -> None:
    states, keep = torch.randn(2, 4, 3), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    first = composition.pool_tokens(states, "cls", keep)
    torch.testing.assert_close(first, torch.stack([states[0, 2], states[1, 0]]))
    mean = composition.pool_tokens(states, "mean", keep)
    torch.testing.assert_close(mean, torch.stack([states[0, 2:].mean(dim=0), states[1].mean(dim=0)]))


def test_the_mean_over_patches_leaves_padding_out(checkpoint: Checkpoint) -> None:
    encoder = DualEncoder.compose(checkpoint("siglip2-naflex"), checkpoint("bert"), pooling="mean", device="cpu")
    inputs = encoder.preprocessor.images([Image.new("RGB", (320, 160), "teal")])
    keep = inputs["pixel_attention_mask"][0].bool()
    assert 0 < keep.sum() < len(keep)
    with torch.no_grad():
        tokens = encoder.module.vision_model(**inputs).last_hidden_state
        features = encoder.module.get_image_features(**inputs).pooler_output
        torch.testing.assert_close(features, encoder.module.visual_projection(tokens[:, keep].mean(dim=1)))


@pytest.mark.parametrize(
    ("vision", "pooling"), [("convnext", ("cls", "mean")), ("vit", ("max", "mean")), ("vit", ("cls", "first"))]
)
def test_a_pooling_that_a_tower_lacks_is_refused(vision: str, pooling: object, checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="cannot be pooled by"):
        DualEncoder.compose(checkpoint(vision), checkpoint("bert"), pooling=pooling)


def test_a_tower_without_a_pooler_and_an_unknown_projection_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="distilbert tower cannot be pooled by 'pooler'"):
        DualEncoder.compose(checkpoint("vit"), checkpoint("distilbert"), pooling="pooler")
    with pytest.raises(ValueError, match="choose 'linear', 'mlp' or 'none'"):
        DualEncoder.compose(checkpoint("vit"), checkpoint("bert"), projection="deep")


def test_towers_of_one_width_need_no_projection(checkpoint: Checkpoint, pictures: Pictures, tmp_path: Path) -> None:
    first = DualEncoder.compose(checkpoint("vit"), checkpoint("bert"), embed_dim=32, projection="none", device="cpu")
    assert not [name for name in first.module.state_dict() if name.startswith(("visual_proj", "text_proj"))]
    first.save(tmp_path)
    assert torch.equal(load(tmp_path).encode_images(pictures), first.encode_images(pictures))
    with pytest.raises(ValueError, match="width 32 needs a projection to width 512"):
        DualEncoder.compose(checkpoint("vit"), checkpoint("bert"), projection="none")


def test_a_pooler_that_was_never_trained_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("vit"), tmp_path, dirs_exist_ok=True)
    ViTModel(ViTConfig.from_pretrained(tmp_path), add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no trained pooler for its vision tower"):
        DualEncoder.compose(tmp_path, checkpoint("bert"))
    assert DualEncoder.compose(tmp_path, checkpoint("bert"), pooling="mean").embed_dim == 512
    with pytest.raises(ValueError, match="no trained pooler for its text tower"):
        DualEncoder.compose(checkpoint("vit"), checkpoint("chinese-clip"), pooling="pooler")


def test_the_text_rules_of_a_half_survive(checkpoint: Checkpoint, tmp_path: Path) -> None:
    DualEncoder.compose(checkpoint("vit"), checkpoint("siglip2"), pooling="mean", device="cpu").save(tmp_path)
    inputs = load(tmp_path).preprocessor.texts(["A DOG"])
    assert inputs["input_ids"].shape == (1, 64)
    assert torch.equal(inputs["input_ids"], load(checkpoint("siglip2")).preprocessor.texts(["a dog"])["input_ids"])


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_a_composition_learns(projection: str, checkpoint: Checkpoint, pictures: Pictures) -> None:
    torch.manual_seed(0)
    encoder = DualEncoder.compose(
        checkpoint("vit"), checkpoint("bert"), embed_dim=16, projection=projection, device="cpu"
    )
    optimizer = torch.optim.AdamW(encoder.module.parameters(), lr=3e-3)
    images, texts = encoder.preprocessor.images(pictures), encoder.preprocessor.texts(TEXTS[:3])
    losses = []
    for _ in range(25):
        logits = encoder.embed_images(images) @ encoder.embed_texts(texts).T * encoder.module.logit_scale.exp()
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]
    assert encoder.logit_scale != pytest.approx(1 / 0.07, rel=1e-3)


@pytest.mark.parametrize(("pooling", "projection"), list(product(["mean", "pooler"], ["linear", "mlp"])))
def test_gradients_reach_every_weight_that_is_used(pooling: str, projection: str, checkpoint: Checkpoint) -> None:
    encoder = DualEncoder.compose(
        checkpoint("vit"), checkpoint("bert"), pooling=pooling, projection=projection, device="cpu"
    )
    images = encoder.embed_images(encoder.preprocessor.images([Image.effect_noise((40, 40), 90).convert("RGB")]))
    texts = encoder.embed_texts(encoder.preprocessor.texts(TEXTS[:1]))
    (images @ texts.T * encoder.module.logit_scale.exp()).sum().backward()
    idle = [name for name, weight in encoder.module.named_parameters() if weight.grad is None]
    assert all("pooler" in name for name in idle)
    assert bool(idle) == (pooling == "mean")
