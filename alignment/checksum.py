"""Floor 1: files whose content is verified by SHA-256 when they are read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.atomic import write_file


def write_json_checksummed(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON together with its SHA-256, under the key "sha256"."""
    content = json.loads(json.dumps(content))  # as it will be read
    write_file(path, json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n")


def read_json_checksummed(path: Path) -> dict[str, Any]:
    """Read what `write_json_checksummed` wrote; ValueError when the content differs from that."""
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict) or content.pop("sha256", "") != _digest(content):
        raise ValueError("its content is not what was written")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
