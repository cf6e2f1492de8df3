"""Floor 1, what comes with the code: `assets/` and `checkpoints/`, beside this package in a clone and in a wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Where the package `alignment` and the folders beside it lie."""

MODEL, GALLERY = "checkpoints/compact", "assets/gallery"
"""The model and the gallery that come along."""

PACKAGE = "package:"
"""Prefix of a picture's source that lies inside an installed package."""


def shipped(name: str) -> str:
    """Find a folder that comes along, from wherever the command is run; short where it lies here."""
    return name if Path.cwd() == ROOT else str(ROOT / name)


def installed_file(source: str) -> Path:
    """Find a file inside an installed package, which is not imported.

    Args:
        source: "package:NAME/PATH".

    Raises:
        FileNotFoundError: when the package is not installed.
    """
    package, _, path = source.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"The package {package} is not installed.")
    return Path(spec.submodule_search_locations[0], path)
