"""The plan of a run as text, printed before training, and times for people to read.

Place in the flow: `phases` makes the plan from the data, the recipe and a step tried out; `record` keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.train.settings import TrainRecipe

_TRAINED = {"full": "both sides", "lit": "the text side", "heads": "the heads", "lora": "low-rank adapters"}


def plan_text(plan: Mapping[str, Any], recipe: TrainRecipe, model: str, evaluation: str) -> str:
    """Format the plan; `model` is the start model, `evaluation` the source of the validation data."""
    chunks = (
        f"{recipe.chunk_size} at a time in memory" if recipe.chunk_size < recipe.batch_size else "all in memory at once"
    )
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
