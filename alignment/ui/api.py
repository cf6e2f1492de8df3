"""UI, API: what programs may ask, through `gradio_client`, plain HTTP or, with `app.py --mcp`, as MCP tools.

Place in the flow: beside the tabs, on the same engine and in the same queues. Gradio makes the schema from the
signatures and docstrings here (no `from __future__ import annotations`: it cannot resolve those), and an agent chooses
a tool by them. What programs send is validated as strictly as what a browser sends; `GuardedBlocks` refuses URLs before
and returns errors, in English.
"""

import base64
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import unquote

import gradio as gr
import torch
from gradio_client.utils import is_http_url_like
from torch import Tensor

from alignment.engine import AlignmentEngine
from alignment.picture_limits import LIMITS
from alignment.preprocess import MAX_CAPTION_CHARS, InputError, clean_caption, open_image
from alignment.server.errors import ServiceError
from alignment.ui import api_schemas as schemas
from alignment.ui.uploads import MAX_FILE_MB, Upload, delete_uploads, read_upload
from alignment.ui.widgets import queue_options

MAX_RESULTS = 100
MAX_PICTURES = MAX_CAPTIONS = 64

_BARE_BASE64 = re.compile(r"(/9j/|iVBORw0K|UklGR|R0lGOD|SUkq|TU0A|Qk)[\w+/=\s-]{100,}\Z", re.ASCII)  # of a picture
_UPLOAD_ADDRESS = "/gradio_api/file="


class UploadedFile(TypedDict):
    """A file as Gradio's clients send it: where the upload put it."""

    path: str
    meta: dict[str, str]


SentPicture = str | UploadedFile  # a data URL, or what uploading gave: a path, its address here, or a client's file


class Api:
    """The endpoints; each method is one."""

    def __init__(self, engine: AlignmentEngine) -> None:
        self.engine = engine

    def search_images(self, caption: str, k: int = 12) -> schemas.PicturesFound:
        """Find the pictures of the gallery that show what a caption says, best first.

        Args:
            caption: What the picture should show, in English or Chinese, up to 1000 characters.
            k: How many pictures, 1 to 100.

        Returns:
            matches, best first: rank (from 1), id, captions by language, credit (author and licence), thumbnail
            (address below the server's), similarity (cosine, -1 to 1), share (the model's softmax over the whole
            gallery; with SigLIP models a sigmoid), probability (calibrated chance that this is a match, null where
            nothing tells) and verdict (fits, may_fit or nothing_close; null where nothing tells). verdict: that of the
            whole answer; no_meaning for a caption that says nothing. fits: whether that is fits or may_fit; if false,
            the matches are only the least bad ones. something_fits: calibrated chance that any picture of the gallery
            is a match.
        """
        return schemas.pictures_found(self.engine.search_images(read_caption(caption), read_count(k)))

    def search_captions(self, image: SentPicture, k: int = 10, lang: str = "") -> schemas.CaptionsFound:
        """Find the captions of the gallery that say what a picture shows, best first.

        Args:
            image: A data URL ("data:image/jpeg;base64,...") or what /gradio_api/upload or upload_file_to_gradio gave.
            k: How many captions, 1 to 100.
            lang: Only captions of this language compete, such as en or zh; all do if it is empty.

        Returns:
            matches, best first: rank (from 1), id, text, lang, similarity (cosine, -1 to 1), share (the model's softmax
            over all captions that competed; with SigLIP models a sigmoid), probability (calibrated chance that this is
            a match, null where nothing tells) and verdict (fits, may_fit or nothing_close; null where nothing tells).
            verdict: that of the whole answer; no_meaning for an empty picture. fits: whether that is fits or may_fit;
            if false, the matches are only the least bad ones. something_fits: calibrated chance that any caption of the
            gallery is a match.
        """
        with deleted_afterwards([image]):
            count, language = read_count(k), self._language(lang)
            return schemas.captions_found(self.engine.search_captions(self._embed([image])[0], count, language))

    def similarity_matrix(self, images: list[SentPicture], captions: list[str]) -> schemas.Matrix:
        """Score every one of several pictures against every one of several captions.

        Args:
            images: 1 to 64 pictures, each a data URL or what /gradio_api/upload or upload_file_to_gradio gave.
            captions: 1 to 64 captions, in English or Chinese.

        Returns:
            Tables with a row for each picture and a column for each caption: similarity (cosine, -1 to 1),
            softmax_over_captions (each row adds up to 1), softmax_over_images (each column adds up to 1) and sigmoid
            (each pair by itself; null for a model without a bias). best_captions: for each picture the column of its
            best caption, from 0. best_images: for each caption the row of its best picture, from 0.
        """
        with deleted_afterwards(images):
            texts = read_captions(captions)
            return schemas.matrix(self.engine.align(self._embed(images), texts), self.engine.encoder.logit_bias)

    def embed_images(self, images: list[SentPicture]) -> schemas.Embeddings:
        """Turn pictures into vectors that can be compared with those of captions: the dot product is the cosine.

        Args:
            images: 1 to 64 pictures, each a data URL or what /gradio_api/upload or upload_file_to_gradio gave.

        Returns:
            embeddings: a vector of length 1 for each picture. fingerprint: of the model; vectors of different
            models cannot be compared.
        """
        with deleted_afterwards(images):
            return {"embeddings": schemas.rows(self._embed(images)), "fingerprint": self.engine.encoder.fingerprint}

    def embed_captions(self, captions: list[str]) -> schemas.Embeddings:
        """Turn captions into vectors that can be compared with those of pictures: the dot product is the cosine.

        Args:
            captions: 1 to 64 captions, in English or Chinese, up to 1000 characters each.

        Returns:
            embeddings: a vector of length 1 for each caption. fingerprint: of the model; vectors of different
            models cannot be compared.
        """
        embeds = self.engine.embed_captions(read_captions(captions))
        return {"embeddings": schemas.rows(embeds), "fingerprint": self.engine.encoder.fingerprint}

    def describe(self) -> schemas.Description:
        """Say which model answers here, what its gallery holds and what the limits of the other tools are.

        Returns:
            model, fingerprint (of its weights), embed_dim, logit_scale and logit_bias (cosine to logit), images and
            captions (how many the gallery holds), languages (of its captions), calibrated (whether searches give
            probabilities) and limits.
        """
        encoder, gallery = self.engine.encoder, self.engine.gallery
        return {
            "model": Path(encoder.name).name if Path(encoder.name).exists() else encoder.name,
            "fingerprint": encoder.fingerprint,
            "embed_dim": encoder.embed_dim,
            "logit_scale": float(encoder.logit_scale),
            "logit_bias": None if encoder.logit_bias is None else float(encoder.logit_bias),
            "images": len(gallery.pictures),
            "captions": len(gallery.captions),
            "languages": list(gallery.languages),
            "calibrated": gallery.judge is not None,
            "limits": {
                "k": MAX_RESULTS,
                "images": MAX_PICTURES,
                "captions": MAX_CAPTIONS,
                "caption_characters": MAX_CAPTION_CHARS,
                "caption_tokens": encoder.preprocessor.max_length,
                "image_megabytes": MAX_FILE_MB,
                "image_megapixels": LIMITS["pixels"] // 10**6,
            },
        }

    def _language(self, lang: object) -> str | None:
        known = self.engine.gallery.languages
        if lang not in ("", None, *known):
            message = "The gallery has no captions in that language; lang may be {known}, or empty for all."
            raise InputError(message, "api.lang", known=" or ".join(known) or "only empty")
        return str(lang) if lang else None

    def _embed(self, images: object) -> Tensor:
        """Embed 1 to 64 pictures, (n, embed_dim), one after the other, so that one at a time is decoded in memory."""
        sent, embeds = _list(images, "images", MAX_PICTURES), []
        for place, image in enumerate(sent, 1):
            try:
                picture = open_image(_bytes(image), draft_size=self.engine.draft_size)
            except InputError as error:
                raise (_at(f"Picture {place}", error) if len(sent) > 1 else error) from error
            embeds.append(self.engine.embed_image(picture))
        return torch.stack(embeds)


def add_api(engine: AlignmentEngine) -> None:
    """Add the endpoints to the current page."""
    api = Api(engine)
    uploads = (api.similarity_matrix, api.embed_images)
    for endpoint in (api.search_images, api.search_captions, *uploads, api.embed_captions, api.describe):
        queue = queue_options("upload" if endpoint in uploads else "search")
        gr.api(endpoint, api_name=endpoint.__name__, api_description=_description(endpoint), **queue)


def _description(endpoint: Callable[..., Any]) -> str:
    """Return what an endpoint does and returns; Gradio adds the description of each parameter."""
    does, _, gives = (inspect.getdoc(endpoint) or "").partition("Returns:")
    return " ".join(f"{does.partition('Args:')[0]} Returns: {gives}".split())


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
    if is_http_url_like(upload.path):
        raise ServiceError("api.address")
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
    """Read captions. Raises InputError when they are no list of 1 to 64, or one of them is wrong."""
    cleaned = []
    for place, caption in enumerate(_list(captions, "captions", MAX_CAPTIONS), 1):
        try:
            cleaned.append(read_caption(caption))
        except InputError as error:
            raise _at(f"Caption {place}", error) from error
    return cleaned


def read_count(k: object) -> int:
    """Read a number of results. Raises InputError when it is no whole number from 1 to 100."""
    if isinstance(k, bool) or not isinstance(k, int | float) or k != k // 1 or not 1 <= k <= MAX_RESULTS:
        raise InputError("k has to be a whole number from 1 to {limit}.", "api.k", limit=MAX_RESULTS)
    return int(k)


def _list(values: object, name: str, limit: int) -> list[Any]:
    if not isinstance(values, list) or not 1 <= len(values) <= limit:
        raise InputError("{name} has to be a list of 1 to {limit}.", "api.list", name=name, limit=limit)
    return values


def _at(place: str, error: InputError) -> InputError:
    return InputError("{place}: {error}", error.code, place=place, error=str(error))
