"""Disk and memory for each entry of a gallery: in the local index and on a Milvus server.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/index_size.py --rows 100000 300000

Entries are unit vectors of 512 dimensions with two tags each, as of pictures two folders deep. Each figure is taken in
a process of its own, after 200 searches. Memory is what the process occupies beyond what it did when it was empty;
pages of mapped files are counted apart, since the system takes them back when it needs them. The server is the one of
`make test-scale`, standalone: what it writes to its disk a cluster keeps in its object store, its queue and etcd.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scale"))
WIDTH, STEP, SEARCHES = 512, 10_000, 200


def rows_of(count: int) -> Iterator[tuple[Tensor, Tensor, list[list[str]]]]:
    """Make ids, embeddings and tags, some thousand at a time."""
    for start in range(0, count, STEP):
        generator = torch.Generator().manual_seed(start)
        size = min(STEP, count - start)
        ids = torch.randint(0, 2**62, (size,), generator=generator)
        embeds = torch.nn.functional.normalize(torch.randn(size, WIDTH, generator=generator), dim=-1)
        yield ids, embeds, [[f"trip {row % 50}", f"trip {row % 50}/{row // 500}"] for row in range(start, start + size)]


def resident(pid: int | str = "self") -> dict[str, int]:
    """Bytes of memory, by kind."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {kind: int(size) * 1024 for kind, size in fields.items()}


def search_times(index: object) -> list[float]:
    generator, times = torch.Generator().manual_seed(7), []
    for _ in range(SEARCHES):
        query = torch.nn.functional.normalize(torch.randn(1, WIDTH, generator=generator), dim=-1)
        start = time.perf_counter()
        index.search(query, 10)  # type: ignore[attr-defined]
        times.append((time.perf_counter() - start) * 1000)
    return times


def local(count: int) -> dict[str, float]:
    from alignment.index import LocalIndex

    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "index.faiss")
        LocalIndex.write(path, ((ids, embeds) for ids, embeds, _ in rows_of(count)), count, WIDTH, "")
        command = [sys.executable, __file__, "--opened", str(path), "--rows", str(count)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        opened = json.loads(result.stdout.splitlines()[-1])
        p50 = opened.pop("p50")
        return {
            "disk": path.stat().st_size / count,
            **{kind: size / count for kind, size in opened.items()},
            "p50": p50,
        }


def opened(path: Path, count: int) -> dict[str, float]:
    from alignment.index import LocalIndex

    with tempfile.TemporaryDirectory() as name:  # have everything imported and warm before memory is looked at
        ids, embeds, _ = next(rows_of(5000))
        LocalIndex.write(Path(name, "small"), [(ids, embeds)], 5000, WIDTH, "")
        search_times(LocalIndex.open(Path(name, "small"), ids, ""))
    ids = torch.cat([ids for ids, _, _ in rows_of(count)])
    before = resident()
    times = search_times(LocalIndex.open(path, ids, ""))
    after = resident()
    memory, mapped = after["RssAnon"] - before["RssAnon"], after["RssFile"] - before["RssFile"]
    return {"memory": memory, "mapped": mapped, "p50": float(np.median(times))}


def milvus(count: int) -> dict[str, float]:
    from milvus_server import MilvusServer
    from pymilvus import MilvusClient

    from alignment.index import MilvusIndex, Server

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        server = MilvusServer(Path(name))
        try:
            server.start()
            index = MilvusIndex.create(Server.at(server.uri, {}), "sizes", WIDTH, {})
            time.sleep(5)
            before, disk_before, start = server.resident(), server.on_disk(), time.monotonic()
            for ids, embeds, tags in rows_of(count):
                index.upsert(ids, embeds, tags)
            pushed = time.monotonic() - start
            client = MilvusClient(uri=server.uri, dedicated=True)
            client.flush("sizes")
            while client.describe_index("sizes", "embed")["pending_index_rows"]:
                time.sleep(2)
            indexed = time.monotonic() - start
            time.sleep(30)  # it goes over to the index that it has built
            times = search_times(index)
            disk = server.on_disk()
            client.close()
            found = {
                "disk": sum(disk.values()) - sum(disk_before.values()),
                **{f"disk.{part}": size - disk_before.get(part, 0) for part, size in disk.items()},
                "memory": server.resident() - before,
            }
            found = {kind: size / count for kind, size in found.items()}
            found |= {"base_memory_MB": before / 1e6, "pushed_s": pushed, "indexed_s": indexed}
            server.stop()
            server.start()
            index = MilvusIndex(Server.at(server.uri, {}), "sizes")
            assert len(index) == count
            after_restart = search_times(index)
            restarted = (server.resident() - before) / count
            return {
                **found,
                "p50": float(np.median(times)),
                "restarted": restarted,
                "p50r": float(np.median(after_restart)),
            }
        finally:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--what", nargs="+", default=["local", "milvus"], choices=["local", "milvus"])
    parser.add_argument("--opened", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.opened:
        print(json.dumps(opened(args.opened, args.rows[0])))
        return
    for what in args.what:
        for count in args.rows:
            found = {"local": local, "milvus": milvus}[what](count)
            print(what, count, json.dumps({kind: round(value, 1) for kind, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
