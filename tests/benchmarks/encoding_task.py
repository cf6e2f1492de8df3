"""What the contenders of `encoding_speed.py` encode: the same pictures, with one model in each one's form.

The pictures are cut-outs of photographs that scikit-image carries (or of those in a folder), enlarged to the size that
is asked for, with a little grain, so that a JPEG weighs about what a camera's does. The towers have random weights,
which take as long as trained ones. Where a model exists only for its pictures, its text tower is as small as it gets.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "motorcycle_right.png",
    "rocket.jpg",
)
GRAIN = 7.0  # standard deviation of the noise, in steps of 256
QUALITY = 90
PIXELS = 224
SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}

State = dict[str, torch.Tensor]


def quiet() -> None:
    """Keep what libraries say of random weights out of the table."""
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# ---------------------------------------------------------------- pictures


def photographs(data: Path | None = None) -> list[Path]:
    """List the photographs to cut from: scikit-image's, or the JPEGs below a folder."""
    if data is None:
        import skimage.data

        return [Path(skimage.data.__file__).parent / name for name in PHOTOGRAPHS]
    found = sorted(data.rglob("*.jpg"))[:500]
    if not found:
        raise SystemExit(f"{data} holds no .jpg file.")
    return found


def write_pictures(folder: Path, count: int, size: tuple[int, int], sources: list[Path]) -> list[Path]:
    """Write `count` different JPEGs of (width, height)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    grain = rng.normal(0, GRAIN, (1024, 1024, 3))
    paths = []
    for number in range(count):
        with Image.open(sources[number % len(sources)]) as photograph:
            picture = _cut_out(photograph.convert("RGB"), size[0] / size[1], rng)
        pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC), np.float32)
        noise = np.roll(grain, tuple(rng.integers(0, 1024, 2)), (0, 1))
        tiles = (-(-size[1] // 1024), -(-size[0] // 1024), 1)
        pixels = pixels + np.tile(noise, tiles)[: size[1], : size[0]].astype(np.float32)
        paths.append(folder / f"{number:04}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=QUALITY)
    return paths


def _cut_out(picture: Image.Image, shape: float, rng: np.random.Generator) -> Image.Image:
    """Cut a piece of the given width over height out of a photograph, mirrored or not."""
    share = rng.uniform(0.6, 1.0)
    width = min(picture.width, picture.height * shape) * share
    height = width / shape
    left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    piece = picture.crop((int(left), int(top), int(left + width), int(top + height)))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece


# ---------------------------------------------------------------- models


def save_clip(folder: Path, **vision: int) -> None:
    """Save a CLIP of ViT-B/32's shape from random weights (or of the shape given), as transformers keeps it."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    tokenizer = _byte_tokenizer(77)
    text = {
        **SMALL_TEXT,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=vision or {"image_size": PIXELS, "patch_size": 32})
    for part in (CLIPModel(config), CLIPImageProcessorPil(), tokenizer):
        part.save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    """Save a SigLIP of the shape B/16-224 from random weights; SigLIP 2 of that size has the same picture tower."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    torch.manual_seed(0)
    tokenizer = _byte_tokenizer(64)
    text = {**SMALL_TEXT, "vocab_size": len(tokenizer), "projection_size": 768}
    vision = {"image_size": PIXELS, "patch_size": 16}
    for part in (
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)),
        SiglipImageProcessorPil(),
        tokenizer,
    ):
        part.save_pretrained(folder)


def _byte_tokenizer(length: int):
    """Make a tokenizer that knows letters only: no text is encoded here, but a checkpoint without one is none."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def save_for_open_clip(source: Path, folder: Path) -> None:
    """Save the picture tower of a CLIP or SigLIP folder as open_clip keeps it; its text tower stays random."""
    import open_clip
    from safetensors.torch import load_file, save_file

    state = load_file(source / "model.safetensors")
    config, convert = (
        (_SIGLIP_IN_OPEN_CLIP, _siglip_to_timm)
        if "vision_model.head.probe" in state
        else (_CLIP_IN_OPEN_CLIP, _clip_to_open_clip)
    )
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    converted = dict(convert(state))
    wanted = {name for name in model.state_dict() if name.startswith("visual.")}
    if wanted != converted.keys():
        raise RuntimeError(f"open_clip's picture tower has other weights: {sorted(wanted ^ converted.keys())[:5]}")
    model.load_state_dict(converted, strict=False)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )


_TEXT_IN_OPEN_CLIP = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
_CLIP_IN_OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {"image_size": PIXELS, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": _TEXT_IN_OPEN_CLIP,
    },
    "preprocess_cfg": {},
}
_SIGLIP_IN_OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 768,
        "vision_cfg": {
            "image_size": PIXELS,
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": _TEXT_IN_OPEN_CLIP,
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


def _clip_to_open_clip(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the weights of CLIP's picture tower the names that open_clip has for them."""
    ours, theirs = "vision_model.", "visual."
    yield theirs + "class_embedding", state[ours + "embeddings.class_embedding"]
    yield theirs + "positional_embedding", state[ours + "embeddings.position_embedding.weight"]
    yield theirs + "conv1.weight", state[ours + "embeddings.patch_embedding.weight"]
    yield theirs + "proj", state["visual_projection.weight"].T
    for end in ("weight", "bias"):
        yield f"{theirs}ln_pre.{end}", state[f"{ours}pre_layrnorm.{end}"]
        yield f"{theirs}ln_post.{end}", state[f"{ours}post_layernorm.{end}"]
        for layer in range(12):
            part = _layer_of(state, layer, end)
            block = f"{theirs}transformer.resblocks.{layer}."
            yield f"{block}ln_1.{end}", part("layer_norm1")
            yield f"{block}attn.in_proj_{end}", torch.cat([part(f"self_attn.{name}_proj") for name in "qkv"])
            yield f"{block}attn.out_proj.{end}", part("self_attn.out_proj")
            yield f"{block}ln_2.{end}", part("layer_norm2")
            yield f"{block}mlp.c_fc.{end}", part("mlp.fc1")
            yield f"{block}mlp.c_proj.{end}", part("mlp.fc2")


def _siglip_to_timm(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the weights of SigLIP's picture tower the names that timm, inside open_clip, has for them."""
    ours, theirs = "vision_model.", "visual.trunk."
    head, pool = ours + "head.", theirs + "attn_pool."
    yield theirs + "pos_embed", state[ours + "embeddings.position_embedding.weight"][None]
    yield pool + "latent", state[head + "probe"]
    for end in ("weight", "bias"):
        yield f"{theirs}patch_embed.proj.{end}", state[f"{ours}embeddings.patch_embedding.{end}"]
        yield f"{theirs}norm.{end}", state[f"{ours}post_layernorm.{end}"]
        query, *key_value = state[f"{head}attention.in_proj_{end}"].chunk(3)
        yield f"{pool}q.{end}", query
        yield f"{pool}kv.{end}", torch.cat(key_value)
        yield f"{pool}proj.{end}", state[f"{head}attention.out_proj.{end}"]
        yield f"{pool}norm.{end}", state[f"{head}layernorm.{end}"]
        for name in ("mlp.fc1", "mlp.fc2"):
            yield f"{pool}{name}.{end}", state[f"{head}{name}.{end}"]
        for layer in range(12):
            part = _layer_of(state, layer, end)
            block = f"{theirs}blocks.{layer}."
            yield f"{block}norm1.{end}", part("layer_norm1")
            yield f"{block}attn.qkv.{end}", torch.cat([part(f"self_attn.{name}_proj") for name in "qkv"])
            yield f"{block}attn.proj.{end}", part("self_attn.out_proj")
            yield f"{block}norm2.{end}", part("layer_norm2")
            yield f"{block}mlp.fc1.{end}", part("mlp.fc1")
            yield f"{block}mlp.fc2.{end}", part("mlp.fc2")


def _layer_of(state: State, layer: int, end: str) -> Callable[[str], torch.Tensor]:
    """Look up weights (or biases) of one layer of the picture tower."""
    return lambda name: state[f"vision_model.encoder.layers.{layer}.{name}.{end}"]


def save_as_onnx(source: Path, path: Path) -> None:
    """Export the picture tower of a CLIP folder: pixels in under the name `input`, features out, any batch size."""
    from transformers import CLIPVisionModelWithProjection

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = CLIPVisionModelWithProjection.from_pretrained(source).eval()

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.tower(input).image_embeds

    path.parent.mkdir(parents=True)
    batch = torch.export.Dim("batch", min=1, max=256)
    torch.onnx.export(
        Features().eval(),
        (torch.zeros(2, 3, PIXELS, PIXELS),),
        path,
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes={"input": {0: batch}},
        dynamo=True,
        verbose=False,
    )
