"""Time the start of the app against what nobody can do without: `python tests/benchmarks/start_time.py`.

From a new process to the first caption that is answered over HTTP, against a process that only imports Gradio and
PyTorch and reads the weights. Each takes its turn several times. The app starts with a cache of graphs as it is after
the first start, and with an empty one; then it also says how long a first picture takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx

sys.path.insert(0, str(Path(__file__).parent))

from under_load import free_port, megabytes, photos

ROOT = Path(__file__).resolve().parents[2]
CACHE = "ALIGNMENT_CACHE"  # where the app keeps its graphs

BARE = """
import sys, gradio, torch
from pathlib import Path
from safetensors.torch import load_file
weights = [load_file(file) for file in Path(sys.argv[1]).glob("*.safetensors")]
print("ready", flush=True)
sys.stdin.read()
"""
IMPORTS = """
import json, time
started = time.perf_counter()
import torch
torch_there = time.perf_counter()
import gradio
gradio_there = time.perf_counter()
import app
app_there = time.perf_counter()
took = {"torch": torch_there - started, "gradio": gradio_there - torch_there, "app": app_there - gradio_there}
print(json.dumps(took))
"""

Measured = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "compact"))
    parser.add_argument("--gallery", default=str(ROOT / "assets" / "gallery"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    photo = photos(1280)[0]
    with tempfile.TemporaryDirectory() as cache:
        started(arguments, cache, photo)  # fills the cache, and the disk's
        runs = [measure(arguments, cache, photo) for _ in range(arguments.runs)]
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"{name:48} {median(values):8.2f}   ({min(values):.2f} to {max(values):.2f})")
    for kind in ("as usual", "empty cache"):
        ratio = median(run[f"app, {kind}: first caption, s"] / run["bare: imports and weights, s"] for run in runs)
        print(f"first caption answered / bare, {kind}: {ratio:.2f} (median of the runs' ratios; the aim is 1.5)")
    if arguments.json:
        title = f"From a new process to the first answered caption, median of {arguments.runs} runs"
        arguments.json.write_text(json.dumps({"title": title, "rows": rows(runs)}, indent=1), encoding="utf-8")


def rows(runs: list[Measured]) -> list[dict[str, object]]:
    """Say for `bench.py` what is compared with the bare process."""
    compared = [
        ("first caption answered", "app, as usual: first caption, s", "bare: imports and weights, s", "s", 1.5),
        (
            "the same, first start of all",
            "app, empty cache: first caption, s",
            "bare: imports and weights, s",
            "s",
            None,
        ),
        ("memory after it", "app, as usual: memory after it, MB", "bare: memory, MB", "MB", None),
    ]
    return [
        {
            "what": what,
            "ours": median(run[ours] for run in runs),
            "reference": median(run[reference] for run in runs),
            "ratio": median(run[ours] / run[reference] for run in runs),
            "unit": unit,
            "target": target,
            "note": "beside importing Gradio and PyTorch and reading the weights" if target else "",
        }
        for what, ours, reference, unit, target in compared
    ]


def measure(arguments: argparse.Namespace, cache: str, photo: str) -> Measured:
    """Let each take its turn."""
    found = bare(arguments.model)
    found |= {f"app, as usual: {name}": value for name, value in started(arguments, cache, photo).items()}
    with tempfile.TemporaryDirectory() as empty:
        found |= {f"app, empty cache: {name}": value for name, value in started(arguments, empty, photo).items()}
    imports = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=True)
    return found | {f"import of {name}, s": seconds for name, seconds in json.loads(imports.stdout).items()}


def bare(model: str) -> Measured:
    """Import and read the weights, nothing else."""
    started = time.perf_counter()
    with process(["-c", BARE, model], {}) as running:
        heard(running, "ready")
        seconds = time.perf_counter() - started
        return {"bare: imports and weights, s": seconds, "bare: memory, MB": megabytes(running.pid)}


def started(arguments: argparse.Namespace, cache: str, photo: str) -> Measured:
    """Start the app and ask it."""
    port = free_port()
    options = ["app.py", "--port", str(port), "--model", arguments.model, "--gallery", arguments.gallery]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=300) as client:
        started = time.perf_counter()
        with process(options, {CACHE: cache}) as running:
            heard(running, "Open ")
            found = {"page served, s": time.perf_counter() - started}
            ask(client, "search_images", ["a dog on the beach", 12])
            found["first caption, s"] = time.perf_counter() - started
            found["memory after it, MB"] = megabytes(running.pid)
            ask(client, "search_captions", [photo, 10, ""])
            found["first picture, s"] = time.perf_counter() - started
            found["memory after that, MB"] = megabytes(running.pid)
            return found


@contextmanager
def process(arguments: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with running:
        try:
            yield running
        finally:
            running.terminate()


def heard(running: subprocess.Popen[str], word: str) -> None:
    assert running.stdout
    while line := running.stdout.readline():
        if line.startswith(word):
            return
    raise SystemExit("The process ended before its time.")


def ask(client: httpx.Client, name: str, data: list[object]) -> None:
    event = client.post(f"/gradio_api/call/{name}", json={"data": data}).json()["event_id"]
    answer = client.get(f"/gradio_api/call/{name}/{event}").text
    if "event: complete" not in answer:
        raise SystemExit(f"{name}: {answer[:500]}")


if __name__ == "__main__":
    main()
