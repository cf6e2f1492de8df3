"""Each command ends by saying what was read, joined, cut, repaired and left out, in the same words."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from alignment.evaluate import main as evaluate
from alignment.gallery import main as gallery
from alignment.train.command import main as train

LONG = " ".join(["dog"] * 80)  # of which the tiny models read 77 tokens or fewer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pictures; of their captions one is too long, one line is broken, and a spreadsheet lies beside them."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = ["image,caption", f"0.png,{LONG}", '1.png,"No entry']
    for number in range(12):
        Image.new("RGB", (40, 40), (20 * number, 255 - 20 * number, 50)).save(folder / f"{number}.png")
        if number > 1:
            lines.append(f"{number}.png,shade 一只狗 {'abcdefghijkl'[number]}")
    (folder / "captions.csv").write_text("\n".join([*lines, "gone.png,nothing"]), encoding="gb18030")
    with zipfile.ZipFile(folder / "val.xlsx", "w") as sheet:
        sheet.writestr("xl/sharedStrings.xml", "<sst><si><t>9.png</t></si></sst>")
    return folder


@pytest.mark.parametrize("command", ["build", "evaluate", "check"])
def test_a_command_says_what_became_of_the_data(
    command: str, data: Path, tmp_path: Path, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, status = str(checkpoint("clip")), 0
    if command == "build":
        words = ["build", str(data), "--out", str(tmp_path / "gallery"), "--model", model, "--no-calibration"]
        assert gallery(words) == 1  # the spreadsheet
        data.joinpath("val.xlsx").rename(tmp_path / "val.xlsx")
        said = capsys.readouterr().out
        status = gallery(words)
    elif command == "evaluate":
        out = tmp_path / "figures.json"
        evaluate(["--data", str(data), "--model", model, "--device", "cpu", "--resamples", "0", "--json", str(out)])
        said = capsys.readouterr().out
        assert list(json.loads(out.read_text())["unread"]) == ["val.xlsx"]
        assert json.loads(out.read_text())["cut"] == [{"max_tokens": 77, "captions": 1}]
    else:
        train(["--data", str(data), "--check", "--model", model])
        said = capsys.readouterr().out
    assert status == 0
    for line in (
        "left out, missing pictures: 1 (gone.png)",
        "read all the same, files not in UTF-8: 1 (captions.csv as gb18030)",
        "read all the same, lines with a quotation mark that is not closed: 1 (captions.csv:3)",
        "not read, val.xlsx: a spreadsheet",
        "only the first 77 tokens: 1 (dog dog",
    ):
        assert line in said


def test_training_without_captions_says_why(data: Path, tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    (data / "captions.csv").unlink()
    words = ["--data", str(data), "--model", str(checkpoint("clip")), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"0 captioned pictures(.|\n)*val\.xlsx: a spreadsheet"):
        train(words)
