"""The private part of transformers' Trainer that this package overrides; no other file touches one.

`Trainer._save_checkpoint`: the public `on_save` callback runs after it, but an error of torch or safetensors on a full
disk can only be translated around it: without the override such a run ends with a traceback instead of advice.
tests/test_train_trainer_internals.py fails when an upgrade renames it or writes other files.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from alignment.train.run_dir import wrap_write_errors


class CheckpointHook(Trainer):
    """Calls `finish_checkpoint` on every process when Trainer has written all files of a checkpoint."""

    def finish_checkpoint(self, folder: Path) -> None:
        """Complete a checkpoint."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with wrap_write_errors(folder):
            super()._save_checkpoint(model, trial)
        self.finish_checkpoint(folder)
