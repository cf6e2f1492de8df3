"""Several processes of one torchrun, killed for real: nobody hangs, nothing is lost, and the result is that of one."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from alignment.gallery import Gallery, build_gallery
from alignment.model import DualEncoder
from alignment.train.config import TrainConfig
from alignment.train.run import train

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple")
PATIENCE = 300.0  # seconds; a machine may be busy


@contextmanager
def torchrun(*arguments: str | Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """Start two processes; whatever happens, none of them is left."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        running = subprocess.Popen(
            [*start, *map(str, arguments)], cwd=ROOT, stdout=file, stderr=file, text=True, env=environment
        )
        family = psutil.Process(running.pid)
        try:
            yield running
        finally:
            kill_all(family)
            running.wait(timeout=60)


def kill_all(family: psutil.Process) -> None:
    """End torchrun and all that it started, at once."""
    if family.is_running():
        for process in [*family.children(recursive=True), family]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def workers(running: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Find the processes that torchrun started, by their rank."""
    found = {}
    for child in psutil.Process(running.pid).children():
        rank = child.environ().get("RANK")
        if rank is not None:
            found[int(rank)] = child
    return found


def until(what: Callable[[], object]) -> None:
    """Wait for something to happen."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


# ---------------------------------------------------------------- a gallery


def committed(database: Path) -> int:
    """Count the embeddings in a file of a build."""
    with (
        suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection,
    ):
        return int(connection.execute("SELECT count(*) FROM embedding").fetchone()[0])
    return 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_build_and_the_next_one_goes_on(
    victim: int, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    rng = np.random.default_rng(0)
    count = 384  # several seconds: a process commits every two
    for number in range(count):
        pixels = rng.integers(0, 256, (700, 700, 3), dtype=np.uint8)  # they take a while to open
        Image.fromarray(pixels).save(source / f"{number:03}.bmp")
    model = checkpoint("clip")
    command = ["-m", "alignment.gallery", "build", source, "--out", out, "--model", model, "--no-calibration"]
    with torchrun(*command, log=tmp_path / "log 1") as running:
        until(lambda: min(committed(out / f"share-{number}-of-2.db") for number in (1, 2)) > 8)
        workers(running)[victim].send_signal(signal.SIGKILL)
        assert running.wait(timeout=PATIENCE) != 0
    assert not (out / "gallery.db").exists()
    kept = sum(committed(path) for path in out.glob("share-*.db"))
    with torchrun(*command, log=tmp_path / "log 2") as running:
        assert running.wait(timeout=PATIENCE) == 0
    told = (tmp_path / "log 2").read_text()
    encoded, reused = (int(word) for word in told.split("  pictures: ")[1].split()[0:3:2])
    assert encoded + reused == count
    assert reused >= kept
    encoder = DualEncoder.load(model, device="cpu")
    gallery, expected = Gallery.load(out, encoder), build_gallery(source, tmp_path / "one", encoder, calibrate=False)
    assert list(gallery.pictures) == list(expected.pictures)
    torch.testing.assert_close(gallery.images.embeds, expected.images.embeds, atol=1e-6, rtol=2**-10)  # a last bit
    assert all(isinstance(gallery.thumbnail(picture), bytes) for picture in gallery.pictures)


# ---------------------------------------------------------------- a training


def paint(folder: Path, count: int) -> Path:
    """Fill a folder with pictures of two halves, captioned by their colours."""
    folder.mkdir(parents=True)
    lines = []
    for number, (above, below) in enumerate(itertools.islice(itertools.permutations(COLOURS, 2), count)):
        picture = Image.new("RGB", (48, 48), above)
        ImageDraw.Draw(picture).rectangle((0, 24, 48, 48), fill=below)
        picture.save(folder / f"{number:03}.png")
        lines.append(json.dumps({"file_name": f"{number:03}.png", "caption": f"{above} over {below}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_training_of_two_processes_that_was_killed_ends_with_the_weights_of_one(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    data, two, one = paint(tmp_path / "flags", 42), tmp_path / "two", tmp_path / "one"
    options = {"batch_size": 8, "max_steps": 40, "measure_every": 4, "patience": 99, "learning_rate": 1e-3}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    start = ["--model", checkpoint("clip"), "--data", data, "--preset", "full", "--device", "cpu", *words]
    command = ["-m", "alignment.train", "--output", two]
    with torchrun(*command, *map(str, start), log=tmp_path / "log 1") as running:
        until(lambda: (two / "checkpoints" / "checkpoint-8" / "complete").exists())
        kill_all(psutil.Process(running.pid))
        assert running.wait(timeout=PATIENCE) != 0
    assert not (two / "run.json").exists()
    with torchrun(*command, "--resume", log=tmp_path / "log 2") as running:
        assert running.wait(timeout=PATIENCE) == 0, (tmp_path / "log 2").read_text()
    told = (tmp_path / "log 2").read_text()
    assert told.count("Model and report: ") == 1
    record = json.loads((two / "run.json").read_text())
    assert record["plan"]["processes"] == 2
    steps = [entry["step"] for entry in record["history"] if "eval_recall_sum" in entry]
    assert steps == list(range(4, 41, 4))  # measured once each, before the kill and after
    train(TrainConfig(data=str(data), output=str(one), model=str(checkpoint("clip")), device="cpu", preset="full",
                      **options))  # fmt: skip
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-3
