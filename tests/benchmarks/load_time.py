"""Time the compact model's loading against importing torch and transformers: `python tests/benchmarks/load_time.py`.

Every run is a fresh process, which times the import first and then the load, so that both meet the same machine. The
first run warms the disk's cache and is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]

MEASURED = """
import json, sys, time
started = time.perf_counter()
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel  # transformers imports lazily
imported = time.perf_counter()
from alignment.model import DualEncoder
ours = time.perf_counter()
DualEncoder.load(sys.argv[1], device="cpu")
loaded = time.perf_counter()
print(json.dumps({"import": imported - started, "own_modules": ours - imported, "load": loaded - ours}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "compact"))
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    runs = [measure(arguments.model) for _ in range(arguments.runs + 1)][1:]
    for number, run in enumerate(runs, 1):
        print(f"run {number}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in run.items()))
    found = {name: median(run[name] for run in runs) for name in runs[0]}
    print("median: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items()))
    ratio = median(run["load"] / run["import"] for run in runs)
    print(f"load / import of torch and transformers: {ratio:.2f} (median of the runs' ratios; the aim is below 1)")


def measure(model: str) -> dict[str, float]:
    """Import and load in a process of their own: seconds of each."""
    command = [sys.executable, "-c", MEASURED, model]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


if __name__ == "__main__":
    main()
