"""The wheel: it holds all that the app needs, and an environment without this repository starts the app from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.bundled import ROOT

_NEEDED = ("app.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "alignment", "assets", "checkpoints")


def run(*command: str, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP"))}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it from a copy, so that nothing is written beside the sources."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in _NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    quick = "--config-settings=--build-option=--compression=stored"  # weights take long to compress
    run(sys.executable, "-m", "pip", "wheel", ".", *options, quick, "--wheel-dir", str(out), cwd=copy)
    (found,) = out.iterdir()
    return found


def test_it_holds_all_that_the_app_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    patterns = (
        "alignment/**/*.py",
        "alignment/**/templates/*",
        "alignment/sample_pictures/*",
        "assets/ui/**/*",
        "assets/gallery/**/*",
        "assets/*.*",
        "checkpoints/**/*",
    )
    files = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    assert names == {"app.py", *(path.relative_to(ROOT).as_posix() for path in files)}


def test_an_environment_without_the_repository_starts_the_app_from_it(
    wheel: Path, tmp_path: Path, first_answer: Callable[..., dict]
) -> None:
    home, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", str(home), cwd=elsewhere)
    python = home / "bin" / "python"
    install = ("install", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "--python", str(python), *install, str(wheel), cwd=elsewhere)
    (packages,) = home.glob("lib/*/site-packages")
    # What the app depends on is here already. A file that puts the repository on the path is not read from there.
    dependencies = "\n".join(path for path in sys.path if path.endswith("-packages"))
    (packages / "dependencies.pth").write_text(dependencies, "utf-8")
    where = "import importlib.util as u; print(*(u.find_spec(name).origin for name in ('app', 'alignment')))"
    found = run(str(python), "-c", where, cwd=elsewhere).split()
    assert found == [str(packages / "app.py"), str(packages / "alignment" / "__init__.py")]

    answer = first_answer([str(python.with_name("image-text-alignment"))], elsewhere, "一只猫")
    assert answer["matches"][0]["id"] == "cat"
    assert answer["matches"][0]["thumbnail"]
