"""Top floor, what is answered at a limit: a sentence, in the language of the page that asks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starlette.datastructures import Headers, QueryParams
from starlette.responses import JSONResponse

from alignment.preprocess import InputError
from alignment.ui.strings import error_text, pick_language

PAGE_LANGUAGE = "x-page-language"
"""The page says its language in this header; before it knows, the browser's counts, and programs get English."""


@dataclass(eq=False)
class Refusal(Exception):
    """A request that is not served; its `error` says why.

    Attributes:
        status: of HTTP.
        error: the sentence.
        retry: seconds after which it is worth another try; 0 if it never is.
    """

    status: int
    error: InputError
    retry: float = 0.0

    @property
    def reason(self) -> str:
        """One word for the log."""
        return self.error.code.rpartition(".")[2]

    def response(self, headers: Headers) -> JSONResponse:
        """Say it. Gradio's clients show `detail`, ours and others read `error` and `code`."""
        lang = pick_language(QueryParams(), headers.get(PAGE_LANGUAGE) or headers.get("accept-language", ""))
        said = error_text(lang, self.error)
        more = {"Retry-After": str(math.ceil(self.retry))} if self.retry else {}
        return JSONResponse({"error": said, "detail": said, "code": self.reason}, self.status, more)


def too_often(seconds: float) -> Refusal:
    """Refuse somebody who asks faster than the rate."""
    wait = math.ceil(seconds)
    message = "Too many requests from your address; try again in {seconds} s."
    return Refusal(429, InputError(message, "service.rate", seconds=wait), max(wait, 1))


def too_many_open() -> Refusal:
    """Refuse somebody who has too many requests open."""
    message = "Too many requests from your address at the same time; wait for some of them to end."
    return Refusal(429, InputError(message, "service.open"), 5)


def queue_full() -> Refusal:
    """Refuse somebody for whom there is no place in the queue."""
    return Refusal(503, InputError("Many people are searching just now; try again in a moment.", "service.queue"), 5)


def too_large(limit_mb: float) -> Refusal:
    """Refuse a request that says too much."""
    message = "The request has more than {limit} MB; send less at once, or upload the pictures first."
    return Refusal(413, InputError(message, "service.size", limit=f"{limit_mb:g}"))


def file_too_large(limit_mb: float) -> Refusal:
    """Refuse a file."""
    message = "The file has more than {limit} MB; make it smaller."
    return Refusal(413, InputError(message, "upload.size", limit=f"{limit_mb:g}"))


def too_many_files(files: int, limit_mb: float) -> Refusal:
    """Refuse uploads of somebody whose earlier ones have not been read yet."""
    message = "There are too many files from your address waiting; the limit is {files} files and {limit} MB."
    return Refusal(413, InputError(message, "service.waiting", files=files, limit=f"{limit_mb:g}"), 30)


def no_space() -> Refusal:
    """Refuse uploads while there is no room for anybody's."""
    return Refusal(507, InputError("There is no room for more files just now; try again later.", "service.full"), 60)


def name_too_long() -> Refusal:
    """Refuse a file by its name."""
    return Refusal(413, InputError("The file's name is too long; shorten it.", "upload.name"))


def bad_upload() -> Refusal:
    """Refuse what claims to be an upload and cannot be read as one."""
    return Refusal(400, InputError("The file did not arrive; try again.", "upload.lost"))


def too_slow() -> Refusal:
    """Refuse somebody who has begun to send and does not go on."""
    return Refusal(408, InputError("The request did not arrive in time; try again.", "service.slow"))


def stopping() -> Refusal:
    """Refuse what comes while the service ends."""
    return Refusal(503, InputError("The service is being restarted; try again in a minute.", "service.stopping"), 60)


def unusable(status: int = 400) -> Refusal:
    """Refuse a request that does not say what it should."""
    message = "The request cannot be understood; compare it with the description of the API."
    return Refusal(status, InputError(message, "service.request"))


def closed() -> Refusal:
    """Refuse an address at which there is nothing for anybody."""
    return Refusal(404, InputError("There is nothing here.", "service.closed"))


def failed() -> Refusal:
    """Say that something broke, and no more."""
    message = "That did not work, and it is not your fault; try again."
    return Refusal(500, InputError(message, "internal"))
