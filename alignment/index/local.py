"""The index of one process: in memory and exact, or of many rows in a file, where faiss names candidates for a query.

Equal embeddings get equal scores, and equal scores are ordered by position. float32 sums differ in the last bit, by
where a row stands, so scores are summed in float64 and rounded to float32. As that takes many times as long, float32
goes first, and only rows that could reach the best k within its error are scored again.

Layout of the file: a page with a checksum and JSON, the rows in order as float16, a faiss index of their projections
(PCA, IVF, SQ8). All of it is mapped, which does not count as memory of the process. It is derived from a gallery's
database and may be deleted at any time. A query visits the lists whose centres are nearest. How many lists and
candidates is measured at writing, against the exact best ten of mixtures of rows and random directions: captions lie
between pictures, and also where there are none.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.atomic import atomic_write
from alignment.index.vector_index import Floats, Ranking, VectorIndex

EXACT_ROWS = 4096
"""Rows up to which all are scored: of a gallery, which then needs no file, or of those that carry a tag.

Best 10 of 1024 dimensions, captions asked of mixtures of pictures, 2 busy cores: 1.2 ms for 4,096 rows in memory and
3.0 ms for 10,000; by a file 0.32 ms for 10,000 (recall .9997) and 0.63 ms for 100,000 (recall 1.0).
"""

_CACHED_TAGS = 32  # a bit for each row
_PER_RESULT = 8  # candidates for each of k, at least
_DEEPER = 8  # times as many, where equal rows may be missing or too few were found
_MIN_ROWS_PER_CANDIDATE = 4  # with more candidates than that, all rows are scored
_EQUAL = 1e-6  # quantised scores of equal rows differ by less
_BLOCK_ROWS = 2048  # scored at a time: 4 MB as float32 at 512 dimensions, which stays in the cache
_PARALLEL_FROM = 1 << 15  # numbers from which torch distributes work over threads
_ALL_IN_FLOAT64 = 4  # times k: so few rows are scored without a float32 pass

TARGET_RECALL = 0.9975
"""Share of the exact best ten of these queries that the candidates must hold, and of those the visited lists: .995."""

_FORMAT = 2  # a file of another format is written anew
_PAGE = 4096
_WIDTH = 128  # of the projections
_MIN_SAMPLE, _PER_LIST = 20_000, 40  # rows from which projections and codes are learnt, at least and for each list
_QUERIES, _MIXED = 512, 8  # of the measurement, and rows in each: of fewer, they are easier to answer than captions
_DEPTHS = 128, 1024  # candidates, at least and at most
_BLOCK = 16_384  # rows at a time


class LocalIndex(VectorIndex):
    """An index of this process, in memory or opened from a file; ids are the positions of the rows."""

    def __init__(self, embeds: Tensor, tagged: Callable[[str], Tensor] | None = None) -> None:
        """Index unit-norm embeddings, (n, embed_dim), without a copy; `tagged` lists the positions that carry a tag."""
        self._rows, self.embed_dim, self._tagged = embeds.numpy(), embeds.shape[1], tagged
        self._carriers = lru_cache(_CACHED_TAGS)(self._find_carriers)

    def __len__(self) -> int:
        return len(self._rows)

    def embeds(self, ids: Tensor) -> Tensor:
        """See `VectorIndex`."""
        return torch.from_numpy(np.take(self._rows, ids.numpy(), axis=0)).float()

    def _rank(self, query: NDArray[np.float64], k: int, wanted: int, tag: str | None) -> Ranking:
        positions = None if tag is None else np.flatnonzero(np.unpackbits(self._carriers(tag)[1], bitorder="little"))
        return rank(self._rows, query, wanted, positions)

    def _find_carriers(self, tag: str) -> tuple[int, NDArray[np.uint8]]:  # how many, and a bit for each row
        mask = np.zeros(len(self), bool)
        mask[self._tagged(tag).numpy() if self._tagged else []] = True
        return int(mask.sum()), np.packbits(mask, bitorder="little")


class FileIndex(LocalIndex):
    """A mapped file: of many rows, faiss names candidates by their codes, and only these are ranked."""

    def __init__(self, path: Path, stamp: str, tagged: Callable[[str], Tensor] | None = None) -> None:
        """Map a file; FileNotFoundError if there is none, ValueError if it is damaged or has another stamp."""
        with path.open("rb") as file:
            page = file.read(_PAGE)
        header: dict[str, Any] = json.loads(page[8:]) if page[:8] == b"%08x" % zlib.crc32(page[8:]) else {}
        damaged = f"The search index {path} is damaged or of another version: delete it, it will be made again."
        if header.get("format") != _FORMAT or path.stat().st_size != header["size"]:
            raise ValueError(damaged)
        if header["stamp"] != stamp:
            raise ValueError(f"The search index {path} was made of another state of the gallery.")
        # Copy on write, though nothing writes: torch warns of arrays that may not be written to.
        rows = np.memmap(path, np.float16, "c", _PAGE, (header["count"], header["embed_dim"]))
        self._data = np.memmap(path, np.uint8, "r", _PAGE + rows.nbytes)
        if zlib.crc32(self._data[: header["head"]].data) != header["head_crc"]:
            raise ValueError(damaged)
        super().__init__(torch.from_numpy(rows), tagged)
        self._depth, self._nprobe = int(header["depth"]), int(header["nprobe"])

    @staticmethod
    def write(path: Path, batches: Iterable[Tensor], stamp: str) -> None:
        """Write unit-norm embeddings, batches of (n, embed_dim), and replace the old file at the end.

        To open it takes the stamp, which says what they were made of. OSError when the file cannot be written,
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

    @cached_property
    def _index(self) -> tuple[Any, Any, Tensor]:
        """The faiss index, its lists and its projection; it is opened late, as importing faiss takes longer."""
        import faiss

        index = faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(self._data), len(self._data)))
        return index, faiss.extract_index_ivf(index), torch.from_numpy(_projection(index))

    def _rank(self, query: NDArray[np.float64], k: int, wanted: int, tag: str | None) -> Ranking:
        count, bits = (len(self), None) if tag is None else self._carriers(tag)
        depth = max(self._depth, _PER_RESULT * k, wanted)  # candidates
        while count > EXACT_ROWS and depth * _MIN_ROWS_PER_CANDIDATE <= count:
            looks, near = self._candidates(query, depth, count, bits)
            scores, best = rank(self._rows, query, wanted, near)
            # The last of the k must look better than the last candidate, whose equals may have lower positions.
            if len(best) == wanted and (not k or len(near) < depth or looks[near == best[k - 1]] > looks[-1] + _EQUAL):
                return scores, best
            depth *= _DEEPER
        return super()._rank(query, k, wanted, tag)

    def _candidates(
        self, query: NDArray[np.float64], depth: int, count: int, bits: NDArray[np.uint8] | None
    ) -> Ranking:
        """Find at most `depth` rows that score high by their codes: scores, which are not cosines, and positions.

        Only `count` rows compete, those whose bits are set, the lowest first; the fewer, the more lists are visited.
        """
        import faiss

        _, lists, projection = self._index
        visited = max(self._nprobe * len(self), 2 * depth * lists.nlist) // count
        selector = None if bits is None else faiss.IDSelectorBitmap(bits)
        asked = faiss.SearchParametersIVF(nprobe=min(max(visited, 1), lists.nlist), sel=selector)
        projected = torch.mv(projection, torch.from_numpy(query.astype(np.float32)))
        looks, near = lists.search(projected[None].numpy(), depth, params=asked)
        there = (near[0] >= 0) & (near[0] < len(self))  # the codes of a damaged file may name others
        return looks[0][there], near[0][there]


def rank(rows: Floats, query: NDArray[np.float64], k: int, chosen: NDArray[np.int64] | None = None) -> Ranking:
    """Find the k best of unit-norm rows, (n, embed_dim), or of those at the chosen positions; ties by lower position.

    Source: the error of a float32 sum in any order, Higham, Accuracy and Stability of Numerical Algorithms, 3.1.
    """
    positions = np.arange(len(rows)) if chosen is None else chosen
    if len(positions) > _ALL_IN_FLOAT64 * k > 0:
        rough = _score(rows, query.astype(np.float32), chosen)
        error = (len(query) + 8) * 2.0**-24 * max(float(np.linalg.norm(query)), 1.0)
        chosen = positions = positions[rough >= np.partition(rough, -k)[-k] - 2 * error]
    scores = _score(rows, query, chosen).astype(np.float32)
    order = np.lexsort((positions, -scores))[:k]
    return scores[order], positions[order]


def _score(rows: Floats, query: Floats, chosen: NDArray[np.int64] | None) -> Floats:
    """Compute cosines, (count,), in the precision of the query; by torch, which widens halves twenty times faster.

    A few rows are widened in pieces that torch does not distribute: on a busy machine threads wait to be scheduled.
    """
    count = len(rows) if chosen is None else len(chosen)
    scores, factor = np.empty(count, query.dtype), torch.from_numpy(query)
    few = count < _BLOCK_ROWS and rows.dtype != query.dtype
    step = max(1, (_PARALLEL_FROM - 1) // len(query)) if few else _BLOCK_ROWS
    for start in range(0, count, step):
        here = slice(start, start + step)
        block = rows[here] if chosen is None else np.take(rows, chosen[here], axis=0)
        scores[here] = torch.mv(torch.from_numpy(block).to(factor.dtype), factor).numpy()
    return scores


def _projection(index: Any) -> NDArray[np.float32]:
    """Read the projection, (width, embed_dim); faiss would centre queries as well, which does not rank by cosine."""
    import faiss

    pca = faiss.downcast_VectorTransform(index.chain.at(0))
    return np.asarray(faiss.vector_to_array(pca.A).reshape(pca.d_out, pca.d_in))


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
