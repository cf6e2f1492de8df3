"""Reduced-size decoding: JPEGs alone, never below what was asked for, and the same picture to the model."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps
from test_preprocess_images import STORED, bomb_jpeg

from alignment.model import DualEncoder
from alignment.preprocess import InputError, Preprocessor, open_image

COMPACT = Path(__file__).parents[1] / "checkpoints" / "compact"
# Of six photographs the first two change most; no scale divides the sides of the last.
PHOTOGRAPHS = {"astronaut.png": (4000, 3000), "hubble_deep_field.jpg": (4000, 3000), "rocket.jpg": (4003, 2997)}


def photograph(name: str, size: tuple[int, int]) -> Image.Image:
    """Enlarge one of scikit-image's photographs and add the grain of a sensor."""
    with Image.open(Path(skimage.data.__file__).parent / name) as image:
        enlarged = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 5, (500, 500, 3)).astype(np.float32)
    grain = np.tile(grain, (-(-size[1] // 500), -(-size[0] // 500), 1))[: size[1], : size[0]]
    return Image.fromarray((np.asarray(enlarged) + grain).clip(0, 255).astype(np.uint8))


def smooth(size: tuple[int, int]) -> Image.Image:
    """Colours that run across the picture, each its own way: any shift of the whole shows."""
    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 6, size[1]))
    channels = (np.sin(x + 0.5), np.sin(1.3 * y), np.sin(x + y))
    return Image.fromarray(np.stack([127 + 120 * channel for channel in channels], axis=-1).astype(np.uint8))


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference in steps of 256."""
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


@pytest.mark.parametrize(
    ("size", "near", "expected"),
    [
        ((1600, 1200), 150, (200, 150)),  # an eighth, to the pixel
        ((1600, 1200), 151, (400, 300)),
        ((1600, 1200), 300, (400, 300)),
        ((1600, 1200), 301, (800, 600)),
        ((1200, 1600), 600, (600, 800)),
        ((1600, 1200), 601, (1600, 1200)),
        ((1600, 1200), 5000, (1600, 1200)),
        ((1600, 1200), 1, (200, 150)),  # there is no sixteenth
        ((1607, 1205), 150, (200, 150)),
        ((1001, 333), 40, (125, 41)),
        ((64, 9), 1, (8, 1)),
    ],
)
def test_a_jpeg_is_reduced_as_far_as_its_shorter_side_allows(
    size: tuple[int, int], near: int, expected: tuple[int, int], encoded: Callable
) -> None:
    data = encoded(smooth(size), "JPEG", quality=95)
    assert open_image(data, draft_size=near).size == expected
    assert open_image(data).size == size


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO"])
def test_other_formats_keep_their_size(format: str, encoded: Callable) -> None:
    data = encoded(smooth((240, 160)), format)
    np.testing.assert_array_equal(np.asarray(open_image(data, draft_size=10)), np.asarray(open_image(data)))


def test_what_is_decoded_already_keeps_its_size() -> None:
    image = smooth((640, 480))
    assert open_image(image, draft_size=10).size == (640, 480)


def test_the_callers_picture_is_not_reduced(encoded: Callable) -> None:
    with Image.open(BytesIO(encoded(smooth((640, 480)), "JPEG"))) as image:  # opened, but not yet decoded
        assert open_image(image, draft_size=10).size == (640, 480)
        assert image.size == (640, 480)


def test_every_kind_of_file_is_reduced(tmp_path: Path, encoded: Callable) -> None:
    data = encoded(smooth((640, 480)), "JPEG")
    (tmp_path / "photo").write_bytes(data)
    for source in (tmp_path / "photo", data):
        picture = open_image(source, draft_size=100)
        assert (picture.size, picture.mode, picture.info) == ((160, 120), "RGB", {})


@pytest.mark.parametrize("size", [(1200, 800), (1203, 805), (1206, 799), (801, 1207)])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_reduced_picture_lies_where_the_full_one_does(size: tuple[int, int], scale: int, encoded: Callable) -> None:
    data = encoded(smooth(size), "JPEG", quality=98, subsampling=0)
    reduced, full = open_image(data, draft_size=min(size) // scale), open_image(data)
    assert reduced.size == (size[0] // scale, size[1] // scale)
    assert difference(reduced, full.resize(reduced.size, Image.Resampling.BOX)) < 0.6
    # The decoder alone leaves its padding in; it is by this that the test can tell.
    with Image.open(BytesIO(data)) as image:
        image.draft(None, reduced.size)
        padded = image.convert("RGB")
    if padded.size != reduced.size:
        squeezed = padded.resize(reduced.size, Image.Resampling.BICUBIC)
        assert difference(reduced, full.resize(reduced.size, Image.Resampling.BOX)) < difference(
            squeezed, full.resize(reduced.size, Image.Resampling.BOX)
        )


@pytest.mark.parametrize("orientation", STORED)
def test_a_reduced_picture_is_upright(orientation: int, encoded: Callable) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = smooth((806, 605))
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(upright))))
    picture = open_image(encoded(stored, "JPEG", exif=exif, quality=95), draft_size=150)
    assert picture.size == (201, 151)
    assert difference(picture, upright.resize(picture.size, Image.Resampling.BOX)) < 2
    np.testing.assert_array_equal(np.asarray(open_image(picture)), np.asarray(picture))  # turned once


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"subsampling": "4:2:2"}),
        ("MPO", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (64, 64))]}),
    ],
)
def test_every_kind_of_jpeg_is_reduced_to_the_same_picture(
    format: str, mode: str, options: dict, encoded: Callable
) -> None:
    data = encoded(smooth((800, 600)).convert(mode), format, quality=95, **options)
    reduced, full = open_image(data, draft_size=100), open_image(data)
    assert (reduced.size, full.size, reduced.mode) == ((200, 150), (800, 600), "RGB")
    assert difference(reduced, full.reduce(4)) < 2


@pytest.mark.parametrize("near", [None, 1, 10, 300])
def test_what_is_refused_in_full_is_refused_in_reduced_size(near: int | None, encoded: Callable) -> None:
    whole = encoded(photograph("coffee.png", (1200, 800)), "JPEG", quality=90)
    for data, code in (
        (bomb_jpeg(), "image.too_large"),  # though an eighth of it would be small enough
        (encoded(Image.new("RGB", (1200, 20)), "JPEG"), "image.too_narrow"),
        (whole[: len(whole) // 2], "image.truncated"),
        (whole[:30], "image.truncated"),
        (b"", "image.empty"),
    ):
        with pytest.raises(InputError) as caught:
            open_image(data, draft_size=near)
        assert caught.value.code == code


def test_the_compact_model_sees_the_same_in_twelve_megapixels(encoded: Callable) -> None:
    preprocessor, encoder = Preprocessor.load(COMPACT), DualEncoder.load(COMPACT, device="cpu")
    ours, theirs = [], []
    for name, size in PHOTOGRAPHS.items():
        data = encoded(photograph(name, size), "JPEG", quality=90)
        reduced = open_image(data, draft_size=preprocessor.draft_size)
        assert max(reduced.size) <= 1000
        ours.append(preprocessor.images([reduced]))
        theirs.append(preprocessor.images([open_image(data)]))
    one, other = (torch.stack(list(encoder.encode_prepared(inputs))) for inputs in (ours, theirs))
    cosine = (one * other).sum(dim=1)
    assert cosine.min() >= 0.995, cosine
