"""A gallery of many items: found as in a small one, kept in an index, brought up to date without writing it again."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from alignment.calibration import BORROWED, Background
from alignment.catalogue import Caption, FileState, Picture, Stamp
from alignment.gallery.storage import folders_of, item_ids
from PIL import Image
from torch import Tensor

from alignment.gallery import BuildReport, Gallery, Judge, build_gallery, sides, storage
from alignment.index import EXACT_ROWS, EmbeddedIndex
from alignment.model import DualEncoder

MANY = EXACT_ROWS + 404
DIM = 24


class Encoder:
    """What `Gallery.load` wants to know of the model."""

    name, fingerprint = "some/model", "f00d" * 16


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pictures(count: int) -> list[Picture]:
    """In folders of 100, three deep, with a few at the top."""
    sources = [f"{row}.jpg" if row < 5 else f"trip {row % 3}/{row // 100}/{row}.jpg" for row in range(count)]
    return [Picture(f"p{row}", source, file=FileState(1, 1, f"sha{row}")) for row, source in enumerate(sources)]


def captions(count: int) -> list[Caption]:
    return [Caption(f"c{row}", f"caption {row}", ("en", "zh", "")[row % 3]) for row in range(count)]


def gallery(count: int = MANY, logit_bias: float | None = None, *, judged: bool = False) -> Gallery:
    stamp = Stamp(Encoder.fingerprint, Encoder.name, 20.0, logit_bias)
    judge = Judge(BORROWED, Background(unit(30, DIM, seed=8), unit(40, DIM, seed=9))) if judged else None
    if judge:
        stamp = replace(stamp, calibration=BORROWED.to_dict(), judged_by="borrowed")
    embeds = unit(count, DIM).half(), unit(20, DIM, seed=1).half()
    return Gallery(pictures(count), captions(20), *embeds, stamp, judge=judge)


def load(folder: Path) -> Gallery:
    return Gallery.load(folder, Encoder())  # type: ignore[arg-type]


def files(folder: Path, pattern: str = "image_embeds-*/*.safetensors") -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob(pattern)}


# ---------------------------------------------------------------- where it lies


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    gallery(judged=True).save(folder)
    return folder


def test_many_pictures_lie_in_an_index_and_few_captions_with_the_catalogue(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "captions.jsonl",
        "embeddings.safetensors",
        "gallery.json",
        "image_embeds-f00df00df00d",
        "pictures.jsonl",
    ]
    assert (saved / "embeddings.safetensors").stat().st_size < 100 * DIM * 2 + 4096
    loaded = load(saved)
    assert "embeds" not in vars(loaded.images)  # nothing has read them into memory
    assert "embeds" in vars(loaded.texts)


def test_it_is_loaded_as_it_was_saved(saved: Path) -> None:
    loaded, made = load(saved), gallery(judged=True)
    assert loaded.pictures == made.pictures
    assert loaded.captions == made.captions
    assert loaded.stamp == made.stamp
    rows = torch.tensor([4000, 3, 3, 17])
    torch.testing.assert_close(loaded.images[rows], made.images[rows], atol=1e-3, rtol=0)
    torch.testing.assert_close(loaded.image_embeds, made.image_embeds, atol=1e-3, rtol=0)
    torch.testing.assert_close(loaded.images[rows].norm(dim=1), torch.ones(4))


def test_writing_it_twice_gives_the_same_files(saved: Path, tmp_path: Path) -> None:
    gallery(judged=True).save(tmp_path)
    names = [path.relative_to(saved) for path in sorted(saved.rglob("*")) if path.is_file()]
    assert names == [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    rows = [name for name in names if name.parent.name and name.suffix == ".safetensors"]
    assert len(rows) == 1
    assert (saved / rows[0]).read_bytes() == (tmp_path / rows[0]).read_bytes()


def test_an_index_that_is_written_in_several_goes_holds_the_same(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_AT_ONCE", 500)
    monkeypatch.setattr(storage, "_IN_MEMORY", 2000)
    gallery(judged=True).save(tmp_path)
    one, other = load(saved), load(tmp_path)
    assert torch.equal(one.image_embeds, other.image_embeds)
    assert one.folders == other.folders
    query = unit(DIM, seed=5)
    found = [side.search_images(query, 12, tag="trip 1").matches for side in (one, other)]
    assert [match.item.id for match in found[0]] == [match.item.id for match in found[1]]


def test_both_sides_may_be_many_or_few(tmp_path: Path) -> None:
    texts = unit(MANY, DIM, seed=1).half()
    stamp = Stamp(Encoder.fingerprint, Encoder.name, 20.0, None)
    Gallery(pictures(9), captions(MANY), unit(9, DIM), texts, stamp).save(tmp_path)
    assert [path.name for path in tmp_path.glob("*-*")] == ["text_embeds-f00df00df00d"]
    found = load(tmp_path).search_captions(texts[5].float(), 3, lang="")
    assert found.matches[0].item.id == "c5"
    gallery(9).save(tmp_path)
    assert not list(tmp_path.glob("*-*"))  # it has become small
    assert len(load(tmp_path).pictures) == 9
    gallery().save(tmp_path)
    assert len(load(tmp_path).pictures) == MANY


# ---------------------------------------------------------------- search


@pytest.mark.parametrize("logit_bias", [None, -3.0])
def test_results_are_those_of_a_gallery_in_memory(
    logit_bias: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = gallery(logit_bias=logit_bias, judged=True)
    made.save(tmp_path)
    loaded = load(tmp_path)
    for query in unit(10, DIM, seed=5):
        found = loaded.search_images(query, 12)
        with monkeypatch.context() as patch:
            patch.setattr(sides, "EXACT_ROWS", 10**6)  # everything is weighed
            expected = made.search_images(query, 12)
            shares = [match.share for match in expected.matches]
        assert [match.item.id for match in found.matches] == [match.item.id for match in expected.matches]
        assert [match.rank for match in found.matches] == list(range(1, 13))
        similarity = [match.similarity for match in expected.matches]
        assert [match.similarity for match in found.matches] == pytest.approx(similarity, abs=1e-3)
        assert [match.share for match in found.matches] == pytest.approx(
            shares, rel=0.1 if logit_bias is None else 0.05
        )
        probabilities = [match.probability for match in expected.matches]
        assert [match.probability for match in found.matches] == pytest.approx(probabilities, abs=0.01)
        assert (found.fits, len(found.groups)) == (expected.fits, len(expected.groups))


def test_shares_are_estimated_without_favour(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many queries, what is estimated of the softmax is neither too much nor too little."""
    side, ratios = load(saved).images, []
    for query in unit(60, DIM, seed=6):
        found, _ = side.search(query, 12, 60)
        estimate = side.shares(query, found, 20.0, None)
        with monkeypatch.context() as patch:
            patch.setattr(sides, "EXACT_ROWS", 10**6)
            exact = side.shares(query, found, 20.0, None)[: len(found)]
        ratios.append(float(estimate[0] / exact[0]))
    assert np.mean(ratios) == pytest.approx(1, abs=0.06)
    assert np.quantile(np.abs(np.array(ratios) - 1), 0.9) < 0.2


def test_equal_pictures_keep_their_order(tmp_path: Path) -> None:
    embeds = unit(1, DIM).repeat(MANY, 1)
    stamp = Stamp(Encoder.fingerprint, Encoder.name, 20.0, None)
    Gallery(pictures(MANY), [], embeds, torch.empty(0, DIM), stamp).save(tmp_path)
    side = load(tmp_path).images
    scores, rows = side.search(unit(DIM), MANY, MANY)
    assert rows.tolist() == list(range(MANY))
    assert len(scores.unique()) == 1


def test_pictures_that_are_nearly_the_same_are_folded_even_if_they_are_very_many(tmp_path: Path) -> None:
    copies, others = unit(1, DIM).repeat(400, 1), unit(MANY - 400, DIM, seed=3)
    made = gallery(judged=True)
    made = Gallery(made.pictures, made.captions, torch.cat([copies, others]), made.texts, made.stamp, judge=made.judge)
    made.save(tmp_path)
    found = load(tmp_path).search_images(unit(1, DIM)[0], 12)
    assert len(found.groups) == 12  # though the best four hundred are one
    first, *rest = [{match.item.id for match in group} for group in found.groups]
    everywhere = {f"p{row}" for row in range(400)}
    assert first == everywhere
    assert not any(group & everywhere for group in rest)


@pytest.mark.parametrize("where", ["memory", "index"])
def test_only_the_pictures_of_a_folder_compete(where: str, saved: Path) -> None:
    found_in = gallery(judged=True) if where == "memory" else load(saved)
    query = unit(DIM, seed=5)
    for folder in ("trip 1", "trip 1/7"):
        inside = [row for row, picture in enumerate(found_in.pictures) if picture.source.startswith(folder + "/")]
        assert found_in.folders[folder] == len(inside)
        order = sorted(inside, key=lambda row: -float(found_in.image_embeds[row] @ query))[:9]
        found = found_in.search_images(query, 9, tag=folder)
        assert [match.item.id for match in found.matches] == [f"p{row}" for row in order]
        weights = (20 * (found_in.image_embeds[inside] @ query)).softmax(0)
        assert found.matches[0].share == pytest.approx(float(weights.max()), rel=1e-3)
    assert found_in.search_images(query, 9, tag="nowhere").matches == ()
    assert "" not in found_in.folders
    assert sum(count for folder, count in found_in.folders.items() if "/" not in folder) == MANY - 5


@pytest.mark.parametrize(
    ("source", "folders"),
    [
        ("beach.jpg", []),
        ("holiday/2024/beach.jpg", ["holiday/2024", "holiday"]),
        ("/far/away/beach.jpg", []),
        ("package:skimage/data/chelsea.png", []),
    ],
)
def test_folders_are_those_below_the_source(source: str, folders: list[str]) -> None:
    assert folders_of(source) == folders


# ---------------------------------------------------------------- brought up to date


def changed(made: Gallery) -> Gallery:
    """Take 3 pictures out, add 4, and change the file of one."""
    some = [*made.pictures[3:], *(Picture(f"new{row}", f"new/{row}.jpg") for row in range(4))]
    embeds = torch.cat([made.image_embeds[3:], unit(4, DIM, seed=7)])
    some[10] = replace(some[10], file=FileState(2, 2, "other"))
    embeds[10] = unit(DIM, seed=8)
    return Gallery(some, made.captions, embeds, made.texts, made.stamp)


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    made = gallery()
    made.save(tmp_path)
    before = files(tmp_path)
    after = changed(made)
    after.save(tmp_path)
    now = files(tmp_path)
    assert before.items() <= now.items()
    assert len(now) == 2
    loaded = load(tmp_path)
    assert loaded.pictures == after.pictures
    torch.testing.assert_close(loaded.image_embeds, after.image_embeds, atol=1e-3, rtol=0)
    assert loaded.search_images(unit(DIM, seed=8), 1).matches[0].item == after.pictures[10]
    assert loaded.folders["new"] == 4


class Killed(BaseException):
    pass


def test_whoever_is_killed_leaves_the_old_gallery_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue's files count at one stroke, though they are moved one after the other."""
    made = gallery()
    made.save(tmp_path / "before")
    after = changed(made)
    outcomes = []
    for survived in range(30):
        folder = tmp_path / str(survived)
        shutil.copytree(tmp_path / "before", folder)
        survivors = iter(range(survived))

        def dying(move: Callable[..., None], survivors: Iterator[int] = survivors) -> Callable[..., None]:
            def die(*names: object) -> None:
                if next(survivors, None) is None:
                    raise Killed
                move(*names)

            return die

        monkeypatch.setattr(os, "replace", dying(os.replace))
        monkeypatch.setattr(os, "rename", dying(os.rename))
        try:
            after.save(folder)
            finished = True
        except Killed:
            finished = False
        monkeypatch.undo()
        loaded = load(folder)
        expected = {len(made.pictures): made, len(after.pictures): after}[len(loaded.pictures)]
        assert loaded.pictures == expected.pictures
        torch.testing.assert_close(loaded.image_embeds, expected.image_embeds, atol=1e-3, rtol=0)
        outcomes.append(expected is after)
        after.save(folder)
        assert load(folder).pictures == after.pictures
        if finished:
            break
    assert finished
    first = outcomes.index(True)
    assert 2 < first < len(outcomes) - 4  # rows and the index's list come before, the catalogue's four files after
    assert outcomes == [False] * first + [True] * (len(outcomes) - first)


def test_another_models_index_is_taken_away_only_when_the_new_one_is_there(tmp_path: Path) -> None:
    gallery().save(tmp_path)
    made = gallery()
    other = replace(made.stamp, fingerprint="beef" * 16)
    Gallery(made.pictures, made.captions, unit(MANY, 8), unit(20, 8), other).save(tmp_path)
    assert [path.name for path in tmp_path.glob("*-*")] == ["image_embeds-beefbeefbeef"]
    with pytest.raises(ValueError, match="cannot be compared"):
        load(tmp_path)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: shutil.rmtree(next(folder.glob("image_embeds-*"))),
        lambda folder: next(folder.glob("image_embeds-*/*.safetensors")).write_bytes(b"version https://git-lfs"),
        lambda folder: EmbeddedIndex.open(next(folder.glob("image_embeds-*"))).save(about={"fingerprint": "beef"}),
        lambda folder: lose_a_row(next(folder.glob("image_embeds-*"))),
    ],
    ids=["missing", "LFS pointer", "another model", "a row is lost"],
)
def test_a_damaged_index_is_an_error_that_says_what_to_run(
    harm: Callable[[Path], object], saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "gallery"
    shutil.copytree(saved, folder)
    harm(folder)
    with pytest.raises(ValueError, match=r"is damaged\. .*python -m alignment\.gallery build"):
        load(folder)
    gallery(judged=True).save(folder)  # and it can be written anew
    assert len(load(folder).pictures) == MANY


def lose_a_row(folder: Path) -> None:
    index = EmbeddedIndex.open(folder)
    index.delete(index.ids()[:1])
    index.save()


def test_pictures_of_a_missing_package_are_not_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = gallery()
    some = [replace(picture, source="package:not_installed_here/a.png") for picture in made.pictures[:6]]
    Gallery([*some, *made.pictures[6:]], [], made.images, torch.empty(0, DIM), made.stamp).save(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = load(tmp_path)
    assert "6 pictures of the package not_installed_here" in caplog.text
    assert len(loaded.pictures) == MANY - 6
    for row in (0, 7):
        found = loaded.search_images(made.image_embeds[row], 1).matches[0]
        assert (found.item.id == f"p{row}") is (row == 7)


def test_rows_are_named_by_what_they_belong_to() -> None:
    first = Picture("p", "a.jpg", file=FileState(1, 1, "x"))
    ids = item_ids([first, replace(first, file=FileState(1, 1, "y")), replace(first, file=FileState(9, 9, "x"))])
    assert ids[0] != ids[1]  # another content
    assert item_ids([first])[0] == ids[0]
    assert ids[2] == item_ids([first, first])[1]  # size and time say nothing; the second of two equal ones
    assert len(ids.unique()) == 3
    assert (ids >= 0).all()
    assert item_ids([Caption("c", "a", "en")]) != item_ids([Caption("c", "a", "zh")])


# ---------------------------------------------------------------- built by a model


def test_a_large_gallery_is_built_and_brought_up_to_date(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "EXACT_ROWS", 3)  # four are many
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    source, out = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    rng = np.random.default_rng(0)
    for row in range(6):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(source / f"{row}.png")
    built = build_gallery(source, out, encoder, calibrate=False)
    assert [path.name for path in out.glob("*-*")] == [f"image_embeds-{encoder.fingerprint[:12]}"]
    before = files(out)
    expected = encoder.encode_images([picture.path for picture in built.pictures])
    torch.testing.assert_close(built.image_embeds, expected, atol=1e-3, rtol=0)
    (source / "0.png").unlink()
    Image.new("RGB", (48, 48), "red").save(source / "red.png")
    report = BuildReport()
    again = build_gallery(source, out, encoder, calibrate=False, report=report)
    assert (report.encoded["pictures"], report.reused["pictures"]) == (1, 5)
    assert before.items() <= files(out).items()
    expected = encoder.encode_images([picture.path for picture in again.pictures])
    torch.testing.assert_close(again.image_embeds, expected, atol=1e-3, rtol=0)
    assert json.loads((out / "gallery.json").read_text())["num_pictures"] == 6


# ---------------------------------------------------------------- rows of others


def test_rows_that_belong_to_nobody_are_overlooked() -> None:
    """As on a server, where another version of the gallery may have its rows beside these."""
    embeds = unit(300, DIM)
    index = EmbeddedIndex(embeds, ids=torch.arange(300) * 10, tags=[["all"]] * 300)
    own = torch.arange(0, 300, 3).flip(0)
    tagged = [["even"] if row % 2 == 0 else ["odd"] for row in range(100)]
    side = sides.Side(index, own * 10, lambda: tagged)
    assert len(side) == 100
    assert side.tags == {"even": 50, "odd": 50}
    torch.testing.assert_close(side.embeds, embeds[own])
    for query in unit(10, DIM, seed=5):
        scores, places = side.search(query, 7, 9)
        expected = sorted(range(100), key=lambda place: -float(embeds[own[place]] @ query))
        assert places[:7].tolist() == expected[:7]
        assert len(scores) == len(places) <= 9
        assert side.search(query, 100, 400)[1].tolist() == expected
    assert sides.Side(index, own[:0]).search(unit(DIM), 3, 3)[1].tolist() == []
    assert side._draw_sample("even").shape == (50, DIM)
