import io
import json
import logging
import os
import re
import shutil
import socket
import sys
import threading
import time
import tomllib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from gradio.utils import LRUCache
from PIL import Image

import alignment
import app
from alignment.engine import AlignmentEngine
from alignment.gallery import Gallery, build_gallery
from alignment.model import DualEncoder
from alignment.ui.service import Folder, Service, Settings, add_options, connections
from alignment.ui.service import door as door_module
from alignment.ui.service import limits as limits_module
from alignment.ui.service import running as running_module
from alignment.ui.service import service as service_module
from alignment.ui.service.door import PASSWORD
from alignment.ui.service.folder import sweep
from alignment.ui.service.limits import Open, Rates, address_of
from alignment.ui.service.logs import Human, Json
from alignment.ui.service.memory import give_back, share_heaps
from alignment.ui.service.owners import Owners, new_cookie
from alignment.ui.service.settings import variable
from alignment.ui.service.ways import endpoint_of, way_of

KEYS = {"error", "detail", "code"}
MULTIPART = "multipart/form-data"


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory) -> "Held":
    """A tiny random model with three pictures; it answers captions only while it may."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("gallery")
    for row, name in enumerate(("one", "two", "three")):
        Image.new("RGB", (60, 40), (80 * row, 120, 200 - 60 * row)).save(source / f"{name}.png")
    lines = [{"id": name, "source": f"{name}.png", "en": f"picture {name}"} for name in ("one", "two", "three")]
    (source / "pictures.jsonl").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    build_gallery(source, out, encoder)
    return Held(encoder, Gallery.load(out, encoder))


class Held(AlignmentEngine):
    """An engine that can be kept from answering."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.may_go_on, self.fails = threading.Event(), False
        self.may_go_on.set()

    def search_images(self, *args: Any, **more: Any) -> Any:
        assert self.may_go_on.wait(60)
        if self.fails:
            raise RuntimeError("a tabby cat in /secret/path")
        return super().search_images(*args, **more)


@pytest.fixture
def serve(engine, tmp_path, monkeypatch) -> Iterator[Callable[..., httpx.Client]]:
    """Serve the page under given limits: `serve(rate=10)`; a client of it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "uploads").mkdir()
    open_now: list[Any] = []

    def start(**settings: Any) -> httpx.Client:
        service = Service(Settings(**settings), tmp_path / "uploads")
        page = app.build_page(engine, "en", service.settings.queue)
        _, url, _ = page.launch(
            prevent_thread_lock=True, server_name="127.0.0.1", **app.launch_options(engine, service)
        )
        client = httpx.Client(base_url=url.rstrip("/"), trust_env=False, timeout=60)
        client.service = service  # type: ignore[attr-defined]
        client.page = page  # type: ignore[attr-defined]
        open_now.extend((client, page))
        return client

    yield start
    engine.may_go_on.set()
    engine.fails = False
    for part in open_now:
        part.close()


def ask(client: httpx.Client, caption: str = "a cat", **headers: str) -> httpx.Response:
    return client.post("/gradio_api/call/search_images", json={"data": [caption, 1]}, headers=headers)


def answer(client: httpx.Client, asked: httpx.Response) -> str:
    return client.get(f"/gradio_api/call/search_images/{asked.json()['event_id']}").text


def refused(response: httpx.Response, status: int, code: str) -> str:
    said = response.json()
    assert (response.status_code, said["code"]) == (status, code)
    assert said.keys() == KEYS
    return said["error"]


@pytest.mark.parametrize("length", [5000, 70_000])
def test_a_name_that_is_too_long_is_named_as_the_cause(length, serve):
    client = serve()
    sent = client.post("/gradio_api/upload", files={"files": ("a" * length + ".png", b"x")})
    assert "name is too long" in refused(sent, 413, "name")
    for path in ("y" * 300, "y" * length):
        image = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": path}
        asked = client.post("/gradio_api/call/search_captions", json={"data": [image, 1, ""]})
        told = client.get(f"/gradio_api/call/search_captions/{asked.json()['event_id']}").text
        assert "did not arrive" in told


# ---------------------------------------------------------------- behind another server, below a path


class Proxy(httpx.HTTPTransport):
    """A server in front of the page, which shows it at https://photos.example/search/."""

    def __init__(self, address: httpx.URL, strips: bool) -> None:
        super().__init__(trust_env=False)
        self.address, self.strips = address, strips

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.host == "photos.example"
        path = request.url.raw_path
        assert path.startswith(b"/search")
        inside = self.address.copy_with(raw_path=path.removeprefix(b"/search") if self.strips else path)
        told = {"host": "photos.example", "x-forwarded-proto": "https", "x-forwarded-for": "198.51.100.7"}
        headers = {**request.headers, **told}
        return super().handle_request(httpx.Request(request.method, inside, headers=headers, content=request.read()))


@pytest.mark.parametrize("strips", [True, False], ids=["stripped", "kept"])
@pytest.mark.parametrize("written", ["/search", "search/"])
def test_the_page_works_below_a_path(strips, written, serve):
    inner = serve(root_path=written, proxies=1)
    public = "https://photos.example/search"
    with httpx.Client(transport=Proxy(inner.base_url, strips), base_url=public, timeout=60) as client:
        page = client.get("/?q=a&lang=en")
        assert page.status_code == 200
        assert f'"root":"{public}"' in page.text.replace(" ", "")
        assert "Path=/search/;" in page.headers["set-cookie"]
        config = client.get("/config").json()
        assert config["root"] == public
        assert client.get("/healthz").json()["status"] == "ok"
        script = re.search(r'src="\.(/assets/[^"]+\.js)"', page.text)
        assert script
        assert client.get(script[1]).status_code == 200
        found = json.loads(answer(client, ask(client)).partition("event: complete\ndata: ")[2])[0]
        thumbnail = client.get(f"/{found['matches'][0]['thumbnail']}")
        assert thumbnail.headers["content-type"] == "image/webp"
        photo = client.post("/gradio_api/upload", files={"files": ("a.png", thumbnail.content)})
        assert photo.status_code == 200
        refused(client.get("/gradio_api/file=/etc/passwd"), 404, "closed")
    assert inner.get("/config").json()["root"].endswith("/search")  # on this machine too


def test_the_page_of_a_path_without_its_slash_is_the_one_with_it(serve):
    client = serve(root_path="/search")
    there = client.get("/search?q=a%20cat")
    assert (there.status_code, there.headers["location"]) == (307, "/search/?q=a%20cat")
    assert client.get("/search").headers["location"] == "/search/"
    assert client.get("/searching").status_code == 404


@pytest.mark.parametrize(
    ("written", "read"), [("", ""), ("/", ""), ("search", "/search"), ("/a/b-c_1.x/", "/a/b-c_1.x"), ("//x", "/x")]
)
def test_a_root_path_is_brought_into_form(written, read):
    assert Settings(root_path=written).root_path == read


@pytest.mark.parametrize("wrong", ["https://a.example/b", "/a b", "/a?b", "/../a", "/a//b", "/assets", "gradio_api/x"])
def test_a_root_path_that_cannot_be_one_is_refused(wrong):
    with pytest.raises(ValueError, match="--root-path"):
        Settings(root_path=wrong)


def test_gradios_own_variable_for_it_counts_too(monkeypatch):
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/old")
    assert Settings.of(parsed()).root_path == "/old"
    monkeypatch.setenv("ALIGNMENT_ROOT_PATH", "/new")
    assert Settings.of(parsed()).root_path == "/new"


# ---------------------------------------------------------------- settings


def parsed(*argv: str) -> Namespace:
    parser = ArgumentParser()
    add_options(parser)
    return parser.parse_args(argv)


def test_every_setting_has_an_option_a_variable_and_a_default(monkeypatch, capsys):
    for name in Settings.__dataclass_fields__:
        monkeypatch.delenv(variable(name), raising=False)
    assert Settings.of(parsed()) == Settings()
    assert Settings.of(parsed("--rate", "7.5", "--log", "json")) == Settings(rate=7.5, log="json")
    monkeypatch.setenv("ALIGNMENT_QUEUE", "5")
    assert Settings.of(parsed()) == Settings(queue=5)
    assert Settings.of(parsed("--queue", "6")) == Settings(queue=6)
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = capsys.readouterr().out
    for name in Settings.__dataclass_fields__:
        assert variable(name) in shown


@pytest.mark.parametrize("wrong", [("--rate", "-1"), ("--rate", "inf"), ("--queue", "1.5"), ("--log", "xml")])
def test_a_setting_that_makes_no_sense_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        parsed(*wrong)
    assert wrong[0] in capsys.readouterr().err


def test_a_wrong_log_in_the_environment_ends_in_a_sentence(monkeypatch):
    monkeypatch.setenv("ALIGNMENT_LOG", "xml")
    with pytest.raises(ValueError, match="ALIGNMENT_LOG is 'xml'; it may be human or json"):
        Settings.of(parsed())


def test_on_a_space_its_proxy_is_believed(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "someone/app")
    assert parsed().proxies == 1


def test_the_version_is_that_of_the_package():
    declared = tomllib.loads((app.ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert alignment.__version__ == declared


# ---------------------------------------------------------------- how often, from where


def test_a_bucket_holds_half_a_minute_and_fills_steadily():
    now = [0.0]
    rates = Rates(60, lambda: now[0])
    assert [rates.wait("a") for _ in range(30)] == [0] * 30
    assert rates.wait("a") == pytest.approx(1)
    assert rates.wait("b") == 0  # everybody has their own
    now[0] = 0.5
    assert rates.wait("a") == pytest.approx(0.5)
    now[0] = 1.0
    assert rates.wait("a") == 0
    now[0] = 1e6
    assert [rates.wait("a") for _ in range(31)][-1] > 0  # and never more


def test_no_rate_is_no_limit():
    rates = Rates(0)
    assert not any(rates.wait("a") for _ in range(1000))
    assert len(rates) == 0


def test_the_limiter_remembers_no_more_than_it_may(monkeypatch):
    monkeypatch.setattr(limits_module, "_REMEMBERED", 10)
    rates = Rates(2)
    for number in range(100):
        rates.wait(str(number))
    assert len(rates) == 10
    assert rates.wait("99") > 0  # who came last is remembered
    opened = Open(1)
    for number in range(100):
        with opened.one(str(number)) as room, opened.one(str(number)) as second:
            assert (room, second) == (True, False)
    assert not opened._open


@pytest.mark.parametrize(
    ("peer", "told", "proxies", "address"),
    [
        ("203.0.114.9", "8.8.8.8", 0, "203.0.114.9"),  # nobody is believed
        ("10.0.0.1", "8.8.8.8", 1, "8.8.8.8"),
        ("10.0.0.1", "1.1.1.1, 8.8.8.8", 1, "8.8.8.8"),  # what the visitor claims comes first
        ("10.0.0.1", "1.1.1.1, 8.8.8.8, 10.0.0.7", 1, "8.8.8.8"),  # the servers of a host among themselves
        ("10.0.0.1", "1.1.1.1, 8.8.8.8", 2, "1.1.1.1"),
        ("10.0.0.1", "192.168.1.5", 1, "192.168.1.5"),  # a house of one's own
        ("10.0.0.1", "8.8.8.8:1234", 1, "8.8.8.8"),
        ("10.0.0.1", "[2600:1::5]:1234", 1, "2600:1::"),
        ("10.0.0.1", "rubbish, <script>", 1, "10.0.0.1"),
        ("10.0.0.1", "", 1, "10.0.0.1"),
        ("2600:1:2:3:4:5:6:7", "", 0, "2600:1:2:3::"),  # a house has as many as it likes of these
        ("::ffff:203.0.114.9", "", 0, "203.0.114.9"),
    ],
)
def test_the_address_is_the_peers_or_what_a_believed_proxy_tells(peer, told, proxies, address):
    scope = {"client": (peer, 5), "headers": [(b"x-forwarded-for", told.encode())] if told else []}
    assert address_of(scope, proxies) == address


def test_uvicorn_believes_nobody_by_itself():
    assert app.ROOT  # `app` has said so when it was imported
    assert uvicorn.Config(None).forwarded_allow_ips == ""


def test_who_asks_too_often_is_told_when_to_come_back(serve):
    client = serve(rate=10)  # five at once, of which Gradio had one, to see whether it runs
    for _ in range(4):
        assert ask(client).status_code == 200
    late = ask(client)
    assert (
        refused(late, 429, "rate")
        == f"Too many requests from your address; try again in {late.headers['retry-after']} s."
    )
    assert 1 <= int(late.headers["retry-after"]) <= 8
    assert "来自您地址的请求太多" in refused(ask(client, **{"X-Page-Language": "zh"}), 429, "rate")
    assert ask(client, **{"X-Forwarded-For": "8.8.8.8"}).status_code == 429  # anybody could say so
    assert client.get("/theme.css").status_code == 200  # what makes the page is not counted
    assert client.get("/healthz").status_code == 200


def test_behind_a_proxy_everybody_has_their_own_rate(serve):
    client = serve(rate=2, proxies=1)
    assert ask(client, **{"X-Forwarded-For": "8.8.8.8"}).status_code == 200
    assert ask(client, **{"X-Forwarded-For": "8.8.8.8"}).status_code == 429
    assert ask(client, **{"X-Forwarded-For": "8.8.4.4"}).status_code == 200


def test_what_the_process_asks_itself_for_its_agents_has_been_counted_before(serve):
    client = serve(rate=4)  # two at once, of which Gradio had one
    assert ask(client).status_code == 200
    assert ask(client, **{PASSWORD: "guessed"}).status_code == 429
    assert ask(client, **{PASSWORD: client.service._password}).status_code == 200
    tools = SimpleNamespace(_get_or_create_client=lambda: SimpleNamespace(headers={}))
    client.service.let_tools_in(SimpleNamespace(mcp_server_obj=tools))
    assert tools._get_or_create_client().headers == {PASSWORD: client.service._password}


def test_a_normal_visitor_never_meets_a_limit(serve):
    client = serve()
    for _ in range(100):
        assert ask(client).status_code == 200


# ---------------------------------------------------------------- how large, how many


def test_a_request_that_is_too_large_is_refused_before_it_is_read(serve):
    client = serve(request_mb=0.1)
    said = refused(ask(client, "x" * 200_000), 413, "size")
    assert said == "The request has more than 0.1 MB; send less at once, or upload the pictures first."

    def unannounced() -> Iterator[bytes]:
        yield b'{"data": ["'
        yield from [b"x" * 10_000] * 15

    refused(client.post("/gradio_api/call/search_images", content=unannounced()), 413, "size")
    assert "event: complete" in answer(client, ask(client))


def test_the_queue_has_an_end_and_says_so(serve, engine):
    client = serve(queue=2)
    engine.may_go_on.clear()
    asked = [ask(client) for _ in range(16)]  # so many are answered at once
    until(lambda: client.page._queue.get_active_worker_count() == 16)
    asked += [ask(client), ask(client)]
    full = ask(client)
    assert refused(full, 503, "queue") == "Many people are searching just now; try again in a moment."
    assert full.headers["retry-after"] == "5"
    # The page would show a sentence of Gradio's for a 503, in English.
    assert "现在搜索的人很多" in refused(ask(client, **{"X-Page-Language": "zh-CN"}), 429, "queue")
    assert client.get("/healthz").json()["queue"] == 2
    engine.may_go_on.set()
    assert all("event: complete" in answer(client, each) for each in asked)


def test_requests_open_at_the_same_time_are_counted(serve, engine):
    client = serve(at_once=1, rate=0)
    engine.may_go_on.clear()
    asked = ask(client)
    waiting = threading.Thread(target=answer, args=(client, asked))
    waiting.start()
    until(lambda: ask(client).status_code == 429)
    assert refused(ask(client), 429, "open").startswith("Too many requests from your address at the same time")
    assert client.get("/healthz").status_code == 200
    engine.may_go_on.set()
    waiting.join(60)
    until(lambda: ask(client).status_code == 200)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "It never came true."
        time.sleep(0.01)


def send(client: httpx.Client, *sizes: int) -> httpx.Response:
    files = [("files", (f"{place}.png", b"x" * size)) for place, size in enumerate(sizes)]
    return client.post("/gradio_api/upload", files=files)


def test_uploads_are_limited_in_number_and_size_until_they_are_read(serve):
    client = serve(client_files=3, client_mb=1)
    first = send(client, 100, 100)
    assert first.status_code == 200
    assert refused(send(client, 2**20), 413, "waiting").endswith("the limit is 3 files and 1 MB.")
    assert send(client, 100).status_code == 200
    assert refused(send(client, 100), 413, "waiting")
    for path in first.json():
        Path(path).unlink()  # as whoever reads it does
    assert send(client, 100, 100).status_code == 200
    assert refused(send(client, 1, 1, 1, 1), 413, "waiting")


def form(*parts: tuple[str, bytes]) -> dict[str, Any]:
    """A request with these parts; a name ends in "/" where the part is a field and no file."""
    body = b""
    for name, content in parts:
        file = "" if name.endswith("/") else '; filename="a.png"'
        body += (
            f'--b\r\nContent-Disposition: form-data; name="{name.rstrip("/")}"{file}\r\n\r\n'.encode()
            + content
            + b"\r\n"
        )
    return {"content": body + b"--b--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}


WHOLE = ("files", b"abc")


@pytest.mark.parametrize(
    "parts",
    [
        (("other", b"x" * 999),),
        (("o", b"x"),) * 50,
        (("x/", b"y" * 10_000),),
        (),
        (WHOLE, ("other", b"x")),
        (WHOLE, ("files/", b"")),
    ],
)
def test_what_is_no_file_of_ours_is_refused_and_does_not_stay(serve, tmp_path, parts):
    client = serve()
    refused(client.post("/gradio_api/upload", **form(*parts)), 400, "lost")
    assert list((tmp_path / "uploads").rglob("*")) == []


def test_a_file_that_is_cut_off_is_refused_and_does_not_stay(serve, tmp_path):
    client, whole = serve(), form(WHOLE, WHOLE)
    assert len(client.post("/gradio_api/upload", **whole).json()) == 2
    before = set((tmp_path / "uploads").rglob("*"))
    cut = whole | {"content": whole["content"][:-9]}
    refused(client.post("/gradio_api/upload", **cut), 400, "lost")
    assert set((tmp_path / "uploads").rglob("*")) == before


def test_who_sends_too_slowly_is_told_so(serve, monkeypatch, tmp_path):
    monkeypatch.setattr(door_module, "_PATIENCE", 1.0)
    client = serve()
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=0.1) as slow:
        head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        slow.sendall(f"{head}Content-Length: {2**20}\r\n\r\n--b\r\n".encode())
        told, end = b"", time.monotonic() + 60
        while not told and time.monotonic() < end:
            slow.sendall(b"x")  # never silent
            with suppress(TimeoutError):
                told = slow.recv(4096)
    assert told.startswith(b"HTTP/1.1 408")
    until(lambda: not list((tmp_path / "uploads").rglob("*")))


def test_who_announces_much_and_sends_nothing_takes_no_room(serve):
    client = serve(disk_mb=2, client_mb=2)
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as idle:
        head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        idle.sendall(f"{head}Content-Length: {2 * 2**20 - 9}\r\n\r\n--b\r\n".encode())
        until(lambda: len(client.service._room._lots) == 1)
        assert send(client, 900_000).status_code == 200


@pytest.mark.parametrize(
    ("path", "request_", "status", "code"),
    [
        ("call/v2/search_images", {"json": {}}, 400, "request"),
        ("call/v2/search_images", {"json": {"caption": "a", "zz": 1}}, 400, "request"),
        ("call/search_images", {"json": [1]}, 422, "request"),
        ("call/unknown", {"json": {"data": []}}, 404, "closed"),
        ("run/predict", {"json": {"data": []}}, 404, "closed"),
        ("queue/join", {"json": {"data": []}}, 400, "request"),
        ("queue/join", {"content": b'{"data":[],"fn_index":1e400}'}, 422, "request"),
        ("queue/join", {"content": b"{"}, 422, "request"),
        ("reset", {"content": b"x" * 70_000}, 413, "request"),
        ("upload", {"content": b"x", "headers": {"Content-Type": f"{MULTIPART}; boundary={'b' * 400}"}}, 400, "lost"),
    ],
)
def test_a_clients_mistake_is_no_fault_of_ours(serve, caplog, path, request_, status, code):
    client = serve()
    said = client.post(f"/gradio_api/{path}", **({"headers": {"Content-Type": "application/json"}} | request_))
    refused(said, status, code)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_name_that_no_file_can_have_is_not_there(serve, caplog):
    refused(serve().get("/assets/" + "a" * 5000), 404, "closed")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_the_disk_is_everybodys(serve):
    client = serve(disk_mb=1, client_mb=100)
    assert send(client, 900_000).status_code == 200
    full = send(client, 900_000)
    assert refused(full, 507, "full") == "There is no room for more files just now; try again later."
    assert full.headers["retry-after"] == "60"


def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(serve, tmp_path):
    client = serve()
    body = io.BytesIO(bytes(101 * 2**20))
    said = refused(client.post("/gradio_api/upload", files={"files": ("a.zip", body)}), 413, "size")
    assert said == "The file has more than 100 MB; make it smaller."
    assert list((tmp_path / "uploads").rglob("*")) == []


def test_an_upload_that_breaks_off_leaves_nothing(serve, tmp_path):
    client = serve()
    assert (
        refused(client.post("/gradio_api/upload", content=b"x"), 400, "lost") == "The file did not arrive; try again."
    )
    boundary = {"Content-Type": "multipart/form-data; boundary=b"}
    broken = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc'

    def half() -> Iterator[bytes]:
        yield broken
        raise KeyboardInterrupt  # the visitor goes away

    with pytest.raises(KeyboardInterrupt):
        client.post("/gradio_api/upload", content=half(), headers=boundary)
    until(lambda: not list((tmp_path / "uploads").rglob("*")))


def test_two_who_send_the_same_file_do_not_share_it(serve):
    client = serve()
    (one,), (other,) = send(client, 50).json(), send(client, 50).json()
    assert one != other
    Path(one).unlink()
    assert Path(other).is_file()


# ---------------------------------------------------------------- what is there at all


OPEN = {
    *(
        "/",
        "/config",
        "/config/",
        "/theme.css",
        "/favicon.ico",
        "/manifest.json",
        "/robots.txt",
        "/pwa_icon",
        "/healthz",
    ),
    *("/static/{path:path}", "/assets/{path:path}", "/svelte/{path:path}", "/thumbnails/{id}.webp"),
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
    nested = [getattr(route, "original_router", None) or route for route in client.page.app.routes]
    routes = [route for each in nested for route in getattr(each, "routes", [each]) if getattr(route, "methods", None)]
    assert len(routes) > 70
    found = {route.path for route in routes for method in route.methods if way_of(method, route.path)}
    assert found == OPEN
    for path in ("/openapi.json", "/monitoring", "/gradio_api/file=/etc/hostname", "/gradio_api/deep_link", "/docs"):
        assert refused(client.get(path), 404, "closed") == "There is nothing here."
    for path in ("/gradio_api/component_server", "/gradio_api/vibe-edit", "/gradio_api/process_recording", "/login"):
        assert client.post(path, json={}).status_code == 404
    assert client.put("/").status_code == 404
    assert way_of("HEAD", "/") == way_of("GET", "/") == "look"  # which is counted


def test_an_answer_that_is_not_there_is_said_to_be_not_there(serve):
    client = serve()
    assert client.get("/gradio_api/call/search_images/0123456789abcdef").status_code == 404
    assert client.get("/gradio_api/queue/data", params={"session_hash": "unknown"}).status_code == 404


def test_every_answer_has_its_headers(serve):
    client = serve()
    for response in (client.get("/"), ask(client), client.get("/nothing"), client.get("/thumbnails/one.webp")):
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
    framed = new_cookie({"scheme": "http", "headers": [(b"x-forwarded-proto", b"https")]})
    assert framed.endswith("Secure; SameSite=None; Partitioned")


def test_a_session_is_the_browsers_that_began_it():
    owners = Owners()
    assert owners.admits("session", "anna")
    assert owners.admits("session", "anna")
    assert not owners.admits("session", "bob")
    assert not owners.admits("session", "")
    assert owners.admits("program", "")
    assert "program" not in owners._cookies  # nothing to own it by, and nothing to remember
    assert owners.admits("program", "later")


# ---------------------------------------------------------------- the log


def record(level: int = logging.INFO, message: str = "request", args: tuple = (), **more: Any) -> logging.LogRecord:
    made = logging.LogRecord(
        more.pop("name", "alignment.ui.service.door"), level, "", 0, message, args, more.pop("exc_info", None)
    )
    made.__dict__.update(more)
    return made


def test_a_failure_is_logged_by_the_lines_of_code_without_what_it_says():
    try:
        open("/tmp/holiday of Ingrid.jpg").close()
    except OSError:
        failed = record(logging.ERROR, "A request failed", exc_info=sys.exc_info())
    for line in (Json().format(failed), Human().format(failed)):
        assert "Ingrid" not in line
        assert "test_service.py" in line
        assert "FileNotFoundError" in line
    assert json.loads(Json().format(failed))["level"] == "error"


def test_others_messages_are_cut_where_they_would_quote():
    for name in ("PIL", "alignment.pairs.collection"):
        line = Json().format(record(logging.WARNING, "Cannot read %s", ("ingrid.jpg",), name=name))
        assert json.loads(line)["event"] == f"{name}: Cannot read …"
    line = Json().format(record(logging.WARNING, "No %s", ("OpenVINO",), name="alignment.model.runtime"))
    assert json.loads(line)["event"] == "No OpenVINO"


def test_people_read_one_line(serve):
    line = Human().format(record(service={"endpoint": "upload", "ms": 3}))
    assert re.fullmatch(r"\d\d:\d\d:\d\d info: request  endpoint upload  ms 3", line)


def test_a_failure_of_ours_says_nothing_of_it(serve, engine, caplog, capfd):
    client = serve()
    engine.fails = True
    said = answer(client, ask(client))
    assert "it is not your fault" in said
    assert "tabby" not in said
    assert "tabby" not in capfd.readouterr().err  # Gradio prints such things
    assert any(line.exc_info for line in caplog.records)


def test_what_a_visitor_made_up_is_not_in_the_log():
    assert endpoint_of("/gradio_api/call/ingrid/1", {"search_images"}) == "call/other"
    assert endpoint_of("/gradio_api/call/v2/search_images", {"search_images"}) == "call/search_images"
    assert endpoint_of("/gradio_api/queue/join", set()) == "queue/join"
    assert endpoint_of("/", set()) == "page"


# ---------------------------------------------------------------- files and leftovers


def test_the_folder_of_a_process_goes_with_it_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "mine.txt").write_text("not ours")
    with Folder() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder.path)
        assert folder.path.stat().st_mode & 0o077 == 0
        (folder.path / "a" / "b").mkdir(parents=True)
        (folder.path / "a" / "b" / "x.png").write_bytes(b"x")
        with Folder(tmp_path):
            assert folder.path.is_dir()
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_what_nobody_has_touched_for_long_is_swept_with_its_folders(tmp_path):
    old, new = tmp_path / "old" / "deep" / "x.png", tmp_path / "new" / "y.png"
    for file in (old, new):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    assert sweep(tmp_path, 3600) == 0
    time.sleep(0.05)
    new.write_bytes(b"y")
    assert sweep(tmp_path, 0.04) == 1
    assert not old.exists()
    assert new.exists()
    time.sleep(0.05)
    assert sweep(tmp_path, 0.01) == 1
    time.sleep(0.05)
    sweep(tmp_path, 0.01)
    sweep(tmp_path, 0.01)
    assert tmp_path.is_dir()


def test_of_requests_that_are_over_gradios_queue_keeps_nothing(serve):
    client = serve()
    for _ in range(20):
        answer(client, ask(client))
    queue = client.page._queue
    until(lambda: not queue.pending_event_ids_session and not queue.pending_messages_per_session)
    assert not queue.event_ids_to_events


def test_answers_that_nobody_comes_for_do_not_stop_the_queue(serve, engine, monkeypatch):
    monkeypatch.setattr("gradio.queueing.LRUCache", lambda size: LRUCache(4))
    monkeypatch.setattr(running_module, "_MOST_LEFT", 5)
    monkeypatch.setattr(service_module, "_OFTEN", 0.05)
    client = serve(rate=0)
    engine.may_go_on.clear()
    waiting = [ask(client) for _ in range(30)]  # more than run at once
    assert {asked.status_code for asked in waiting} == {200}
    engine.may_go_on.set()
    assert "event: complete" in answer(client, waiting[-1])
    until(lambda: len(client.page._queue.pending_messages_per_session) <= 5)
    assert "event: complete" in answer(client, ask(client))
    assert client.get("/healthz").json()["status"] == "ok"


def test_a_queue_that_broke_down_is_told_and_ends_the_app(serve):
    client = serve()
    client.page._queue.close()
    told = client.get("/healthz")
    assert (told.status_code, told.json()["status"]) == (503, "broken")
    with pytest.raises(OSError, match="Start the app again"):
        client.service.serve(client.page)


def test_a_stop_waits_for_an_upload_under_way(serve):
    client, whole = serve(stop_seconds=30), form(WHOLE)
    stopping, told = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield whole["content"][:-9]
        until(lambda: bool(client.service._room._lots))
        client.service.running.stop()
        stopping.set()
        assert told.wait(60)
        yield whole["content"][-9:]

    with ThreadPoolExecutor(2) as pool:
        sent = pool.submit(client.post, "/gradio_api/upload", content=slowly(), headers=whole["headers"])
        assert stopping.wait(60)
        ended = pool.submit(client.service.serve, client.page)
        with pytest.raises(TimeoutError):
            ended.result(0.5)
        told.set()
        assert sent.result(60).status_code == 200
        ended.result(60)


def half_asked(client: httpx.Client) -> socket.socket:
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
    return connection


def ended(connection: socket.socket) -> bool:
    with connection, suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


def test_who_connects_and_never_asks_is_hung_up_on_and_who_waits_for_an_answer_is_not(serve, engine, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    client = serve()
    engine.may_go_on.clear()
    asked = ask(client)
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(answer, client, asked)
        for _ in range(2):
            assert ended(half_asked(client))  # after more than the answer has taken so far
        engine.may_go_on.set()
        assert "event: complete" in answered.result()


def test_an_address_has_so_many_connections(serve):
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


def test_uploads_and_sessions_vanish_after_their_time(serve, monkeypatch):
    monkeypatch.setattr(service_module, "_SELDOM", 0.05)
    client = serve(keep_minutes=0.02)
    (path,) = send(client, 100).json()
    answer(client, ask(client))
    body = {"data": ["a cat", 1], "session_hash": "anna"}
    asked = client.post("/gradio_api/call/search_images", json=body)
    answer(client, asked)
    sessions = client.page.app.state_holder.session_data
    until(lambda: not Path(path).exists() and not sessions)
    assert send(client, 100).status_code == 200


def test_there_is_room_on_this_disk(tmp_path):
    assert shutil.disk_usage(tmp_path).free > 300 * 2**20  # else the tests of uploads fail for no fault of theirs


def test_free_memory_is_given_back(monkeypatch):
    share_heaps()
    kept = [bytes([number % 256]) * 50_000 for number in range(2000)]  # small enough for the heap
    before = psutil.Process().memory_info().rss
    kept = kept[:1] + kept[-1:]  # what lies between the two cannot go by itself
    give_back()
    assert psutil.Process().memory_info().rss < before - 50_000 * 1000
    assert len(kept) == 2
    monkeypatch.setattr(sys, "platform", "darwin")
    share_heaps()
    give_back()
