"""The command of fine-tuning: what it offers, what it refuses, and that it says so in one sentence."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from alignment.train.command import build_parser, main
from alignment.train.objective import LOSSES, Loss
from alignment.train.presets import Preset
from alignment.train.record import RunRecord
from alignment.train.settings import Precision, TrainConfig
from alignment.train.start import SIZES


def options() -> dict[str, argparse.Action]:
    return {action.dest: action for action in build_parser()._actions}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Make 30 pictures of one colour each, and one caption without a picture."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [("file_name", "caption"), ("gone.png", "nothing")]
    for number in range(30):
        Image.new("RGB", (40, 40), (8 * number, 255 - 8 * number, 50)).save(folder / f"{number:02}.png")
        rows.append((f"{number:02}.png", f"shade {'abcdefghij'[number % 10]}{'klm'[number // 10]}"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


# ---------------------------------------------------------------- what it offers


def test_help_is_there_at_once() -> None:
    """Neither torch nor transformers is read for it."""
    script = (
        "import sys\nfrom alignment.train.command import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--learning-rate" in done.stdout
    assert "torchrun --nproc-per-node 2 -m alignment.train" in done.stdout


def test_every_setting_is_an_option_and_every_option_is_explained() -> None:
    names = {field.name for field in fields(TrainConfig)}
    assert set(options()) == names | {"help", "check", "resume", "push_to_hub", "private"}
    assert all(action.help for action in options().values())


def test_choices_are_those_of_the_code() -> None:
    choices = {name: tuple(action.choices) for name, action in options().items() if action.choices}
    assert choices == {
        "scratch": tuple(SIZES),
        "preset": get_args(Preset),
        "loss": get_args(Loss),
        "device": ("cuda", "mps", "cpu"),
        "precision": get_args(Precision),
    }
    assert set(LOSSES) == set(get_args(Loss))


def test_what_is_not_given_is_left_to_be_chosen() -> None:
    told = vars(build_parser().parse_args(["--data", "d", "--output", "o", "--model", "m"]))
    given = {name for name, value in told.items() if value is not None}
    assert given == {"data", "output", "model", "check", "resume", "private"}
    assert not any(told[name] for name in ("check", "resume", "private"))


def test_a_home_is_found_behind_an_equals_sign_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("model", "vision", "text", "data", "eval-data", "second-data", "kept-folder", "output")
    told = vars(build_parser().parse_args([f"--{name}=~/x" for name in names]))
    assert {told[name.replace("-", "_")] for name in names} == {str(tmp_path / "x")}


# ---------------------------------------------------------------- what it refuses

NEEDED = ["--model", "m", "--data", "d", "--output", "o"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "m", "--data", "d"], "--output is needed: a folder for the result"),
        (["--model", "m", "--output", "o"], "--data is needed: the captioned images"),
        (["--check"], "--data is needed"),
        (["--check", "--resume", "--output", "o"], "--data is needed"),
        (["--resume"], "--output is needed"),
        (["--vision", "v", "--data", "d", "--output", "o"], "--vision and --text go together: name both towers"),
        (["--data", "d", "--output", "o"], "name one start: --model, or --vision with --text, or --scratch"),
        ([*NEEDED, "--scratch", "tiny"], "name one start"),
        ([*NEEDED, "--vision", "v", "--text", "t"], "name one start"),
        ([*NEEDED, "--batch-size", "0"], "argument --batch-size: 0 is not above 0"),
        ([*NEEDED, "--minutes", "nan"], "argument --minutes: nan is not above 0"),
        ([*NEEDED, "--learning-rate", "fast"], "argument --learning-rate: invalid number value: 'fast'"),
        ([*NEEDED, "--preset", "most"], "argument --preset: invalid choice: 'most'"),
        ([*NEEDED, "--device", "gpu"], "argument --device: invalid choice: 'gpu'"),
        ([*NEEDED, "--warmup", "3"], "argument --warmup: 3 is not between 0 and 1"),
        ([*NEEDED, "--workers", "-1"], "argument --workers: -1 is not between 0 and 1024"),
        ([*NEEDED, "--private"], "--private goes with --push-to-hub"),
        ([*NEEDED, "--second-split", "dev"], "--second-split goes with --second-data"),
        ([*NEEDED, "--banana", "1"], "unrecognized arguments: --banana 1"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_read(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--check", "--data", "d"], ["--resume", "--output", "o"]])
def test_checking_and_resuming_need_no_start(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^train: There is no (run in o to go on with|d;)"):
        main(arguments)


def test_mistakes_are_one_sentence_and_exit_code_one(
    data: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--device", "cpu"])
        assert isinstance(ended.value.code, str)  # printed, and 1 is the exit code
        assert "\n" not in ended.value.code
        return ended.value.code

    start = ["--data", str(data), "--model", str(checkpoint("clip"))]
    out = ["--output", str(tmp_path / "o")]
    assert said(*start, "--output", str(data)).startswith(f"train: {data} is not an empty folder")
    assert said("--model", str(tmp_path), "--data", str(data), *out).startswith(
        f"train: {tmp_path} is not a checkpoint"
    )
    assert said(*start, "--output", str(tmp_path / "a"), "--loss", "sigmoid").endswith("choose --loss softmax.")
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.new("RGB", (9, 9)).save(bare / "a.png")
    without = said(*start, "--output", str(tmp_path / "f"), "--eval-data", str(bare))
    assert without.startswith(f"train: --eval-data {bare} leaves ")
    assert "it has no splits" in said(*start, "--output", str(tmp_path / "g"), "--split", "x")
    assert "choose 2 or more" in said(*start, "--output", str(tmp_path / "d"), "--batch-size", "1")
    assert "needs an NVIDIA GPU" in said(*start, "--output", str(tmp_path / "e"), "--precision", "fp16")
    assert said(*start, "--output", str(tmp_path / "b"), "--split", "x").startswith(f"train: {data} has no split 'x'")
    assert said("--resume", "--output", str(tmp_path / "c")).startswith("train: There is no run in ")


def test_a_rate_that_explodes_ends_with_step_and_cure(
    data: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    arguments = ["--model", str(checkpoint("clip")), "--data", str(data), "--output", str(tmp_path / "o")]
    few = ["--max-steps", "20", "--batch-size", "4", "--device", "cpu", "--preset", "full", "--measure-every", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *few, "--learning-rate", "1e30"])
    said = str(ended.value.code)
    assert said.startswith("train: ")
    assert " at step " in said
    assert "lower the learning rate (--learning-rate " in said
    assert not (tmp_path / "o" / "run.json").exists()


def test_a_missing_package_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "alignment.train.run", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit, match=r"^train: accelerate is missing; .* needs with: pip install '\.\[train\]'$"):
        main(NEEDED)


# ---------------------------------------------------------------- what it does


def test_check_says_what_is_in_the_data_and_trains_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.rglob("*"))
    main(["--check", "--data", str(data)])
    said = capsys.readouterr().out
    assert "30 pictures with 30 captions" in said
    assert "gone.png" in said
    assert "A run would learn from 15 pictures and be measured on 15 (15 pictures held out)." in said
    assert set(tmp_path.rglob("*")) == before


def test_a_run_prints_its_course_and_where_the_result_is(
    data: Path, tmp_path: Path, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    told: dict[str, Any] = {"--model": checkpoint("clip"), "--data": data, "--output": tmp_path / "o"}
    told |= {"--max-steps": 2, "--batch-size": 4, "--measure-every": 1, "--seed": 5, "--warmup": 0.5, "--device": "cpu"}
    main([str(word) for pair in told.items() for word in pair])
    said = capsys.readouterr()
    assert said.out == f"Model and report: {tmp_path / 'o'} (report.md, plots/, run.json)\n"
    for line in ("30 pictures with 30 captions", "Fine-tuning ", "step 2/2  validation: ", "Training ended: all steps"):
        assert line in said.err
    settings = RunRecord.from_json(tmp_path / "o" / "run.json").settings
    assert (settings["max_steps"], settings["seed"], settings["warmup"]) == (2, 5, 0.5)
