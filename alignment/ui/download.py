"""Top floor, files to take home: they are in the page alone, never on the server's disk, and forgotten once saved."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from alignment.preprocess import InputError
from alignment.ui.strings import error_text
from alignment.ui.widgets import on_event, user_errors, widget

_serial = count(1)


class BrowserDownload:
    """Brings files to the browser; made inside a Gradio block."""

    def __init__(self, elem_id: str) -> None:
        self.bag = widget("courier", {}, elem_id=elem_id)
        on_event(self.bag.saved, dict, [], [self.bag])

    def serve(
        self,
        button: Any,
        file: Callable[..., tuple[str, str, bytes]],
        looks: Callable[..., dict[str, Any]],
        inputs: Sequence[Any],
    ) -> None:
        """Let a button of `download.js` ask for a file.

        Args:
            button: the button.
            file: makes it of the values of `inputs`: its name, its media type and its content.
            looks: lays the button out, of the same values.
            inputs: the language first.
        """

        def answer(lang: str, *values: Any) -> list[dict[str, Any]]:
            shown = {**looks(lang, *values), "serial": next(_serial)}  # the button wakes up
            try:
                with user_errors():
                    name, kind, data = file(lang, *values)
            except InputError as error:
                return [{**shown, "error": error_text(lang, error)}, {}]
            return [
                shown,
                {"serial": next(_serial), "name": name, "kind": kind, "data": base64.b64encode(data).decode()},
            ]

        on_event(button.wanted, answer, inputs, [button, self.bag])
