"""Search in a gallery in memory, and the refusal of galleries of another model."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_gallery_build import encoder, other, photos

from alignment.gallery import Caption, Gallery, Picture, build_gallery, main
from alignment.gallery.records import PICTURES, GalleryMetadata
from alignment.gallery.writer import write_gallery
from alignment.model import DualEncoder
from alignment.preprocess import open_image

__all__ = ["encoder", "other", "photos"]


# ---------------------------------------------------------------- search


def by_hand(logit_bias: float | None = None) -> Gallery:
    """Two-dimensional embeddings whose cosines can be read off."""
    pictures = [Picture(name, f"{name}.jpg") for name in "abc"]
    captions = [
        Caption("1.en", "one", "en", "1"),
        Caption("1.zh", "一", "zh", "1"),
        Caption("2.en", "two", "en", "2"),
        Caption("3", "???"),
    ]
    image_embeds = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    text_embeds = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]])
    return Gallery(pictures, captions, image_embeds, text_embeds, GalleryMetadata("f", "m", 2.0, logit_bias))


def test_pictures_come_best_first_with_cosine_and_softmax_over_all_pictures() -> None:
    matches = by_hand().search_images(torch.tensor([1.0, 0.0]), 2).matches
    assert [(match.rank, match.item.id) for match in matches] == [(1, "a"), (2, "b")]
    assert [match.similarity for match in matches] == pytest.approx([1.0, 0.6])
    weights = torch.tensor([2.0 * 1.0, 2.0 * 0.6, 2.0 * 0.0]).exp()
    assert [match.share for match in matches] == pytest.approx((weights / weights.sum())[:2].tolist())


def test_a_model_with_a_bias_judges_every_candidate_by_itself() -> None:
    matches = by_hand(logit_bias=-1.0).search_images(torch.tensor([1.0, 0.0]), 3).matches
    expected = torch.sigmoid(2.0 * torch.tensor([1.0, 0.6, 0.0]) - 1.0)
    assert [match.share for match in matches] == pytest.approx(expected.tolist())


def test_only_captions_of_the_language_compete() -> None:
    gallery, query = by_hand(), torch.tensor([1.0, 0.0])
    assert [match.item.id for match in gallery.search_captions(query, 9).matches] == ["1.en", "1.zh", "3", "2.en"]
    english = gallery.search_captions(query, 9, lang="en").matches
    assert [match.item.id for match in english] == ["1.en", "2.en"]
    assert sum(match.share for match in english) == pytest.approx(1.0)
    assert [match.share for match in gallery.search_captions(query, 1, lang="zh").matches] == [1.0]
    assert gallery.search_captions(query, 3, lang="fr").matches == ()
    assert gallery.languages == ("en", "zh")


def test_captions_that_say_the_same_are_folded_and_the_list_stays_full() -> None:
    angles = torch.arange(30.0)
    embeds = torch.stack([(0.05 * angles).cos(), (0.05 * angles).sin()], dim=1)
    embeds = torch.cat([embeds[:1].repeat(50, 1), embeds])  # fifty times the same comes first
    captions = [Caption(f"c{row}", f"{row}", "en") for row in range(len(embeds))]
    gallery = Gallery([], captions, embeds[:0], embeds, GalleryMetadata("f", "m", 2.0, None))
    found = gallery.search_captions(torch.tensor([1.0, 0.0]), 4)
    assert [len(group) for group in found.duplicates[:2]] == [
        60,
        10,
    ]  # 0.45 rad have a cosine of 0.900, 0.5 rad of 0.878
    assert [group[0].item.id for group in found.duplicates] == ["c0", "c60", "c70"]
    assert [match.item.id for match in found.matches] == ["c0", "c1", "c2", "c3"]  # the ranking itself is as it was


def test_a_query_may_be_one_row_and_a_k_beyond_the_gallery_gives_all() -> None:
    gallery = by_hand()
    assert (
        gallery.search_images(torch.tensor([[0.0, 1.0]]), 99).matches
        == gallery.search_images(torch.tensor([0.0, 1.0]), 3).matches
    )
    assert gallery.search_images(torch.tensor([0.0, 1.0]), 0).matches == ()


def test_equal_pictures_keep_their_order() -> None:
    embeds = torch.tensor([[0.6, 0.8]]).repeat(50, 1)
    pictures = [Picture(str(number), "x.jpg") for number in range(50)]
    gallery = Gallery(pictures, [], embeds, torch.zeros(0, 2), GalleryMetadata("f", "m", 100.0, None))
    assert [match.item.id for match in gallery.search_images(torch.tensor([1.0, 0.0]), 50).matches] == list(
        map(str, range(50))
    )


def test_an_empty_side_finds_nothing() -> None:
    gallery = Gallery([], [], torch.zeros(0, 2), torch.zeros(0, 2), GalleryMetadata("f", "m", 1.0, None))
    assert gallery.search_images(torch.tensor([1.0, 0.0]), 3).matches == ()
    assert gallery.search_captions(torch.tensor([1.0, 0.0]), 3).matches == ()


@pytest.mark.parametrize(("query", "k"), [(torch.zeros(2, 2), 1), (torch.zeros(3), 1), (torch.zeros(2), -1)])
def test_queries_that_do_not_fit_are_refused(query: torch.Tensor, k: int) -> None:
    with pytest.raises(ValueError, match="one embedding"):
        by_hand().search_images(query, k)


def test_every_item_needs_an_embedding() -> None:
    with pytest.raises(ValueError, match="1 items have 2 embeddings"):
        Gallery([Picture("a", "a.jpg")], [], torch.zeros(2, 2), torch.zeros(0, 2), GalleryMetadata("f", "m", 1.0, None))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_probabilities_are_those_of_the_model(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path, pictures: list[Image.Image]
) -> None:
    encoder = DualEncoder.load(checkpoint(name), device="cpu")
    source = tmp_path / "source"
    source.mkdir()
    texts = ["a dog runs on the beach", "pasta", "two cats"]
    with (source / PICTURES).open("w") as file:
        for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            picture.save(source / f"{number}.png")
            file.write(json.dumps({"id": f"p{number}", "source": f"{number}.png", "en": text}) + "\n")
    gallery = build_gallery(source, tmp_path / "out", encoder)
    inputs = {**encoder.preprocessor.images([open_image(p) for p in pictures]), **encoder.preprocessor.texts(texts)}
    with torch.no_grad():
        logits = encoder.module(**inputs).logits_per_image
    expected = logits.sigmoid() if name == "siglip" else logits.softmax(dim=1)
    for row, picture in enumerate(pictures):
        found = gallery.search_captions(encoder.encode_images([picture])[0], 3).matches
        probabilities = {match.item.text: match.share for match in found}
        torch.testing.assert_close(
            torch.tensor([probabilities[text] for text in texts]), expected[row], atol=0.01, rtol=0
        )


# ---------------------------------------------------------------- the folder and its model


def test_a_gallery_is_loaded_as_it_was_built(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    gallery = build_gallery(photos, tmp_path / "out", encoder, calibrate=False)
    copy = Gallery.load(tmp_path / "out", encoder)
    assert list(copy.pictures) == list(gallery.pictures)
    assert copy.metadata == gallery.metadata
    expected = encoder.encode_images([picture.path for picture in gallery.pictures])
    torch.testing.assert_close(copy.images.embeds, expected, atol=1e-3, rtol=0)
    assert all(isinstance(copy.thumbnail(picture), bytes) for picture in copy.pictures)
    assert all(picture.path.is_file() for picture in copy.pictures)
    assert copy.images.embeds.dtype == torch.float32
    torch.testing.assert_close(copy.images.embeds.norm(dim=1), torch.ones(3))


def test_the_stamp_tells_the_model(photos: Path, tmp_path: Path, other: DualEncoder) -> None:
    gallery = build_gallery(photos, tmp_path / "out", other, calibrate=False)
    stamp = gallery.metadata
    assert (stamp.fingerprint, stamp.model) == (other.fingerprint, other.name)
    assert (stamp.logit_scale, stamp.logit_bias) == (other.logit_scale, other.logit_bias)
    assert (stamp.num_pictures, stamp.num_captions, stamp.source) == (3, 0, str(photos))


def test_a_foreign_gallery_is_refused_and_the_command_named_mends_it(
    photos: Path, tmp_path: Path, encoder: DualEncoder, other: DualEncoder
) -> None:
    build_gallery(photos, tmp_path / "my gallery", encoder, calibrate=False)
    with pytest.raises(ValueError, match="cannot be compared") as error:
        Gallery.load(tmp_path / "my gallery", other)
    message = str(error.value)
    assert f"--model {encoder.name}, or" in message
    python, dash_m, module, *arguments = shlex.split(message.partition("Rebuild it with: ")[2])
    assert (python, dash_m, module) == ("python", "-m", "alignment.gallery")
    assert main(arguments) == 0
    assert len(Gallery.load(tmp_path / "my gallery", other).pictures) == 3


def test_pictures_of_a_missing_package_are_left_out_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fingerprint:
        name, fingerprint = "m", "f"

    pictures = [
        Picture("a", "package:not_installed_here/a.png"),
        Picture("b", "b.jpg"),
        Picture("c", "package:not_installed_here/c.png"),
    ]
    captions = [Caption("a.en", "A.", "en", "a")]
    embeds = {"picture": [torch.eye(3)], "caption": [torch.ones(1, 3)]}
    write_gallery(tmp_path, pictures, captions, embeds, 3, GalleryMetadata("f", "m", 1.0, None), {})
    with caplog.at_level(logging.WARNING):
        gallery = Gallery.load(tmp_path, Fingerprint())  # type: ignore[arg-type]
    assert [picture.id for picture in gallery.pictures] == ["b"]
    assert [match.similarity for match in gallery.search_images(torch.tensor([0.0, 1.0, 0.0]), 3).matches] == [1.0]
    assert gallery.metadata.num_pictures == 1
    assert len(caplog.records) == 2
    assert "2 pictures of the package not_installed_here" in caplog.text
    assert f"python -m alignment.gallery build SOURCE --out {tmp_path} --model m" in caplog.text  # not calibrated


def test_a_package_picture_is_shown_itself() -> None:
    picture = Picture("a", "package:gradio/media_assets/images/lion.jpg")
    gallery = Gallery([picture], [], torch.ones(1, 2), torch.zeros(0, 2), GalleryMetadata("f", "m", 1.0, None))
    assert gallery.thumbnail(picture) == picture.path
