"""A first look at many rows: four bits for each of a few directions, which faiss scans at 64 bytes a row.

Place in the flow: `query -> some hundred rows that look near (here) -> their true cosines (segment) -> the best k`.

What ranks rows are far fewer directions than they have dimensions. The rows are projected onto those along which they
vary most, spun so that each is worth the same, and each coordinate is kept as one of 16 values. faiss looks these up in
registers. What it finds is near the truth and not the truth: the caller scores it again, and asks for more where the
error could still hide a better row.

In large segments the codes lie in lists of neighbours, and a query visits only the nearest few. How many lists, and how
many directions, is measured when the codes are made. The queries of that are mixtures of rows: they lie between the
rows, as captions do among pictures; and since captions also point where no picture does, half of those by which the
directions are chosen do so as well.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.index.exact import Floats, Positions, cosines, gather, lifted

LISTED_ROWS = 50_000
"""Rows from which the codes lie in lists; below, looking at all of them takes a quarter of a millisecond at most."""

FOUND = 0.9995
"""Share of what a look at every list finds that the visited lists must hold."""

_WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # faiss reads directions in blocks of 32
_WORTH = 1.5  # times the rows that all directions leave in question; more directions spare fewer rows than they cost
_LOST = 0.01  # of a coordinate's variance, by 16 values: Max, Quantizing for Minimum Distortion, 1960
_MEASURED = 8192  # rows among which that is measured
_CROWDED = 200_000  # rows among which so many lie close that the next larger width is worth it
_SAMPLE = 20_000  # rows from which directions and values are learnt
_LEAST_LISTS = 1024
_PER_LIST = 40  # rows from which a list's centre is learnt
_ROUNDS = 8  # of k-means
_FEW = 100  # rows that are in question, roughly
_PROXIES = 512  # queries of the measurements
_MIXED = 8  # rows that make one of them; of fewer, they are easier to answer than captions
_DEPTHS = (200, 1000)  # how deep they look: a thousandth of the rows, in these bounds
_BLOCK = 16_384  # rows projected at a time
_READ = 1 << 22  # bytes read at a time
_SEED = 0


class Codes:
    """The codes of a segment's rows, by their position."""

    def __init__(self, index: Any) -> None:
        """Wrap a faiss `IndexPreTransform` of a projection and an `IndexIVFPQFastScan`."""
        import faiss

        self.index = index
        self._lists = faiss.downcast_index(index.index)
        projection = faiss.downcast_VectorTransform(index.chain.at(0))
        shape = projection.d_out, projection.d_in
        self._projection: NDArray[np.float32] = faiss.vector_to_array(projection.A).reshape(shape)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @classmethod
    def build(cls, rows: Floats) -> Codes:
        """Learn the codes of these rows, (n, embed_dim), and write them down; the same rows give the same codes."""
        import faiss

        rng = np.random.default_rng(_SEED)
        sample = _some(rows, _SAMPLE, rng)
        projection = _projection(sample, len(rows) > _CROWDED, rng)
        width = projection.shape[1]
        num_lists = _num_lists(len(rows))
        centres = faiss.IndexFlatIP(width)
        lists = faiss.IndexIVFPQFastScan(centres, width, num_lists, width, 4, faiss.METRIC_INNER_PRODUCT)
        lists.cp.niter, lists.cp.max_points_per_centroid, lists.cp.seed = _ROUNDS, _PER_LIST, _SEED
        lists.train(_some(rows, max(_SAMPLE, _PER_LIST * num_lists), rng) @ projection)
        for start in range(0, len(rows), _BLOCK):
            lists.add(lifted(rows[start : start + _BLOCK]) @ projection)
        linear = faiss.LinearTransform(*projection.shape, False)
        faiss.copy_array_to_vector(np.ascontiguousarray(projection.T).ravel(), linear.A)
        linear.is_trained = True
        index = faiss.IndexPreTransform(linear, lists)
        index.own_fields = lists.own_fields = True
        for part in (linear, lists, centres):
            part.this.disown()
        codes = cls(index)
        lists.nprobe = 1 if num_lists == 1 else codes._lists_to_visit(rows, sample, num_lists, rng)
        return codes

    @classmethod
    def read(cls, data: NDArray[np.uint8]) -> Codes:
        """Read what `write` wrote; everything is copied.

        Raises:
            ValueError: when it is something else.
        """
        import faiss

        pieces = _Pieces(data)
        reader = faiss.PyCallbackIOReader(pieces.read, _READ)  # any other would keep pointers into the data
        try:
            return cls(faiss.read_index(reader))
        except (RuntimeError, AttributeError) as error:
            raise ValueError(f"These are no codes of an index: {error}") from error

    def write(self, path: Path) -> None:
        """Write them to a file."""
        import faiss

        faiss.write_index(self.index, str(path))

    def look(
        self, queries: NDArray[np.float32], depth: int, chosen: NDArray[np.uint8] | None = None, count: int = 0
    ) -> tuple[NDArray[np.float32], Positions]:
        """Find rows that look near.

        Args:
            queries: (num_queries, embed_dim).
            depth: how many rows.
            chosen: a bit for each row, the lowest first, set if it competes; all do if left out.
            count: of the rows that compete; the fewer do, the more lists are visited.

        Returns:
            What their cosines are taken for, and positions, both (num_queries, depth), best first; -1 for none.
        """
        import faiss

        if chosen is None:
            asked = faiss.SearchParametersIVF(nprobe=self._lists.nprobe)
        else:
            nprobe = min(self._lists.nlist, self._lists.nprobe * len(self) // max(count, 1))
            asked = faiss.SearchParametersIVF(nprobe=nprobe, sel=faiss.IDSelectorBitmap(chosen))
        found: tuple[NDArray[np.float32], Positions] = self._lists.search(
            cosines(self._projection, queries), depth, params=asked
        )
        return found

    def _lists_to_visit(
        self, rows: Floats, sample: NDArray[np.float32], num_lists: int, rng: np.random.Generator
    ) -> int:
        """Measure how many lists hold `FOUND` of the best ten."""
        queries = _mixtures(sample, rng)
        truth = self._best_ten(rows, queries, num_lists)
        visited = max(1, num_lists // 64)
        while visited < num_lists:
            found = self._best_ten(rows, queries, visited)
            if sum(len(a & b) for a, b in zip(truth, found, strict=True)) >= FOUND * 10 * len(queries):
                return visited
            visited += max(1, visited // 4)
        return num_lists

    def _best_ten(self, rows: Floats, queries: NDArray[np.float32], visited: int) -> Sequence[set[int]]:
        self._lists.nprobe = visited
        _, places = self.look(queries, min(max(len(rows) // 1000, _DEPTHS[0]), _DEPTHS[1]))
        best = []
        for query, near in zip(queries, places, strict=True):
            near = near[near >= 0]
            scores = gather(rows, near) @ query
            best.append(set(near[np.argsort(-scores, kind="stable")[:10]].tolist()))
        return best


class _Pieces:
    """Memory read like a file, one piece after the other."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data, self._place = data, 0

    def read(self, size: int) -> bytes:
        """Copy the next bytes."""
        piece = self._data[self._place : self._place + size].tobytes()
        self._place += len(piece)
        return piece


class StoredCodes:
    """Codes in a file that is mapped into memory; they are read when somebody first searches."""

    def __init__(self, data: NDArray[np.uint8], num_rows: int, name: str) -> None:
        self._data: NDArray[np.uint8] | None = data
        self._num_rows, self._name = num_rows, name
        self._codes: Codes | None = None
        self._lock = threading.Lock()

    @property
    def codes(self) -> Codes:
        """The codes themselves.

        Raises:
            ValueError: when the file is damaged.
        """
        with self._lock:
            if self._codes is None:
                assert self._data is not None
                try:
                    codes = Codes.read(self._data)
                except ValueError as error:
                    raise ValueError(f"The index file {self._name} is damaged. {error}") from error
                if len(codes) != self._num_rows:
                    raise ValueError(f"The index file {self._name} has {len(codes)} rows and not {self._num_rows}.")
                self._codes, self._data = codes, None
            return self._codes


def _num_lists(num_rows: int) -> int:
    """Choose how many lists to make, a power of two near twice the square root of the rows."""
    if num_rows < LISTED_ROWS:
        return 1
    return max(_LEAST_LISTS, 2 ** round(math.log2(2 * math.sqrt(num_rows))))


def _some(rows: Floats, count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw rows without repetition, in their order."""
    drawn = np.sort(rng.choice(len(rows), min(count, len(rows)), replace=False))
    return gather(rows, drawn).astype(np.float32, copy=False)


def sure(num_rows: int) -> float:
    """Say by how many standard deviations of the error any of so many rows may be better than it looks.

    The largest of n normal errors is about sqrt(2 ln n) of them; one more, since errors are not quite normal.
    """
    return 1.0 + math.sqrt(2 * math.log(num_rows))


def _mixtures(rows: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Make queries that are near many rows and very near to none."""
    drawn = rows[rng.integers(len(rows), size=(_MIXED, _PROXIES))]
    return _unit(drawn.mean(0) - rows.mean(0))


def _unit(rows: Floats) -> NDArray[np.float32]:
    lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return np.asarray(rows / lengths, np.float32)


def _projection(sample: NDArray[np.float32], crowded: bool, rng: np.random.Generator) -> NDArray[np.float32]:
    """Find the directions along which rows vary most, as many as it takes, and spin them; (embed_dim, width)."""
    spread = sample - sample.mean(0)
    variances, directions = np.linalg.eigh((spread.T @ spread / len(spread)).astype(np.float64))
    variances, directions = variances[::-1].astype(np.float32), directions[:, ::-1].astype(np.float32)
    queries = _mixtures(sample, rng)
    queries[: _PROXIES // 2] += _unit(rng.standard_normal((_PROXIES // 2, sample.shape[1])))
    width = _width(spread[:_MEASURED] @ directions, variances, _unit(queries) @ directions)
    if crowded:
        width = next((wider for wider in _WIDTHS if width < wider < sample.shape[1]), sample.shape[1])
    spin, _ = np.linalg.qr(rng.standard_normal((width, width)))
    return np.asarray(directions[:, :width] @ spin.astype(np.float32))


def _width(rows: NDArray[np.float32], variances: NDArray[np.float32], queries: NDArray[np.float32]) -> int:
    """Choose the smallest width with which about as few rows stay in question as with all directions.

    In question are those that may be among the best ten, going by what they look like and by the error.

    Args:
        rows: (n, embed_dim), along the directions.
        variances: (embed_dim,) of the rows.
        queries: (num_queries, embed_dim), along the directions.
    """
    embed_dim = rows.shape[1]
    truth = queries @ rows.T
    tenth = np.partition(truth, -10)[:, -10:].min(1) if len(rows) > 10 else truth.min(1)

    def in_question(width: int) -> float:
        looks = queries[:, :width] @ rows[:, :width].T
        errors = truth - looks
        lost = _LOST * np.square(queries[:, :width]) @ variances[:width]
        bars = tenth - errors.mean(1) - sure(_FEW) * np.sqrt(errors.var(1) + lost)
        return float(np.quantile((looks >= bars[:, None]).sum(1), 0.75))

    widths = [width for width in _WIDTHS if width < embed_dim]
    enough = _WORTH * in_question(embed_dim)
    return next((width for width in widths if in_question(width) <= enough), embed_dim)
