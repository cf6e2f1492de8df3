"""The service as `launch` serves it: connections, slow senders, reverse proxies, the end. For the rest see
test_middleware.py and test_server.py; for a process of its own test_service_process.py."""

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from PIL import Image

import app
from alignment.engine import AlignmentEngine
from alignment.gallery import Gallery, build_gallery
from alignment.model import DualEncoder
from alignment.server import Service, Settings, gradio_internals, middleware
from alignment.server import service as service_module
from alignment.server.gradio_internals import queue_status
from tests.http_client import LOCAL, entries, run_coroutine, until


class Held(AlignmentEngine):
    """An engine that can be kept from answering."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def search_images(self, *args: Any, **more: Any) -> Any:
        assert self.may_go_on.wait(60)
        return super().search_images(*args, **more)


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory) -> Held:
    """A tiny random model with three pictures."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("gallery")
    for row, name in enumerate(("one", "two", "three")):
        Image.new("RGB", (60, 40), (80 * row, 120, 200 - 60 * row)).save(source / f"{name}.png")
    lines = [{"id": name, "source": f"{name}.png", "en": f"picture {name}"} for name in ("one", "two", "three")]
    (source / "pictures.jsonl").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    build_gallery(source, out, encoder)
    return Held(encoder, Gallery.load(out, encoder))


@pytest.fixture
def serve(engine, tmp_path, monkeypatch) -> Iterator[Callable[..., httpx.Client]]:
    """Serve the page under given limits: `serve(rate=10)`; a client of it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "uploads").mkdir()
    open_now: list[Any] = []

    def start(*, mcp: bool = False, **settings: Any) -> httpx.Client:
        service = Service(Settings(**settings))
        page = app.build_page(engine, "en", service.settings.queue)
        options = app.launch_options(engine, service)
        _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", mcp_server=mcp, **options)
        client = httpx.Client(base_url=url.rstrip("/"), **LOCAL, timeout=60)
        client.service = service  # type: ignore[attr-defined]
        client.page = page  # type: ignore[attr-defined]
        open_now.extend((client, page))
        return client

    yield start
    engine.may_go_on.set()
    for part in open_now:
        part.close()


def ask(client: httpx.Client, headers: dict[str, str] | None = None, **more: str) -> httpx.Response:
    return client.post("/gradio_api/call/search_images", json={"data": ["a cat", 1], **more}, headers=headers)


def answer(client: httpx.Client, asked: httpx.Response) -> str:
    return client.get(f"/gradio_api/call/search_images/{asked.json()['event_id']}").text


# ---------------------------------------------------------------- behind a reverse proxy, below a path


class Proxy(httpx.HTTPTransport):
    """A reverse proxy that shows the page at https://photos.example/search/."""

    def __init__(self, address: httpx.URL, strips: bool) -> None:
        super().__init__(**LOCAL)
        self.address, self.strips = address, strips

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.host == "photos.example"
        path = request.url.raw_path
        assert path.startswith(b"/search")
        inside = self.address.copy_with(raw_path=path.removeprefix(b"/search") if self.strips else path)
        told = {"host": "photos.example", "x-forwarded-proto": "https", "x-forwarded-for": "198.51.100.7"}
        headers = {**request.headers, **told}
        return super().handle_request(httpx.Request(request.method, inside, headers=headers, content=request.read()))


@pytest.mark.parametrize(("strips", "written"), [(True, "/search"), (False, "search/")], ids=["stripped", "kept"])
def test_the_page_works_below_a_path(strips, written, serve):
    inner = serve(root_path=written, proxies=1)
    public = "https://photos.example/search"
    with httpx.Client(transport=Proxy(inner.base_url, strips), base_url=public, timeout=60) as client:
        page = client.get("/?q=a&lang=en")
        assert page.status_code == 200
        assert f'"root":"{public}"' in page.text.replace(" ", "")
        assert "Path=/search/;" in page.headers["set-cookie"]
        assert client.get("/config").json()["root"] == public
        assert client.get("/healthz").json()["status"] == "ok"
        script = re.search(r'src="\.(/assets/[^"]+\.js)"', page.text)
        assert script
        assert client.get(script[1]).status_code == 200
        found = json.loads(answer(client, ask(client)).partition("event: complete\ndata: ")[2])[0]
        thumbnail = client.get(f"/{found['matches'][0]['thumbnail']}")
        assert thumbnail.headers["content-type"] == "image/webp"
        assert client.post("/gradio_api/upload", files={"files": ("a.png", thumbnail.content)}).status_code == 200
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 404
    assert inner.get("/config").json()["root"].endswith("/search")  # on this machine too


def test_a_root_path_without_its_slash_redirects(serve):
    client = serve(root_path="/search")
    there = client.get("/search?q=a%20cat")
    assert (there.status_code, there.headers["location"]) == (307, "/search/?q=a%20cat")
    assert client.get("/search").headers["location"] == "/search/"
    assert client.get("/searching").status_code == 404


# ---------------------------------------------------------------- connections and slow senders

UPLOAD = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc'


def connect(client: httpx.Client, sent: bytes, timeout: float = 30) -> socket.socket:
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=timeout)
    connection.sendall(sent)
    return connection


def half_asked(client: httpx.Client) -> socket.socket:
    return connect(client, b"GET / HTTP/1.1\r\nHost: x\r\n")


def ended(connection: socket.socket) -> bool:
    with connection, suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


def test_a_connection_without_a_request_is_closed_and_one_that_waits_for_an_answer_is_not(serve, engine, monkeypatch):
    monkeypatch.setattr(gradio_internals, "HEADER_TIMEOUT_S", 0.3)
    client = serve()
    engine.may_go_on.clear()
    asked = ask(client)
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(answer, client, asked)
        for _ in range(2):
            assert ended(half_asked(client))  # after more than the answer has taken so far
        engine.may_go_on.set()
        assert "event: complete" in answered.result()


def test_the_connections_of_an_address_are_limited_but_not_a_proxys(serve):
    client = serve(at_once=2)
    idle = [half_asked(client) for _ in range(8)]
    assert sum(ended(connection) for connection in idle[4:]) == 4
    for connection in idle[:4]:
        connection.close()
    until(lambda: client.get("/healthz").status_code == 200)
    unlimited = serve(at_once=2, proxies=1)
    idle = [half_asked(unlimited) for _ in range(8)]
    assert unlimited.get("/healthz").status_code == 200
    for connection in idle:
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.close()


def test_a_slow_sender_is_refused_and_nothing_stays(serve, monkeypatch, tmp_path):
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 1.0)
    client = serve()
    with connect(client, f"{UPLOAD}Content-Length: {2**20}\r\n\r\n--b\r\n".encode(), 0.1) as slow:
        told, end = b"", time.monotonic() + 60
        while not told and time.monotonic() < end:
            slow.sendall(b"x")  # never silent
            with suppress(TimeoutError):
                told = slow.recv(4096)
    assert told.startswith(b"HTTP/1.1 408")
    until(lambda: not entries(tmp_path / "uploads"))


def test_an_announced_upload_reserves_nothing(serve):
    client = serve(disk_mb=2, client_mb=2)
    with connect(client, f"{UPLOAD}Content-Length: {2 * 2**20 - 9}\r\n\r\n--b\r\n".encode()):
        until(lambda: len(client.service.uploads.batches) == 1)
        assert client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 900_000)}).status_code == 200


def test_an_upload_that_breaks_off_leaves_nothing(serve, tmp_path):
    client = serve()
    connect(client, f"{UPLOAD}Content-Length: {2**20}\r\n\r\n".encode() + PART).close()
    until(lambda: not client.service.uploads.batches and not entries(tmp_path / "uploads"))


# ---------------------------------------------------------------- sessions and the end


def test_the_request_that_a_tool_makes_is_not_counted_again(serve):
    client = serve(mcp=True, rate=12, proxies=1)  # six at once, of which an agent sends five

    async def talk() -> list[bool]:
        headers = {"X-Forwarded-For": "8.8.8.8", "Cookie": "alignment_visitor=anna"}
        http = httpx.AsyncClient(headers=headers, **LOCAL, timeout=60)
        stream = streamable_http_client(f"{client.base_url}/gradio_api/mcp/", http_client=http)
        async with http, stream as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            return [(await session.call_tool("search_images", {"caption": "a"})).isError for _ in range(2)]

    assert run_coroutine(talk()) == [False, False]
    used = [ask(client, headers={"X-Forwarded-For": "8.8.8.8"}).status_code for _ in range(6)]
    assert used[-1] == 429  # the agent's own requests were counted


def test_sessions_expire_after_their_time(serve, monkeypatch):
    monkeypatch.setattr(service_module, "CLEAN_UP_PERIOD_S", 0.05)
    client = serve(keep_minutes=0.02)
    answer(client, ask(client, session_hash="anna"))
    sessions = client.page.state_holder
    assert "anna" in sessions
    until(lambda: "anna" not in sessions)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_and_a_second_one_ends_the_process(number):
    service, before = Service(), signal.getsignal(number)
    with service.handle_signals():
        assert not service.stopping.is_set()
        signal.raise_signal(number)
        assert service.stopping.is_set()
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_a_broken_queue_is_reported_and_ends_the_app(serve):
    client = serve()
    client.page.close()  # of Gradio's page, with the queue
    assert queue_status(client.page).broken
    with pytest.raises(OSError, match="Start the app again"):
        client.service.serve(client.page)


def test_a_stop_waits_for_an_upload_under_way(serve):
    client = serve(stop_seconds=30)
    whole = PART + b"\r\n--b--\r\n"
    with (
        connect(client, f"{UPLOAD}Content-Length: {len(whole)}\r\n\r\n".encode() + whole[:-9]) as sender,
        ThreadPoolExecutor(1) as pool,
    ):
        until(lambda: len(client.service.uploads.batches) == 1)
        client.service.stopping.set()
        ended = pool.submit(client.service.serve, client.page)
        with pytest.raises(TimeoutError):
            ended.result(0.5)
        sender.sendall(whole[-9:])
        assert sender.recv(4096).startswith(b"HTTP/1.1 200")
        ended.result(60)
