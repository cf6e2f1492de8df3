"""Encoding speed from files, beside transformers, sentence-transformers, open_clip and rclip: a part of `make bench`.

    PYTHONPATH=. .venv-bench/bin/python tests/benchmarks/encoding_speed.py [--data FOLDER] [--json FILE]

Every contender encodes the same JPEGs with the same weights, in a process of its own, on the same cores with the same
number of threads. All processes of a match live side by side; one works while the others sleep, and the order rotates
from round to round. The clock runs from paths to embeddings; loading and a first pass do not count. A peer gets the
batch size that serves it best among 8, 16 and 32, and open_clip's data loader worker processes where they help; ours
runs as it comes. The last column is the least cosine, over all pictures, to what transformers computes in float32 from
fully decoded pictures, so that nobody is fast by being wrong.

sentence-transformers runs on PyTorch: its ONNX back end does not install beside it (optimum-onnx needs an older
transformers than sentence-transformers does), and has no class for a picture tower. rclip is told to take 224 pixels
and given a model of ours, since its own would have to be downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NEEDED = ("torch", "torchvision", "transformers", "sentence_transformers", "open_clip", "rclip", "onnxruntime")
OURS = "ours"
BATCHES = (8, 16, 32)
SIZES = {"500 x 375": (500, 375), "12 megapixels": (4000, 3000)}
REST = 0.3  # seconds between two turns, until the threads of the last one have stopped waiting for work

Setting = dict[str, int]


@dataclass(frozen=True)
class Match:
    """Who encodes what.

    Attributes:
        title: the model, as the table says it.
        model: its name here.
        contenders: ours and the peers.
        judge: whose embeddings are right.
        counts: size of the pictures -> how many.
        target: what ours is to reach, in multiples of the best peer.
    """

    title: str
    model: str
    contenders: tuple[str, ...]
    judge: str
    counts: dict[str, int]
    target: float | None = None


MATCHES = (
    Match(
        "CLIP ViT-B/32",
        "clip",
        (OURS, "transformers", "sentence-transformers", "open_clip", "rclip"),
        "transformers",
        {"500 x 375": 64, "12 megapixels": 24},
        target=2.0,
    ),
    Match(
        "SigLIP B/16-224",
        "siglip",
        (OURS, "transformers", "sentence-transformers", "open_clip"),
        "transformers",
        {"500 x 375": 24},
    ),
    Match(
        "compact model",
        "compact",
        (OURS, "transformers-pil"),
        "transformers-pil",
        {"500 x 375": 64, "12 megapixels": 24},
        target=4.0,
    ),
)


@dataclass
class Result:
    """What one contender did with one set of pictures."""

    setting: Setting
    speeds: list[float] = field(default_factory=list)  # images/s, a round each
    cosine: float = float("nan")


def main() -> None:
    arguments = parsed_arguments()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SystemExit(f"{sys.executable} lacks {', '.join(missing)}. Run `make bench`.")
    matches = [match for match in MATCHES if match.model in arguments.models]
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        pictures = prepare(matches, Path(folder), arguments)
        for match in matches:
            rows += compare(match, pictures, Path(folder), arguments)
    if arguments.json:
        title = f"Encoding from files, {arguments.threads} threads, median of {arguments.rounds} rounds"
        arguments.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1), encoding="utf-8")


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [match.model for match in MATCHES]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--only", nargs="+", help="some of the contenders, such as: ours rclip")
    parser.add_argument("--also", nargs="+", default=[], help="more of them, such as: open_clip-bf16")
    parser.add_argument("--data", type=Path, help="a folder of JPEGs to cut from; left out, scikit-image's photographs")
    parser.add_argument("--threads", type=int, default=_cores(), help="for each contender (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    return parser.parse_args()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(matches: list[Match], folder: Path, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Make pictures, and every model in each one's form; also the cache that ours keeps its graphs in."""
    from encoding_task import (
        photographs,
        quiet,
        save_as_onnx,
        save_clip,
        save_for_open_clip,
        save_siglip,
        write_pictures,
    )

    quiet()
    sources, pictures = photographs(arguments.data), {}
    for size in SIZES:
        count = max(match.counts.get(size, 0) for match in matches)
        paths = write_pictures(folder / size, count, SIZES[size], sources)
        pictures[size] = [str(path) for path in paths]
        print(f"{count} pictures of {size}, {sum(path.stat().st_size for path in paths) / count / 1e6:.2f} MB each")
    for match in matches:
        if match.model != "compact":
            {"clip": save_clip, "siglip": save_siglip}[match.model](folder / match.model)
            save_for_open_clip(folder / match.model, folder / f"{match.model}-open_clip")
        if "rclip" in match.contenders:
            from encoding_contenders import RCLIP_MODEL

            save_as_onnx(folder / match.model, folder / f"{match.model}-rclip" / RCLIP_MODEL / "visual.onnx")
    return pictures


def compare(
    match: Match, pictures: dict[str, list[str]], folder: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Let the contenders of one match encode in turn, print their table, and return it as rows."""
    names = [name for name in (*match.contenders, *arguments.also) if name in (arguments.only or (name,))]
    if match.model == "compact":
        names = [name for name in names if name in match.contenders]
    contenders = {name: Contender(name, match.model, folder, arguments.threads) for name in names}
    rows = []
    try:
        for contender in contenders.values():
            contender.answer()
        settings: dict[str, Setting] = {}
        for size, count in match.counts.items():
            paths = pictures[size][:count]
            print(f"\n{match.title}, {count} pictures of {size}", flush=True)
            results = {}
            for name, contender in contenders.items():
                settings[name] = chosen(contender, paths, settings.get(name), arguments.threads)
                results[name] = Result(settings[name])
            race(contenders, paths, results, arguments.rounds)
            judge(match, contenders, results)
            print_table(results)
            rows += as_rows(match, size, results)
    finally:
        for contender in contenders.values():
            contender.close()
    return rows


# ---------------------------------------------------------------- contenders


class Contender:
    """A process that encodes when it is told to; see `encoding_contenders.py`."""

    def __init__(self, name: str, model: str, folder: Path, threads: int) -> None:
        form = {"open_clip": "-open_clip", "rclip": "-rclip"}.get(name.removesuffix("-bf16"), "")
        source = ROOT / "checkpoints" / "compact" if model == "compact" else folder / f"{model}{form}"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "ALIGNMENT_CACHE": str(folder / "cache"),
        }
        self.name = name
        self.embeds = folder / f"{model}-{name}.npy"
        self.log = (folder / f"{model}-{name}.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "encoding_contenders.py"), name, str(source), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            text=True,
        )

    def encode(self, paths: list[str], setting: Setting) -> float:
        """Encode pictures, and say how many a second that were."""
        assert self.process.stdin
        time.sleep(REST)
        task = {"paths": paths, "setting": setting, "out": str(self.embeds)}
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return len(paths) / float(self.answer()["seconds"])

    def answer(self) -> dict[str, Any]:
        """Wait for a line: that it is ready, or how long something took."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.name} failed:\n" + "\n".join(self.log.read().splitlines()[-25:]))
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)
        assert self.process.stdout
        self.process.stdout.close()
        self.log.close()


def chosen(contender: Contender, paths: list[str], before: Setting | None, threads: int) -> Setting:
    """Warm a contender up, and find the setting that serves it best with these pictures."""
    if contender.name == OURS:
        contender.encode(paths, {})
        return {}
    some = paths[: max(16, len(paths) // 2)]
    found = before or {"batch": BATCHES[0], **({"workers": 0} if contender.name.startswith("open_clip") else {})}
    contender.encode(paths[: BATCHES[0]], found)
    if before is None:
        found = _fastest(contender, some, [{**found, "batch": batch} for batch in BATCHES if batch <= len(some)])
    if "workers" in found:
        found = _fastest(contender, some, [{**found, "workers": workers} for workers in (0, threads)])
    return found


def _fastest(contender: Contender, paths: list[str], tries: list[Setting]) -> Setting:
    return max(tries, key=lambda setting: contender.encode(paths, setting))


def race(contenders: dict[str, Contender], paths: list[str], results: dict[str, Result], rounds: int) -> None:
    """Let everybody encode all pictures, round by round."""
    names = list(contenders)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            results[name].speeds.append(contenders[name].encode(paths, results[name].setting))
        speeds = ", ".join(f"{name} {results[name].speeds[-1]:.1f}" for name in names)
        print(f"  round {number + 1}, images/s: {speeds}", flush=True)


def judge(match: Match, contenders: dict[str, Contender], results: dict[str, Result]) -> None:
    """Compare everybody's embeddings with the judge's."""
    if match.judge in contenders:
        right = np.load(contenders[match.judge].embeds)
        for name, result in results.items():
            result.cosine = least_cosine(np.load(contenders[name].embeds), right)
        print(f"  cosine between one picture and the next: {(right[1:] * right[:-1]).sum(1).mean():.3f} on average")


def least_cosine(embeds: np.ndarray, right: np.ndarray) -> float:
    """Find the worst row of unit-norm embeddings."""
    if embeds.shape != right.shape:
        raise SystemExit(f"Embeddings of shape {embeds.shape} cannot be compared with {right.shape}.")
    return float((embeds * right).sum(1).min())


# ---------------------------------------------------------------- figures


def ratio(results: dict[str, Result], peer: str) -> float:
    """Say how many times as fast ours is: the median over the rounds."""
    rounds = zip(results[OURS].speeds, results[peer].speeds, strict=True)
    return median(mine / theirs for mine, theirs in rounds)


def print_table(results: dict[str, Result]) -> None:
    print(f"  {'':24}{'images/s':>9}  {'lowest to highest':20}{'ours/theirs':>11}  {'least cosine':>12}  setting")
    for name, result in results.items():
        times = f"{ratio(results, name):.2f}" if OURS in results and name != OURS else ""
        span = f"{min(result.speeds):.1f} to {max(result.speeds):.1f}"
        setting = ", ".join(f"{key} {value}" for key, value in result.setting.items())
        print(
            f"  {name:24}{median(result.speeds):9.1f}  {span:20}{times:>11}  {result.cosine:12.5f}  {setting}",
            flush=True,
        )


def as_rows(match: Match, size: str, results: dict[str, Result]) -> list[dict[str, Any]]:
    """Say the same for `bench.py`; what ours is to reach is asked of the fastest peer alone."""
    peers = [name for name in results if name != OURS]
    if OURS not in results or not peers:
        return []
    best = min(peers, key=lambda name: ratio(results, name))
    return [
        {
            "what": f"{match.title}, {size}",
            "peer": "transformers, PyTorch, float32" if name == "transformers-pil" else name,
            "ours": median(results[OURS].speeds),
            "reference": median(results[name].speeds),
            "ratio": ratio(results, name),
            "unit": "images/s",
            "better": "higher",
            "target": match.target if name == best else None,
            "note": f"least cosine {results[OURS].cosine:.4f}" if name == match.judge else "",
        }
        for name in sorted(peers, key=lambda name: ratio(results, name))
    ]


if __name__ == "__main__":
    main()
