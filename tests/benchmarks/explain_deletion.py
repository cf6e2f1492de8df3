"""The deletion test over a Flickr8k folder: `python tests/benchmarks/explain_deletion.py --data FOLDER`.

For each picture and one of its captions the relevance is computed, places are taken out (most relevant first, at
random, least relevant first) and the cosine is followed: the lower the area under the first curve, the better the
relevance. Also what the same picture's relevance amounts to for the caption of another picture. Intervals are 95 %
bootstrap intervals over pictures. `--methods` names several to compare them on the same pictures, `--fast` runs the
encoder in bf16 (the figures move in the third place), `--json` keeps the figures of each picture.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from alignment.evaluate.retrieval import bootstrap, estimates
from alignment.explain import patch_relevance
from alignment.model import DualEncoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deletion import deletion_curves

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with Flicker8k_Dataset and Flickr8k_text")
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "compact"))
    parser.add_argument("--methods", nargs="+", choices=("gradient", "occlusion"), default=["gradient"])
    parser.add_argument("--fills", nargs="+", choices=("blur", "mean"), default=["blur"])
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    encoder = DualEncoder.load(arguments.model, device="cpu")
    if arguments.fast:
        encoder.module.to(memory_format=torch.channels_last)
    rows: list[Row] = []
    pairs = drawn_pairs(arguments.data, arguments.pictures, arguments.seed)
    for number, (path, caption) in enumerate(pairs):
        foreign = pairs[number - 1][1]
        with torch.autocast("cpu", dtype=torch.bfloat16) if arguments.fast else nullcontext():
            rows.append(measured(encoder, path, caption, foreign, arguments.methods, arguments.fills))
        if arguments.json:
            arguments.json.write_text(json.dumps(rows), encoding="utf-8")
    print(f"{len(rows)} pictures, {arguments.model}, seed {arguments.seed}")
    for line in table(rows, arguments.resamples, arguments.seed):
        print(line)


def drawn_pairs(folder: Path, count: int, seed: int) -> list[tuple[Path, str]]:
    """Draw dev pictures, one caption each."""
    captions: dict[str, list[str]] = {}
    for line in (folder / "Flickr8k_text" / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
        key, caption = line.split("\t")
        captions.setdefault(key.split("#")[0], []).append(caption)
    names = (folder / "Flickr8k_text" / "Flickr_8k.devImages.txt").read_text(encoding="utf-8").split()
    rng = random.Random(seed)
    rng.shuffle(names)
    return [(folder / "Flicker8k_Dataset" / name, rng.choice(captions[name])) for name in names[:count]]


def measured(encoder: DualEncoder, path: Path, caption: str, foreign: str, methods: list[str], fills: list[str]) -> Row:
    """Measure one picture: areas, the sums of its relevance for its own and a foreign caption, seconds."""
    row: Row = {}
    for method in methods:
        started = time.process_time()
        relevance = patch_relevance(encoder, path, [caption, foreign], method=method)  # type: ignore[arg-type]
        row[f"{method}: CPU seconds"] = time.process_time() - started
        row["cosine, own caption"], row["cosine, foreign caption"] = relevance.cosines
        for name, grid in zip(("own", "foreign"), relevance.grid, strict=True):
            row[f"{method}: peak, {name} caption"] = float(grid.max())
            row[f"{method}: mean of what is positive, {name} caption"] = float(grid.clip(min=0).mean())
        for fill in fills:
            curves = deletion_curves(encoder, path, caption, relevance.grid[0], fill=fill)  # type: ignore[arg-type]
            most, anything, least = (curves.area(curve) for curve in (curves.most, curves.random, curves.least))
            row[f"area, {fill}: random"] = anything
            row[f"area, {fill}: {method}"] = most
            row[f"area, {fill}: {method}, least relevant first"] = least
            row[f"area, {fill}: random minus {method}"] = anything - most
    return row


def table(rows: list[Row], resamples: int, seed: int) -> list[str]:
    """Put the mean of each figure and its interval on a line."""
    figures = {name: torch.tensor([row[name] for row in rows], dtype=torch.double) for name in rows[0]}

    def means(draws: Tensor) -> Row:
        return {name: float((values * draws).sum() / draws.sum()) for name, values in figures.items()}

    found = estimates(bootstrap(means, len(rows), resamples=resamples, seed=seed))
    return [f"{name:55} {one.value:.4f}  [{one.low:.4f}, {one.high:.4f}]" for name, one in sorted(found.items())]


if __name__ == "__main__":
    main()
