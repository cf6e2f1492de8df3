"""Drive the app with several clients at once: `python tests/benchmarks/under_load.py`.

The app runs as people start it, in a process of its own, and is asked over plain HTTP, as `gradio_client` does it: one
call to send the question, one to wait for the answer. Three questions in four are captions, one is a photo. Every
answer has to be the one that was given to the same question asked alone.

A second app encodes every request by itself; the two take turns. `--against FOLDER` adds a third, from another
checkout.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from pathlib import Path
from statistics import median, quantiles

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds for an answer; who waits longer has lost it
NEAR = 2e-3  # cosines, which a batch may add up in another order

ALONE = "from alignment.engine import core; core.TEXTS_AT_ONCE = 1"
START = "import sys; {change}\nimport app; sys.exit(app.main(sys.argv[1:]))"

SUBJECTS = ("a dog", "a cat", "two children", "an old man", "a red bicycle", "a lion", "a rocket", "一只猫", "一杯咖啡")
PLACES = ("on the beach", "in the snow", "at night", "on a table", "in front of a house", "in a market", "在草地上")


@dataclass(frozen=True)
class Question:
    """What to ask: the endpoint's name and its arguments."""

    name: str
    data: list[object]


@dataclass
class Outcome:
    """What the clients of one run met."""

    seconds: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    wrong: Counter[str] = field(default_factory=Counter)


@dataclass
class App:
    """An app under load."""

    name: str
    address: str
    process: subprocess.Popen[str]
    expected: list[list[float]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=[1, 8, 32])
    add("--seconds", type=float, default=60, help="for each app and number of clients (default: %(default)s)")
    add("--pixels", type=int, default=1280, help="longer side of the photos (default: %(default)s)")
    add("--against", type=Path, help="another checkout of this repository")
    add("--kinds", choices=("mixed", "texts", "photos"), default="mixed")
    add("--json", type=Path, help="write the figures to this file as well")
    add("--options", nargs=argparse.REMAINDER, default=[], help="for the apps, such as --model and --gallery; the last")
    arguments = parser.parse_args()
    asked, rows = questions(arguments.kinds, arguments.pixels), []
    with ExitStack() as stack:
        apps = [
            stack.enter_context(served("batched", ROOT, "", arguments.options)),
            stack.enter_context(served("one by one", ROOT, ALONE, arguments.options)),
        ]
        if arguments.against:
            apps.append(stack.enter_context(served(str(arguments.against), arguments.against, "", arguments.options)))
        for app in apps:
            app.expected = asyncio.run(alone(app, asked))
        print("app          clients  answers/s   p50 ms   p95 ms  CPU ms  answers   lost  errors  wrong  server MB")
        for clients in arguments.clients:
            outcomes = []
            for app in apps:
                before = megabytes(app.process.pid), cpu_seconds(app.process.pid)
                outcomes.append(asyncio.run(load(app, asked, clients, arguments.seconds)))
                print(line(app, clients, outcomes[-1], before), flush=True)
            rows.append(row(clients, *outcomes[:2]))
    if arguments.json:
        title = f"The app under load, {arguments.seconds:g} s for each number of clients"
        arguments.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1), encoding="utf-8")


def row(clients: int, together: Outcome, apart: Outcome) -> dict[str, object]:
    """Say for `bench.py` what waiting requests gain by being encoded together."""
    rates = [len(outcome.seconds) / outcome.elapsed for outcome in (together, apart)]
    p95 = [quantiles(outcome.seconds, n=20)[-1] * 1000 for outcome in (together, apart)]
    wrong = ", ".join(f"{together.wrong[kind]} {kind}" for kind in ("lost", "errors", "wrong"))
    return {
        "what": f"{clients} {'client' if clients == 1 else 'clients'}, waiting requests together, beside one by one",
        "ours": rates[0],
        "reference": rates[1],
        "ratio": rates[0] / rates[1],
        "unit": "answers/s",
        "note": f"p95 {p95[0]:.0f} ms, beside {p95[1]:.0f}; {len(together.seconds)} answers, {wrong}",
    }


def questions(kinds: str, pixels: int) -> list[Question]:
    """Make up captions, and take photos from the starter gallery."""
    texts = [Question("search_images", [f"{subject} {place}", 12]) for subject in SUBJECTS for place in PLACES]
    pictures = [Question("search_captions", [photo, 10, ""]) for photo in photos(pixels)]
    if kinds != "mixed":
        return texts if kinds == "texts" else pictures
    mixed = []
    for place, text in enumerate(texts):
        mixed.append(text)
        if place % 3 == 2:
            mixed.append(pictures[place // 3 % len(pictures)])
    return mixed


def photos(pixels: int) -> list[str]:
    """Read photos of the starter gallery as data URLs of JPEGs."""
    from alignment.gallery.records import read_hand_written

    urls = []
    for picture in read_hand_written(ROOT / "assets" / "gallery" / "sources")[0][:12]:
        image = Image.open(picture.path).convert("RGB")
        factor = pixels / max(image.size)
        buffer = BytesIO()
        image.resize((round(image.width * factor), round(image.height * factor))).save(buffer, "JPEG", quality=88)
        urls.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return urls


@contextmanager
def served(name: str, folder: Path, change: str, options: Sequence[str]) -> Iterator[App]:
    """Start an app on a free port, wait until it answers, and end it afterwards."""
    port = free_port()
    command = [sys.executable, "-c", START.format(change=change), "--port", str(port), *options]
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "ALIGNMENT_RATE": "0"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("Open "):
            raise SystemExit(f"{name} did not start: {line}")
        yield App(name, f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def megabytes(process: int) -> float:
    """Resident memory of a process."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True, check=True)
    return int(shown.stdout) / 1024


def cpu_seconds(process: int) -> float:
    """Processor time of a process so far, in whole seconds."""
    shown = subprocess.run(["ps", "-o", "cputimes=", "-p", str(process)], capture_output=True, text=True, check=True)
    return float(shown.stdout)


# ---------------------------------------------------------------- asking


async def ask(client: httpx.AsyncClient, question: Question) -> list[float]:
    """Ask one question; the cosines of the answer.

    Raises:
        LookupError: when it ends in an error.
        EOFError: when no answer comes.
    """
    sent = await client.post(f"/gradio_api/call/{question.name}", json={"data": question.data})
    if sent.status_code != 200:
        raise LookupError(f"{sent.status_code}: {sent.text[:200]}")
    event = ""
    async with client.stream("GET", f"/gradio_api/call/{question.name}/{sent.json()['event_id']}") as answer:
        async for line in answer.aiter_lines():
            kind, _, said = line.partition(": ")
            event = said if kind == "event" else event
            if kind == "data" and event == "error":
                raise LookupError(said)
            if kind == "data" and event == "complete":
                return [match["similarity"] for match in json.loads(said)[0]["matches"]]
    raise EOFError


def connected(address: str) -> httpx.AsyncClient:
    never_again = httpx.Limits(max_keepalive_connections=0)  # as `gradio_client`: a connection for each call
    return httpx.AsyncClient(base_url=address, timeout=PATIENCE, trust_env=False, limits=never_again)


async def alone(app: App, asked: Sequence[Question]) -> list[list[float]]:
    """Ask every question once, one after the other."""
    async with connected(app.address) as client:
        return [await ask(client, question) for question in asked]


async def load(app: App, asked: Sequence[Question], clients: int, seconds: float) -> Outcome:
    """Let each client ask one question after the other until the time is over."""
    outcome, numbers, started = Outcome(), count(), time.perf_counter()

    async def visit(client: httpx.AsyncClient) -> None:
        while time.perf_counter() < started + seconds:
            place, sent = next(numbers) % len(asked), time.perf_counter()
            try:
                cosines = await ask(client, asked[place])
            except LookupError as error:
                outcome.wrong["errors"] += 1
                print(f"{app.name}: {error}", file=sys.stderr)
                continue
            except (EOFError, httpx.HTTPError) as error:
                outcome.wrong["lost"] += 1
                print(f"{app.name}: {error!r}", file=sys.stderr)
                continue
            outcome.seconds.append(time.perf_counter() - sent)
            pairs = zip(cosines, app.expected[place], strict=True)
            outcome.wrong["wrong"] += any(abs(one - other) > NEAR for one, other in pairs)

    async with connected(app.address) as client:
        await asyncio.gather(*(visit(client) for _ in range(clients)))
    outcome.elapsed = time.perf_counter() - started
    return outcome


def line(app: App, clients: int, outcome: Outcome, before: tuple[float, float]) -> str:
    """Write one run down; `before` it, the server's memory and processor time."""
    megabytes_before, cpu_before = before
    answers = len(outcome.seconds)
    p50, p95 = median(outcome.seconds) * 1000, quantiles(outcome.seconds, n=20)[-1] * 1000
    wrong = "  ".join(f"{outcome.wrong[kind]:5d}" for kind in ("lost", "errors", "wrong"))
    rate, cpu = answers / outcome.elapsed, (cpu_seconds(app.process.pid) - cpu_before) / answers * 1000
    memory = f"{megabytes_before:.0f} -> {megabytes(app.process.pid):.0f}"
    times = f"{rate:10.1f} {p50:8.1f} {p95:8.1f} {cpu:7.1f}"
    return f"{app.name[-12:]:12} {clients:7d} {times} {answers:8d}  {wrong}  {memory}"


if __name__ == "__main__":
    main()
