"""What training assumes of transformers' Trainer: an upgrade that moves it fails here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_trainer import RECIPE
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from alignment.train.trainer import training_arguments
from alignment.train.trainer_internals import CheckpointHook


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).mean()}


class Recorder(CheckpointHook):
    """A trainer that notes what is there when a checkpoint is finished."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.finished: list[tuple[str, set[str]]] = []

    def finish_checkpoint(self, folder: Path) -> None:
        self.finished.append((folder.name, {path.name for path in folder.iterdir()}))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        return {"eval_recall_sum": float(self.state.global_step)}


def trainer(folder: Path) -> Recorder:
    data = [{"x": torch.tensor(float(number))} for number in range(8)]
    recipe = replace(RECIPE, batch_size=2, max_steps=4, measure_every=2)
    args = training_arguments(folder, recipe, workers=0, use_cpu=True)
    return Recorder(Model(), args, train_dataset=data, eval_dataset=data)


def test_a_checkpoint_is_finished_when_all_its_files_are_written_and_before_on_save(tmp_path: Path) -> None:
    recorder, saved = trainer(tmp_path), list[int]()

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            saved.append(len(recorder.finished))

    recorder.add_callback(Watch())
    recorder.train()
    assert [name for name, _ in recorder.finished] == ["checkpoint-2", "checkpoint-4"]
    for _, files in recorder.finished:
        assert files >= {"model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
    assert saved == [1, 2]


def test_a_library_that_cannot_write_a_checkpoint_ends_in_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint-2"):
        trainer(tmp_path).train()


def test_a_process_never_splits_its_batch_over_several_gpus(tmp_path: Path) -> None:
    args = training_arguments(tmp_path, RECIPE, workers=0, use_cpu=True)
    args._n_gpu = 4
    assert args.n_gpu == 1
    assert args.train_batch_size == 4
