"""Floor 1, what comes with the code: `assets/` and `checkpoints/`, beside this package in a clone and in a wheel."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Where the package `alignment` and the folders beside it lie."""

MODEL, GALLERY = "checkpoints/compact", "assets/gallery"
"""The model and the gallery that come along."""


def shipped(name: str) -> str:
    """Find a folder that comes along, from wherever the command is run; short where it lies here."""
    return name if Path.cwd() == ROOT else str(ROOT / name)
