"""Metadata is removed before Pillow reads a file, without a change to the picture."""

import random
import struct
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from adversarial_images import directory, saved, scene, sound, tiff
from PIL import Image

from alignment.preprocess import InputError, metadata, open_image
from alignment.preprocess.metadata import MAX_NUMBERS, strip_metadata, tile_pixels

READ = [kind for kind, file in sound().items() if file.read]


def plainly(data: bytes) -> np.ndarray:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", READ)
def test_the_pixels_are_the_same_without_metadata(kind):
    data = sound()[kind].data
    assert np.array_equal(plainly(strip_metadata(data)), plainly(data))


@pytest.mark.parametrize("kind", READ)
def test_what_has_been_slimmed_stays_as_it_is(kind):
    once = strip_metadata(sound()[kind].data)
    assert strip_metadata(once) == once


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_nothing_of_what_exif_says_reaches_pillow_but_the_orientation(format):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret place"
    turned = scene().transpose(Image.Transpose.ROTATE_90)
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(turned, format, exif=exif.tobytes(), **options)
    assert b"a secret place" in data
    if format in ("JPEG", "AVIF"):
        with Image.open(BytesIO(strip_metadata(data))) as image:
            assert b"a secret place" not in image.info.get("exif", b"")
    far = np.abs(np.asarray(open_image(data), dtype=int) - np.asarray(scene(), dtype=int))
    assert far.mean() < 12


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    "data",
    [
        saved(scene().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, xmp=XMP),
        saved(scene().transpose(Image.Transpose.ROTATE_90), "WEBP", lossless=True, xmp=XMP),
        *(
            (whole := saved(scene().transpose(Image.Transpose.ROTATE_90), "PNG"))[:33] + said + whole[33:]
            for said in (
                chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
                chunk(
                    b"zTXt",
                    b"Raw profile type exif\0\0"
                    + zlib.compress(
                        b"\nexif\n26\n" + b"MM\0\x2a\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0".hex().encode()
                    ),
                ),
            )
        ),
    ],
    ids=["JPEG", "WEBP", "PNG", "PNG of ImageMagick"],
)
def test_the_orientation_may_stand_elsewhere(data):
    far = np.abs(np.asarray(open_image(data), dtype=int) - np.asarray(scene(), dtype=int))
    assert far.mean() < 12


def test_a_film_behind_a_picture_does_not_count_as_scans():
    data = sound()["JPEG"].data + b"\xff\xda" * 1000
    assert open_image(data).size == scene().size


def test_anything_may_follow_a_png():
    assert open_image(sound()["PNG"].data + bytes(500_000)).size == scene().size


def test_padding_between_the_markers_of_a_jpeg_is_skipped():
    data = sound()["JPEG"].data
    assert np.array_equal(plainly(strip_metadata(data[:2] + b"\xff" * 30_000 + b"\0\0" + data[2:])), plainly(data))


@pytest.mark.parametrize("name", ["MAX_PARTS", "MAX_SCANS"])
def test_the_limits_are_far_from_what_pictures_need(name, monkeypatch):
    monkeypatch.setattr(metadata, name, getattr(metadata, name) // (8 if name == "MAX_SCANS" else 100))
    for kind in READ:
        open_image(sound()[kind].data)


def test_a_directory_that_names_its_bytes_again_and_again_is_refused():
    assert tile_pixels(BytesIO(sound()["TIFF"].data)) == 0
    for data in (directory(500_000), tiff((34665, 4, 1, 520), behind=directory(500_000))):
        with pytest.raises(InputError, match="damaged"):
            tile_pixels(BytesIO(data))


def test_more_numbers_than_a_picture_needs_are_refused():
    many = MAX_NUMBERS
    assert tile_pixels(BytesIO(tiff((273, 4, many - 100, 512), behind=bytes(4 * many)))) == 0
    with pytest.raises(InputError, match="damaged"):
        tile_pixels(BytesIO(tiff((273, 4, many, 512), behind=bytes(4 * many))))


def test_a_tile_is_as_large_as_it_says():
    assert tile_pixels(BytesIO(tiff((322, 4, 1, 300), (323, 3, 1, 200)))) == 60_000


def test_any_bytes_are_looked_over():
    heads = (b"II*\0", b"MM\0*", b"II+\0", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\0\0\0\x20ftyp")
    dice = random.Random(1)
    for _ in range(2000):
        data = dice.choice(heads) + dice.randbytes(dice.randrange(400))
        for look in (strip_metadata, lambda data: tile_pixels(BytesIO(data))):
            with suppress(InputError):
                look(data)
