"""The command from end to end: one model, two models, class folders, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignment.evaluate import main
from alignment.model import DualEncoder

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of stripes with two captions each, in class folders by their first colour."""
    root = tmp_path_factory.mktemp("stripes")
    lines = []
    for first in COLOURS:
        for second in COLOURS:
            if first != second:
                image = Image.new("RGB", (32, 24), COLOURS[first])
                image.paste(COLOURS[second], (16, 0, 32, 24))
                path = root / first / f"{first}_{second}.png"
                path.parent.mkdir(exist_ok=True)
                image.save(path)
                for text in (f"{first} and {second}", f"<i>{first}</i> beside {second}"):
                    lines.append(json.dumps({"image": f"{first}/{path.name}", "caption": text, "split": "dev"}))
    (root / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny composed model and its twin with other weights."""
    twin = DualEncoder.load(checkpoint("composed"), device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter += 0.5 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("twin")
    twin.save(folder)
    return str(checkpoint("composed")), str(folder)


@pytest.fixture
def run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the command on the pairs, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: main(["--data", str(data / "pairs.jsonl"), "--device", "cpu", "--resamples", "50", *words])


# ---------------------------------------------------------------- two models


def test_compare_from_end_to_end(
    run: Callable[..., None], models: tuple[str, str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--compare", *models, "--split", "dev", "--json", "out.json", "--zero-shot", str(data))
    printed = capsys.readouterr()
    table = {line[:26].strip(): line[26:].split() for line in printed.out.splitlines()[1:]}
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written["compare"] == list(models)
    assert len(set(written["fingerprints"])) == 2
    assert (written["num_images"], written["num_texts"]) == (12, 24)
    assert len(written["metrics"]) == len(table) == 13
    for found in written["metrics"].values():
        assert found["value"] == pytest.approx(found["after"] - found["before"])
        assert found["low"] <= found["value"] <= found["high"]
    recall = written["metrics"]["text_to_image_recall@5"]
    assert table["text to image R@5"][:2] == [f"{recall['before'] * 100:.1f}", f"{recall['after'] * 100:.1f}"]
    assert any(found["value"] != 0 for found in written["metrics"].values())
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert str(tmp_path / "comparison.html") in printed.err
    assert models[0] in page
    assert "Got better" in page
    assert "&lt;i&gt;" in page
    assert "<i>" not in page
    assert page.count("data:image/jpeg;base64,") > 5
    for told in ("images 12/12", "captions 24/24", "class names 24/24", "pictures 12/12"):
        assert printed.err.count(told) == 2, "once for each model"


def test_the_figures_of_a_comparison_are_those_of_each_model_alone(
    run: Callable[..., None], models: tuple[str, str], tmp_path: Path
) -> None:
    run("--compare", *models, "--json", "both.json")
    both = json.loads((tmp_path / "both.json").read_text(encoding="utf-8"))
    for side, model in zip(("before", "after"), models, strict=True):
        run("--model", model, "--json", "one.json")
        one = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))
        alone = {name: estimate["value"] for name, estimate in one["metrics"].items()}
        assert alone == {name: found[side] for name, found in both["metrics"].items()}
        assert one["fingerprint"] in both["fingerprints"]


def test_a_model_against_itself_has_nothing_to_show(
    run: Callable[..., None], models: tuple[str, str], tmp_path: Path
) -> None:
    run("--compare", models[0], models[0], "--html", "same.html")
    page = (tmp_path / "same.html").read_text(encoding="utf-8")
    assert "Got better" not in page
    assert "<td>100.0%" in page
    assert not (tmp_path / "comparison.html").exists()


# ---------------------------------------------------------------- one model


def test_a_page_for_one_model(
    run: Callable[..., None], models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--model", models[0], "--html")
    page = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
    assert "Worst queries" in page
    assert "12 images, 24 captions" in page
    assert str(tmp_path / "evaluation.html") in capsys.readouterr().err


def test_without_being_asked_one_model_writes_nothing(
    run: Callable[..., None], models: tuple[str, str], tmp_path: Path
) -> None:
    run("--model", models[0])
    assert list(tmp_path.iterdir()) == []


def test_class_folders_alone(
    models: tuple[str, str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, templates, out = (tmp_path / name for name in ("names.json", "templates.txt", "out.json"))
    names.write_text(json.dumps({"red": ["rot", "red"], "green": "绿", "blue": "blue", "grey": "grey", "pink": "pink"}))
    templates.write_text("stripes in {}\n", encoding="utf-8")
    words = ["--model", models[0], "--zero-shot", str(data), "--class-names", str(names), "--templates", str(templates)]
    main([*words, "--json", str(out), "--html", str(tmp_path / "page.html"), "--device", "cpu", "--resamples", "20"])
    found = json.loads(out.read_text(encoding="utf-8"))["zero_shot"]
    assert (found["num_images"], found["num_classes"]) == (12, 5)
    assert found["metrics"]["zero_shot_top5"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    printed = capsys.readouterr()
    assert "top-5 100.0% [100.0%, 100.0%]; 12 pictures, 5 classes" in printed.out
    assert "class names 6/6" in printed.err, "six names in one template"
    assert "zero-shot top-1" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_progress_takes_a_line_at_every_tenth(
    run: Callable[..., None], models: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run("--model", models[0], "--batch-size", "1")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("images")]
    assert told[0] == "images 1/12"
    assert told[-1] == "images 12/12"
    assert len(told) <= 11


def test_captions_of_several_pictures_are_said(
    data: Path, models: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = (data / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    same = [
        json.dumps(json.loads(line) | {"caption": "a picture", "image": str(data / json.loads(line)["image"])})
        for line in lines
    ]
    (tmp_path / "same.jsonl").write_text("\n".join(same), encoding="utf-8")
    main(["--model", models[0], "--data", str(tmp_path / "same.jsonl"), "--device", "cpu", "--resamples", "2"])
    assert "1 of 1 captions belong to several pictures (a picture)" in caplog.text


# ---------------------------------------------------------------- the operator's mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "M"], "Say what to measure on"),
        (["--model", "M", "--split", "dev", "--zero-shot", "."], "--split goes with --data"),
        (["--model", "M", "--eccv", "--zero-shot", "."], "--eccv goes with --data"),
        (["--model", "M", "--data", ".", "--templates", "T"], "--templates goes with --zero-shot"),
        (["--model", "M", "--data", ".", "--class-names", "T"], "--class-names goes with --zero-shot"),
        (["--compare", "A", "B", "--data", ".", "--revision", "main"], "--revision goes with --model"),
        (["--model", "MODEL", "--data", "DATA", "--device", "gpu"], "no device 'gpu'"),
        (["--model", "M", "--data", ".", "--batch-size", "0"], "--batch-size is at least 1"),
        (["--model", "M", "--data", ".", "--resamples", "-1"], "--resamples at least 0"),
        (["--model", "M", "--data", ".", "--json", "no/such/folder/out.json"], "cannot be written"),
        (["--model", "M", "--data", ".", "--html", "."], "cannot be written"),
        (["--model", "M", "--zero-shot", "none"], "no folder none"),
        (["--model", "M", "--zero-shot", ".", "--templates", "none.txt"], "none.txt cannot be read"),
        (["--model", "M", "--data", "none"], "There is no none"),
        (["--compare", "no such model", "B", "--data", "DATA"], "no such model"),
        (["--model", "M", "--data", "DATA", "--eccv"], "not COCO's annotation"),
    ],
)
def test_what_does_not_go_together_ends_in_one_sentence(
    words: list[str], message: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([str(data / "pairs.jsonl") if word == "DATA" else word for word in words])
    assert str(stopped.value).startswith("evaluate: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["--model", "M", "--compare", "A", "B"], ["--compare", "A"]])
def test_one_model_or_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "--compare" in capsys.readouterr().err.splitlines()[-1]


def test_help_teaches_by_example() -> None:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "alignment.evaluate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for taught in ("who is measured:", "on what:", "examples:", "--compare checkpoints/compact runs/mine", "--eccv"):
        assert taught in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
