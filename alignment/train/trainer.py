"""The training loop: transformers' Trainer with a contrastive step and retrieval as validation.

Place in the flow: `dataset + presets + objective -> trainer (here) -> run`. Trainer and accelerate provide mixed
precision, schedules, logging, checkpoints and multiple processes.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from alignment.train.callbacks import METRIC, ClampScale, EpochCounter
from alignment.train.checkpoints import is_complete, last_checkpoint, load_trained, mark_complete, save_trained
from alignment.train.dataset import ContrastiveDataset
from alignment.train.objective import Batch, Objective
from alignment.train.presets import Towers
from alignment.train.run_dir import CHECKPOINTS
from alignment.train.trainer_internals import CheckpointHook

logger = logging.getLogger(__name__)

_NUM_CHECKPOINTS = 2  # kept on disk: the last one, and the best or the one before


class ContrastiveTrainer(CheckpointHook):
    """Trainer whose step is `Objective.backward` and whose evaluation is retrieval.

    A checkpoint holds the trained weights alone (safetensors), the optimiser, the schedule and the random state.
    """

    model: Towers
    optimizer: Any
    control: TrainerControl

    def __init__(
        self,
        towers: Towers,
        args: TrainingArguments,
        *,
        dataset: ContrastiveDataset,
        objective: Objective,
        validate: Callable[[], Mapping[str, float]],
        groups: list[dict[str, Any]],
        callbacks: list[TrainerCallback],
    ) -> None:
        """Connect the parts; `validate` returns the metrics of a report, `recall_sum` among them."""
        self.objective, self.validate, self.groups = objective, validate, groups
        super().__init__(
            model=towers,
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset,  # required by Trainer; `evaluate` does not read it
            data_collator=dataset.collate,
            callbacks=[EpochCounter(dataset.steps_per_epoch), ClampScale(towers), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # replaced by `ConsoleLogger`
        if args.should_log:
            self.add_callback(TensorBoardCallback(SummaryWriter(str(Path(args.output_dir).with_name("logs")))))

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        """Train, and load the best weights; raises FloatingPointError naming the step and the cure."""
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **options)
        # By the step, since the folder may have been moved since Trainer recorded its path.
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        if is_complete(best):
            load_trained(self.model, best)
        else:
            logger.warning("%s is gone or damaged, so the last weights are taken for the best.", best)
            self.state.best_global_step = self.state.global_step
        return output

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one step of the objective; raises FloatingPointError on a loss or gradient that is not finite."""
        self.model.train()
        loss = self.objective.backward(Batch(**inputs), self.accelerator.backward, self.accelerator.autocast)
        if not bool(loss.isfinite()):
            raise self._divergence(f"The loss is {loss.item()}")
        if self.accelerator.scaler is None:  # a gradient scaler skips steps that overflow
            gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            norm = float(get_total_norm(gradients))
            if not math.isfinite(norm):
                raise self._divergence(f"The gradient's norm is {norm}")
        return loss.to(self.args.device)

    def _divergence(self, what: str, step: int = 0) -> FloatingPointError:
        peak = min(group["initial_lr"] for group in self.optimizer.param_groups)
        cure = f"lower the learning rate (--learning-rate {peak / 3:.1e})"
        if self.args.fp16 or self.args.bf16:
            cure = f"train in full precision (--precision fp32), or {cure}"
        last = last_checkpoint(Path(self.args.output_dir))
        saved = f" The last weights saved are in {last}." if last else ""
        step = step or self.state.global_step + 1
        return FloatingPointError(f"{what} at step {step}: {cure}, into another --output.{saved}")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build AdamW over the weight groups."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.groups, betas=(0.9, 0.98), eps=1e-6, fused=True)  # CLIP's
        return self.optimizer

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Measure retrieval on the validation data; raises FloatingPointError on embeddings that are not finite."""
        try:
            measured = self.validate()
        except ValueError as error:  # the start weights were measured without one
            raise self._divergence("The embeddings are no numbers", self.state.global_step) from error
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the scale beside the loss."""
        if "loss" in logs:
            logs["logit_scale"] = float(self.model.logit_scale.detach().exp())
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained weights."""
        if self.args.should_save:
            save_trained(self.model, Path(output_dir or self.args.output_dir))

    def finish_checkpoint(self, folder: Path) -> None:
        """Mark a checkpoint as complete, and delete old ones."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            # Only now: a kill while an older one is half deleted then leaves this one.
            rotate_checkpoints(self.args.output_dir, _NUM_CHECKPOINTS, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # before another process looks for the best checkpoint


class OneDeviceArguments(TrainingArguments):
    """Arguments of a process that uses one GPU; several GPUs take several processes (torchrun)."""

    @property
    def n_gpu(self) -> int:
        """Number of GPUs of this process, at most one, so that Trainer never wraps the model in DataParallel."""
        return min(1, super().n_gpu)


def training_arguments(
    folder: Path, *, batch_size: int, num_steps: int, measure_every: int, warmup_steps: int, **settings: Any
) -> TrainingArguments:
    """Fill in the arguments that all contrastive runs share.

    Args:
        folder: the result folder; checkpoints and logs go below it.
        batch_size: images per step, over all processes.
        num_steps: optimiser steps.
        measure_every: steps between two validations, each followed by a checkpoint.
        warmup_steps: of linear warm-up, before a cosine schedule.
        settings: further `TrainingArguments`.
    """
    return OneDeviceArguments(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=batch_size // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=num_steps,
        train_sampling_strategy="sequential",  # the data set is shuffled already
        eval_strategy="steps",
        eval_steps=measure_every,
        save_strategy="steps",
        save_steps=measure_every,
        metric_for_best_model=METRIC,
        greater_is_better=True,
        warmup_steps=warmup_steps,
        lr_scheduler_type="cosine",
        logging_steps=math.ceil(num_steps / 50),
        logging_nan_inf_filter=False,
        report_to=[],  # `ContrastiveTrainer` adds TensorBoard with the folder `logs`
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        **settings,
    )
