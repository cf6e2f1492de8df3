"""Connections to a Milvus server: addresses, secrets, and the errors without a server or without pymilvus."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest
from pymilvus import MilvusException

from alignment.index import MilvusIndex, Server
from alignment.index.server import Connection, code_and_text, is_transient


@pytest.fixture
def closed_port() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("env", "token"),
    [
        ({}, ""),
        ({"ALIGNMENT_INDEX_TOKEN": "key"}, "key"),
        ({"ALIGNMENT_INDEX_USER": "me", "ALIGNMENT_INDEX_PASSWORD": "secret"}, "me:secret"),
        ({"ALIGNMENT_INDEX_USER": "me", "ALIGNMENT_INDEX_TOKEN": "key"}, "key"),
        ({"ALIGNMENT_INDEX_PASSWORD": "secret"}, ""),
    ],
)
def test_credentials_come_from_the_environment(env: dict[str, str], token: str) -> None:
    server = Server.at("https://host/photos", {**env, "ALIGNMENT_INDEX_CA": "ca.pem"})
    assert (server.uri, server.token, server.ca) == ("https://host/photos", token, "ca.pem")
    assert "secret" not in repr(server)
    assert "key" not in repr(server)


@pytest.mark.parametrize("uri", ["", "localhost:19530", "milvus.db", "ftp://host", "http://", "tcp://host:1", "host"])
def test_other_addresses_are_refused_with_an_example(uri: str) -> None:
    with pytest.raises(ValueError, match="looks like http://host:19530"):
        Server.at(uri, {})


@pytest.mark.parametrize("uri", ["http://me:secret@host:19530", "https://secret@host"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ValueError, match="ALIGNMENT_INDEX_TOKEN") as raised:
        Server.at(uri, {})
    assert "secret" not in str(raised.value)


def test_pymilvus_is_not_imported_before_a_server_is_asked_for_and_then_closes_no_log_of_this_process() -> None:
    script = """
import logging, sys
import alignment.gallery
from alignment.index import Server
print("pymilvus" in sys.modules, "grpc" in sys.modules)
from alignment.index.server import Connection
class Handler(logging.Handler):
    def close(self):
        raise SystemExit("closed")
logging.getLogger().addHandler(handler := Handler())
try:
    Connection(Server("http://127.0.0.1:9"))
except ConnectionError:
    handler.close = lambda: None  # Python closes it at the end
    print("open")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "False False\nopen\n", done.stderr


def test_without_pymilvus_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[milvus\]"'):
        MilvusIndex(Server("http://localhost:19530"), "photos")


def test_a_server_that_is_not_there_is_named(
    closed_port: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(ConnectionError) as raised:
        MilvusIndex(Server(closed_port, "me:secret"), "photos")
    assert f"{closed_port} does not answer" in str(raised.value)
    shown = capfd.readouterr()
    assert "secret" not in f"{raised.value}{caplog.text}{shown.out}{shown.err}"
    assert "Traceback" not in shown.err


def test_a_server_that_never_answers_is_named(silent: str) -> None:
    with pytest.raises(ConnectionError, match="does not answer"):
        Connection(Server(silent))


class Refused(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "first line\nsecond line"


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (MilvusException(101, "collection not loaded[collection=photos]"), True),
        (MilvusException(503, "channel not available"), True),
        (MilvusException(65535, "show collection failed: node offline"), True),
        (MilvusException(2, "Fail connecting to server on localhost:1"), True),
        (MilvusException(7, "whatever", retriable=True), True),
        (MilvusException(100, "collection not found"), False),
        (MilvusException(1100, "invalid parameter"), False),
        (MilvusException(65535, "cannot parse expression"), False),
        (Refused(grpc.StatusCode.UNAVAILABLE), True),
        (Refused(grpc.StatusCode.DEADLINE_EXCEEDED), True),
        (Refused(grpc.StatusCode.INVALID_ARGUMENT), False),
        (Refused(grpc.StatusCode.UNAUTHENTICATED), False),
        (grpc.FutureTimeoutError(), True),
    ],
)
def test_only_transient_errors_are_retried(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient


def test_the_cause_of_a_failed_connection_is_read_though_pymilvus_hides_it() -> None:
    hidden = MilvusException(2, "Fail connecting to server on localhost:1, illegal connection params")
    hidden.__cause__ = Refused(grpc.StatusCode.UNAUTHENTICATED)
    assert code_and_text(hidden) == ("UNAUTHENTICATED", "first line")
    assert not is_transient(hidden)
    hidden.__cause__ = hidden
    assert is_transient(hidden)


def test_only_the_first_line_of_an_error_is_repeated() -> None:
    assert code_and_text(Refused(grpc.StatusCode.INTERNAL)) == ("INTERNAL", "first line")
    assert code_and_text(MilvusException(100, "not found\ntrace")) == (100, "not found")
    assert code_and_text(grpc.FutureTimeoutError()) == (None, "FutureTimeoutError")
