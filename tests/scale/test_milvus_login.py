"""A server with authentication: the token comes from the environment, and a wrong one is never repeated."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from index_contract import unit
from milvus_server import MilvusServer

from alignment.gallery import main
from alignment.index import MilvusIndex, Server

OLD = Path(__file__).resolve().parents[1] / "old_gallery"


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
def test_the_right_credentials_are_accepted(guarded: MilvusServer, env: dict[str, str]) -> None:
    place = Server.at(guarded.uri, env)
    index = MilvusIndex.create(place, "mine", 16, {})
    index.upsert(torch.arange(3), unit(3))
    assert index.search(unit(3)[1:2], 1)[1].tolist() == [[1]]
    index.drop()
    index.close()


@pytest.mark.parametrize("token", ["", "root:hunter2", "hunter2"])
def test_wrong_credentials_are_refused_with_the_variable_to_set(
    guarded: MilvusServer,
    token: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(PermissionError, match=r"ALIGNMENT_INDEX_TOKEN"):
        MilvusIndex(Server(guarded.uri, token), "mine")
    monkeypatch.setenv("ALIGNMENT_INDEX_TOKEN", token)
    folder = shutil.copytree(OLD, tmp_path / "gallery")
    assert main(["push", str(folder), "--index", guarded.uri]) == 2
    shown = capfd.readouterr()
    assert "ALIGNMENT_INDEX_TOKEN" in shown.err
    assert "hunter2" not in shown.out + shown.err
