"""Training speed against transformers' contrastive-image-text example and open_clip's trainer: `make bench-train`.

Each contender trains the same small CLIP (random weights, the same tokens and parameter count) with AdamW on the same
pictures, one caption each, with the same batch size, threads and data workers, in a process of its own; the order
rotates from run to run. One clock serves all (`step_clock.py`): images/s are those between the end of step `--first`
and the end of the last step, so that neither imports nor the first steps count, nor what comes after training. All
steps lie in one epoch. What a trainer does beyond that by default is its own affair and part of the comparison: the
peers pad every caption to `--context-length` tokens where we pad to the longest of a batch; open_clip and we crop at
random, the example from the middle; the example and we clip gradients.

Needs the environment that `make bench-train` builds: ours with the train extra, open_clip_torch[training], torchvision
and datasets. Measured so far on CPUs alone; with a GPU it takes that (`--device cpu` overrules).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NEEDED = ("torch", "torchvision", "transformers", "accelerate", "datasets", "open_clip", "webdataset", "pandas")
OURS = "alignment.train"
LR = 5e-5
HELD_OUT = 64  # pictures kept apart, since our trainer measures on some after training

Run = dict[str, float]


def main() -> None:
    arguments = parsed_arguments()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SystemExit(f"{sys.executable} lacks {', '.join(missing)}. Run `make bench-train`.")
    fill_in(arguments)
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
        compare(arguments, arguments.keep.resolve())
        return
    with TemporaryDirectory() as folder:
        compare(arguments, Path(folder))


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a Flickr8k folder; left out, the pictures are drawn")
    parser.add_argument("--picture-size", type=int, nargs=2, default=(500, 375), help="width and height of those drawn")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda, where there is one")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: mixed precision")
    parser.add_argument("--batch-size", type=int, help="CPU: 32, GPU: 128")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--first", type=int, default=8, help="the step after which the clock runs")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, help="as many as there are cores")
    parser.add_argument("--workers", type=int, help="processes that read pictures; CPU: 0, GPU: up to 8")
    parser.add_argument("--context-length", type=int, default=77, help="tokens; the peers pad every text to it")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--keep", type=Path, help="leave data, logs and times in this new folder")
    return parser.parse_args()


def fill_in(arguments: argparse.Namespace) -> None:
    """Choose by the machine what was not said."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.threads = arguments.threads or cores
    on_gpu = arguments.device == "cuda"
    arguments.batch_size = arguments.batch_size or (128 if on_gpu else 32)
    arguments.workers = (min(cores, 8) if on_gpu else 0) if arguments.workers is None else arguments.workers


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Prepare, let everybody run in turn, and print the table."""
    prepare(arguments, folder)
    found: dict[str, list[Run]] = {name: [] for name in arguments.only}
    for number in range(arguments.runs):
        turn = number % len(arguments.only)
        for name in arguments.only[turn:] + arguments.only[:turn]:
            run = measure(name, arguments, folder, number)
            found[name].append(run)
            print(f"run {number + 1}, {name}: {run['images_per_second']:.1f} images/s", flush=True)
    print_table(found)


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Make pictures, tables and start models, and say what will be measured."""
    from training_task import draw_pictures, read_flickr8k, save_models, write_table

    count = arguments.steps * arguments.batch_size
    if arguments.data:
        pairs = read_flickr8k(arguments.data, count + HELD_OUT)
    else:
        pairs = draw_pictures(folder / "pictures", count + HELD_OUT, tuple(arguments.picture_size))
    write_table(pairs[:count], folder / "train.csv")
    write_table(pairs[count:], folder / "held_out.csv")
    save_models(folder, arguments.context_length)
    print(
        f"{arguments.device}, {arguments.precision}, {arguments.threads} threads, {arguments.workers} data workers, "
        f"batches of {arguments.batch_size}, {arguments.context_length} tokens at most, "
        f"measured from step {arguments.first} to {arguments.steps}, {arguments.runs} runs"
    )


def measure(name: str, arguments: argparse.Namespace, folder: Path, number: int) -> Run:
    """Let one contender train in a process of its own."""
    output = folder / f"{name}-{number}"
    output.mkdir()
    times = output / "times.json"
    clock = [sys.executable, str(HERE / "step_clock.py"), str(times), str(arguments.first), str(arguments.steps)]
    visible = {} if arguments.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {
        **os.environ,
        **visible,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(arguments.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (output / "log.txt").open("w") as log:
        command = clock + CONTENDERS[name](arguments, folder, output)
        result = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=600)
    if result.returncode:
        raise SystemExit(f"{name} failed:\n" + "\n".join((output / "log.txt").read_text().splitlines()[-25:]))
    return reckon(name, json.loads(times.read_text()), arguments)


def reckon(name: str, times: dict, arguments: argparse.Namespace) -> Run:
    """Turn the times of the steps into images/s."""
    steps = times["steps"]
    if len(steps) != arguments.steps:
        raise SystemExit(f"{name} took {len(steps)} optimizer steps, not {arguments.steps}: nothing to compare.")
    seconds, cpu = (found[-1] - found[arguments.first - 1] for found in (steps, times["cpu"]))
    images = (arguments.steps - arguments.first) * arguments.batch_size
    return {
        "images_per_second": images / seconds,
        "cpu_ms": 1000 * cpu / images,
        "start_up": times["start_up"],
        "peak_mib": times["peak_mib"],
    }


def print_table(found: dict[str, list[Run]]) -> None:
    """Print medians, the spread, and how each peer compares with us in the same round."""
    print("\n| trainer | images/s | lowest to highest | ours / theirs | CPU time an image | start-up | peak memory |")
    print("|---|---|---|---|---|---|---|")
    faster = []
    for name, runs in found.items():
        speeds = [run["images_per_second"] for run in runs]
        pairs = zip(found.get(OURS, []), speeds, strict=False)
        ratios = [mine["images_per_second"] / theirs for mine, theirs in pairs if name != OURS]
        print(
            f"| {name} | {median(speeds):.1f} | {min(speeds):.1f} to {max(speeds):.1f} "
            f"| {f'{median(ratios):.2f}' if ratios else ''} | {median(run['cpu_ms'] for run in runs):.1f} ms "
            f"| {median(run['start_up'] for run in runs):.1f} s | {median(run['peak_mib'] for run in runs):.0f} MiB |"
        )
        if ratios and median(ratios) < 1:
            faster.append(f"{name} is faster than ours, {1 / median(ratios):.2f} times.")
    print(
        "\nCPU time: of the training process alone, over all threads. Start-up: from the start of the process to the "
        "end of the first step. Ratios: medians over the rounds."
    )
    if OURS in found:
        print(" ".join(faster) or "No peer is faster than ours.")


def ours(arguments: argparse.Namespace, folder: Path, output: Path) -> list[str]:
    """Our command: all weights, the whole batch in memory, one measurement when training is over."""
    return [
        *("-m", OURS, "--model", str(folder / "model"), "--output", str(output / "result")),
        *("--data", str(folder / "train.csv"), "--eval-data", str(folder / "held_out.csv"), "--preset", "full"),
        *("--batch-size", str(arguments.batch_size), "--chunk-size", str(arguments.batch_size)),
        *("--max-steps", str(arguments.steps), "--measure-every", str(arguments.steps), "--epochs", "2"),
        *("--captions-per-image", "1", "--learning-rate", str(LR), "--weight-decay", "0.1", "--no-interpolate"),
        *("--workers", str(arguments.workers), "--device", arguments.device, "--precision", arguments.precision),
    ]


def transformers_example(arguments: argparse.Namespace, folder: Path, output: Path) -> list[str]:
    """The example's way, as `contrastive_image_text.py` next to this file."""
    return [
        str(HERE / "contrastive_image_text.py"),
        *("--model", str(folder / "model"), "--data", str(folder / "train.csv"), "--output", str(output / "result")),
        *("--batch-size", str(arguments.batch_size), "--steps", str(arguments.steps), "--lr", str(LR)),
        *("--workers", str(arguments.workers), "--device", arguments.device, "--precision", arguments.precision),
    ]


def open_clip_trainer(arguments: argparse.Namespace, folder: Path, output: Path) -> list[str]:
    """open_clip's own command; the model folder has no weights, so it starts from random ones."""
    return [
        *("-m", "open_clip_train.main", "--model", f"local-dir:{folder / 'open_clip_model'}"),
        *("--train-data", str(folder / "train.csv"), "--dataset-type", "csv", "--csv-separator", ","),
        *("--csv-img-key", "image", "--csv-caption-key", "caption"),
        *("--batch-size", str(arguments.batch_size), "--epochs", "1", "--lr", str(LR), "--wd", "0.1", "--warmup", "0"),
        *("--workers", str(arguments.workers), "--device", arguments.device),
        *("--precision", {"fp32": "fp32", "bf16": "amp_bf16"}[arguments.precision]),
        *("--logs", str(output), "--name", "result", "--save-frequency", "0"),
    ]


CONTENDERS: dict[str, Callable[[argparse.Namespace, Path, Path], list[str]]] = {
    OURS: ours,
    "transformers-example": transformers_example,
    "open_clip_train": open_clip_trainer,
}


if __name__ == "__main__":
    main()
