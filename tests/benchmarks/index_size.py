"""Disk, memory and search time of large galleries: in a folder, and on a Milvus server.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/index_size.py --rows 100000 300000

Pictures lie two folders deep; their embeddings are random unit vectors of 512 dimensions. Bytes are per picture, after
200 searches in a process that did nothing else. Memory is what the process occupies beyond what it did before; pages of
a mapped file ("mapped") are counted apart, since the system takes them back when it needs them. The server is the one
of `make test-scale`, standalone: a cluster keeps what it writes in its object store, its queue and etcd.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scale"))
WIDTH, STEP, SEARCHES = 512, 10_000, 200
FINGERPRINT = "f00d" * 16


def batches(count: int) -> Iterator[Tensor]:
    """Yield embeddings, (at most STEP, WIDTH)."""
    for start in range(0, count, STEP):
        generator = torch.Generator().manual_seed(start)
        yield torch.nn.functional.normalize(torch.randn(min(STEP, count - start), WIDTH, generator=generator), dim=-1)


def write(folder: Path, count: int) -> None:
    """Write a gallery with its index."""
    from alignment.gallery.database import GalleryDatabase
    from alignment.gallery.modality import write_index
    from alignment.gallery.records import FileFingerprint, GalleryMetadata, Picture
    from alignment.gallery.writer import write_gallery

    pictures = [
        Picture(
            f"{row:016x}",
            f"trip {row % 50}/{row // 500}/IMG_{row:07d}.jpg",
            file=FileFingerprint(2_000_000, row, f"{row:064x}"),
        )
        for row in range(count)
    ]
    metadata = GalleryMetadata(FINGERPRINT, "some/model", 20.0, None)
    write_gallery(folder, pictures, [], {"picture": batches(count)}, WIDTH, metadata, {})
    with closing(GalleryDatabase(folder)) as database:
        write_index(database, "picture")


def resident(pid: int | str = "self") -> dict[str, int]:
    """Bytes of memory, by kind."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {kind: int(size) * 1024 for kind, size in fields.items()}


def search_ms(folder: Path) -> tuple[float, float]:
    """Open a gallery's pictures and search them; returns milliseconds to open and the median of a search."""
    from alignment.gallery.database import GalleryDatabase
    from alignment.gallery.modality import Modality

    start = time.perf_counter()
    images: Modality = Modality.open(GalleryDatabase(folder), "picture")
    opened = (time.perf_counter() - start) * 1000
    return opened, median_ms(lambda query: images.search(query, 10, 10))


def median_ms(search) -> float:
    generator, times = torch.Generator().manual_seed(7), []
    for _ in range(SEARCHES):
        query = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=-1)
        start = time.perf_counter()
        search(query)
        times.append((time.perf_counter() - start) * 1000)
    return float(np.median(times))


def gallery(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "small", 5000)
        start = time.monotonic()
        write(folder / "large", count)
        written = time.monotonic() - start
        disk = {path.name: path.stat().st_size / count for path in (folder / "large").iterdir()}
        command = [sys.executable, __file__, "--opened", name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {**{f"disk.{name}": size for name, size in disk.items()}, "written_s": written, **json.loads(shown)}


def opened(folder: Path) -> dict[str, float]:
    """Search the large gallery once everything is imported and warm."""
    search_ms(folder / "small")
    before = resident()
    opened, search = search_ms(folder / "large")
    after = resident()
    memory, mapped = ((after[kind] - before[kind]) / 1e6 for kind in ("RssAnon", "RssFile"))
    return {"memory_MB": memory, "mapped_MB": mapped, "open_ms": opened, "search_ms": search}


def milvus(count: int) -> dict[str, float]:
    from milvus_server import MilvusServer

    from alignment.index import MilvusIndex, Server

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        server = MilvusServer(Path(name))
        try:
            server.start()
            place = Server.at(server.uri, {})
            index = MilvusIndex.create(place, "sizes", WIDTH, {})
            time.sleep(5)
            before, disk_before, start = server.resident(), sum(server.on_disk().values()), time.monotonic()
            for number, embeds in enumerate(batches(count)):
                rows = range(number * STEP, number * STEP + len(embeds))
                index.upsert(torch.tensor(rows), embeds, [[f"trip {row % 50}", f"trip {row % 50}/1"] for row in rows])
            pushed = time.monotonic() - start
            index.wait_until_indexed()
            indexed = time.monotonic() - start
            search = median_ms(lambda query: index.search(query, 10))
            found = {
                **{f"disk.{part}": size / count for part, size in server.on_disk().items()},
                "disk": (sum(server.on_disk().values()) - disk_before) / count,
                "memory": (server.resident() - before) / count,
                **{"empty_MB": before / 1e6, "pushed_s": pushed, "indexed_s": indexed, "search_ms": search},
            }
            server.stop()
            server.start()
            index = MilvusIndex(place, "sizes")
            assert len(index) == count
            search = median_ms(lambda query: index.search(query, 10))
            return {**found, "restarted": (server.resident() - before) / count, "restarted.search_ms": search}
        finally:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--what", nargs="+", choices=("gallery", "milvus"), default=["gallery", "milvus"])
    parser.add_argument("--opened", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.opened:
        print(json.dumps(opened(args.opened)))
        return
    for what in args.what:
        for count in args.rows:
            found = {"gallery": gallery, "milvus": milvus}[what](count)
            print(what, count, json.dumps({kind: round(value, 1) for kind, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
