"""Each command ends by saying what was read, joined, cut, repaired and left out, in the same words."""

from __future__ import annotations

import copy
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from alignment.data import Pair
from alignment.evaluate import main as evaluate
from alignment.gallery import main as gallery
from alignment.picture_limits import LIMITS, use_size_options
from alignment.preprocess import Preprocessor
from alignment.train.command import main as train
from alignment.train.dataset import CaptionIndex, ContrastiveDataset

PAIR = Pair("a.png", ("a dog",))
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


def on(data: Path, model: str) -> list[str]:
    return ["--data", str(data), "--model", model, "--device", "cpu"]


@pytest.mark.parametrize("command", ["build", "evaluate", "check"])
def test_a_command_says_what_became_of_the_data(
    command: str, data: Path, tmp_path: Path, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(checkpoint("clip")), tmp_path / "out"
    run, words = {
        "build": (gallery, ["build", str(data), "--out", str(out), "--model", model, "--no-calibration"]),
        "evaluate": (evaluate, [*on(data, model), "--resamples", "0", "--json", str(out)]),
        "check": (train, ["--data", str(data), "--check", "--model", model]),
    }[command]
    assert run(words) == 1  # the spreadsheet
    said = capsys.readouterr().out
    if command == "evaluate":
        assert list(json.loads(out.read_text())["unread"]) == ["val.xlsx"]
        assert json.loads(out.read_text())["cut"] == [{"max_tokens": 77, "captions": 1}]
    data.joinpath("val.xlsx").unlink()
    assert run(words) == 0
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


@pytest.mark.parametrize("option", ["--data", "--eval-data", "--second-data"])
def test_a_run_goes_on_with_what_was_read_and_its_status_says_so(
    option: str, data: Path, tmp_path: Path, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "whole")
    (tmp_path / "whole" / "val.xlsx").unlink()
    for picture in (tmp_path / "whole").glob("*.png"):
        Image.open(picture).transpose(Image.Transpose.ROTATE_90).point(lambda value: value // 2).save(picture)
    words = on(tmp_path / "whole", str(checkpoint("clip")))
    words += ["--max-steps", "1", "--batch-size", "2", "--no-augment", "--no-interpolate", "--workers", "0"]
    where = [option, str(data)] if option != "--data" else []
    words[1] = str(data if option == "--data" else tmp_path / "whole")
    assert train([*words, *where, "--output", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.splitlines()[-12:]
    prefix = "" if option == "--data" else f"{option} {data}: "
    assert any(line.startswith(f"- {prefix}not read, val.xlsx: a spreadsheet") for line in last)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["data_complete"] is False


@pytest.mark.parametrize("command", ["check", "evaluate", "train"])
def test_larger_pictures_come_in_by_an_option(
    command: str,
    data: Path,
    tmp_path: Path,
    checkpoint: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (data / "val.xlsx").unlink()
    Image.radial_gradient("L").resize((1200, 20)).save(data / "2.png")
    Image.new("1", (8000, 8000)).save(data / "3.png")
    run, words = {
        "check": (train, [*on(data, str(checkpoint("clip"))), "--check"]),
        "evaluate": (evaluate, [*on(data, str(checkpoint("clip"))), "--resamples", "0"]),
        "train": (train, [*on(data, str(checkpoint("clip"))), "--max-steps", "1", "--no-interpolate"]),
    }[command]
    outs = [["--output", str(tmp_path / str(n))] if command == "train" else [] for n in range(2)]
    try:
        assert run([*words, *outs[0]]) == 0
        said = caplog.text + str(capsys.readouterr())
        assert "pictures that cannot be opened: 2" in said
        assert "--max-megapixels" in said
        assert "--max-aspect-ratio" in said
        assert run([*words, *outs[1], "--max-megapixels", "64", "--max-aspect-ratio", "60"]) == 0
        assert "cannot be opened" not in str(capsys.readouterr())
    finally:
        use_size_options()


def test_a_worker_that_is_started_afresh_has_the_same_limits(checkpoint: Callable[[str], Path]) -> None:
    captions, preprocessor = CaptionIndex([PAIR], []), Preprocessor.load(checkpoint("clip"))
    try:
        use_size_options(108, 60)
        examples = ContrastiveDataset([PAIR], captions, preprocessor, batch_size=1, num_steps=1)
        use_size_options()
        copy.copy(examples)  # by the way in which it is sent to another process
        assert LIMITS == {"pixels": 108_000_000, "aspect": 60}
    finally:
        use_size_options()
