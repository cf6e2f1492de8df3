"""Check names and sizes, which ruff has no rules for: part of `make lint`, or `python tests/layout.py`.

A module has a name that an engineer of this field would search for, and at most 400 lines; a README has at most 200.
Prints what breaks a rule, and ends with 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_MODULE_LINES, MAX_README_LINES = 400, 200
VAGUE = "utils util common helpers helper types misc"
# Names that modules once had. Each said less than the term that replaced it.
FORMER = """
    accidents ahead albums answers archives asking audit building catalogue choice codes connections courier directories
    door drawings durable erasing explaining face frozen graphs hostile incoming inputs judging kept killing lent
    links logs looking measure melting memory nonsense owners pairs parts pixels postings pushing reading refusal
    refusals remote room running segment sending sharing shipped sides storage store tags together tokens trial
    unfinished visitor ways
"""
REFUSED = frozenset((VAGUE + FORMER).split())


def faults(root: Path = ROOT) -> Iterator[str]:
    """Yield a line for every module or README that breaks a rule."""
    for path in [root / "app.py", *sorted((root / "alignment").rglob("*"))]:
        if path.name == "__pycache__" or not (path.is_dir() or path.suffix == ".py"):
            continue
        if path.stem in REFUSED:
            yield f"{path.relative_to(root)}: the name {path.stem!r} does not say what is in it"
        if path.is_file() and (lines := count_lines(path)) > MAX_MODULE_LINES:
            yield f"{path.relative_to(root)}: {lines} lines, at most {MAX_MODULE_LINES}; split it by topic"
    for path in sorted(root.glob("README*.md")):
        if (lines := count_lines(path)) > MAX_README_LINES:
            yield f"{path.relative_to(root)}: {lines} lines, at most {MAX_README_LINES}; the rest belongs in docs/"


def count_lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


if __name__ == "__main__":
    found = list(faults())
    print("\n".join(found) or "Names and sizes: no fault")
    sys.exit(bool(found))
