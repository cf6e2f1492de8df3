"""The way to a Milvus server: addresses, secrets, and what is said when there is no server or no pymilvus."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import grpc
import pytest
from pymilvus import MilvusException

from alignment.index import MilvusIndex, Server
from alignment.index.server import Connection, _passes, _said


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address where something takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        yield f"http://127.0.0.1:{deaf.getsockname()[1]}"


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
def test_who_we_are_is_told_by_the_environment(env: dict[str, str], token: str) -> None:
    server = Server.at("https://host/photos", {**env, "ALIGNMENT_INDEX_CA": "ca.pem"})
    assert (server.uri, server.token, server.ca) == ("https://host/photos", token, "ca.pem")
    assert "secret" not in repr(server)
    assert "key" not in repr(server)


@pytest.mark.parametrize("uri", ["", "localhost:19530", "milvus.db", "ftp://host", "http://", "tcp://host:1", "host"])
def test_what_is_no_address_is_refused_with_one(uri: str) -> None:
    with pytest.raises(ValueError, match="looks like http://host:19530"):
        Server.at(uri, {})


@pytest.mark.parametrize("uri", ["http://me:secret@host:19530", "https://secret@host"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ValueError, match="ALIGNMENT_INDEX_TOKEN") as raised:
        Server.at(uri, {})
    assert "secret" not in str(raised.value)


def test_pymilvus_is_not_imported_before_a_server_is_asked_for() -> None:
    code = "import sys, alignment.gallery, alignment.index; print('pymilvus' in sys.modules, 'grpc' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]


def test_without_pymilvus_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[milvus\]"'):
        MilvusIndex(Server("http://localhost:19530"), "photos")


def test_a_server_that_is_not_there_is_named_within_seconds(
    nobody: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    with caplog.at_level(logging.DEBUG), pytest.raises(ConnectionError) as raised:
        MilvusIndex(Server(nobody, "me:secret"), "photos")
    assert time.monotonic() - start < 30  # five, on a machine with nothing else to do
    assert str(raised.value).startswith(f"The Milvus server at {nobody} does not answer. Is it running there?")
    shown = capfd.readouterr()
    assert "secret" not in f"{raised.value}{caplog.text}{shown.out}{shown.err}"
    assert "Traceback" not in shown.err


def test_a_server_that_says_nothing_is_named_within_seconds(silent: str) -> None:
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
    ("error", "passes"),
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
def test_what_passes_is_tried_again_and_what_does_not_is_not(error: Exception, passes: bool) -> None:
    assert _passes(error) is passes


def test_why_a_connection_failed_is_told_though_pymilvus_hides_it() -> None:
    hidden = MilvusException(2, "Fail connecting to server on localhost:1, illegal connection params")
    hidden.__cause__ = Refused(grpc.StatusCode.UNAUTHENTICATED)
    assert _said(hidden) == ("UNAUTHENTICATED", "first line")
    assert not _passes(hidden)
    hidden.__cause__ = hidden
    assert _passes(hidden)


def test_only_the_first_line_of_an_error_is_repeated() -> None:
    assert _said(Refused(grpc.StatusCode.INTERNAL)) == ("INTERNAL", "first line")
    assert _said(MilvusException(100, "not found\ntrace")) == (100, "not found")
    assert _said(grpc.FutureTimeoutError()) == (None, "FutureTimeoutError")
