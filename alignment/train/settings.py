"""What a fine-tuning may vary, and what is chosen where a person says nothing.

Place in the flow: `command -> settings (here) -> run`. Rates, batch and length depend on the kind of model, the size
of the data set and the machine; every choice can be overruled by an option of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from alignment.model import DualEncoder
from alignment.train.objective import Loss
from alignment.train.presets import Preset

Kind = Literal["pretrained", "compact", "composed", "scratch"]
Precision = Literal["fp32", "bf16", "fp16"]

LARGE = 50e6  # weights
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class TrainConfig:
    """One fine-tuning; what is None is chosen by `complete`.

    Attributes:
        data: folder, annotation file or Hub id of the captioned images.
        output: folder for the result.
        model: checkpoint to start from.
        vision, text: two towers to join instead.
        scratch: or the size of a small model with random weights ("tiny", "small").
        format, split: of the data; splits other than "train" and "" are left out if there is a train split.
        eval_data, eval_split: what is measured to stop and to choose by; else the dev split, or a part held out.
        max_megapixels, max_aspect_ratio: of the pictures that are opened.
        second_data, second_split: another data set, measured before and after: what fine-tuning makes one forget.
        preset: what is trained, see `presets.apply_preset`.
        loss: "softmax" (InfoNCE) or "sigmoid" (SigLIP); the one the model was trained with.
        epochs, max_steps, minutes: length; the shortest counts.
        batch_size: images contrasted with each other, over all processes.
        chunk_size: images in memory together; smaller needs less memory, more time, and changes nothing else.
        captions_per_image: captions of an image in one step.
        learning_rate, head_learning_rate: peak rates of the towers, and of projections and adapters.
        weight_decay: of matrices.
        warmup: share of the steps in which the rates rise.
        augment: crop and mirror pictures.
        keep_images: compute what is frozen of the image side once.
        kept_folder: where to; runs that share it share the work. By default below `output`, and gone afterwards.
        measure_every: steps between two measurements (and checkpoints).
        patience: measurements without a better recall sum before training stops.
        interpolate: choose between start and end weights afterwards (WiSE-FT).
        precision: of the forward pass.
        gradient_checkpointing: less memory, more time.
        workers: processes that read pictures.
        device: "cuda", "mps" or "cpu".
        seed: of everything random.
    """

    data: str
    output: str
    model: str | None = None
    vision: str | None = None
    text: str | None = None
    scratch: str | None = None
    format: str | None = None
    split: str | None = None
    eval_data: str | None = None
    eval_split: str | None = None
    second_data: str | None = None
    second_split: str | None = None
    max_megapixels: int | None = None
    max_aspect_ratio: int | None = None
    preset: Preset | None = None
    loss: Loss | None = None
    epochs: float | None = None
    max_steps: int | None = None
    minutes: float | None = None
    batch_size: int | None = None
    chunk_size: int | None = None
    captions_per_image: int | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    weight_decay: float | None = None
    warmup: float | None = None
    augment: bool | None = None
    keep_images: bool | None = None
    kept_folder: str | None = None
    measure_every: int | None = None
    patience: int | None = None
    interpolate: bool | None = None
    precision: Precision | None = None
    gradient_checkpointing: bool | None = None
    workers: int | None = None
    device: str | None = None
    seed: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Read a config back.

        Raises:
            ValueError: on names it does not know.
        """
        unknown = set(values) - {known.name for known in fields(cls)}
        if unknown:
            raise ValueError(f"Unknown settings: {', '.join(sorted(unknown))}.")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-able copy."""
        return asdict(self)


@dataclass(frozen=True)
class Recipe:
    """What a run does: a `TrainConfig` with every choice made; the same names mean the same.

    Attributes:
        max_steps: optimiser steps of the whole run.
    """

    preset: Preset
    loss: Loss
    max_steps: int
    batch_size: int
    chunk_size: int
    captions_per_image: int
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    warmup: float
    augment: bool
    keep_images: bool
    measure_every: int
    patience: int
    interpolate: bool
    precision: Precision
    gradient_checkpointing: bool
    workers: int
    seed: int


def kind_of(config: TrainConfig, encoder: DualEncoder) -> Kind:
    """Tell what sort of start this is."""
    if config.scratch:
        return "scratch"
    if config.vision:
        return "composed"
    return "compact" if hasattr(encoder.module.vision_model, "held") else "pretrained"


# Peak rates (towers, heads) for about ten passes over thousands of images. CLIP and its kin were trained on hundreds of
# millions of pairs and bear only small steps (notes of their users: 1e-6 to 5e-5); fresh projections need large ones.
_RATES: dict[tuple[Kind, Preset], tuple[float, float]] = {
    ("pretrained", "full"): (5e-6, 5e-6),
    ("pretrained", "lit"): (1e-5, 1e-5),
    ("pretrained", "heads"): (1e-4, 1e-4),
    ("pretrained", "lora"): (1e-4, 1e-4),
    ("compact", "full"): (1e-4, 1e-4),
    ("compact", "lit"): (1e-4, 1e-4),
    ("compact", "heads"): (1e-4, 1e-4),
    ("composed", "full"): (3e-5, 1e-3),
    ("composed", "lit"): (3e-5, 1e-3),
    ("composed", "heads"): (1e-3, 1e-3),
    ("composed", "lora"): (5e-4, 1e-3),
    ("scratch", "full"): (3e-4, 3e-4),
}
# Measured on the compact model: 512 pictures at once, a quarter of the steps, learn less in the same passes than 128.
_LARGEST: dict[Kind, int] = {"pretrained": 256, "compact": 128, "composed": 256, "scratch": 128}
_EPOCHS: dict[Kind, int] = {"pretrained": 10, "compact": 10, "composed": 15, "scratch": 30}


def complete(config: TrainConfig, encoder: DualEncoder, num_images: int, *, num_processes: int = 1) -> Recipe:
    """Choose what a person left open.

    Args:
        config: with Nones.
        encoder: the start.
        num_images: images to train on.
        num_processes: that share a batch, each an equal part.

    Raises:
        ValueError: on values that make no sense together, in one sentence.
    """
    kind, on_cpu = kind_of(config, encoder), encoder.device.type == "cpu"
    # A laptop tunes a small image tower in minutes and a large one in days: there it stays locked unless asked for.
    preset = config.preset or ("lit" if on_cpu and kind in ("pretrained", "composed") else "full")
    if (kind, preset) not in _RATES:
        raise ValueError(f"Preset {preset!r} is not for a {kind} model; choose {_presets_of(kind)}.")
    loss = config.loss or ("softmax" if encoder.logit_bias is None else "sigmoid")
    if loss == "sigmoid" and encoder.logit_bias is None:
        raise ValueError(f"{encoder.name} has no logit bias, which the sigmoid loss needs; choose --loss softmax.")
    rate, head_rate = _RATES[kind, preset]
    batch_size = min(config.batch_size or _batch_size(num_images, _LARGEST[kind]), num_images)
    batch_size = max(1, batch_size // num_processes) * num_processes
    if batch_size < 2:
        raise ValueError("--batch-size 1 has no second caption to tell a picture's from: choose 2 or more.")
    precision = _precision(config.precision, encoder.device.type)
    steps_per_epoch = max(1, num_images // batch_size)
    steps = max(1, round((config.epochs or _EPOCHS[kind]) * steps_per_epoch))
    if config.max_steps:
        steps = min(steps, config.max_steps) if config.epochs else config.max_steps
    measure_every = config.measure_every or max(steps_per_epoch, math.ceil(steps / 15))
    return Recipe(
        preset=preset,
        loss=loss,
        max_steps=steps,
        batch_size=batch_size,
        chunk_size=min(config.chunk_size or (64 if on_cpu and _is_large(encoder, preset) else batch_size), batch_size),
        captions_per_image=config.captions_per_image or (3 if kind == "compact" else 1),
        learning_rate=config.learning_rate or rate,
        head_learning_rate=config.head_learning_rate or config.learning_rate or head_rate,
        weight_decay=0.05 if config.weight_decay is None else config.weight_decay,
        warmup=0.1 if config.warmup is None else config.warmup,
        augment=config.augment is not False,
        keep_images=(on_cpu or preset in ("lit", "heads")) if config.keep_images is None else config.keep_images,
        measure_every=min(measure_every, steps),
        patience=config.patience or 5,
        interpolate=kind in ("pretrained", "compact") if config.interpolate is None else config.interpolate,
        precision=precision,
        gradient_checkpointing=bool(config.gradient_checkpointing),
        workers=(0 if on_cpu else 4) if config.workers is None else config.workers,
        seed=config.seed or 0,
    )


def _presets_of(kind: Kind) -> str:
    return " or ".join(repr(preset) for known, preset in _RATES if known == kind)


def _is_large(encoder: DualEncoder, preset: Preset) -> bool:
    """Tell whether a whole batch's activations would fill a laptop: with a large image tower in training."""
    return preset in ("full", "lora") and sum(weight.numel() for weight in encoder.module.parameters()) > LARGE


def _batch_size(num_images: int, largest: int) -> int:
    """Choose a power of two that leaves some ten steps a pass, from 16 on."""
    return int(min(largest, max(16, 2 ** int(math.log2(max(num_images / 10, 1))))))


def _precision(wanted: Precision | None, device: str) -> Precision:
    """Choose the precision, or check the one asked for."""
    bf16 = device != "cuda" or torch.cuda.is_bf16_supported()
    if wanted == "fp16" and device != "cuda":
        raise ValueError(f"--precision fp16 needs an NVIDIA GPU, and this runs on {device}: choose fp32 or bf16.")
    if wanted == "bf16" and not bf16:
        raise ValueError("--precision bf16 needs a newer GPU than this one: choose fp16 or fp32.")
    return wanted or ("fp32" if device != "cuda" else "bf16" if bf16 else "fp16")
