"""What each part of fine-tuning brings, on one's own data: `python tests/benchmarks/finetuning_study.py --help`.

Starts from the towers of the compact model as they were before captions (pretrained trunk and tail, fresh heads) and
trains heads alone in four ways, each from the same start per seed:

    rows      caption rows at random, every caption of another row a negative (what most trainers do)
    aware     each picture once, one caption; captions that fit it are never negatives
    several   the same with three captions of a picture in a step
    large     the same, contrasted with four times as many pictures by cached gradients

and from the end of `large` goes on for some passes with locked and with tuned towers. Everything runs through
`alignment.train`; weights and reports stay in --out, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from alignment.model import DualEncoder
from alignment.train import run
from alignment.train.config import TrainConfig
from alignment.train.dataset import CaptionIndex, ContrastiveDataset

HEADS = {  # of the 6,091 training pictures of Flickr8k 47 batches of 128 make a pass
    "rows": {"batch_size": 128, "captions_per_image": 1},
    "aware": {"batch_size": 128, "captions_per_image": 1},
    "several": {"batch_size": 128, "captions_per_image": 3},
    "large": {"batch_size": 512, "chunk_size": 128, "captions_per_image": 3},
}


class RowCaptionIndex(CaptionIndex):
    """Only the caption that was drawn with a picture fits it."""

    def positive_mask(self, rows: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.eye(len(rows), dtype=torch.bool)
        return own, torch.zeros_like(own)


class RowDataset(ContrastiveDataset):
    """ContrastiveDataset are captions, not pictures: one picture may come several times in a batch."""

    def pick(self, number: int, rng: np.random.Generator) -> tuple[int, list[int]]:
        count = len(self.captions.texts)
        epoch, place = divmod(number, count)
        caption = int(np.random.default_rng([self.seed, 0, epoch]).permutation(count)[place])
        return int(self.captions.image_of_text[caption]), [caption]


def fresh(model: str, folder: Path, seed: int) -> None:
    """Write the model with its pretrained tail and heads that have learnt nothing."""
    torch.manual_seed(seed)
    encoder = DualEncoder.load(model, device="cpu")
    vision, text = encoder.module.vision_model, encoder.module.text_model
    vision.tail.load_state_dict(vision.concept.tail.state_dict())
    for head in (vision.head, text.head):
        for layer in head.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        nn.init.normal_(head.value, std=head.value.shape[1] ** -0.5)
    encoder.module.logit_scale.data.fill_(math.log(1 / 0.07))
    encoder.save(folder)


def trained(config: TrainConfig, *, rows: bool = False) -> dict:
    """Run a fine-tuning, unless its record is there, and return the record."""
    record = Path(config.output, "run.json")
    if not record.exists():
        print(f"--- {config.output}", flush=True)
        resume = Path(config.output, "settings.json").exists()
        kinds = {"CaptionIndex": RowCaptionIndex, "ContrastiveDataset": RowDataset} if rows else {}
        with patch.multiple(run, **kinds) if rows else nullcontext():
            run.train(config, resume=resume, log=lambda line: print(line, flush=True))
    return json.loads(record.read_text(encoding="utf-8"))


def study(arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Run all variants for all seeds: name -> one record a seed."""
    found: dict[str, list[dict]] = {}
    for seed in range(arguments.seeds):
        folder = arguments.out / f"seed{seed}"
        start = folder / "start"
        if not (start / "tokenizer_config.json").exists():
            fresh(arguments.model, start, seed)
        plan = TrainConfig(
            data=arguments.data,
            output="",
            model=str(start),
            preset="heads",
            seed=seed,
            epochs=arguments.epochs,
            learning_rate=arguments.rate,
            kept_folder=str(arguments.out / "kept"),
            patience=100,
            interpolate=False,
            measure_every=arguments.measure_every,
        )
        for name, settings in HEADS.items():
            config = replace(plan, output=str(folder / name), **settings)
            found.setdefault(name, []).append(trained(config, rows=name == "rows"))
        onward = replace(plan, model=str(folder / "large"), epochs=arguments.tune_epochs, interpolate=True)
        onward = replace(onward, **HEADS["large"])
        for name, preset in (("locked", "heads"), ("tuned", "full")):
            config = replace(onward, output=str(folder / name), preset=preset, learning_rate=arguments.tune_rate)
            found.setdefault(name, []).append(trained(config))
    return found


def report(found: dict[str, list[dict]]) -> None:
    """Print mean and range over seeds, and the interpolation of the tuned runs."""
    metrics = {
        "i2t R@1": "image_to_text_recall@1",
        "i2t R@10": "image_to_text_recall@10",
        "t2i R@1": "text_to_image_recall@1",
        "t2i R@10": "text_to_image_recall@10",
        "sum": "recall_sum",
    }
    print("| |", " | ".join(metrics), "| minutes |\n|" + "---|" * (len(metrics) + 2))
    for name, records in found.items():
        cells = [_spread([100 * record["after"][metric]["value"] for record in records]) for metric in metrics.values()]
        minutes = statistics.mean(record["seconds"] for record in records) / 60
        print("|", name, "|", " | ".join(cells), f"| {minutes:.1f} |")
    for record in found["tuned"]:
        sums = {point["alpha"]: round(100 * point["recall_sum"], 1) for point in record["interpolation"]}
        print("interpolation:", sums, "kept", record["alpha"])


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a captioned data set with a train and a dev split")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and what they share")
    parser.add_argument("--model", default="checkpoints/compact")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=6, help="of heads alone")
    parser.add_argument("--measure-every", type=int, default=94, help="steps; the best measured weights count")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--tune-epochs", type=float, default=3, help="of going on")
    parser.add_argument("--tune-rate", type=float, default=3e-4)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    report(study(arguments))


if __name__ == "__main__":
    sys.exit(main())
