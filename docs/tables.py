"""Write the tables of the documentation that repeat what the code says: `python docs/tables.py`, or `make docs`.

    <!-- table: options alignment.gallery build -->
    ... written here ...
    <!-- end of table -->

In each page, English and Chinese, the lines between the two marks are replaced. `words.json` maps each English
text of the code to its Chinese; a text that it lacks is named and makes the exit status 1, so a changed help text is
translated again.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints

Rows: TypeAlias = list[tuple[str, ...]]

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
WORDS = DOCS / "words.json"
LANGUAGES = {"en": DOCS, "zh": DOCS / "zh-CN"}
COMMANDS = ("app", "alignment.gallery", "alignment.train", "alignment.evaluate", "alignment.space", "alignment.compact")
PARSERS = {
    "app": "app",
    "alignment.gallery": "alignment.gallery.command",
    "alignment.train": "alignment.train.command",
    "alignment.evaluate": "alignment.evaluate.command",
    "alignment.space": "alignment.space.command",
    "alignment.compact": "alignment.compact.__main__",
}
"""Command -> module with its `build_parser`."""

_BLOCK = re.compile(r"(?<=<!-- table: )([\w. -]+?)( -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
_DEFAULT = re.compile(r"\s*\((?:ALIGNMENT_\w+; )?(?:default: )?%\(default\)s\)|^default: %\(default\)s$")
_FIXED_DEFAULT = re.compile(r"\s*\(default: (\d+)\)$")
_VARIABLE = re.compile(r"(ALIGNMENT|GRADIO)_[A-Z_]+")
_HEADS = {
    "en": {
        "options": ("Option", "Default", "What it does"),
        "service": ("Option", "Variable", "Default", "What it sets", "Beyond it"),
        "environment": ("Variable", "What it sets"),
        "endpoints": ("Endpoint", "Takes", "Gives", "Limits"),
        "limits": ("Limit", "Value"),
    },
    "zh": {
        "options": ("选项", "默认值", "作用"),
        "service": ("选项", "环境变量", "默认值", "含义", "超出时"),
        "environment": ("环境变量", "作用"),
        "endpoints": ("接口", "参数", "返回", "限制"),
        "limits": ("限制", "数值"),
    },
}
_API_WORDS = "nothing", "none", "comma", "semicolon"


class Words:
    """The Chinese of the code's English texts, and what the code does not say, in both languages."""

    def __init__(self) -> None:
        words: dict[str, Any] = json.loads(WORDS.read_text("utf-8"))
        self.translations: dict[str, str] = words["translations"]
        self.texts: dict[str, dict[str, str]] = words["texts"]
        self.used: set[str] = set()
        self.faults: list[str] = []

    def translate(self, english: str, lang: str) -> str:
        """Return a text of the code in a language."""
        self.used.add(english)
        if english not in self.translations:
            self.faults.append(f"no Chinese for: {json.dumps(english, ensure_ascii=False)}")
        return english if lang == "en" else self.translations.get(english, english)

    def text(self, name: str, lang: str) -> str:
        """Return a text that the code does not say."""
        self.used.add(name)
        if name not in self.texts:
            self.faults.append(f"no text: {name}")
        return self.texts.get(name, {}).get(lang, "")

    def unused(self) -> list[str]:
        """Name the entries that no table has."""
        return [f"not used: {name}" for name in (*self.translations, *self.texts) if name not in self.used]


# ---------------------------------------------------------------- options


@contextmanager
def bare_environment() -> Iterator[None]:
    """Hide the variables that change the defaults of options."""
    hidden = {name: value for name, value in os.environ.items() if _VARIABLE.fullmatch(name) or name == "SPACE_ID"}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command, or of a subcommand as in "alignment.gallery build"."""
    name, _, subcommand = command.partition(" ")
    module = importlib.import_module(PARSERS[name])
    with bare_environment():
        parser: argparse.ArgumentParser = module.build_parser()
    if not subcommand:
        return parser
    return subcommands(parser)[subcommand]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of subcommands by their names."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(nested[0].choices) if nested else {}


def options_table(command: str, words: Words, lang: str) -> Rows:
    """Return one row for each option of a command, but those of the group "service"."""
    parser = parser_of(command)
    return [
        (_invocation(action), _default(action), _said(action, command, words, lang))
        for action in _actions(parser, service=False)
    ]


def service_table(words: Words, lang: str) -> Rows:
    """Return one row for each option of the service, with its variable and what happens beyond the limit."""
    rows: Rows = []
    for action in _actions(parser_of("app"), service=True):
        name = _name(action)
        variable = f"ALIGNMENT_{name.removeprefix('--').replace('-', '_').upper()}"
        beyond = words.text(f"beyond {name}", lang)
        rows.append((_invocation(action), f"`{variable}`", _default(action), _said(action, "app", words, lang), beyond))
    return rows


def _actions(parser: argparse.ArgumentParser, *, service: bool) -> list[argparse.Action]:
    return [
        action
        for group in parser._action_groups
        for action in group._group_actions
        if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
        and (group.title == "service") == service
    ]


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _invocation(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{_name(action)}`"
    if action.nargs == 0:
        return ", ".join(f"`{option}`" for option in action.option_strings)
    value = action.metavar or action.dest.upper()
    if action.choices:
        value = f"{{{','.join(map(str, action.choices))}}}"
    value = " ".join(value) if isinstance(value, tuple) else value
    return f"`{action.option_strings[0]} {value}`"


def _default(action: argparse.Action) -> str:
    fixed = _FIXED_DEFAULT.search(action.help or "")
    value = fixed[1] if fixed else action.default
    if value is False or value in (None, [], "", "{}", argparse.SUPPRESS) or not action.option_strings:
        return ""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{shown.removeprefix(f'{ROOT}{os.sep}').replace(os.sep, '/')}`"


def _said(action: argparse.Action, command: str, words: Words, lang: str) -> str:
    english = _FIXED_DEFAULT.sub("", _DEFAULT.sub("", action.help or ""))
    return words.translate(english, lang) if english else words.text(f"{command} {_name(action)}", lang)


# ---------------------------------------------------------------- environment


def environment_table(words: Words, lang: str) -> Rows:
    """Return one row for each variable that the code reads, but those of the service's options."""
    names = sorted(variables_read())
    return [(f"`{name}`", words.text(f"environment {name}", lang)) for name in names]


def variables_read() -> set[str]:
    """Find the names of variables in the source; those that are only set are left out."""
    found: set[str] = set()
    for path in [ROOT / "app.py", *sorted((ROOT / "alignment").rglob("*.py"))]:
        tree = ast.parse(path.read_text("utf-8"))
        found |= {value for node in ast.walk(tree) if (value := _variable_in(node))} - set(_set_in(tree))
    return found


def _variable_in(node: ast.AST) -> str:
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) and _VARIABLE.fullmatch(value) else ""


def _set_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from filter(None, map(_variable_in, filter(None, node.keys)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setdefault":
            yield from filter(None, map(_variable_in, node.args))


# ---------------------------------------------------------------- API and input


def endpoints() -> dict[str, Callable[..., Any]]:
    """Return the endpoints of the API by name, in the order in which they are defined."""
    api = importlib.import_module("alignment.ui.api").Api
    return {name: method for name, method in vars(api).items() if inspect.isfunction(method) and name[0] != "_"}


def endpoints_table(words: Words, lang: str) -> Rows:
    """Return one row for each endpoint."""
    nothing, none, comma, semicolon = (words.text(f"API {name}", lang) for name in _API_WORDS)
    rows: Rows = []
    for name, method in endpoints().items():
        parameters = [value for key, value in inspect.signature(method).parameters.items() if key != "self"]
        takes = [f"`{value.name}`{_default_value(value)}" for value in parameters]
        limits = [words.text(f"API limit of {value.name}", lang) for value in parameters]
        answer = get_type_hints(method)["return"]
        gives = [f"`{field}`{_nested(kind, comma)}" for field, kind in get_type_hints(answer).items()]
        limited = _filled(semicolon.join(limits))
        rows.append((f"`{name}`", comma.join(takes) or nothing, comma.join(gives), limited or none))
    return rows


def _default_value(parameter: inspect.Parameter) -> str:
    given = parameter.default
    return "" if given is inspect.Parameter.empty else f" = {given if isinstance(given, int) else json.dumps(given)}"


def _nested(kind: Any, comma: str) -> str:
    """Name the fields of the items of a list."""
    (item, *_) = getattr(kind, "__args__", (None,))
    fields = get_type_hints(item) if isinstance(item, type) and hasattr(item, "__total__") else {}
    return f" ({comma.join(f'`{field}`' for field in fields)})" if fields else ""


def limits_table(words: Words, lang: str, table: str) -> Rows:
    """Return the limits of a group of entries: their texts, with the constants of the code filled in."""
    rows: Rows = []
    for name in [name for name in words.texts if name.startswith(f"{table} ")]:
        label, _, value = words.text(name, lang).partition(" | ")
        rows.append((label, _filled(value)))
    return rows


def constants() -> dict[str, int]:
    """Return the limits that the texts name in braces."""
    api, engine = importlib.import_module("alignment.ui.api"), importlib.import_module("alignment.engine")
    sizes = importlib.import_module("alignment.picture_limits")
    return {
        "results": api.MAX_RESULTS,
        "images": api.MAX_PICTURES,
        "captions": api.MAX_CAPTIONS,
        "characters": api.MAX_CAPTION_CHARS,
        "file_mb": api.MAX_FILE_MB,
        "megapixels": sizes.MAX_IMAGE_PIXELS // 10**6,
        "wan_pixels": sizes.MAX_IMAGE_PIXELS // 10**4,
        "aspect": sizes.MAX_ASPECT_RATIO,
        "zip_mb": engine.MAX_ZIP_MB,
        "photos": engine.MAX_PHOTOS,
    }


def _filled(text: str) -> str:
    return text.format(**constants()) if "{" in text else text


# ---------------------------------------------------------------- pages


def table(name: str, words: Words, lang: str) -> str:
    """Make the Markdown of a table by the name in its mark.

    Raises:
        ValueError: when no table has that name.
    """
    kind, _, rest = name.partition(" ")
    if kind == "options":
        rows = options_table(rest, words, lang)
    elif name == "service":
        rows = service_table(words, lang)
    elif name == "environment":
        rows = environment_table(words, lang)
    elif name == "endpoints":
        rows = endpoints_table(words, lang)
    elif kind == "limits":
        rows = limits_table(words, lang, f"limits {rest}")
    else:
        raise ValueError(f"There is no table {name!r}.")
    head = _HEADS[lang][kind]
    ruler = f"|{'---|' * len(head)}\n"
    lines = [f"| {' | '.join(line)} |\n".replace("  |", " |") for line in [head, *rows]]
    return "".join([lines[0], ruler, *lines[1:]])


def pages() -> Iterator[tuple[str, Path]]:
    """Return each page of the documentation with its language."""
    for lang, folder in LANGUAGES.items():
        for path in sorted(folder.glob("*.md")):
            yield lang, path


def rewritten(text: str, words: Words, lang: str) -> str:
    """Replace every marked table of a page."""
    return _BLOCK.sub(lambda found: f"{found[1]}{found[2]}{table(found[1], words, lang)}", text)


def main() -> int:
    """Write every table; returns 1 if a text is missing or not used."""
    words = Words()
    for lang, path in pages():
        old = path.read_text("utf-8")
        if (new := rewritten(old, words, lang)) != old:
            path.write_text(new, "utf-8", newline="\n")
            print(f"wrote {path.relative_to(ROOT)}")
    faults = [*dict.fromkeys(words.faults), *words.unused()]
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
