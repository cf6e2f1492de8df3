"""Several processes under torchrun: they train as one would, and one that cannot go on ends all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_gallery_distributed import assert_gallery_of_one, cache, encoder, photo, shards
from test_train_run import Start, finish, flags, record_of, same, start

from alignment.gallery.database import DATABASE
from alignment.model import DualEncoder

__all__ = ["cache", "encoder", "flags", "shards", "start"]

Checkpoint = Callable[[str], Path]
ROOT = Path(__file__).parents[2]
BUILD = ("-m", "alignment.gallery", "build")


def torchrun(*arguments: str | Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*start, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=240, env=environment
    )


# ---------------------------------------------------------------- training


def test_two_processes_come_to_the_weights_of_one_with_the_joint_batch(
    start: Start, checkpoint: Checkpoint, flags: Path, tmp_path: Path
) -> None:
    options = ["--model", str(checkpoint("clip")), "--data", str(flags), "--preset", "full", "--no-augment"]
    options += ["--batch-size", "9", "--max-steps", "6", "--measure-every", "3", "--learning-rate", "1e-3"]
    one, two = tmp_path / "one", tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "alignment.train", *options, "--output", str(two), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    finish(start(*options, "--batch-size", "8", "--output", str(one)))

    assert record_of(two).plan["processes"] == 2
    assert record_of(two).plan["batch_size"] == 8  # each process has half
    assert done.stderr.count("Fine-tuning ") == 1
    assert done.stdout.count("Model and report: ") == 1
    assert not same(two, checkpoint("clip"), 1e-3)
    assert same(one, two, 1e-4)
    sums = [
        [entry["eval_recall_sum"] for entry in record_of(run).history if "eval_recall_sum" in entry]
        for run in (one, two)
    ]
    assert sums[0] == pytest.approx(sums[1])


# ---------------------------------------------------------------- galleries


def test_two_processes_make_the_gallery_of_one(shards: Path, cache: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    done = torchrun(*BUILD, shards, "--out", tmp_path / "two", "--model", encoder.name)
    assert_gallery_of_one(done, shards, tmp_path, encoder)


def test_another_model_is_refused_before_anything_is_embedded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Each process has its own models, of which one differs."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(photo(0))
    for rank, name in enumerate(("clip", "siglip")):
        (tmp_path / f"model{rank}").symlink_to(checkpoint(name))
    script = f"""
import os, sys
from alignment.gallery import main
model = {str(tmp_path / "model")!r} + os.environ["RANK"]
sys.exit(main(["build", {str(tmp_path / "photos")!r}, "--out", {str(tmp_path / "out")!r}, "--model", model]))
"""
    (tmp_path / "run.py").write_text(script)
    done = torchrun(tmp_path / "run.py")
    assert done.returncode != 0
    assert "Process 1 has another model" in done.stderr
    assert not (tmp_path / "out").exists()


def test_one_process_that_cannot_go_on_ends_all_with_its_reason(tmp_path: Path, encoder: DualEncoder) -> None:
    done = torchrun(*BUILD, tmp_path / "nothing here", "--out", tmp_path / "out", "--model", encoder.name)
    assert done.returncode != 0
    assert "nothing here" in done.stderr
    assert not (tmp_path / "out" / DATABASE).exists()
