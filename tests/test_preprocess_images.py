"""Pictures: what is refused, and what a decoded picture looks like."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from alignment.preprocess import InputError, images, open_image

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
# Four different quarters: every one of the eight orientations looks different.
UPRIGHT = np.repeat(np.repeat(np.array([[RED, (0, 255, 0)], [BLUE, BLACK]], dtype=np.uint8), 16, axis=0), 24, axis=1)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO")


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(source: object) -> InputError:
    with pytest.raises(InputError) as caught:
        open_image(source)
    assert str(caught.value).endswith(".")
    return caught.value


def tiff(
    data: bytes,
    size: tuple[int, int],
    *,
    bits: tuple[int, ...],
    photometric: int = 1,
    sample_format: int = 1,
    order: str = "<",
) -> bytes:
    """Write an uncompressed TIFF by hand: Pillow writes only what it can read back as the same mode."""
    entries = [
        (256, 4, (size[0],)),
        (257, 4, (size[1],)),
        (258, 3, bits),
        (259, 3, (1,)),
        (262, 3, (photometric,)),
        (273, 4, (8,)),
        (277, 3, (len(bits),)),
        (278, 4, (size[1],)),
        (279, 4, (len(data),)),
        (339, 3, (sample_format,) * len(bits)),
    ]
    data += b"\0" * (len(data) % 2)
    directory = 8 + len(data)
    extra_at, extra, table = directory + 2 + 12 * len(entries) + 4, b"", b""
    for tag, kind, values in entries:
        packed = struct.pack(order + ("H" if kind == 3 else "I") * len(values), *values)
        if len(packed) > 4:
            packed, extra = struct.pack(order + "I", extra_at + len(extra)), extra + packed
        table += struct.pack(order + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, directory)
    return head + data + struct.pack(order + "H", len(entries)) + table + bytes(4) + extra


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8, colour: int = 2) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (header, *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def icon(inner: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(inner), 22) + inner


# ---------------------------------------------------------------- what is refused


def test_an_empty_file_and_a_picture_without_pixels_are_refused(tmp_path: Path) -> None:
    assert refused(b"").code == "image.empty"
    (tmp_path / "empty.jpg").touch()
    assert refused(tmp_path / "empty.jpg").code == "image.empty"
    assert refused(Image.new("RGB", (0, 5))).code == "image.empty"


@pytest.mark.parametrize("data", [b"hello, I am no picture", b"\0" * 100, b"PK\x03\x04" + bytes(60), b"x"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert refused(data).code == "image.not_an_image"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    error = refused(str(tmp_path / "gone.jpg"))
    assert error.code == "image.missing"
    assert "gone.jpg" in str(error)
    assert refused(tmp_path).code == "image.missing"  # a folder
    assert refused("a\0b").code == "image.missing"


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0"),
        ("PDF", b"%PDF-1.7\n"),
        ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
        ("SVG", b'<?xml version="1.0"?><svg/>'),
        ("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n"),
        ("Photoshop", b"8BPS\0\1"),
    ],
)
def test_formats_that_are_not_read_are_named(kind: str, data: bytes) -> None:
    error = refused(data + bytes(200))
    assert (error.code, error.values) == ("image.unsupported", {"kind": f"{kind} files"})
    assert kind in str(error)


@pytest.mark.parametrize("format", ["TGA", "SGI", "PCX", "JPEG2000", "ICNS", "DDS", "EPS", "IM", "XBM", "PDF", "DIB"])
def test_only_listed_formats_are_opened(format: str, encoded: Callable) -> None:
    mode = "1" if format == "XBM" else "RGB"
    data = encoded(Image.new(mode, (64, 64)), format)
    assert refused(data).code in ("image.not_an_image", "image.unsupported")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_a_picture_that_was_cut_off_is_refused(format: str, share: float, encoded: Callable) -> None:
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), format)
    assert refused(data[: 20 + int(share * (len(data) - 20))]).code == "image.truncated"


@pytest.mark.parametrize("format", FORMATS)
def test_hostile_bytes_never_raise_anything_else(
    format: str, encoded: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(images.LIMITS, "pixels", 100_000)  # keeps a flipped size field cheap
    image = Image.fromarray(UPRIGHT)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    data = encoded(image, format, **options)
    rng = np.random.default_rng(len(format))
    outcomes = set()
    for _ in range(150):
        broken = bytearray(data)
        for place in rng.integers(0, min(len(data), 400), size=rng.integers(1, 6)):
            broken[place] = rng.integers(256)
        try:
            outcomes.add(open_image(bytes(broken)).mode)
        except InputError as error:
            outcomes.add(error.code)
    assert "image.truncated" in outcomes


def bomb_jpeg() -> bytes:
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 8_000, 8_000, 3) + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    return b"\xff\xd8" + frame + b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0" + bytes(50)


def bomb_webp() -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (7_999).to_bytes(3, "little") * 2
    data = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + struct.pack("<I", 7_999 | 7_999 << 14) + b"\0"
    return b"RIFF" + struct.pack("<I", 4 + len(body) + len(data)) + b"WEBP" + body + data


def bitmap_header(width: int, height: int, bits: int) -> bytes:
    return struct.pack("<IiiHHIIIIII", 40, width, height, 1, bits, 0, 0, 0, 0, 0, 0)


# 64 megapixels: over our limit and under Pillow's own, which would only warn.
BOMBS = {
    "PNG": png(8_000, 8_000),
    "PNG that Pillow warns of": png(10_000, 10_000),
    "PNG that Pillow refuses": png(30_000, 30_000),
    "GIF": b"GIF89a"
    + struct.pack("<HHBBB", 8_000, 8_000, 0, 0, 0)
    + b",\0\0\0\0"
    + struct.pack("<HHBBB", 9, 9, 0, 2, 0),
    "BMP": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + bitmap_header(8_000, 8_000, 24),
    "JPEG": bomb_jpeg(),
    "PPM": b"P6 8000 8000 255\n",
    "TIFF": tiff(b"\0" * 16, (8_000, 8_000), bits=(8, 8, 8), photometric=2),
    "WEBP": bomb_webp(),
    "ICO of a PNG": icon(png(8_000, 8_000)),
    "ICO of a bitmap": icon(bitmap_header(8_000, 16_000, 32)),
    "ICO of an old bitmap": icon(struct.pack("<IHHHH", 12, 60_000, 2_000, 1, 24)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_huge_size_is_refused_from_the_header(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image) or load(image))
    # There is no pixel data behind these headers: an attempt to decode would end as "image.truncated".
    assert refused(BOMBS[kind]).code == "image.too_large"
    assert decoded == []


def test_the_size_limit_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(images.LIMITS, "pixels", 12)
    assert open_image(Image.new("RGB", (3, 4))).size == (3, 4)
    assert refused(Image.new("RGB", (13, 1))).code == "image.too_large"


def test_a_strip_is_refused_before_a_resize_blows_it_up() -> None:
    assert open_image(Image.new("RGB", (50, 1))).size == (50, 1)
    error = refused(Image.new("RGB", (51, 1)))
    assert (error.code, error.values) == ("image.too_narrow", {"limit": 50})


def test_an_error_can_be_put_in_another_language() -> None:
    error = InputError("The limit is {limit}.", code="captions.too_many", limit=3)
    assert (str(error), error.code, error.values) == ("The limit is 3.", "captions.too_many", {"limit": 3})
    assert isinstance(error, ValueError)


def test_a_run_length_bitmap_is_refused_before_it_is_decoded(encoded: Callable[..., bytes]) -> None:
    data = bytearray(encoded(Image.new("P", (8, 8)), "BMP"))
    data[30] = 1  # the compression in its header
    assert refused(bytes(data)).values == {"kind": "RLE BMP files"}


# ---------------------------------------------------------------- what comes out right

STORED = {  # EXIF orientation: how an upright picture lies in the file, from the standard's "row 0 is at the ..."
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
    ],
)
def test_exif_rotation_is_undone(orientation: int, format: str, options: dict, encoded: Callable) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT)))
    picture = open_image(encoded(stored, format, exif=exif, **options))
    np.testing.assert_allclose(pixels(picture).astype(int), UPRIGHT, atol=6)
    # What is opened twice, as by the engine and then the encoder, is turned once.
    np.testing.assert_array_equal(pixels(open_image(picture)), pixels(picture))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x05"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_broken_exif_does_not_cost_the_picture(exif: bytes, encoded: Callable) -> None:
    picture = open_image(encoded(Image.fromarray(UPRIGHT), "JPEG", exif=exif))
    assert picture.size == (48, 32)


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int, encoded: Callable) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(pixels(open_image(encoded(Image.fromarray(UPRIGHT), "PNG", exif=exif))), UPRIGHT)


def see_through(mode: str) -> Image.Image:
    """Red and opaque on the left, half transparent in the middle, fully transparent on the right."""
    rgba = np.array([[(255, 0, 0, 255), (255, 0, 0, 128), (255, 0, 0, 0)]], dtype=np.uint8)
    return Image.fromarray(rgba).convert(mode)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_rgba_comes_out_on_white(format: str, encoded: Callable) -> None:
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    result = pixels(open_image(encoded(see_through("RGBA"), format, **options)))
    np.testing.assert_array_equal(result, [[RED, (255, 127, 127), WHITE]])


def test_premultiplied_alpha_comes_out_on_white() -> None:
    result = pixels(open_image(see_through("RGBa")))
    np.testing.assert_allclose(result, [[RED, (255, 127, 127), WHITE]], atol=1)
    grey = Image.fromarray(np.array([[(0, 255), (100, 128), (0, 0)]], dtype=np.uint8), "LA").convert("La")
    np.testing.assert_allclose(pixels(open_image(grey)), [[BLACK, (177, 177, 177), WHITE]], atol=1)


def test_grey_with_alpha_comes_out_on_white(encoded: Callable) -> None:
    image = Image.fromarray(np.array([[(0, 255), (100, 128), (0, 0)]], dtype=np.uint8), "LA")
    result = pixels(open_image(encoded(image, "PNG")))
    np.testing.assert_array_equal(result, [[BLACK, (177, 177, 177), WHITE]])


def palette_image() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([*RED, *BLUE, 10, 20, 30])
    return image


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF"])
def test_palettes_are_looked_up(format: str, encoded: Callable) -> None:
    result = pixels(open_image(encoded(palette_image(), format)))
    np.testing.assert_array_equal(result, [[RED, BLUE, (10, 20, 30)]])


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_comes_out_white(format: str, encoded: Callable) -> None:
    result = pixels(open_image(encoded(palette_image(), format, transparency=1)))
    np.testing.assert_array_equal(result, [[RED, WHITE, (10, 20, 30)]])


def test_a_palette_with_alpha_comes_out_on_white(encoded: Callable) -> None:
    result = pixels(open_image(encoded(palette_image(), "PNG", transparency=bytes([255, 128, 0]))))
    np.testing.assert_array_equal(result, [[RED, (127, 127, 255), WHITE]])


@pytest.mark.parametrize(
    ("mode", "data", "key", "expected"),
    [
        ("RGB", [[RED, BLUE]], RED, [[WHITE, BLUE]]),
        ("L", [[7, 9]], 7, [[WHITE, (9, 9, 9)]]),
        ("I;16", [[7, 257 * 9]], 7, [[WHITE, (9, 9, 9)]]),
    ],
)
def test_a_colour_declared_transparent_comes_out_white(
    mode: str, data: list, key: object, expected: list, encoded: Callable
) -> None:
    image = Image.fromarray(np.array(data, dtype=np.uint16 if mode == "I;16" else np.uint8))
    assert image.mode == mode
    np.testing.assert_array_equal(pixels(open_image(encoded(image, "PNG", transparency=key))), expected)


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk_is_converted(format: str, encoded: Callable) -> None:
    inks = [(0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0), (51, 0, 0, 51)]
    data = np.repeat(np.repeat(np.array([inks], dtype=np.uint8), 16, axis=0), 16, axis=1)
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    result = pixels(open_image(encoded(Image.fromarray(data, "CMYK"), format, **options)))
    np.testing.assert_allclose(result[8, 8::16].astype(int), [RED, BLACK, WHITE, (163, 204, 204)], atol=3)


def test_a_jpeg_in_grey_and_a_bitmap_of_one_bit(encoded: Callable) -> None:
    grey = pixels(open_image(encoded(Image.new("L", (8, 8), 77), "JPEG")))
    np.testing.assert_array_equal(grey, np.full((8, 8, 3), 77))
    for format in ("PNG", "TIFF", "BMP", "PPM", "GIF"):
        bits = Image.fromarray(np.array([[True, False, True]]))
        np.testing.assert_array_equal(pixels(open_image(encoded(bits, format))), [[WHITE, BLACK, WHITE]])


DEEP = np.array([[0, 1000, 32896, 65535]], dtype=np.uint16)
SCALED = np.array([[0, 4, 128, 255]])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(tiff(DEEP.tobytes(), (4, 1), bits=(16,)), id="TIFF little-endian"),
        pytest.param(tiff(DEEP.astype(">u2").tobytes(), (4, 1), bits=(16,), order=">"), id="TIFF big-endian"),
        pytest.param(tiff((65535 - DEEP).tobytes(), (4, 1), bits=(16,), photometric=0), id="TIFF where 0 is white"),
        pytest.param(b"P5 4 1 65535\n" + DEEP.astype(">u2").tobytes(), id="PGM"),
        pytest.param(
            png(4, 1, (b"IDAT", zlib.compress(b"\0" + DEEP.astype(">u2").tobytes())), depth=16, colour=0), id="PNG"
        ),
    ],
)
def test_16_bit_grey_is_scaled_not_clipped(data: bytes) -> None:
    np.testing.assert_array_equal(pixels(open_image(data)), np.stack([SCALED] * 3, axis=-1))


def test_12_bit_grey_is_scaled_by_its_own_white() -> None:
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])  # 0, 0x800, 0xfff, 0: three digits a pixel
    result = pixels(open_image(tiff(packed, (4, 1), bits=(12,))))
    np.testing.assert_array_equal(result[..., 0], [[0, 128, 255, 0]])


def test_16_bit_colour_is_scaled() -> None:
    colours = np.array([[(65535, 0, 32896)]], dtype=np.uint16)
    for data in (
        tiff(colours.tobytes(), (1, 1), bits=(16, 16, 16), photometric=2),
        png(1, 1, (b"IDAT", zlib.compress(b"\0" + colours.astype(">u2").tobytes())), depth=16),
    ):
        np.testing.assert_array_equal(pixels(open_image(data)), [[(255, 0, 128)]])


def test_16_bit_grey_is_turned_upright(encoded: Callable) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    for format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(pixels(open_image(encoded(stored, format, exif=exif)))[..., 0], [[0], [255]])


def float_tiff(values: list[float]) -> bytes:
    return tiff(np.array(values, dtype=np.float32).tobytes(), (len(values), 1), bits=(32,), sample_format=3)


def test_float_within_0_and_1_is_scaled_and_any_other_range_refused() -> None:
    result = pixels(open_image(float_tiff([0.0, 0.25, 0.5, 1.0])))
    np.testing.assert_array_equal(result[..., 1], [[0, 64, 128, 255]])
    for values in ([0.0, 255.0], [-0.1, 1.0], [float("nan"), 0.5], [float("inf"), 0.5]):
        assert refused(float_tiff(values)).code == "image.unsupported"


def test_lab_is_converted() -> None:
    lab = bytes([255, 0, 0, 0, 0, 0])
    result = pixels(open_image(tiff(lab, (2, 1), bits=(8, 8, 8), photometric=8)))
    np.testing.assert_allclose(result.astype(int), [[WHITE, BLACK]], atol=2)


def test_integers_beyond_16_bits_are_refused() -> None:
    deep = np.array([[0, 70_000]], dtype=np.uint32)
    assert refused(tiff(deep.tobytes(), (2, 1), bits=(32,))).code == "image.unsupported"
    signed = np.array([[-5, 5]], dtype=np.int16)
    assert refused(tiff(signed.tobytes(), (2, 1), bits=(16,), sample_format=2)).code == "image.unsupported"


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_of_an_animation_the_first_frame_is_taken(format: str, options: dict, encoded: Callable) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in (BLUE, WHITE)]
    data = encoded(Image.new("RGB", (20, 10), RED), format, save_all=True, append_images=frames, duration=50, **options)
    with Image.open(BytesIO(data)) as animation:
        assert animation.n_frames == 3
    np.testing.assert_array_equal(pixels(open_image(data)), np.full((10, 20, 3), RED))


def test_of_an_mpo_the_first_picture_is_taken(encoded: Callable) -> None:
    data = encoded(Image.new("RGB", (16, 16), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    np.testing.assert_allclose(pixels(open_image(data)).astype(int), np.full((16, 16, 3), RED), atol=2)


def test_an_icon_is_read(encoded: Callable) -> None:
    for form in ("png", "bmp"):
        data = encoded(Image.new("RGBA", (32, 32), (255, 0, 0, 255)), "ICO", bitmap_format=form)
        np.testing.assert_array_equal(pixels(open_image(data)), np.full((32, 32, 3), RED))


def test_every_source_gives_the_same_picture(tmp_path: Path, encoded: Callable) -> None:
    data = encoded(Image.fromarray(UPRIGHT), "PNG")
    path = tmp_path / "picture.of.a.dog"
    path.write_bytes(data)
    with Image.open(path) as image:
        for source in (data, path, str(path), image, Image.fromarray(UPRIGHT)):
            np.testing.assert_array_equal(pixels(open_image(source)), UPRIGHT)


def test_the_caller_keeps_their_picture() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.info["note"] = "mine"
    opened = open_image(image)
    assert (image.mode, image.info) == ("RGBA", {"note": "mine"})
    assert opened.info == {}
    plain = Image.new("RGB", (4, 4))
    open_image(plain).putpixel((0, 0), RED)
    assert plain.getpixel((0, 0)) == BLACK
