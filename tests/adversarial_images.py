"""Hostile uploads, made up from a seed: sound files of every kind, what mutation makes of them, and bombs.

Every upload has a name that says how it was made, such as `PNG 16 bit/7/flip 3`: the kind of file, the seed, and the
mutation; `upload(name)` makes it again.
"""

import io
import json
import random
import re
import resource
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, PngImagePlugin

from alignment.picture_limits import MAX_IMAGE_PIXELS
from alignment.preprocess import InputError, open_image
from alignment.ui.strings import error_text, strings

SIZE = (48, 36)
MB = 2**20
PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO", "PPM")


@dataclass(frozen=True)
class Sound:
    """A file as programs write it.

    Attributes:
        data: its bytes.
        ending: of its name.
        read: whether it is read here.
        tolerance: how far its pixels may lie from those of `scene`; None where they cannot be compared.
    """

    data: bytes
    ending: str
    read: bool = True
    tolerance: float | None = None


@dataclass(frozen=True)
class Upload:
    """A file as it is sent."""

    name: str  # how it was made
    file: str  # what it is called
    data: bytes


def scene() -> Image.Image:
    """Draw what all sound pictures show: smooth colours with a dark corner, so that a turn or a shift would tell."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    channels = (60 + 3 * x, 60 + 4 * y, 200 - 2 * x)
    pixels = np.stack(channels, axis=-1)
    pixels[: SIZE[1] // 3, : SIZE[0] // 3] = 10
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _exif(orientation: int = 1, **texts: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = texts.get("description", "a holiday")
    return exif.tobytes()


def _notes() -> PngImagePlugin.PngInfo:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "<b>hello</b> ${alert(1)}", zip=True)
    notes.add_itxt("Titel", "照片 \u202egnp.exe", "zh", "标题", zip=True)
    return notes


@cache
def sound() -> dict[str, Sound]:
    """Make a sound file of every kind: name -> file."""
    image = scene()
    grey, alpha, palette = image.convert("L"), image.convert("RGBA"), image.quantize(64)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = image.transpose(Image.Transpose.ROTATE_90)  # comes out right only if orientation 6 is obeyed
    frames = [image.rotate(angle) for angle in (90, 180)]
    profile = bytes(range(256)) * 20

    def kind(ending: str, tolerance: float | None, image: Image.Image, format: str, **options: object) -> Sound:
        return Sound(saved(image, format, **options), ending, True, tolerance)

    return {
        "JPEG": kind("jpg", 8, image, "JPEG", quality=95),
        "JPEG progressive": kind("jpg", 8, image, "JPEG", quality=95, progressive=True),
        "JPEG turned": kind("jpeg", 8, turned, "JPEG", quality=95, exif=_exif(6), icc_profile=profile),
        "JPEG grey": kind("jpg", None, grey, "JPEG"),
        "JPEG CMYK": kind("jpg", 12, image.convert("CMYK"), "JPEG", quality=95),
        "JPEG of several": kind("jpg", 8, image, "MPO", save_all=True, append_images=frames, quality=95),
        "PNG": kind("png", 0, image, "PNG", pnginfo=_notes(), icc_profile=profile),
        "PNG turned": kind("png", 0, turned, "PNG", exif=_exif(6)),
        "PNG alpha": kind("png", 0, alpha, "PNG"),
        "PNG palette": kind("png", None, palette, "PNG", transparency=63),
        "PNG 16 bit": kind("png", None, deep, "PNG"),
        "PNG animated": kind("png", 0, image, "PNG", save_all=True, append_images=frames),
        "WEBP": kind("webp", 24, image, "WEBP", quality=95),
        "WEBP lossless": kind("webp", 0, alpha, "WEBP", lossless=True, exif=_exif(1), xmp=b"<x/>"),
        "WEBP animated": kind("webp", 0, image, "WEBP", lossless=True, save_all=True, append_images=frames),
        "GIF": kind("gif", 24, palette, "GIF", comment=b"hello"),
        "GIF animated": kind("gif", 24, palette, "GIF", save_all=True, append_images=frames, loop=0),
        "BMP": kind("bmp", 0, image, "BMP"),
        "BMP palette": kind("bmp", 24, palette, "BMP"),
        "BMP 1 bit": kind("bmp", None, grey.convert("1"), "BMP"),
        "TIFF": kind("tif", 0, image, "TIFF"),
        "TIFF deflate": kind("tiff", 0, image, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF JPEG": kind("tiff", 16, image, "TIFF", compression="jpeg"),
        "TIFF turned": kind("tif", 0, turned, "TIFF", compression="tiff_lzw", exif=_exif(6)),
        "TIFF big": kind("tif", 0, image, "TIFF", big_tiff=True),
        "TIFF 16 bit": kind("tif", None, deep, "TIFF"),
        "AVIF": kind("avif", 16, image, "AVIF", quality=95, subsampling="4:4:4"),
        "AVIF animated": kind("avif", 16, image, "AVIF", quality=95, save_all=True, append_images=frames),
        "ICO": kind("ico", None, alpha.resize((32, 32)), "ICO"),
        "ICO bitmap": kind("ico", None, alpha.resize((32, 32)), "ICO", bitmap_format="bmp"),
        "PPM": kind("ppm", 0, image, "PPM"),
        "PGM": kind("pgm", None, grey, "PPM"),
        "PGM 16 bit": kind("pgm", None, deep, "PPM"),
        **{name: Sound(data, ending, False) for name, ending, data in _foreign(image)},
    }


def _foreign(image: Image.Image) -> Iterator[tuple[str, str, bytes]]:
    """Make files that are no pictures, or not of a kind that is opened, though Pillow may have a decoder for it."""
    for format in ("EPS", "PDF", "JPEG2000", "TGA", "PCX", "SGI", "DDS", "ICNS", "IM", "MSP", "XBM"):
        mode = {"MSP": "1", "XBM": "1"}.get(format, "RGB")
        yield format, format[:3].lower(), saved(image.convert(mode), format)
    yield "SVG", "svg", b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(2)</script></svg>'
    yield "SVG bomb", "svg", b'<!DOCTYPE x [<!ENTITY a "aaaa">' + b"<!ENTITY b '&a;&a;&a;'>" * 99 + b"]><svg>&b;</svg>"
    yield "HEIC", "heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\1\0meta" + bytes(248)
    yield "HEIF", "heif", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(200)
    yield "WMF", "wmf", b"\xd7\xcd\xc6\x9a" + bytes(18) + b"\1\0\x09\0" + bytes(99)
    yield "EMF", "emf", struct.pack("<II", 1, 88) + bytes(32) + b" EMF" + bytes(99)
    yield "FITS", "fits", b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800)
    yield "PSD", "psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(99)
    yield "FLI", "fli", struct.pack("<IHHHHH", 200, 0xAF11, 1, 9, 9, 8) + bytes(200)
    yield "JPEG XL", "jxl", b"\xff\x0a" + bytes(99)
    yield "QOI", "qoi", b"qoif" + struct.pack(">IIBB", 9, 9, 3, 0) + bytes(99)
    yield "HTML", "jpg", b"<!doctype html><script>alert(1)</script>" * 9
    yield "program", "png", b"\x7fELF\2\1\1" + bytes(200)
    yield (
        "pickle",
        "gif",
        b"\x80\x04\x95\x1c\0\0\0\0\0\0\0\x8c\5posix\x94\x8c\6system\x94\x93\x94\x8c\4true\x94\x85\x94R\x94.",
    )
    yield "zip", "jpg", _zip({"a.png": saved(image, "PNG")})
    yield "empty", "png", b""


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


# ---------------------------------------------------------------- mutations

Change = Callable[[bytearray, random.Random], None]


def _flip(data: bytearray, dice: random.Random) -> None:
    for _ in range(dice.choice((1, 2, 8, 64))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _flip_head(data: bytearray, dice: random.Random) -> None:
    for _ in range(dice.randint(1, 6)):
        data[dice.randrange(min(len(data), 200))] = dice.randrange(256)


def _cut(data: bytearray, dice: random.Random) -> None:
    del data[dice.randrange(len(data)) :]


def _cut_front(data: bytearray, dice: random.Random) -> None:
    del data[: dice.randint(1, 40)]


def _drop(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data))
    del data[start : start + dice.choice((1, 2, 16, 200))]


def _insert(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data))
    data[start:start] = dice.randbytes(dice.choice((1, 4, 50, 1000)))


def _again(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data))
    data[start:start] = bytes(data[start : start + dice.choice((8, 64, 500))]) * dice.choice((1, 3, 40))


def _wipe(data: bytearray, dice: random.Random) -> None:
    start, fill = dice.randrange(len(data)), dice.choice((0, 255, 0x7F))
    length = min(dice.choice((2, 4, 8, 64, 400)), len(data) - start)
    data[start : start + length] = bytes([fill]) * length


def _number(data: bytearray, dice: random.Random) -> None:
    """Put a telling number where a length, a side or a place may stand."""
    start = dice.randrange(min(len(data), 300))
    number = dice.choice((0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data)))
    packed = struct.pack(dice.choice("<>") + "I", number)
    data[start : start + 4] = packed if dice.random() < 0.7 else packed[:2]


def _splice(data: bytearray, dice: random.Random) -> None:
    """Let another kind of file take over half-way."""
    other = dice.choice([file.data for file in sound().values() if file.data])
    start = dice.randrange(len(data))
    data[start:] = other[dice.randrange(len(other)) :]


def _polyglot(data: bytearray, dice: random.Random) -> None:
    """Make a file that is two: something else stands before or behind the picture, or in its metadata."""
    other = dice.choice([file.data for file in sound().values() if file.data])
    if dice.random() < 0.7:
        data += other
    else:
        data[:0] = other


MUTATIONS: dict[str, Change] = {
    name.strip("_"): change
    for name, change in list(globals().items())
    if name
    in (
        *("_flip", "_flip_head", "_cut", "_cut_front", "_drop", "_insert"),
        *("_again", "_wipe", "_number", "_splice", "_polyglot"),
    )
}


def upload(name: str) -> Upload:
    """Make the mutated upload of a name: `PNG/7/flip`."""
    kind, seed, mutation = name.split("/")
    file, dice = sound()[kind], random.Random(name)
    data = bytearray(file.data or b"\0")
    MUTATIONS[mutation](data, dice)
    ending = file.ending if dice.random() < 0.7 else dice.choice(["jpg", "png", "gif", "zip", "svg", "", "jpg.exe"])
    return Upload(name, f"{kind} {seed}.{ending}", bytes(data))


def names(seed: int, count: int) -> Iterator[str]:
    """List mutations of every kind of file in turn; those of the formats that are read come four times as often."""
    kinds = [name for name, file in sound().items() for _ in range(4 if file.read else 1)]
    changes = list(MUTATIONS)
    for row in range(count):
        yield f"{kinds[row % len(kinds)]}/{seed * 1_000_000 + row}/{changes[row // len(kinds) % len(changes)]}"


# ---------------------------------------------------------------- bombs


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *before: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """Make a black PNG of any size, small as a file; `before` are chunks ahead of the pixels."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    packer = zlib.compressobj(1)
    line = bytes(1 + (width * depth * samples + 7) // 8)
    pixels = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (_chunk(b"IHDR", header), *before, _chunk(b"IDAT", pixels), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(megabytes: int) -> bytes:
    """Pack so many zeros, without ever having them all."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(MB)) for _ in range(megabytes)) + packer.flush()


def directory(size: int) -> bytes:
    """Make EXIF whose entries all name the same half of it: what copies them needs thousands of times its size."""
    count = min(size // 24, 4000)
    start = 14 + 12 * count
    entries = b"".join(struct.pack("<HHII", 1000 + tag, 7, size - start, start) for tag in range(count))
    return b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4 + size - start)


def _as_text(exif: bytes) -> bytes:
    return zlib.compress(b"\nexif\n9\n" + exif.hex().encode())


def _segments(marker: int, prefix: bytes, data: bytes) -> bytes:
    parts = (prefix + data[start : start + 65_000] for start in range(0, len(data), 65_000))
    return b"".join(bytes([255, marker]) + struct.pack(">H", len(part) + 2) + part for part in parts)


def _jpeg_with(segments: bytes) -> bytes:
    data = sound()["JPEG"].data
    return data[:2] + segments + data[2:]


def tiff(*entries: tuple[int, int, int, int], behind: bytes = b"") -> bytes:
    """Make a grey TIFF of 64 x 64 of directory entries (tag, type, count, value); `behind` lies from byte 512 on."""
    known = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    table = {entry[0]: entry for entry in (*known, *entries)}
    packed = b"".join(struct.pack("<HHII", *table[tag]) for tag in sorted(table))
    return (b"II*\0" + struct.pack("<IH", 8, len(table)) + packed + bytes(4)).ljust(512, b"\0") + behind


def _tiff_of_many(count: int) -> bytes:
    strips = struct.pack("<I", 512) * count
    return tiff((273, 4, count, 512), (278, 4, 1, 1), (279, 4, count, 512), behind=strips)


def _tiff_of_a_tile(side: int) -> bytes:
    tile = zeros(side * side // MB)
    more = ((259, 3, 1, 8), (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 512), (325, 4, 1, len(tile)))
    return tiff(*more, behind=tile)


def _gif(ahead: bytes, screen: tuple[int, int] = (8, 8)) -> bytes:
    picture = b"," + struct.pack("<HHHHB", 0, 0, 8, 8, 0) + b"\2\4\x84\x51\0\0\0;"
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6) + ahead + picture


def _webp(side: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2
    data = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + struct.pack("<I", 16383 | 16383 << 14) + b"\0"
    return b"RIFF" + struct.pack("<I", 4 + len(body) + len(data)) + b"WEBP" + body + data


def _scans(count: int) -> bytes:
    data = saved(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def _icon(inner: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(inner), 22) + inner


def _frames(format: str, count: int) -> bytes:
    frames = [Image.new("RGB", (64, 64), (row % 256, row // 256, 0)) for row in range(count)]
    return saved(frames[0], format, save_all=True, append_images=frames[1:])


BOMBS: dict[str, Callable[[], bytes]] = {
    "pixels, PNG": lambda: png(20_000, 20_000, depth=1),
    "pixels, GIF": lambda: _gif(b"", (65_535, 65_535)),
    "pixels, WEBP": lambda: _webp(16_384),
    "pixels, BMP": lambda: b"BM" + struct.pack("<IHHIIiiHHIIIIII", 99, 0, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6),
    "pixels, PPM": lambda: b"P6 60000 60000 255\n" + bytes(99),
    "pixels, TIFF": lambda: tiff((256, 4, 1, 60_000), (257, 4, 1, 60_000), (273, 4, 1, 512), (279, 4, 1, 99)),
    "pixels, ICO": lambda: _icon(png(16_000, 16_000, depth=1)),
    "frames, GIF": lambda: _frames("GIF", 400),
    "frames, PNG": lambda: _frames("PNG", 400),
    "frames, WEBP": lambda: _frames("WEBP", 200),
    "EXIF, JPEG": lambda: _jpeg_with(_segments(0xE1, b"Exif\0\0", directory(2 * MB))),
    "EXIF, JPEG, its head in two": lambda: _jpeg_with(
        _segments(0xE1, b"Exif\0\0", b"II") + _segments(0xE1, b"Exif\0\0", directory(2 * MB)[2:])
    ),
    "EXIF, PNG": lambda: png(8, 8, _chunk(b"eXIf", directory(2 * MB))),
    "EXIF, PNG, as text": lambda: png(
        8,
        8,
        _chunk(b"zTXt", b"Raw profile type exif\0\0" + _as_text(directory(400_000))),
    ),
    "EXIF, WEBP": lambda: saved(scene(), "WEBP", exif=directory(2 * MB)),
    "EXIF, AVIF": lambda: saved(scene(), "AVIF", exif=directory(100_000)),
    "EXIF, TIFF": lambda: directory(2 * MB),
    "EXIF, TIFF, one below": lambda: tiff(
        (273, 4, 1, 512), (279, 4, 1, 4096), (34665, 4, 1, 512 + 8), behind=directory(2 * MB)
    ),
    "index of pictures, JPEG": lambda: _jpeg_with(_segments(0xE2, b"MPF\0", directory(64_000))),
    "strips, TIFF": lambda: _tiff_of_many(2_000_000),
    "tile, TIFF": lambda: _tiff_of_a_tile(10_000),
    "ICC, JPEG": lambda: _jpeg_with(_segments(0xE2, b"ICC_PROFILE\0\1\1", bytes(20 * MB))),
    "ICC, PNG": lambda: png(8, 8, _chunk(b"iCCP", b"icc\0\0" + zeros(70))),
    "text, PNG zTXt": lambda: png(8, 8, _chunk(b"zTXt", b"Comment\0\0" + zeros(70))),
    "text, PNG iTXt": lambda: png(8, 8, _chunk(b"iTXt", b"T\0\1\0\0\0" + zeros(70))),
    "text, PNG XMP": lambda: png(8, 8, _chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zeros(70))),
    "texts, PNG": lambda: png(8, 8, _chunk(b"tEXt", b"Comment\0") * 500_000),
    "comments, GIF": lambda: _gif(b"!\xfe" + (b"\xff" + bytes(255)) * 80_000 + b"\0"),
    "comments, JPEG": lambda: _jpeg_with(b"\xff\xfe\0\2" * 2_000_000),
    "scans, JPEG": lambda: _scans(5_000),
    "numbers, PPM": lambda: b"P3 2000 2000 255\n" + b"1 " * 12_000_000,
    "numbers of odd depth, PPM": lambda: b"P6 2000 2000 1000\n" + bytes(24_000_000),
    "icons": lambda: struct.pack("<HHH", 0, 1, 65_535) + struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, 99, 22) * 65_535,
    "as many pixels as may be": lambda: png(10_000, 5_000, colour=2),
    "as many pixels as may be, alpha": lambda: png(10_000, 5_000, colour=6),
    "as many pixels as may be, 16 bit": lambda: png(10_000, 5_000, depth=16),
}


# ---------------------------------------------------------------- what has to be said

_LATIN = re.compile(r"[A-Za-z]{2,}")
_FILES = re.compile(r"[\w.-]+\.(csv|tsv|txt|token|jsonl?|png|jpg)")  # of what was uploaded
_NAMES = {  # of things that Chinese has no other words for
    *("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "HEIC", "SVG", "PDF", "EPS", "XL", "Photoshop", "ICO"),
    *("PPM", "MB", "zip", "gallery", "pictures", "embeddings", "json", "jsonl", "safetensors", "JSON", "thumbnails"),
    *("clip", "CSV", "UTF", "RLE", "image", "caption"),
}
_PLACES = re.compile(r"/tmp|/home|/root|/usr|site-packages")
_CODE = re.compile(r"Traceback|Error\b|Exception|0x[0-9a-f]+|\.py\b|\{|\}|\$|__")


def check_said(error: InputError) -> None:
    """See that an error is a sentence in both languages that tells nothing of this machine."""
    assert f"error.{error.code}" in strings()["zh"], error.code
    said = [error_text("en", error), error_text("zh", error), str(error)]
    for words in said:
        assert not _PLACES.search(words), words
        assert len(words) < 400
        assert words.endswith((".", "。")), words
    assert said[0][0].isupper(), said[0]
    assert re.search("[\u4e00-\u9fff]", said[1]), said[1]
    for key in ("name", "file"):  # names of what was uploaded have any letters
        said = [words.replace(str(error.values.get(key, "")), "") for words in said]
    for words in said:
        assert not _CODE.search(words), words
    assert set(_LATIN.findall(_FILES.sub("", said[1]))) <= _NAMES, said[1]


# ---------------------------------------------------------------- in a process of its own


def peak_mb() -> float:
    """Tell the most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refusal(data: bytes, near: int | None = None) -> InputError | None:
    """Open a picture: None, or what is said instead; anything but an `InputError` is raised."""
    try:
        image = open_image(data, draft_size=near)
    except InputError as error:
        check_said(error)
        return error
    assert image.mode == "RGB"
    assert not image.info
    assert image.width * image.height <= MAX_IMAGE_PIXELS
    return None


def outcome(data: bytes, near: int | None = None) -> str:
    """Tell of it "decoded", or the code."""
    error = refusal(data, near)
    return error.code if error else "decoded"


def main() -> None:
    """Open the bombs (argument `bombs`) or mutated pictures (arguments: a seed and a count)."""
    base, found = peak_mb(), {}
    if sys.argv[1] == "bombs":
        for name, make in BOMBS.items():
            data, start, before = make(), time.perf_counter(), peak_mb()
            found[name] = outcome(data), max(peak_mb() - before, 0), time.perf_counter() - start
    else:
        for row, name in enumerate(names(int(sys.argv[1]), int(sys.argv[2]))):
            print(name, file=sys.stderr)  # the last one is to blame for a crash
            found[name] = outcome(upload(name).data, near=(None, 20)[row % 2])
    print(json.dumps({"base": base, "peak": peak_mb(), "found": found}))


if __name__ == "__main__":
    main()
