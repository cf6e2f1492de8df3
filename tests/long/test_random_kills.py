"""Builds and trainings killed again and again: at random moments, and builds before every change to their folder.

`ALIGNMENT_SEED=7 make test-long` draws other moments; the seed is printed. What has to be equal afterwards is what
`Galleries.assert_finishes` and `Trainings.assert_undisturbed` in `tests/test_kills.py` compare: of a gallery every
record, the stamp but for its date, thumbnails byte by byte, embeddings as far as half precision goes, and the names of
all files, which for an index are hashes of what is in them; of a training every bit of the weights, all metrics and the
last loss.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from fault_injection import Fault, Runner
from test_kills import (
    KILLED,
    Galleries,
    Moment,
    Trainings,
    assert_old_or_new_when_killed,
    galleries,
    run,
    trainings,
)
from test_train_run import (
    FULL,
    Checkpoint,
    Start,
    assert_nothing_happened,
    called,
    finish,
    flags,
    kill,
    same,
    start,
    undisturbed,
    wait_for,
    whole_checkpoints,
)

__all__ = ["flags", "galleries", "run", "start", "trainings", "undisturbed"]

SEED = int(os.environ.get("ALIGNMENT_SEED", "0"))
BUILDS, UPDATES, TRAININGS = 20, 20, 14
STRIDE = int(os.environ.get("ALIGNMENT_STRIDE", "1"))

pytestmark = pytest.mark.timeout(3600)


def killed_at(moment: float, process: object, runner: Runner) -> bool:
    """Kill a process after some seconds; whether it was still at work."""
    time.sleep(moment)
    process.kill()  # type: ignore[attr-defined]
    return runner.end(process) in KILLED  # type: ignore[arg-type]


def timed(command: object, *arguments: object) -> float:
    began = time.monotonic()
    assert command(*arguments) == 0  # type: ignore[operator]
    return time.monotonic() - began


def test_new_galleries_killed_at_random_until_they_are_done(galleries: Galleries) -> None:
    rng, kills, ended, rounds = random.Random(SEED), 0, 0, 0
    length = timed(galleries.build, galleries.root / "timed")
    while kills < BUILDS:
        folder, rounds = galleries.root / f"built {rounds}", rounds + 1
        for _ in range(rng.randint(1, 4)):
            if killed_at(rng.uniform(0, length), galleries.start(folder), galleries.run):
                kills += 1
            else:
                ended += 1
            with suppress(FileNotFoundError):  # no gallery yet
                assert galleries.contents(folder) == galleries.after
        galleries.assert_finishes(folder, galleries.fresh)
    print(f"seed {SEED}: {kills} kills of new builds in {rounds} galleries; {ended} had ended before")


def test_updates_killed_at_random_until_they_are_done(galleries: Galleries) -> None:
    rng, kills, ended, rounds, new = random.Random(SEED + 1), 0, 0, 0, 0
    length = timed(galleries.build, galleries.copy("timed update"))
    while kills < UPDATES:
        folder, rounds = galleries.copy(f"updated {rounds}"), rounds + 1
        for _ in range(rng.randint(1, 4)):
            if killed_at(rng.uniform(0, length), galleries.start(folder), galleries.run):
                kills += 1
            else:
                ended += 1
            new += galleries.assert_old_or_new(folder)
        galleries.assert_finishes(folder)
    print(f"seed {SEED}: {kills} kills of updates in {rounds} galleries, {new} times new; {ended} had ended before")


def test_trainings_killed_at_random_until_they_are_done(trainings: Trainings, tmp_path: Path) -> None:
    rng, kills, ended, rounds = random.Random(SEED + 2), 0, 0, 0
    length = timed(trainings.begin, tmp_path / "timed")
    while kills < TRAININGS:
        folder, rounds = tmp_path / f"trained {rounds}", rounds + 1
        for _ in range(rng.randint(1, 3)):
            if killed_at(rng.uniform(0.1, 0.8 * length), trainings.start(folder), trainings.run):
                kills += 1
            else:
                ended += 1
        if (status := trainings.go_on(folder)) != 0:
            assert "is finished" in trainings.run.said, (status, trainings.run.said)
        trainings.assert_undisturbed(folder)
    print(f"seed {SEED}: {kills} kills in {rounds} trainings; {ended} had ended before")


def test_killed_at_any_moment_it_ends_with_the_weights_of_an_undisturbed_run(
    start: Start, checkpoint: Checkpoint, flags: Path, undisturbed: Callable[[Sequence[str]], Path], tmp_path: Path
) -> None:
    whole, folder = undisturbed(FULL), tmp_path / "o"
    assert not same(whole, checkpoint("vit-bert"), 1e-3)
    process = start(*called(checkpoint, flags, folder), *FULL)
    wait_for(lambda: whole_checkpoints(folder) > 0, process)
    time.sleep(random.Random(SEED + 3).uniform(0, 0.2))
    kill(process, folder)
    checkpoints = sorted(folder.glob("checkpoints/*/complete"), key=lambda path: path.stat().st_mtime)
    half = folder / "checkpoints" / "checkpoint-60"  # as if the kill had come while this one was written
    shutil.copytree(checkpoints[-1].parent, half)
    (half / "complete").unlink()
    (half / "model.safetensors").write_bytes(b"half")
    finish(start("--resume", "--output", str(folder)))
    assert_nothing_happened(folder, whole)


MOMENTS: dict[str, Moment] = {
    "within the first page of a journal": (Fault(size=300), False, 3),
    "within the second page of a journal": (Fault(size=70_000), False, 3),
    "some embeddings are committed": (Fault(before=("sql", "COMMIT"), after=3), False, 2),
    "all are, and the records not begun": (Fault(before=("sql", "DELETE FROM picture")), False, 0),
    "records are replaced, not committed": (Fault(before=("sql", "INSERT INTO meta")), False, 0),
    "the index is written, not in place": (Fault(before=("os.rename", "/text_embeds.faiss")), True, 0),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_is_brought_up_to_date_a_gallery_is_the_old_one_or_the_new(
    moment: str, galleries: Galleries
) -> None:
    assert_old_or_new_when_killed(galleries, moment, MOMENTS[moment])


@pytest.mark.parametrize("what", ["new", "update"])
def test_builds_killed_before_every_change_to_their_folder(what: str, galleries: Galleries) -> None:
    changes = galleries.first if what == "new" else galleries.update
    committed = max(row for row, change in enumerate(changes) if change == "sql COMMIT")
    for moment in range(SEED % STRIDE, len(changes), STRIDE):
        folder = galleries.root / f"{what} {moment}" if what == "new" else galleries.copy(f"{what} {moment}")
        died = galleries.build(folder, Fault(at=moment)) in KILLED
        assert died or moment > len(changes) - 5  # threads do not do the same things in the same order every time
        if what == "update":
            assert galleries.assert_old_or_new(folder) is (moment > committed) or abs(moment - committed) < 5
        galleries.assert_finishes(folder, galleries.fresh if what == "new" else None)
    print(f"{what}: killed before each {STRIDE}th of {len(changes)} changes")


@pytest.mark.parametrize("size", [1, 300, 513, 9_000, 66_000, 70_000, 140_000, 200_000, 330_000, 400_000, 530_000])
def test_updates_killed_within_a_file(size: int, galleries: Galleries) -> None:
    folder = galleries.copy(f"within {size}")
    died = galleries.build(folder, Fault(size=size)) in KILLED
    assert galleries.assert_old_or_new(folder) is not died
    galleries.assert_finishes(folder)
