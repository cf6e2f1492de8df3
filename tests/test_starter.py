"""The starter gallery: it is up to date, can be shown everywhere, and its captions are many and distinct."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.nn import functional

from alignment.gallery import Caption, Gallery, Picture
from alignment.gallery.database import DATABASE, GalleryDatabase
from alignment.gallery.records import read_hand_written
from alignment.model import DualEncoder
from alignment.preprocess import open_image

ROOT = Path(__file__).parents[1]
STARTER, COMPACT = ROOT / "assets" / "gallery", ROOT / "checkpoints" / "compact"


# ---------------------------------------------------------------- the starter gallery


def tokens(text: str, lang: str) -> frozenset[str]:
    """Normalise a caption to what it says: pairs of characters in Chinese, words without endings in English."""
    if lang == "zh":
        text = "".join(re.findall(r"[\u4e00-\u9fffa-z0-9]", text.lower()))
        return frozenset(text[start : start + 2] for start in range(len(text) - 1))
    words = (re.sub(r"'s$|ing$|es$|s$|ed$", "", word) for word in re.findall(r"[a-z']+", text.lower()))
    words = (re.sub(r"(.)\1$", r"\1", word) for word in words)  # "runn" of running
    small = "a an the are of in on at to with and for from by over under into onto near beside behind its his her their"
    return frozenset(words) - frozenset(small.split())


def near_duplicates(captions: list[Caption], lang: str, limit: float = 0.45) -> Iterator[tuple[str, str]]:
    """Find pairs whose tokens overlap (Jaccard) by more than the limit."""
    bags = [tokens(caption.text, lang) for caption in captions]
    places = {token: place for place, token in enumerate(sorted(set().union(*bags)))}
    told = [(row, places[token]) for row, bag in enumerate(bags) for token in bag]
    matrix = sparse.csr_matrix((np.ones(len(told)), tuple(zip(*told, strict=True))), (len(bags), len(places)))
    both = sparse.triu(matrix @ matrix.T, k=1).tocoo()  # products of sets: what two captions share
    size = np.array([len(bag) for bag in bags])
    alike = both.data > limit * (size[both.row] + size[both.col] - both.data)
    for first, second in zip(both.row[alike], both.col[alike], strict=True):
        yield captions[first].text, captions[second].text


@pytest.fixture(scope="module")
def starter() -> tuple[list[Picture], list[Caption]]:
    return read_hand_written(STARTER / "sources")


def test_the_starter_gallery_is_up_to_date(starter: tuple[list[Picture], list[Caption]]) -> None:
    """Fails while it is stale; `make gallery` mends that."""
    encoder = DualEncoder.load(COMPACT, device="cpu")
    gallery = Gallery.load(STARTER, encoder)
    assert list(gallery.pictures) == starter[0]
    assert list(gallery.captions) == starter[1]
    some = slice(None, None, 250)
    texts = torch.stack(
        [encoder.encode_texts(caption.translations or [caption.text]).mean(0) for caption in starter[1][some]]
    )
    assert functional.cosine_similarity(texts, gallery.texts.embeds[some]).min() > 0.999
    images = encoder.encode_images([picture.path for picture in gallery.pictures[::6]])
    assert functional.cosine_similarity(images, gallery.images.embeds[::6]).min() > 0.999


def test_the_starter_gallery_names_no_place_on_the_machine_it_was_made_on() -> None:
    database = GalleryDatabase(STARTER)
    assert database.metadata.source == str(STARTER / "sources")  # it is stored relative to the gallery
    pictures = database.pictures(database.ids("picture").tolist())
    assert all(picture.package for picture in pictures)  # a package is found on each machine
    assert str(ROOT).encode() not in (STARTER / DATABASE).read_bytes()


def test_the_starter_gallery_is_sound_and_not_too_large() -> None:
    assert GalleryDatabase(STARTER).check() == []
    assert (STARTER / DATABASE).stat().st_size < 30 * 2**20
    assert {path.name for path in STARTER.iterdir()} == {"README.md", "sources", DATABASE}


def test_every_starter_picture_can_be_opened(starter: tuple[list[Picture], list[Caption]]) -> None:
    sizes = [open_image(picture.path).size for picture in starter[0]]
    assert len(sizes) >= 20
    assert min(min(size) for size in sizes) >= 150


def test_the_packages_of_starter_pictures_are_requirements(starter: tuple[list[Picture], list[Caption]]) -> None:
    names = re.findall(r"^[A-Za-z0-9-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    required = {name.lower() for name in names}
    distributions = packages_distributions()
    for package in sorted({picture.package for picture in starter[0]}):
        assert package, "the starter gallery holds no files of its own"
        own = package == "alignment"  # the drawings
        assert own or required.intersection(name.lower() for name in distributions.get(package, [])), package


def test_starter_pictures_are_described_in_both_languages_and_credited(
    starter: tuple[list[Picture], list[Caption]],
) -> None:
    assert all(set(picture.captions) == {"en", "zh"} and picture.credit for picture in starter[0])
    assert len({picture.source for picture in starter[0]}) == len(starter[0])


def test_the_starter_captions_are_thousands_of_scenes_in_both_languages(
    starter: tuple[list[Picture], list[Caption]],
) -> None:
    scenes = Counter(caption.scene for caption in starter[1] if caption.topic)
    assert len(scenes) >= 6000
    assert set(scenes.values()) == {2}
    for lang in ("en", "zh"):
        assert sum(caption.lang == lang and bool(caption.topic) for caption in starter[1]) == len(scenes)
    topics = Counter(caption.topic for caption in starter[1] if caption.topic)
    assert len(topics) >= 15
    assert min(topics.values()) >= 50


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_no_two_starter_captions_are_alike(lang: str, starter: tuple[list[Picture], list[Caption]]) -> None:
    assert list(near_duplicates([caption for caption in starter[1] if caption.lang == lang], lang)) == []


def test_the_measure_of_likeness_finds_what_it_should() -> None:
    english = ["Two dogs are running on a beach.", "A dog runs on the beach.", "A cat sleeps."]
    assert len(list(near_duplicates([Caption(str(i), text) for i, text in enumerate(english)], "en"))) == 1
    chinese = ["穿校服的小学生手拉手过马路。", "戴小黄帽的小学生手拉手过马路。", "一只猫在睡觉。"]
    assert len(list(near_duplicates([Caption(str(i), text) for i, text in enumerate(chinese)], "zh"))) == 1


def test_starter_captions_are_punctuated_alike(starter: tuple[list[Picture], list[Caption]]) -> None:
    bank = [caption for caption in starter[1] if caption.topic]
    form = {"en": r"[A-Z0-9][A-Za-z0-9 ,'éñ-]+\.", "zh": r"[\u4e00-\u9fffA-Z0-9，、]+。"}
    assert [caption.text for caption in bank if not re.fullmatch(form[caption.lang], caption.text)] == []
