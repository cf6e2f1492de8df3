"""Many items: found through the index as in memory, by folder and language, and without records in memory."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.confidence import DEFAULT_CALIBRATION, Cohort, MatchCalibrator
from alignment.gallery import Caption, Gallery, Picture
from alignment.gallery.database import KINDS, GalleryDatabase
from alignment.gallery.modality import LARGE, Modality, write_index
from alignment.gallery.records import FileFingerprint, GalleryMetadata
from alignment.gallery.writer import write_gallery
from alignment.index import EXACT_ROWS, FileIndex, LocalIndex

pytestmark = pytest.mark.usefixtures("rough_tuning")

MANY = EXACT_ROWS + 404
DIM = 24


class Encoder:
    """What `Gallery.load` needs of the model."""

    name, fingerprint = "some/model", "f00d" * 16


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pictures(count: int) -> list[Picture]:
    """In folders of 100, two deep, with a few at the top."""
    sources = [f"{row}.jpg" if row < 5 else f"trip {row % 3}/{row // 100}/{row}.jpg" for row in range(count)]
    return [Picture(f"p{row}", source, file=FileFingerprint(1, 1, f"{row:064x}")) for row, source in enumerate(sources)]


def captions(count: int) -> list[Caption]:
    return [Caption(f"c{row}", f"caption {row}", ("en", "zh", "")[row % 3]) for row in range(count)]


def gallery(count: int = MANY, logit_bias: float | None = None) -> Gallery:
    metadata = GalleryMetadata(Encoder.fingerprint, Encoder.name, 20.0, logit_bias, judged_by="borrowed")
    metadata = replace(metadata, calibration=DEFAULT_CALIBRATION.to_dict())
    cohort = Cohort(unit(30, DIM, seed=8).half().float(), unit(40, DIM, seed=9).half().float())
    embeds = unit(count, DIM).half(), unit(20, DIM, seed=1).half()
    judge = MatchCalibrator(DEFAULT_CALIBRATION, cohort)
    return Gallery(pictures(count), captions(20), *embeds, metadata, judge=judge)


def save(made: Gallery, folder: Path) -> None:
    embeds = {"picture": [made.images.embeds], "caption": [made.texts.embeds]}
    cohort = made.judge.cohort.tensors() if made.judge else {}
    write_gallery(folder, made.pictures, made.captions, embeds, DIM, made.metadata, cohort)


def load(folder: Path) -> Gallery:
    return Gallery.load(folder, Encoder())  # type: ignore[arg-type]


def write_indexes(folder: Path) -> None:
    """As the end of a build does."""
    database = GalleryDatabase(folder)
    for kind in KINDS:
        write_index(database, kind)
    database.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    save(gallery(), folder)
    write_indexes(folder)
    return folder


def test_only_the_pictures_have_an_index_as_the_captions_are_few(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["gallery.db", "image_embeds.faiss"]


def test_a_gallery_is_loaded_as_it_was_saved(saved: Path) -> None:
    loaded, made = load(saved), gallery()
    assert list(loaded.pictures) == list(made.pictures)
    assert list(loaded.captions) == list(made.captions)
    assert loaded.metadata == made.metadata
    rows = torch.tensor([4000, 3, 3, 17])
    torch.testing.assert_close(loaded.images[rows], made.images[rows], atol=1e-3, rtol=0)
    torch.testing.assert_close(loaded.images[rows].norm(dim=1), torch.ones(4), atol=2**-11, rtol=0)
    torch.testing.assert_close(loaded.images.embeds, made.images.embeds, atol=1e-3, rtol=0)


def test_the_index_is_tuned_by_the_captions_of_the_cohort(tmp_path: Path) -> None:
    made, texts = gallery(), unit(300, DIM, seed=9).half()
    made.judge = MatchCalibrator(DEFAULT_CALIBRATION, Cohort(unit(30, DIM, seed=8), texts.float()))
    save(made, tmp_path)
    write_indexes(tmp_path)
    path = tmp_path / "image_embeds.faiss"
    stamp = json.loads(path.read_bytes()[8:4096])["stamp"]
    FileIndex.write(tmp_path / "expected", [made.images.embeds], stamp, texts)
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("tag", [None, "trip 1", "trip 2/7", "nowhere"])
def test_the_index_answers_as_the_search_of_all_in_memory(saved: Path, tag: str | None) -> None:
    loaded, made = load(saved), gallery()
    for query in unit(8, DIM, seed=5):
        one, other = (side.search_images(query, 12, tag=tag) for side in (made, loaded))
        assert [match.item.id for match in one.matches] == [match.item.id for match in other.matches]
        assert [match.rank for match in other.matches] == list(range(1, len(other.matches) + 1))
        for what in ("similarity", "probability"):
            said = [[getattr(match, what) for match in answer.matches] for answer in (one, other)]
            assert said[0] == pytest.approx(said[1], abs=2e-3)
        assert (one.fits, len(one.duplicates)) == (other.fits, len(other.duplicates))


def test_folders_and_languages_are_counted_alike(saved: Path) -> None:
    loaded, made = load(saved), gallery()
    assert dict(loaded.pictures.tags) == dict(made.pictures.tags)
    assert loaded.pictures.tags["trip 2"] == sum(picture.source.startswith("trip 2/") for picture in pictures(MANY))
    assert "" not in loaded.pictures.tags
    assert loaded.languages == ("en", "zh")
    assert [side.texts.count("") for side in (loaded, made)] == [6, 6]


@pytest.mark.parametrize("bias", [None, -5.0])
def test_shares_of_many_are_near_those_over_all(tmp_path: Path, bias: float | None) -> None:
    made = gallery(LARGE + 500, bias)
    logits = 20 * made.images.embeds @ unit(DIM, seed=5) + (bias or 0.0)
    exact = logits.softmax(0) if bias is None else logits.sigmoid()
    found = made.search_images(unit(DIM, seed=5), 12)
    for match in found.matches:
        assert match.share == pytest.approx(float(exact[int(match.item.id[1:])]), rel=0.15 if bias is None else 1e-4)


def test_duplicates_are_listed_beside_more_results_that_differ() -> None:
    made = gallery()
    copies = torch.nn.functional.normalize(made.images.embeds[:1] + 0.01 * unit(300, DIM, seed=3), dim=-1)
    embeds = torch.cat([copies, made.images.embeds[300:]])
    many = Gallery(made.pictures, made.captions, embeds, made.texts, made.metadata, judge=made.judge)
    found = many.search_images(made.images.embeds[0], 12)
    assert len(found.duplicates) == 12
    assert len(found.duplicates[0]) == 300


def test_rows_of_no_item_are_skipped_in_favour_of_items() -> None:
    embeds = unit(60, DIM)
    kept = torch.arange(0, 60, 3)
    modality: Modality[Picture] = Modality(gallery(20).pictures, LocalIndex(embeds), kept)
    scores, positions = modality.search(embeds[1], 10, 15)
    expected = (embeds[kept] @ embeds[1]).sort(descending=True)
    assert positions.tolist()[:10] == expected.indices[:10].tolist()
    torch.testing.assert_close(scores[:10], expected.values[:10])
    torch.testing.assert_close(modality[torch.tensor([3])][0], embeds[9])


# ---------------------------------------------------------------- an index that is missing, damaged or of other items


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_another(path: Path) -> None:
    other = path.parent.parent / "other"
    save(Gallery(pictures(MANY)[::-1], (), unit(MANY, DIM), unit(0, DIM), gallery(5).metadata), other)
    write_indexes(other)
    shutil.copy(other / path.name, path)


@pytest.mark.parametrize("spoil", [Path.unlink, cut, replace_by_another])
def test_an_index_that_is_not_of_this_gallery_is_not_used_and_the_next_build_makes_it(
    saved: Path, tmp_path: Path, spoil: object
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    spoil(folder / "image_embeds.faiss")  # type: ignore[operator]
    query = unit(DIM, seed=5)
    expected = [match.item.id for match in gallery().search_images(query, 12).matches]
    assert [match.item.id for match in load(folder).search_images(query, 12).matches] == expected
    write_indexes(folder)
    assert (folder / "image_embeds.faiss").stat().st_size == (saved / "image_embeds.faiss").stat().st_size
    assert [match.item.id for match in load(folder).search_images(query, 12).matches] == expected


def test_an_index_is_kept_while_the_items_are_the_same_and_deleted_when_few_are_left(
    saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    before = (folder / "image_embeds.faiss").stat()
    renamed = replace(gallery().metadata, options="--format csv")
    made = gallery()
    save(Gallery(made.pictures, made.captions, made.images, made.texts, renamed, judge=made.judge), folder)
    write_indexes(folder)
    assert (folder / "image_embeds.faiss").stat().st_mtime_ns == before.st_mtime_ns
    save(gallery(50), folder)
    write_indexes(folder)
    assert not (folder / "image_embeds.faiss").exists()


# ---------------------------------------------------------------- records


def test_records_are_read_when_they_are_asked_for(saved: Path) -> None:
    loaded = load(saved)
    assert loaded.pictures[7] == pictures(8)[7]
    assert loaded.pictures[-1].id == f"p{MANY - 1}"
    assert [picture.id for picture in loaded.pictures[10:30:10]] == ["p10", "p20"]
    assert loaded.pictures.find("p4321") == pictures(4322)[4321]
    assert loaded.pictures.find("unknown") is None
    assert loaded.images.embed("unknown") is None
    torch.testing.assert_close(loaded.images.embed("p17"), gallery(18).images[torch.tensor([17])][0], atol=1e-3, rtol=0)
    with pytest.raises(IndexError):
        loaded.pictures[MANY]
