"""The training loop: transformers' Trainer, with our step, our measurement and our rules for stopping.

Place in the flow: `examples + presets + objective -> trainer (here) -> run`. Mixed precision, schedules, logging,
checkpoints and several processes are Trainer's and accelerate's; here is what a contrastive run does differently.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from alignment.durable import foreign_errors, read_sealed, sha256_of, sync_tree, write_sealed
from alignment.train.dataset import ContrastiveDataset
from alignment.train.objective import Batch, Objective, gather
from alignment.train.presets import Towers, trained_names

logger = logging.getLogger(__name__)

MAX_LOGIT_SCALE = 100.0
METRIC = "recall_sum"
_WEIGHTS = "model.safetensors"
_COMPLETE = "complete"  # hashes of a checkpoint's files; one without was being written when the run died
_KEPT_CHECKPOINTS = 2  # the last one, and the best or the one before


class ContrastiveTrainer(Trainer):
    """Trainer whose step is `Objective.backward` and whose measurement is retrieval.

    Its checkpoints hold the trained weights alone (safetensors), the optimiser, the schedule and the random state.
    """

    optimizer: Any
    control: TrainerControl

    def __init__(
        self,
        towers: Towers,
        args: TrainingArguments,
        *,
        examples: ContrastiveDataset,
        objective: Objective,
        measure: Callable[[], Mapping[str, float]],
        groups: list[dict[str, Any]],
        callbacks: list[TrainerCallback],
    ) -> None:
        """Take the parts; `measure` returns a report's figures, `recall_sum` among them."""
        self.objective = objective
        self.measure = measure
        self.groups = groups
        super().__init__(
            model=towers,
            args=args,
            train_dataset=examples,
            eval_dataset=examples,  # never read: `evaluate` measures retrieval; but Trainer insists on one
            data_collator=examples.collate,
            callbacks=[_CountEpochs(examples.steps_per_epoch), _ClampScale(towers), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # `ConsoleLogger` speaks instead
        if args.should_log:
            self.add_callback(TensorBoardCallback(SummaryWriter(str(Path(args.output_dir).with_name("logs")))))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one step of the objective; a loss that is not finite ends the run.

        Raises:
            FloatingPointError: naming the step and the cure.
        """
        self.model.train()
        batch = Batch(**self._prepare_inputs(inputs))
        loss = self.objective.backward(batch, self.accelerator.backward, self.accelerator.autocast)
        if not bool(loss.isfinite()):
            raise FloatingPointError(self._diagnosis(f"The loss is {loss.item()}"))
        return loss.to(self.args.device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # A gradient scaler skips the steps that overflow by itself.
        if norm is not None and not math.isfinite(norm) and self.accelerator.scaler is None:
            raise FloatingPointError(self._diagnosis(f"The gradient's norm is {float(norm)}"))
        return norm

    def _diagnosis(self, what: str, step: int = 0) -> str:
        peak = min(group["initial_lr"] for group in self.optimizer.param_groups)
        cure = f"lower the learning rate (--learning-rate {peak / 3:.1e})"
        if self.args.fp16 or self.args.bf16:
            cure = f"train in full precision (--precision fp32), or {cure}"
        last = last_checkpoint(Path(self.args.output_dir))
        saved = f" The last weights saved are in {last}." if last else ""
        return f"{what} at step {step or self.state.global_step + 1}: {cure}, into another --output.{saved}"

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build AdamW over the groups given."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.groups, betas=(0.9, 0.98), eps=1e-6, fused=True)  # CLIP's
        return self.optimizer

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Measure retrieval on the validation data.

        Raises:
            FloatingPointError: naming the step and the cure.
        """
        try:
            measured = self.measure()
        except ValueError as error:  # with the start weights there was none
            raise FloatingPointError(
                self._diagnosis("The embeddings are no numbers", self.state.global_step)
            ) from error
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the scale beside the loss."""
        if "loss" in logs:
            logs["logit_scale"] = float(self.model.logit_scale.detach().exp())
        super().log(logs, start_time)

    # ------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with foreign_errors(folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync_tree(folder)
            write_sealed(folder / _COMPLETE, {path.name: sha256_of(path) for path in sorted(folder.iterdir())})
            # Only now: were an older one half deleted at a kill, this one would stand for it.
            rotate_checkpoints(self.args.output_dir, _KEPT_CHECKPOINTS, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # else another process looks for the best weights before they count

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = dict(self.model.module.named_parameters())
        state = {name: weights[name].detach().cpu().contiguous() for name in trained_names(self.model.module)}
        save_file(state, folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.model.module, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        # By its step: the folder may have been moved since its path was noted down.
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        if _is_whole(best):
            load_trained(self.model.module, best)
        else:
            logger.warning("%s is gone or damaged, so the last weights are taken for the best.", best)
            self.state.best_global_step = self.state.global_step


def load_trained(module: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights in place of the trained ones.

    Raises:
        ValueError: when the checkpoint is of another model or preset.
    """
    state = load_file(checkpoint / _WEIGHTS)
    if state.keys() != set(trained_names(module)):
        raise ValueError(f"{checkpoint} is of a run with another model or preset; choose another --output.")
    module.load_state_dict(state, strict=False)


def last_checkpoint(folder: Path) -> Path | None:
    """Find the newest whole checkpoint of a run, and clear away what a kill left half-written or has been damaged."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in checkpoints if _is_whole(path)]
    for path in checkpoints:
        if path not in whole:
            logger.warning("%s was not finished or is damaged, and is removed.", path)
            shutil.rmtree(path, ignore_errors=True)  # another process of the same run may be as far
    return whole[-1] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether everything in it is as it was written."""
    try:
        files = read_sealed(checkpoint / _COMPLETE)
        return all(sha256_of(checkpoint / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------- rules


class _CountEpochs(TrainerCallback):
    """To Trainer the whole run is one epoch; people count passes over the pictures."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say where in the data the run is."""
        state.epoch = state.global_step / self.steps_per_epoch


class _ClampScale(TrainerCallback):
    """Keep the multiplier at or below 100, as CLIP did: beyond it, training is unstable."""

    def __init__(self, towers: Towers) -> None:
        self.towers = towers

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Clamp it after every step."""
        self.towers.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


class EarlyStopping(EarlyStoppingCallback):
    """Stop once the validation recall sum has not risen for some measurements."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **arguments: Any
    ) -> None:
        """Go on counting where an interrupted run stopped."""
        super().on_train_begin(args, state, control, **arguments)
        counted = state.stateful_callbacks[type(self).__name__]["attributes"]["early_stopping_patience_counter"]
        self.early_stopping_patience_counter = counted
        control.should_training_stop = counted >= self.early_stopping_patience

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ignore the step that Trainer still makes if the run had lost patience before it was interrupted."""
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_log = control.should_evaluate = control.should_save = False


class GracefulStop(TrainerCallback):
    """End the run in good order when its time is up or a person asks for it; what is learnt by then is kept.

    Attributes:
        reason: why training was ended before its last step; "" if it was not.
    """

    def __init__(self, deadline: float | None = None) -> None:
        """Take the moment, by `time.monotonic`, after which no step begins."""
        self.deadline = deadline
        self.reason = ""

    def ask(self, reason: str) -> None:
        """End training after the current step."""
        self.reason = self.reason or reason

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure and save, then stop."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.ask("the time given was up")
        # Whoever is asked, all processes end after the same step.
        if bool(gather(torch.tensor([bool(self.reason)], dtype=torch.int32, device=args.device)).any()):
            self.ask("another process was stopped")
            control.should_training_stop = control.should_evaluate = control.should_save = True


@contextmanager
def stop_on_signals(stop: GracefulStop) -> Iterator[None]:
    """Let the first Ctrl-C or polite kill end training in good order; the second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.ask(f"stopped by {signal.Signals(number).name}")
        for name, handler in before.items():
            signal.signal(name, handler)

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class ConsoleLogger(TrainerCallback):
    """One line a measurement or log, for people."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log
        self.started = time.monotonic()
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Say where the run is."""
        if not state.is_world_process_zero or not logs:
            return
        place = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            done = state.global_step - self.first_step
            left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
            self.log(
                f"{place}  epoch {state.epoch:.1f}  loss {logs['loss']:.3f}  scale {logs['logit_scale']:.1f}  "
                f"{duration(left)} left"
            )
        elif f"eval_{METRIC}" in logs:
            sides = "  ".join(
                f"{name.replace('_', ' ')} R@1 {100 * logs[f'eval_{name}_recall@1']:.1f}"
                for name in ("image_to_text", "text_to_image")
            )
            self.log(f"{place}  validation: {sides}  recall sum {100 * logs[f'eval_{METRIC}']:.1f}")


def duration(seconds: float) -> str:
    """Say a time roughly."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def training_arguments(
    folder: Path, *, batch_size: int, num_steps: int, measure_every: int, warmup_steps: int, **settings: Any
) -> TrainingArguments:
    """Fill in what every contrastive run has in common.

    Args:
        folder: the result folder; checkpoints and logs go below it.
        batch_size: images a step, over all processes.
        num_steps: optimiser steps.
        measure_every: steps between two measurements, each followed by a checkpoint.
        warmup_steps: of the rise of the learning rate; a cosine follows.
        settings: more of `TrainingArguments`.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=batch_size // processes,
        max_steps=num_steps,
        train_sampling_strategy="sequential",  # the examples are shuffled already
        eval_strategy="steps",
        eval_steps=measure_every,
        save_strategy="steps",
        save_steps=measure_every,
        load_best_model_at_end=True,
        metric_for_best_model=METRIC,
        greater_is_better=True,
        warmup_steps=warmup_steps,
        lr_scheduler_type="cosine",
        logging_steps=math.ceil(num_steps / 50),
        logging_nan_inf_filter=False,
        report_to=[],  # the trainer writes TensorBoard's files itself, where they belong
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        **settings,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are several processes (torchrun), never threads of one
    return arguments
