"""Put the trained parts together and write them as `checkpoints/compact`.

Place in the flow: the end of `python -m alignment.compact`. What stays frozen lies in a file of its own, so that a new
training rewrites only the small one.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SiglipImageProcessor

from alignment.compact.recipe import Aligner, Recipe
from alignment.model import DualEncoder
from alignment.model.composition import ComposedConfig, ComposedModel
from alignment.preprocess import Preprocessor, TokenizerSpec
from alignment.towers import (
    AlignmentHead,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    NgramTextConfig,
    NgramTextModel,
)

FROZEN = (
    *(f"vision_model.{part}." for part in ("stem", "trunk", "concept.tail", "concept.classifier")),
    *(f"text_model.{part}" for part in ("table.", "input", "branches.", "token_norm.", "pool.", "sentence.")),
)
FILES = {True: "frozen.safetensors", False: "trained.safetensors"}


def compact_preprocessor(tokenizer: PreTrainedTokenizerFast, image_size: int) -> Preprocessor:
    """Squeeze pictures to a square (no edge is lost), scale to [-1, 1]; tokenize with the text tower's pieces."""
    image_processor = SiglipImageProcessor(
        size={"height": image_size, "width": image_size}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Preprocessor(image_processor, tokenizer, TokenizerSpec(positions=tokenizer.model_max_length))


def assemble(
    plain_image: EfficientNetLiteModel,
    plain_text: NgramTextModel,
    aligner: Aligner,
    text_head: AlignmentHead,
    class_embeds: Tensor,
    center: Tensor,
    recipe: Recipe,
) -> ComposedModel:
    """Join the plain towers, the tuned tail and the heads into one dual encoder.

    The plain image tower's own tail stays in the concept branch, which says of each class the embedding in
    `class_embeds` (num_classes, sentence_dim); `center` (sentence_dim,) is what the embeddings of all names share.
    """
    embed_dim, width = text_head.summary.out.out_features, plain_text.config.sentence_dim
    image_config = EfficientNetLiteConfig(embed_dim=embed_dim, concept_dim=width, concept_weight=recipe.image_weight)
    image = EfficientNetLiteModel(image_config)
    text = NgramTextModel(NgramTextConfig(embed_dim=embed_dim, concept_weight=recipe.text_weight))
    state = plain_image.state_dict()
    concept = {f"concept.{name}": value for name, value in state.items() if name.startswith(("tail.", "classifier."))}
    trunk = {name: value for name, value in state.items() if name.startswith(("stem.", "trunk."))}
    trained = _under("tail.", aligner.tail) | _under("head.", aligner.head)
    image.load_state_dict(concept | trunk | trained | {"concept.class_embeds": class_embeds})
    concept_norm = {"concept_norm.mean": center, "concept_norm.deviation": torch.ones_like(center)}
    text.load_state_dict(plain_text.state_dict() | _under("head.", text_head) | concept_norm)
    config = ComposedConfig(
        vision_config=image.config,
        text_config=text.config,
        projection="none",
        projection_dim=embed_dim + width,
        text_pooling="pooler",
        vision_width=embed_dim + width,
        text_width=embed_dim + width,
    )
    model = ComposedModel(config, image, text)
    model.logit_scale.data.copy_(aligner.logit_scale.detach())
    return model.eval()


def save_compact(model: ComposedModel, preprocessor: Preprocessor, folder: Path) -> DualEncoder:
    """Write the checkpoint in half precision, frozen and trained weights apart, and load it back.

    The frozen file is left alone where it already holds the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: _halved(name, value) for name, value in model.state_dict().items()}
    weight_map = {name: FILES[name.startswith(FROZEN)] for name in state}
    for file in FILES.values():
        part = {name: value for name, value in state.items() if weight_map[name] == file}
        path, fresh = folder / file, folder / f"{file}.new"
        save_file(part, fresh, metadata={"format": "pt"})
        if path.exists() and path.read_bytes() == fresh.read_bytes():
            fresh.unlink()
        else:
            os.replace(fresh, path)
        path.chmod(0o644)
    size = sum(value.numel() * value.element_size() for value in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    preprocessor.save(folder)
    _slim(folder / "tokenizer.json")
    return DualEncoder.load(folder)


def _halved(name: str, value: Tensor) -> Tensor:
    """Keep the 8-bit table, the handful of its scales and the logit scale; all else fits half precision."""
    keep = not value.is_floating_point() or name.endswith((".table.scale", ".table.offset", "logit_scale"))
    return value.contiguous() if keep else value.to(torch.float16).contiguous()


def _slim(path: Path) -> None:
    """Write the tokenizer without white space, its scores with the digits a float32 has: 3.5 MB instead of 8.7."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    model["vocab"] = [[piece, float(str(np.float32(score)))] for piece, score in model["vocab"]]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _under(prefix: str, module: torch.nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in module.state_dict().items()}
