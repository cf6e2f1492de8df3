"""`python -m alignment.gallery`: what it builds, reports and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_gallery_build import ROOT, encoder, photos

from alignment.confidence import cohort_version
from alignment.gallery import main, scan
from alignment.gallery.database import DATABASE
from alignment.model import DualEncoder
from alignment.picture_limits import use_size_options

__all__ = ["encoder", "photos"]  # fixtures


def test_the_command_builds_and_sums_up(
    photos: Path, tmp_path: Path, encoder: DualEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bad.png").touch()
    arguments = ["build", str(photos), "--out", str(tmp_path / "out"), "--model", encoder.name]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'out'}: 3 pictures and 0 captions, by {encoder.name}.",
        "  pictures: 3 encoded, 0 reused",
        "  captions: 0 encoded, 0 reused",
        f"  match probabilities: borrowed from the compact model; background {cohort_version()}",
        "  skipped: 1, named above",
    ]
    assert main(arguments) == 0
    assert "0 encoded, 3 reused" in capsys.readouterr().out


def test_the_limits_of_a_picture_can_be_lifted(
    tmp_path: Path, encoder: DualEncoder, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "p").mkdir()
    Image.new("L", (12_000, 9_000)).save(tmp_path / "p" / "large.png", compress_level=1)
    Image.new("RGB", (600, 10)).save(tmp_path / "p" / "narrow.png")
    Image.new("RGB", (60, 40)).save(tmp_path / "p" / "usual.png")
    command = [
        "build",
        str(tmp_path / "p"),
        "--out",
        str(tmp_path / "out"),
        "--model",
        encoder.name,
        "--no-calibration",
    ]
    try:
        assert main(command) == 0
        assert "skipped: 2" in capsys.readouterr().out
        assert "50 megapixels" in caplog.text
        assert "--max-megapixels" in caplog.text
        assert "--max-aspect-ratio" in caplog.text
        assert main([*command, "--max-megapixels", "108", "--max-aspect-ratio", "60"]) == 0
        assert "2 encoded, 1 reused" in capsys.readouterr().out
    finally:
        use_size_options()


def test_the_home_is_found_behind_an_equals_sign(
    photos: Path, tmp_path: Path, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").symlink_to(encoder.name)
    assert main(["build", "~/photos", "--out=~/g", "--model=~/m", "--no-calibration"]) == 0
    assert main(["check", "~/g"]) == 0
    assert (tmp_path / "g" / DATABASE).is_file()


def test_the_command_in_a_process_of_its_own(photos: Path, tmp_path: Path, encoder: DualEncoder) -> None:
    (photos / "bad.png").touch()
    command = [sys.executable, "-m", "alignment.gallery", "build", str(photos), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--model", encoder.name], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "Skipped bad.png: The file is empty" in done.stderr
    assert "Embedding" in done.stderr
    assert "3 encoded" in done.stdout


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [("no such folder", None, "no such folder"), (".", "no/such-model", "no/such-model")],
)
def test_mistakes_get_one_sentence_and_no_traceback(
    source: str,
    model: str | None,
    message: str,
    tmp_path: Path,
    encoder: DualEncoder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["build", source, "--out", str(tmp_path / "out"), "--model", model or encoder.name]) == 2
    complaint = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(complaint) == 1
    assert message in complaint[0]


def test_ctrl_c_says_that_nothing_happened(
    photos: Path,
    tmp_path: Path,
    encoder: DualEncoder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ctrl_c(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scan, "open_image", ctrl_c)
    assert main(["build", str(photos), "--out", str(tmp_path / "out"), "--model", encoder.name]) == 130
    assert "is as it was" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("~/Photos", "Flickr8k", "pictures.jsonl", "app.py --gallery", "--split"))
    assert all(len(line) <= 120 for line in text.splitlines())
