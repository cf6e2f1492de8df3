"""The embedded index against a slow reference: its subsets, tags and ties, and the first look of large ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from alignment.index.codes import Codes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignment.index import EXACT_ROWS, EmbeddedIndex, codes, exact, segment

MANY = EXACT_ROWS + 2000


def unit(count: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


def clustered(count: int, dim: int, seed: int = 0) -> Tensor:
    """Rows as encoders make them: in clusters, and along a few directions more than along others."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, dim + 1).float() ** -0.7
    centres = torch.randn(40, dim, generator=generator)
    rows = centres[torch.randint(40, (count,), generator=generator)] + 0.7 * torch.randn(
        count, dim, generator=generator
    )
    return torch.nn.functional.normalize(rows * weights, dim=-1)


def between(rows: Tensor, count: int, seed: int = 0) -> Tensor:
    """Queries as captions are to pictures: near many rows and very near to none."""
    generator = torch.Generator().manual_seed(seed)
    four = rows[torch.randint(len(rows), (count, 4), generator=generator)].float().mean(1)
    return torch.nn.functional.normalize(four + 0.02 * torch.randn(four.shape, generator=generator), dim=-1)


def slow_search(embeds: Tensor, query: Tensor, k: int, candidates: Sequence[int]) -> list[int]:
    """Score one candidate after the other; Python's sort is stable, so ties keep the lower id."""
    scores = dict(zip(candidates, (embeds[candidates].double() @ query.double()).float().tolist(), strict=True))
    return sorted(candidates, key=lambda i: -scores[i])[:k]


def recall(found: Tensor, embeds: Tensor, queries: Tensor, candidates: Sequence[int] | None = None) -> float:
    every = range(len(embeds)) if candidates is None else candidates
    shares = []
    for ids, query in zip(found.tolist(), queries, strict=True):
        best = slow_search(embeds, query, 10, list(every))
        shares.append(len(set(ids) & set(best)) / len(best))
    return float(np.mean(shares))


def stored(folder: Path, embeds: Tensor, tags: Sequence[Collection[str]] | None = None) -> EmbeddedIndex:
    """Save an index and open it again."""
    EmbeddedIndex(embeds, tags=tags).save(folder)
    return EmbeddedIndex.open(folder)


def codes_of(index: EmbeddedIndex) -> Codes:
    (part,) = index._parts
    assert part.segment.codes is not None
    return part.segment.codes.codes


# ---------------------------------------------------------------- exact, in memory


def test_a_hand_written_search() -> None:
    index = EmbeddedIndex(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]))
    scores, ids = index.search(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 3)
    assert ids.tolist() == [[0, 2, 1], [1, 2, 0]]
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.6, 0.0], [1.0, 0.8, 0.0]]))
    assert scores.dtype == torch.float32
    assert ids.dtype == torch.int64


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
    embeds = unit(5, 6, seed)[torch.randint(5, (count,), generator=torch.Generator().manual_seed(seed))]
    queries = unit(num_queries, 6, seed + 1)
    candidates = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    _, ids = EmbeddedIndex(embeds).search(queries, k)
    assert ids.tolist() == [slow_search(embeds, query, k, list(range(count))) for query in queries]
    _, ids = EmbeddedIndex(embeds).search(queries, k, subset=torch.tensor(candidates, dtype=torch.int64))
    assert ids.tolist() == [slow_search(embeds, query, k, candidates) for query in queries]


@pytest.mark.parametrize("k", [1, 20, 52, 53])
def test_blocks_change_nothing(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    embeds, queries = unit(53, 16), unit(11, 16, seed=1)
    expected = EmbeddedIndex(embeds).search(queries, k)
    monkeypatch.setattr(exact, "BLOCK_ROWS", 7)
    monkeypatch.setattr(exact, "BLOCK_SCORES", 160)
    scores, ids = EmbeddedIndex(embeds).search(queries, k)
    assert torch.equal(ids, expected[1])
    assert torch.equal(scores, expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("k", [12, 5003])
def test_duplicates_tie_exactly_and_are_listed_by_id(dtype: torch.dtype, k: int) -> None:
    # 5,003 copies cross a block's edge and leave a remainder, where float32 kernels drift in the last bit.
    embeds = unit(1, 512).to(dtype).expand(5003, 512).contiguous()
    scores, ids = EmbeddedIndex(embeds).search(unit(3, 512, seed=1), k)
    assert ids.tolist() == [list(range(k))] * 3
    assert all(len(row.unique()) == 1 for row in scores)


def test_float32_only_chooses_who_is_scored_in_float64() -> None:
    # Neighbours that float32 cannot tell apart: 300 rows around one, a few times 1e-9 apart in their cosine.
    query = unit(1, 256).double()
    near = query + 1e-7 * torch.randn(300, 256, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    embeds = torch.cat([near.float(), unit(700, 256, seed=2)])
    _, ids = EmbeddedIndex(embeds).search(query, 10)
    assert ids[0].tolist() == slow_search(embeds, query[0], 10, list(range(1000)))


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


def test_more_than_k_may_be_asked_for_and_the_first_k_are_the_same() -> None:
    index, query = EmbeddedIndex(unit(30, 8)), unit(2, 8, seed=1)
    scores, ids = index.search(query, 3, extra=4)
    assert scores.shape == ids.shape == (2, 7)
    assert torch.equal(ids[:, :3], index.search(query, 3)[1])
    assert index.search(query, 3, extra=99)[1].shape == (2, 30)


# ---------------------------------------------------------------- ids and tags of one's own


def test_ids_are_the_callers_and_ties_go_by_them() -> None:
    embeds = unit(1, 4).expand(4, 4)
    index = EmbeddedIndex(embeds, ids=torch.tensor([7, -3, 2**62, 0]))
    assert index.search(unit(1, 4), 4)[1].tolist() == [[-3, 0, 7, 2**62]]
    assert index.ids().tolist() == [-3, 0, 7, 2**62]


def test_rows_are_fetched_by_their_id_in_the_order_asked_for() -> None:
    embeds = unit(3, 4)
    index = EmbeddedIndex(embeds, ids=torch.tensor([30, 10, 20]))
    torch.testing.assert_close(index.embeds(torch.tensor([10, 20, 10])), embeds[[1, 2, 1]])
    with pytest.raises(ValueError, match="no row with the id 11"):
        index.embeds(torch.tensor([10, 11]))


@settings(max_examples=60, deadline=None)
@given(tags=st.lists(st.sets(st.sampled_from(["en", "zh", "a/b", "a", "雪", "\udcff"])), min_size=1, max_size=30))
def test_a_tag_lets_only_its_rows_compete(tags: list[set[str]]) -> None:
    embeds, query = unit(len(tags), 4), unit(1, 4, seed=1)
    index = EmbeddedIndex(embeds, tags=tags)
    for tag in ("en", "a/b", "雪", "\udcff", "nobody's"):
        carriers = [row for row, names in enumerate(tags) if tag in names]
        assert index.ids(tag).tolist() == carriers
        assert index.search(query, 99, tag=tag)[1][0].tolist() == slow_search(embeds, query[0], 99, carriers)
        assert index.tags().get(tag, 0) == len(carriers)
    some = list(range(0, len(tags), 2))
    both = [row for row in some if "en" in tags[row]]
    found = index.search(query, 99, tag="en", subset=torch.tensor(some))[1][0]
    assert found.tolist() == slow_search(embeds, query[0], 99, both)


# ---------------------------------------------------------------- what is refused


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
        (torch.tensor([0.5]), "bool mask"),
        (torch.tensor([[1]]), "one-dimensional"),
    ],
)
def test_subsets_that_do_not_fit_are_refused(subset: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddedIndex(unit(4, 3)).search(unit(1, 3), 2, subset=subset)


@pytest.mark.parametrize("asked", [{"k": -1}, {"k": 1, "extra": -1}])
def test_negative_numbers_are_refused(asked: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="negative"):
        EmbeddedIndex(unit(4, 3)).search(unit(1, 3), **asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.upsert(torch.tensor([1, 1]), unit(2, 3)), "1 is there twice"),
        (lambda index: index.upsert(torch.tensor([1]), unit(2, 3)), "2 embeddings need as many ids"),
        (lambda index: index.upsert(torch.tensor([1, 2]), unit(2, 3), [{"en"}]), "as many ids and tags"),
        (lambda index: index.upsert(torch.tensor([1]), unit(1, 4)), "3 wide"),
        (lambda index: index.upsert(torch.tensor([1]), torch.full((1, 3), torch.nan)), "finite"),
        (lambda index: index.upsert(torch.tensor([1.0]), unit(1, 3)), "integers"),
        (lambda index: index.save(), "told where to"),
        (lambda index: index.compact(), "nothing to compact"),
    ],
)
def test_changes_that_do_not_fit_are_refused_and_change_nothing(
    change: Callable[[EmbeddedIndex], None], message: str
) -> None:
    index = EmbeddedIndex(unit(4, 3))
    with pytest.raises(ValueError, match=message):
        change(index)
    assert torch.equal(index.embeds(index.ids()), unit(4, 3))


# ---------------------------------------------------------------- many rows: the first look


@pytest.mark.parametrize("kind", ["clustered", "isotropic"])
def test_many_rows_are_ranked_as_the_slow_reference_does(kind: str, tmp_path: Path) -> None:
    embeds = (clustered if kind == "clustered" else unit)(MANY, 64).half()
    queries = between(embeds, 150)
    index = stored(tmp_path, embeds)
    scores, ids = index.search(queries, 10)
    assert codes_of(index)._lists.nlist == 1
    assert recall(ids, embeds, queries) >= 0.999
    for query, row in zip(queries, ids.tolist(), strict=True):
        assert row == slow_search(embeds, query, 10, sorted(row))
    expected = torch.stack([embeds[row].double() @ query.double() for row, query in zip(ids, queries, strict=True)])
    assert torch.equal(scores, expected.float())


def test_one_query_is_answered_as_many_are(tmp_path: Path) -> None:
    embeds = clustered(MANY, 64).half()
    queries, index = between(embeds, 40), stored(tmp_path, embeds)
    scores, ids = index.search(queries, 10)
    for query, score, found in zip(queries, scores, ids, strict=True):
        alone = index.search(query[None], 10)
        assert torch.equal(alone[1][0], found)
        torch.testing.assert_close(alone[0][0], score, atol=1e-7, rtol=0)


def test_who_looks_too_little_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeds = clustered(MANY, 64).half()
    queries, index = between(embeds, 60), stored(tmp_path, embeds)
    looks = []
    look = Codes.look
    monkeypatch.setattr(Codes, "look", lambda *asked: looks.append(asked[2]) or look(*asked))
    monkeypatch.setattr(segment, "DEPTH", 12)
    monkeypatch.setattr(segment, "SCORED", 12)
    _, ids = index.search(queries, 10, extra=0)
    assert recall(ids, embeds, queries) >= 0.998
    monkeypatch.setattr(segment, "sure", lambda count: -99.0)
    assert recall(index.search(queries, 10)[1], embeds, queries) < 0.98  # so it was worth it
    assert len(set(looks)) > 1


@pytest.mark.parametrize("copies", [200, MANY])
def test_ties_of_many_rows_go_by_id(copies: int, tmp_path: Path) -> None:
    # More equal rows than are looked at first: the lowest ids are among those that were not.
    embeds = torch.cat([clustered(MANY - copies, 64), unit(1, 64, seed=3).expand(copies, 64)]).half()
    index = stored(tmp_path, embeds)
    scores, ids = index.search(unit(1, 64, seed=3), 12)
    assert ids[0].tolist() == list(range(MANY - copies, MANY - copies + 12))
    assert len(scores.unique()) == 1


def test_lists_find_what_a_look_at_everything_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "LISTED_ROWS", 10_000)
    monkeypatch.setattr(codes, "_LEAST_LISTS", 128)
    embeds = clustered(12_000, 48).half()
    index = stored(tmp_path, embeds)
    lists = codes_of(index)._lists
    assert 1 < lists.nprobe < lists.nlist
    queries = between(embeds, 300)
    assert recall(index.search(queries, 10)[1], embeds, queries) >= 0.998
    lists.nprobe = 1
    assert recall(index.search(queries, 10)[1], embeds, queries) < 0.9  # so the number of lists does matter


@pytest.mark.parametrize("every", [2, 3, 40, 1000])
@pytest.mark.parametrize("listed", [False, True])
def test_tags_of_many_rows_are_ranked_as_the_slow_reference_does(
    every: int, listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if listed:
        monkeypatch.setattr(codes, "LISTED_ROWS", MANY)
        monkeypatch.setattr(codes, "_LEAST_LISTS", 64)
    embeds = clustered(MANY, 48).half()
    index = stored(tmp_path, embeds, [("mine",) if row % every == 1 else () for row in range(MANY)])
    index.delete(torch.arange(0, MANY, 7))
    mine = [row for row in range(MANY) if row % every == 1 and row % 7]
    queries = between(embeds, 30)
    for choice in ({"tag": "mine"}, {"subset": torch.tensor(mine)}):
        scores, ids = index.search(queries, 10, **choice)
        assert set(ids.flatten().tolist()) <= set(mine)
        assert recall(ids, embeds, queries, mine) >= (0.998 if every < 10 else 1)
        assert (scores[:, 1:] <= scores[:, :-1]).all()


def test_extra_rows_of_many_are_true_cosines_in_order_without_repetition(tmp_path: Path) -> None:
    embeds = clustered(MANY, 64).half()
    queries, index = between(embeds, 20), stored(tmp_path, embeds)
    scores, ids = index.search(queries, 10, extra=90)
    assert torch.equal(ids[:, :10], index.search(queries, 10)[1])
    assert all(len(row.unique()) == 100 for row in ids)
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    expected = torch.stack([embeds[row].float() @ query for row, query in zip(ids, queries, strict=True)])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    pairs = zip(ids.tolist(), queries, strict=True)
    rest = [len(set(row) & set(slow_search(embeds, query, 100, list(range(MANY))))) for row, query in pairs]
    assert np.mean(rest) > 80


def test_no_row_is_looked_at_for_a_k_of_nothing(tmp_path: Path) -> None:
    index = stored(tmp_path, clustered(MANY, 32))
    assert index.search(unit(2, 32), 0)[1].shape == (2, 0)
    assert index.search(unit(2, 32), 0, extra=5)[1].shape == (2, 5)


def test_many_threads_search_at_once(tmp_path: Path) -> None:
    embeds = clustered(MANY, 64).half()
    queries, index = between(embeds, 64), stored(tmp_path, embeds)
    expected = EmbeddedIndex.open(tmp_path).search(queries, 10)[1]
    wrong: list[int] = []

    def ask(first: int) -> None:
        for row in range(first, 64, 8):
            if not torch.equal(index.search(queries[row : row + 1], 10)[1][0], expected[row]):
                wrong.append(row)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_same_rows_get_the_same_codes() -> None:
    rows = clustered(3000, 64).half().numpy()
    query = between(torch.from_numpy(rows), 5).numpy()
    first, second = Codes.build(rows).look(query, 50), Codes.build(rows).look(query, 50)
    assert np.array_equal(first[1], second[1])
    assert np.array_equal(first[0], second[0])
