"""The server is killed in the middle of upserts: what was acknowledged is there afterwards, and the work goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from index_contract import search_all, unit
from milvus_server import MilvusServer

from alignment.index import MilvusIndex, Server

WIDTH, BATCH = 512, 300


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[MilvusServer]:
    """A server of its own."""
    server = MilvusServer(tmp_path / "mortal")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.mark.timeout(900)
def test_what_was_acknowledged_survives_a_kill_and_the_work_goes_on(mortal: MilvusServer) -> None:
    place = Server.at(mortal.uri, {})
    index, acknowledged = MilvusIndex.create(place, "crash", WIDTH, {}), []
    halted, failed = threading.Event(), []

    def write() -> None:
        try:
            while not halted.is_set():
                ids = torch.arange(len(acknowledged), len(acknowledged) + BATCH)
                index.upsert(ids, rows_of(ids), [{"even" if id % 2 == 0 else "odd"} for id in ids.tolist()])
                acknowledged.extend(ids.tolist())
        except BaseException as error:
            failed.append(error)

    def wait_for(count: int) -> None:
        while len(acknowledged) < count:
            assert not failed
            assert writer.is_alive()
            time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_for(8 * BATCH)
        mortal.kill()
        assert mortal.process is not None
        assert mortal.process.returncode == -9
        before = list(acknowledged)
        with pytest.raises(ConnectionError, match="does not answer"):
            MilvusIndex(place, "crash")
        answered = mortal.start()
        start = time.monotonic()
        again = MilvusIndex(place, "crash")
        found = set(again.ids().tolist())
        loaded = time.monotonic() - start
        assert set(before) <= found
        wait_for(len(before) + 4 * BATCH)  # the writer has waited and goes on
    finally:
        halted.set()
        writer.join()
    assert not failed
    lost = set(before) - found
    print(
        f"\nkilled after {len(before)} acknowledged rows; answers after {answered:.1f} s, all of it {loaded:.1f} s "
        f"later; {len(lost)} lost; the writer went on to {len(acknowledged)}"
    )
    assert again.ids().tolist() == acknowledged
    assert again.ids("even").tolist() == acknowledged[::2]
    for ids in torch.tensor(acknowledged).split(BATCH)[-8:]:
        torch.testing.assert_close(again.embeds(ids), rows_of(ids))
        assert search_all(again, rows_of(ids)[:5], 1)[1].flatten().tolist() == ids[:5].tolist()
    index.upsert(ids, rows_of(ids), [{"even" if id % 2 == 0 else "odd"} for id in ids.tolist()])
    assert again.ids().tolist() == acknowledged
    index.close()
    again.close()


def rows_of(ids: torch.Tensor) -> torch.Tensor:
    return unit(BATCH, WIDTH, seed=int(ids[0]))


def test_a_stopped_server_leaves_no_process_behind(tmp_path: Path) -> None:
    server = MilvusServer(tmp_path / "short")
    server.start()
    server.stop()
    assert server.process is not None
    assert server.process.poll() is not None
    group = server.process.pid
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        assert int(fields[2]) != group  # its process group
