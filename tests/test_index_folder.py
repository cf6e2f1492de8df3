"""The index's folder: changes, saving, opening, whoever is killed in between, damage, and others at work."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from alignment.index import EXACT_ROWS, EmbeddedIndex, files, melting

MANY = EXACT_ROWS + 500


def unit(count: int, dim: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


def contents(index: EmbeddedIndex) -> dict[int, tuple[float, ...]]:
    """Everything in an index; rows as float16, which is what a folder keeps."""
    ids = index.ids()
    return dict(zip(ids.tolist(), map(tuple, index.embeds(ids).half().tolist()), strict=True))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of a folder: which one it is, and when it was written."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def sizes(index: EmbeddedIndex) -> list[int]:
    return sorted(len(part.segment.ids) for part in index._parts)


# ---------------------------------------------------------------- changes


OPERATION = st.one_of(
    st.tuples(st.just("upsert"), st.sets(st.integers(0, 30), min_size=1, max_size=12), st.sampled_from(["", "a", "b"])),
    st.tuples(st.just("delete"), st.sets(st.integers(0, 30), max_size=12), st.just("")),
    st.tuples(st.sampled_from(["save", "open", "compact"]), st.just(frozenset()), st.just("")),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATION, max_size=14), seed=st.integers(0, 99))
def test_an_index_is_what_a_dictionary_would_be(operations: list, seed: int, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    shutil.rmtree(folder, ignore_errors=True)
    index, kept = EmbeddedIndex(torch.empty(0, 8)), {}
    index.save(folder)
    saved = {}
    for number, (what, ids, tag) in enumerate(operations):
        rows = torch.tensor(sorted(ids), dtype=torch.int64)
        if what == "upsert":
            embeds = unit(len(rows), seed=seed + number).half()
            index.upsert(rows, embeds, [{tag} - {""}] * len(rows))
            kept |= {id: (tuple(embed.tolist()), tag) for id, embed in zip(sorted(ids), embeds, strict=True)}
        elif what == "delete":
            assert index.delete(rows) == len(ids & kept.keys())
            kept = {id: row for id, row in kept.items() if id not in ids}
        elif what == "open":
            index, kept = EmbeddedIndex.open(folder), dict(saved)
        else:
            getattr(index, what)()
            saved = dict(kept)
        assert contents(index) == {id: embed for id, (embed, _) in kept.items()}
        assert len(index) == len(kept)
        assert index.tags() == {
            name: sum(tag == name for _, tag in kept.values())
            for name in "ab"
            if any(tag == name for _, tag in kept.values())
        }
    query = unit(1, seed=100)
    for tag in (None, "a", "b"):
        mine = [id for id in sorted(kept) if tag in (None, kept[id][1])]
        scores = {id: float((torch.tensor(kept[id][0]).double() @ query[0].double()).float()) for id in mine}
        found_scores, found = index.search(query, 9, tag=tag)
        assert found[0].tolist() == sorted(mine, key=lambda id: (-scores[id], id))[:9]
        assert found_scores[0].tolist() == [scores[id] for id in found[0].tolist()]


def test_a_row_that_is_there_already_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    index = EmbeddedIndex(unit(4), tags=[{"old"}] * 4)
    index.save(tmp_path)
    index.upsert(torch.tensor([2, 9]), unit(2, seed=1), [{"new"}, {"new"}])
    index.save()
    index = EmbeddedIndex.open(tmp_path)
    torch.testing.assert_close(index.embeds(torch.tensor([2])), unit(2, seed=1)[:1], atol=1e-3, rtol=0)
    assert index.ids("old").tolist() == [0, 1, 3]
    assert index.ids("new").tolist() == [2, 9]
    assert index.search(unit(2, seed=1)[:1], 1)[1].tolist() == [[2]]


# ---------------------------------------------------------------- saving and opening


def test_an_index_is_opened_as_it_was_saved(tmp_path: Path) -> None:
    embeds, ids = unit(50), torch.arange(50) * 3 - 7
    EmbeddedIndex(embeds, ids=ids, tags=[{str(row % 3)} for row in range(50)]).save(tmp_path, about={"made by": "雪"})
    index = EmbeddedIndex.open(tmp_path)
    assert torch.equal(index.ids(), ids)
    assert torch.equal(index.embeds(ids), embeds.half().float())
    assert index.tags() == {"0": 17, "1": 17, "2": 16}
    assert index.about == {"made by": "雪"}
    assert index.embed_dim == 8
    expected = EmbeddedIndex(embeds.half(), ids=ids).search(unit(5, seed=1), 9)
    assert all(torch.equal(*pair) for pair in zip(index.search(unit(5, seed=1), 9), expected, strict=True))


def test_the_rows_are_a_safetensors_file(tmp_path: Path) -> None:
    EmbeddedIndex(unit(5), ids=torch.arange(5) + 10, tags=[{"a"}] * 5).save(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("rows"), unit(5).half())
        assert file.get_tensor("ids").tolist() == [10, 11, 12, 13, 14]


def test_the_same_index_makes_the_same_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        EmbeddedIndex(unit(MANY, 32), tags=[{"x", "y"}] * MANY).save(tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert {name.partition(".")[2] for name in names} == {"json", "safetensors", "codes"}
    assert len({(tmp_path / "a" / name).stat().st_mode for name in names}) == 1


def test_changes_are_written_and_the_large_files_are_not_written_again(tmp_path: Path) -> None:
    index = EmbeddedIndex(unit(MANY, 32))
    index.save(tmp_path)
    large = snapshot(tmp_path)
    index.upsert(torch.arange(MANY - 50, MANY + 50), unit(100, 32, seed=1))
    index.delete(torch.arange(20))
    assert {name: large[name] for name in large} == snapshot(tmp_path)  # nothing yet
    index.save()
    after = snapshot(tmp_path)
    assert all(after[name] == old for name, old in large.items() if name != files.LIST)
    new = [tmp_path / name for name in after if name not in large]
    assert sorted(path.suffix for path in new) == [".dead", ".safetensors"]
    assert sum(path.stat().st_size for path in new) < 100 * 32 * 2 + 2048
    again = EmbeddedIndex.open(tmp_path)
    assert contents(again) == contents(index)
    assert len(again) == MANY + 50 - 20
    assert 3 not in again.search(unit(MANY, 32)[3:4], 5)[1]
    assert again.search(unit(100, 32, seed=1)[7:8], 1)[1].item() == MANY - 50 + 7


def test_nothing_new_writes_nothing_but_the_list(tmp_path: Path) -> None:
    index = EmbeddedIndex(unit(9))
    index.save(tmp_path)
    before = snapshot(tmp_path)
    index.save(about={"build": "2"})
    assert {name for name, state in snapshot(tmp_path).items() if state != before.get(name)} == {files.LIST}
    assert EmbeddedIndex.open(tmp_path).about == {"build": "2"}


def test_small_segments_are_melted_and_the_large_one_stays(tmp_path: Path) -> None:
    index = EmbeddedIndex(unit(3000))
    index.save(tmp_path)
    large = {path.name for path in tmp_path.glob("*.safetensors")}
    written = 0
    for number in range(40):
        index.upsert(torch.arange(10) + 3000 + 10 * number, unit(10, seed=number))
        before = {path.name for path in tmp_path.glob("*.safetensors")}
        index.save()
        written += sum(path.stat().st_size for path in tmp_path.glob("*.safetensors") if path.name not in before)
        assert len(index._parts) <= 5
    assert large <= {path.name for path in tmp_path.glob("*.safetensors")}
    assert written < 8 * 400 * (8 * 2 + 8) + 40 * 1024  # each row a few times, not forty
    assert contents(EmbeddedIndex.open(tmp_path)) == contents(index)


def test_a_segment_full_of_dead_rows_is_written_again_without_them(tmp_path: Path) -> None:
    index = EmbeddedIndex(unit(100), tags=[{"even"} if row % 2 == 0 else set() for row in range(100)])
    index.save(tmp_path)
    index.delete(torch.arange(0, int(100 * melting.DEAD_SHARE)))
    index.save()
    assert sizes(index) == [100]
    index.delete(torch.tensor([99]))
    index.save()
    assert sizes(index) == [74]
    assert index.tags() == {"even": 37}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    index.delete(index.ids())
    index.save()
    assert [path.name for path in tmp_path.iterdir()] == [files.LIST]
    assert len(EmbeddedIndex.open(tmp_path)) == 0


def test_compacting_leaves_one_segment_with_all_that_lives(tmp_path: Path) -> None:
    index = EmbeddedIndex(unit(60))
    index.save(tmp_path)
    index.upsert(torch.arange(55, 65), unit(10, seed=1))
    index.delete(torch.arange(5))
    expected = contents(index)
    index.compact()
    assert sizes(index) == [60]
    assert contents(EmbeddedIndex.open(tmp_path)) == expected


def test_another_folder_gets_all_of_it_and_is_written_to_from_then_on(tmp_path: Path) -> None:
    index = EmbeddedIndex(unit(20))
    index.save(tmp_path / "first")
    index.upsert(torch.tensor([50]), unit(1, seed=1))
    index.save(tmp_path / "second")
    index.delete(torch.tensor([3]))
    index.save()
    assert len(EmbeddedIndex.open(tmp_path / "first")) == 20
    assert contents(EmbeddedIndex.open(tmp_path / "second")) == contents(index)
    assert len(index) == 20


def test_opening_looks_at_the_first_bytes_only_and_verifying_at_all(tmp_path: Path) -> None:
    index = EmbeddedIndex(unit(MANY, 32))
    index.save(tmp_path)
    index.verify()
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-40_000] ^= 1
    path.unlink()  # the index has it mapped
    path.write_bytes(data)
    opened = EmbeddedIndex.open(tmp_path)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: its content"):
        opened.verify()


# ---------------------------------------------------------------- killed in between


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", ["replace", "fsync", "unlink"])
def test_whoever_is_killed_leaves_the_old_index_or_the_new_one(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(os, call)
    EmbeddedIndex(unit(40)).save(tmp_path / "before")
    old = contents(EmbeddedIndex.open(tmp_path / "before"))
    seen = set()
    for survived in range(20):
        folder = tmp_path / f"{call}{survived}"
        shutil.copytree(tmp_path / "before", folder)
        index = EmbeddedIndex.open(folder)
        index.upsert(torch.arange(30, 50), unit(20, seed=1))
        index.delete(torch.arange(3))
        left = survived

        def die(*args: object, **more: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return original(*args, **more)

        monkeypatch.setattr(os, call, die)
        try:
            index.save()
            finished = True
        except Killed:
            finished = False
        monkeypatch.undo()
        found = contents(EmbeddedIndex.open(folder))
        new = contents(index)
        assert found in (old, new)
        seen.add(found == new)
        index.save()  # whatever happened, it can be tried again
        assert contents(EmbeddedIndex.open(folder)) == new
        named = {file.name for entry in files.read_listing(folder).entries for file in entry.files}
        assert {path.name for path in folder.iterdir()} == {files.LIST, *named}
        if finished:
            break
    assert finished
    assert survived >= 1
    assert seen == {True, False}


def test_what_somebody_left_half_written_is_overlooked_and_swept(tmp_path: Path) -> None:
    index = EmbeddedIndex(unit(5))
    index.save(tmp_path)
    (tmp_path / "0123456789abcdef.safetensors").write_bytes(b"half")
    (tmp_path / ".writing-abc").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert len(EmbeddedIndex.open(tmp_path)) == 5
    index.upsert(torch.tensor([9]), unit(1))
    index.save()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".txt"}
    assert not (tmp_path / "0123456789abcdef.safetensors").exists()
    assert not (tmp_path / ".writing-abc").exists()


# ---------------------------------------------------------------- damage


def the(folder: Path, suffix: str) -> Path:
    (path,) = folder.glob(f"*{suffix}")
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def spoil_the_list(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / files.LIST).read_text())
    change(content)
    (folder / files.LIST).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: cut(the(folder, ".safetensors")), r"\.safetensors is damaged: it has \d+ bytes instead of"),
        (lambda folder: cut(the(folder, ".codes")), r"\.codes is damaged: it has \d+ bytes instead of"),
        (lambda folder: cut(the(folder, ".dead")), r"\.dead is damaged: it has \d+ bytes instead of"),
        (
            lambda folder: the(folder, ".safetensors").write_bytes(b" " * the(folder, ".safetensors").stat().st_size),
            "its first bytes are not what was written",
        ),
        (lambda folder: the(folder, ".codes").unlink(), r"\.codes is missing"),
        (lambda folder: the(folder, ".safetensors").write_bytes(b"version https://git-lfs"), "is damaged"),
        (lambda folder: (folder / files.LIST).write_text("<<<<<<< HEAD"), "index in .* is damaged"),
        (lambda folder: (folder / files.LIST).write_text("[]"), "index in .* is damaged"),
        (lambda folder: spoil_the_list(folder, lambda it: it.update(embed_dim=16)), "it was changed"),
        (lambda folder: spoil_the_list(folder, lambda it: it["entries"].clear()), "it was changed"),
        (lambda folder: spoil_the_list(folder, lambda it: it.update(format=2)), "its format is 2"),
    ],
    ids=["rows", "codes", "dead", "head", "missing", "LFS", "conflict", "list", "width", "entries", "format"],
)
def test_damage_is_noticed_when_opening(harm: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    index = EmbeddedIndex(unit(MANY, 32))
    index.save(tmp_path)
    index.delete(torch.tensor([5]))
    index.save()
    del index
    harm(tmp_path)
    with pytest.raises(ValueError, match=message):
        EmbeddedIndex.open(tmp_path)


def test_codes_of_other_rows_are_noticed_when_searching(tmp_path: Path) -> None:
    for folder, count in (("a", MANY), ("b", MANY + 32)):
        EmbeddedIndex(unit(count, 32)).save(tmp_path / folder)
    listings = [files.read_listing(tmp_path / folder) for folder in "ab"]
    foreign = listings[1].entries[0].codes
    assert foreign is not None
    shutil.copy(tmp_path / "b" / foreign.name, tmp_path / "a")
    entry = files.Entry(MANY, listings[0].entries[0].rows, foreign)
    files.write_listing(tmp_path / "a", files.Listing(32, (entry,)))
    with pytest.raises(ValueError, match=f"has {MANY + 32} rows and not {MANY}"):
        EmbeddedIndex.open(tmp_path / "a").search(unit(1, 32), 3)


def test_no_index_at_all_is_another_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no index in"):
        EmbeddedIndex.open(tmp_path)


# ---------------------------------------------------------------- others at work


def test_who_has_it_open_goes_on_with_what_was_there(tmp_path: Path) -> None:
    EmbeddedIndex(unit(MANY, 32)).save(tmp_path)
    reader, writer = EmbeddedIndex.open(tmp_path), EmbeddedIndex.open(tmp_path)
    writer.delete(torch.arange(MANY // 2))
    writer.compact()
    assert not set(snapshot(tmp_path)) & {entry.rows.name for entry in reader_entries(reader)}  # its files are gone
    assert reader.search(unit(MANY, 32)[:1], 1)[1].item() == 0
    assert len(reader) == MANY
    assert len(EmbeddedIndex.open(tmp_path)) == MANY - MANY // 2


def reader_entries(index: EmbeddedIndex) -> list[files.Entry]:
    return [part.entry for part in index._parts if part.entry is not None]


def test_who_opens_it_while_it_is_saved_gets_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = EmbeddedIndex(unit(10))
    writer.save(tmp_path)
    map_segment = files.map_segment

    def too_late(*args: object) -> object:
        monkeypatch.undo()
        writer.delete(torch.arange(5))
        writer.compact()
        return map_segment(*args)

    monkeypatch.setattr(files, "map_segment", too_late)
    assert EmbeddedIndex.open(tmp_path).ids().tolist() == [5, 6, 7, 8, 9]


def test_searches_go_on_while_it_changes(tmp_path: Path) -> None:
    # Rows 0 to 99 never change; rows above come and go, at right angles to them.
    fixed = torch.cat([unit(100), torch.zeros(100, 8)], dim=1)
    index = EmbeddedIndex(fixed.half())
    index.save(tmp_path)
    expected = index.search(fixed, 5)[1]
    stop, wrong = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            try:
                if not torch.equal(index.search(fixed, 5)[1], expected):
                    wrong.append("another answer")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(25):
        index.upsert(torch.arange(100, 140) + number, fixed[:40].roll(8, dims=1))
        index.delete(torch.arange(100, 110) + number)
        index.save()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
