"""Compare building a gallery with its two halves alone, decoding and encoding, on photographs of 12 megapixels.

python tests/benchmarks/building_speed.py
python tests/benchmarks/building_speed.py --pictures 96 --rounds 5 --model checkpoints/compact
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from encoding_task import GRAIN, QUALITY, photographs, write_pictures
from PIL import Image
from torch import Tensor

from alignment.gallery import THUMBNAIL_PIXELS, BuildReport, build_gallery
from alignment.model import DualEncoder
from alignment.prefetch import num_workers, prefetch_map
from alignment.preprocess import open_image

ROOT = Path(__file__).resolve().parents[2]
MEGAPIXELS_12 = 4000, 3000
BATCH = 16

ABOUT = f"""\
Compare building a gallery with its two halves alone, decoding and encoding.

Everything is measured in one run, in turn and in alternating order, and given as the median of the rounds:

  full decode   JPEG to RGB, every pixel of it, on all processors; nothing else
  decode        the same through the door (`open_image`, near what the model needs): at an eighth of the size
  prepare       all that threads do for a picture: read, hash, decode, resize, normalise, thumbnail
  forward       the model on inputs that are ready, batches of {BATCH}, on all processors
  build         `build_gallery` into a new folder, captions and calibration left out
  old way       one thing after the other: full decode, hash, thumbnail, transformers' own image processor, forward

Where decoding and encoding want the same processors, building cannot be as fast as the slower of them: with d and f
pictures a second alone, both together do at most 1 / (1/d + 1/f), the "ceiling" below. A GPU lifts it. On a machine
that others use too, the processor time says more than the speed: what building takes beyond its parts is lost.
"""
EXAMPLES = f"""\
The photographs are cut-outs of those that scikit-image carries, enlarged to {MEGAPIXELS_12[0]} x {MEGAPIXELS_12[1]},
with sensor-like noise of {GRAIN:g} steps, as JPEGs of quality {QUALITY}; or your own, with --data.

examples:
  python tests/benchmarks/building_speed.py                            # three minutes on two idle processors
  python tests/benchmarks/building_speed.py --data ~/Photos --rounds 5
  python tests/benchmarks/building_speed.py --model openai/clip-vit-base-patch32
"""


class Timed(NamedTuple):
    """One measurement: pictures a second, and milliseconds of processor time a picture, all threads together."""

    speed: float
    busy: float


class Task:
    """The photographs, the model, and each thing that is timed."""

    def __init__(self, paths: list[Path], encoder: DualEncoder, folder: Path) -> None:
        self.paths, self.encoder, self.folder = paths, encoder, folder
        self.preprocessor = encoder.preprocessor
        self.contents = [path.read_bytes() for path in paths]
        self.inputs = [self.preprocessor.image(content) for content in self.contents]
        self.contenders: dict[str, Callable[[], None]] = {
            "full decode": partial(self._decode, None),
            "decode": partial(self._decode, self.preprocessor.draft_size),
            "prepare": lambda: _exhaust(prefetch_map(self._prepare, paths)),
            "forward": lambda: _exhaust(encoder.encode_prepared(iter(self.inputs), batch_size=BATCH)),
            "build": self._build,
            "old way": self._old_way,
        }

    def _decode(self, near: int | None) -> None:
        _exhaust(prefetch_map(lambda content: open_image(content, draft_size=near).size, self.contents))

    def _prepare(self, path: Path) -> Mapping[str, Tensor]:
        content = path.read_bytes()
        hashlib.sha256(content).hexdigest()
        image = open_image(content, draft_size=self.preprocessor.draft_size)
        inputs = self.preprocessor.images([image])
        image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        image.save(self.folder / f"{path.stem}.webp", quality=80, method=1)
        return inputs

    def _build(self) -> None:
        out, report = self.folder / "gallery", BuildReport()
        shutil.rmtree(out, ignore_errors=True)
        build_gallery(self.paths[0].parent, out, self.encoder, calibrate=False, report=report)
        if report.encoded["pictures"] != len(self.paths) or report.skipped:
            raise SystemExit(f"{report.encoded['pictures']} of {len(self.paths)} pictures were embedded.")

    def _old_way(self) -> None:
        for start in range(0, len(self.paths), BATCH):
            pictures = [self._old_look(path) for path in self.paths[start : start + BATCH]]
            processed = [self.preprocessor.image_processor([picture], return_tensors="pt") for picture in pictures]
            _exhaust(self.encoder.encode_prepared((dict(one) for one in processed), batch_size=BATCH))

    def _old_look(self, path: Path) -> Image.Image:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256").hexdigest()
        image = open_image(path)
        thumbnail = image.copy()
        thumbnail.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        thumbnail.save(self.folder / f"{path.stem}.webp", quality=80)
        return image


def main() -> None:
    arguments = _arguments()
    encoder = DualEncoder.load(arguments.model)
    with TemporaryDirectory() as folder:
        photos, scratch = Path(folder, "photos"), Path(folder, "scratch")
        scratch.mkdir()
        paths = write_pictures(photos, arguments.pictures, MEGAPIXELS_12, photographs(arguments.data))
        size = sum(path.stat().st_size for path in paths) / len(paths) / 1e6
        print(
            f"{len(paths)} JPEGs of 12 megapixels, {size:.1f} MB each; {num_workers()} threads, {encoder.device}",
            flush=True,
        )
        task = Task(paths, encoder, scratch)
        rounds = _measure(task, arguments.rounds)
        _report(rounds, task.contenders)
        _profile(task)
    if arguments.json:
        title = f"Building a gallery from {len(paths)} JPEGs of 12 megapixels, median of {arguments.rounds} rounds"
        arguments.json.write_text(json.dumps({"title": title, "rows": _rows(rounds)}, indent=1), encoding="utf-8")


def _measure(task: Task, rounds: int) -> list[dict[str, Timed]]:
    """Time each contender once a round; the order is reversed every other round, and the first one warms up."""
    measured = []
    for number in range(rounds + 1):
        names = list(task.contenders)[:: 1 if number % 2 else -1]
        measured.append({name: _timed(task.contenders[name], len(task.paths)) for name in names})
    return measured[1:]


def _timed(call: Callable[[], None], pictures: int) -> Timed:
    start, busy = time.perf_counter(), time.process_time()
    call()
    return Timed(pictures / (time.perf_counter() - start), (time.process_time() - busy) / pictures * 1e3)


def _report(rounds: list[dict[str, Timed]], names: Iterable[str]) -> None:
    print("                pictures/s (lowest to highest)   processor time a picture")
    for name in names:
        speeds, busy = [one[name].speed for one in rounds], median(one[name].busy for one in rounds)
        print(f"{name:12} {median(speeds):9.1f}   ({min(speeds):.1f} to {max(speeds):.1f}) {busy:20.1f} ms")
    for what in ("full decode", "decode", "prepare"):
        alone = [(one["build"].speed, one[what].speed, one["forward"].speed) for one in rounds]
        slower = median(build / min(left, right) for build, left, right in alone)
        ceiling = median(build * (1 / left + 1 / right) for build, left, right in alone)
        print(f"build / slower of {what} and forward: {slower:.2f};  / ceiling of both together: {ceiling:.2f}")
    print(f"build / old way: {median(one['build'].speed / one['old way'].speed for one in rounds):.2f}")
    more = median(one["build"].busy / (one["prepare"].busy + one["forward"].busy) for one in rounds)
    print(f"processor time of build / of prepare and forward: {more:.2f}")


def _rows(rounds: list[dict[str, Timed]]) -> list[dict[str, Any]]:
    """Say the same for `bench.py`."""

    def row(what: str, reference: Callable[[dict[str, Timed]], float], target: float | None, note: str) -> dict:
        return {
            "what": f"gallery built, beside {what}",
            "ours": median(one["build"].speed for one in rounds),
            "reference": median(reference(one) for one in rounds),
            "ratio": median(one["build"].speed / reference(one) for one in rounds),
            "unit": "images/s",
            "target": target,
            "note": note,
        }

    def slower(decode: str) -> Callable[[dict[str, Timed]], float]:
        return lambda one: min(one[decode].speed, one["forward"].speed)

    def ceiling(one: dict[str, Timed]) -> float:
        return 1 / (1 / one["decode"].speed + 1 / one["forward"].speed)

    return [
        row("the slower of full decode and forward alone", slower("full decode"), 0.8, ""),
        row("the slower of reduced decode and forward alone", slower("decode"), 0.8, "both want the same processors"),
        row(
            "what both alone leave for both together", ceiling, None, "reduced decode, then forward, on all processors"
        ),
        row("one thing after the other, as before", lambda one: one["old way"].speed, None, ""),
    ]


def _profile(task: Task) -> None:
    """Show what a picture costs in processor time, stage by stage, one thread at a time."""
    spent: dict[str, list[float]] = {}
    near = task.preprocessor.draft_size
    for path in task.paths[:BATCH]:
        content = _clocked(spent, "read", path.read_bytes)
        _clocked(spent, "hash", lambda content=content: hashlib.sha256(content).hexdigest())
        image = _clocked(spent, "decode", lambda content=content: open_image(content, draft_size=near))
        _clocked(spent, "inputs", lambda image=image: task.preprocessor.images([image]))
        _clocked(spent, "shrink", lambda image=image: image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)))
        save = partial(image.save, task.folder / "one.webp", quality=80, method=1)
        _clocked(spent, "thumbnail", save)
    start = time.process_time()
    task.contenders["forward"]()
    spent["forward"] = [(time.process_time() - start) / len(task.paths)]
    print("processor time of a picture in ms: " + ", ".join(f"{k} {median(v) * 1e3:.1f}" for k, v in spent.items()))


def _clocked(spent: dict[str, list[float]], name: str, call: Callable[[], Any]) -> Any:
    start = time.thread_time()
    result = call()
    spent.setdefault(name, []).append(time.thread_time() - start)
    return result


def _exhaust(items: Iterator[object]) -> None:
    for _ in items:
        pass


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=ABOUT, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=48, help="how many photographs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed (default: %(default)s)")
    parser.add_argument("--model", default=os.fspath(ROOT / "checkpoints" / "compact"), help="folder or Hub id")
    parser.add_argument("--data", type=Path, help="cut from the JPEGs below this folder instead")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
