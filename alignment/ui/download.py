"""UI, download: files for the visitor. They exist in the page alone, not on the server's disk."""

import base64
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from alignment.preprocess import InputError
from alignment.ui.strings import error_text
from alignment.ui.widgets import Changes, Value, on_event, user_errors, widget

_serial = count(1)


class BrowserDownload:
    """An invisible element that lets the browser save a file; made inside a Gradio block."""

    def __init__(self, elem_id: str) -> None:
        self.file = widget("courier", {}, elem_id=elem_id)
        on_event(self.file.saved, lambda: {self.file: {}}, [], [self.file])

    def serve(
        self,
        button: Any,
        make_file: Callable[..., tuple[str, str, bytes]],
        button_value: Callable[..., Value],
        inputs: Sequence[Any],
    ) -> None:
        """Let a button of `download.js` save the file (name, media type, content) that `make_file` returns.

        Both functions get the values of `inputs`, the language first.
        """

        def download(lang: str, *values: Any) -> Changes:
            shown = {**button_value(lang, *values), "serial": next(_serial)}  # a new value enables the button again
            try:
                with user_errors():
                    name, kind, data = make_file(lang, *values)
            except InputError as error:
                return {button: {**shown, "error": error_text(lang, error)}, self.file: {}}
            file = {"serial": next(_serial), "name": name, "kind": kind, "data": base64.b64encode(data).decode()}
            return {button: shown, self.file: file}

        on_event(button.wanted, download, inputs, [button, self.file])
