"""A visitor without a browser: opens the page, does what its scripts do, and reads what its elements would show."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import httpx

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120.0  # seconds; the machine may be busy
# How to ask a server of this machine: not through a proxy, and without the certificates that httpx reads in 30 ms.
LOCAL: dict[str, Any] = {"trust_env": False, "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait for a condition to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "It never came true."
        time.sleep(0.01)


def entries(folder: Path) -> list[Path]:
    """List all files and folders below a folder from which the service may delete some meanwhile."""
    return [Path(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files)]


def run_coroutine(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a thread of its own: after browser tests an event loop is running in the main thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


class Visitor:
    """One browser with the page open."""

    def __init__(self, address: str, **options: Any) -> None:
        self.http = httpx.Client(base_url=address, timeout=PATIENCE, **LOCAL, **options)
        self.session = uuid4().hex[:11]
        assert self.http.get("/").status_code == 200
        self.config = self.http.get("/config").json()
        self.parts = {part["id"]: part["props"] for part in self.config["components"]}

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()

    def upload(self, name: str, data: bytes) -> str:
        answer = self.http.post("/gradio_api/upload", files={"files": (name, data)})
        assert answer.status_code == 200, answer.text
        return answer.json()[0]

    def do(self, element: str, event: str, data: object = None, **values: object) -> dict[str, Any]:
        """Let an element send an event; what the elements show in the end, by their id.

        `values` are what the visitor typed, by the id of the box with "_" for "-".
        """
        dependency = self.dependency(element, event)
        body = self.body(dependency, data, values)
        if not dependency["queue"]:
            answer = self.http.post(f"/gradio_api/run/{dependency['api_name']}", json=body)
            assert answer.status_code == 200, answer.text
            return self._shown(dependency, answer.json()["data"])
        joined = self.http.post("/gradio_api/queue/join", json=body)
        assert joined.status_code == 200, joined.text
        return self._shown(dependency, self.last(joined.json()["event_id"]))

    def dependency(self, element: str, event: str) -> dict[str, Any]:
        (target,) = [id for id, props in self.parts.items() if props.get("elem_id") == element]
        (found,) = [part for part in self.config["dependencies"] if [target, event] in part["targets"]]
        return found

    def body(self, dependency: dict[str, Any], data: object, values: dict[str, object]) -> dict[str, Any]:
        typed = {name.replace("_", "-"): value for name, value in {"language": "en", **values}.items()}
        inputs = [typed.get(self.parts[id].get("elem_id")) for id in dependency["inputs"]]
        return {"data": inputs, "fn_index": dependency["id"], "session_hash": self.session, "event_data": data}

    def last(self, event_id: str) -> list[Any]:
        """Wait for the answer; of a handler that shows progress, all that it changed."""
        shown: list[Any] = []
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as events:
            for line in events.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("event_id") != event_id:
                    continue
                if message["msg"] == "process_generating":
                    shown = _changed(shown, message["output"]["data"])
                if message["msg"] == "process_completed":
                    assert message["success"], message
                    return shown or message["output"]["data"]
        raise EOFError("no answer came")

    def _shown(self, dependency: dict[str, Any], data: list[Any]) -> dict[str, Any]:
        ids = (self.parts[id].get("elem_id") for id in dependency["outputs"])
        return {id: shown(value) for id, value in zip(ids, data, strict=True) if id}


def shown(value: Any) -> Any:
    """Read what an element shows from the value that Gradio sends; see `as_json` in alignment/ui/widgets.py."""
    return json.loads(value["json"]) if isinstance(value, dict) and value.keys() == {"json"} else value


def _changed(shown: list[Any], data: list[Any]) -> list[Any]:
    """Apply what Gradio sends of a next value: only what differs."""
    if not shown:
        return list(data)
    return [_patched(value, edits) for value, edits in zip(shown, data, strict=True)]


def _patched(value: Any, edits: Any) -> Any:
    for action, path, new in edits or ():
        if not path:
            value = new
            continue
        *way, last = path
        place = value
        for step in way:
            place = place[step]
        if action == "delete":
            del place[last]
        elif action == "add" and isinstance(place, list):
            place.insert(last, new)
        elif action == "append":
            place[last] += new
        else:
            place[last] = new
    return value


class AppProcess:
    """`python app.py` in a process of its own, and what it logs."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address
        self.logged: list[str] = []
        self._reader = Thread(target=lambda: self.logged.extend(process.stderr or ()), daemon=True)
        self._reader.start()

    def end(self, signal: int, seconds: float = PATIENCE) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(signal)
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        return status

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.logged) if line.startswith("{")]


@contextmanager
def running(*options: str, **environment: str) -> Iterator[AppProcess]:
    """Start the app as people do, wait until it serves, and end it afterwards."""
    command = [sys.executable, "app.py", "--port", str(free_port()), *options]
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes) as process:
        app = AppProcess(process, "")
        try:
            assert process.stdout
            said = process.stdout.readline()
            assert said.startswith("Open "), (said, app.logged)
            app.address = said.removeprefix("Open ").strip().rstrip("/")
            yield app
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
