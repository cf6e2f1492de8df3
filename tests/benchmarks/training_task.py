"""What the contenders of `training_speed.py` train on: the same pictures, captions and start model, in each one's form.

The pictures are drawn (noise of several grains, with shapes on it: a JPEG of it weighs about what a photo does), or
taken from a Flickr8k folder. The model is a small CLIP from random weights, once as transformers saves it and once as
open_clip reads it, with the same tokens and the same number of parameters.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

WIDTH, HEADS, PIXELS, PATCH = 192, 3, 224, 32
VISION_LAYERS, TEXT_LAYERS = 6, 4
SHAPES = ("ellipse", "rectangle")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
PLACES = ("in the top left corner", "in the middle", "near the bottom", "at the right edge of a noisy picture")


def draw_pictures(folder: Path, count: int, size: tuple[int, int]) -> list[tuple[Path, str]]:
    """Save `count` different JPEGs of (width, height) and caption each."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    pairs = []
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = Image.fromarray(rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)).resize(size)
        image = Image.blend(image, grain, 0.3)
        shape, colour, place = (str(rng.choice(names)) for names in (SHAPES, COLOURS, PLACES))
        start, extent = rng.uniform(0.0, 0.6, 2), rng.uniform(0.1, 0.4, 2)
        box = [float(value) for value in (*(start * size), *((start + extent) * size))]
        getattr(ImageDraw.Draw(image), shape)(box, fill=colour)
        path = folder / f"{number:05}.jpg"
        image.save(path, quality=90)
        pairs.append((path, f"A {colour} {shape} number {number} {place}."))
    return pairs


def read_flickr8k(folder: Path, count: int) -> list[tuple[Path, str]]:
    """Take the first caption of the first `count` pictures of Flickr8k's training list."""
    texts = folder / "Flickr8k_text"
    lines = (texts / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    first = dict(line.split("\t", 1) for line in lines if "#0\t" in line)
    names = (texts / "Flickr_8k.trainImages.txt").read_text().split()[:count]
    if len(names) < count:
        raise SystemExit(f"{folder} has {len(names)} training pictures; the run needs {count}. Take fewer --steps.")
    return [(folder / "Flicker8k_Dataset" / name, first[f"{name}#0"]) for name in names]


def write_table(pairs: list[tuple[Path, str]], path: Path) -> Path:
    """Write a CSV with one row per picture, under the column names that all three understand."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "caption"))
        rows.writerows((str(picture.resolve()), caption) for picture, caption in pairs)
    return path


def save_models(folder: Path, context_length: int) -> tuple[Path, Path]:
    """Save the start model for transformers and ours, and the same shape for open_clip."""
    ours, theirs = folder / "model", folder / "open_clip_model"
    parameters = _save_clip(ours, context_length), _save_open_clip(theirs, context_length)
    if parameters[0] != parameters[1]:
        raise RuntimeError(
            f"The models differ: {parameters[0]} parameters for transformers, {parameters[1]} for open_clip"
        )
    print(f"model: {parameters[0]:,} parameters, of them {49408 * WIDTH:,} word embeddings")
    return ours, theirs


def _save_clip(folder: Path, context_length: int) -> int:
    tokenizer = _tokenizer(context_length)
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS, "hidden_act": "gelu"}
    vision = {**tower, "num_hidden_layers": VISION_LAYERS, "image_size": PIXELS, "patch_size": PATCH}
    text = {
        **tower,
        "num_hidden_layers": TEXT_LAYERS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": context_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    for part in (model, CLIPImageProcessor(), tokenizer):
        part.save_pretrained(folder)
    return model.num_parameters()


def _save_open_clip(folder: Path, context_length: int) -> int:
    vision = {"layers": VISION_LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH}
    text = {"context_length": context_length, "vocab_size": 49408, "width": WIDTH, "heads": HEADS}
    config = {
        "embed_dim": WIDTH,
        "vision_cfg": {**vision, "image_size": PIXELS},
        "text_cfg": {**text, "layers": TEXT_LAYERS},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    return sum(parameter.numel() for parameter in model.parameters())


def _tokenizer(context_length: int) -> CLIPTokenizer:
    """Rebuild CLIP's tokenizer from the vocabulary that open_clip ships, and see that both read a text alike."""
    original = open_clip.tokenizer.SimpleTokenizer(context_length=context_length)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {names.get(token, token): index for token, index in original.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=list(original.bpe_ranks), model_max_length=context_length)
    text = "Two dogs' balls, 12 of them: rolling!"
    if tokenizer(text).input_ids != original([text])[0][: len(tokenizer(text).input_ids)].tolist():
        raise RuntimeError("transformers and open_clip read the same text as different tokens.")
    return tokenizer
