"""Read the JSON files of settings that lie beside a checkpoint's weights."""

import json
from pathlib import Path
from typing import Any


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file is missing or holds anything else. A damaged one is a ValueError."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return config if isinstance(config, dict) else {}
