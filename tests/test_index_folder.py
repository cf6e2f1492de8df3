"""The embedded index in a folder: what was saved is found again, found right, and never half there."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignment.index import EXACT_ROWS, EmbeddedIndex, files

DIM = 16


def unit(count: int, dim: int = DIM, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


def clustered(count: int, dim: int = 64, seed: int = 0) -> Tensor:
    """Points around two hundred centres, along a few directions: as embeddings lie."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(200, 24, generator=generator)
    points = centres[torch.randint(200, (count,), generator=generator)]
    points = points + 0.7 * torch.randn(count, 24, generator=generator)
    spread = points @ torch.randn(24, dim, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(spread + 0.1 * torch.randn(count, dim, generator=generator), dim=-1)


def reference(embeds: Tensor, queries: Tensor, k: int) -> list[list[int]]:
    """Positions of the best, of half-precision rows scored in double precision."""
    scores = (queries.double() @ embeds.half().double().T).float()
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()


# ---------------------------------------------------------------- many rows


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    embeds = clustered(3 * EXACT_ROWS)
    folder = tmp_path_factory.mktemp("large") / "index"
    tags = [["even"] if row % 2 == 0 else ["odd", "rare"] if row % 1001 == 0 else ["odd"] for row in range(len(embeds))]
    EmbeddedIndex(embeds, tags=tags).save(folder)
    return folder, embeds


def test_the_top_ten_of_many_rows_are_those_of_the_slow_reference(large: tuple[Path, Tensor]) -> None:
    folder, embeds = large
    assert list(folder.glob("*.codes"))
    index, queries = EmbeddedIndex.open(folder), clustered(100, seed=5)
    scores, ids = index.search(queries, 10)
    right = reference(embeds, queries, 10)
    hits = [len(set(found) & set(true)) for found, true in zip(ids.tolist(), right, strict=True)]
    assert sum(hits) >= 0.998 * 1000
    exact = (queries[:, None].double() * embeds.half().double()[ids]).sum(-1).float()
    torch.testing.assert_close(scores, exact, atol=1e-6, rtol=0)
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_filters_among_many_rows_hide_nothing(large: tuple[Path, Tensor]) -> None:
    folder, embeds = large
    index, queries = EmbeddedIndex.open(folder), clustered(20, seed=6)
    for tag, rows in (("rare", list(range(1001, len(embeds), 2002))), ("even", list(range(0, len(embeds), 2)))):
        _, ids = index.search(queries, 5, tag=tag)
        expected = [[rows[place] for place in found] for found in reference(embeds[rows], queries, 5)]
        hits = sum(len(set(a) & set(b)) for a, b in zip(ids.tolist(), expected, strict=True))
        assert hits >= 0.99 * 100
        assert index.ids(tag).tolist() == rows
    some = torch.tensor([5, 77, 900, 4000])
    _, ids = index.search(queries, 4, subset=some)
    assert [sorted(found) for found in ids.tolist()] == [some.tolist()] * 20
    assert index.tags() == {"even": len(embeds) // 2, "odd": len(embeds) // 2, "rare": 6}


def test_changes_to_many_rows_write_only_what_is_new(large: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, embeds = large
    index = EmbeddedIndex.open(folder)
    index.save(tmp_path / "copy")
    index = EmbeddedIndex.open(tmp_path / "copy")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()}
    new = unit(3, 64, seed=9)
    index.upsert(torch.tensor([7, 50_000, 50_001]), new, [["x"], [], ["x"]])
    assert index.delete(torch.tensor([11, 12, 999_999])) == 2
    index.save()
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()}
    assert all(after[name] == time for name, time in before.items() if name != files.LIST)
    assert sum((tmp_path / "copy" / name).stat().st_size for name in set(after) - set(before)) < 100_000
    again = EmbeddedIndex.open(tmp_path / "copy")
    assert len(again) == len(embeds)
    _, ids = again.search(torch.cat([new, embeds[11:13]]), 1)
    assert ids.flatten().tolist()[:3] == [7, 50_000, 50_001]
    assert not {11, 12} & set(ids.flatten().tolist())
    assert again.ids("x").tolist() == [7, 50_001]
    torch.testing.assert_close(again.embeds(torch.tensor([50_001, 7])), new[[2, 0]], atol=1e-3, rtol=0)


def test_threads_may_search_while_rows_come_and_go(large: tuple[Path, Tensor]) -> None:
    folder, embeds = large
    index, queries = EmbeddedIndex.open(folder), embeds[::700].float()
    right = index.search(queries, 1)[1]

    def search(row: int) -> bool:
        return torch.equal(index.search(queries, 1)[1], right)

    with ThreadPoolExecutor(4) as pool:
        searches = [pool.submit(search, row) for row in range(16)]
        for row in range(20):
            index.upsert(torch.tensor([100_000 + row]), -queries[:1])
            index.delete(torch.tensor([100_000 + row]))
        assert all(search.result() for search in searches)


# ---------------------------------------------------------------- like a dictionary


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["upsert", "delete", "save", "reopen", "compact"]), st.sets(st.integers(0, 30))),
        max_size=12,
    )
)
def test_whatever_happens_it_holds_what_a_dictionary_would(
    steps: list[tuple[str, set[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("steps") / "index"
    index, truth = EmbeddedIndex(torch.empty(0, DIM)), dict[int, Tensor]()
    index.save(folder)
    saved = dict(truth)
    for number, (step, some) in enumerate(steps):
        ids = torch.tensor(sorted(some), dtype=torch.int64)
        if step == "upsert":
            rows = unit(len(some), seed=number).half().float()
            index.upsert(ids, rows, [[f"t{id % 3}"] for id in sorted(some)])
            truth |= dict(zip(sorted(some), rows, strict=True))
        elif step == "delete":
            assert index.delete(ids) == len(some & set(truth))
            truth = {id: row for id, row in truth.items() if id not in some}
        elif step == "reopen":
            index, truth = EmbeddedIndex.open(folder), dict(saved)
        else:
            index.save()
            if step == "compact":
                index.compact()
            saved = dict(truth)
    assert index.ids().tolist() == sorted(truth)
    assert len(index) == len(truth)
    query = unit(1, seed=99)
    scores = {id: float((row.double() @ query[0].double()).float()) for id, row in truth.items()}
    assert index.search(query, 40)[1][0].tolist() == sorted(truth, key=lambda id: (-scores[id], id))
    wanted = sorted(id for id in truth if id % 3 == 1)
    assert sorted(index.search(query, 40, tag="t1")[1][0].tolist()) == wanted
    if truth:
        torch.testing.assert_close(
            index.embeds(torch.tensor(sorted(truth))), torch.stack([truth[i] for i in sorted(truth)])
        )


# ---------------------------------------------------------------- damage


@pytest.fixture
def small(tmp_path: Path) -> Path:
    EmbeddedIndex(unit(50)).save(tmp_path / "index")
    return tmp_path / "index"


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        EmbeddedIndex.open(tmp_path)


@pytest.mark.parametrize("damage", ["gone", "cut", "head"])
def test_a_damaged_segment_is_refused(small: Path, damage: str) -> None:
    (path,) = small.glob("*.safetensors")
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] if damage == "cut" else bytes([255 - content[0]]) + content[1:])
    with pytest.raises(ValueError, match="damaged"):
        EmbeddedIndex.open(small)


def test_rot_further_on_is_found_by_reading_everything(small: Path) -> None:
    EmbeddedIndex(unit(4000)).save(small)
    (path,) = small.glob("*.safetensors")
    index = EmbeddedIndex.open(small)
    index.verify()
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([255 - content[-1]]))
    with pytest.raises(ValueError, match=path.name):
        EmbeddedIndex.open(small).verify()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', "null"])
def test_a_damaged_list_is_refused(small: Path, content: str) -> None:
    (small / files.LIST).write_text(content)
    with pytest.raises(ValueError, match="damaged"):
        EmbeddedIndex.open(small)


@pytest.mark.parametrize("writes", range(1, 4))
def test_a_save_that_breaks_off_leaves_the_old_index_and_the_next_one_sweeps_up(
    small: Path, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th file that would be put in place is not, nor any after it."""
    index = EmbeddedIndex.open(small)
    index.upsert(torch.arange(50, 60), unit(10, seed=3))
    index.delete(torch.tensor([0]))
    put, done = os.replace, []

    def breaks(source: object, target: object) -> None:
        done.append(target)
        if len(done) >= writes:
            raise OSError(28, "No space left on device")
        put(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", breaks)
    with pytest.raises(OSError, match="No space"):
        index.save()
    monkeypatch.undo()
    assert EmbeddedIndex.open(small).ids().tolist() == list(range(50))
    index.save()
    assert EmbeddedIndex.open(small).ids().tolist() == list(range(1, 60))
    listed = (small / files.LIST).read_text()
    assert all(path.name == files.LIST or path.name in listed for path in small.iterdir())


def test_rows_that_are_not_numbers_and_ids_that_are_there_twice_are_refused(small: Path) -> None:
    index = EmbeddedIndex.open(small)
    with pytest.raises(ValueError, match="finite"):
        index.upsert(torch.tensor([1]), torch.full((1, DIM), torch.nan))
    with pytest.raises(ValueError, match="twice"):
        index.upsert(torch.tensor([1, 1]), unit(2))
    with pytest.raises(ValueError, match="id 77"):
        index.embeds(torch.tensor([77]))
    assert len(index) == 50
