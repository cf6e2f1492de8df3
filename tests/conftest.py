"""Shared fixtures: a tiny random checkpoint of every family, made from a config, and a few pictures."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores, and so do the processes that they start

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from xdist.scheduler import LoadFileScheduling

if "PYTEST_XDIST_WORKER" not in os.environ:  # graphs of one run are not those of another; its workers share them
    _CACHE = TemporaryDirectory(prefix="alignment-cache-")
    os.environ["ALIGNMENT_CACHE"] = _CACHE.name
gc.disable()  # imports and collection make a million objects and no garbage; see pytest_runtestloop

pytest.register_assert_rewrite("index_contract")

FAMILIES = ("clip", "siglip", "siglip2", "siglip2-naflex", "chinese-clip", "vit-bert", "clip-roberta", "composed")


# What one worker runs: files on a line share a browser, or the server whose processes have done their imports already.
# Those that take longest come first: a worker that begins with one of them last would be waited for.
LONGEST = (
    "test_quality.py test_hostile_text.py test_page.py test_explanation.py test_scan.py",
    "test_kills.py test_train_run.py test_train_objective.py test_gallery_distributed.py test_service_process.py",
    "test_openvino.py",
    "test_matrix_tab.py test_photos_tab.py test_pictures_tab.py test_evaluate_tab.py test_links.py test_nothing_fits.py"
    " test_refusals.py",
    *("test_fuzz.py", "test_train_trainer.py", "test_api.py", "test_app.py", "test_space.py", "test_index.py"),
    *("test_preprocess_preprocessor.py", "test_evaluate_eccv.py", "test_train_presets.py", "test_compact.py"),
    *("test_middleware.py", "test_explain.py", "test_zerogpu.py", "test_service.py", "test_gallery_command.py"),
    *("test_summaries.py", "test_calibration.py", "test_space_publish.py", "test_compact_checkpoint.py"),
)
PLACE = {name: number for number, names in enumerate(LONGEST) for name in names.split()}


def pytest_configure(config: pytest.Config) -> None:
    """Let PyTorch compute on one core and transformers say nothing, in each process that runs tests."""
    if config.getoption("numprocesses", None):  # it starts the workers, which would wait for the imports
        return
    import torch
    import transformers

    import alignment.server.gradio_internals  # noqa: F401 - before a test imports Gradio, which takes longer by itself

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that the workers end together."""
    items.sort(key=lambda item: PLACE.get(item.path.name, len(LONGEST)))


class SharingScheduler(LoadFileScheduling):
    """Gives one worker the files that share something; pytest 9.2 ignores the groups of pytest-xdist 3.8."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return str(PLACE.get(Path(file).name, file))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Let pytest-xdist use it."""
    return SharingScheduler(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage, but leave out what was imported, and all of it seldom: that takes a third of a second."""
    gc.freeze()
    gc.set_threshold(700, 10, 100)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def ports() -> None:
    """Let each worker look for free ports of its own: between the look and the use another could take one."""
    if server := sys.modules.get("gradio.http_server"):
        server.INITIAL_PORT_VALUE += server.TRY_NUM_PORTS * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """Collect the garbage of the module before, and leave out what stays: accelerate collects all at each training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cohorts() -> Iterator[None]:
    """Embed the cohort once with each model, not for each gallery that a test builds with it."""
    from alignment.gallery import build

    of_models: dict[str, Any] = {}

    def build_cohort(encoder: Any) -> Any:
        if encoder.fingerprint not in of_models:
            of_models[encoder.fingerprint] = embedded(encoder)
        return of_models[encoder.fingerprint]

    with pytest.MonkeyPatch.context() as patch:
        embedded = build.build_cohort
        patch.setattr(build, "build_cohort", build_cohort)
        yield


@pytest.fixture(scope="module")
def rough_tuning() -> Iterator[None]:
    """Ask fewer queries when an index is written, which takes most of its time: for tests of anything but recall."""
    from alignment.index import local

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "_QUERIES", 64)
        yield


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    """Fail if a thread that the test has started does not end; the server's own stay, and those of others may end."""
    before = set(threading.enumerate())
    yield
    patience = time.monotonic() + 10
    while left := {one for one in set(threading.enumerate()) - before if not one.name.startswith("AnyIO")}:
        assert time.monotonic() < patience, left
        time.sleep(0.05)


@pytest.fixture
def free_port() -> str:
    """A port that nothing listens at: the default one may be taken by a developer's app or another worker's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Run the test once for every family."""
    return request.param


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random checkpoint by its key in `tiny_models.BUILDERS`, or "composed": `checkpoint("clip")`."""
    import torch
    from tiny_models import save_tiny_model

    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def build(name: str) -> Path:
        if name == "composed":
            from alignment.model import DualEncoder

            torch.manual_seed(sum(map(ord, name)))
            towers = build("vit"), build("bert")
            DualEncoder.compose(*towers, embed_dim=24, projection="mlp", device="cpu").save(root / name)
        else:
            save_tiny_model(name, root / name)
        return root / name

    return build


@pytest.fixture(scope="session")
def compact_engine():
    """The bundled model with the bundled gallery; shared, so a test must not change it."""
    from alignment.bundled import GALLERY, MODEL, ROOT
    from alignment.engine import AlignmentEngine
    from alignment.gallery import Gallery
    from alignment.model import DualEncoder

    encoder = DualEncoder.load(ROOT / MODEL, device="cpu")
    return AlignmentEngine(encoder, Gallery.load(ROOT / GALLERY, encoder))


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Three pictures of different shapes, with content that depends on the place."""
    rng = np.random.default_rng(0)
    shapes = ((48, 64), (64, 40), (33, 33))
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).resize((96, 80)) for shape in shapes]


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """Encode a PIL image: `encoded(image, "PNG", **options)`."""

    def encode(image: Image.Image, format: str, **options: object) -> bytes:
        buffer = BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def first_answer(tmp_path: Path, free_port: str) -> Callable[..., dict]:
    """Start an app in a process of its own, ask it for pictures of a caption over HTTP, and interrupt it.

    It serves the first picture's thumbnail, and ends in order.
    """

    def ask(command: list[str], cwd: Path, caption: str = "a cat", **environment: str) -> dict:
        ours = ("ALIGNMENT_", "GRADIO_", "PYTHON")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        env |= {"ALIGNMENT_CACHE": os.environ["ALIGNMENT_CACHE"], "PYTHONDONTWRITEBYTECODE": "1"}
        env |= {"GRADIO_SERVER_PORT": free_port, "GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "no_proxy": "127.0.0.1"}
        with subprocess.Popen(command, cwd=cwd, env=env | environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                assert process.stdout.readline() == f"Open http://127.0.0.1:{free_port}/\n"
                with httpx.Client(base_url=f"http://127.0.0.1:{free_port}", trust_env=False) as client:
                    call = "/gradio_api/call"
                    asked = client.post(f"{call}/v2/search_images", json={"caption": caption, "k": 3}).json()
                    told = client.get(f"{call}/search_images/{asked['event_id']}", timeout=60).text
                    found = json.loads(told.partition("event: complete\ndata: ")[2])[0]
                    thumbnail = client.get(f"/thumbnails/{found['matches'][0]['id']}.webp")
                assert (thumbnail.status_code, thumbnail.headers["content-type"]) == (200, "image/webp")
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 0
                return found
            finally:
                process.kill()

    return ask
