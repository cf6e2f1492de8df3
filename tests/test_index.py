"""The local index against a slow reference: tags, ties, and the candidates of large ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index_contract import search_all, unit
from torch import Tensor

from alignment.index import EXACT_ROWS, FileIndex, LocalIndex, local

MANY = EXACT_ROWS + 2000


def clustered(count: int, dim: int, seed: int = 0) -> Tensor:
    """Rows as encoders make them: in clusters, and along a few directions more than along others."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, dim + 1).float() ** -0.7
    centres = torch.randn(40, dim, generator=generator)
    noise = torch.randn(count, dim, generator=generator)
    rows = centres[torch.randint(40, (count,), generator=generator)] + 0.7 * noise
    return torch.nn.functional.normalize(rows * weights, dim=-1)


def between(rows: Tensor, count: int, seed: int = 0) -> Tensor:
    """Queries as captions are to pictures: near many rows and very near to none."""
    generator = torch.Generator().manual_seed(seed)
    four = rows[torch.randint(len(rows), (count, 4), generator=generator)].float().mean(1)
    return torch.nn.functional.normalize(four + 0.02 * torch.randn(four.shape, generator=generator), dim=-1)


def slow_search(embeds: Tensor, query: Tensor, k: int, candidates: Sequence[int] | None = None) -> list[int]:
    """Score every candidate; the sort is stable, so ties keep the lower position."""
    scores = (embeds.double() @ query.double()).float().numpy()
    positions = np.arange(len(embeds)) if candidates is None else np.array(candidates, dtype=np.int64)
    found: list[int] = positions[np.argsort(-scores[positions], kind="stable")[:k]].tolist()
    return found


def recall(found: Tensor, embeds: Tensor, queries: Tensor, candidates: Sequence[int] | None = None) -> float:
    best = [slow_search(embeds, query, found.shape[1], candidates) for query in queries]
    return float(
        np.mean([len(set(ids) & set(true)) / len(true) for ids, true in zip(found.tolist(), best, strict=True)])
    )


def stored(folder: Path, embeds: Tensor, tagged: Callable[[str], Tensor] | None = None) -> FileIndex:
    """Write an index and open it."""
    FileIndex.write(folder / "index.faiss", [embeds], "stamp")
    return FileIndex(folder / "index.faiss", "stamp", tagged)


@pytest.fixture(scope="module")
def many() -> Tensor:
    return clustered(MANY, 64).half()


@pytest.fixture(scope="module")
def large(many: Tensor, tmp_path_factory: pytest.TempPathFactory) -> FileIndex:
    """An index with as many rows in a file; the tag "7" is carried by every seventh row from the first on."""
    return stored(tmp_path_factory.mktemp("large"), many, lambda tag: torch.arange(0, MANY, int(tag)))


# ---------------------------------------------------------------- exact, in memory


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60),
    num_queries=st.integers(1, 7),
    k=st.integers(1, 70),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_search_equals_the_slow_reference(count: int, num_queries: int, k: int, seed: int, data: st.DataObject) -> None:
    # Rows are drawn from a few distinct ones, so most examples are full of ties.
    generator = torch.Generator().manual_seed(seed)
    embeds = unit(5, 6, seed)[torch.randint(5, (count,), generator=generator)]
    queries = unit(num_queries, 6, seed + 1)
    candidates = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    index = LocalIndex(embeds, lambda tag: torch.tensor(candidates, dtype=torch.int64))
    assert search_all(index, queries, k)[1].tolist() == [slow_search(embeds, query, k) for query in queries]
    found = search_all(index, queries, k, tag="some")[1]
    assert found.tolist() == [slow_search(embeds, query, k, candidates) for query in queries]


@pytest.mark.parametrize("k", [1, 20, 52, 53])
def test_blocks_change_nothing(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = LocalIndex(unit(53)), unit(11, seed=1)
    expected = search_all(index, queries, k)
    monkeypatch.setattr(local, "_BLOCK_ROWS", 7)
    assert all(torch.equal(*pair) for pair in zip(search_all(index, queries, k), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("k", [12, 5003])
def test_duplicates_tie_exactly_and_are_listed_by_id(dtype: torch.dtype, k: int) -> None:
    # 5,003 copies cross a block's edge and leave a remainder, where float32 kernels drift in the last bit.
    embeds = unit(1, 512).to(dtype).expand(5003, 512).contiguous()
    scores, ids = search_all(LocalIndex(embeds), unit(3, 512, seed=1), k)
    assert ids.tolist() == [list(range(k))] * 3
    assert all(len(row.unique()) == 1 for row in scores)


def test_float32_selects_and_float64_ranks() -> None:
    # Neighbours that float32 cannot tell apart: 300 rows around one, a few times 1e-9 apart in their cosine.
    query = unit(1, 256)[0].double()
    near = query + 1e-7 * torch.randn(300, 256, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    embeds = torch.cat([near.float(), unit(700, 256, seed=2)])
    _, ids = LocalIndex(embeds).search(query, 10)
    assert ids.tolist() == slow_search(embeds, query, 10)


def test_half_precision_is_kept_in_memory_and_widened_to_score() -> None:
    half, query = unit(20, 64).half(), unit(1, 64, seed=1)[0]
    scores, _ = LocalIndex(half).search(query, 20)
    assert torch.equal(scores, (half.double() @ query.double()).float().sort(descending=True).values)


def test_an_empty_index_finds_nothing() -> None:
    index = LocalIndex(torch.zeros(0, 3))
    assert index.search(unit(1, 3)[0], 5)[1].shape == index.search(unit(1, 3)[0], 5, tag="en")[1].shape == (0,)
    assert (len(index), index.embeds(torch.arange(0)).shape) == (0, (0, 3))


# ---------------------------------------------------------------- many rows, in a file


@pytest.mark.parametrize("kind", [clustered, unit])
def test_many_rows_are_ranked_as_the_slow_reference_does(kind: Callable[..., Tensor], tmp_path: Path) -> None:
    embeds = kind(MANY, 64).half()
    queries = between(embeds, 400)
    scores, ids = search_all(stored(tmp_path, embeds), queries, 10)
    assert recall(ids, embeds, queries) >= 0.997
    for query, row in zip(queries, ids.tolist(), strict=True):
        assert row == slow_search(embeds, query, 10, sorted(row))
    expected = torch.stack([embeds[row].double() @ query.double() for row, query in zip(ids, queries, strict=True)])
    assert torch.equal(scores, expected.float())


def test_the_recall_that_was_asked_for_decides_how_much_is_searched(
    tmp_path: Path, many: Tensor, large: FileIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "TARGET_RECALL", 0.5)
    careless, queries = stored(tmp_path, many), between(many, 400)
    assert recall(search_all(large, queries, 10)[1], many, queries) >= 0.999
    assert recall(search_all(careless, queries, 10)[1], many, queries) < 0.97


@pytest.mark.parametrize("copies", [400, MANY])
def test_ties_of_many_rows_go_by_id(copies: int, tmp_path: Path) -> None:
    # More equal rows than candidates: the lowest ids are among those that were not named at first.
    embeds = torch.cat([clustered(MANY - copies, 64), unit(1, 64, seed=3).expand(copies, 64)]).half()
    scores, ids = stored(tmp_path, embeds).search(unit(1, 64, seed=3)[0], 12)
    assert ids.tolist() == list(range(MANY - copies, MANY - copies + 12))
    assert len(scores.unique()) == 1


@pytest.mark.parametrize("k", [100, 1000, MANY])
def test_many_results_are_found(k: int, many: Tensor, large: FileIndex) -> None:
    queries = between(many, 50)
    assert recall(search_all(large, queries, k)[1], many, queries) >= 0.998


@pytest.mark.parametrize("every", [1, 2, 3, 40, 1000])
def test_tags_of_many_rows_are_ranked_as_the_slow_reference_does(every: int, tmp_path: Path) -> None:
    embeds = clustered(3 * MANY, 32).half()  # so that both many and few rows carry the tag
    carriers, queries = list(range(0, 3 * MANY, every)), between(embeds, 200)
    index = stored(tmp_path, embeds, lambda tag: torch.arange(0, 3 * MANY, int(tag)))
    scores, ids = search_all(index, queries, 10, tag=str(every))
    assert set(ids.flatten().tolist()) <= set(carriers)
    assert recall(ids, embeds, queries, carriers) >= (0.998 if len(carriers) > EXACT_ROWS else 1)
    assert (scores[:, 1:] <= scores[:, :-1]).all()


def test_extra_rows_of_many_are_true_cosines_in_order_without_repetition(many: Tensor, large: FileIndex) -> None:
    queries = between(many, 20)
    scores, ids = search_all(large, queries, 10, extra=90)
    assert torch.equal(ids[:, :10], search_all(large, queries, 10)[1])
    assert all(len(row.unique()) == 100 for row in ids)
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    expected = torch.stack([many[row].float() @ query for row, query in zip(ids, queries, strict=True)])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    assert recall(ids, many, queries) > 0.9


def test_equal_rows_beyond_the_first_k_go_by_id(tmp_path: Path) -> None:
    embeds = clustered(MANY // 2, 64).repeat(2, 1).half()
    scores, ids = search_all(stored(tmp_path, embeds), between(embeds, 20), 10, extra=90)
    equal = scores[:, 1:] == scores[:, :-1]
    assert equal.sum() > 20 * 40
    assert (ids[:, 1:] > ids[:, :-1])[equal].all()


def test_no_results_asked_for_are_none(large: FileIndex) -> None:
    assert large.search(unit(1, 64)[0], 0)[1].shape == (0,)
    assert large.search(unit(1, 64)[0], 0, extra=5)[1].shape == (5,)
