"""Encoding speed on a GPU, and the share of the card's matmul peak it comes to: a part of `make bench`.

    PYTHONPATH=. .venv-bench/bin/python tests/benchmarks/gpu_speed.py [--device cpu] [--json FILE]

The peak is what a large half-precision matmul reaches here and now, not what a data sheet says. The floating-point
operations of a picture are counted by PyTorch, one multiply-add as two. Three figures for each model, from random
weights: from inputs that are ready, from JPEGs of 500 x 375, and, to compare with, a plain float32 loop over ready
inputs with the same batches. Without a GPU it says so and ends well; `--device cpu` runs the same code on the CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from encoding_task import photographs, quiet, save_clip, save_siglip, write_pictures

from alignment.model import DualEncoder
from alignment.preprocess import open_image

MODELS = {"CLIP ViT-B/32": save_clip, "SigLIP B/16-224": save_siglip}
BATCHES = {"cuda": (64, 256, 1024), "mps": (16, 64, 256), "cpu": (8, 16)}
PICTURES = {"cuda": 2048, "mps": 512, "cpu": 32}
FILES = 256  # different pictures; encoded as often as it takes
MATMUL = {"cuda": 8192, "mps": 4096, "cpu": 2048}  # side of the matrices


@dataclass(frozen=True)
class Speeds:
    """Images/s of one model with one batch size, and what it computes for each."""

    ready: float
    files: float
    plain: float
    operations: float
    cosine: float  # the least between the first and the last, over the pictures


def main() -> None:
    arguments = parsed_arguments()
    device = arguments.device or gpu()
    if device is None:
        report = (
            f"No GPU that PyTorch {torch.__version__} can use: nothing measured. (--device cpu runs the same code.)"
        )
        print(report)
        write(arguments, [], report)
        return
    quiet()
    peak = matmul_peak(device, arguments.rounds)
    title = f"Encoding on {name_of(device)}, matmul peak {peak / 1e12:.3g} TFLOP/s in half precision"
    print(title)
    rows = []
    with TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder, "pictures"), min(FILES, arguments.pictures), (500, 375), photographs())
        for model, save in MODELS.items():
            save(Path(folder, model))
            encoder = DualEncoder.load(Path(folder, model), device=device)
            for batch in arguments.batches or BATCHES[device]:
                rows.append(measured(model, encoder, paths, batch, peak, arguments))
    write(arguments, rows, title)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=tuple(BATCHES), help="the GPU there is")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes to try")
    parser.add_argument("--pictures", type=int, help="encoded in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    arguments.pictures = arguments.pictures or PICTURES[arguments.device or gpu() or "cpu"]
    return arguments


def gpu() -> str | None:
    """Name the kind of GPU there is."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]], title: str) -> None:
    if arguments.json:
        arguments.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1), encoding="utf-8")


def measured(
    model: str, encoder: DualEncoder, paths: list[Path], batch: int, peak: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure one model with one batch size, print a line, and return it as a row."""
    speeds = speeds_of(encoder, paths, batch, arguments.pictures, arguments.rounds)
    shares = {name: getattr(speeds, name) * speeds.operations / peak for name in ("ready", "files", "plain")}
    print(
        f"{model}, batches of {batch}, {speeds.operations / 1e9:.1f} GFLOP an image: "
        f"{speeds.ready:.1f} images/s from ready inputs ({shares['ready']:.0%} of the peak), "
        f"{speeds.files:.1f} from files ({shares['files']:.0%}); "
        f"a plain float32 loop {speeds.plain:.1f} ({shares['plain']:.0%}); least cosine {speeds.cosine:.5f}",
        flush=True,
    )
    return {
        "what": f"{model}, ready inputs, batches of {batch}",
        "peer": "plain float32 loop",
        "ours": speeds.ready,
        "reference": speeds.plain,
        "ratio": speeds.ready / speeds.plain,
        "unit": "images/s",
        "better": "higher",
        "note": f"{shares['ready']:.0%} of the matmul peak; from files {speeds.files:.0f} images/s, "
        f"least cosine {speeds.cosine:.4f}",
    }


def speeds_of(encoder: DualEncoder, paths: list[Path], batch: int, count: int, rounds: int) -> Speeds:
    """Measure all three ways in turn."""
    device = encoder.device.type
    prepared = [encoder.preprocessor.images([open_image(path)]) for path in paths]

    def ready() -> torch.Tensor:
        return torch.stack(list(encoder.encode_prepared(repeated(prepared, count), batch_size=batch)))

    def from_files() -> torch.Tensor:
        return encoder.encode_images(list(repeated(paths, count)), batch_size=batch)

    @torch.inference_mode()
    def plain() -> torch.Tensor:
        inputs = list(repeated(prepared, count))
        batches = (inputs[start : start + batch] for start in range(0, count, batch))
        return torch.cat([encoder.embed_images(joined(some)).cpu() for some in batches])

    ways = (ready, from_files, plain)
    fast, _, right = [way() for way in ways]  # once without the clock
    taken = [[seconds(way, device) for way in ways] for _ in range(rounds)]
    ready_s, files_s, plain_s = (median(column) for column in zip(*taken, strict=True))
    return Speeds(
        ready=count / ready_s,
        files=count / files_s,
        plain=count / plain_s,
        operations=operations_per_image(encoder, prepared[0]),
        cosine=float((fast * right).sum(-1).min()),
    )


def joined(inputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}


def repeated(items: list[Any], count: int) -> Iterator[Any]:
    """Yield `count` items, from the start again where there are fewer."""
    return (items[number % len(items)] for number in range(count))


def seconds(work: Callable[[], object], device: str) -> float:
    """Time a piece of work until the device has done it."""
    finish(device)
    start = perf_counter()
    work()
    finish(device)
    return perf_counter() - start


def finish(device: str) -> None:
    """Wait until the device has nothing left to do."""
    if device != "cpu":
        torch.accelerator.synchronize()


def operations_per_image(encoder: DualEncoder, inputs: dict[str, torch.Tensor]) -> float:
    """Count the floating-point operations of the picture tower; PyTorch counts those of products and convolutions."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Attention as plain products: the fused kernels are counted on some devices only.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        encoder.embed_images(inputs)
    return float(counter.get_total_flops())


def matmul_peak(device: str, rounds: int, side: int | None = None) -> float:
    """Measure the floating-point operations a second of a large half-precision matmul: the best of several rounds."""
    side = side or MATMUL[device]
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    repeats = 1 if device == "cpu" else 20

    def multiply() -> None:
        for _ in range(repeats):
            torch.matmul(left, right)

    multiply()
    return max(2 * side**3 * repeats / seconds(multiply, device) for _ in range(rounds + 2))


if __name__ == "__main__":
    main()
