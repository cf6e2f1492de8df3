"""A visitor without a browser: sends files and events to a served page as its scripts do, and whatever else."""

import json
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

import httpx

from tests.http_client import LOCAL, shown

LEAKS = re.compile(r"Traceback|Exception|/tmp/|/home/|/root/|site-packages|\.py\b|__i18n__|error\.[a-z]+\.")
TABS = ("captions", "pictures", "matrix", "photos", "evaluate")
TEXTS = {
    "markup": "<img src=x onerror=alert(1)><script>alert(2)</script>",
    "attribute": "\" autofocus onfocus=alert(1) x='` onmouseover=alert(2)",
    "template": "${alert(1)} {{constructor}} {0} {name} %s `",
    "control": "a\0b\x01\x1b[31mc\x7f\x85d",
    "null": "\0",
    "direction": "a\u202egnp.exe\u2066\u200f\u202d",
    "right to left": "\u05e9\u05dc\u05d5\u05dd .png",
    "surrogates": "a \ud800 + b\udfff \ud83d",
    "zalgo": "e" + "\u0301\u0489\u0334" * 300,
    "emoji": "\U0001f469\u200d\U0001f4bb \U0001f3f4",
    "lines": "a\r\nSet-Cookie: x=y\u2028b\u2029c",
    "formula": "=cmd|'/C calc'!A0",
    "path": "../../../../etc/passwd",
    "windows": "C:\\Windows\\con.png",
    "address": "https://example.org/x.png",
    "long": "x" * 100_000,
    "words": "ab " * 33_000,
    "parts": "a + b - " * 1000,
    "braces": "{" * 200 + "[" * 200,
    "many lines": "x\n" * 20_000,
    "blank": " \u3000\u200b\t",
}
_visitors = count()


class Visitor:
    """One visitor of the page, in one language."""

    def __init__(self, address: str, lang: str) -> None:
        self.address, self.lang, self.name = address.rstrip("/"), lang, f"visitor{next(_visitors)}"
        self.http = httpx.Client(**LOCAL, timeout=120)
        config = self.http.get(f"{self.address}/config").json()
        self.ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
        self.events = {tuple(target): part for part in config["dependencies"] for target in part["targets"]}
        self.parts = {part["id"]: part for part in config["components"]}

    def close(self) -> None:
        self.http.close()

    def upload(self, name: str, data: bytes) -> str:
        """Send a file; where the server put it, or "" if it would not have it."""
        name = name.encode("utf-8", "replace").decode()  # a header takes no lone surrogates
        answer = self.http.post(f"{self.address}/gradio_api/upload", files={"files": (name, data)})
        assert not LEAKS.search("" if answer.status_code == 200 else answer.text), answer.text
        return answer.json()[0] if answer.status_code == 200 else ""

    def trigger(self, element: str, event: str, data: Any = None, values: dict[int, Any] | None = None) -> list[Any]:
        """Fire an event of an element; what the page is told to show at last."""
        part = self.events[self.ids[element], event]
        inputs = [self._input(id, values or {}, place) for place, id in enumerate(part["inputs"])]
        body = {"data": inputs, "fn_index": part["id"], "session_hash": self.name, "event_data": data}
        if not part["queue"]:
            answer = self.post("run/predict", body)
            assert answer.status_code == 200, (element, event, answer.text)
            return [shown(value) for value in answer.json()["data"]]
        joined = self.post("queue/join", body)
        assert joined.status_code == 200, (element, event, joined.text)
        return self._last()

    def _input(self, id: int, values: dict[int, Any], place: int) -> Any:
        if place in values:
            return values[place]
        return self.lang if id == self.ids["language"] else self.parts[id]["props"].get("value")

    def _last(self) -> list[Any]:
        for message in self._messages():
            if message["msg"] == "process_completed":
                assert message["success"], message
                assert not LEAKS.search(json.dumps(message["output"], ensure_ascii=False)), message
                return [shown(value) for value in message["output"]["data"]]
        raise AssertionError("no answer")

    def post(self, route: str, body: Any) -> httpx.Response:
        """Post JSON in which any character may stand, lone surrogates too; nothing is told of the server."""
        head = {"content-type": "application/json"}
        answer = self.http.post(f"{self.address}/gradio_api/{route}", content=json.dumps(body), headers=head)
        assert not LEAKS.search(answer.text), answer.text
        return answer

    def _messages(self) -> Iterator[dict[str, Any]]:
        url = f"{self.address}/gradio_api/queue/data"
        with self.http.stream("GET", url, params={"session_hash": self.name}) as events:
            for line in events.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    def ask(self, endpoint: str, **values: Any) -> tuple[str, Any]:
        """Ask the API as a program would: the kind of its answer, "complete" or "error", and what it says."""
        joined = self.post(f"call/v2/{endpoint}", values)
        assert joined.status_code == 200, joined.text
        url = f"{self.address}/gradio_api/call/{endpoint}/{joined.json()['event_id']}"
        event, data = self.http.get(url).text.strip().split("\n")[-2:]
        return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def drop(self, tab: str, *files: tuple[str, str]) -> list[str]:
        """Drop uploaded files, each its name and path, onto a tab; what the page says of those it does not take."""
        data = {"files": [{"name": name, "path": path} for name, path in files], "run": 1, "first": True}
        changed = self.trigger(f"{tab}-drop", "files", data)
        value = next(part for part in changed if isinstance(part, dict) and "maxFiles" in part)
        return [
            *filter(None, [value.get("error")]),
            *(f"{name}: {reason}" for name, reason in value.get("skipped", [])),
        ]
