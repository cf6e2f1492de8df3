"""Floor 1, bundled data: `assets/` and `checkpoints/`, beside this package in a clone and in a wheel."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Folder that holds the package `alignment` and the data beside it."""

MODEL, GALLERY = "checkpoints/compact", "assets/gallery"
"""The bundled model and gallery, relative to `ROOT`."""


def bundled(name: str) -> str:
    """Return the path of a bundled folder: relative when the command runs in `ROOT`, else absolute."""
    return name if Path.cwd() == ROOT else str(ROOT / name)
