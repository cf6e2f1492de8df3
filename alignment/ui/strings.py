"""Top floor, the words of the page: English and Chinese side by side, in `assets/ui/words`, a file per part.

Errors are translated by their code: `InputError("...", "image.empty")` looks up "error.image.empty".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from alignment.preprocess import InputError

LANGUAGES = {"en": "English", "zh": "中文"}
DEFAULT_LANGUAGE = "en"
WORDS = Path(__file__).resolve().parents[2] / "assets" / "ui" / "words"


@cache
def strings() -> dict[str, dict[str, str]]:
    """Read all words: language -> key -> text.

    Raises:
        ValueError: when a key is in two files.
    """
    found: dict[str, dict[str, str]] = {lang: {} for lang in LANGUAGES}
    for file in sorted(WORDS.glob("*.json")):
        for key, words in json.loads(file.read_text("utf-8")).items():
            if key in found[DEFAULT_LANGUAGE]:
                raise ValueError(f"{file} says {key} again; a key stands in one file.")
            for lang in LANGUAGES:
                found[lang][key] = words[lang]
    return found


def text(lang: str, key: str, **values: object) -> str:
    """Say it in this language; `values` fill the placeholders.

    Raises:
        KeyError: on an unknown key.
    """
    return strings()[lang][key].format(**values)


def count_text(lang: str, key: str, count: int) -> str:
    """Say how many, with the singular where it differs."""
    return text(lang, f"{key}.one" if count == 1 else key, count=count)


def error_text(lang: str, error: InputError) -> str:
    """Say what is wrong in this language; an error that has no translation yet speaks English."""
    template = strings()[lang].get(f"error.{error.code}")
    values = dict(error.values)
    if lang == "zh" and "kind" in values:  # "HEIC files"
        name, files, _ = str(values["kind"]).rpartition(" files")
        values["kind"] = f"{name} 文件" if files else "这种图片"
    try:
        return template.format(**values) if template else str(error)
    except (KeyError, IndexError):
        return str(error)


def pick_language(query: Mapping[str, str], accept_language: str, default: str = DEFAULT_LANGUAGE) -> str:
    """Choose the page's language: `?lang=zh`, else the first of the browser's that we speak, else the default."""
    wanted = [query.get("lang", "")]
    ranked = []
    for place, part in enumerate(accept_language.split(",")):
        tag, _, weight = part.partition(";q=")
        try:
            ranked.append((-float(weight or 1), place, tag.strip()))
        except ValueError:
            continue
    wanted += [tag for weight, _, tag in sorted(ranked) if weight < 0]
    for tag in wanted:
        short = tag.lower().replace("_", "-").split("-")[0]
        if short in LANGUAGES:
            return short
    return default


def error_for_browser(accept_language: str, error: InputError) -> str:
    """Say what is wrong in the language that an Accept-Language header asks for."""
    return error_text(pick_language({}, accept_language), error)
