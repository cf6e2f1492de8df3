"""A Milvus server for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from milvus_server import MilvusServer

from alignment.index import Server


@pytest.fixture(scope="session")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    server = MilvusServer(tmp_path_factory.mktemp("milvus"))
    try:
        took = server.start()
        print(f"\nMilvus answers at {server.uri} after {took:.1f} s; open to other machines: {server.open_ports()}")
        yield server
    finally:
        server.stop()


@pytest.fixture
def place(milvus: MilvusServer) -> Server:
    return Server.at(milvus.uri, {})
