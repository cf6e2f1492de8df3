"""What every index promises, whatever its back end: run on the embedded one, and on a Milvus server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

import pytest
import torch
from torch import Tensor

from alignment.index import Index

DIM = 16
ODD_TAGS = (
    "en",
    "zh",
    "",
    "a/b",
    "雪 山",
    "😀",
    'say "hi"',
    "it's",
    "back\\slash",
    "\\",
    "new\nline",
    "%",
    "\udcff",
    "{x}",
)

NewIndex = Callable[[int], Index]
Reopen = Callable[[Index], Index]


def unit(count: int, dim: int = DIM, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


def check_ranked(found: list[int], embeds: Tensor, query: Tensor, k: int, ids: Sequence[int]) -> None:
    """Compare with a sort of all cosines; rows that float32 can hardly tell apart may change places."""
    cosines = dict(zip(ids, (embeds.double() @ query.double()).tolist(), strict=True))
    assert len(set(found)) == len(found)
    assert [cosines[id] for id in found] == pytest.approx(sorted(cosines.values(), reverse=True)[:k], abs=1e-6)


def filled(
    new_index: NewIndex, count: int, tags: Sequence[Collection[str]] | None = None, first: int = 0
) -> tuple[Index, Tensor, list[int]]:
    """Make an index of some rows; also their embeddings and ids."""
    index, embeds = new_index(DIM), unit(count)
    ids = list(range(first, first + count))
    index.upsert(torch.tensor(ids), embeds, tags)
    return index, embeds, ids


class IndexContract:
    """To be inherited by a class that has the fixtures `new_index` and `reopen`."""

    def test_a_hand_written_search(self, new_index: NewIndex) -> None:
        index = new_index(2)
        assert (len(index), index.embed_dim) == (0, 2)
        index.upsert(torch.arange(4), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]))
        scores, ids = index.search(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 3)
        assert ids.tolist() == [[0, 2, 1], [1, 2, 0]]
        torch.testing.assert_close(scores, torch.tensor([[1.0, 0.6, 0.0], [1.0, 0.8, 0.0]]), atol=1e-6, rtol=0)
        assert (scores.dtype, ids.dtype) == (torch.float32, torch.int64)

    def test_an_empty_index_finds_nothing(self, new_index: NewIndex) -> None:
        index = new_index(DIM)
        scores, ids = index.search(unit(2), 5)
        assert scores.shape == ids.shape == (2, 0)
        assert index.ids().tolist() == []
        assert index.ids().dtype == torch.int64
        assert index.tags() == {}
        assert index.embeds(torch.empty(0, dtype=torch.int64)).shape == (0, DIM)
        assert index.delete(torch.tensor([1])) == 0

    def test_the_nearest_rows_are_found_best_first(self, new_index: NewIndex) -> None:
        index, embeds, ids = filled(new_index, 300, first=1000)
        queries = unit(20, seed=1)
        scores, found = index.search(queries, 10)
        for query, row, says in zip(queries, found.tolist(), scores, strict=True):
            check_ranked(row, embeds, query, 10, ids)
            expected = torch.tensor([float(embeds[id - 1000] @ query) for id in row])
            torch.testing.assert_close(says, expected, atol=2e-6, rtol=0)
        assert index.search(queries, 0)[1].shape == (20, 0)
        assert index.search(queries[:0], 3)[1].shape == (0, 3)

    def test_more_results_than_rows_are_all_rows(self, new_index: NewIndex) -> None:
        index, embeds, ids = filled(new_index, 30)
        query = unit(1, seed=1)
        for k in (30, 31, 20_000):
            check_ranked(index.search(query, k)[1][0].tolist(), embeds, query[0], 30, ids)

    @pytest.mark.parametrize("copies", [12, 200])
    def test_ties_go_by_id(self, copies: int, new_index: NewIndex) -> None:
        index = new_index(DIM)
        ids = torch.randperm(copies, generator=torch.Generator().manual_seed(0))
        index.upsert(torch.arange(5000, 5100), unit(100))
        index.upsert(ids, unit(1, seed=3).expand(copies, DIM))
        scores, found = index.search(unit(1, seed=3), 10)
        assert found[0].tolist() == list(range(10))
        assert len(scores.unique()) == 1

    def test_more_than_k_may_be_asked_for_and_the_first_k_are_the_same(self, new_index: NewIndex) -> None:
        index, _, _ = filled(new_index, 30)
        queries = unit(2, seed=1)
        scores, ids = index.search(queries, 3, extra=4)
        assert scores.shape == ids.shape == (2, 7)
        assert torch.equal(ids[:, :3], index.search(queries, 3)[1])
        assert (scores[:, 1:] <= scores[:, :-1]).all()
        assert index.search(queries, 3, extra=99)[1].shape == (2, 30)

    def test_ids_are_the_callers(self, new_index: NewIndex) -> None:
        index, ids = new_index(DIM), [7, -3, 2**62, 0, -(2**63) + 1, 2**63 - 2]
        index.upsert(torch.tensor(ids), unit(1).expand(6, DIM))
        assert index.ids().tolist() == sorted(ids)
        assert index.search(unit(1), 6)[1].tolist() == [sorted(ids)]
        assert index.delete(torch.tensor([-3, 2**63 - 2])) == 2
        assert index.ids().tolist() == [-(2**63) + 1, 0, 7, 2**62]

    def test_rows_are_fetched_by_their_id_in_the_order_asked_for(self, new_index: NewIndex) -> None:
        index, embeds = new_index(DIM), unit(3)
        index.upsert(torch.tensor([30, 10, 20]), embeds)
        torch.testing.assert_close(index.embeds(torch.tensor([10, 20, 10])), embeds[[1, 2, 1]])
        with pytest.raises(ValueError, match="no row with the id 11"):
            index.embeds(torch.tensor([10, 11]))

    def test_a_tag_lets_only_its_rows_compete(self, new_index: NewIndex) -> None:
        tags = [set(ODD_TAGS[row % 5 :: 3]) for row in range(60)]
        index, embeds, ids = filled(new_index, 60, tags)
        query = unit(1, seed=1)
        for tag in (*ODD_TAGS, "nobody's", 'x" or id > 0 or "', "EN"):
            carriers = [row for row in ids if tag in tags[row]]
            assert index.ids(tag).tolist() == carriers
            check_ranked(index.search(query, 99, tag=tag)[1][0].tolist(), embeds[carriers], query[0], 99, carriers)
        counts = {tag: sum(tag in names for names in tags) for tag in sorted(ODD_TAGS)}
        assert index.tags() == {tag: count for tag, count in counts.items() if count}
        assert list(index.tags()) == sorted(index.tags())

    def test_a_subset_is_ids_or_a_mask(self, new_index: NewIndex) -> None:
        index, embeds, ids = filled(new_index, 40, [{"even"} if row % 2 == 0 else set() for row in range(40)], 100)
        query, chosen = unit(1, seed=1), [103, 109, 120, 128]
        mask = torch.zeros(40, dtype=torch.bool)
        mask[[id - 100 for id in chosen]] = True
        for subset in (torch.tensor([128, 103, 120, 109, 103]), mask):
            scores, found = index.search(query, 10, subset=subset)
            check_ranked(found[0].tolist(), embeds[[id - 100 for id in chosen]], query[0], 10, chosen)
            torch.testing.assert_close(scores[0], (embeds[found[0] - 100] @ query[0]), atol=2e-6, rtol=0)
        assert sorted(index.search(query, 10, tag="even", subset=torch.tensor(chosen))[1][0].tolist()) == [120, 128]
        assert index.search(query, 10, subset=torch.tensor([], dtype=torch.int64))[1].shape == (1, 0)
        assert len(ids) == len(index)

    def test_a_row_takes_the_place_of_the_old_one_tags_and_all(self, new_index: NewIndex) -> None:
        index, embeds, _ = filled(new_index, 20, [{"old"}] * 20)
        new = unit(2, seed=5)
        index.upsert(torch.tensor([3, 99]), new, [{"new"}, {"new", "old"}])
        assert len(index) == 21
        assert index.tags() == {"new": 2, "old": 20}
        torch.testing.assert_close(index.embeds(torch.tensor([99, 3])), new[[1, 0]])
        assert index.search(new[:1], 1)[1].tolist() == [[3]]
        assert index.search(embeds[3:4], 1)[1].tolist() != [[3]]
        index.upsert(torch.tensor([3]), new[:1])
        assert index.tags() == {"new": 1, "old": 20}

    def test_the_same_rows_twice_change_nothing(self, new_index: NewIndex) -> None:
        index, embeds, ids = filled(new_index, 50, [{"a"}] * 50)
        index.upsert(torch.tensor(ids), embeds, [{"a"}] * 50)
        assert index.ids().tolist() == ids
        assert index.tags() == {"a": 50}
        torch.testing.assert_close(index.embeds(torch.tensor(ids)), embeds)

    def test_rows_are_taken_out(self, new_index: NewIndex) -> None:
        index, embeds, _ = filled(new_index, 20, [{"even"} if row % 2 == 0 else {"odd"} for row in range(20)])
        assert index.delete(torch.tensor([4, 5, 77, 4])) == 2
        assert len(index) == 18
        assert index.tags() == {"even": 9, "odd": 9}
        assert not {4, 5} & set(index.search(embeds[4:6], 20)[1].flatten().tolist())
        with pytest.raises(ValueError, match="no row with the id 4"):
            index.embeds(torch.tensor([4]))
        index.upsert(torch.tensor([4]), embeds[4:5])
        assert index.search(embeds[4:5], 1)[1].tolist() == [[4]]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda index: index.search(torch.zeros(1, DIM + 1), 1), r"\(num_queries, 16\)"),
            (lambda index: index.search(torch.zeros(DIM), 1), r"\(num_queries, 16\)"),
            (lambda index: index.search(unit(1), -1), "negative"),
            (lambda index: index.search(unit(1), 1, extra=-1), "negative"),
            (lambda index: index.search(unit(1), 1, subset=torch.tensor([0, 20])), "no row with the id 20"),
            (lambda index: index.search(unit(1), 1, subset=torch.tensor([0.5])), "bool mask"),
            (
                lambda index: index.search(unit(1), 1, subset=torch.ones(5, dtype=torch.bool)),
                "for 5 candidates, the index has 20",
            ),
            (lambda index: index.upsert(torch.tensor([1, 1]), unit(2)), "1 is there twice"),
            (lambda index: index.upsert(torch.tensor([1]), unit(2)), "2 embeddings need as many ids"),
            (lambda index: index.upsert(torch.tensor([1, 2]), unit(2), [{"en"}]), "as many ids and tags"),
            (lambda index: index.upsert(torch.tensor([1]), unit(1, DIM + 1)), "16 wide"),
            (lambda index: index.upsert(torch.tensor([1]), torch.full((1, DIM), torch.nan)), "finite"),
            (lambda index: index.upsert(torch.tensor([1.0]), unit(1)), "integers"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_changes_nothing(
        self, wrong: Callable[[Index], object], message: str, untouched: Index
    ) -> None:
        with pytest.raises(ValueError, match=message):
            wrong(untouched)
        torch.testing.assert_close(untouched.embeds(untouched.ids()), unit(20))

    def test_searches_run_side_by_side_while_rows_come_and_go(self, new_index: NewIndex) -> None:
        index, embeds, ids = filled(new_index, 200)
        wrong: list[object] = []

        def look(seed: int) -> None:
            try:
                for query in unit(6, seed=seed):
                    found = index.search(query[None], 5)[1][0].tolist()
                    kept = [id for id in found if id < 1000]
                    check_ranked(kept, embeds, query, len(kept), ids)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=look, args=(seed,)) for seed in range(1, 7)]
        for thread in threads:
            thread.start()
        for turn in range(4):
            index.upsert(torch.arange(1000, 1020), unit(20, seed=50 + turn))
            index.delete(torch.arange(1000, 1010))
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(index) == 210

    def test_it_is_reopened_as_it_was(self, new_index: NewIndex, reopen: Reopen) -> None:
        index, embeds, ids = filled(new_index, 100, [{"a"} if row < 30 else {"b", "c"} for row in range(100)])
        index.delete(torch.tensor([50]))
        again = reopen(index)
        del ids[50]
        assert again.embed_dim == DIM
        assert again.ids().tolist() == ids
        assert again.tags() == {"a": 30, "b": 69, "c": 69}
        torch.testing.assert_close(again.embeds(torch.tensor(ids)), embeds[ids], atol=1e-3, rtol=0)
        assert again.search(embeds[7:8], 1)[1].tolist() == [[7]]
        again.upsert(torch.tensor([500]), unit(1, seed=9))
        assert reopen(again).ids().tolist() == [*ids, 500]
