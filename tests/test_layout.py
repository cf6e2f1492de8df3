"""The check of names and sizes refuses what it is there to refuse."""

from pathlib import Path

from tests.layout import MAX_MODULE_LINES, MAX_README_LINES, faults


def test_what_breaks_a_rule_is_named(tmp_path: Path) -> None:
    (tmp_path / "alignment/room").mkdir(parents=True)
    (tmp_path / "app.py").write_text("pass\n" * MAX_MODULE_LINES)
    (tmp_path / "alignment/utils.py").touch()
    (tmp_path / "alignment/long.py").write_text("pass\n" * (MAX_MODULE_LINES + 1))
    (tmp_path / "README.md").write_text("line\n" * MAX_README_LINES)
    (tmp_path / "README.zh-CN.md").write_text("line\n" * (MAX_README_LINES + 1))
    assert [fault.split(":")[0] for fault in faults(tmp_path)] == [
        "alignment/long.py",
        "alignment/room",
        "alignment/utils.py",
        "README.zh-CN.md",
    ]
