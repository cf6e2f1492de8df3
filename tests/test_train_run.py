"""Whole runs on pictures that can be learnt: what they bring and leave, killed and resumed, stopped, chosen.

`tests/long/` has kills at random moments and runs of two processes.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_injection import forkserver
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignment.gallery import build_gallery
from alignment.model import DualEncoder
from alignment.train.command import main
from alignment.train.dataset import prepare
from alignment.train.objective import Objective
from alignment.train.record import RunRecord
from alignment.train.run import Setup, interpolate_weights, train
from alignment.train.run_dir import RECORD, SETTINGS, ResumeState, acquire, read_resume_state
from alignment.train.settings import ALPHAS, TrainConfig, complete
from alignment.train.trainer import Validator

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange", "cyan", "brown")
# Some short steps with all that is random: dropout of the text tower, crops, chunks, drawn captions.
BUSY = ("--batch-size", "8", "--chunk-size", "4", "--epochs", "5", "--measure-every", "3", "--patience", "99")
FULL = ("--preset", "full", "--learning-rate", "1e-3", *BUSY)
LOCKED = ("--preset", "lit", "--keep-images", "--learning-rate", "1e-3", *BUSY)


class Killed(BaseException):
    """Stand in for the end of the process where a real one is not needed."""


def paint(folder: Path, count: int) -> Path:
    """Fill a folder with pictures of two halves, captioned by their colours."""
    folder.mkdir(parents=True)
    rows = [("file_name", "caption")]
    for number, (above, below) in enumerate(itertools.islice(itertools.permutations(COLOURS, 2), count)):
        picture = Image.new("RGB", (48, 48), above)
        ImageDraw.Draw(picture).rectangle((0, 24, 48, 48), fill=below)
        picture.save(folder / f"{number:03}.png")
        rows.append((f"{number:03}.png", f"{above} over {below}"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="session")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide 44 pictures: 24 to learn from, 20 held out."""
    return paint(tmp_path_factory.mktemp("data") / "flags", 44)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path, tolerance: float = 0.0) -> bool:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    return all(float((first[name] - second[name]).abs().max()) <= tolerance for name in first)


def record_of(folder: Path) -> RunRecord:
    return RunRecord.from_json(folder / RECORD)


# ---------------------------------------------------------------- from start to end


def test_a_model_learns_from_scratch_and_the_folder_holds_all_that_is_promised(tmp_path: Path) -> None:
    data, folder, said = paint(tmp_path / "flags", 90), tmp_path / "result", list[str]()
    config = TrainConfig(
        data=str(data), output=str(folder), scratch="tiny", device="cpu", batch_size=16, epochs=10, augment=False
    )
    record = train(config, log=said.append)

    before, after, gain = (part["recall_sum"] for part in (record.before, record.after, record.difference or {}))
    assert after["value"] > before["value"] + 1.5
    assert gain["low"] > 0
    assert (record.stopped, record.base_model, record.alpha) == ("all steps done", "scratch-tiny", None)
    assert record_of(folder) == record
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "logs", "model.safetensors", "plots", "preprocessor_config.json", "report.md",
        "run.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {path.name for path in (folder / "plots").iterdir()} == {"loss.png", "recall.png", "scale.png"}
    assert any(path.name.startswith("events.out.tfevents") for path in (folder / "logs").iterdir())
    assert "fine-tuned on 70 pictures with 70 captions" in (folder / "report.md").read_text(encoding="utf-8")
    assert "## Measured" in (folder / "README.md").read_text(encoding="utf-8")

    encoder = DualEncoder.load(folder, device="cpu")
    assert encoder.fingerprint == record.fingerprint != record.base_fingerprint
    gallery = build_gallery(data, tmp_path / "gallery", encoder)
    assert gallery.metadata.fingerprint == record.fingerprint

    told = "\n".join(said)
    for line in (
        "90 pictures with 90 captions",
        "Fine-tuning scratch-tiny (full: both sides, 0.7 of 0.7 million weights), softmax loss, learning rate 0.0003",
        "learns from  70 pictures, 70 captions",
        "measured on  20 pictures, 20 captions (20 pictures held out)",
        "steps        40 (10 passes) of 16 pictures, all in memory at once",
        "Training ended: all steps done. Best weights: step",
    ):
        assert line in told
    losses = [entry["loss"] for entry in record.history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def config(data: Path, output: Path, model: Path, **options: Any) -> TrainConfig:
    few = {"batch_size": 8, "max_steps": 4, "measure_every": 2, "learning_rate": 1e-3, "preset": "full"}
    told = {"data": str(data), "output": str(output), "model": str(model), "device": "cpu"}
    return TrainConfig(**(told | few | options))


Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("preset", ["heads", "lora"])
def test_every_preset_ends_in_an_ordinary_model(
    checkpoint: Checkpoint, flags: Path, tmp_path: Path, preset: str
) -> None:
    """With the heads in half precision, which is used without a GPU too."""
    options = {"device": None, "precision": "bf16"} if preset == "heads" else {}
    record = train(config(flags, tmp_path / "o", checkpoint("clip"), preset=preset, interpolate=False, **options))
    assert record.plan["precision"] == record.settings["precision"] == options.get("precision", "fp32")
    start, end = weights_of(checkpoint("clip")), weights_of(tmp_path / "o")
    assert start.keys() == end.keys()
    changed = {name.split(".")[0] for name in start if not torch.equal(start[name], end[name])}
    towers = {"vision_model", "text_model"} if preset == "lora" else set()
    assert changed == {"visual_projection", "text_projection", "logit_scale"} | towers
    assert DualEncoder.load(tmp_path / "o", device="cpu").fingerprint == record.fingerprint


def test_a_siglip_model_keeps_its_loss_and_learns_its_bias(checkpoint: Checkpoint, flags: Path, tmp_path: Path) -> None:
    record = train(config(flags, tmp_path / "o", checkpoint("siglip"), interpolate=False))
    assert record.settings["loss"] == "sigmoid"
    start, end = weights_of(checkpoint("siglip")), weights_of(tmp_path / "o")
    assert not torch.equal(start["logit_bias"], end["logit_bias"])


def test_the_minutes_given_are_planned_for_and_kept(checkpoint: Checkpoint, flags: Path, tmp_path: Path) -> None:
    record = train(config(flags, tmp_path / "o", checkpoint("clip"), max_steps=5000, minutes=1e-6))
    assert (record.plan["steps"], record.stopped) == (1, "the time given was up")
    assert [entry["step"] for entry in record.history if "eval_recall_sum" in entry] == [1]


def test_a_run_out_of_patience_says_so_and_has_the_best_weights(
    checkpoint: Checkpoint, flags: Path, tmp_path: Path
) -> None:
    """A rate far too high: the first measurement stays the best."""
    options = {"learning_rate": 0.3, "max_steps": 40, "measure_every": 1, "patience": 2, "interpolate": False}
    record = train(config(flags, tmp_path / "o", checkpoint("clip"), **options))
    sums = {entry["step"]: entry["eval_recall_sum"] for entry in record.history if "eval_recall_sum" in entry}
    best = max(sums, key=lambda step: (sums[step], -step))
    assert record.stopped == "the validation recall sum had stopped rising"
    assert (record.best_step, max(sums)) == (best, best + 2)
    assert record.after["recall_sum"]["value"] == pytest.approx(sums[best])


# ---------------------------------------------------------------- the scale


def test_the_scale_is_the_checkpoints_and_a_fresh_one_elsewhere(
    checkpoint: Checkpoint, flags: Path, tmp_path: Path
) -> None:
    kept = config(flags, tmp_path, checkpoint("clip"))
    prepared = prepare(kept)
    starts = {
        "kept": kept,
        "joined": replace(kept, model=None, vision=str(checkpoint("vit")), text=str(checkpoint("distilbert"))),
        "scratch": replace(kept, model=None, scratch="tiny"),
    }
    scales = {name: Setup(one, prepared, tmp_path, str).encoder.logit_scale for name, one in starts.items()}
    assert scales == pytest.approx({"kept": math.exp(2.5), "joined": 1 / 0.07, "scratch": 1 / 0.07})


# ---------------------------------------------------------------- between start and end


def moved(config: TrainConfig) -> Setup:
    """Come back with a model whose weights are no longer those of the start, as after training."""
    setup = Setup(config, prepare(config), Path(config.output), str)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in setup.encoder.module.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return setup


@pytest.mark.parametrize(
    ("sums", "chosen"),
    [((1, 2, 5, 3, 4), 0.5), ((5, 1, 1, 5, 2), 0.75), ((9, 8, 7, 6, 5), 0.0), ((1, 2, 3, 4, 5), 1.0)],
)
def test_the_weights_between_start_and_end_that_measure_best_are_kept(
    checkpoint: Checkpoint, flags: Path, tmp_path: Path, sums: Sequence[float], chosen: float
) -> None:
    setup, texts = moved(config(flags, tmp_path, checkpoint("clip"))), ["red over green", "blue over white"]
    start = DualEncoder.load(checkpoint("clip"), device="cpu").encode_texts(texts)
    end = setup.encoder.encode_texts(texts)
    seen: list[Tensor] = []

    class Scripted(Validator):
        def metrics(self) -> dict[str, float]:
            seen.append(self.encoder.encode_texts(texts))
            return {"recall_sum": float(sums[len(seen) - 1])}

    scripted = Scripted(setup.encoder, setup.prepared.evaluation)
    setup.validator = scripted
    points, alpha = interpolate_weights(setup)
    assert torch.equal(seen[0], start)
    assert torch.equal(seen[-1], end)
    assert not torch.equal(start, end)
    assert [point["alpha"] for point in points] == list(ALPHAS)
    assert [point["recall_sum"] for point in points] == list(sums)
    assert alpha == chosen
    assert torch.equal(setup.encoder.encode_texts(texts), seen[ALPHAS.index(chosen)])


def test_both_curves_are_in_the_record_and_validation_is_never_worse_than_at_the_start(
    checkpoint: Checkpoint, flags: Path, tmp_path: Path
) -> None:
    second = paint(tmp_path / "second", 12)
    options = {"learning_rate": 0.3, "second_data": str(second)}  # a rate that ruins it
    record = train(config(flags, tmp_path / "o", checkpoint("clip"), **options))
    curve = {point["alpha"]: point["recall_sum"] for point in record.interpolation}
    assert list(curve) == list(ALPHAS)
    assert curve[0.0] == pytest.approx(record.before["recall_sum"]["value"])
    assert record.alpha is not None
    assert curve[record.alpha] == max(curve.values()) == pytest.approx(record.after["recall_sum"]["value"])
    assert record.second_before is not None
    assert record.interpolation[0]["second_recall_sum"] == pytest.approx(record.second_before["recall_sum"]["value"])
    assert (tmp_path / "o" / "plots" / "interpolation.png").exists()
    assert "### On a second data set" in (tmp_path / "o" / "report.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- memory against time


@pytest.mark.parametrize("model", ["vit-bert", "composed"])
def test_gradient_checkpointing_runs_the_layers_again_and_changes_no_gradient(
    checkpoint: Checkpoint, flags: Path, tmp_path: Path, model: str
) -> None:
    gradients, passes = [], []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing, "augment": False, "interpolate": False}
        told = config(flags, tmp_path, checkpoint(model), **options)
        setup = Setup(told, prepare(told), tmp_path, str)
        calls: list[int] = []
        for tower in (setup.encoder.module.vision_model, setup.encoder.module.text_model):
            first = next(layer for layer in tower.modules() if type(layer).__name__.endswith("Attention"))
            first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        setup.towers.train()
        torch.manual_seed(3)
        dataset = setup.dataset(batch_size=8, num_steps=1)
        Objective(setup.towers, setup.captions.positive_mask).backward(dataset.batch(0))
        gradients.append({name: weight.grad for name, weight in setup.encoder.module.named_parameters()})
        passes.append(len(calls))
    assert passes == [2, 4]
    plain, checkpointed = gradients
    assert any(gradient is not None and bool(gradient.any()) for gradient in plain.values())
    for name, gradient in plain.items():
        assert (gradient is None) == (checkpointed[name] is None)
        if gradient is not None:
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_model_that_cannot_is_told_how_else_to_save_memory(flags: Path, tmp_path: Path) -> None:
    compact = Path(__file__).parents[1] / "checkpoints" / "compact"
    told = config(flags, tmp_path, compact, gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"compact cannot compute its layers twice; .* with --chunk-size"):
        Setup(told, prepare(told), tmp_path, str)


# ---------------------------------------------------------------- killed and resumed, in processes of their own


Start = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Run the command in a process of its own, imports done: `start("--model", ...)`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        context = forkserver()
        started: list[BaseProcess] = []

        def start(*arguments: str) -> BaseProcess:
            process = context.Process(target=main, args=([*arguments, "--device", "cpu"],))
            process.start()
            started.append(process)
            return process

        yield start
        for process in started:
            process.kill()
            process.join()
            process.close()


def finish(process: BaseProcess) -> None:
    process.join(240)
    assert process.exitcode == 0


def wait_for(sign: Callable[[], bool], process: BaseProcess) -> None:
    while not sign():
        assert process.is_alive(), f"The run ended by itself with {process.exitcode}."
        time.sleep(0.002)


def kill(process: BaseProcess, folder: Path) -> None:
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / RECORD).exists()


def whole_checkpoints(folder: Path) -> int:
    return len(list(folder.glob("checkpoints/*/complete")))


@pytest.fixture(scope="module")
def undisturbed(
    start: Start, checkpoint: Checkpoint, flags: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sequence[str]], Path]:
    """Run with some options from start to end, once: the folder of the result."""
    known: dict[Sequence[str], Path] = {}

    def run(options: Sequence[str]) -> Path:
        if options not in known:
            known[options] = tmp_path_factory.mktemp("whole") / "o"
            finish(start(*called(checkpoint, flags, known[options]), *options))
        return known[options]

    return run


def called(checkpoint: Checkpoint, flags: Path, output: Path) -> Sequence[str]:
    return ("--model", str(checkpoint("vit-bert")), "--data", str(flags), "--output", str(output))


def assert_nothing_happened(resumed: Path, whole: Path) -> None:
    assert same(resumed, whole)
    one, other = record_of(resumed), record_of(whole)
    assert (one.best_step, one.stopped, one.alpha) == (other.best_step, other.stopped, other.alpha)
    assert (one.after, one.interpolation) == (other.after, other.interpolation)
    assert "--resume" not in one.command
    assert "--data" in one.command  # "Do it again" in the report is the whole run
    steps = [[(entry["step"], entry["loss"]) for entry in run.history if "loss" in entry] for run in (one, other)]
    assert [step for step, _ in steps[0]] == [step for step, _ in steps[1]]
    assert steps[0][-1] == steps[1][-1]
    assert not (resumed / "checkpoints").exists()
    assert not (resumed / SETTINGS).exists()


def test_with_kept_images_and_in_another_place_too(
    start: Start, checkpoint: Checkpoint, flags: Path, undisturbed: Callable[[Sequence[str]], Path], tmp_path: Path
) -> None:
    whole, folder = undisturbed(LOCKED), tmp_path / "o"
    process = start(*called(checkpoint, flags, folder), *LOCKED)
    wait_for(lambda: whole_checkpoints(folder) > 1, process)
    kill(process, folder)
    assert list(folder.glob("kept/*/embeds.npy"))
    shutil.move(folder, tmp_path / "moved")
    finish(start("--resume", "--output", str(tmp_path / "moved")))
    assert_nothing_happened(tmp_path / "moved", whole)


def test_killed_before_the_first_checkpoint(
    start: Start, checkpoint: Checkpoint, flags: Path, undisturbed: Callable[[Sequence[str]], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "o"
    process = start(*called(checkpoint, flags, folder), *FULL)
    wait_for(lambda: (folder / SETTINGS).exists(), process)
    kill(process, folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # it may have been quicker than we were
    finish(start("--resume", "--output", str(folder)))
    assert_nothing_happened(folder, undisturbed(FULL))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_ends_in_good_order_with_a_result(
    start: Start, checkpoint: Checkpoint, flags: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "o"
    process = start(*called(checkpoint, flags, folder), *FULL, "--epochs", "99999", "--no-interpolate")
    wait_for(lambda: whole_checkpoints(folder) > 0, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    finish(process)
    record = record_of(folder)
    assert record.stopped == f"stopped by {number.name}"
    last = max(entry["step"] for entry in record.history)
    assert 3 <= record.best_step <= last < record.plan["steps"]
    assert any("eval_recall_sum" in entry for entry in record.history if entry["step"] == last)
    assert DualEncoder.load(folder, device="cpu").fingerprint == record.fingerprint


# ---------------------------------------------------------------- what it does not go on with


def interrupted(config: TrainConfig, at: str) -> None:
    """Break a run off once it says a line that begins like this."""

    def say(line: str) -> None:
        if line.startswith(at):
            raise Killed

    with pytest.raises(Killed):
        train(config, log=say)


def test_other_data_or_another_start_model_are_refused(checkpoint: Checkpoint, flags: Path, tmp_path: Path) -> None:
    data, model, folder = tmp_path / "data", tmp_path / "model", tmp_path / "o"
    shutil.copytree(flags, data)
    shutil.copytree(checkpoint("clip"), model)
    told = config(data, folder, model)
    interrupted(told, "step 3/4")
    captions = (data / "metadata.csv").read_text()
    (data / "metadata.csv").write_text(captions.replace("red over green", "crimson over green"))
    with pytest.raises(ValueError, match=r"^The data have changed since this run began; start a new one .*--output\.$"):
        train(told, resume=True)
    (data / "metadata.csv").write_text(captions)
    weights = weights_of(model)
    save_file(weights | {"logit_scale": weights["logit_scale"] + 1}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^The start model has changed since this run began; .*--output\.$"):
        train(told, resume=True)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"--max-steps 1 .*began with 4\), --learning-rate 99\.0") as refused:
        train(replace(told, learning_rate=99.0, max_steps=1), resume=True)
    assert "--data" not in str(refused.value)
    train(TrainConfig(data="", output=str(folder)), resume=True)  # what was settled at the start stands
    assert record_of(folder).settings["max_steps"] == 4
    with pytest.raises(FileExistsError, match=f"^The run in {folder} is finished; fine-tune further with --model"):
        train(told, resume=True)
    with pytest.raises(FileExistsError, match="nothing in it is overwritten: choose another --output"):
        train(told)


@pytest.fixture(scope="module")
def begun(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ResumeState:
    told = config(Path("data"), Path("o"), checkpoint("clip"), seed=5, device=None)
    recipe = complete(told, DualEncoder.load(checkpoint("clip"), device="cpu"), 24)
    return ResumeState(told, recipe, "", "", "", "")


@pytest.mark.parametrize(
    "other",
    [
        {"learning_rate": 5e-4}, {"data": "elsewhere"}, {"model": "other"}, {"max_steps": 9}, {"batch_size": 4},
        {"loss": "sigmoid"}, {"seed": 0}, {"precision": "bf16"}, {"augment": False}, {"weight_decay": 0.1},
        {"device": "meta"}, {"scratch": "tiny"}, {"eval_data": "elsewhere"},
    ],
    ids=str,
)  # fmt: skip
def test_a_resumed_run_refuses_what_it_did_not_begin_with(other: dict[str, Any], begun: ResumeState) -> None:
    (name, value), *_ = other.items()
    with pytest.raises(ValueError, match="--resume goes on") as refused:
        begun.resume(replace(begun.config, **other))
    assert f"--{name.replace('_', '-')} {value} (" in str(refused.value)
    assert str(refused.value).count("--") == 3  # only this one differs


def test_a_resumed_run_takes_what_it_began_with_or_chose(begun: ResumeState) -> None:
    begun.resume(begun.config)
    begun.resume(TrainConfig(data="", output="moved", minutes=3))
    begun.resume(TrainConfig(data=os.path.abspath("data"), output="o", loss="softmax", warmup=0.1, augment=True))


def test_an_unfinished_run_is_neither_overwritten_nor_invented(
    checkpoint: Checkpoint, flags: Path, tmp_path: Path
) -> None:
    told = config(flags, tmp_path / "o", checkpoint("clip"))
    with pytest.raises(FileNotFoundError, match=r"^There is no run in .*/o to go on with; leave --resume out"):
        train(told, resume=True)
    interrupted(told, "step 1/4")
    with pytest.raises(
        FileExistsError, match="holds an unfinished run: go on with --resume, or choose another --output"
    ):
        train(told)
    settings = json.loads((tmp_path / "o" / SETTINGS).read_text())
    for damaged in ("{", json.dumps(settings | {"recipe": {}}), json.dumps(settings | {"more": 1}), "[]"):
        (tmp_path / "o" / SETTINGS).write_text(damaged)
        with pytest.raises(ValueError, match=r"settings.json is damaged .*; start a new run with another --output\.$"):
            read_resume_state(tmp_path / "o")


def test_a_run_killed_before_its_first_step_is_begun_again_with_its_kept_images(
    checkpoint: Checkpoint, flags: Path, tmp_path: Path
) -> None:
    told = config(flags, tmp_path / "o", checkpoint("clip"), preset="lit", keep_images=True)
    interrupted(told, "Fine-tuning")
    kept = {path.name for path in (tmp_path / "o").rglob("*.npy")}
    assert kept == {"embeds.npy"}
    acquire(tmp_path / "o", resume=False)
    (tmp_path / "o" / "holiday.txt").touch()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        acquire(tmp_path / "o", resume=False)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is not an empty folder"):
        acquire(tmp_path / "file", resume=False)
