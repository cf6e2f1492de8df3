"""Look the installed packages up among the known vulnerabilities: `make audit`, or `python tests/audit.py`.

A vulnerability ends it with 1, unless `[tool.audit]` in pyproject.toml names it with a reason. Where the service that
knows them cannot be reached it says so, and ends with 0: no build fails for want of a network.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable")
PATIENCE = 300  # seconds


def main(command: Sequence[str] = COMMAND) -> int:
    """Run the command; returns its exit status."""
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["audit"]["allowed"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        report = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return not_audited(f"it did not answer in {PATIENCE} s")
    except json.JSONDecodeError:
        if "No module named pip_audit" in done.stderr:
            print('audit: pip-audit is not installed; run: pip install -e ".[test]"')
            return 1
        return not_audited((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return judge(report, allowed)


def not_audited(why: str) -> int:
    print(f"audit: NOT DONE, the service that knows the vulnerabilities cannot be asked here: {why}")
    return 0


def judge(report: Mapping[str, Any], allowed: Mapping[str, str]) -> int:
    """Say what pip-audit found; the exit status.

    Args:
        report: of pip-audit.
        allowed: id of a vulnerability -> why it does no harm here.
    """
    packages = report["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if not audited:
        return not_audited(f"it knows none of {len(packages)} packages")
    found, excused = [], set()
    for package in audited:
        for flaw in package["vulns"]:
            ids = {flaw["id"], *flaw.get("aliases", ())}
            if known := ids & allowed.keys():
                excused |= known
                continue
            mended = ", ".join(flaw.get("fix_versions", ())) or "no version yet"
            found.append(f"{package['name']} {package['version']}: {flaw['id']}, mended in {mended}")
    for line in found:
        print(f"audit: {line}")
    for id in sorted(excused):
        print(f"audit: {id} is allowed: {allowed[id]}")
    for id in sorted(allowed.keys() - excused):
        print(f"audit: {id} is allowed and was not found; take it off the list in pyproject.toml")
    rest = f"; not known to the service, so not looked up: {', '.join(skipped)}" if skipped else ""
    print(f"audit: {len(audited)} packages, {len(found)} vulnerabilities{rest}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
