"""The defaults of a run: everything that a `TrainConfig` leaves open is chosen here, and shown before training.

Place in the flow: `config -> settings (here) -> run`. Rates, batch and length depend on the kind of model, the size of
the data set and the machine.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from alignment.model import DualEncoder
from alignment.train.config import Loss, Precision, Preset, TrainConfig

Kind = Literal["pretrained", "compact", "composed", "scratch"]

LARGE = 50e6  # weights
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class TrainRecipe:
    """A `TrainConfig` with every choice made, by the same names; `max_steps` is the length of the whole run."""

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
    """Classify the start model."""
    if config.scratch:
        return "scratch"
    if config.vision:
        return "composed"
    return "compact" if hasattr(encoder.module.vision_model, "held") else "pretrained"


# Peak rates (towers, heads) for about ten passes over thousands of images. CLIP models were trained on hundreds of
# millions of pairs and tolerate only small steps (published fine-tunings: 1e-6 to 5e-5); fresh projections need large
# ones.
_RATES: dict[Kind, dict[Preset, tuple[float, float]]] = {
    "pretrained": {"full": (5e-6, 5e-6), "lit": (1e-5, 1e-5), "heads": (1e-4, 1e-4), "lora": (1e-4, 1e-4)},
    "compact": {"full": (1e-4, 1e-4), "lit": (1e-4, 1e-4), "heads": (1e-4, 1e-4)},
    "composed": {"full": (3e-5, 1e-3), "lit": (3e-5, 1e-3), "heads": (1e-3, 1e-3), "lora": (5e-4, 1e-3)},
    "scratch": {"full": (3e-4, 3e-4)},
}
# Measured on the compact model: 512 pictures at once, a quarter of the steps, learn less in the same passes than 128.
_LARGEST: dict[Kind, int] = {"pretrained": 256, "compact": 128, "composed": 256, "scratch": 128}
_EPOCHS: dict[Kind, int] = {"pretrained": 10, "compact": 10, "composed": 15, "scratch": 30}


def complete(config: TrainConfig, encoder: DualEncoder, num_images: int, *, num_processes: int = 1) -> TrainRecipe:
    """Choose the settings that are None, for a start model and `num_images` to train on.

    `num_processes` share a batch, each an equal part. Raises ValueError on settings that contradict each other.
    """
    kind, on_cpu = kind_of(config, encoder), encoder.device.type == "cpu"
    # On a CPU a small image tower trains in minutes and a large one in days, so a large one is locked by default.
    preset = config.preset or ("lit" if on_cpu and kind in ("pretrained", "composed") else "full")
    if preset not in _RATES[kind]:
        allowed = " or ".join(map(repr, _RATES[kind]))
        raise ValueError(f"Preset {preset!r} is not for a {kind} model; choose {allowed}.")
    loss = config.loss or ("softmax" if encoder.logit_bias is None else "sigmoid")
    if loss == "sigmoid" and encoder.logit_bias is None:
        raise ValueError(f"{encoder.name} has no logit bias, which the sigmoid loss needs; choose --loss softmax.")
    rate, head_rate = _RATES[kind][preset]
    # A power of two that leaves some ten steps per epoch, from 16 on.
    batch_size = config.batch_size or min(_LARGEST[kind], max(16, 2 ** int(math.log2(max(num_images / 10, 1)))))
    batch_size = max(1, min(batch_size, num_images) // num_processes) * num_processes
    if batch_size < 2:
        raise ValueError("--batch-size 1 has no second caption to tell a picture's from: choose 2 or more.")
    steps_per_epoch = max(1, num_images // batch_size)
    steps = max(1, round((config.epochs or _EPOCHS[kind]) * steps_per_epoch))
    if config.max_steps:
        steps = min(steps, config.max_steps) if config.epochs else config.max_steps
    measure_every = config.measure_every or max(steps_per_epoch, math.ceil(steps / 15))
    # The activations of a whole batch would fill a laptop's memory where a large image tower is trained.
    is_large = preset in ("full", "lora") and sum(weight.numel() for weight in encoder.module.parameters()) > LARGE
    chunk_size = config.chunk_size or (64 if on_cpu and is_large else batch_size)
    return TrainRecipe(
        preset=preset,
        loss=loss,
        max_steps=steps,
        batch_size=batch_size,
        chunk_size=min(chunk_size, batch_size),
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
        precision=_precision(config.precision, encoder.device.type),
        gradient_checkpointing=bool(config.gradient_checkpointing),
        workers=(0 if on_cpu else 4) if config.workers is None else config.workers,
        seed=config.seed or 0,
    )


def _precision(wanted: Precision | None, device: str) -> Precision:
    has_bf16 = device != "cuda" or torch.cuda.is_bf16_supported()
    if wanted == "fp16" and device != "cuda":
        raise ValueError(f"--precision fp16 needs an NVIDIA GPU, and this runs on {device}: choose fp32 or bf16.")
    if wanted == "bf16" and not has_bf16:
        raise ValueError("--precision bf16 needs a newer GPU than this one: choose fp16 or fp32.")
    return wanted or ("fp32" if device != "cuda" else "bf16" if has_bf16 else "fp16")


_TRAINED = {"full": "both sides", "lit": "the text side", "heads": "the heads", "lora": "low-rank adapters"}


def plan_text(plan: Mapping[str, Any], recipe: TrainRecipe, model: str, evaluation: str) -> str:
    """Format the plan; `model` is the start model, `evaluation` the source of the validation data."""
    has_chunks = recipe.chunk_size < recipe.batch_size
    chunks = f"{recipe.chunk_size} at a time in memory" if has_chunks else "all in memory at once"
    heads = f", heads {recipe.head_learning_rate:g}" if recipe.head_learning_rate != recipe.learning_rate else ""
    processes = f", {plan['processes']} processes" if plan["processes"] > 1 else ""
    memory = plan["peak_memory_bytes"] / 2**30
    return (
        f"Fine-tuning {model} ({recipe.preset}: {_TRAINED[recipe.preset]}, {plan['trainable_parameters'] / 1e6:.1f} of "
        f"{plan['total_parameters'] / 1e6:.1f} million weights), {recipe.loss} loss, "
        f"learning rate {recipe.learning_rate:g}{heads}\n"
        f"  learns from  {plan['train_images']} pictures, {plan['train_captions']} captions\n"
        f"  measured on  {plan['eval_images']} pictures, {plan['eval_captions']} captions ({evaluation})\n"
        f"  steps        {recipe.max_steps} ({plan['epochs']:g} passes) of {recipe.batch_size} pictures, "
        f"{chunks}{processes}\n"
        f"  takes about  {format_duration(plan['estimated_seconds'])} on {plan['device']} in {recipe.precision}, "
        f"measured every {recipe.measure_every} steps; {memory:.1f} GiB of memory in a trial step"
    )


def format_duration(seconds: float) -> str:
    """Format a time as 42 s, 12 min or 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
