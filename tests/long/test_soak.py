"""The app under 32 clients for ten minutes: no error, no lost answer, no memory that only grows.

`ALIGNMENT_SOAK_SECONDS=180 make test-long` takes less long. Captions, pictures, matrices and explanations are mixed,
and each client comes and goes as browsers do; what is measured is printed.
"""

import asyncio
import base64
import io
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.http_client import AppProcess, Visitor, running

CLIENTS = 32
SECONDS = float(os.environ.get("ALIGNMENT_SOAK_SECONDS", "600"))
WARM = 0.5  # of the time; until then caches fill, and the allocator finds out how much it needs
GROWTH_MB_A_MINUTE = 20.0  # a tenth of a megabyte kept of each request would be three times as much
VISITS = 20  # requests after which a client closes its page and opens another

KINDS = ("text", "text", "text", "picture", "text", "search", "matrix", "text", "upload", "why")


@dataclass
class Outcome:
    seconds: dict[str, list[float]] = field(default_factory=dict)
    wrong: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, MB

    @property
    def answers(self) -> int:
        return sum(map(len, self.seconds.values()))

    def slope(self) -> float:
        """MB a minute, by least squares."""
        after = [(at, mb) for at, mb in self.memory if at > WARM * SECONDS]
        return float(np.polyfit(*zip(*after, strict=True), 1)[0]) * 60


class Client:
    """Asks what the page and programs ask, over HTTP, again and again."""

    def __init__(self, address: str, page: Visitor, photos: list[bytes]) -> None:
        limits = httpx.Limits(max_keepalive_connections=4)
        self.http = httpx.AsyncClient(base_url=address, timeout=120, trust_env=False, limits=limits)
        self.elements, self.photos = page, photos
        self.session = ""

    async def open(self) -> None:
        self.http.cookies.clear()
        self.session = os.urandom(6).hex()
        assert (await self.http.get("/")).status_code == 200

    async def api(self, name: str, *data: object) -> list[Any]:
        sent = await self.http.post(f"/gradio_api/call/{name}", json={"data": data})
        assert sent.status_code == 200, sent.text
        return await self._answer(f"/gradio_api/call/{name}/{sent.json()['event_id']}", {})

    async def event(self, element: str, event: str, data: object = None, **typed: object) -> list[Any]:
        dependency = self.elements.dependency(element, event)
        body = self.elements.body(dependency, data, typed) | {"session_hash": self.session}
        sent = await self.http.post("/gradio_api/queue/join", json=body)
        assert sent.status_code == 200, sent.text
        return await self._answer("/gradio_api/queue/data", {"session_hash": self.session})

    async def _answer(self, path: str, params: dict[str, str]) -> list[Any]:
        kind = ""
        async with self.http.stream("GET", path, params=params) as events:
            async for line in events.aiter_lines():
                name, _, said = line.partition(": ")
                kind = said if name == "event" else kind
                message = json.loads(said) if name == "data" else None
                if kind == "complete" and message is not None:
                    return message
                if kind == "error" and message is not None:
                    raise AssertionError(said)
                if isinstance(message, dict) and message.get("msg") == "process_completed":
                    assert message["success"], said
                    return message["output"]["data"]
        raise EOFError("no answer came")

    async def text(self, number: int) -> None:
        (found,) = await self.api("search_images", f"a dog number {number} on the beach", 12)
        assert len(found["matches"]) == 12

    async def picture(self, number: int) -> None:
        url = f"data:image/jpeg;base64,{base64.b64encode(self._photo(number)).decode()}"
        (found,) = await self.api("search_captions", url, 10, "")
        assert len(found["matches"]) == 10

    async def upload(self, number: int) -> None:
        sent = await self.http.post("/gradio_api/upload", files={"files": ("a.jpg", self._photo(number))})
        assert sent.status_code == 200, sent.text
        files = {"files": [{"name": "a.jpg", "path": sent.json()[0]}]}
        assert await self.event("captions-drop", "files", files)

    async def matrix(self, number: int) -> None:
        urls = [f"data:image/jpeg;base64,{base64.b64encode(self._photo(number + n)).decode()}" for n in range(3)]
        (table,) = await self.api("similarity_matrix", urls, ["a cat", f"number {number}", "一只狗"])
        assert len(table["similarity"]) == 3

    async def search(self, number: int) -> None:
        assert await self.event("pictures-search", "click", pictures_query=f"a red bicycle {number}")

    async def why(self, number: int) -> None:
        assert await self.event("captions-results", "why", {"id": "people-01.en"})

    def _photo(self, number: int) -> bytes:
        return self.photos[number % len(self.photos)]


def photos() -> list[bytes]:
    made = []
    rng = np.random.default_rng(0)
    for _ in range(24):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((960, 720), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        made.append(buffer.getvalue())
    return made


@pytest.fixture
def app(tmp_path) -> Iterator[AppProcess]:
    with running(
        "--rate", "0", "--keep-minutes", str(SECONDS / 600), "--log", "json", GRADIO_TEMP_DIR=str(tmp_path)
    ) as app:
        yield app


class Soak:
    """All clients for as long as it takes."""

    def __init__(self, app: AppProcess, page: Visitor) -> None:
        self.outcome, self.numbers, self.begun = Outcome(), itertools.count(), time.perf_counter()
        self.process, pictures = psutil.Process(app.process.pid), photos()
        self.clients = [Client(app.address, page, pictures) for _ in range(CLIENTS)]

    async def run(self) -> Outcome:
        await asyncio.gather(self.weigh(), *(self.visit(client, place) for place, client in enumerate(self.clients)))
        for client in self.clients:
            await client.http.aclose()
        return self.outcome

    def now(self) -> float:
        return time.perf_counter() - self.begun

    async def visit(self, client: Client, first: int) -> None:
        for turn in itertools.count(first):
            if self.now() > SECONDS:
                return
            kind, sent = KINDS[turn % len(KINDS)], self.now()
            ask: Callable[[int], Awaitable[None]] = getattr(client, kind)
            try:
                if (turn - first) % VISITS == 0:
                    await client.open()
                await ask(next(self.numbers))
            except (EOFError, httpx.HTTPError) as error:
                self.outcome.wrong[f"lost: {error!r}"[:120]] += 1
            except AssertionError as error:
                self.outcome.wrong[f"error: {error}"[:120]] += 1
            else:
                self.outcome.seconds.setdefault(kind, []).append(self.now() - sent)

    async def weigh(self) -> None:
        while self.now() < SECONDS:
            self.outcome.memory.append((self.now(), self.process.memory_info().rss / 2**20))
            await asyncio.sleep(1)


@pytest.mark.timeout(SECONDS + 300)
def test_it_can_be_left_running(app, tmp_path, capsys):
    with Visitor(app.address) as page:
        outcome = asyncio.run(Soak(app, page).run())
        health = page.http.get("/healthz").json()
    every = [seconds for each in outcome.seconds.values() for seconds in each]
    with capsys.disabled():
        print(f"\n{CLIENTS} clients, {SECONDS:g} s: {outcome.answers} answers, {outcome.answers / SECONDS:.1f}/s")
        for kind, seconds in sorted(outcome.seconds.items()):
            p95 = quantiles(seconds, n=20)[-1] if len(seconds) > 1 else seconds[0]
            print(f"  {kind:8} {len(seconds):6d} answers, p50 {median(seconds):.2f} s, p95 {p95:.2f} s")
        print(f"  all: p50 {median(every):.2f} s, p95 {quantiles(every, n=20)[-1]:.2f} s; wrong: {dict(outcome.wrong)}")
        first, last = outcome.memory[0][1], outcome.memory[-1][1]
        print(f"  memory {first:.0f} -> {last:.0f} MB, {outcome.slope():+.2f} MB a minute after the first half")
        print(
            "  MB over time: " + " ".join(f"{mb:.0f}" for _, mb in outcome.memory[:: max(1, len(outcome.memory) // 12)])
        )
    assert not outcome.wrong
    assert set(outcome.seconds) == set(KINDS)
    assert outcome.slope() < GROWTH_MB_A_MINUTE
    assert (health["status"], health["queue"], health["working"]) == ("ok", 0, 0)
    assert not [line for line in app.log() if line["level"] == "error"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".jpg"]
