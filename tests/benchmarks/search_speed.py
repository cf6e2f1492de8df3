"""Time the local index beside numpy, faiss and usearch: `python tests/benchmarks/search_speed.py [--json FILE]`."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
K, QUERIES = 10, 100
TYPICAL = 512  # queries like those that are measured, with which our index is tuned, as a gallery's is by its cohort
INDEX = "index.faiss"
PEERS = ("usearch",)
PEER_RECALL = 0.99
ABOUT = f"""\
Time the local index beside numpy, faiss and usearch, one query at a time, the best {K}.

All contenders search the same rows with the same queries, in one process, with the same threads. They take turns,
forwards and backwards; every time is the median of {QUERIES} queries, and every ratio the median over the rounds.

  numpy         float32 in memory, one product with all rows
  faiss flat    its fp16 scalar quantizer, memory-mapped: what faiss reads is as much as ours keeps
  faiss refine  `PCA96,IVF,SQ8,Refine(SQfp16)` by faiss alone, with as many lists and candidates as ours has chosen
  usearch       HNSW, float16, as it comes, but for `expansion_search`, which is doubled until recall reaches
                {PEER_RECALL}; it takes minutes to build, so only up to --peer-rows
  ours          `FileIndex`, written and opened; once more among the tenth of the rows that carry a tag

recall is the share of the exact best {K} (float64 on float16 rows) that was found. "open" is opening alone, "first" the
first answer after it, faiss imported. Memory is what a process of its own has more after {QUERIES} searches than before
opening, its own and what it has mapped of the file, against the rows in float32.
"""
DATA = """\
The rows are made up, like embeddings of an encoder: clusters in clusters, along some directions more than along others,
captions in another cone than pictures. Queries are captions. With --gallery, the rows are a gallery's pictures (or its
captions, if there are more) with differences between neighbours added, the queries captions of it that were left out;
with --scattered they have nothing to do with each other, the worst case for any index. Our index is tuned with 512
other queries of the same kind, or the gallery's cohort.

examples:
  python tests/benchmarks/search_speed.py                                 # a few minutes
  python tests/benchmarks/search_speed.py --rows 100000 --rounds 9
  python tests/benchmarks/search_speed.py --gallery assets/gallery --rows 100000
"""

Row = dict[str, Any]
Search = Callable[[Any], Any]


def main() -> None:
    arguments = parsed_arguments()
    if arguments.memory:
        print(json.dumps(memory_of_this_process(*arguments.memory)))
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(arguments.threads))
    missing = [name for name in PEERS if find_spec(name) is None and min(arguments.rows) <= arguments.peer_rows]
    if missing:
        raise SystemExit(f"{sys.executable} lacks {', '.join(missing)}. Run `make bench`, or say --peer-rows 0.")
    print(f"{arguments.threads} threads, {arguments.dim} dimensions, {arguments.rounds} rounds", flush=True)
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        opened = [measure(number, Path(folder, str(number)), arguments, rows) for number in arguments.rows]
    if len(opened) > 1:
        rows.append(row(f"opening {arguments.rows[-1]:,} rows, beside {arguments.rows[0]:,}", opened[-1], opened[0], 2))
    if arguments.json:
        title = f"Search of the best {K}, one query at a time, {arguments.threads} threads"
        arguments.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1), encoding="utf-8")


def parsed_arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        description=ABOUT, epilog=DATA, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes, ascending")
    parser.add_argument("--dim", type=int, default=512, help="dimensions (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=cores, help="of every contender (default: %(default)s)")
    parser.add_argument("--peer-rows", type=int, default=100_000, help="rows up to which usearch takes part")
    parser.add_argument("--gallery", type=Path, help="a gallery whose embeddings the rows are made of")
    parser.add_argument("--scattered", action="store_true", help="rows and queries that point anywhere")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--memory", nargs=2, metavar=("INDEX", "QUERIES"), help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------- rows and queries


def make(count: int, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Make float16 rows, (count, dim), and float32 queries, (QUERIES + TYPICAL, dim)."""
    import numpy as np

    rng = np.random.default_rng(0)
    if arguments.scattered:
        seeds, queries = unit(rng.standard_normal((2, count, arguments.dim), dtype=np.float32))
        return seeds.astype(np.float16), queries[: QUERIES + TYPICAL]
    seeds, queries = gallery_seeds(arguments.gallery) if arguments.gallery else made_up_seeds(arguments.dim)
    near = np.argsort(-(seeds @ seeds.T), axis=1)[:, 1:9]
    blocks = []
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        one, other = rng.integers(len(seeds), size=(2, size))
        beside, apart = (near[pick, rng.integers(near.shape[1], size=size)] for pick in (one, other))
        share = rng.uniform(0, 0.6, (size, 1)).astype(np.float32)
        mixed = seeds[one] * (1 - share) + seeds[beside] * share + 0.4 * (seeds[other] - seeds[apart])
        blocks.append(unit(mixed).astype(np.float16))
    return np.concatenate(blocks), queries


def made_up_seeds(dim: int) -> tuple[Any, Any]:
    """Make 4,000 pictures in 200 clusters of 20 topics, and captions between them, in a cone of their own."""
    import numpy as np

    rng = np.random.default_rng(1)
    weights = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    topics = rng.standard_normal((20, dim), dtype=np.float32)
    clusters = topics[rng.integers(20, size=200)] + rng.standard_normal((200, dim), dtype=np.float32)
    things = clusters[rng.integers(200, size=4000)] + 0.8 * rng.standard_normal((4000, dim), dtype=np.float32)
    things = unit(things * weights)
    about = things[rng.integers(4000, size=(QUERIES + TYPICAL, 3))].mean(1)
    cones = unit(rng.standard_normal((2, dim), dtype=np.float32))
    return unit(0.65 * things + 0.75 * cones[0]), unit(0.65 * unit(about) + 0.75 * cones[1])


def gallery_seeds(folder: Path) -> tuple[Any, Any]:
    import numpy as np

    from alignment.gallery.database import GalleryDatabase

    database = GalleryDatabase(folder)
    pictures, texts = (
        unit(np.concatenate([rows.float().numpy() for _, rows in database.batches(kind)]))
        for kind in ("picture", "caption")
    )
    queries = np.concatenate([texts[-QUERIES:], unit(database.cohort()["text_embeds"].float().numpy())])
    return (pictures if len(pictures) > len(texts) else texts[:-QUERIES]), queries


def unit(rows: Any) -> Any:
    import numpy as np

    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def exact(rows: Any, queries: Any) -> list[set[int]]:
    """Find the true best by float64, some thousand rows at a time."""
    import numpy as np

    scores = np.concatenate(
        [
            queries.astype(np.float64) @ rows[start : start + 8192].astype(np.float64).T
            for start in range(0, len(rows), 8192)
        ],
        axis=1,
    )
    return [set(line.tolist()) for line in np.argpartition(-scores, K, axis=1)[:, :K]]


# ---------------------------------------------------------------- contenders


def measure(count: int, folder: Path, arguments: argparse.Namespace, found: list[Row]) -> float:
    """Let all contenders search so many rows, and write down the figures; returns how long opening took, in ms."""
    import faiss
    import torch

    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    folder.mkdir()
    rows, queries = make(count, arguments)
    queries, typical = queries[:QUERIES], queries[QUERIES:]
    built = timed(lambda: write_index(folder / INDEX, rows, typical)) / 1000
    opening = median(timed(lambda: open_index(folder / INDEX)) for _ in range(20))
    index = open_index(folder / INDEX)
    first = timed(lambda: index.search(torch.from_numpy(queries[0]), K))
    contenders = dict(all_contenders(rows, index, queries, folder, arguments))
    times = take_turns(contenders, queries, arguments.rounds)
    truth = exact(rows, queries)
    print(f"\n{count:,} rows: written in {built:.1f} s, open {opening:.2f} ms, first {first:.1f} ms")
    recalls = {name: recall(search, queries, truth) for name, search in contenders.items() if name != "ours, tag"}
    for name in contenders:
        found_of = f"recall {recalls[name]:.4f}" if name in recalls else ""
        spread = f"({min(times[name]):.3f} to {max(times[name]):.3f})"
        print(f"  {name:14} {median(times[name]):8.3f} ms   {spread}   {found_of}")
        if name not in ("ours", "ours, tag"):
            target = 1.1 if name == "faiss flat" and count == max(arguments.rows) else None
            note = f"recall {recalls['ours']:.4f}, beside {recalls[name]:.4f}"
            entry = row(f"{count:,} rows", median(times["ours"]), median(times[name]), target, name, note)
            entry["ratio"] = median(mine / theirs for mine, theirs in zip(times["ours"], times[name], strict=True))
            found.append(entry)
            print(f"  {'':14} ours / {name}: {entry['ratio']:.3f}")
    del contenders
    found.append(memory(count, folder, queries, arguments))
    return opening


def write_index(path: Path, rows: Any, typical: Any) -> None:
    import torch

    from alignment.index import FileIndex

    FileIndex.write(path, torch.from_numpy(rows).split(16_384), "", torch.from_numpy(typical))


def open_index(path: Path) -> Any:
    """Open what was written; the tag "tenth" is carried by every tenth row."""
    import torch

    from alignment.index import FileIndex

    count = header_of(path)["count"]
    return FileIndex(path, "", lambda tag: torch.arange(3, count, 10))


def header_of(path: Path) -> dict[str, Any]:
    """Read what the file says of itself."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(4096)[8:])
    return header


def recall(search: Search, queries: Any, truth: list[set[int]]) -> float:
    """Share of the true best that a contender finds."""
    return (
        sum(len(set(search(query[None])) & true) for query, true in zip(queries, truth, strict=True)) / K / len(truth)
    )


def all_contenders(
    rows: Any, index: Any, queries: Any, folder: Path, arguments: argparse.Namespace
) -> Iterator[tuple[str, Search]]:
    """Yield each contender's name and its search: one query, (1, dim), to positions."""
    import faiss
    import numpy as np
    import torch

    wide = rows.astype(np.float32)

    def by_numpy(query: Any) -> Any:
        scores = wide @ query[0]
        best = np.argpartition(-scores, K)[:K]
        return best[np.argsort(-scores[best])]

    yield "numpy", by_numpy
    flat = faiss.IndexScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    flat.add(wide)
    faiss.write_index(flat, str(folder / "flat.faiss"))
    flat = faiss.read_index(str(folder / "flat.faiss"), faiss.IO_FLAG_MMAP_IFC)
    yield "faiss flat", lambda query: flat.search(query, K)[1][0]
    header = header_of(folder / INDEX)
    spec = f"PCA96,IVF{2 ** round(0.6 * math.log2(len(rows)))},SQ8,Refine(SQfp16)"
    refined = faiss.index_factory(rows.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
    refined.train(wide[:: max(1, len(wide) // 80_000)])
    refined.add(wide)
    asked = faiss.SearchParametersPreTransform(index_params=faiss.SearchParametersIVF(nprobe=header["nprobe"]))
    asked = faiss.IndexRefineSearchParameters(k_factor=header["depth"] / K, base_index_params=asked)
    yield "faiss refine", lambda query: refined.search(query, K, params=asked)[1][0]
    if len(rows) <= arguments.peer_rows:
        from usearch.index import Index

        graph = Index(ndim=rows.shape[1], metric="ip", dtype="f16")
        graph.add(np.arange(len(rows)), wide, threads=arguments.threads)
        truth = exact(rows, queries)
        while graph.expansion_search < len(rows) / 8:
            best = graph.search(queries, K).keys
            if (
                sum(len(set(line.tolist()) & true) for line, true in zip(best, truth, strict=True))
                >= PEER_RECALL * K * QUERIES
            ):
                break
            graph.expansion_search *= 2
        yield f"usearch, {graph.expansion_search}", lambda query: graph.search(query[0], K, threads=1).keys
    yield "ours", lambda query: index.search(torch.from_numpy(query[0]), K)[1].tolist()
    yield "ours, tag", lambda query: index.search(torch.from_numpy(query[0]), K, tag="tenth")[1].tolist()


def take_turns(contenders: dict[str, Search], queries: Any, rounds: int) -> dict[str, list[float]]:
    """Time every contender once a round, milliseconds a query; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            took = median(timed(lambda query=query, name=name: contenders[name](query[None])) for query in queries)
            if number:
                times[name].append(took)
    return times


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of a call."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def row(what: str, ours: float, reference: float, target: float | None, peer: str = "", note: str = "") -> Row:
    """Say it for `bench.py`."""
    entry = {"what": what, "unit": "ms", "ours": ours, "reference": reference, "ratio": ours / reference, "note": note}
    entry |= {"target": target} if target else {}
    return entry | ({"peer": peer} if peer else {})


# ---------------------------------------------------------------- memory


def memory(count: int, folder: Path, queries: Any, arguments: argparse.Namespace) -> Row:
    """Measure a process that does nothing but search, against the rows as float32."""
    import numpy as np

    np.save(folder / "queries.npy", queries)
    command = [sys.executable, __file__, "--memory", str(folder / INDEX), str(folder / "queries.npy")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    own, mapped = json.loads(result.stdout.splitlines()[-1])
    wide = count * queries.shape[1] * 4 / 2**20
    print(f"  memory: {own:.0f} MiB of its own and {mapped:.0f} MiB of files; the rows as float32: {wide:.0f} MiB")
    target = 0.5 if count == max(arguments.rows) else None
    note = f"{own:.0f} MiB are its own, the rest files that the system may drop and read again"
    entry = row(f"{count:,} rows: memory, beside float32", own + mapped, wide, target, "", note)
    return {**entry, "unit": "MiB"}


def memory_of_this_process(index: str, queries: str) -> tuple[float, float]:
    """Open, search, and tell by how many MiB the memory of one's own and the mapped files have grown."""
    import faiss  # noqa: F401 - its libraries are not what is measured
    import numpy as np
    import torch

    from alignment.index import LocalIndex

    asked = torch.from_numpy(np.load(queries))
    LocalIndex(asked).search(asked[0], K)
    before = resident()
    opened = open_index(Path(index))
    for query in asked:
        opened.search(query, K)
    after = resident()
    return after[0] - before[0], after[1] - before[1]


def resident() -> tuple[float, float]:
    """Memory of one's own and mapped files in MiB, as Linux tells it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
