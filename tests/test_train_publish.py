"""What reaches the Hub: a stand-in answers its HTTP interface on this machine, and huggingface_hub talks to it."""

from __future__ import annotations

import base64
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from transformers import AutoModel

from alignment.model import DualEncoder
from alignment.train.publish import push_to_hub
from alignment.train.record import RunRecord
from alignment.train.report import model_card

# huggingface_hub hands large files to its HTTP client by an argument which that client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

COUNTS = ("train_images", "train_captions", "eval_images", "eval_captions", "steps", "estimated_seconds")
PLAN = dict.fromkeys(COUNTS, 3)
TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """As much of the Hub as an upload needs: repositories, large files, commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.commits: list[list[dict[str, Any]]] = []
        self.unknown: list[str] = []
        self.refuse: dict[str, int] = {}  # part of an address -> status

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Choose status and JSON for a request."""
        for part, status in self.refuse.items():
            if part in path:
                return status, {"error": "refused by the test"}
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if (method, path) == ("POST", "/api/repos/create"):
            return self.create(json.loads(body))
        if (method, path) == ("POST", "/api/validate-yaml"):
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return 200, {"errors": [], "warnings": []}
        if method == "PUT" and path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return 200, {}
        if name in self.repositories and path.startswith(f"/api/models/{name}/tree/main"):
            files = self.repositories[name]
            return 200, [{"type": "file", "path": file, "size": 1, "oid": "0" * 40} for file in files]
        if name in self.repositories and path == f"/api/models/{name}/preupload/main":
            return 200, {"files": [self.upload_mode(file["path"]) for file in json.loads(body)["files"]]}
        if name in self.repositories and path == f"/{name}.git/info/lfs/objects/batch":
            return 200, {"objects": [self.upload_place(item) for item in json.loads(body)["objects"]]}
        if name in self.repositories and path == f"/api/models/{name}/commit/main":
            return self.commit(name, [json.loads(line) for line in body.splitlines()])
        self.unknown.append(f"{method} {path}")
        return 404, {"error": "no such address"}

    def create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization'] or 'someone'}/{wanted['name']}"
        taken = name in self.repositories
        self.repositories.setdefault(name, {})
        self.created.append(wanted)
        return 409 if taken else 200, {"url": f"{self.url}/{name}"}

    def upload_mode(self, path: str) -> dict[str, Any]:
        large = path.endswith((".safetensors", ".png"))
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def upload_place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "actions": {"upload": {"href": f"{self.url}/blob/{item['oid']}"}}}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        self.commits.append(lines)
        files = self.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def reply(self) -> None:
        body = self.body()
        path = self.path.split("?")[0]
        status, content = self.server.answer(self.command, path, body)
        if not path.startswith("/blob/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status, content = 401, {"error": "Invalid credentials in Authorization header"}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = reply

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_: object) -> None:
        """Keep the test's output quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # These are read from the environment when huggingface_hub is imported. Everything goes to the stand-in.
    server = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def result(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """Make a result folder as training leaves it, with much in it that must stay at home."""
    return made_result(checkpoint("clip"), tmp_path / "tuned")


def made_result(source: Path, folder: Path) -> Path:
    encoder = DualEncoder.load(source, device="cpu")
    encoder.save(folder)
    record = record_of(encoder)
    record.to_json(folder / "run.json")
    for name, content in {
        "README.md": model_card(record),
        "report.md": "# Report\n",
        "plots/loss.png": "a picture",
        "plots/notes.txt": "private",
        "optimizer.pt": "private",
        "training_args.bin": "private",
        "trainer_state.json": '{"path": "/home/me"}',
        "data.csv": "private",
        ".env": "private",
        "logs/events.out.tfevents": "private",
        "checkpoints/checkpoint-10/config.json": "{}",
        "checkpoints/checkpoint-10/model.safetensors": "private",
        "checkpoints/checkpoint-10/README.md": "private",
        "checkpoints/checkpoint-10/plots/loss.png": "private",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def record_of(encoder: DualEncoder) -> RunRecord:
    return RunRecord(
        command="python -m alignment.train --model m --data /home/me/pets --output /home/me/tuned",
        started="2026-01-02T03:04:05",
        seconds=1.0,
        versions={},
        settings={"output": "/home/me/tuned"},
        plan=PLAN,
        data="/home/me/pets: 3 images",
        base_model="/home/me/m",
        base_fingerprint="ab" * 32,
        fingerprint=encoder.fingerprint,
        history=[],
        before={},
        after={},
        difference={},
        stopped="All steps were made.",
        best_step=1,
        model_type="clip",
    )


SENT = {
    "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "README.md", "report.md", "run.json", "plots/loss.png",
}  # fmt: skip


def test_what_belongs_to_the_model_arrives_byte_for_byte_and_nothing_else(
    hub: Hub, api: HfApi, result: Path, tmp_path: Path
) -> None:
    assert push_to_hub(result, "someone/pets", private=True, api=api) == f"{hub.url}/someone/pets"
    arrived = hub.repositories["someone/pets"]
    assert set(arrived) == SENT
    for name, content in arrived.items():
        assert content == (result / name).read_bytes(), name
        assert b"/home/me" not in content, name
    assert hub.created[0]["visibility"] == "private"
    assert len(hub.commits) == 1
    assert {path for path in hub.unknown if "agent-harnesses" not in path} == set()

    copy = tmp_path / "fetched"
    copy.mkdir()
    for name in SENT - {"plots/loss.png"}:
        (copy / name).write_bytes(arrived[name])
    assert DualEncoder.load(copy, device="cpu").fingerprint == DualEncoder.load(result, device="cpu").fingerprint


def test_the_card_loads_the_repository_it_lies_in(hub: Hub, api: HfApi, result: Path) -> None:
    push_to_hub(result, "pets", api=api)  # in one's own account, whose name the Hub knows
    assert b'DualEncoder.load("someone/pets")' in hub.repositories["someone/pets"]["README.md"]
    assert "USER/NAME" not in (result / "README.md").read_text("utf-8")


def test_a_second_push_replaces_the_weights_of_the_first(
    hub: Hub, api: HfApi, result: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    push_to_hub(result, "someone/pets", api=api)
    hub.repositories["someone/pets"]["onnx/model.onnx"] = b"somebody's"
    shards = made_result(checkpoint("clip"), tmp_path / "shards")
    (shards / "model.safetensors").unlink()
    AutoModel.from_pretrained(result).save_pretrained(shards, max_shard_size="50KB")
    push_to_hub(shards, "someone/pets", api=api)
    names = {path.name for path in shards.glob("model*")}
    assert len(names) > 2
    assert "model.safetensors" not in names
    assert set(hub.repositories["someone/pets"]) == SENT - {"model.safetensors"} | names | {"onnx/model.onnx"}


def test_weights_that_the_index_does_not_name_stay_at_home(hub: Hub, api: HfApi, result: Path) -> None:
    shutil.copy(result / "model.safetensors", result / "model-00009-of-00009.safetensors")
    push_to_hub(result, "someone/pets", api=api)
    assert set(hub.repositories["someone/pets"]) == SENT


def test_a_composed_model_arrives_too(hub: Hub, api: HfApi, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    push_to_hub(made_result(checkpoint("composed"), tmp_path / "tuned"), "someone/pets", api=api)
    assert set(hub.repositories["someone/pets"]) == SENT


# ---------------------------------------------------------------- refused before anything is sent


@pytest.mark.parametrize("name", ["a/b/c", "/home/me/tuned", "pets of mine", "", "a--b", "some.git"])
def test_a_malformed_name_is_refused(hub: Hub, api: HfApi, result: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no name for a repository"):
        push_to_hub(result, name, api=api)
    assert hub.repositories == {}


def test_a_folder_without_a_model_or_a_card_is_refused(hub: Hub, api: HfApi, result: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no model"):
        push_to_hub(tmp_path / "nowhere", "someone/pets", api=api)
    (result / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match="model card"):
        push_to_hub(result, "someone/pets", api=api)
    (result / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        push_to_hub(result, "someone/pets", api=api)
    assert hub.repositories == {}


def test_damaged_weights_are_refused(hub: Hub, api: HfApi, result: Path) -> None:
    path = result / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged"):
        push_to_hub(result, "someone/pets", api=api)
    assert hub.repositories == {}


def test_a_card_of_other_weights_is_refused(hub: Hub, api: HfApi, result: Path) -> None:
    encoder = DualEncoder.load(result, device="cpu")
    with torch.no_grad():
        encoder.module.logit_scale.add_(1)
    encoder.save(result)
    with pytest.raises(ValueError, match="are not those that its"):
        push_to_hub(result, "someone/pets", api=api)
    (result / "run.json").unlink()
    push_to_hub(result, "someone/pets", api=api)
    assert set(hub.repositories["someone/pets"]) == SENT - {"run.json"}


def test_a_configuration_that_names_a_local_folder_is_refused(hub: Hub, api: HfApi, result: Path) -> None:
    config = json.loads((result / "config.json").read_text("utf-8"))
    config["text_config"]["_name_or_path"] = "/home/me/secret/tower"
    (result / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match="secret/tower"):
        push_to_hub(result, "someone/pets", api=api)
    assert hub.repositories == {}


# ---------------------------------------------------------------- refused by the Hub


def test_without_a_login_the_error_says_how_to_log_in(
    hub: Hub, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for api in (None, HfApi(endpoint=hub.url), HfApi(endpoint=hub.url, token=False)):
        with pytest.raises(ValueError, match="hf auth login"):
            push_to_hub(result, "someone/pets", api=api)
    assert hub.repositories == {}


def test_a_token_that_the_hub_does_not_accept(hub: Hub, result: Path) -> None:
    with pytest.raises(ValueError, match="does not accept the token"):
        push_to_hub(result, "someone/pets", api=HfApi(endpoint=hub.url, token="hf_wrong"))


@pytest.mark.parametrize(
    ("where", "status", "error", "words"),
    [
        ("/api/repos/create", 403, ValueError, "may not write to someone/pets"),
        ("/api/repos/create", 503, ConnectionError, "503"),
        ("/commit/main", 403, ValueError, "may not write to someone/pets"),
        ("/commit/main", 400, ValueError, "refuses what was sent"),
        ("/blob/", 403, ConnectionError, "broke off"),
    ],
)
def test_refusals_of_the_hub_are_sentences(
    hub: Hub, api: HfApi, result: Path, where: str, status: int, error: type[Exception], words: str
) -> None:
    hub.refuse[where] = status
    with pytest.raises(error, match=words) as raised:
        push_to_hub(result, "someone/pets", api=api)
    assert TOKEN not in str(raised.value)
    assert hub.commits == []


def test_a_hub_that_cannot_be_reached(hub: Hub, result: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConnectionError, match="cannot be reached"):
            push_to_hub(result, "someone/pets", api=HfApi(endpoint=nobody, token=TOKEN))


def test_offline_mode_is_named(result: Path) -> None:
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        push_to_hub(result, "someone/pets", api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))
