"""The training loop: when it stops, which weights it keeps, what a killed run leaves and goes on with."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from alignment.data import Pair
from alignment.model import DualEncoder
from alignment.train.dataset import CaptionIndex, ContrastiveDataset
from alignment.train.objective import Batch, Objective
from alignment.train.presets import Towers, apply_preset, weight_groups
from alignment.train.run_dir import last_checkpoint, mark_complete
from alignment.train.settings import TrainRecipe, format_duration
from alignment.train.trainer import (
    METRIC,
    ConsoleLogger,
    ContrastiveTrainer,
    EarlyStopping,
    GracefulStop,
    training_arguments,
)

IMAGES, BATCH = 8, 4
PAIRS = [Pair(f"{n}.jpg", (f"picture number {'abcdefgh'[n]}",), id=str(n)) for n in range(IMAGES)]
RECIPE = TrainRecipe(
    preset="full", loss="softmax", max_steps=1, batch_size=BATCH, chunk_size=BATCH, captions_per_image=1,
    learning_rate=1e-3, head_learning_rate=1e-3, weight_decay=0.0, warmup=0.0, augment=False, keep_images=True,
    measure_every=1, patience=99, interpolate=False, precision="fp32", gradient_checkpointing=False, workers=0, seed=0,
)  # fmt: skip
PIXELS = torch.randn(IMAGES, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Setting:
    """A trainer over random pictures, its parts at hand."""

    def __init__(self, folder: Path, model: Path, *, steps: int, **options: Any) -> None:
        torch.manual_seed(0)
        self.encoder = DualEncoder.load(model, device="cpu")
        apply_preset(self.encoder, options.get("preset", "full"))
        self.module, self.towers, self.said = self.encoder.module, Towers(self.encoder), list[str]()
        captions = CaptionIndex(PAIRS)
        objective = options.pop("objective", None)
        self.stop = GracefulStop(options.pop("deadline", None))
        measure, more = options.pop("measure", rising()), options.pop("callbacks", [])
        recipe = replace(RECIPE, max_steps=steps, **options)
        self.trainer = ContrastiveTrainer(
            self.towers,
            training_arguments(folder, recipe, workers=0, use_cpu=True),
            dataset=ContrastiveDataset(
                PAIRS,
                captions,
                self.encoder.preprocessor,
                batch_size=BATCH,
                num_steps=steps,
                cache=lambda row, *_, **__: {"pixel_values": PIXELS[row]},
            ),
            objective=objective(self.towers) if objective else Objective(self.towers, captions.positive_mask),
            validate=measure,
            groups=weight_groups(self.module, recipe),
            callbacks=[self.stop, EarlyStopping(recipe.patience), ConsoleLogger(self.said.append), *more],
        )

    @property
    def history(self) -> list[dict[str, float]]:
        return self.trainer.state.log_history

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.module.named_parameters()}


Make = Callable[..., Setting]


@pytest.fixture
def make(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Iterable[Make]:
    """Build a trainer in a fresh folder: `make(steps=3, model="vit-bert")`; two with one `name` share it."""
    made: list[Setting] = []

    def build(name: str = "run", model: str = "vit-bert", **options: Any) -> Setting:
        made.append(Setting(tmp_path / name, checkpoint(model), **options))
        return made[-1]

    yield build
    for setting in made:  # a run that was broken off leaves its log open
        setting.trainer.callback_handler.call_event(
            "on_train_end", setting.trainer.args, setting.trainer.state, setting.trainer.control
        )


def rising() -> Callable[[], Mapping[str, float]]:
    return scripted(range(1, 1000))


def scripted(sums: Iterable[Any]) -> Callable[[], Mapping[str, float]]:
    """Measure what the script says; an exception in it is a kill."""
    script = iter(sums)

    def measure() -> Mapping[str, float]:
        value = next(script)
        if isinstance(value, BaseException):
            raise value
        sides = {f"{side}_recall@1": 0.25 for side in ("image_to_text", "text_to_image")}
        return {METRIC: float(value), **sides}

    return measure


class Stub:
    """An objective that does what it is told to the gradients."""

    def __init__(self, towers: Towers, act: Callable[[Towers, int], float]) -> None:
        self.towers, self.act, self.step = towers, act, 0

    def backward(self, batch: Batch, *_: Any) -> Tensor:
        self.step += 1
        return torch.tensor(self.act(self.towers, self.step))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saved(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---------------------------------------------------------------- which weights, and when it stops


def test_it_stops_when_the_recall_sum_no_longer_rises_and_keeps_the_best_step(make: Make, tmp_path: Path) -> None:
    setting = make(steps=20, patience=3, measure=scripted([1, 5, 4, 5, 4.9, 9]))
    at_step_2: dict[str, Tensor] = {}

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            if state.global_step == 2:
                at_step_2.update(setting.weights())

    setting.trainer.add_callback(Watch())
    setting.trainer.train()
    state = setting.trainer.state
    assert (state.global_step, state.best_global_step, state.best_metric) == (5, 2, 5.0)
    assert same(setting.weights(), at_step_2)
    assert saved(tmp_path / "run") == ["checkpoint-2", "checkpoint-5"]


def test_the_last_step_is_always_validated(make: Make) -> None:
    setting = make(steps=5, measure_every=2)
    setting.trainer.train()
    assert [entry["step"] for entry in setting.history if f"eval_{METRIC}" in entry] == [2, 4, 5]
    assert setting.trainer.state.best_global_step == 5


def test_epochs_count_passes_over_the_pictures(make: Make) -> None:
    setting = make(steps=5)
    setting.trainer.train()
    assert [entry["epoch"] for entry in setting.history if "loss" in entry] == [0.5, 1.0, 1.5, 2.0, 2.5]


def test_a_request_ends_the_run_after_the_step_measured_and_saved(make: Make, tmp_path: Path) -> None:
    class Ask(TrainerCallback):
        def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            if state.global_step == 2:
                setting.stop.request("enough")
                setting.stop.request("the first reason stands")

    setting = make(steps=20, measure_every=10, callbacks=[Ask()])
    setting.trainer.train()
    assert setting.trainer.state.global_step == 3
    assert setting.stop.reason == "enough"
    assert [entry["step"] for entry in setting.history if f"eval_{METRIC}" in entry] == [3]
    assert saved(tmp_path / "run") == ["checkpoint-3"]


@pytest.mark.parametrize(("seconds", "steps", "reason"), [(-1, 1, "the time given was up"), (3600, 3, "")])
def test_no_step_begins_after_the_deadline(make: Make, seconds: float, steps: int, reason: str) -> None:
    setting = make(steps=3, deadline=time.monotonic() + seconds)
    setting.trainer.train()
    assert (setting.trainer.state.global_step, setting.stop.reason) == (steps, reason)


# ---------------------------------------------------------------- the scale


def test_the_scale_never_passes_a_hundred(make: Make) -> None:
    def push(towers: Towers, step: int) -> float:
        towers.module.logit_scale.grad = torch.tensor(-1.0)
        return 1.0

    setting = make(steps=2, head_learning_rate=0.5, objective=lambda towers: Stub(towers, push))
    with torch.no_grad():
        setting.module.logit_scale.fill_(math.log(99.9))
    setting.trainer.train()
    assert [entry["logit_scale"] for entry in setting.history if "loss" in entry] == pytest.approx([100, 100])
    assert setting.encoder.logit_scale == pytest.approx(100)


def test_below_a_hundred_the_scale_is_free(make: Make) -> None:
    setting = make(steps=2)
    began = setting.encoder.logit_scale
    setting.trainer.train()
    assert 0 < abs(setting.encoder.logit_scale - began) < 1


# ---------------------------------------------------------------- not a number


def test_a_poisoned_weight_ends_the_run_with_step_and_cure(make: Make) -> None:
    setting = make(steps=3, learning_rate=3e-4)
    with torch.no_grad():
        setting.module.text_projection.weight[0, 0] = math.nan
    with pytest.raises(
        FloatingPointError,
        match=r"^The loss is nan at step 1: lower the .* \(--learning-rate 1\.0e-04\), into another --output\.$",
    ):
        setting.trainer.train()


def test_a_gradient_that_explodes_ends_the_run_before_it_reaches_the_weights(make: Make, tmp_path: Path) -> None:
    def explode(towers: Towers, step: int) -> float:
        towers.module.logit_scale.grad = torch.tensor(math.inf if step == 3 else 1.0)
        return 1.0

    setting = make(steps=5, objective=lambda towers: Stub(towers, explode))
    with pytest.raises(FloatingPointError, match=r"^The gradient's norm is inf at step 3: .* saved are in .*-2\.$"):
        setting.trainer.train()
    last = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-2"
    assert all(bool(weight.isfinite().all()) for weight in load_file(last / "model.safetensors").values())


def test_embeddings_that_are_no_numbers_end_the_run_where_they_are_measured(make: Make) -> None:
    setting = make(steps=5, measure=scripted([1, ValueError("The scores hold NaN.")]))
    with pytest.raises(FloatingPointError, match=r"^The embeddings are no numbers at step 2: .* in .*/checkpoint-1\.$"):
        setting.trainer.train()


def test_in_half_precision_full_precision_is_the_first_cure(make: Make) -> None:
    setting = make(steps=3, precision="bf16")
    with torch.no_grad():
        setting.module.text_projection.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"step 1: train in full precision \(--precision fp32\), or lower the"):
        setting.trainer.train()


def test_bfloat16_runs_on_a_processor_and_is_what_the_towers_see(make: Make) -> None:
    setting = make(steps=2, precision="bf16")
    seen: list[torch.dtype] = []
    handle = setting.module.text_projection.register_forward_hook(lambda *parts: seen.append(parts[2].dtype))
    setting.trainer.train()
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert all(weight.dtype == torch.float32 and bool(weight.isfinite().all()) for weight in setting.weights().values())
    assert all(math.isfinite(entry["loss"]) for entry in setting.history if "loss" in entry)


# ---------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("killed_at", [3, 4, 5])
def test_a_resumed_run_stops_at_the_same_step_with_the_same_weights(make: Make, killed_at: int, tmp_path: Path) -> None:
    sums: list[Any] = [1, 5, 4, 4.5, 3, 9, 9, 9]
    whole = make("whole", steps=8, patience=3, measure=scripted(sums))
    whole.trainer.train()
    assert (whole.trainer.state.global_step, whole.trainer.state.best_global_step) == (5, 2)

    broken = make("broken", steps=8, patience=3, measure=scripted([*sums[: killed_at - 1], KeyboardInterrupt()]))
    with pytest.raises(KeyboardInterrupt):
        broken.trainer.train()
    shutil.move(tmp_path / "broken", tmp_path / "moved")
    last = last_checkpoint(tmp_path / "moved" / "checkpoints")
    again = make("moved", steps=8, patience=3, measure=scripted(sums[killed_at - 1 :]))
    again.trainer.train(resume_from_checkpoint=str(last))
    assert (again.trainer.state.global_step, again.trainer.state.best_global_step) == (5, 2)
    assert same(again.weights(), whole.weights())
    kept = ("step", "loss", "epoch", "grad_norm", "learning_rate", "logit_scale", f"eval_{METRIC}")
    told = [[{name: entry[name] for name in kept if name in entry} for entry in run.history] for run in (again, whole)]
    losses = [entry for entry in told[1] if "loss" in entry]
    assert [entry for entry in told[0] if "loss" in entry] == losses
    assert len(losses) == 5


def test_dropout_goes_on_where_it_was(make: Make) -> None:
    """Were the random state not restored, the resumed run would draw other units."""
    whole = make("whole", steps=4)
    whole.trainer.train()
    assert any(isinstance(layer, torch.nn.Dropout) and layer.p > 0 for layer in whole.module.modules())
    broken = make("broken", steps=4, measure=scripted([1, 2, KeyboardInterrupt()]))
    with pytest.raises(KeyboardInterrupt):
        broken.trainer.train()
    torch.rand(17)
    again = make("broken", steps=4, measure=scripted([3, 4]))
    again.trainer.train(resume_from_checkpoint=str(last_checkpoint(Path(again.trainer.args.output_dir))))
    assert same(again.weights(), whole.weights())


@pytest.mark.parametrize("name", ["EarlyStopping", "Patience"], ids=["now", "before_the_renaming"])
def test_a_run_killed_after_early_stopping_trains_no_further(make: Make, name: str) -> None:
    ended = make(steps=8, patience=1, measure=scripted([5, 4]))
    ended.trainer.train()
    last = last_checkpoint(Path(ended.trainer.args.output_dir))
    assert last is not None
    state = last / "trainer_state.json"
    state.write_text(state.read_text().replace('"EarlyStopping"', f'"{name}"'))
    (last / "complete").unlink()
    mark_complete(last)
    again = make(steps=8, patience=1, measure=scripted([9]))
    again.trainer.train(resume_from_checkpoint=str(last))
    assert again.trainer.state.best_global_step == 1
    assert same(again.weights(), ended.weights())


def test_a_checkpoint_without_its_mark_is_removed_and_the_one_before_taken(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(steps=10, measure_every=5).trainer.train()
    folder = tmp_path / "run" / "checkpoints"
    assert last_checkpoint(folder) == folder / "checkpoint-10"  # the later number, not the later letter
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-15")
    (folder / "checkpoint-15" / "complete").unlink()
    (folder / "checkpoint-15" / "optimizer.pt").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(folder) == folder / "checkpoint-10"
    assert "checkpoint-15 was not finished" in caplog.text
    assert saved(tmp_path / "run") == ["checkpoint-10", "checkpoint-5"]
    assert last_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("part", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_killed_while_a_checkpoint_is_written_the_one_before_is_whole(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    setting = make(steps=4)
    write = getattr(setting.trainer, part)

    def killed(output_dir: str, *rest: Any, **options: Any) -> None:
        if setting.trainer.state.global_step == 3:
            Path(output_dir).mkdir(exist_ok=True)
            raise KeyboardInterrupt
        write(output_dir, *rest, **options)

    monkeypatch.setattr(setting.trainer, part, killed)
    with pytest.raises(KeyboardInterrupt):
        setting.trainer.train()
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").exists()
    last = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-2"
    make(steps=4, measure=scripted([3, 4])).trainer.train(resume_from_checkpoint=str(last))


def test_killed_while_an_old_checkpoint_is_cleared_away_the_new_one_counts(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: str, **_: Any) -> None:
        next(Path(path).glob("optimizer*")).unlink()
        raise KeyboardInterrupt

    setting = make(steps=4, measure=scripted([9, 1, 1, 1]))  # the best is the oldest: the one before goes
    monkeypatch.setattr(transformers.trainer_utils.shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        setting.trainer.train()
    monkeypatch.undo()
    last = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-3"


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(make: Make, tmp_path: Path) -> None:
    setting = make(steps=1, preset="lit")
    setting.trainer.train()
    held = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-1" / "model.safetensors")
    trained = {name: weight.detach() for name, weight in setting.module.named_parameters() if weight.requires_grad}
    assert same(held, trained)
    assert 0 < len(held) < len(list(setting.module.parameters()))
    assert not any(name.startswith("vision_model.") for name in held)


def test_a_checkpoint_of_another_preset_is_refused(make: Make, tmp_path: Path) -> None:
    make("one", steps=1, preset="lit").trainer.train()
    other = make("other", steps=1, preset="full")
    with pytest.raises(ValueError, match="another model or preset; choose another --output"):
        other.trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoints" / "checkpoint-1"))


# ---------------------------------------------------------------- what is said and logged


def test_a_line_for_every_log_and_measurement(make: Make) -> None:
    setting = make(steps=2, measure_every=2, measure=scripted([3.456]))
    setting.trainer.train()
    assert len(setting.said) == 3
    assert setting.said[0].startswith("step 1/2  epoch 0.5  loss ")
    assert setting.said[0].endswith(" left")
    assert "  scale 12.2  " in setting.said[0]
    assert setting.said[2] == ("step 2/2  validation: image to text R@1 25.0  text to image R@1 25.0  recall sum 345.6")


def test_each_run_logs_for_tensorboard_below_its_own_folder(make: Make, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(name, steps=1).trainer.train()
        (events,) = (tmp_path / name / "logs").iterdir()
        assert events.name.startswith("events.out.tfevents.")
        assert b"train/logit_scale" in events.read_bytes()
        assert b"eval/recall_sum" in events.read_bytes()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (5300, "88 min"), (5400, "1 h 30 min")]
)
def test_a_time_in_words(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
