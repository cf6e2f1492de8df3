"""The way to a Milvus server: its address, who we are there, and requests that wait while it is not ready yet.

`pymilvus` is an extra and imported here only, when a server is asked for. Secrets come from the environment alone: a
command line can be read by everybody on the machine, and an address ends up in logs.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TOKEN, USER, PASSWORD, CA = (
    "ALIGNMENT_INDEX_TOKEN",
    "ALIGNMENT_INDEX_USER",
    "ALIGNMENT_INDEX_PASSWORD",
    "ALIGNMENT_INDEX_CA",
)
"""Variables of the environment; the last names a file with the certificate to trust, where it is not a public one."""

INSTALL = 'python -m pip install -e ".[milvus]"'

CONNECTING = 5.0
"""Seconds in which a server has to answer at all."""

SEARCHING = 10.0
"""Seconds in which it has to answer somebody who waits."""

ANSWERING = 120.0
"""Seconds in which it has to answer any other request; a server that was killed is back within one minute."""

_PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0)  # seconds between tries; the last for all further ones
_NOT_FOUND = 100
# Codes of Milvus for what passes: starting, too busy, and whatever is not loaded or not available for the moment.
_PASSING = frozenset({1, 2, 8, 101, 103, 201, 202, 401, 500, 501, 502, 503, 504, 600, 601, 602, 901, 902, 903, 904})
_LOADING = ("not loaded", "not fully loaded", "no available", "not ready", "node offline", "not healthy", "loading")
_REFUSING = ("auth", "permission", "privilege", "unauthenticated")


@dataclass(frozen=True)
class Server:
    """A Milvus server, a cluster of them or a managed one, and who we are there.

    Attributes:
        uri: "http://host:19530", with TLS "https://host"; a path names a database.
        token: "user:password" or an API key; "" where none is asked for.
        ca: file of the certificate to trust; "" for the public ones.
    """

    uri: str
    token: str = field(default="", repr=False)
    ca: str = ""

    @classmethod
    def at(cls, uri: str, env: Mapping[str, str] = os.environ) -> Server:
        """Read an address, and the rest from the environment.

        Raises:
            ValueError: when it is none, or holds a secret.
        """
        parts = urlsplit(uri)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"An address ends up in logs; leave user, password and token out of it and set {TOKEN} instead."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The address of a Milvus server looks like http://host:19530, not {uri}")
        user, password = env.get(USER, ""), env.get(PASSWORD, "")
        return cls(uri, env.get(TOKEN, "") or (f"{user}:{password}" if user else ""), env.get(CA, ""))

    def connect(self) -> Connection:
        """Find the server.

        Raises:
            ValueError: when pymilvus is not installed.
            ConnectionError: when the server does not answer within seconds.
            PermissionError: when it refuses us.
        """
        return Connection(self)


class Connection:
    """Requests to a server; for many threads at once."""

    def __init__(self, server: Server) -> None:
        self.server = server
        try:
            import pymilvus
        except ImportError as error:
            raise ValueError(f"An index on a Milvus server needs one more package; run: {INSTALL}") from error
        for name in ("pymilvus", "pymilvus.milvus_client"):  # it logs every error with its traceback; ours say it
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options: dict[str, Any] = {"server_pem_path": server.ca} if server.ca else {}
        self._fails = _failures()
        try:
            self._client = pymilvus.MilvusClient(
                uri=server.uri, token=server.token, timeout=CONNECTING, dedicated=True, **options
            )
        except self._fails as error:
            raise self._explained(error) from None

    def close(self) -> None:
        """Let go of the server."""
        self._client.close()

    def ask(self, method: str, /, *args: Any, patience: float = ANSWERING, **options: Any) -> Any:
        """Call a method of `MilvusClient`, again and again while the server only needs time.

        Args:
            method: its name.
            args: of it.
            patience: seconds until that is an error.
            options: of it.

        Raises:
            ConnectionError: when there is no answer, or no useful one, for so long.
            FileNotFoundError: when there is no such collection.
            PermissionError: when the server refuses us.
            ValueError: when it finds fault with what it was asked.
        """
        end, tries = time.monotonic() + patience, 0
        while True:
            try:
                left = max(end - time.monotonic(), 0.1)
                return getattr(self._client, method)(*args, timeout=left, **options)
            except self._fails as error:
                pause = _PAUSES[min(tries, len(_PAUSES) - 1)]
                if not _passes(error) or time.monotonic() + pause > end:
                    raise self._explained(error) from None
            tries += 1
            time.sleep(pause)

    def _explained(self, error: Exception) -> Exception:
        """Say what went wrong; neither the server's words nor ours hold the token."""
        code, words = _said(error)
        where = f"the Milvus server at {self.server.uri}"
        if any(word in f"{code} {words}".lower() for word in _REFUSING):
            return PermissionError(
                f"{where[0].upper()}{where[1:]} refuses us. Is {TOKEN} set and right? It says: {words}"
            )
        if code == _NOT_FOUND:
            return FileNotFoundError(f"There is no such collection on {where}: {words}")
        if _passes(error):
            return ConnectionError(
                f"{where[0].upper()}{where[1:]} does not answer. Is it running there? It says: {words}"
            )
        return ValueError(f"{where[0].upper()}{where[1:]} refuses a request: {words}")


def _failures() -> tuple[type[Exception], ...]:
    import grpc
    from pymilvus.exceptions import MilvusException

    return MilvusException, grpc.RpcError, grpc.FutureTimeoutError


def _said(error: Exception) -> tuple[object, str]:
    """Tell the code of an error, Milvus' number or gRPC's name, and its first line."""
    if callable(getattr(error.__cause__, "details", None)) and error.__cause__ is not error:
        return _said(error.__cause__)  # type: ignore[arg-type]  # pymilvus hides why it could not connect
    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    words = getattr(error, "message", "") or getattr(error, "details", "") or str(error)
    words = str(words() if callable(words) else words) or type(error).__name__
    name = getattr(code, "name", None)
    return (code if isinstance(code, int) else name), words.splitlines()[0][:300]


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    code, words = _said(error)
    if not isinstance(code, int):
        return code in (None, "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "INTERNAL")
    words = words.lower()
    lost = "unavailable" in words or "timeout" in words or "fail connecting" in words
    return bool(getattr(error, "retriable", False)) or code in _PASSING or lost or any(w in words for w in _LOADING)
