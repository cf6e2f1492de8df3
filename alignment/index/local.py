"""The index of one process: in memory and exact, or of many rows in a file, where faiss names candidates for a query.

Equal embeddings get equal scores, and equal scores are ordered by position. float32 sums differ in the last bit, by
where a row stands, so scores are summed in float64 and rounded to float32. As that takes many times as long, float32
goes first, and only rows that could reach the best k within its error are scored again.

Layout of the file: a page with a checksum and JSON, the rows in order as float16, a faiss index of their projections
(PCA, IVF, SQ8). All of it is mapped, which does not count as memory of the process. It is derived from a gallery's
database and may be deleted at any time. A query visits the lists whose centres are nearest; faiss picks candidates by
their codes and scores these by their rows. How many of both is measured at writing, with the exact best ten of queries
like those to come. Among hundreds of nearly equal rows, an equal of the last one may be missed.
"""

import json
import logging
import math
import zlib
from bisect import bisect_left, bisect_right
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

logger = logging.getLogger(__name__)

EXACT_ROWS = 4096
"""Rows up to which all are scored, in about a millisecond: of a gallery, which needs no file, or those with a tag."""

_CACHED_TAGS = 32  # a bit for each row; and parameters of searches
_PER_RESULT, _DEEPER = 8, 8  # candidates for each of k, at least; times as many where some may be missing
_MIN_ROWS_PER_CANDIDATE = 4  # with more candidates than that, all rows are scored
_EQUAL = 1e-6  # scores of equal rows by their codes differ by less
_BLOCK_ROWS = 2048  # scored at a time: 4 MB as float32 at 512 dimensions, which stays in the cache
_FEW = 64  # rows up to which numpy multiplies faster than torch
_ALL_IN_FLOAT64 = 4  # times k: so few rows are scored without a float32 pass

TARGET_RECALL = 0.9985
"""Share of the exact best ten of these queries that the candidates must hold, and of those the visited lists: .997."""

_FORMAT = 3  # a file of another format is written anew
_PAGE, _BLOCK = 4096, 16_384  # bytes of the first page, and rows at a time
_WIDTH = 96  # of the projections
_MIN_SAMPLE, _PER_LIST = 20_000, 20  # rows from which projections and codes are learnt, at least and for each list
_QUERIES, _MIN_QUERIES = 512, 256  # of the measurement; with fewer typical ones, mixtures of rows stand for them
_MIXED = 8  # rows in each: of fewer, they are easier to answer than captions; these take up to three times as long
_DEPTHS = 64, 2048  # candidates, at least and at most


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
        return torch.from_numpy(np.take(self._rows, ids.numpy(), axis=0)).float()  # numpy converts halves slowly

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
        rows = np.memmap(path, np.float16, "c", _PAGE, (header["count"], header["embed_dim"]))  # torch warns of "r"
        self._data = np.memmap(path, np.uint8, "r", _PAGE + rows.nbytes)
        if zlib.crc32(self._data[: header["head"]].data) != header["head_crc"]:
            raise ValueError(damaged)
        super().__init__(torch.from_numpy(rows), tagged)
        self._depth, self._nprobe = int(header["depth"]), int(header["nprobe"])
        self._ids_crc, self._damaged = header["ids_crc"], damaged
        self._parameters = lru_cache(_CACHED_TAGS)(self._find_parameters)

    @staticmethod
    def write(path: Path, batches: Iterable[Tensor], stamp: str, queries: Tensor | None = None) -> None:
        """Write unit-norm embeddings, batches of (n, embed_dim), and replace the old file at the end.

        To open it takes the `stamp`. Typical `queries`, (num_queries, embed_dim), tell how much a search has to visit.
        OSError when the file cannot be written, ValueError when an embedding is not finite.
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
            index, nprobe, depth = _train(np.memmap(temp, np.float16, "c", _PAGE, (count, embed_dim)), queries)
            data = faiss.serialize_index(index)
            file.write(data)
            head = len(data) - count * (faiss.extract_index_ivf(index).code_size + 8)  # codes and positions come last
            header = {"format": _FORMAT, "stamp": stamp, "count": count, "embed_dim": embed_dim, "size": file.tell()}
            header |= {"nprobe": nprobe, "depth": depth, "ids_crc": _crc_of_ids(index)}
            header |= {"head": head, "head_crc": zlib.crc32(data[:head])}
            page = json.dumps(header).encode().ljust(_PAGE - 8)
            file.seek(0)
            file.write(b"%08x" % zlib.crc32(page) + page)

    @cached_property
    def _indexes(self) -> tuple[Any, Any, int] | None:
        """The faiss index of the codes, one that scores what it finds by the rows, and the lists; None if damaged."""
        import faiss  # late: it takes longer than to open the file

        codes = faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(self._data), len(self._data)))
        if _crc_of_ids(codes) != self._ids_crc:  # faiss would read beyond the rows
            logger.warning("%s Until then every search reads all rows.", self._damaged)
            return None
        rows = faiss.IndexScalarQuantizer(self.embed_dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        data = self._rows.view(np.uint8).ravel()
        rows.codes = faiss.MaybeOwnedVectorUInt8.create_view(faiss.swig_ptr(data), data.size, rows.codes.owner)
        rows.ntotal = len(self)
        return codes, faiss.IndexRefine(codes, rows), faiss.extract_index_ivf(codes).nlist

    def _rank(self, query: NDArray[np.float64], k: int, wanted: int, tag: str | None) -> Ranking:
        count = len(self) if tag is None else self._carriers(tag)[0]
        depth, vector = max(self._depth, _PER_RESULT * k, wanted), query.astype(np.float32)[None]
        while count > EXACT_ROWS and depth * _MIN_ROWS_PER_CANDIDATE <= count and self._indexes:
            codes, rows, lists = self._indexes
            nprobe = min(-(-max(self._nprobe * len(self), 2 * depth * lists) // count), lists)  # more if few compete
            by_codes, by_rows = self._parameters(nprobe, tag)
            rough, near = (found[0] for found in rows.search(vector, depth, params=by_rows))
            if near[max(wanted - 1, k)] >= 0 and not math.isnan(rough.min()):  # -1: fewer were found; NaN: damage
                close = bisect_right(rough, 2 * _float32_error(query) - rough[k], key=lambda score: -score)
                rough[:close] = _score(self._rows, query, near[:close])
                order = np.lexsort((near, -rough))  # faiss orders equals by itself
                scores, best = rough[order], near[order]
                are_all = not k or scores[k] < scores[k - 1]
                if not are_all:  # equals of the last of the k have its code, so all are there if the last code is worse
                    looks, named = (found[0] for found in codes.search(vector, depth, params=by_codes))
                    are_all = looks[named == best[k - 1]] > looks[-1] + _EQUAL
                if are_all:
                    return scores[:wanted], best[:wanted]
            depth *= _DEEPER
        return super()._rank(query, k, wanted, tag)

    def _find_parameters(self, nprobe: int, tag: str | None) -> tuple[Any, Any]:  # to search by codes, and by rows
        import faiss

        selector = None if tag is None else faiss.IDSelectorBitmap(self._carriers(tag)[1])
        lists = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
        by_codes = faiss.SearchParametersPreTransform(index_params=lists)
        return by_codes, faiss.IndexRefineSearchParameters(k_factor=1, base_index_params=by_codes)


def _crc_of_ids(index: Any) -> int:
    """Compute the checksum of the positions that the lists of a faiss index name."""
    import faiss

    lists = faiss.extract_index_ivf(index).invlists
    full = [number for number in range(lists.nlist) if lists.list_size(number)]
    return zlib.crc32(b"".join(faiss.rev_swig_ptr(lists.get_ids(number), lists.list_size(number)) for number in full))


def rank(rows: Floats, query: NDArray[np.float64], k: int, chosen: NDArray[np.int64] | None = None) -> Ranking:
    """Find the k best of unit-norm rows, (n, embed_dim), or of those at chosen positions; ties by lower position."""
    positions = np.arange(len(rows)) if chosen is None else chosen
    if len(positions) > _ALL_IN_FLOAT64 * k > 0:
        rough = _score(rows, query.astype(np.float32), chosen)
        chosen = positions = positions[rough >= np.partition(rough, -k)[-k] - 2 * _float32_error(query)]
    scores = _score(rows, query, chosen).astype(np.float32)
    order = np.lexsort((positions, -scores))[:k]
    return scores[order], positions[order]


def _score(rows: Floats, query: Floats, chosen: NDArray[np.int64] | None) -> Floats:
    """Compute cosines, (count,), in the precision of the query: of many rows by torch, whose threads numpy lacks."""
    count = len(rows) if chosen is None else len(chosen)
    if count <= _FEW:  # threads would have to wake up
        return (rows if chosen is None else np.take(rows, chosen, axis=0)).astype(query.dtype) @ query
    scores, factor = np.empty(count, query.dtype), torch.from_numpy(query)
    for start in range(0, count, _BLOCK_ROWS):
        here = slice(start, start + _BLOCK_ROWS)
        block = rows[here] if chosen is None else np.take(rows, chosen[here], axis=0)
        scores[here] = torch.mv(torch.from_numpy(block).to(factor.dtype), factor).numpy()
    return scores


def _float32_error(query: NDArray[np.float64]) -> float:
    """Bound the error of a cosine summed in any order: Higham, Accuracy and Stability of Numerical Algorithms, 3.1."""
    return (len(query) + 8) * 2.0**-24 * max(math.sqrt(query @ query), 1.0)


def _train(rows: Floats, typical: Tensor | None) -> tuple[Any, int, int]:  # the index, lists to visit, candidates
    import faiss

    rng, num_lists = np.random.default_rng(0), 2 ** round(0.6 * math.log2(len(rows)))
    drawn = rng.permutation(len(rows))[: max(_MIN_SAMPLE, _PER_LIST * num_lists)]
    sample = rows[np.sort(drawn)].astype(np.float32)
    spec = f"PCA{min(_WIDTH, *rows.shape)},IVF{num_lists},SQ8"
    index = faiss.index_factory(rows.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
    clustering = faiss.extract_index_ivf(index).cp
    clustering.niter, clustering.min_points_per_centroid, clustering.max_points_per_centroid = 6, 1, _PER_LIST
    index.train(sample)
    for block in _blocks(rows):
        index.add(block)
    faiss.downcast_VectorTransform(index.chain.at(0)).have_bias = False  # a centred query does not rank by cosine
    if typical is not None and len(typical) >= _MIN_QUERIES:
        return index, *_tune(index, rows, typical[:_QUERIES].float().numpy())
    queries = sample[rng.integers(len(sample), size=(_MIXED, _QUERIES))].mean(0) - sample.mean(0)
    faiss.normalize_L2(queries)
    queries += rng.standard_normal(queries.shape, np.float32) / math.sqrt(len(queries[0]))
    return index, *_tune(index, rows, queries)


def _blocks(rows: Floats) -> Iterable[NDArray[np.float32]]:
    return (rows[start : start + _BLOCK].astype(np.float32) for start in range(0, len(rows), _BLOCK))


def _tune(index: Any, rows: Floats, queries: NDArray[np.float32]) -> tuple[int, int]:
    """Measure how many lists to visit and how many candidates to name for the best ten of these queries."""
    import faiss
    from faiss.contrib.exhaustive_search import knn_ground_truth

    truth = knn_ground_truth(queries, _blocks(rows), min(10, len(rows)), faiss.METRIC_INNER_PRODUCT)[1]
    lists = faiss.extract_index_ivf(index).nlist

    def recalls(nprobe: int, depth: int) -> NDArray[np.float64]:  # at 1, 2, ..., depth candidates
        asked = faiss.SearchParametersPreTransform(index_params=faiss.SearchParametersIVF(nprobe=nprobe))
        near = index.search(queries, depth, params=asked)[1]
        return np.asarray((near[:, :, None] == truth[:, None, :]).sum((0, 2)).cumsum() / truth.size)

    least, most = (min(depth, len(rows)) for depth in _DEPTHS)
    held = recalls(lists, most)
    depth = min(max(least, bisect_left(held, TARGET_RECALL) + 1), most)
    recall = TARGET_RECALL * held[depth - 1]
    return bisect_left(range(1, lists), recall, key=lambda nprobe: recalls(nprobe, depth)[-1]) + 1, depth
