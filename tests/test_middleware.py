"""The limits of the service, over ASGI in this process: a page with one endpoint behind the middleware."""

import io
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI
from gradio.utils import LRUCache
from starlette.testclient import TestClient

from alignment.server import GuardedBlocks, Service, Settings
from alignment.server import service as service_module
from alignment.server.middleware import INTERNAL_TOKEN_HEADER
from alignment.server.routes import route_kind
from alignment.ui.strings import error_for_browser
from tests.http_client import entries, until

KEYS = {"error", "detail", "code"}
AT_ONCE = 4


class Echo:
    """An endpoint that repeats a text, once it may."""

    def __init__(self) -> None:
        self.may_go_on, self.fails = threading.Event(), False
        self.may_go_on.set()

    def echo(self, text: str, count: int = 1) -> str:
        assert self.may_go_on.wait(60)
        if self.fails:
            raise RuntimeError("a tabby cat in /secret/path")
        return text * count


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.may_go_on.set()


@pytest.fixture
def serve(echo, tmp_path, monkeypatch) -> Iterator[Callable[..., TestClient]]:
    """Serve a page under given limits: `serve(rate=10)`; a client of it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    with ExitStack() as stack:

        def start(**settings: Any) -> TestClient:
            service = Service(Settings(**settings))
            with GuardedBlocks(analytics_enabled=False) as page:
                gr.api(echo.echo, api_name="echo", concurrency_id="echo", concurrency_limit=AT_ONCE)
            page.queue(max_size=100, api_open=False)
            kwargs = service.launch_options(translate=error_for_browser)["app_kwargs"]
            app = gr.mount_gradio_app(FastAPI(openapi_url=None), page, path="", app_kwargs=kwargs)
            client = TestClient(app, raise_server_exceptions=False, client=("203.0.113.5", 5000))
            stack.enter_context(client)
            stack.callback(echo.may_go_on.set)
            client.service = service  # type: ignore[attr-defined]
            client.gradio = app.routes[-1].app  # type: ignore[attr-defined]
            return client

        yield start


def ask(client: httpx.Client, text: str = "a cat", **headers: str) -> httpx.Response:
    return client.post("/gradio_api/call/echo", json={"data": [text, 1]}, headers=headers)


def answer(client: httpx.Client, asked: httpx.Response) -> str:
    return client.get(f"/gradio_api/call/echo/{asked.json()['event_id']}").text


def refused(response: httpx.Response, status: int, code: str) -> str:
    said = response.json()
    assert (response.status_code, said["code"]) == (status, code)
    assert said.keys() == KEYS
    return said["error"]


# ---------------------------------------------------------------- rate


def test_a_client_over_the_rate_is_told_when_to_come_back(serve):
    client = serve(rate=10)  # five at once
    for _ in range(5):
        assert ask(client).status_code == 200
    late = ask(client)
    assert late.headers["retry-after"] in refused(late, 429, "rate")
    assert 1 <= int(late.headers["retry-after"]) <= 8
    assert "来自您地址的请求太多" in refused(ask(client, **{"X-Page-Language": "zh"}), 429, "rate")
    assert ask(client, **{"X-Forwarded-For": "8.8.8.8"}).status_code == 429  # any client could send it
    assert client.get("/theme.css").status_code == 200  # the page's files are not counted
    assert client.get("/healthz").status_code == 200


def test_behind_a_proxy_every_client_has_its_own_rate(serve):
    client = serve(rate=2, proxies=1)
    assert ask(client, **{"X-Forwarded-For": "8.8.8.8"}).status_code == 200
    assert ask(client, **{"X-Forwarded-For": "8.8.8.8"}).status_code == 429
    assert ask(client, **{"X-Forwarded-For": "8.8.4.4"}).status_code == 200


def test_requests_of_the_process_to_itself_have_no_limit(serve):
    client = serve(rate=2)
    assert ask(client).status_code == 200
    assert ask(client, **{INTERNAL_TOKEN_HEADER: "guessed"}).status_code == 429
    assert ask(client, **{INTERNAL_TOKEN_HEADER: client.service.token}).status_code == 200


def test_a_normal_visitor_never_meets_a_limit(serve):
    client = serve()
    for _ in range(100):
        assert ask(client).status_code == 200


# ---------------------------------------------------------------- size and number


def test_a_request_that_is_too_large_is_refused(serve):
    client = serve(request_mb=0.1)
    assert "0.1 MB" in refused(ask(client, "x" * 200_000), 413, "size")

    def unannounced() -> Iterator[bytes]:
        yield b'{"data": ["'
        yield from [b"x" * 10_000] * 15

    refused(client.post("/gradio_api/call/echo", content=unannounced()), 413, "size")
    assert "event: complete" in answer(client, ask(client))


def test_a_full_queue_refuses(serve, echo):
    client = serve(queue=2)
    echo.may_go_on.clear()
    asked = []
    for working in range(1, AT_ONCE + 1):  # what the queue has not yet passed on waits in it, and it takes two
        asked.append(ask(client))
        until(lambda working=working: client.get("/healthz").json()["working"] == working)
    asked += [ask(client), ask(client)]
    full = ask(client)
    refused(full, 503, "queue")
    assert full.headers["retry-after"] == "5"
    # For a 503 the page would show a message of Gradio's, in English.
    assert "现在搜索的人很多" in refused(ask(client, **{"X-Page-Language": "zh-CN"}), 429, "queue")
    assert client.get("/healthz").json()["queue"] == 2
    echo.may_go_on.set()
    assert all("event: complete" in answer(client, each) for each in asked)


def test_what_gradio_refuses_itself_is_said_in_the_same_form(serve, echo):
    client = serve(queue=1000, rate=0)  # Gradio's own queue takes 100
    echo.may_go_on.clear()
    asked = [ask(client) for _ in range(AT_ONCE)]
    until(lambda: client.get("/healthz").json()["working"] == AT_ONCE)
    asked += [ask(client) for _ in range(100)]
    refused(ask(client), 503, "queue")
    echo.may_go_on.set()
    assert all("event: complete" in answer(client, each) for each in asked)


def test_open_requests_are_counted(serve, echo):
    client = serve(at_once=1, rate=0)
    echo.may_go_on.clear()
    asked = ask(client)

    def wait() -> None:
        while "at the same time" in answer(client, asked):  # one of the questions below came first
            pass

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: ask(client).status_code == 429)
    refused(ask(client), 429, "open")
    assert client.get("/healthz").status_code == 200
    echo.may_go_on.set()
    waiting.join(60)
    until(lambda: ask(client).status_code == 200)
    until(lambda: not client.service.requests)  # none takes memory once it is answered


# ---------------------------------------------------------------- uploads


def send(client: httpx.Client, *sizes: int) -> httpx.Response:
    files = [("files", (f"{place}.png", b"x" * size)) for place, size in enumerate(sizes)]
    return client.post("/gradio_api/upload", files=files)


def left(folder: Path) -> list[Path]:
    return entries(folder / "uploads")


def form(*parts: tuple[str, bytes]) -> dict[str, Any]:
    """A request with these parts; a name ends in "/" where the part is a field and no file."""
    body = b""
    for name, content in parts:
        file = "" if name.endswith("/") else '; filename="a.png"'
        head = f'--b\r\nContent-Disposition: form-data; name="{name.rstrip("/")}"{file}\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return {"content": body + b"--b--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}


WHOLE = ("files", b"abc")


def test_uploads_are_limited_in_number_and_size_until_they_are_read(serve):
    client = serve(client_files=3, client_mb=1)
    first = send(client, 100, 100)
    assert first.status_code == 200
    assert "3 files and 1 MB" in refused(send(client, 2**20), 413, "waiting")
    refused(send(client, 100, 100), 413, "waiting")  # with those that lie here already
    assert send(client, 100).status_code == 200
    refused(send(client, 100), 413, "waiting")
    for path in first.json():
        Path(path).unlink()  # as the reader of an upload does
    assert send(client, 100, 100).status_code == 200
    refused(send(client, 1, 1, 1, 1), 413, "waiting")


def test_the_disk_is_shared_by_all_clients(serve, monkeypatch):
    client = serve(disk_mb=1, client_mb=100)
    (path,) = send(client, 900_000).json()
    full = send(client, 900_000)
    refused(full, 507, "full")
    assert full.headers["retry-after"] == "60"
    Path(path).unlink()
    assert send(client, 900_000).status_code == 200
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * 2**20))
    refused(send(client, 1), 507, "full")  # some of it stays free for others than the app


def test_anything_but_files_is_refused_and_does_not_stay(serve, tmp_path):
    client = serve()
    for parts in (
        (("other", b"x" * 999),),
        (("o", b"x"),) * 50,
        (("x/", b"y" * 10_000),),
        (),
        (WHOLE, ("other", b"x")),
        (WHOLE, ("files/", b"")),
    ):
        refused(client.post("/gradio_api/upload", **form(*parts)), 400, "lost")
    assert left(tmp_path) == []


def test_a_file_that_is_cut_off_is_refused_and_does_not_stay(serve, tmp_path):
    client, whole = serve(), form(WHOLE, ("files", b"x" * 2**21))
    assert len(client.post("/gradio_api/upload", **whole).json()) == 2
    before = set(left(tmp_path))
    for content in (whole["content"][:-9], whole["content"][:-3], b"x"):
        refused(client.post("/gradio_api/upload", **(whole | {"content": content})), 400, "lost")
    assert set(left(tmp_path)) == before
    refused(client.post("/gradio_api/upload", content=b"a=1", headers={"Content-Type": "text/plain"}), 400, "lost")


def test_a_file_that_is_too_large_is_refused_and_does_not_stay(serve, tmp_path):
    client = serve()
    body = io.BytesIO(bytes(101 * 2**20))
    assert "100 MB" in refused(client.post("/gradio_api/upload", files={"files": ("a.zip", body)}), 413, "size")
    assert left(tmp_path) == []


def test_a_name_that_is_too_long_is_named_as_the_cause(serve):
    client = serve()
    for length in (5000, 70_000):
        sent = client.post("/gradio_api/upload", files={"files": ("a" * length + ".png", b"x")})
        assert "name is too long" in refused(sent, 413, "name")
    for path in ("y" * 300, "y" * 5000, "y" * 70_000):
        image = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": path}
        told = answer(client, client.post("/gradio_api/call/echo", json={"data": [image, 1]}))
        assert "did not arrive" in told


def test_no_name_leads_out_of_the_folder_of_its_request(serve, tmp_path):
    client = serve()
    for name in ("../../up.png", "/etc/passwd", "a\\b.png", "狗.png", "x" * 400 + ".png", "..", "\n"):
        (path,) = client.post("/gradio_api/upload", files={"files": (name, b"data")}).json()
        assert Path(path).resolve().is_relative_to(tmp_path / "uploads")
        assert Path(path).read_bytes() == b"data"


def test_two_clients_that_send_the_same_file_do_not_share_it(serve):
    client = serve()
    (one,), (other,) = send(client, 50).json(), send(client, 50).json()
    assert one != other
    Path(one).unlink()
    assert Path(other).is_file()


def test_uploads_expire_after_their_time(serve, monkeypatch):
    monkeypatch.setattr(service_module, "CLEAN_UP_PERIOD_S", 0.05)
    client = serve(keep_minutes=0.02)
    (path,) = send(client, 100).json()
    until(lambda: not Path(path).exists())
    assert send(client, 100).status_code == 200


# ---------------------------------------------------------------- mistakes


MISTAKES: tuple[tuple[str, dict[str, Any], int, str], ...] = (
    ("call/v2/echo", {"json": {}}, 400, "request"),
    ("call/v2/echo", {"json": {"text": "a", "zz": 1}}, 400, "request"),
    ("call/echo", {"json": [1]}, 422, "request"),
    ("call/unknown", {"json": {"data": []}}, 404, "closed"),
    ("call/v2/unknown", {"json": {"data": []}}, 404, "closed"),
    ("run/predict", {"json": {"data": []}}, 400, "request"),
    ("queue/join", {"json": {"data": []}}, 400, "request"),
    ("queue/join", {"json": {"data": [], "session_hash": "a"}}, 400, "request"),
    ("queue/join", {"json": {"data": [], "session_hash": "a", "fn_index": 10**6}}, 400, "request"),
    ("queue/join", {"content": b'{"data":[],"fn_index":1e400}'}, 422, "request"),
    ("queue/join", {"content": b"{"}, 422, "request"),
    ("reset", {"content": b"x" * 70_000}, 413, "request"),
    ("upload", {"headers": {"Content-Type": f"multipart/form-data; boundary={'b' * 400}"}}, 400, "lost"),
)


def test_a_clients_mistake_is_no_failure(serve, caplog):
    client = serve()
    for path, mistake, status, code in MISTAKES:
        sent = {"headers": {"Content-Type": "application/json"}} | mistake
        refused(client.post(f"/gradio_api/{path}", **sent), status, code)
    refused(client.get("/assets/" + "a" * 5000), 404, "closed")  # a name that no file can have
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_failure_says_nothing_of_its_cause(serve, echo, caplog, capfd):
    client = serve()
    echo.fails = True
    said = answer(client, ask(client))
    assert "it is not your fault" in said
    assert "tabby" not in said
    assert "tabby" not in capfd.readouterr().err  # Gradio prints such messages
    assert any(line.exc_info for line in caplog.records)


# ---------------------------------------------------------------- routes and headers

OPEN = {
    *("/", "/config", "/config/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/pwa_icon"),
    *("/healthz", "/static/{path:path}", "/assets/{path:path}", "/svelte/{path:path}"),
    *("/gradio_api/info", "/gradio_api/info/", "/gradio_api/openapi.json", "/gradio_api/startup-events"),
    *("/gradio_api/theme.css", "/gradio_api/upload", "/gradio_api/upload/", "/gradio_api/queue/status"),
    *("/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/heartbeat/{session_hash}"),
    *("/gradio_api/call/{api_name}", "/gradio_api/call/{api_name}/", "/gradio_api/call/{api_name}/{event_id}"),
    *("/gradio_api/call/v2/{api_name}", "/gradio_api/call/v2/{api_name}/", "/gradio_api/call/v2/{api_name}/{event_id}"),
    *("/gradio_api/run/{api_name}", "/gradio_api/run/{api_name}/", "/gradio_api/cancel", "/gradio_api/reset"),
    "/gradio_api/reset/",
}


def test_of_all_that_gradio_serves_only_what_is_needed_is_open(serve):
    client = serve()
    nested = [getattr(route, "original_router", None) or route for route in client.gradio.routes]
    routes = [route for each in nested for route in getattr(each, "routes", [each]) if getattr(route, "methods", None)]
    assert len(routes) > 70
    assert {route.path for route in routes for method in route.methods if route_kind(method, route.path)} == OPEN
    for path in ("/openapi.json", "/monitoring", "/gradio_api/file=/etc/hostname", "/gradio_api/deep_link", "/docs"):
        refused(client.get(path), 404, "closed")
    for path in ("/gradio_api/component_server", "/gradio_api/vibe-edit", "/gradio_api/process_recording", "/login"):
        assert client.post(path, json={}).status_code == 404
    assert client.put("/").status_code == 404
    assert route_kind("HEAD", "/") == route_kind("GET", "/") == "page"  # which is counted


def test_an_answer_that_does_not_exist_is_not_found(serve):
    client = serve()
    assert client.get("/gradio_api/call/echo/0123456789abcdef").status_code == 404
    assert client.get("/gradio_api/queue/data", params={"session_hash": "unknown"}).status_code == 404


def test_every_answer_has_its_headers(serve):
    client = serve()
    for response in (client.get("/"), ask(client), client.get("/nothing"), client.get("/healthz")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "same-origin"
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'self' https://huggingface.co" in policy
        assert re.fullmatch(r"[0-9a-f]{16}", response.headers["x-request-id"])


def test_a_browser_gets_one_cookie_that_scripts_cannot_read(serve):
    client = serve()
    given = client.get("/").headers["set-cookie"]
    assert re.fullmatch(r"alignment_visitor=[\w-]{32}; Path=/; HttpOnly; SameSite=Lax", given)
    assert "set-cookie" not in client.get("/").headers


# ---------------------------------------------------------------- leftovers


def test_answers_that_are_never_fetched_do_not_stop_the_queue(serve, echo, monkeypatch):
    monkeypatch.setattr("gradio.queueing.LRUCache", lambda size: LRUCache(4))
    monkeypatch.setattr(service_module, "MAX_IDLE_SESSIONS", 5)
    monkeypatch.setattr(service_module, "CLEAN_UP_PERIOD_S", 0.05)
    client = serve(rate=0)
    echo.may_go_on.clear()
    waiting = [ask(client) for _ in range(30)]
    assert {asked.status_code for asked in waiting} == {200}
    echo.may_go_on.set()
    assert "event: complete" in answer(client, waiting[-1])
    ids = [asked.json()["event_id"] for asked in waiting[:5]]
    until(lambda: all(client.get(f"/gradio_api/call/echo/{id}").status_code == 404 for id in ids))
    assert "event: complete" in answer(client, ask(client))
    assert client.get("/healthz").json()["status"] == "ok"


def test_requests_at_the_same_time_are_all_answered(serve):
    client = serve(rate=0)
    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(lambda number: ask(client, str(number)), range(24)))
        answers = list(pool.map(lambda one: answer(client, one), asked))
    assert all(f'["{number}"]' in told for number, told in enumerate(answers))
