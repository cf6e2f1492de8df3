"""The service as it is started: a process of its own, watched from outside.

`tests/long/test_no_network.py` starts it where there is no network at all.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fault_injection import forkserver
from PIL import Image

from alignment.server.uploads import process_folder
from tests.http_client import LOCAL, ROOT, AppProcess, Visitor, running, until

# Is imported by Python itself before anything else runs; every try to leave the machine is written down, and fails.
WATCH = """
import os, sys

def here(host):
    host = host.decode() if isinstance(host, bytes) else str(host)
    return host in ("", "None", "localhost", "0.0.0.0", "::", "::1") or host.startswith("127.")

def watch(event, args):
    host = None
    if event in ("socket.connect", "socket.sendto") and isinstance(args[-1], tuple):
        host = args[-1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = args[0]
    elif event == "urllib.Request":
        host = args[0].split("//")[-1].split("/")[0].split(":")[0]
    if host is not None and not here(host):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{event} {args!r}\\n")
        raise OSError(f"left the machine: {event} {host}")

sys.addaudithook(watch)
"""
QUERY, WORDS = "a purple zebra dances at Ingrid's wedding", "Ingrid's picnic"
NAME = "ingrid_passport"


def photo(colour: int = 0, size: int = 200) -> bytes:
    buffer = io.BytesIO()
    grey = Image.linear_gradient("L").resize((size, size)).point(lambda value: (value + colour) % 256)
    grey.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def captioned_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for place in range(3):
            file.writestr(f"{NAME}{place}.png", photo(60 * place))
            file.writestr(f"{NAME}{place}.txt", f"{WORDS} {place}")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def uploads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    (folder / "sitecustomize.py").write_text(WATCH)
    return folder


@pytest.fixture(scope="module")
def orphan(uploads) -> Path:
    """An upload that a killed process has left behind, beside a file that is not its own."""
    (uploads / "another.txt").write_text("not ours")
    killed = forkserver().Process(target=receive_and_die, args=(uploads,))
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    (path,) = uploads.glob("*/secret.png")
    return path


def receive_and_die(uploads: Path) -> None:
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    with process_folder() as folder:
        (folder / "secret.png").write_bytes(photo(7))
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def app(uploads, watched, orphan) -> Iterator[AppProcess]:
    """Run the app for all tests of this module, without any setting of the environment that keeps it offline."""
    more = {
        "PYTHONPATH": str(watched),
        "WATCHED": str(watched / "attempts"),
        "GRADIO_TEMP_DIR": str(uploads),
        "ALIGNMENT_LOG": "json",
        "ALIGNMENT_PROXIES": "1",
        "ALIGNMENT_STOP_SECONDS": "60",
    }
    with running(**more) as app:
        yield app


@pytest.fixture(scope="module")
def driven(app) -> AppProcess:
    """Use everything once, as somebody with a name and an address."""
    with Visitor(app.address, headers={"X-Forwarded-For": "198.51.100.77"}) as visitor:
        drive(visitor)
    return app


def drive(visitor: Visitor) -> None:
    results = visitor.do("pictures-search", "click", pictures_query=QUERY)["pictures-results"]
    why = visitor.do("pictures-results", "why", {"id": results["rows"][0]["id"]})
    assert why["explanation"]["terms"]
    sent = {"files": [{"name": f"{NAME}.png", "path": visitor.upload(f"{NAME}.png", photo())}]}
    shown = visitor.do("captions-drop", "files", sent)
    assert shown["captions-results"]["rows"]
    sent = {"files": [{"name": f"{NAME}{n}.png", "path": visitor.upload(f"{NAME}{n}.png", photo(n))} for n in (1, 2)]}
    table = visitor.do("matrix-drop", "files", sent, matrix_captions=f"{QUERY}\n{WORDS}")["matrix-table"]
    assert (len(table["rows"]), len(table["columns"])) == (2, 2)
    sent = {"files": [{"name": f"{NAME}.png", "path": visitor.upload(f"{NAME}.png", photo(9))}], "run": 1}
    visitor.do("photos-drop", "files", sent)
    visitor.do("photos-search", "click", photos_query=QUERY)
    visitor.do("photos-download", "wanted")
    sent = {"files": [{"name": f"{NAME}.zip", "path": visitor.upload(f"{NAME}.zip", captioned_zip())}], "run": 1}
    assert NAME in visitor.do("evaluate-drop", "files", sent)["evaluate-results"]["heading"]
    visitor.do("evaluate-download", "wanted")
    for name, values in (
        ("search_images", {"caption": QUERY}),
        ("embed_captions", {"captions": [QUERY]}),
        ("describe", {}),
        ("search_captions", {"image": "https://example.org/cat.png"}),
        ("search_captions", {"image": visitor.upload(f"{NAME}.png", b"no picture")}),
    ):
        id = visitor.http.post(f"/gradio_api/call/v2/{name}", json=values).json()["event_id"]
        assert "event: " in visitor.http.get(f"/gradio_api/call/{name}/{id}").text
    for path in ("/gradio_api/file=https://example.org/a.png", f"/gradio_api/call/{NAME}/1", "/?view=api", "/healthz"):
        visitor.http.get(path)
    for path in ("/gradio_api/vibe-starter-queries", "/gradio_api/queue/join"):
        visitor.http.post(path, json={"data": [QUERY], "fn_index": 10**6, "session_hash": "x"})
    visitor.http.head("/")


# ---------------------------------------------------------------- nothing leaves, nothing personal is logged


def test_nothing_ever_leaves_the_machine(driven, watched):
    attempts = watched / "attempts"
    assert not attempts.exists(), attempts.read_text()


def test_the_watch_would_have_seen_it(watched, tmp_path):
    tries = (
        "import socket; socket.create_connection(('192.0.2.1', 80), 1)",
        "import socket; socket.getaddrinfo('example.org', 80)",
        "import urllib.request as r; r.urlopen('http://example.org', timeout=1)",
        "import httpx; httpx.get('https://huggingface.co', timeout=1)",
        "import asyncio; asyncio.run(asyncio.open_connection('192.0.2.1', 80))",
    )
    for number, code in enumerate(tries):
        seen = tmp_path / str(number)
        env = {**os.environ, "PYTHONPATH": str(watched), "WATCHED": str(seen)}
        assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode
        assert seen.read_text()


def test_nothing_personal_is_logged(driven):
    text = "".join(driven.logged)
    assert driven.log()
    for personal in (QUERY, WORDS, NAME, "Ingrid", "ingrid", "zebra", "198.51.100.77", "127.0.0.1", "example.org"):
        assert personal not in text
    assert not re.search(r"/tmp|alignment-uploads|session_hash", text)


def test_the_log_says_what_was_asked_how_long_it_took_and_how_it_ended(driven):
    requests = [line for line in driven.log() if line["event"] == "request"]
    answers = {line["endpoint"]: line for line in driven.log() if line["event"] == "answer"}
    for line in requests:
        assert {"time", "level", "id", "endpoint", "ms", "outcome", "status", "received", "sent"} <= line.keys()
    assert {"upload", "queue/join", "call/search_images", "none"} <= {line["endpoint"] for line in requests}
    assert answers["search_images"]["outcome"] == "ok"
    assert answers["search_captions"]["outcome"] == "refused"
    assert answers["describe"]["id"] in {line["id"] for line in requests}
    assert not [line for line in driven.log() if line["level"] == "error"]
    assert all(line.startswith("{") for line in driven.logged), driven.logged


# ---------------------------------------------------------------- whose is what


@pytest.fixture
def anna(app) -> Iterator[Visitor]:
    with Visitor(app.address) as visitor:
        yield visitor


@pytest.fixture
def bob(app) -> Iterator[Visitor]:
    with Visitor(app.address) as visitor:
        yield visitor


def test_nobody_reads_an_upload_back_not_even_who_sent_it(anna, bob):
    path = anna.upload("holiday.png", photo(3))
    assert Path(path).read_bytes() == photo(3)
    for visitor in (anna, bob):
        for form in ("/gradio_api/file={}", "/file={}", "/gradio_api/file/{}", "/gradio_api/proxy={}", "/{}"):
            assert visitor.http.get(form.format(path)).status_code == 404
    assert bob.http.get(f"/gradio_api/file={ROOT / 'README.md'}").status_code == 404


def test_who_knows_what_another_sends_finds_and_deletes_nothing(anna, bob):
    path = Path(anna.upload("same.png", photo(4)))
    own = Path(bob.upload("same.png", photo(4)))
    assert path.name == own.name
    assert path.parent != own.parent
    guess = own.parent.parent.parent / path.parent.name / path.name  # where Gradio itself would put it
    bob.do("captions-drop", "files", {"files": [{"name": "same.png", "path": str(own)}]})
    answer = bob.do("captions-drop", "files", {"files": [{"name": "same.png", "path": str(guess)}]})
    assert "did not arrive" in answer["captions-drop"]["error"]
    assert path.is_file()
    assert not own.exists()
    assert anna.do("captions-drop", "files", {"files": [{"name": "same.png", "path": str(path)}]})


def test_photos_and_their_results_are_their_owners_alone(anna, bob):
    sent = {"files": [{"name": "mine.png", "path": anna.upload("mine.png", photo(5))}], "run": 1}
    anna.do("photos-drop", "files", sent)
    found = anna.do("photos-search", "click", photos_query="a gradient")["photos-results"]
    assert len(found["rows"]) == 1
    id = found["rows"][0]["id"]
    assert bob.http.get(f"/thumbnails/{id}.webp").status_code == 404
    assert id not in json.dumps(bob.do("photos-search", "click", photos_query="a gradient"))
    assert bob.do("photos-download", "wanted")["photos-courier"].get("data") != ""
    # Even who has learnt the name of a session gets nothing of it.
    bob.session = anna.session
    body = bob.body(bob.dependency("photos-search", "click"), None, {"photos_query": "a gradient"})
    joined = bob.http.post("/gradio_api/queue/join", json=body)
    for path in (
        f"/gradio_api/queue/data?session_hash={anna.session}",
        f"/gradio_api/heartbeat/{anna.session}",
        f"/gradio_api/call/_search/{joined.json()['event_id']}",
    ):
        assert bob.http.get(path).status_code == 404
    down = bob.dependency("photos-download", "wanted")
    answer = bob.http.post(f"/gradio_api/run/{down['api_name']}", json=bob.body(down, None, {}))
    assert answer.status_code == 500
    assert "another browser" in answer.text
    assert len(anna.do("photos-search", "click", photos_query="a gradient")["photos-results"]["rows"]) == 1


# ---------------------------------------------------------------- health, and the end


def test_health_is_said(app):
    answer = httpx.get(f"{app.address}/healthz", **LOCAL)
    said = answer.json()
    assert (answer.status_code, said["status"], said["model"], said["images"]) == (200, "ok", "compact", 28)
    assert {"version", "uptime_s", "queue", "working", "captions", "fingerprint"} <= said.keys()


def test_what_a_killed_process_left_behind_the_next_one_deletes_and_nothing_else(orphan, uploads, anna):
    own = Path(anna.upload("living.png", photo(8))).parents[2]
    assert not orphan.exists()
    assert {file.name for file in uploads.iterdir()} == {"another.txt", own.name, f"{own.name}.lock"}


def test_a_stop_answers_what_is_under_way_refuses_what_comes_and_leaves_nothing(app, driven, uploads, anna, bob):
    """The last test of the app: it ends it."""
    visitor, other = anna, bob
    visitor.upload("left.png", photo(6))
    files = [{"name": f"{n}.png", "path": visitor.upload(f"{n}.png", photo(n, 700))} for n in range(24)]
    shown: dict[str, object] = {}
    asking = threading.Thread(
        target=lambda: shown.update(visitor.do("matrix-drop", "files", {"files": files}, matrix_captions="a cat"))
    )
    asking.start()
    until(lambda: other.http.get("/healthz").json()["working"])
    app.process.send_signal(signal.SIGTERM)
    until(lambda: other.http.get("/healthz").status_code == 503)
    refused = other.http.post("/gradio_api/call/search_images", json={"data": ["a cat", 3]})
    assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (503, "stopping", "60")
    asking.join(60)
    assert len(shown["matrix-table"]["columns"]) == 24
    assert app.process.wait(60) == 0
    assert [file.name for file in uploads.iterdir()] == ["another.txt"]
