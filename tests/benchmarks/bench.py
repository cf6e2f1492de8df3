"""Run every benchmark of speed and print one table: `make bench`.

    PYTHONPATH=. .venv-bench/bin/python tests/benchmarks/bench.py [--only search_speed ...] [--out FILE]

Each is a script beside this one that prints for people and, with `--json FILE`, writes a `title` and `rows`. A row says
`what` was measured, `ours` and the `reference` in `unit`, and `ratio`, ours / reference or the median of that over
rounds; and where it applies the `peer` that the reference comes from, whether `higher` or `lower` is `better`, the
`target` of the ratio, and a `note`. Peers are installed beside torchvision in `.venv-bench`; what compares ours with
itself runs in the app's own environment, where there is one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LIBRARIES = (
    *("torch", "torchvision", "transformers", "openvino", "onnxruntime", "numpy", "pillow"),
    *("sentence-transformers", "open_clip_torch", "rclip", "faiss-cpu", "usearch", "gradio"),
)
UNITS_OF_COST = ("s", "ms", "µs", "us", "MB", "MiB", "GB", "GiB", "bytes")

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A script, with what it is told here."""

    script: str
    arguments: tuple[str, ...] = ()
    beside_peers: bool = False  # runs in the environment that holds the peers

    @property
    def name(self) -> str:
        return Path(self.script).stem


BENCHMARKS = (
    Benchmark("encoding_speed.py", beside_peers=True),
    Benchmark("gpu_speed.py", beside_peers=True),
    Benchmark("search_speed.py", ("--rounds", "3"), beside_peers=True),
    Benchmark("building_speed.py"),
    Benchmark("query_time.py"),
    Benchmark("start_time.py", ("--runs", "3")),
    Benchmark("under_load.py", ("--seconds", "20")),
)
LIMIT = 900  # seconds for one of them


def main() -> int:
    arguments = parsed_arguments()
    started, parts, failed = perf_counter(), [heading()], []
    chosen = [benchmark for benchmark in BENCHMARKS if benchmark.name in arguments.only]
    with TemporaryDirectory() as folder:
        for number, benchmark in enumerate(chosen, 1):
            print(f"\n=== {benchmark.name}, {number} of {len(chosen)}, {elapsed(started)}\n", flush=True)
            found = run(benchmark, Path(folder))
            if found is None:
                failed.append(benchmark.name)
            elif found["rows"]:
                parts.append(table(found))
    parts.append(verdict(failed, perf_counter() - started))
    report = "\n\n".join(parts) + "\n"
    print(f"\n{report}")
    if arguments.out:
        arguments.out.write_text(report, encoding="utf-8")
    return 1 if failed else 0


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of them")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    return parser.parse_args()


def elapsed(started: float) -> str:
    minutes, seconds = divmod(int(perf_counter() - started), 60)
    return f"{minutes}:{seconds:02} so far"


def run(benchmark: Benchmark, folder: Path) -> dict[str, Any] | None:
    """Run one benchmark and read its figures; None, after a line that says why, where it has none."""
    figures = folder / f"{benchmark.name}.json"
    own = ROOT / ".venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    python = sys.executable if benchmark.beside_peers or not (ROOT / ".venv" / ".app").is_file() else str(own)
    command = [python, str(HERE / benchmark.script), *benchmark.arguments, "--json", str(figures)]
    try:
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        print(f"{benchmark.name} was stopped after {LIMIT} s.", file=sys.stderr)
        return None
    if code or not figures.is_file():
        print(f"{benchmark.name} ended with {code}.", file=sys.stderr)
        return None
    return dict(json.loads(figures.read_text(encoding="utf-8")))


# ---------------------------------------------------------------- the table


def heading() -> str:
    """Say when and on what kind of machine this was measured, and with which versions."""
    today = datetime.date.today()
    lines = [
        f"Measured on {today.day} {today:%B %Y}: {processor()}, {cores()} cores, {memory():.0f} GB of memory, "
        f"{platform.system()}, Python {platform.python_version()}.",
        "Versions: " + ", ".join(f"{name} {found}" for name in LIBRARIES if (found := installed(name))) + ".",
    ]
    return "\n".join(lines)


def processor() -> str:
    """Name the processor, and say whether it computes in bfloat16."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    facts = dict(
        (part.strip() for part in line.split(":", 1)) for line in cpuinfo.read_text().splitlines() if ":" in line
    )
    flags = facts.get("flags", "").split()
    kinds = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{facts.get('model name', platform.machine())} ({', '.join(kinds[-2:]) or platform.machine()})"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> float:
    """Gigabytes of memory; 0 where the system does not say."""
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if "SC_PHYS_PAGES" in names else 0.0


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(found: dict[str, Any]) -> str:
    """Turn the figures of one benchmark into a Markdown table."""
    lines = [
        f"**{found['title']}**",
        "",
        "| | Ours | Beside it | Ours / beside | To reach | |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [line(row) for row in found["rows"]])


def line(row: Row) -> str:
    reference = " ".join(filter(None, (row.get("peer"), figure(row["reference"], row["unit"]))))
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    target = row.get("target")
    reach = (
        ""
        if target is None
        else f"{'≥' if better(row) == 'higher' else '≤'} {target:g}: " + ("reached" if reached(row) else "**missed**")
    )
    remarks = "; ".join(filter(None, ("**the peer wins**" if peer_wins(row) else "", row.get("note"))))
    return f"| {row['what']} | {figure(row['ours'], row['unit'])} | {reference} | {ratio} | {reach} | {remarks} |"


def figure(value: float | None, unit: str) -> str:
    """Write a value with three digits that count, and its unit."""
    if value is None:
        return ""
    digits = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def better(row: Row) -> str:
    """Say whether `higher` or `lower` is better."""
    return row.get("better") or ("lower" if row["unit"] in UNITS_OF_COST else "higher")


def reached(row: Row) -> bool:
    ratio, target = row["ratio"], row["target"]
    return bool(ratio >= target if better(row) == "higher" else ratio <= target)


def peer_wins(row: Row) -> bool:
    """Tell whether the reference is a peer, and ahead of ours."""
    if not row.get("peer") or row["ratio"] is None:
        return False
    return bool(row["ratio"] < 1 if better(row) == "higher" else row["ratio"] > 1)


def verdict(failed: list[str], seconds: float) -> str:
    took = f"All of it took {seconds / 60:.0f} minutes."
    return f"{took} No figures from {', '.join(failed)}." if failed else took


if __name__ == "__main__":
    sys.exit(main())
