"""What a run will do, worked out before it begins and said in a few lines.

Place in the flow: `run` makes it from the data, the recipe and a step tried out; it lands in the record too.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignment.train.settings import Recipe
from alignment.train.trainer import duration


@dataclass(frozen=True)
class Plan:
    """What a run will do, as it is printed at the start; all of it lands in the report.

    Attributes:
        estimated_seconds: of training with its measurements, from a step tried out beforehand.
        peak_memory_bytes: of this process (the GPU's, where there is one) after that step.
    """

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


def plan_text(plan: Plan, recipe: Recipe, model: str, evaluation: str) -> str:
    """Say the plan to a person.

    Args:
        plan: the plan.
        recipe: what it was made for.
        model: name of the start.
        evaluation: where the validation data come from.
    """
    what = {"full": "both sides", "lit": "the text side", "heads": "the heads", "lora": "low-rank adapters"}
    together = (
        f"{plan.chunk_size} at a time in memory" if plan.chunk_size < plan.batch_size else "all in memory at once"
    )
    rates = f"{recipe.learning_rate:g}" + (
        f", heads {recipe.head_learning_rate:g}" if recipe.head_learning_rate != recipe.learning_rate else ""
    )
    return "\n".join(
        [
            f"Fine-tuning {model} ({recipe.preset}: {what[recipe.preset]}, {plan.trainable_parameters / 1e6:.1f} of "
            f"{plan.total_parameters / 1e6:.1f} million weights), {recipe.loss} loss, learning rate {rates}",
            f"  learns from  {plan.train_images} pictures, {plan.train_captions} captions",
            f"  measured on  {plan.eval_images} pictures, {plan.eval_captions} captions ({evaluation})",
            f"  steps        {plan.steps} ({plan.epochs:g} passes) of {plan.batch_size} pictures, {together}"
            + (f", {plan.processes} processes" if plan.processes > 1 else ""),
            f"  takes about  {duration(plan.estimated_seconds)} on {plan.device} in {plan.precision}, measured every "
            f"{recipe.measure_every} steps; {plan.peak_memory_bytes / 2**30:.1f} GiB of memory in a trial step",
        ]
    )
