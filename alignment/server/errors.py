"""Server, errors: what a client is told when its request is not served, in the language of the page."""

import math
from collections.abc import Callable
from typing import TypeAlias

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from alignment.preprocess import InputError

PAGE_LANGUAGE = "x-page-language"  # header in which the page says its language; without it Accept-Language counts
Translate: TypeAlias = Callable[[str, InputError], str]  # an Accept-Language header and an error -> what is shown

_ERRORS = {  # code: HTTP status, message
    "service.rate": (429, "Too many requests from your address; try again in {seconds} s."),
    "service.open": (429, "Too many requests from your address at the same time; wait for some of them to end."),
    "service.queue": (503, "Many people are searching just now; try again in a moment."),
    "service.size": (413, "The request has more than {limit} MB; send less at once, or upload the pictures first."),
    "service.waiting": (
        413,
        "There are too many files from your address waiting; the limit is {files} files and {limit} MB.",
    ),
    "service.full": (507, "There is no room for more files just now; try again later."),
    "service.slow": (408, "The request did not arrive in time; try again."),
    "service.stopping": (503, "The service is being restarted; try again in a minute."),
    "service.request": (400, "The request cannot be understood; compare it with the description of the API."),
    "service.closed": (404, "There is nothing here."),
    "service.session": (403, "This session belongs to another browser; open the page again."),
    "upload.size": (413, "The file has more than {limit} MB; make it smaller."),
    "upload.name": (413, "The file's name is too long; shorten it."),
    "upload.lost": (400, "The file did not arrive; try again."),
    "api.address": (400, "Addresses on the network are not opened here; upload the picture or send it as a data URL."),
    "internal": (500, "That did not work, and it is not your fault; try again."),
}
_RETRY_S = {"service.open": 5, "service.queue": 5, "service.waiting": 30, "service.full": 60, "service.stopping": 60}


class ServiceError(InputError):
    """A request that is not served, with the sentence for its client; the page shows it as any `InputError`."""

    def __init__(self, code: str, *, status: int = 0, retry_s: float = 0, **values: object) -> None:
        """Make the error `code` of the table above; `values` fill the placeholders of its message."""
        known_status, message = _ERRORS[code]
        super().__init__(message, code, **values)
        self.status, self.retry_s = status or known_status, retry_s or _RETRY_S.get(code, 0)

    @property
    def word(self) -> str:
        """The code's last part, for the log and for programs."""
        return self.code.rpartition(".")[2]

    def response(self, headers: Headers, translate: Translate) -> JSONResponse:
        """Return the HTTP answer. Gradio's clients show `detail`, ours and others read `error` and `code`."""
        said = translate(headers.get(PAGE_LANGUAGE) or headers.get("accept-language", ""), self)
        # For a 503 Gradio's page shows a message of its own, in English.
        status = 429 if self.status == 503 and PAGE_LANGUAGE in headers else self.status
        retry = {"Retry-After": str(math.ceil(self.retry_s))} if self.retry_s else {}
        return JSONResponse({"error": said, "detail": said, "code": self.word}, status, retry)
