"""The container file, as far as it can be judged without building it: what it copies, runs, keeps and leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch

import pytest

from alignment.bundled import ROOT


def instructions() -> Iterator[tuple[str, str]]:
    """Read the container file: each instruction with what it is told, lines joined."""
    lines = [line for line in (ROOT / "Containerfile").read_text("utf-8").splitlines() if not line.startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, words = line.partition(" ")
            yield name, words


def told(name: str) -> list[str]:
    return [words for found, words in instructions() if found == name]


def test_it_knows_no_instruction_that_there_is_not() -> None:
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "VOLUME", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    assert {name for name, _ in instructions()} == known


def test_what_it_copies_is_there_and_is_all_that_the_app_needs() -> None:
    copied = [word for words in told("COPY") for word in words.split()[:-1]]
    assert set(copied) == {"requirements.txt", "app.py", "LICENSE", "alignment", "assets", "checkpoints"}
    assert all((ROOT / name).exists() for name in copied)
    for words in told("COPY"):
        *sources, target = words.split()
        assert target == "./" or sources == [target]  # the content of a folder would be copied, not the folder


@pytest.mark.parametrize("page", ["docs/install.md", "docs/zh-CN/install.md"])
def test_it_installs_as_the_documentation_says(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    commands = [command.strip() for words in told("RUN") for command in words.split("&&") if "pip" in command]
    assert len(commands) == 2
    for command in commands:
        assert f".venv/bin/{command.replace('--no-cache-dir ', '')}\n" in text


def test_nobody_in_it_is_root_and_what_it_writes_is_kept() -> None:
    names = [name for name, _ in instructions()]
    (user,) = told("USER")
    assert user not in ("root", "0")
    assert f"useradd --create-home --uid 1000 {user}" in told("RUN")[1]
    assert "RUN" not in names[names.index("USER") :]
    assert told("VOLUME") == ["/cache"]
    settings = dict(re.findall(r"(\w+)=(\S+)", told("ENV")[0]))
    assert settings["GRADIO_SERVER_NAME"] == "0.0.0.0"
    assert settings["GRADIO_SERVER_PORT"] == told("EXPOSE")[0] == "7860"
    assert all(settings[name].startswith("/cache/") for name in ("ALIGNMENT_CACHE", "HF_HOME"))


def test_it_starts_the_app_and_asks_how_it_is() -> None:
    assert json.loads(told("ENTRYPOINT")[0]) == ["python", "app.py"]
    python, option, code = json.loads(told("HEALTHCHECK")[0].partition("CMD ")[2])
    assert (python, option) == ("python", "-c")
    assert "/healthz" in code
    compile(code, "HEALTHCHECK", "exec")


def ignored(path: str) -> bool:
    """Judge a path by the ignore file: the last pattern that fits it, or a folder around it, decides."""
    parts = path.split("/")
    around = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    verdict = False
    for line in (ROOT / ".containerignore").read_text("utf-8").splitlines():
        pattern = line.removeprefix("!")
        anywhere = pattern.removeprefix("**/")
        fits = pattern in around if anywhere == pattern else any(fnmatch(part, anywhere) for part in parts)
        if line and not line.startswith("#") and (pattern == "*" or fits):
            verdict = not line.startswith("!")
    return verdict


OUTSIDE = (".env", ".git/config", "my_photos/a.jpg", "tests/x.py", "alignment/__pycache__/a.pyc", "assets/.env")
INSIDE = ("app.py", "requirements.txt", "alignment/ui/api.py", "assets/ui/page.css", "checkpoints/compact/config.json")


def test_the_app_goes_in_and_what_lies_beside_it_stays_out() -> None:
    assert [path for path in (*OUTSIDE, *INSIDE) if ignored(path)] == list(OUTSIDE)
    assert (ROOT / ".dockerignore").read_bytes() == (ROOT / ".containerignore").read_bytes()


def test_no_secret_is_baked_in() -> None:
    assert not re.search("token|password|secret|_key", (ROOT / "Containerfile").read_text("utf-8"), re.IGNORECASE)
