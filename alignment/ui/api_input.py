"""UI, API input: what programs send, validated as strictly as what a browser sends.

Place in the flow: `request -> GuardedBlocks (no URLs) -> open_pictures / read_* (here) -> api -> engine`.
"""

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypedDict
from urllib.parse import unquote

from PIL import Image

from alignment.preprocess import InputError, clean_caption, open_image
from alignment.server.errors import ServiceError
from alignment.server.page import is_url
from alignment.ui.uploads import MAX_FILE_MB, Upload, delete_uploads, read_upload

MAX_RESULTS = 100
MAX_PICTURES = MAX_CAPTIONS = 64

_BARE_BASE64 = re.compile(r"(/9j/|iVBORw0K|UklGR|R0lGOD|SUkq|TU0A|Qk)[\w+/=\s-]{100,}\Z", re.ASCII)  # of a picture
_UPLOAD_ADDRESS = "/gradio_api/file="


class UploadedFile(TypedDict):
    """A file as Gradio's clients send it: where the upload put it."""

    path: str
    meta: dict[str, str]


SentPicture = str | UploadedFile
"""A picture in a request: a data URL, or what uploading it gave (a path, its address here, or a client's file)."""


def open_pictures(images: object, draft_size: int | None = None) -> Iterator[Image.Image]:
    """Open the pictures of a request one after the other.

    Args:
        images: of the request.
        draft_size: see `open_image`.

    Raises:
        InputError: when they are no list of 1 to `MAX_PICTURES`, or one of them is no picture.
    """
    sent = _list(images, "images", MAX_PICTURES)
    for place, image in enumerate(sent, 1):
        try:
            picture = open_image(_bytes(image), draft_size=draft_size)
        except InputError as error:
            raise (_at(f"Picture {place}", error) if len(sent) > 1 else error) from error
        yield picture


@contextmanager
def deleted_afterwards(images: object) -> Iterator[None]:
    """Delete the uploads among the pictures of a request when it ends, also by an error."""
    try:
        yield
    finally:
        sent = images if isinstance(images, list) else ()
        delete_uploads([upload for image in sent if (upload := _upload(image))])


def _bytes(image: object) -> bytes:
    if isinstance(image, str) and image.startswith("data:"):
        return _decode(image)
    if isinstance(image, str) and _BARE_BASE64.match(image):
        raise InputError('Base64 needs "data:image/jpeg;base64," in front of it.', "api.data_url")
    upload = _upload(image)
    if upload is None:
        raise InputError("A picture is a data URL or an uploaded file.", "api.image")
    if is_url(upload.path):
        raise ServiceError("api.address").error
    return read_upload(upload, MAX_PICTURES)


def _upload(image: object) -> Upload | None:
    """Return the upload that a path, or the address of one, stands for; None for anything else."""
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str) or not path or path.startswith("data:"):
        return None
    return Upload("", unquote(path.partition(_UPLOAD_ADDRESS)[2]) or path)


def _decode(url: str) -> bytes:
    head, _, body = url.partition(",")
    if len(body) * 3 > MAX_FILE_MB * 2**20 * 4:
        raise InputError("The picture has more than {limit} MB; make it smaller.", "api.size", limit=MAX_FILE_MB)
    data = b""
    if head.endswith(";base64"):
        with suppress(ValueError):  # many programs break base64 into lines
            data = base64.b64decode("".join(unquote(body).split()), validate=True)
    if not data:
        raise InputError('A data URL has to look like "data:image/jpeg;base64,...".', "api.data_url")
    return data


def read_caption(caption: object) -> str:
    """Read a caption. Raises InputError when it is no text, empty or too long."""
    if not isinstance(caption, str):
        raise InputError("A caption has to be text.", "api.caption")
    return clean_caption(caption)


def read_captions(captions: object) -> list[str]:
    """Read captions. Raises InputError when they are no list of 1 to `MAX_CAPTIONS`, or one of them is wrong."""
    cleaned = []
    for place, caption in enumerate(_list(captions, "captions", MAX_CAPTIONS), 1):
        try:
            cleaned.append(read_caption(caption))
        except InputError as error:
            raise _at(f"Caption {place}", error) from error
    return cleaned


def read_count(k: object) -> int:
    """Read a number of results. Raises InputError when it is no whole number from 1 to `MAX_RESULTS`."""
    if isinstance(k, bool) or not isinstance(k, int | float) or k != k // 1 or not 1 <= k <= MAX_RESULTS:
        raise InputError("k has to be a whole number from 1 to {limit}.", "api.k", limit=MAX_RESULTS)
    return int(k)


def _list(values: object, name: str, limit: int) -> list[Any]:
    if not isinstance(values, list) or not 1 <= len(values) <= limit:
        raise InputError("{name} has to be a list of 1 to {limit}.", "api.list", name=name, limit=limit)
    return values


def _at(place: str, error: InputError) -> InputError:
    return InputError("{place}: {error}", error.code, place=place, error=str(error))
