"""Connection to a Milvus server: its address, the credentials, and requests that are retried while it is starting.

Credentials come from the environment alone: other users of the machine can read a command line, and addresses are
logged. `pymilvus` is optional and imported when a server is first used; it retries only some of these errors.
"""

import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

TOKEN = "ALIGNMENT_INDEX_TOKEN"
USER, PASSWORD = "ALIGNMENT_INDEX_USER", "ALIGNMENT_INDEX_PASSWORD"
CA = "ALIGNMENT_INDEX_CA"  # path of the certificate to trust, where it is not signed by a public authority

CONNECT_TIMEOUT_S, SEARCH_TIMEOUT_S = 5.0, 10.0
CALL_TIMEOUT_S = 120.0  # retries included; a server that was killed answers again within one minute

# Milvus error codes and texts for: starting, too busy, not loaded, not available at the moment.
TRANSIENT_CODES = {1, 2, 8, 101, 103, 201, 202, 401, 500, 501, 502, 503, 504, 600, 601, 602, 901, 902, 903, 904}
_TRANSIENT_TEXT = "not (fully )?(loaded|ready|healthy)|loading|(no |un)available|node offline|timeout|fail connecting"
_TRANSIENT_STATUS = (None, "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "INTERNAL")  # of gRPC
_UNAUTHORIZED_TEXT = "auth|permission|privilege|unauthenticated"
_COLLECTION_NOT_FOUND = 100
_FIRST_DELAY_S, _MAX_DELAY_S = 0.1, 2.0  # between tries, doubled each time


@dataclass(frozen=True)
class Server:
    """Address of a Milvus server and the credentials for it."""

    uri: str  # "http://host:19530", with TLS "https://host"; a path selects a database
    token: str = field(default="", repr=False)  # "user:password" or an API key; "" for a server without authentication
    ca: str = ""  # path of the certificate to trust; "" for the public authorities

    @classmethod
    def at(cls, uri: str, env: Mapping[str, str] = os.environ) -> Self:
        """Check an address, and read the credentials from the environment; ValueError if it contains a secret."""
        parts = urlsplit(uri)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(f"Addresses are logged: leave user, password and token out of it and set {TOKEN} instead.")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The address of a Milvus server looks like http://host:19530, not {uri}")
        user, password = env.get(USER, ""), env.get(PASSWORD, "")
        return cls(uri, env.get(TOKEN, "") or (f"{user}:{password}" if user else ""), env.get(CA, ""))


class Connection:
    """Requests to a server, from any number of threads."""

    def __init__(self, server: Server) -> None:
        """Connect; errors as of `call`, or ValueError if pymilvus is not installed."""
        from unittest import mock

        self._server = server
        try:
            with mock.patch("logging.config.dictConfig"):  # pymilvus' would close the handlers of the whole process
                import grpc
                import pymilvus
        except ImportError as error:
            install = 'python -m pip install -e ".[milvus]"'
            raise ValueError(f"An index on a Milvus server needs one more package; run: {install}") from error
        for name in ("pymilvus", "pymilvus.milvus_client"):  # they log a traceback with every error that is raised
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._errors = (pymilvus.MilvusException, grpc.RpcError, grpc.FutureTimeoutError)
        options: dict[str, Any] = {"server_pem_path": server.ca} if server.ca else {}
        options |= {"uri": server.uri, "token": server.token, "timeout": CONNECT_TIMEOUT_S, "dedicated": True}
        try:
            self._client = pymilvus.MilvusClient(**options)
        except self._errors as error:
            raise self._translated(error) from None
        self.close = self._client.close

    def call(self, method: str, /, *args: Any, timeout: float = CALL_TIMEOUT_S, **options: Any) -> Any:
        """Call a method of `MilvusClient`, and again while its error is transient.

        ConnectionError if errors were transient until the timeout, in seconds; FileNotFoundError without the
        collection; PermissionError if the server rejects the credentials, and ValueError if it rejects the request.
        """
        end, delay = time.monotonic() + timeout, _FIRST_DELAY_S
        while True:
            try:
                return getattr(self._client, method)(*args, timeout=max(end - time.monotonic(), 0.1), **options)
            except self._errors as error:
                if not is_transient(error) or time.monotonic() + delay > end:
                    raise self._translated(error) from None
            time.sleep(delay)
            delay = min(2 * delay, _MAX_DELAY_S)

    def _translated(self, error: Exception) -> Exception:
        """Return the built-in exception for an error of pymilvus or gRPC; its message never contains the token."""
        code, text = code_and_text(error)
        where = f"The Milvus server at {self._server.uri}"
        if re.search(_UNAUTHORIZED_TEXT, f"{code} {text}".lower()):
            return PermissionError(f"{where} refuses us. Is {TOKEN} set and right? It says: {text}")
        if code == _COLLECTION_NOT_FOUND:
            return FileNotFoundError(f"{where} has no such collection: {text}")
        if is_transient(error):
            return ConnectionError(f"{where} does not answer. Is it running there? It says: {text}")
        return ValueError(f"{where} refuses a request: {text}")


def code_and_text(error: Exception) -> tuple[int | str | None, str]:
    """Read the code of an error (Milvus' number or gRPC's name) and the first line of its text."""
    if callable(getattr(error.__cause__, "details", None)) and error.__cause__ is not error:
        return code_and_text(error.__cause__)  # type: ignore[arg-type]  # pymilvus wraps why it could not connect
    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    text = getattr(error, "message", "") or getattr(error, "details", "") or str(error)
    text = str(text() if callable(text) else text) or type(error).__name__
    return code if isinstance(code, int) else getattr(code, "name", None), text.splitlines()[0][:300]


def is_transient(error: Exception) -> bool:
    """Tell whether the same request may succeed later."""
    code, text = code_and_text(error)
    if not isinstance(code, int):
        return code in _TRANSIENT_STATUS
    says = getattr(error, "retriable", False) or re.search(_TRANSIENT_TEXT, text.lower())
    return bool(says) or code in TRANSIENT_CODES
