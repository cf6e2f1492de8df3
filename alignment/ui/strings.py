"""UI, strings: the words of the page in English and Chinese, read from `assets/ui/words`.

Errors are translated by their code: `InputError("...", "image.empty")` looks up "error.image.empty".
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from alignment.preprocess import InputError

LANGUAGES = {"en": "English", "zh": "中文"}
DEFAULT_LANG = "en"
WORDS = Path(__file__).resolve().parents[2] / "assets" / "ui" / "words"


@cache
def strings() -> dict[str, dict[str, str]]:
    """Read all words: language -> key -> text. Raises ValueError when a key is in two files."""
    words: dict[str, dict[str, str]] = {}
    for file in sorted(WORDS.glob("*.json")):
        new = json.loads(file.read_text("utf-8"))
        if repeated := words.keys() & new.keys():
            raise ValueError(f"{file} repeats keys of another file: {sorted(repeated)}")
        words |= new
    return {lang: {key: texts[lang] for key, texts in words.items()} for lang in LANGUAGES}


def text(lang: str, key: str, **values: object) -> str:
    """Look up a text and fill its placeholders with `values`. Raises KeyError on an unknown key."""
    return strings()[lang][key].format(**values)


@cache
def labels(lang: str, prefix: str) -> Mapping[str, str]:
    """Return the texts whose keys begin with `prefix`, by the rest of the key; scripts fill their placeholders."""
    return {key.removeprefix(prefix): words for key, words in strings()[lang].items() if key.startswith(prefix)}


def count_text(lang: str, key: str, count: int) -> str:
    """Look up a text about a number of things, in the singular for one."""
    return text(lang, f"{key}.one" if count == 1 else key, count=count)


def error_text(lang: str, error: InputError) -> str:
    """Translate an error; one without a translation stays English."""
    template = strings()[lang].get(f"error.{error.code}")
    values = dict(error.values)
    if lang == "zh" and "kind" in values:  # "HEIC files"
        name, files, _ = str(values["kind"]).rpartition(" files")
        values["kind"] = f"{name} 文件" if files else "这种图片"
    with suppress(KeyError, IndexError):  # a value of the translation is missing
        return template.format(**values) if template else str(error)
    return str(error)


def pick_language(query: Mapping[str, str], accept_language: str, default: str = DEFAULT_LANG) -> str:
    """Choose the page's language: `?lang=zh`, else the browser's first one that the page has, else the default."""
    accepted: list[tuple[float, str]] = []
    for part in accept_language.split(","):
        tag, _, weight = part.partition(";q=")
        with suppress(ValueError):
            accepted.append((float(weight or 1), tag.strip()))
    accepted.sort(key=lambda entry: -entry[0])
    for tag in (query.get("lang", ""), *(tag for weight, tag in accepted if weight > 0)):
        short = tag.lower().replace("_", "-").split("-")[0]
        if short in LANGUAGES:
            return short
    return default


def error_for_browser(accept_language: str, error: InputError) -> str:
    """Translate an error into the language that an Accept-Language header asks for."""
    return error_text(pick_language({}, accept_language), error)
