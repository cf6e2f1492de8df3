"""On ZeroGPU: many pictures borrow a GPU in another process, and nobody waits in vain if there is none.

ZeroGPU's own package takes part; what it asks the machine around it for is answered here.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from PIL import Image

from alignment.bundled import ROOT
from alignment.gallery import build_gallery
from alignment.model import DualEncoder, chunk_size, zerogpu
from alignment.model.zerogpu import GPU_BATCH, MAX_CPU_PICTURES, ZeroGPUTower

Inputs = dict[str, torch.Tensor]


class Forking(ModuleType):
    """A stand-in for `spaces`, where the other process finds no GPU either: it forks, pickles and forgets alike."""

    def __init__(self) -> None:
        super().__init__("spaces")
        self.asked: list[float] = []

    def GPU(self, task: Callable[..., Any], duration: float) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.asked.append(duration)
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            process = context.Process(target=lambda: theirs.send(task(*args)))
            process.start()
            theirs.close()
            try:
                return ours.recv()
            finally:
                process.join()

        return run


@pytest.fixture
def spaces(monkeypatch: pytest.MonkeyPatch) -> Forking:
    package = Forking()
    monkeypatch.setitem(sys.modules, "spaces", package)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    return package


def doubled(inputs: Inputs) -> torch.Tensor:
    seen.append(len(inputs["x"]))
    return inputs["x"] * 2


def halved(inputs: Inputs) -> torch.Tensor:
    seen.append(len(inputs["x"]))
    return inputs["x"] / 2


seen: list[int] = []


@pytest.fixture
def tower(spaces: Forking) -> ZeroGPUTower:
    """A tower whose GPU doubles, in another process, and whose CPU halves, in this one."""
    seen.clear()
    return ZeroGPUTower(doubled, halved)


def batch(count: int, first: int = 0) -> Inputs:
    return {"x": torch.arange(first, first + count).float().reshape(-1, 1)}


def test_many_pictures_go_to_another_process_and_few_stay(tower: ZeroGPUTower, spaces: Forking) -> None:
    assert tower(batch(MAX_CPU_PICTURES)).tolist() == (batch(MAX_CPU_PICTURES)["x"] / 2).tolist()
    assert (seen, spaces.asked) == ([MAX_CPU_PICTURES], [])
    embeds = tower(batch(MAX_CPU_PICTURES + 1))
    assert embeds.tolist() == (batch(MAX_CPU_PICTURES + 1)["x"] * 2).tolist()
    assert (embeds.device.type, embeds.dtype) == ("cpu", torch.float32)
    assert seen == [MAX_CPU_PICTURES]  # what happens there is not seen here
    assert spaces.asked == [zerogpu.DURATION_S]


def test_batches_are_put_together_so_that_the_gpu_is_asked_for_seldom(tower: ZeroGPUTower, spaces: Forking) -> None:
    batches = [batch(8, first) for first in range(0, 2 * GPU_BATCH, 8)]
    embeds = torch.cat(list(tower.stream(batches)))
    assert embeds.flatten().tolist() == [2.0 * row for row in range(2 * GPU_BATCH)]
    assert len(spaces.asked) == 2


@pytest.mark.parametrize("error", [RuntimeError("GPU task aborted"), ValueError("You have exceeded your quota")])
def test_where_no_gpu_is_lent_the_cpu_does_it(
    tower: ZeroGPUTower, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refuse(_: object) -> None:
        raise error

    monkeypatch.setattr(tower, "call_gpu", refuse)
    assert tower(batch(20)).tolist() == (batch(20)["x"] / 2).tolist()
    assert seen == [8, 8, 4]
    assert str(error) in caplog.text


def test_visitors_bring_more_pictures_at_a_time_only_where_a_gpu_is_lent(
    spaces: Forking, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (chunk_size(4), chunk_size(8, 64)) == (16, 64)
    monkeypatch.delenv("SPACES_ZERO_GPU")
    assert (chunk_size(4), chunk_size(8, 64)) == (4, 8)


def test_without_the_package_or_elsewhere_nothing_is_borrowed(
    spaces: Forking, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Path]
) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", "false")
    assert DualEncoder.load(checkpoint("clip")).tower("image").backend != "zerogpu"
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    assert DualEncoder.load(checkpoint("clip"), device="cpu").tower("image").backend != "zerogpu"
    monkeypatch.delitem(sys.modules, "spaces")
    assert DualEncoder.load(checkpoint("clip")).tower("image").backend != "zerogpu"


def test_an_encoder_that_borrows_embeds_as_any_other(
    spaces: Forking, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Path], pictures: list[Image.Image]
) -> None:
    plain = DualEncoder.load(checkpoint("clip"), device="cpu", runtime="torch")
    monkeypatch.setattr(zerogpu, "GPU_DEVICE", "cpu")  # there is no CUDA here
    encoder = DualEncoder.load(checkpoint("clip"))
    many = [picture.rotate(angle) for angle in range(7) for picture in pictures]
    assert torch.allclose(encoder.encode_images(many), plain.encode_images(many), atol=1e-5)
    assert len(spaces.asked) == 1
    assert torch.allclose(encoder.encode_images(pictures), plain.encode_images(pictures), atol=1e-5)
    assert torch.allclose(encoder.encode_texts(["a dog"]), plain.encode_texts(["a dog"]), atol=1e-5)
    assert len(spaces.asked) == 1


# ---------------------------------------------------------------- ZeroGPU's own package


class Scheduler(ThreadingHTTPServer):
    """What lends GPUs on ZeroGPU, as far as its package asks; it lends one that is not there."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Lending)
        self.asked: list[tuple[str, dict[str, list[str]]]] = []


class Lending(BaseHTTPRequestHandler):
    server: Scheduler

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        self.server.asked.append((url.path, parse_qs(url.query)))
        lent = {"idle": False, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": "allowed"}
        data = json.dumps(lent if url.path == "/schedule" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keep the test's output quiet."""


ON_ZERO = """
import sys, torch
torch.version.cuda = "13.0"  # what this PyTorch lacks and theirs has
torch._C._cuda_init = torch.cuda._is_in_bad_fork = bool
torch.cuda.graphs._cuda_isCurrentStreamCapturing = lambda: print("> asked the driver")
import app
from PIL import Image
engine = app.load_engine(app.parse(["--model", sys.argv[1], "--gallery", sys.argv[2]]))
there = engine.encoder.tower("image").gpu.module
print(">", engine.encoder.device, there.device, next(there.get().parameters()).device)
page = app.build_page(engine)
print(">", page._queue.max_size > 1)  # what ZeroGPU makes of it where nobody says
page.launch(prevent_thread_lock=True, **app.launch_options(engine))
engine.embed_image(Image.new("RGB", (64, 64)))
pictures = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(0, 240, 12)]
print(">", *engine.embed_images(pictures).shape)
print(">", engine.search_images("a dog").matches[0].item.id != "")
page.close()
"""


def test_the_app_runs_under_the_package_of_zerogpu(
    checkpoint: Callable[[str], Path], pictures: list[Image.Image], tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for row, picture in enumerate(pictures):
        picture.save(tmp_path / "photos" / f"{row}.png")
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    build_gallery(tmp_path / "photos", tmp_path / "gallery", encoder, calibrate=False)
    scheduler = Scheduler()
    Thread(target=scheduler.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    zero = {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{scheduler.server_address[1]}"}
    zero |= {"ZEROGPU_OFFLOAD_DIR": str(tmp_path / "offload"), "HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", ON_ZERO, str(checkpoint("clip")), str(tmp_path / "gallery")]
    ours = {"GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "GRADIO_SERVER_PORT": "9860"}  # where no other test looks
    env = {**os.environ, **zero, **ours}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    scheduler.shutdown()
    scheduler.server_close()
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix("> ") for line in done.stdout.splitlines() if line.startswith("> ")]
    assert said == ["cpu cuda cuda:0", "True", "20 24", "True"]
    assert "No GPU was assigned, so the CPU encodes 20 pictures" in done.stderr  # the one that was lent is not there
    assert [path for path, _ in scheduler.asked] == ["/startup-report", "/schedule", "/allow", "/release"]
    asked = dict(scheduler.asked)
    assert asked["/schedule"]["durationSeconds"] == [str(zerogpu.DURATION_S)]
    assert asked["/release"]["fail"] == ["true"]
