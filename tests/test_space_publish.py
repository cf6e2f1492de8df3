"""A Space reaches the Hub: a stand-in answers its HTTP interface here, and notes every call that it does not expect.

The command runs in a process of its own, which can connect to this machine only and says so when it tries otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import HfApi

from alignment.bundled import ROOT
from alignment.space import ModelSource, Space, main, publish

# huggingface_hub hands large files to its HTTP client by an argument which that client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_ofthetestandofnothingelseatall"
NAME = "someone/app"
LARGE = 10_000_000
WEIGHTS = ("checkpoints/compact/frozen.safetensors", "checkpoints/compact/trained.safetensors")


class Hub(ThreadingHTTPServer):
    """As much of the Hub as a Space needs; strict about what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] | None = None  # of the Space; None while there is none
        self.sdk = "gradio"
        self.variables: dict[str, str] = {}
        self.hardware = "cpu-basic"
        self.created: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.commits: list[list[dict[str, Any]]] = []
        self.calls: list[str] = []
        self.unexpected: list[str] = []
        self.refuse: dict[str, int] = {}  # part of "METHOD path" -> status; 0 breaks the connection off

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Choose status and JSON for a request."""
        call = f"{method} {path}"
        self.calls.append(call)
        for part, status in self.refuse.items():
            if part in call:
                return status, {"error": "refused by the test"}
        if call == "GET /api/agent-harnesses":  # the library asks for a list of programs that may be using it
            return 404, {}
        if call == "POST /api/validate-yaml":
            return self.validate(json.loads(body))
        if call == "POST /api/repos/create":
            return self.create(json.loads(body))
        if method == "PUT" and path.startswith("/blob/"):
            return self.store(path.removeprefix("/blob/"), body)
        if self.files is None:
            return (404, {"error": "Repository not found"}) if path == f"/api/spaces/{NAME}" else self.wrong(call)
        return self.of_the_space(method, path, json.loads(body) if body and "/commit/" not in path else body)

    def of_the_space(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        api = f"/api/spaces/{NAME}"
        assert self.files is not None
        match method, path.removeprefix(api):
            case "GET", "":
                siblings = [{"rfilename": name} for name in self.files]
                return 200, {"id": NAME, "sdk": self.sdk, "siblings": siblings}
            case "GET", "/runtime":
                return 200, self.runtime()
            case "POST", "/hardware":
                self.hardware = body["flavor"]
                return 200, self.runtime()
            case (("GET" | "POST" | "DELETE"), "/variables"):
                return self.settle(method, body)
            case "GET", "/tree/main":
                return 200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.files]
            case "POST", "/preupload/main":
                return 200, {"files": [self.upload_mode(file) for file in body["files"]]}
            case "POST", "/commit/main":
                return self.commit([json.loads(line) for line in body.splitlines()])
        if (method, path) == ("POST", f"/spaces/{NAME}.git/info/lfs/objects/batch"):
            assert body["operation"] == "upload"
            return 200, {"objects": [self.upload_place(item) for item in body["objects"]]}
        return self.wrong(f"{method} {path}")

    def wrong(self, call: str) -> tuple[int, Any]:
        self.unexpected.append(call)
        return 404, {"error": "no such address"}

    def validate(self, sent: dict[str, Any]) -> tuple[int, Any]:
        front = yaml.safe_load(sent["content"].split("---")[1])
        known = {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file"}
        known |= {"short_description", "thumbnail", "license", "tags", "models", "preload_from_hub"}
        errors = [{"message": f"unknown key {key}"} for key in set(front) - known - {"suggested_hardware"}]
        if sent["repoType"] != "space" or len(front["short_description"]) > 60:
            errors.append({"message": "not a Space's card"})
        return (400, {"errors": errors, "warnings": []}) if errors else (200, {"errors": [], "warnings": []})

    def create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        assert (wanted["organization"], wanted["name"]) == tuple(NAME.split("/"))
        assert (wanted["type"], wanted["sdk"]) == ("space", "gradio")
        self.created.append(wanted)
        self.files = {".gitattributes": b"*.safetensors filter=lfs", "README.md": b"A new Space"}
        self.hardware = wanted.get("hardware", "cpu-basic")
        return 200, {"url": f"{self.url}/spaces/{NAME}"}

    def runtime(self) -> dict[str, Any]:
        hardware = {"current": self.hardware, "requested": self.hardware}
        return {"stage": "RUNNING", "hardware": hardware, "storage": None, "gcTimeout": None}

    def settle(self, method: str, body: Any) -> tuple[int, Any]:
        if method == "POST":
            assert set(body) == {"key", "value"}
            self.variables[body["key"]] = body["value"]
        elif method == "DELETE":
            del self.variables[body["key"]]
        return 200, {key: {"key": key, "value": value} for key, value in self.variables.items()}

    def upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["size"] > LARGE or file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def upload_place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "actions": {"upload": {"href": f"{self.url}/blob/{item['oid']}"}}}

    def store(self, oid: str, body: bytes) -> tuple[int, Any]:
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        return 200, {}

    def commit(self, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        assert lines[0]["key"] == "header"
        self.commits.append(lines)
        assert self.files is not None
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del self.files[value["path"]]
        return 200, {"commitUrl": f"{self.url}/{NAME}/commit/{'1' * 40}", "commitOid": "1" * 40}


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def reply(self) -> None:
        body = self.body()
        path = self.path.split("?")[0]
        try:
            status, content = self.server.answer(self.command, path, body)
        except Exception as error:  # an assertion above is a call that the Hub would not understand
            self.server.unexpected.append(f"{self.command} {path}: {error!r}")
            status, content = 500, {"error": "the stand-in does not understand"}
        open_to_all = path.startswith("/blob/") or path.endswith("/agent-harnesses")
        if not open_to_all and self.headers["Authorization"] != f"Bearer {TOKEN}":
            status, content = 401, {"error": "Invalid credentials in Authorization header"}
        if status == 0:
            self.close_connection = True
            return
        data = json.dumps(content).encode()
        self.send_response(status)
        if content == {"error": "Repository not found"}:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_CONNECT = reply

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
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
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before the library tries again
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()
    assert server.unexpected == []


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def space() -> Space:
    return Space(NAME, ModelSource("checkpoints/compact", ROOT / "checkpoints/compact", ()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Space with as few files as show how each is sent."""
    front = {"title": "T", "sdk": "gradio", "short_description": "S", "license": "apache-2.0"}
    files = {
        "README.md": f"---\n{yaml.safe_dump(front)}---\n",
        "app.py": "print()",
        "alignment/__init__.py": "",
        "model.safetensors": "weights",
    }
    for name, content in files.items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_text(content, "utf-8")
    return tmp_path / "space"


# ---------------------------------------------------------------- the command, from one end to the other

NO_OTHER_MACHINE = """
import os, socket
real = socket.socket.connect
def connect(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        with open(os.environ["OUTSIDE"], "a") as file:
            print(address, file=file)
        raise OSError("no other machine may be reached from this test")
    return real(self, address)
socket.socket.connect = connect
"""


@pytest.fixture
def command(hub: Hub, tmp_path: Path):
    """Run `python -m alignment.space publish` against the stand-in; its exit status, output and errors."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(NO_OTHER_MACHINE, "utf-8")
    outside = tmp_path / "outside.txt"

    def run(*words: str) -> tuple[int, str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        env |= {"PYTHONPATH": f"{tmp_path / 'guard'}{os.pathsep}{ROOT}", "PYTHONWARNINGS": "ignore"}
        env |= {"no_proxy": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OUTSIDE": str(outside)}
        words = (sys.executable, "-m", "alignment.space", "publish", NAME, *words)
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
        assert not outside.exists(), outside.read_text("utf-8")
        return done.returncode, done.stdout, done.stderr

    return run


def test_the_command_creates_a_space_and_brings_it_up_to_date(
    hub: Hub, command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, complaints = command("--private", "--hardware", "zero-a10g", "--variable", "ALIGNMENT_LANG=zh")
    assert (status, said.splitlines()[0]) == (0, f"Created {hub.url}/spaces/{NAME}"), complaints
    assert TOKEN not in said + complaints
    (created,) = hub.created
    assert (created["visibility"], created["hardware"]) == ("private", "zero-a10g")
    assert hub.variables == {
        "ALIGNMENT_MODEL": "checkpoints/compact",
        "ALIGNMENT_GALLERY": "assets/gallery",
        "GRADIO_SSR_MODE": "False",
        "ALIGNMENT_LANG": "zh",
    }
    assert hub.files is not None
    for name in ("app.py", "alignment/ui/api.py", "assets/gallery/gallery.db", *WEIGHTS):
        assert hub.files[name] == (ROOT / name).read_bytes(), name
    assert {name for name, data in hub.files.items() if len(data) > LARGE} == {*WEIGHTS, "assets/gallery/gallery.db"}
    assert not [name for name in hub.files if re.match(r"tests/|alignment/(train|compact|space)/|\.git/", name)]
    assert len(hub.commits) == 1
    assert "POST /api/validate-yaml" in hub.calls

    first = dict(hub.files)
    hub.files |= {"alignment/gone.py": b"of an earlier version", ".env": b"somebody's mistake"}
    hub.variables |= {"ALIGNMENT_REVISION": "of another model", "OWN": "the owner's", "ALIGNMENT_LANG": "en"}
    hub.calls.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["publish", NAME]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Updated {hub.url}/spaces/{NAME}",
        "  Variables set: ALIGNMENT_REVISION",
        "  Files deleted: .env, alignment/gone.py",
    ]
    assert hub.files.keys() == first.keys()
    assert {name for name in first if first[name] != hub.files[name]} == {"README.md", "requirements.txt"}  # hardware
    assert "REVISION" not in " ".join(hub.variables)
    assert (hub.variables["OWN"], hub.variables["ALIGNMENT_LANG"]) == ("the owner's", "en")
    assert len(hub.created) == 1
    assert not [call for call in hub.calls if "hardware" in call or call.startswith("POST /api/spaces/someone/app/var")]


def test_without_a_token_the_command_says_how_to_get_one(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main(["publish", NAME]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "error: Not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN, and publish again.\n"
    )
    assert hub.calls == []


# ---------------------------------------------------------------- what an update keeps


def test_what_is_already_so_is_not_said_again(hub: Hub, api: HfApi, space: Space, folder: Path) -> None:
    assert publish(space, folder, api=api).created
    hub.calls.clear()
    again = publish(space, folder, api=api)
    assert (again.created, again.deleted, again.variables) == (False, (), ())
    assert not [call for call in hub.calls if re.match("(POST|DELETE) .*(variables|hardware|create)", call)]


@pytest.mark.parametrize("call", ["preupload", "PUT /blob", "commit"])
def test_an_update_that_breaks_off_leaves_what_runs_as_it_is(
    hub: Hub, api: HfApi, space: Space, folder: Path, call: str
) -> None:
    publish(space, folder, api=api)
    variables, files = dict(hub.variables), dict(hub.files or {})
    (folder / "model.safetensors").write_text("other weights", "utf-8")
    hub.refuse[call] = 500
    other = Space(NAME, ModelSource("checkpoints/other", ROOT, ()), folder)
    with pytest.raises(ConnectionError):
        publish(other, folder, api=api)
    assert (hub.variables, hub.files) == (variables, files)
    hub.refuse.clear()
    assert publish(other, folder, api=api).variables == ("ALIGNMENT_MODEL", "ALIGNMENT_GALLERY")


def test_hardware_is_asked_for_only_if_it_is_another(hub: Hub, api: HfApi, space: Space, folder: Path) -> None:
    publish(space, folder, api=api)
    for hardware, asked in (("cpu-basic", 0), ("zero-a10g", 1), ("zero-a10g", 1)):
        publish(Space(NAME, space.model, hardware=hardware), folder, api=api)
        assert hub.calls.count(f"POST /api/spaces/{NAME}/hardware") == asked
    assert hub.hardware == "zero-a10g"


@pytest.mark.parametrize(
    ("sdk", "files"),
    [("docker", {"app.py", "alignment/__init__.py"}), ("gradio", {"app.py", "README.md"}), ("static", {"index.html"})],
)
def test_somebody_elses_app_is_not_overwritten(
    hub: Hub, api: HfApi, space: Space, folder: Path, sdk: str, files: set[str]
) -> None:
    hub.sdk, hub.files = sdk, dict.fromkeys(files, b"theirs")
    with pytest.raises(ValueError, match="is another app"):
        publish(space, folder, api=api)
    assert set(hub.files) == files
    sent = publish(space, folder, api=api, replace=True)
    assert set(sent.deleted) == files - {"app.py", "README.md", "alignment/__init__.py"}
    assert hub.files["app.py"] == b"print()"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "status", "error", "words"),
    [
        ("POST /api/repos/create", 402, ValueError, "paid plan"),
        ("POST /api/repos/create", 403, ValueError, "may not write to someone/app"),
        ("POST /api/repos/create", 409, ValueError, "taken on the Hub"),
        ("POST /api/repos/create", 500, ConnectionError, "an error .500.: publish again later"),
        ("GET /api/spaces/someone/app", 401, ValueError, "does not accept the token"),
        ("GET /api/spaces/someone/app", 0, ConnectionError, "cannot be reached, or broke off"),
        ("POST /api/spaces/someone/app/variables", 403, ValueError, "may not write"),
        ("POST /api/spaces/someone/app/commit", 403, ValueError, "may not write"),
        ("POST /api/spaces/someone/app/commit", 500, ConnectionError, "500"),
        ("POST /api/spaces/someone/app/commit", 0, ConnectionError, "broke off"),
        ("PUT /blob", 403, ConnectionError, "broke off"),
    ],
)
def test_each_refusal_is_one_sentence(
    hub: Hub, space: Space, folder: Path, call: str, status: int, error: type[Exception], words: str
) -> None:
    hub.refuse[call] = status
    token = "hf_wrong" if status == 401 else TOKEN
    with pytest.raises(error, match=words) as raised:
        publish(space, folder, api=HfApi(endpoint=hub.url, token=token))
    assert "\n" not in str(raised.value)
    assert token not in str(raised.value)
    assert len(hub.commits) == ("variables" in call)  # which come last


def test_hardware_that_has_to_be_paid_for_is_a_sentence(hub: Hub, api: HfApi, space: Space, folder: Path) -> None:
    publish(space, folder, api=api)
    hub.refuse["/hardware"] = 402
    with pytest.raises(ValueError, match="credits to run someone/app on a100-large"):
        publish(Space(NAME, space.model, hardware="a100-large"), folder, api=api)


def test_a_card_that_the_hub_does_not_like_is_not_sent(hub: Hub, api: HfApi, space: Space, folder: Path) -> None:
    card = (folder / "README.md").read_text("utf-8")
    (folder / "README.md").write_text(card.replace("title: T", "titel: T"), "utf-8")
    with pytest.raises(ValueError, match="titel"):
        publish(space, folder, api=api)
    assert hub.commits == []
