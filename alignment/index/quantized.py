"""The file of a large index: rows as float16, and a faiss index of their projections that names candidates.

Layout: a page with a checksum and JSON, the rows in order, the faiss index (PCA, IVF, SQ8). All of it is mapped, which
does not count as memory of the process. It is derived from a gallery's database and may be deleted at any time.

A query visits the lists whose centres are nearest. How many lists and candidates is measured at writing, against the
exact best ten of mixtures of rows and random directions: captions lie between pictures, and also where there are none.
"""

import json
import math
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.atomic import atomic_write
from alignment.index.vector_index import Floats, Ranking

TARGET_RECALL = 0.9975
"""Share of the exact best ten of these queries that the candidates must hold, and of those the visited lists.

So at least .995 are found. Of 1,200 captions asked of mixtures of pictures: .9997 among 10,000, all among 100,000.
"""

_FORMAT = 2  # a file of another format is written anew
_PAGE = 4096
_WIDTH = 128  # of the projections
_MIN_SAMPLE, _PER_LIST = 20_000, 40  # rows from which projections and codes are learnt, at least and for each list
_QUERIES, _MIXED = 512, 8  # of the measurement, and rows in each: of fewer, they are easier to answer than captions
_DEPTHS = 128, 1024  # candidates, at least and at most
_BLOCK = 16_384  # rows at a time


class QuantizedFile:
    """An open file: its rows, (n, embed_dim) float16, and the `depth`, how many candidates to ask for."""

    def __init__(self, path: Path, stamp: str) -> None:
        """Map a file, see `LocalIndex.open`."""
        with path.open("rb") as file:
            page = file.read(_PAGE)
        header: dict[str, Any] = json.loads(page[8:]) if page[:8] == b"%08x" % zlib.crc32(page[8:]) else {}
        damaged = f"The search index {path} is damaged or of another version: delete it, it will be made again."
        if header.get("format") != _FORMAT or path.stat().st_size != header["size"]:
            raise ValueError(damaged)
        if header["stamp"] != stamp:
            raise ValueError(f"The search index {path} was made of another state of the gallery.")
        # Copy on write, though nothing writes: torch warns of arrays that may not be written to.
        self.rows: Floats = np.memmap(path, np.float16, "c", _PAGE, (header["count"], header["embed_dim"]))
        self._data = np.memmap(path, np.uint8, "r", _PAGE + self.rows.nbytes)
        if zlib.crc32(self._data[: header["head"]].data) != header["head_crc"]:
            raise ValueError(damaged)
        self.depth, self._nprobe = int(header["depth"]), int(header["nprobe"])

    @cached_property
    def _index(self) -> tuple[Any, Any, Tensor]:
        """The faiss index, its lists and its projection; it is opened late, as importing faiss takes longer."""
        import faiss

        index = faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(self._data), len(self._data)))
        return index, faiss.extract_index_ivf(index), torch.from_numpy(_projection(index))

    def candidates(
        self, query: NDArray[np.float64], depth: int, count: int, bits: NDArray[np.uint8] | None = None
    ) -> Ranking:
        """Find at most `depth` rows that score high by their codes: scores, which are not cosines, and positions.

        Only `count` rows compete, those whose bits are set, the lowest first; the fewer, the more lists are visited.
        """
        import faiss

        _, lists, projection = self._index
        visited = max(self._nprobe * len(self.rows), 2 * depth * lists.nlist) // count
        selector = None if bits is None else faiss.IDSelectorBitmap(bits)
        asked = faiss.SearchParametersIVF(nprobe=min(max(visited, 1), lists.nlist), sel=selector)
        projected = torch.mv(projection, torch.from_numpy(query.astype(np.float32)))
        looks, near = lists.search(projected[None].numpy(), depth, params=asked)
        there = (near[0] >= 0) & (near[0] < len(self.rows))  # the codes of a damaged file may name others
        return looks[0][there], near[0][there]


def _projection(index: Any) -> NDArray[np.float32]:
    """Read the projection, (width, embed_dim); faiss would centre queries as well, which does not rank by cosine."""
    import faiss

    pca = faiss.downcast_VectorTransform(index.chain.at(0))
    return np.asarray(faiss.vector_to_array(pca.A).reshape(pca.d_out, pca.d_in))


def write(path: Path, batches: Iterable[Tensor], stamp: str) -> None:
    """Write unit-norm embeddings, batches of (n, embed_dim), and replace the old file at the end.

    The stamp says what they were made of; `LocalIndex.open` asks for it. OSError when the file cannot be written,
    ValueError when an embedding is not finite.
    """
    import faiss

    with atomic_write(path) as temp, temp.open("wb") as file:
        file.write(bytes(_PAGE))
        for batch in batches:
            rows = batch.half().numpy()
            if not np.isfinite(rows).all():
                raise ValueError("Embeddings must be finite.")
            file.write(rows.data)
        file.flush()
        count, embed_dim = (file.tell() - _PAGE) // (2 * rows.shape[1]), rows.shape[1]
        index, nprobe, depth = _train(np.memmap(temp, np.float16, "c", _PAGE, (count, embed_dim)))
        data = faiss.serialize_index(index)
        file.write(data)
        head = len(data) - count * (faiss.extract_index_ivf(index).code_size + 8)  # codes and positions come last
        header = {"format": _FORMAT, "stamp": stamp, "count": count, "embed_dim": embed_dim, "size": file.tell()}
        header |= {"nprobe": nprobe, "depth": depth, "head": head, "head_crc": zlib.crc32(data[:head])}
        page = json.dumps(header).encode().ljust(_PAGE - 8)
        file.seek(0)
        file.write(b"%08x" % zlib.crc32(page) + page)


def _train(rows: Floats) -> tuple[Any, int, int]:  # the index, lists to visit, candidates
    import faiss

    rng, num_lists = np.random.default_rng(0), 2 ** round(0.55 * math.log2(len(rows)))
    drawn = rng.permutation(len(rows))[: max(_MIN_SAMPLE, _PER_LIST * num_lists)]
    sample = rows[np.sort(drawn)].astype(np.float32)
    spec = f"PCA{min(_WIDTH, *rows.shape)},IVF{num_lists},SQ8"
    index = faiss.index_factory(rows.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
    clustering = faiss.extract_index_ivf(index).cp
    clustering.niter, clustering.min_points_per_centroid, clustering.max_points_per_centroid = 8, 1, _PER_LIST
    index.train(sample)
    for block in _blocks(rows):
        index.add(block)
    queries = sample[rng.integers(len(sample), size=(_MIXED, _QUERIES))].mean(0) - sample.mean(0)
    faiss.normalize_L2(queries)
    queries += rng.standard_normal(queries.shape, np.float32) / math.sqrt(rows.shape[1])
    return index, *_tune(index, rows, queries)


def _blocks(rows: Floats) -> Iterable[NDArray[np.float32]]:
    return (rows[start : start + _BLOCK].astype(np.float32) for start in range(0, len(rows), _BLOCK))


def _tune(index: Any, rows: Floats, queries: NDArray[np.float32]) -> tuple[int, int]:
    """Measure how many lists to visit and how many candidates to name for the best ten of these queries."""
    import faiss
    from faiss.contrib.exhaustive_search import knn_ground_truth

    truth = knn_ground_truth(queries, _blocks(rows), min(10, len(rows)), faiss.METRIC_INNER_PRODUCT)[1]
    lists, projected = faiss.extract_index_ivf(index), queries @ _projection(index).T

    def recalls(nprobe: int, depth: int) -> NDArray[np.float64]:  # at 1, 2, ..., depth candidates
        near = lists.search(projected, depth, params=faiss.SearchParametersIVF(nprobe=nprobe))[1]
        return np.asarray((near[:, :, None] == truth[:, None, :]).sum((0, 2)).cumsum() / truth.size)

    least, most = (min(depth, len(rows)) for depth in _DEPTHS)
    held = recalls(lists.nlist, most)
    depth, nprobe = min(max(least, int(np.searchsorted(held, TARGET_RECALL)) + 1), most), 1
    while nprobe < lists.nlist and recalls(nprobe, depth)[-1] < TARGET_RECALL * held[depth - 1]:
        nprobe += max(1, nprobe // 4)
    return min(nprobe, lists.nlist), depth
