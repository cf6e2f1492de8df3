"""The options of a run, declared once for the command line, for Python and for `settings.json`.

Place in the flow: `command -> config (here) -> settings, run`. Imports neither torch nor transformers, so that --help
is printed at once.
"""

# ruff: noqa: RUF009  (`_option` returns a dataclass field)

import argparse
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from os.path import expanduser
from typing import Any, Literal, get_args

Preset = Literal["full", "lit", "heads", "lora"]
Loss = Literal["softmax", "sigmoid"]
Precision = Literal["fp32", "bf16", "fp16"]
ScratchSize = Literal["tiny", "small"]

START = "start (one of three)"
DATA = "data"
TRAINING = "training (what is left out is chosen by model, data and machine)"
MACHINE = "machine"
RESULT = "result"


def _number(kind: type, is_allowed: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not is_allowed(value):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return number


def _option(group: str, help: str, *, default: Any = None, **argument: Any) -> Any:
    """Declare a field that is also an option; `argument` goes to argparse's `add_argument`."""
    return field(default=default, metadata={"group": group, "argument": {"help": help, **argument}})


_PATH: dict[str, Any] = {"type": expanduser}
_SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
_COUNT: dict[str, Any] = {"type": _number(int, lambda value: value > 0, "above 0")}
_RATE: dict[str, Any] = {"type": _number(float, lambda value: 0 < value < float("inf"), "above 0")}
_SHARE: dict[str, Any] = {"type": _number(float, lambda value: 0 <= value <= 1, "between 0 and 1")}
_DECAY: dict[str, Any] = {"type": _number(float, lambda value: 0 <= value <= 10, "between 0 and 10")}
_SEED: dict[str, Any] = {"type": _number(int, lambda value: 0 <= value < 2**32, "between 0 and 4294967295")}
_WORKERS: dict[str, Any] = {"type": _number(int, lambda value: 0 <= value <= 1024, "between 0 and 1024")}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning; `settings.complete` chooses the fields that are None."""

    model: str | None = _option(START, "checkpoint folder or Hub id", **_PATH)
    vision: str | None = _option(START, "vision tower to join with --text: folder or Hub id", **_PATH)
    text: str | None = _option(START, "text tower", **_PATH)
    scratch: ScratchSize | None = _option(START, "a ViT and a BERT with random weights", choices=get_args(ScratchSize))

    data: str = _option(DATA, "folder, annotation file, shards or Hub id of captioned images", default=MISSING, **_PATH)
    format: str | None = _option(DATA, "of the data, if the one found is wrong (see alignment/data)")
    split: str | None = _option(DATA, "what to learn from (train, and what is in no split)")
    eval_data: str | None = _option(DATA, "other data to measure on (the dev split, else a part held out)", **_PATH)
    eval_split: str | None = _option(DATA, "its split, or that of --data")
    second_data: str | None = _option(DATA, "data of another kind, to measure what the model forgets", **_PATH)
    second_split: str | None = _option(DATA, "its split")
    max_megapixels: int | None = None
    max_aspect_ratio: int | None = None

    preset: Preset | None = _option(
        TRAINING, "train all, all but the image tower, the heads, or low-rank adapters", choices=get_args(Preset)
    )
    loss: Loss | None = _option(TRAINING, "CLIP's or SigLIP's; as the model was trained", choices=get_args(Loss))
    minutes: float | None = _option(TRAINING, "end within this time, with the best weights so far", **_RATE)
    epochs: float | None = _option(TRAINING, "passes over the pictures", **_RATE)
    max_steps: int | None = _option(TRAINING, "optimiser steps at most", **_COUNT)
    batch_size: int | None = _option(TRAINING, "pictures contrasted with each other (up to 256)", **_COUNT)
    chunk_size: int | None = _option(TRAINING, "pictures in memory together; same result, less memory", **_COUNT)
    captions_per_image: int | None = _option(TRAINING, "captions of a picture in one step", **_COUNT)
    learning_rate: float | None = _option(TRAINING, "peak, of the towers", **_RATE)
    head_learning_rate: float | None = _option(TRAINING, "peak, of projections and adapters", **_RATE)
    weight_decay: float | None = _option(TRAINING, "of matrices (0.05)", **_DECAY)
    warmup: float | None = _option(TRAINING, "share of the steps with a rising learning rate (0.1)", **_SHARE)
    patience: int | None = _option(TRAINING, "measurements without a better recall sum (5)", **_COUNT)
    measure_every: int | None = _option(TRAINING, "steps between measurements, each with a checkpoint", **_COUNT)
    augment: bool | None = _option(TRAINING, "crop and mirror pictures (yes)", **_SWITCH)
    interpolate: bool | None = _option(TRAINING, "mix start and end weights, WiSE-FT (yes if pretrained)", **_SWITCH)
    seed: int | None = _option(TRAINING, "of everything random (0)", **_SEED)

    device: str | None = _option(MACHINE, "the best there is", choices=["cuda", "mps", "cpu"])
    precision: Precision | None = _option(
        MACHINE, "of the forward pass; bf16 on a GPU that has it", choices=get_args(Precision)
    )
    workers: int | None = _option(MACHINE, "processes that read pictures", **_WORKERS)
    gradient_checkpointing: bool | None = _option(MACHINE, "less memory, more time", action="store_true")
    keep_images: bool | None = _option(MACHINE, "cache frozen image features (yes where that saves time)", **_SWITCH)
    kept_folder: str | None = _option(MACHINE, "folder of that cache, for several runs to share", **_PATH)

    output: str = _option(RESULT, "folder for model, report, plots and logs; must be new", default=MISSING, **_PATH)
