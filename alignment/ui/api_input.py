"""Top floor, what programs send: validated as strictly as what a browser sends.

Place in the flow: `request -> GuardedBlocks (no URLs) -> opened / read_* (here) -> api -> engine`.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict
from urllib.parse import unquote

from PIL import Image

from alignment.preprocess import InputError, clean_caption, open_image
from alignment.server.errors import ServiceError
from alignment.server.page import is_url
from alignment.ui.uploads import MAX_FILE_MB, Upload, delete_uploads, read_upload

MAX_RESULTS = 100
MAX_PICTURES = MAX_CAPTIONS = 64

_BASE64 = re.compile(r"(/9j/|iVBORw0K|UklGR|R0lGOD|SUkq|TU0A|Qk)[\w+/=\s-]{100,}\Z", re.ASCII)  # of picture files
_OUR_FILES = "/gradio_api/file="


class UploadedFile(TypedDict):
    """A file as Gradio's clients send it: where the upload put it."""

    path: str
    meta: dict[str, str]


SentPicture = str | UploadedFile
"""A picture in a request: a data URL, or what uploading it gave (a path, its address here, or a client's file)."""


# ---------------------------------------------------------------- pictures


def opened(images: object, draft_size: int | None = None) -> Iterator[Image.Image]:
    """Open the pictures of a request one after the other.

    Args:
        images: of the request.
        draft_size: see `open_image`.

    Raises:
        InputError: when they are no list of as many as may be, or one of them is no picture.
    """
    sent = _list(images, "images", MAX_PICTURES)
    for place, image in enumerate(sent, 1):
        try:
            picture = open_image(_bytes(image), draft_size=draft_size)
        except InputError as error:
            raise (_at(f"Picture {place}", error) if len(sent) > 1 else error) from error
        yield picture


@contextmanager
def forgotten(images: object) -> Iterator[None]:
    """Delete the uploads among the pictures of a request once it is answered, whatever the answer was."""
    try:
        yield
    finally:
        sent = images if isinstance(images, list) else ()
        delete_uploads([upload for image in sent if (upload := _upload(image))])


def _bytes(image: object) -> bytes:
    if isinstance(image, str) and image.startswith("data:"):
        return _decoded(image)
    if isinstance(image, str) and _BASE64.match(image):
        raise InputError('Base64 needs "data:image/jpeg;base64," in front of it.', "api.data_url")
    upload = _upload(image)
    if upload is None:
        raise InputError("A picture is a data URL or an uploaded file.", "api.image")
    if is_url(upload.path):
        raise ServiceError("api.address").error
    return read_upload(upload, MAX_PICTURES)


def _upload(image: object) -> Upload | None:
    """Find out where a picture was uploaded to; an address of ours stands for the file behind it."""
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str) or not path or path.startswith("data:"):
        return None
    return Upload("", unquote(path.partition(_OUR_FILES)[2]) or path)


def _decoded(url: str) -> bytes:
    head, _, body = url.partition(",")
    if len(body) * 3 > MAX_FILE_MB * 2**20 * 4:
        raise InputError("The picture has more than {limit} MB; make it smaller.", "api.size", limit=MAX_FILE_MB)
    try:
        # Many programs break base64 into lines.
        data = base64.b64decode("".join(unquote(body).split()), validate=True) if head.endswith(";base64") else b""
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise InputError('A data URL has to look like "data:image/jpeg;base64,...".', "api.data_url")
    return data


# ---------------------------------------------------------------- captions and numbers


def read_caption(caption: object) -> str:
    """Read one caption; InputError when it is no text, empty or too long."""
    if not isinstance(caption, str):
        raise InputError("A caption has to be text.", "api.caption")
    return clean_caption(caption)


def read_captions(captions: object) -> list[str]:
    """Read several captions; InputError when they are no list of as many as may be, or one of them is wrong."""
    cleaned = []
    for place, caption in enumerate(_list(captions, "captions", MAX_CAPTIONS), 1):
        try:
            cleaned.append(read_caption(caption))
        except InputError as error:
            raise _at(f"Caption {place}", error) from error
    return cleaned


def read_count(k: object) -> int:
    """Read how many results are wanted; InputError when it is no number from 1 to `MAX_RESULTS`."""
    if isinstance(k, bool) or not isinstance(k, int | float) or k != k // 1 or not 1 <= k <= MAX_RESULTS:
        raise InputError("k has to be a whole number from 1 to {limit}.", "api.k", limit=MAX_RESULTS)
    return int(k)


def _list(values: object, name: str, limit: int) -> list[Any]:
    if not isinstance(values, list) or not 1 <= len(values) <= limit:
        raise InputError("{name} has to be a list of 1 to {limit}.", "api.list", name=name, limit=limit)
    return values


def _at(place: str, error: InputError) -> InputError:
    return InputError("{place}: {error}", error.code, place=place, error=str(error))
