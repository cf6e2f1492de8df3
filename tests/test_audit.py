import json
import sys
import tomllib
from typing import Any

import pytest

from tests.audit import ROOT, judge, main


def package(name: str, *flaws: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "version": "1.0", "vulns": list(flaws)}


FLAW = {"id": "PYSEC-1", "aliases": ["CVE-1", "GHSA-1"], "fix_versions": ["1.1"], "description": ""}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0+cpu)"}


def test_a_vulnerability_fails_the_build_and_says_what_mends_it(capsys):
    assert judge({"dependencies": [package("good"), package("bad", FLAW)]}, {}) == 1
    assert "audit: bad 1.0: PYSEC-1, mended in 1.1\n" in capsys.readouterr().out


@pytest.mark.parametrize("id", ["PYSEC-1", "CVE-1", "GHSA-1"])
def test_one_that_is_allowed_does_not_and_its_reason_is_said(capsys, id):
    assert judge({"dependencies": [package("bad", FLAW)]}, {id: "not reached from here"}) == 0
    assert f"{id} is allowed: not reached from here" in capsys.readouterr().out


def test_an_allowance_that_nothing_needs_is_named(capsys):
    assert judge({"dependencies": [package("good")]}, {"CVE-9": "long ago"}) == 0
    assert "CVE-9 is allowed and was not found" in capsys.readouterr().out


def test_what_was_not_looked_up_is_named(capsys):
    assert judge({"dependencies": [package("good"), SKIPPED]}, {}) == 0
    assert "not looked up: torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit('ConnectionError: no such host')",
        f"print({json.dumps(json.dumps({'dependencies': [SKIPPED]}))})",
        "pass",
    ],
)
def test_where_nobody_can_be_asked_it_says_so_and_fails_nothing(capsys, code):
    assert main([sys.executable, "-c", code]) == 0
    assert "audit: NOT DONE" in capsys.readouterr().out


def test_without_the_tool_it_says_what_to_install(capsys):
    assert main([sys.executable, "-c", "raise SystemExit('No module named pip_audit')"]) == 1
    assert "pip install" in capsys.readouterr().out


def test_every_allowance_has_a_reason():
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["audit"]["allowed"]
    assert all(len(reason) > 10 for reason in allowed.values())
