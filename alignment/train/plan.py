"""The plan of a run, made from the data, the recipe and a step tried out, printed before training and recorded.

Place in the flow: `phases` makes it; `record` keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignment.train.settings import TrainRecipe


@dataclass(frozen=True)
class Plan:
    """The sizes of a run, and its cost estimated from one step; `peak_memory_bytes` is the GPU's if there is one."""

    train_images: int
    train_captions: int
    eval_images: int
    eval_captions: int
    steps: int
    epochs: float
    batch_size: int
    chunk_size: int
    processes: int
    trainable_parameters: int
    total_parameters: int
    device: str
    precision: str
    estimated_seconds: float
    peak_memory_bytes: int


_TRAINED = {"full": "both sides", "lit": "the text side", "heads": "the heads", "lora": "low-rank adapters"}


def plan_text(plan: Plan, recipe: TrainRecipe, model: str, evaluation: str) -> str:
    """Format the plan; `model` is the start model, `evaluation` the source of the validation data."""
    chunks = f"{plan.chunk_size} at a time in memory" if plan.chunk_size < plan.batch_size else "all in memory at once"
    heads = f", heads {recipe.head_learning_rate:g}" if recipe.head_learning_rate != recipe.learning_rate else ""
    processes = f", {plan.processes} processes" if plan.processes > 1 else ""
    return (
        f"Fine-tuning {model} ({recipe.preset}: {_TRAINED[recipe.preset]}, {plan.trainable_parameters / 1e6:.1f} of "
        f"{plan.total_parameters / 1e6:.1f} million weights), {recipe.loss} loss, "
        f"learning rate {recipe.learning_rate:g}{heads}\n"
        f"  learns from  {plan.train_images} pictures, {plan.train_captions} captions\n"
        f"  measured on  {plan.eval_images} pictures, {plan.eval_captions} captions ({evaluation})\n"
        f"  steps        {plan.steps} ({plan.epochs:g} passes) of {plan.batch_size} pictures, {chunks}{processes}\n"
        f"  takes about  {format_duration(plan.estimated_seconds)} on {plan.device} in {plan.precision}, measured "
        f"every {recipe.measure_every} steps; {plan.peak_memory_bytes / 2**30:.1f} GiB of memory in a trial step"
    )


def format_duration(seconds: float) -> str:
    """Format a time as 42 s, 12 min or 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
