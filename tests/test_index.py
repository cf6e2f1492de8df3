"""The embedded index against a slow reference, its subsets and its ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignment.index import EmbeddedIndex, exact


def unit(count: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


def slow_search(embeds: Tensor, query: Tensor, k: int, candidates: list[int]) -> list[int]:
    """Score one candidate after the other; Python's sort is stable, so ties keep the lower id."""
    scores = {i: float(torch.dot(embeds[i].double(), query.double()).float()) for i in candidates}
    return sorted(candidates, key=lambda i: -scores[i])[:k]


def test_a_hand_written_search() -> None:
    index = EmbeddedIndex(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]))
    scores, ids = index.search(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 3)
    assert ids.tolist() == [[0, 2, 1], [1, 2, 0]]
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.6, 0.0], [1.0, 0.8, 0.0]]))
    assert scores.dtype == torch.float32
    assert ids.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    num_queries=st.integers(1, 7),
    k=st.integers(1, 50),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_search_equals_the_slow_reference(count: int, num_queries: int, k: int, seed: int, data: st.DataObject) -> None:
    # Rows are drawn from a few distinct ones, so most examples are full of ties.
    embeds = unit(5, 6, seed)[torch.randint(5, (count,), generator=torch.Generator().manual_seed(seed))]
    queries = unit(num_queries, 6, seed + 1)
    candidates = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    _, ids = EmbeddedIndex(embeds).search(queries, k)
    assert ids.tolist() == [slow_search(embeds, query, k, list(range(count))) for query in queries]
    _, ids = EmbeddedIndex(embeds).search(queries, k, subset=torch.tensor(candidates, dtype=torch.int64))
    assert ids.tolist() == [slow_search(embeds, query, k, candidates) for query in queries]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    embeds, queries = unit(53, 16), unit(11, 16, seed=1)
    expected = EmbeddedIndex(embeds).search(queries, 20)
    monkeypatch.setattr(exact, "BLOCK_ROWS", 7)
    monkeypatch.setattr(exact, "BLOCK_SCORES", 159)
    scores, ids = EmbeddedIndex(embeds).search(queries, 20)
    assert torch.equal(ids, expected[1])
    assert torch.equal(scores, expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_duplicates_tie_exactly_and_are_listed_by_id(dtype: torch.dtype) -> None:
    # 5,003 copies cross a block's edge and leave a remainder, where float32 kernels drift in the last bit.
    embeds = unit(1, 512).to(dtype).expand(5003, 512).contiguous()
    scores, ids = EmbeddedIndex(embeds).search(unit(3, 512, seed=1), 5003)
    assert ids.tolist() == [list(range(5003))] * 3
    assert all(len(row.unique()) == 1 for row in scores)


def test_a_mask_and_ids_select_the_same_candidates() -> None:
    index, query = EmbeddedIndex(unit(30, 8)), unit(1, 8, seed=1)
    mask = torch.zeros(30, dtype=torch.bool)
    mask[[3, 9, 20, 28]] = True
    by_mask = index.search(query, 10, subset=mask)
    by_ids = index.search(query, 10, subset=torch.tensor([28, 3, 20, 9, 3]))
    assert sorted(by_mask[1][0].tolist()) == [3, 9, 20, 28]
    assert torch.equal(by_mask[1], by_ids[1])
    assert torch.equal(by_mask[0], by_ids[0])


def test_scores_of_a_subset_are_those_of_the_whole() -> None:
    index, query = EmbeddedIndex(unit(30, 8)), unit(1, 8, seed=1)
    scores, ids = index.search(query, 30)
    whole = dict(zip(ids[0].tolist(), scores[0].tolist(), strict=True))
    scores, ids = index.search(query, 5, subset=torch.tensor([4, 7, 8]))
    assert {i: whole[i] for i in ids[0].tolist()} == dict(zip(ids[0].tolist(), scores[0].tolist(), strict=True))


def test_half_precision_is_kept_in_memory_and_lifted_to_score() -> None:
    half, query = unit(20, 64).half(), unit(1, 64, seed=1)
    scores, _ = EmbeddedIndex(half).search(query, 20)
    expected = (query.double() @ half.double().T).float().sort(descending=True).values
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("subset", [None, torch.zeros(4, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)])
def test_nothing_to_find_gives_empty_results(subset: Tensor | None) -> None:
    index = EmbeddedIndex(unit(4, 3) if subset is not None else torch.zeros(0, 3))
    scores, ids = index.search(unit(2, 3), 5, subset=subset)
    assert scores.shape == ids.shape == (2, 0)


def test_no_queries_give_no_rows() -> None:
    scores, ids = EmbeddedIndex(unit(4, 3)).search(torch.zeros(0, 3), 2)
    assert scores.shape == ids.shape == (0, 2)


def test_length_is_the_number_of_candidates() -> None:
    assert len(EmbeddedIndex(unit(4, 3))) == 4


@pytest.mark.parametrize("embeds", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 2, 3)])
def test_embeddings_that_are_none_are_refused(embeds: Tensor) -> None:
    with pytest.raises(ValueError, match="num_candidates, embed_dim"):
        EmbeddedIndex(embeds)


@pytest.mark.parametrize("queries", [torch.zeros(3), torch.zeros(1, 4)])
def test_queries_of_another_shape_are_refused(queries: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(num_queries, 3\)"):
        EmbeddedIndex(unit(4, 3)).search(queries, 1)


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        (torch.ones(5, dtype=torch.bool), "for 5 candidates, the index has 4"),
        (torch.tensor([0, 4]), "no row with the id 4"),
        (torch.tensor([-1]), "no row with the id -1"),
        (torch.tensor([0.5]), "ids or a bool mask"),
        (torch.tensor([[1]]), "one-dimensional"),
    ],
)
def test_subsets_that_do_not_fit_are_refused(subset: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddedIndex(unit(4, 3)).search(unit(1, 3), 2, subset=subset)


def test_a_negative_k_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        EmbeddedIndex(unit(4, 3)).search(unit(1, 3), -1)
