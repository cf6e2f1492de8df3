"""A server that asks who one is: the token comes from the environment, and a wrong one is never repeated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from index_contract import unit
from milvus_server import MilvusServer

from alignment.gallery import main
from alignment.index import MilvusIndex, Server

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "gallery"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    server = MilvusServer(tmp_path_factory.mktemp("guarded"), token="root:Milvus")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize(
    "env",
    [
        {"ALIGNMENT_INDEX_TOKEN": "root:Milvus"},
        {"ALIGNMENT_INDEX_USER": "root", "ALIGNMENT_INDEX_PASSWORD": "Milvus"},
    ],
)
def test_who_says_who_he_is_gets_in(guarded: MilvusServer, env: dict[str, str]) -> None:
    place = Server.at(guarded.uri, env)
    index = MilvusIndex.create(place, "mine", 16, {})
    index.upsert(torch.arange(3), unit(3))
    assert index.search(unit(3)[1:2], 1)[1].tolist() == [[1]]
    index.drop()
    index.close()


@pytest.mark.parametrize("token", ["", "root:hunter2", "hunter2"])
def test_who_does_not_is_told_where_to_say_it(
    guarded: MilvusServer, token: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        PermissionError, match=rf"at {guarded.uri} refuses us\. Is ALIGNMENT_INDEX_TOKEN set and right\?"
    ):
        MilvusIndex(Server(guarded.uri, token), "mine")
    monkeypatch.setenv("ALIGNMENT_INDEX_TOKEN", token)
    assert main(["push", str(ASSETS), "--index", guarded.uri]) == 2
    shown = capfd.readouterr()
    assert "error: The Milvus server at" in shown.err
    assert "refuses us" in shown.err
    assert "hunter2" not in shown.out + shown.err
