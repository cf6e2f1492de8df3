"""Floor 1, the door: turn what a person gives (file, image, text) into model inputs.

Place in the flow: `upload -> open_image / parse_captions -> Preprocessor (here) -> model`. Serving, building a gallery
and training all come through this door, so a model sees the same pixels everywhere, and nowhere else is input doubted.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig

logger = logging.getLogger(__name__)

MAX_IMAGE_PIXELS = 50_000_000
MAX_ASPECT_RATIO = 50  # CLIP's resize of the short side to 224 would blow a 1 x 50,000,000 strip up to terabytes
MAX_CAPTIONS = 200
MAX_CAPTION_CHARS = 1000
MIN_VOCABULARY = 10  # where the vocabulary's file is missing, transformers makes do with the special tokens

ImageSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any]

# What may be opened at all; JPEG includes MPO. Formats that run a program (EPS, PDF) or rarely hold photos stay shut.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO")
_READABLE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8|BM|II\*\x00|MM\x00\*|....ftypavi[fs]|P[1-7Ff]\s|\x00\x00\x01\x00",
    re.DOTALL,
)
_FOREIGN = {
    "HEIC": re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL),
    "PDF": re.compile(rb"%PDF"),
    "EPS": re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"),
    "SVG": re.compile(rb"\s*<(svg|\?xml)"),
    "JPEG 2000": re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"),
    "JPEG XL": re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "),
    "Photoshop": re.compile(rb"8BPS"),
}
# EXIF orientation -> what brings the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
# Control characters, zero-width marks, text-direction overrides and lone surrogates: nothing a caption can mean.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]")


class InputError(ValueError):
    """What the person at the keyboard can mend; `str(error)` is a sentence fit to be shown.

    Args:
        message: English template; `values` are filled in with `str.format`.
        code: stable dotted key ("image.truncated"), so that a page can say it in another language.
        **values: what the message names, for that other language.
    """

    def __init__(self, message: str, code: str = "input.invalid", **values: object) -> None:
        super().__init__(message.format(**values) if values else message)
        self.code = code
        self.values = values


# ---------------------------------------------------------------- images


def open_image(source: ImageSource) -> Image.Image:
    """Decode a picture to RGB as a person sees it: upright, first frame, transparency on white.

    Opening what this returned changes nothing. Size and format are judged from the header, before any pixel is decoded.

    Args:
        source: path, bytes, binary file, PIL image, or array of (height, width[, channels]): uint8, uint16, bool, or
            floating within [0, 1].

    Returns:
        A new image in mode RGB, without metadata.

    Raises:
        InputError: when it is no picture, empty, damaged, too large, too narrow, or of a kind not read here.
    """
    try:
        with _opened(source) as image:
            _check_size(*image.size)
            image.load()
            return _upright(_to_rgb(image), _orientation(image))
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large() from error
    except Exception as error:  # hostile bytes make decoders raise anything: struct.error, SyntaxError, OverflowError
        raise _damaged() from error


def _opened(source: ImageSource) -> AbstractContextManager[Image.Image]:
    """Open any source as far as its header."""
    if isinstance(source, Image.Image):
        return nullcontext(source)  # the caller's, so not ours to close
    if isinstance(source, np.ndarray):
        return nullcontext(_from_array(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(BytesIO(source))
    if isinstance(source, str | os.PathLike):
        return _from_file(_open_path(Path(source)))
    data = source.read()
    if not isinstance(data, bytes):
        raise InputError("This is text, not a picture; open the file in binary mode.", "image.not_an_image")
    return _from_file(BytesIO(data))


def _open_path(path: Path) -> BinaryIO:
    try:
        if not path.is_file():  # a pipe or a device would never end
            raise FileNotFoundError(path)
        return path.open("rb")
    except OSError as error:
        message = "The file {path} cannot be opened; check its name and whether you may read it."
        raise InputError(message, "image.missing", path=str(path)) from error


@contextmanager
def _from_file(file: BinaryIO) -> Iterator[Image.Image]:
    with file:
        head = file.read(64)
        if not head:
            raise _empty()
        if head.startswith(b"\0\0\1\0"):
            _check_icon(file)
        try:
            image = Image.open(file, formats=_FORMATS)
        except UnidentifiedImageError as error:
            raise _unidentified(head) from error
        with image:
            yield image


def _unidentified(head: bytes) -> InputError:
    """Tell a broken picture, a format not read here and something else altogether apart by their first bytes."""
    if _READABLE.match(head):
        return _damaged()
    for name, magic in _FOREIGN.items():
        if magic.match(head):
            return _unsupported(f"{name} files")
    return InputError(
        "This file is not a picture; choose a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file.", "image.not_an_image"
    )


def _empty() -> InputError:
    return InputError("The file is empty; choose one with a picture in it.", "image.empty")


def _damaged() -> InputError:
    return InputError("The picture is damaged or cut off; copy or download it again.", "image.truncated")


def _unsupported(kind: str) -> InputError:
    return InputError("{kind} cannot be read here; save the picture as JPEG or PNG.", "image.unsupported", kind=kind)


def _too_large() -> InputError:
    limit = f"{MAX_IMAGE_PIXELS / 1e6:g}"
    return InputError("The picture has more than {limit} megapixels; make it smaller.", "image.too_large", limit=limit)


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise _empty()
    if width * height > MAX_IMAGE_PIXELS:
        raise _too_large()
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        message = "One side of the picture is more than {limit} times the other; crop it."
        raise InputError(message, "image.too_narrow", limit=MAX_ASPECT_RATIO)


def _check_icon(file: BinaryIO) -> None:
    """Check the pictures inside an icon: Pillow decodes one while it opens the file, before its size can be asked."""
    file.seek(4)
    directory = file.read(2 + 16 * int.from_bytes(file.read(2), "little"))
    for entry in range(0, len(directory) - 15, 16):
        file.seek(int.from_bytes(directory[entry + 12 : entry + 16], "little"))
        header = file.read(24)
        if header.startswith(b"\x89PNG"):
            width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
        else:  # a bitmap, its height doubled by the mask
            sides = (header[4:6], header[6:8]) if header[:1] == b"\x0c" else (header[4:8], header[8:12])
            width, height = (abs(int.from_bytes(side, "little", signed=len(side) == 4)) for side in sides)
            height //= 2
        if width * height > MAX_IMAGE_PIXELS:
            raise _too_large()


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise _unsupported(f"Arrays of shape {array.shape}")
    _check_size(array.shape[1], array.shape[0])
    if array.dtype != np.uint8:
        if array.dtype.kind not in "bf" and array.dtype != np.uint16:
            raise _unsupported(f"Arrays of {array.dtype}")
        array = _to_8bit(array, 65535 if array.dtype == np.uint16 else 1)
    return Image.fromarray(array)


def _to_8bit(values: NDArray[Any], white: int) -> NDArray[np.uint8]:
    """Scale [0, white] to [0, 255]; values beyond have a range that cannot be known, so they are not guessed at."""
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= white):
        raise _unsupported(f"Pictures with values outside 0 to {white}")
    return np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8)


def _deep_grey(image: Image.Image) -> Image.Image:
    """Scale greyscale of more than 8 bits; `convert` would clip it, which turns photographs white."""
    tags = getattr(image, "tag_v2", {})  # TIFF says here whether it has 12 bits, and whether 0 is white
    white = 1 if image.mode == "F" else 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    values = np.asarray(image)
    grey = _to_8bit(values, white)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _deep_grey(image)
    if image.mode == "La":  # premultiplied, and one step is all `convert` knows
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(image, mask=image)
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # an orientation left behind would turn the picture again the next time it is opened
    return rgb


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; a picture is not refused for broken metadata."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:
        logger.debug("Unreadable EXIF: %s", error)
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


# ---------------------------------------------------------------- captions


def clean_caption(text: str) -> str:
    """Collapse whitespace and invisible characters of one caption.

    Raises:
        InputError: when nothing is left, or more than `MAX_CAPTION_CHARS` characters are.
    """
    caption = _collapse(text)
    if not caption:
        raise InputError("The caption is empty; type a few words.", "caption.empty")
    if len(caption) > MAX_CAPTION_CHARS:
        raise InputError(
            "The caption has {length} characters and the limit is {limit}; shorten it.",
            "caption.too_long",
            length=len(caption),
            limit=MAX_CAPTION_CHARS,
        )
    return caption


def parse_captions(text: str, *, limit: int = MAX_CAPTIONS) -> list[str]:
    """Read captions typed one a line; blank lines do not count.

    Raises:
        InputError: on no caption, more than `limit`, or one that is too long.
    """
    lines = [line for line in text.splitlines() if _collapse(line)]
    if not lines:
        raise InputError("There is no caption; type one a line.", "captions.none")
    if len(lines) > limit:
        message = "There are {count} captions and the limit is {limit}; remove some."
        raise InputError(message, "captions.too_many", count=len(lines), limit=limit)
    return [clean_caption(line) for line in lines]


def _collapse(text: str) -> str:
    return " ".join(_INVISIBLE.sub(" ", text).split())


# ---------------------------------------------------------------- model inputs


@dataclass(frozen=True)
class TextRules:
    """How a text tower wants its captions; what transformers' tokenizers do not know by themselves.

    Attributes:
        positions: tokens the tower has places for, unless its config says so.
        reserved: places that hold no token (RoBERTa counts from its padding index).
        trained_length: tokens it was trained on, where that is fewer than it has places for.
        pad_to_max: pad to the full length; SigLIP reads its embedding off the last place.
        lower: lower the case first.
    """

    positions: int = 512
    reserved: int = 0
    trained_length: int | None = None
    pad_to_max: bool = False
    lower: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TextRules:
        """Read the rules off a checkpoint's `config.json`, of a dual encoder or of a text tower alone."""
        text = config.get("text_config") or config
        kind = str(config.get("model_type", ""))
        if kind not in _TEXT_RULES:  # joined from two towers: the text tower decides
            kind = str(text.get("model_type", "")).removesuffix("_text_model")
        rules = _TEXT_RULES.get(kind, cls())
        places = text.get("max_position_embeddings")
        return replace(rules, positions=places - rules.reserved) if places else rules


_SIGLIP = TextRules(positions=64, pad_to_max=True, lower=True)
_ROBERTA = TextRules(reserved=2)
_TEXT_RULES = {
    "clip": TextRules(positions=77),
    "siglip": _SIGLIP,  # the fixed-size SigLIP2 checkpoints too
    "siglip2": _SIGLIP,
    "chinese_clip": TextRules(trained_length=52),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": _ROBERTA,
}


class Preprocessor:
    """A checkpoint's own image processor and tokenizer, used the way the model was trained."""

    def __init__(self, image_processor: Any, tokenizer: Any, rules: TextRules) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.rules = rules
        self.max_length = min(tokenizer.model_max_length, rules.positions, rules.trained_length or rules.positions)
        if tokenizer.pad_token is None:  # GPT-2 and its like; the attention mask hides it
            tokenizer.pad_token = tokenizer.eos_token
        # Fixes the tokenizer's padding and truncation: a change while another thread uses it raises "Already borrowed".
        self.texts(["a"])

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        text: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
    ) -> Preprocessor:
        """Load the preprocessor of a checkpoint, or join that of a vision tower with that of a text tower.

        Args:
            name_or_path: folder or Hub id.
            text: another checkpoint to take the tokenizer from.
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: when a checkpoint, or its image processor or tokenizer, is missing.
        """
        source = name_or_path if text is None else text
        try:
            # PIL even where torchvision is installed: the same pixels on every machine.
            image_processor = AutoImageProcessor.from_pretrained(
                name_or_path, revision=revision, backend="pil", trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
            config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{name_or_path} lacks its image processor, or {source} its tokenizer or config.json: check the path, "
                "or save them next to the weights with `processor.save_pretrained(FOLDER)`."
            ) from error
        if len(tokenizer) - len(tokenizer.all_special_ids) < MIN_VOCABULARY:
            raise FileNotFoundError(f"{source} lacks its vocabulary: save its tokenizer next to the weights.")
        return cls(image_processor, tokenizer, TextRules.of(config))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the image processor and the tokenizer; the text rules follow from the model's `config.json`."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Resize and normalise opened images.

        Returns:
            `pixel_values`, and whatever else the vision tower reads (NaFlex: `pixel_attention_mask`, `spatial_shapes`).
        """
        return dict(self.image_processor(list(images), return_tensors="pt"))

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize captions: `input_ids`, and `attention_mask` for the towers that read one."""
        captions = [text.lower() for text in texts] if self.rules.lower else list(texts)
        return dict(
            self.tokenizer(
                captions,
                padding="max_length" if self.rules.pad_to_max else "longest",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
        )
