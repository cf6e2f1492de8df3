"""Floor 1, bundled data: `assets/` and `checkpoints/`, beside this package in a clone and in a wheel."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # holds the package `alignment` and the data beside it
MODEL, GALLERY = "checkpoints/compact", "assets/gallery"  # relative to `ROOT`
PACKAGE = "package:"  # prefix of a picture's source that lies inside an installed package


def bundled(name: str) -> str:
    """Return the path of a bundled folder: relative when the command runs in `ROOT`, else absolute."""
    return name if Path.cwd() == ROOT else str(ROOT / name)


def installed_file(source: str) -> Path:
    """Find "package:NAME/PATH" in an installed package, which is not imported; raises FileNotFoundError without it."""
    package, _, path = source.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"The package {package} is not installed.")
    return Path(spec.submodule_search_locations[0], path)
