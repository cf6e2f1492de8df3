"""The benchmarks of speed: they start, they compare like with like, and the table says who wins."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alignment.model import DualEncoder

FOLDER = Path(__file__).resolve().parent / "benchmarks"
TINY = {"image_size": 224, "patch_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """Import a benchmark the way it finds its neighbours: `module("encoding_task")`."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A tiny CLIP that reads 224 pixels, and two small JPEGs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        making = importlib.import_module("encoding_task")
    folder = tmp_path_factory.mktemp("task")
    making.save_clip(folder / "clip", **TINY, **HEADS)
    paths = making.write_pictures(folder / "pictures", 2, (120, 90), making.photographs())
    return folder, [str(path) for path in paths]


def scripts() -> list[str]:
    text = (FOLDER / "bench.py").read_text(encoding="utf-8")
    return sorted({"bench.py", *(part.split('"')[0] for part in text.split('Benchmark("')[1:])})


@pytest.mark.parametrize("script", scripts())
def test_every_benchmark_explains_itself(
    script: str, module: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert ended.value.code == 0
    assert ("--out" if script == "bench.py" else "--json") in capsys.readouterr().out


# ---------------------------------------------------------------- encoding


def test_pictures_have_the_size_asked_for_and_differ(module, task: tuple[Path, list[str]], tmp_path: Path) -> None:
    making = module("encoding_task")
    paths = making.write_pictures(tmp_path / "again", 2, (120, 90), making.photographs())
    first, second = (np.asarray(Image.open(path)) for path in paths)
    assert first.shape == second.shape == (90, 120, 3)
    assert np.abs(first.astype(int) - second).mean() > 10
    assert [path.read_bytes() for path in paths] == [Path(path).read_bytes() for path in task[1]]
    with pytest.raises(SystemExit, match=r"no \.jpg"):
        making.photographs(tmp_path / "nothing")


def test_ours_and_transformers_encode_the_same_pictures_alike(module, task: tuple[Path, list[str]]) -> None:
    contenders, speed = module("encoding_contenders"), module("encoding_speed")
    folder, paths = task
    right = contenders.unit(contenders.transformers_pil(folder / "clip", 1)(paths, batch=1))
    mine = contenders.unit(contenders.ours(folder / "clip", 1)(paths))
    assert mine.shape == (2, 512)
    assert speed.least_cosine(mine, right) > 0.999
    assert speed.least_cosine(mine[::-1], right) < 0.999  # it would notice
    with pytest.raises(SystemExit, match="cannot be compared"):
        speed.least_cosine(mine[:1], right)


def test_a_contender_answers_from_a_process_of_its_own(module, task: tuple[Path, list[str]]) -> None:
    speed = module("encoding_speed")
    folder, paths = task
    contender = speed.Contender("ours", "clip", folder, 1)
    try:
        assert contender.answer() == {"ready": "ours"}
        assert contender.encode(paths, {}) > 0
        assert np.load(contender.embeds).shape == (2, 512)
        with pytest.raises(SystemExit, match=r"ours failed(.|\n)*cannot be opened"):
            contender.encode([str(folder / "missing.jpg")], {})
    finally:
        contender.close()


def test_the_target_is_asked_of_the_fastest_peer(module) -> None:
    speed = module("encoding_speed")
    results = {
        "ours": speed.Result({}, [30.0, 20.0, 30.0], 0.9995),
        "slow": speed.Result({"batch": 8}, [10.0, 10.0, 10.0], 1.0),
        "fast": speed.Result({"batch": 16}, [20.0, 10.0, 15.0], 1.0),
    }
    match = speed.Match("CLIP", "clip", ("ours", "slow", "fast"), "slow", {}, target=2.0)
    fast, slow = speed.as_rows(match, "500 x 375", results)
    assert (fast["peer"], fast["ratio"], fast["target"]) == ("fast", 2.0, 2.0)  # of 1.5, 2, 2: round by round
    assert (slow["peer"], slow["ratio"], slow["target"]) == ("slow", 3.0, None)
    assert "0.9995" in slow["note"]


# ---------------------------------------------------------------- GPU


def test_a_gpu_s_code_runs_on_a_cpu_and_counts_operations(module, task: tuple[Path, list[str]]) -> None:
    gpu = module("gpu_speed")
    encoder = DualEncoder.load(task[0] / "clip", device="cpu")
    speeds = gpu.speeds_of(encoder, [Path(path) for path in task[1]], 2, 3, 1)
    assert min(speeds.ready, speeds.files, speeds.plain) > 0
    assert speeds.cosine > 0.999
    patches, width, inner, layers = 49, TINY["hidden_size"], TINY["intermediate_size"], TINY["num_hidden_layers"]
    tokens = patches + 1
    of_a_layer = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens * tokens * width
    assert speeds.operations == 2 * (patches * 3 * 32 * 32 * width + layers * of_a_layer + width * 512)
    assert gpu.matmul_peak("cpu", 1, side=64) > 0


def test_without_a_gpu_nothing_is_measured(
    module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gpu = module("gpu_speed")
    monkeypatch.setattr(gpu, "gpu", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_speed.py", "--json", str(tmp_path / "figures.json")])
    gpu.main()
    assert capsys.readouterr().out.startswith("No GPU")
    assert json.loads((tmp_path / "figures.json").read_text())["rows"] == []


# ---------------------------------------------------------------- the table


def test_the_table_says_who_wins_and_what_was_reached(module) -> None:
    bench = module("bench")
    rows = [
        {"what": "fast", "ours": 28.41, "reference": 14.0, "ratio": 2.03, "unit": "images/s", "peer": "a", "target": 2},
        {"what": "slow", "ours": 123.4, "reference": 99.0, "ratio": 1.25, "unit": "ms", "peer": "b", "note": "why"},
        {"what": "bound", "ours": 1.4, "reference": 1.0, "ratio": 1.4, "unit": "ms", "target": 1.3},
    ]
    lines = bench.table({"title": "A title", "rows": rows}).splitlines()
    assert lines[0] == "**A title**"
    assert lines[4:] == [
        "| fast | 28.4 images/s | a 14 images/s | 2.03 | ≥ 2: reached |  |",
        "| slow | 123 ms | b 99 ms | 1.25 |  | **the peer wins**; why |",
        "| bound | 1.4 ms | 1 ms | 1.40 | ≤ 1.3: **missed** |  |",
    ]


def test_the_heading_names_day_machine_and_versions(module) -> None:
    heading = module("bench").heading()
    assert "Measured on " in heading
    assert f"torch {torch.__version__}" in heading
    assert "cores" in heading
