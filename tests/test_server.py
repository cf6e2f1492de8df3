"""The parts of the service by themselves: settings, limits, sessions, uploads on disk, the log."""

import json
import logging
import os
import re
import sys
import tomllib
from argparse import ArgumentParser, Namespace
from typing import Any

import psutil
import pytest
import uvicorn

import alignment
import app
from alignment.server import Settings, add_options, limit_arenas, process_folder
from alignment.server.limits import TokenBucket, client_address
from alignment.server.logging import HumanFormatter, JsonFormatter
from alignment.server.page import is_possible_path
from alignment.server.routes import log_name
from alignment.server.service import trim_memory
from alignment.server.sessions import SessionOwners, new_cookie
from alignment.server.settings import variable
from alignment.server.uploads import UploadQuota

# ---------------------------------------------------------------- settings


def parsed(*argv: str) -> Namespace:
    parser = ArgumentParser()
    add_options(parser)
    return parser.parse_args(argv)


def test_every_setting_has_an_option_a_variable_and_a_default(monkeypatch, capsys):
    for name in Settings.__dataclass_fields__:
        monkeypatch.delenv(variable(name), raising=False)
    assert Settings.from_args(parsed()) == Settings()
    assert Settings.from_args(parsed("--rate", "7.5", "--log", "json")) == Settings(rate=7.5, log="json")
    monkeypatch.setenv("ALIGNMENT_QUEUE", "5")
    assert Settings.from_args(parsed()) == Settings(queue=5)
    assert Settings.from_args(parsed("--queue", "6")) == Settings(queue=6)
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


def test_a_wrong_log_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("ALIGNMENT_LOG", "xml")
    with pytest.raises(ValueError, match="ALIGNMENT_LOG"):
        Settings.from_args(parsed())


def test_on_a_space_its_proxy_is_trusted(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "someone/app")
    assert parsed().proxies == 1


@pytest.mark.parametrize(
    ("written", "read"), [("", ""), ("/", ""), ("search", "/search"), ("/a/b-c_1.x/", "/a/b-c_1.x"), ("//x", "/x")]
)
def test_a_root_path_is_normalised(written, read):
    assert Settings(root_path=written).root_path == read


@pytest.mark.parametrize("wrong", ["https://a.example/b", "/a b", "/a?b", "/../a", "/a//b", "/assets", "gradio_api/x"])
def test_a_root_path_that_cannot_be_one_is_refused(wrong):
    with pytest.raises(ValueError, match="--root-path"):
        Settings(root_path=wrong)


def test_gradios_own_variable_for_the_root_path_counts_too(monkeypatch):
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/old")
    assert Settings.from_args(parsed()).root_path == "/old"
    monkeypatch.setenv("ALIGNMENT_ROOT_PATH", "/new")
    assert Settings.from_args(parsed()).root_path == "/new"


def test_the_version_is_that_of_the_package():
    declared = tomllib.loads((app.ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert alignment.__version__ == declared


# ---------------------------------------------------------------- limits and sessions


def test_a_bucket_holds_half_a_minute_and_refills_steadily():
    now = [0.0]
    rate = TokenBucket(60, lambda: now[0])
    assert [rate.wait("a") for _ in range(30)] == [0] * 30
    assert rate.wait("a") == pytest.approx(1)
    assert rate.wait("b") == 0
    now[0] = 0.5
    assert rate.wait("a") == pytest.approx(0.5)
    now[0] = 1.0
    assert rate.wait("a") == 0
    now[0] = 1e6
    assert [rate.wait("a") for _ in range(31)][-1] > 0  # never more than half a minute


def test_no_rate_is_no_limit():
    rate = TokenBucket(0)
    assert not any(rate.wait("a") for _ in range(1000))
    assert not rate.full_at


def test_limits_take_bounded_memory():
    rate = TokenBucket(2, max_addresses=10)
    for number in range(100):
        rate.wait(str(number))
    assert len(rate.full_at) == 10
    assert rate.wait("99") > 0  # the last is remembered


@pytest.mark.parametrize(
    ("peer", "header", "proxies", "address"),
    [
        ("203.0.114.9", "8.8.8.8", 0, "203.0.114.9"),  # no proxy is trusted
        ("10.0.0.1", "8.8.8.8", 1, "8.8.8.8"),
        ("10.0.0.1", "1.1.1.1, 8.8.8.8", 1, "8.8.8.8"),  # what the client claims comes first
        ("10.0.0.1", "1.1.1.1, 8.8.8.8, 10.0.0.7", 1, "8.8.8.8"),  # the servers of a host forward to each other
        ("10.0.0.1", "1.1.1.1, 8.8.8.8", 2, "1.1.1.1"),
        ("10.0.0.1", "192.168.1.5", 1, "192.168.1.5"),  # a private network
        ("10.0.0.1", "8.8.8.8:1234", 1, "8.8.8.8"),
        ("10.0.0.1", "[2600:1::5]:1234", 1, "2600:1::"),
        ("10.0.0.1", "rubbish, <script>", 1, "10.0.0.1"),
        ("10.0.0.1", "", 1, "10.0.0.1"),
        ("2600:1:2:3:4:5:6:7", "", 0, "2600:1:2:3::"),  # one household has all of these
        ("::ffff:203.0.114.9", "", 0, "203.0.114.9"),
    ],
)
def test_the_address_is_the_peers_or_what_a_trusted_proxy_says(peer, header, proxies, address):
    scope = {"client": (peer, 5), "headers": [(b"x-forwarded-for", header.encode())] if header else []}
    assert client_address(scope, proxies) == address


def test_uvicorn_trusts_no_proxy_by_itself():
    assert app.ROOT  # `app` has seen to it when it was imported
    assert uvicorn.Config(None).forwarded_allow_ips == ""


def test_a_session_belongs_to_the_browser_that_began_it():
    owners = SessionOwners()
    assert owners.admit("session", "anna")
    assert owners.admit("session", "anna")
    assert not owners.admit("session", "bob")
    assert not owners.admit("session", "")
    assert owners.admit("program", "")
    assert len(owners.cookies) == 1  # a session without a cookie takes no memory
    assert owners.admit("program", "later")


def test_behind_tls_the_cookie_is_secure_and_may_be_framed():
    framed = new_cookie({"scheme": "http", "headers": [(b"x-forwarded-proto", b"https")]})
    assert framed.endswith("Secure; SameSite=None; Partitioned")


# ---------------------------------------------------------------- files and memory


@pytest.mark.parametrize(
    ("path", "possible"),
    [("/a/b.png", True), ("", True), ("狗" * 80, True), ("狗" * 90, False), ("a\0b", False), ("a/" * 3000, False)],
)
def test_paths_that_no_file_system_takes_are_known(path, possible):
    assert is_possible_path(path) == possible


def test_the_folder_of_a_process_goes_with_it_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "mine.txt").write_text("not ours")
    with process_folder() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "a" / "b").mkdir(parents=True)
        (folder / "a" / "b" / "x.png").write_bytes(b"x")
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
        with process_folder():
            assert folder.is_dir()
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_files_that_were_not_used_for_long_expire_with_their_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    quota = UploadQuota(Settings(client_files=1))
    with quota.batch("anna", 1) as old:
        (old.folder / "x.png").write_bytes(b"x")
    with quota.batch("bob", 1) as arriving:
        (arriving.folder / "y.png").write_bytes(b"y")
        quota.collect(3600)
        assert old.folder.exists()
        quota.collect(-1)
        assert list(tmp_path.iterdir()) == [arriving.folder]
    with quota.batch("anna", 1):  # the expired file counts no more
        pass
    quota.collect(-1)
    assert list(tmp_path.iterdir()) == []


def test_free_memory_is_returned(monkeypatch):
    limit_arenas()
    kept = [bytes([number % 256]) * 50_000 for number in range(2000)]  # small enough for the heap
    before = psutil.Process().memory_info().rss
    kept = kept[:1] + kept[-1:]  # what lies between the two is not returned by itself
    trim_memory()
    assert psutil.Process().memory_info().rss < before - 50_000 * 1000
    assert len(kept) == 2
    monkeypatch.setattr(sys, "platform", "darwin")
    limit_arenas()
    trim_memory()


# ---------------------------------------------------------------- log


def record(level: int = logging.INFO, message: str = "request", args: tuple = (), **more: Any) -> logging.LogRecord:
    name = more.pop("name", "alignment.server.middleware")
    made = logging.LogRecord(name, level, "", 0, message, args, more.pop("exc_info", None))
    made.__dict__.update(more)
    return made


def test_a_failure_is_logged_by_the_lines_of_code_without_its_message():
    try:
        open("/tmp/holiday of Ingrid.jpg").close()
    except OSError:
        failed = record(logging.ERROR, "A request failed", exc_info=sys.exc_info())
    for line in (JsonFormatter().format(failed), HumanFormatter().format(failed)):
        assert "Ingrid" not in line
        assert "test_server.py" in line
        assert "FileNotFoundError" in line
    assert json.loads(JsonFormatter().format(failed))["level"] == "error"


def test_messages_of_others_are_cut_where_they_would_quote():
    for name in ("PIL", "alignment.data.collection"):
        line = JsonFormatter().format(record(logging.WARNING, "Cannot read %s", ("ingrid.jpg",), name=name))
        assert json.loads(line)["event"] == f"{name}: Cannot read …"
    line = JsonFormatter().format(record(logging.WARNING, "No %s", ("OpenVINO",), name="alignment.model.runtime"))
    assert json.loads(line)["event"] == "No OpenVINO"


def test_people_read_one_line():
    line = HumanFormatter().format(record(service={"endpoint": "upload", "ms": 3}))
    assert re.fullmatch(r"\d\d:\d\d:\d\d info: request  endpoint upload  ms 3", line)


def test_names_that_a_client_made_up_are_not_logged():
    assert log_name("/gradio_api/call/ingrid/1", {"search_images"}) == "call/other"
    assert log_name("/gradio_api/call/v2/search_images", {"search_images"}) == "call/search_images"
    assert log_name("/gradio_api/call/v2/search_images/ingrid", {"search_images"}) == "call/search_images"
    assert log_name("/gradio_api/queue/join", set()) == "queue/join"
    assert log_name("/", set()) == "page"
