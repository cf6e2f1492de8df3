"""A server with authentication: the token comes from the environment, and a wrong one is never repeated."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
from index_contract import unit
from milvus_server import MilvusServer
from pymilvus import MilvusClient

from alignment.gallery import main
from alignment.gallery.database import GalleryDatabase
from alignment.gallery.milvus_sync import Remote
from alignment.gallery.records import GalleryMetadata, Picture
from alignment.gallery.writer import write_gallery
from alignment.index import MilvusIndex, Server
from tests.http_client import until

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
    assert index.search(unit(3)[1], 1)[1].tolist() == [1]
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


def test_a_role_that_may_not_wait_for_the_index_can_push(
    guarded: MilvusServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(MilvusClient(uri=guarded.uri, token=guarded.token, dedicated=True)) as root:
        root.create_user("limited", "limited1")
        root.create_role("writer")
        for privilege in ("CreateIndex", "IndexDetail", "Load", "GetLoadingProgress", "GetLoadState"):
            root.grant_privilege("writer", "Collection", privilege, "*")
        for privilege in ("Insert", "Upsert", "Delete", "Query", "Search"):
            root.grant_privilege("writer", "Collection", privilege, "*")
        for privilege in ("CreateCollection", "DescribeCollection", "ShowCollections", "CreateAlias", "DropAlias"):
            root.grant_privilege("writer", "Global", privilege, "*")
        root.grant_role("limited", "writer")
    pictures = [Picture(str(row), f"{row}.jpg") for row in range(5000)]
    metadata = GalleryMetadata("f00d" * 16, "some/model", 20.0, None)
    write_gallery(tmp_path, pictures, [], {"picture": [unit(5000)]}, 16, metadata, {})
    remote = Remote(Server(guarded.uri, "limited:limited1"), "limited", tmp_path)
    with closing(GalleryDatabase(tmp_path)) as database:

        def is_granted() -> bool:
            with suppress(PermissionError):
                return bool(remote.push(database, lambda *done: None))
            return False

        until(is_granted)  # the server takes some seconds to apply what was granted
        assert "PrivilegeFlush" in caplog.text
        remote.open("picture", metadata.fingerprint, database.ids("picture")).close()
