"""The documentation: tables equal to the code, links that lead somewhere, commands that exist, two equal languages."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import app

ROOT = Path(app.ROOT)
DOCS = ROOT / "docs"
CHINESE = DOCS / "zh-CN"
PAIRS = {
    ROOT / "README.md": ROOT / "README.zh-CN.md",
    ROOT / "CONTRIBUTING.md": CHINESE / "contributing.md",
    **{page: CHINESE / page.name for page in sorted(DOCS.glob("*.md"))},
}
PAGES = [*PAIRS, *PAIRS.values(), ROOT / "SECURITY.md"]


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def blocks(text: str, language: str = r"\w+") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """Leave out code blocks and front matter, which hold lines that look like headings."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def command_names() -> Iterator[str]:
    for command in tables.COMMANDS:
        subcommands = tables.subcommands(tables.parser_of(command))
        yield from (f"{command} {name}" for name in subcommands) if subcommands else [command]


# ---------------------------------------------------------------- tables


def test_every_table_says_what_the_code_says() -> None:
    words = tables.Words()
    stale = [
        name_of(page) for lang, page in tables.pages() if tables.rewritten(text_of(page), words, lang) != text_of(page)
    ]
    assert stale == [], "run `make docs`"
    assert [*words.faults, *words.unused()] == [], "see docs/words.json"


def test_every_command_and_variable_has_its_table() -> None:
    wanted = {f"options {name}" for name in command_names()} | {"service", "environment", "endpoints"}
    for folder in (DOCS, CHINESE):
        found = [mark for page in folder.glob("*.md") for mark in re.findall(r"<!-- table: (.*?) -->", text_of(page))]
        assert wanted <= set(found)
        assert len(found) == len(set(found))


def test_every_setting_of_the_service_is_listed_with_its_default() -> None:
    with tables.bare_environment():
        defaults = vars(app.parse([]))
    for page in (DOCS / "deploy.md", CHINESE / "deploy.md"):
        lines = re.findall(r"^\| (`--[^|]*\| `ALIGNMENT_.*) \|$", text_of(page), re.MULTILINE)
        rows = [[cell.strip(" `") for cell in line.split("|")] for line in lines]
        listed = {option.split()[0][2:].replace("-", "_"): default for option, _, default, *_ in rows}
        assert listed == {name: str(defaults[name]) for name in app.server.Settings.__dataclass_fields__}
        assert [variable for _, variable, *_ in rows] == [f"ALIGNMENT_{name.upper()}" for name in listed]


def test_a_stale_table_is_written_again() -> None:
    old = "before\n<!-- table: options alignment.gallery check -->\n| old |\n<!-- end of table -->\nafter\n"
    new = tables.rewritten(old, tables.Words(), "zh")
    assert new.startswith("before\n<!-- table: options alignment.gallery check -->\n| 选项 |")
    assert "| `--index URI` |" in new
    assert new.endswith("|\n<!-- end of table -->\nafter\n")
    assert "old" not in new
    with pytest.raises(ValueError, match="nonsense"):
        tables.table("nonsense", tables.Words(), "en")


def test_a_help_text_without_chinese_is_named() -> None:
    words = tables.Words()
    assert words.translate("a new help text", "zh") == "a new help text"
    assert any("a new help text" in fault for fault in words.faults)
    words.translations["an old help text"] = "旧"
    assert any("an old help text" in fault for fault in words.unused())


# ---------------------------------------------------------------- pages


def anchors(page: Path) -> set[str]:
    """Compute the anchors of headings as GitHub does."""
    headings = re.findall(r"^#+ (.+)$", prose(text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(text_of(page)))
    return [link for link in found if not link.startswith(("http://", "https://"))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    for readme, pages in ((ROOT / "README.md", PAIRS), (ROOT / "README.zh-CN.md", PAIRS.values())):
        linked = {(readme.parent / link.partition("#")[0]).resolve() for link in links(readme)}
        assert set(pages) - {readme} <= linked


@pytest.mark.parametrize("page", PAIRS, ids=name_of)
def test_both_languages_say_the_same(page: Path) -> None:
    english, chinese = text_of(page), text_of(PAIRS[page])
    assert shape(english) == shape(chinese)
    assert [bare(code) for code in blocks(english)] == [bare(code) for code in blocks(chinese)]
    assert figures(english) == figures(chinese)
    assert [
        Path(link).name.partition("#")[0] for link in links(page) if "://" not in link and link.endswith(".svg")
    ] == [Path(link).name for link in links(PAIRS[page]) if link.endswith(".svg")]


def linked(page: Path) -> set[str]:
    """Name the files that a page links, but the page in the other language."""
    names = {Path(link.partition("#")[0]).name.replace("README.zh-CN", "README") for link in links(page)}
    return {name.lower() for name in names} - {"", "readme.md", page.name.lower()}


def shape(text: str) -> list[str]:
    """List headings by level, rows of tables by their number of cells, and items of lists."""
    lines = re.findall(r"^(#+(?= )|\|.*\||- )", re.sub(r"\\\|", "", prose(text)), re.MULTILINE)
    return [f"row of {line.count('|')}" if line[0] == "|" else line for line in lines]


def bare(code: str) -> str:
    """Leave out comments, and the words that are translated."""
    code = re.sub(r" *#.*$", "", code, flags=re.MULTILINE)
    said = r"[\u4e00-\u9fff]+|a cat with green eyes|nothing fits|a cat|a cup of coffee|\b(en|zh)\b|path/to/pictures"
    return re.sub(said, "", code)


def figures(text: str) -> list[str]:
    """List what was measured: decimals, percentages and large numbers, in order of size."""
    return sorted(re.findall(r"\d+\.\d+|\d+(?= ?%)|\d{1,3}(?:,\d{3})+", prose(text)))


# ---------------------------------------------------------------- the code that pages name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"`((?:alignment|assets|checkpoints|docs|tests)/[\w./-]+)`", prose(text_of(page)))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [DOCS / "architecture.md", CHINESE / "architecture.md"], ids=name_of)
def test_every_name_in_the_architecture_is_in_the_code(page: Path) -> None:
    sources = [ROOT / "app.py", *(ROOT / "alignment").rglob("*.py")]
    known = set(re.findall(r"\w+", "".join(source.read_text("utf-8") for source in sources)))
    named = re.findall(r"`([A-Za-z_]+)`", prose(text_of(page)))
    assert [name for name in named if name not in known] == []


# ---------------------------------------------------------------- commands


def commands(page: Path) -> Iterator[list[str]]:
    """Split the shell commands of a page into words, without comments."""
    for block in blocks(text_of(page), "(?:sh|powershell)"):
        for line in block.replace("\\\n", " ").splitlines():
            if "$" not in line and (words := shlex.split(line.replace("\\", "/"), comments=True)):
                yield words


def parsed_by(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]] | None:
    """Find the parser of a command of ours, and the arguments it is given."""
    if "app.py" in words:
        return app.build_parser(), words[words.index("app.py") + 1 :]
    for position in [number for number, word in enumerate(words) if word == "-m"]:
        if module := tables.PARSERS.get(words[position + 1]):
            return importlib.import_module(module).build_parser(), words[position + 2 :]
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_has_the_options_it_is_given(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNMENT_INDEX", "http://localhost:19530")  # as the page on Milvus sets it
    for words in commands(page):
        if found := parsed_by(words):
            parser, arguments = found
            parser.parse_args([word for word in arguments if word != "..."])  # SystemExit names what it does not know


def test_commands_are_found_and_wrong_ones_refused() -> None:
    found = [words for page in PAGES for words in commands(page) if parsed_by(words)]
    assert len(found) > 60
    parser, _ = parsed_by(["torchrun", "-m", "alignment.gallery", "build", "x"]) or pytest.fail("not found")
    with pytest.raises(SystemExit):
        parser.parse_args(["build", "photos", "--out", "gallery", "--tags"])


def test_every_make_target_exists_and_every_target_is_told() -> None:
    targets = set(re.findall(r"^([\w-]+):.*## ", text_of(ROOT / "Makefile"), re.MULTILINE))
    told = {page: set(re.findall(r"(?<=make )[a-z][\w-]*(?=[`\n ])", code_of(page))) for page in PAGES}
    for page, names in told.items():
        assert names <= targets, name_of(page)
    for lang in (PAIRS.keys(), PAIRS.values()):
        assert targets == set().union(*(told[page] for page in lang))


def code_of(page: Path) -> str:
    """Join the code of a page: blocks, and what stands between backticks."""
    text = text_of(page)
    inline = re.findall(r"`([^`\n]+)`", prose(text))
    return "\n".join([*blocks(text, "(?:sh|powershell)"), *(f"{code}\n" for code in inline)])
