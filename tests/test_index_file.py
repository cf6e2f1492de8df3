"""The file of a local index: what it holds, damage, kills in between, and readers while it is replaced."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from index_contract import search_all, unit

from alignment.index import EXACT_ROWS, FileIndex, LocalIndex

pytestmark = pytest.mark.usefixtures("rough_tuning")

COUNT, DIM = EXACT_ROWS + 500, 16
IDS = torch.arange(COUNT)


def write(path: Path, seed: int = 0, stamp: str = "one") -> None:
    FileIndex.write(path, unit(COUNT, DIM, seed).split(1000), stamp)


def seed_of(path: Path, stamp: str = "one") -> int:
    """Tell which rows a sound file holds."""
    rows = FileIndex(path, stamp).embeds(IDS)
    (seed,) = (seed for seed in (0, 1) if torch.equal(rows, unit(COUNT, DIM, seed).half().float()))
    return seed


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("original") / "index.faiss"
    write(path)
    return path.read_bytes()


@pytest.fixture
def path(original: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "index.faiss"
    path.write_bytes(original)
    return path


def test_an_index_is_opened_as_it_was_written(path: Path) -> None:
    index, embeds = FileIndex(path, "one"), unit(COUNT, DIM).half()
    assert (len(index), index.embed_dim) == (COUNT, DIM)
    assert torch.equal(index.embeds(IDS), embeds.float())
    queries = embeds[::500].float()
    expected = search_all(LocalIndex(embeds), queries, 9)
    assert all(torch.equal(*pair) for pair in zip(search_all(index, queries, 9), expected, strict=True))


def test_the_same_rows_make_the_same_file(path: Path, original: bytes, tmp_path: Path) -> None:
    FileIndex.write(tmp_path / "again", iter([unit(COUNT, DIM)]), "one")  # in one batch
    assert (tmp_path / "again").read_bytes() == original


def test_typical_queries_decide_how_much_is_visited(tmp_path: Path, path: Path, original: bytes) -> None:
    centres = unit(256, DIM, 2)
    rows = torch.nn.functional.normalize(centres.repeat(20, 1) + 0.01 * unit(20 * 256, DIM, 3), dim=-1)

    def nprobe(queries: torch.Tensor) -> int:
        FileIndex.write(tmp_path / "tuned", [rows], "one", queries)
        return int(json.loads((tmp_path / "tuned").read_bytes()[8:4096])["nprobe"])

    assert nprobe(centres) < nprobe(unit(256, DIM, 4))  # all of their best ten are in one cluster
    FileIndex.write(path, [unit(COUNT, DIM)], "one", unit(20, DIM, 4))
    assert path.read_bytes() == original, "too few queries to go by"
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_rows_are_no_memory_of_the_process(tmp_path: Path) -> None:
    # A fresh process reads all of 10 MB of rows; what it has more afterwards is much less.
    code = """if True:
        import sys, torch, faiss
        from pathlib import Path
        from alignment.index import FileIndex, LocalIndex
        def private():
            lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
            return int(lines["RssAnon"].split()[0]) * 1024
        path, query = Path(sys.argv[1]), torch.ones(512) / 512**0.5
        LocalIndex(query.half().repeat(5000, 1)).search(query, 10)
        before = private()
        index = FileIndex(path, "one")
        index.search(query, 10)
        for part in torch.arange(10_000).split(100):
            index.embeds(part)
        print(private() - before)
    """
    embeds = unit(10_000, 512).half()
    FileIndex.write(tmp_path / "index", [embeds], "one")
    command = [sys.executable, "-c", code, str(tmp_path / "index")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert int(result.stdout) < embeds.nbytes / 2


def test_embeddings_that_are_not_finite_are_refused_and_the_old_file_stays(path: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        FileIndex.write(path, [unit(COUNT, DIM), torch.full((1, DIM), torch.nan)], "two")
    assert seed_of(path) == 0
    assert list(path.parent.iterdir()) == [path]


# ---------------------------------------------------------------- damage


def test_no_file_is_another_error_than_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileIndex(tmp_path / "index.faiss", "one")


def test_a_file_of_another_state_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="another state"):
        FileIndex(path, "two")


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:3000],
        lambda data: b"version https://git-lfs.github.com/spec/v1\n",
        lambda data: bytes(len(data)),
        lambda data: data.replace(b'"one"', b'"uno"', 1),
        lambda data: data[: 4096 + COUNT * DIM * 2] + b"IxXX" + data[4096 + COUNT * DIM * 2 + 4 :],
    ],
    ids=["empty", "cut", "longer", "page", "LFS", "zeros", "stamp", "faiss"],
)
def test_damage_is_noticed_when_opening(harm: Callable[[bytes], bytes], path: Path, original: bytes) -> None:
    path.write_bytes(harm(original))
    with pytest.raises(ValueError, match=r"index\.faiss is damaged"):
        FileIndex(path, "one")


def test_a_file_of_another_format_is_refused(path: Path, original: bytes) -> None:
    page = json.dumps({**json.loads(original[8:4096]), "format": 1}).encode().ljust(4088)
    path.write_bytes(b"%08x" % zlib.crc32(page) + page + original[4096:])
    with pytest.raises(ValueError, match="of another version"):
        FileIndex(path, "one")


def test_with_flipped_bits_in_codes_and_positions_all_rows_are_searched(
    path: Path, original: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    data, generator = bytearray(original), torch.Generator().manual_seed(0)
    for place in torch.randint(COUNT * (DIM + 8), (2000,), generator=generator).tolist():
        data[-1 - place] ^= 1 << place % 8
    path.write_bytes(data)
    queries = unit(20, DIM, seed=3)
    found, expected = (
        search_all(index, queries, 10) for index in (FileIndex(path, "one"), LocalIndex(unit(COUNT, DIM).half()))
    )
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("damaged", [5, 40, COUNT])
def test_rows_that_are_no_numbers_are_never_found(damaged: int, path: Path, original: bytes) -> None:
    data = bytearray(original)
    for row in range(damaged):
        data[4096 + row * DIM * 2 : 4096 + row * DIM * 2 + 2] = b"\0\x7e"  # NaN
    path.write_bytes(data)
    index = FileIndex(path, "one")
    for query in unit(20, DIM, seed=3):
        scores, ids = index.search(query, 10, extra=30)
        assert not scores.isnan().any()
        assert (ids >= damaged).all()


# ---------------------------------------------------------------- kills and readers


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("survived", range(3))
def test_a_kill_leaves_the_old_file_or_the_new_one(
    call: str, survived: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = getattr(os, call), [survived]

    def die(*args: object, **more: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(*args, **more)

    monkeypatch.setattr(os, call, die)
    killed = False
    try:
        write(path, seed=1)
    except Killed:
        killed = True
    monkeypatch.undo()
    calls = {"replace": 1, "fsync": 2}[call]
    assert killed == (survived < calls)
    assert seed_of(path) == (not killed or (call, survived) == ("fsync", 1))
    write(path, seed=1)
    assert seed_of(path) == 1


@pytest.mark.parametrize("limit", [50_000, 5000 * 32 + 50_000], ids=["among the rows", "in what faiss made"])
def test_a_full_disk_is_an_os_error_and_the_old_file_stays(limit: int, path: Path) -> None:
    """A limit on the size of files stands for the disk; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            FileIndex.write(path, [unit(5000, DIM, 1)], "two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert seed_of(path) == 0
    assert list(path.parent.iterdir()) == [path]


def test_an_open_index_goes_on_with_the_rows_that_were_there(path: Path) -> None:
    reader, queries = FileIndex(path, "one"), unit(COUNT, DIM)[::500]
    write(path, seed=1, stamp="two")
    assert torch.equal(search_all(reader, queries, 1)[1][:, 0], IDS[::500])
    assert seed_of(path, "two") == 1
