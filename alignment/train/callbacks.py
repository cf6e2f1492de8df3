"""Callbacks that `trainer` calls: early stopping, graceful stop, progress lines."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback

from alignment.train.objective import gather
from alignment.train.settings import format_duration

METRIC = "recall_sum"


class EarlyStopping(EarlyStoppingCallback):
    """Stops when the validation recall sum has not risen for some validations."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the counter of an interrupted run."""
        saved, name = state.stateful_callbacks, type(self).__name__
        if "Patience" in saved:  # checkpoints written before this class got its present name
            saved[name] = saved.pop("Patience")
        self.early_stopping_patience_counter = saved[name]["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop = self._is_exhausted()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ignore the one step that Trainer runs when the interrupted run had already stopped."""
        if self._is_exhausted():
            control.should_log = control.should_evaluate = control.should_save = False

    def _is_exhausted(self) -> bool:
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)


class GracefulStop(TrainerCallback):
    """Ends a run early with a validation and a checkpoint, at a deadline (`time.monotonic`) or on request.

    `reason` is why training ended before its last step, "" if it did not.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline, self.reason = deadline, ""

    def request(self, reason: str) -> None:
        """End training after the current step."""
        self.reason = self.reason or reason

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Validate, save and stop, on all processes after the same step."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.request("the time given was up")
        if bool(gather(torch.tensor([bool(self.reason)], dtype=torch.int32, device=args.device)).any()):
            self.request("another process was stopped")
            control.should_training_stop = control.should_evaluate = control.should_save = True

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Stop gracefully at the first SIGINT or SIGTERM; a second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def stop(number: int, frame: FrameType | None) -> None:
            self.request(f"stopped by {signal.Signals(number).name}")
            restore()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            restore()


class ConsoleLogger(TrainerCallback):
    """Prints one line per log entry or validation."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Print the entry."""
        place = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            per_step = (time.monotonic() - self.started) / (state.global_step - self.first_step)
            left = format_duration(per_step * (state.max_steps - state.global_step))
            figures = f"epoch {state.epoch:.1f}  loss {logs['loss']:.3f}  scale {logs['logit_scale']:.1f}"
            self.log(f"{place}  {figures}  {left} left")
        elif f"eval_{METRIC}" in logs:
            sides = "  ".join(
                f"{name.replace('_', ' ')} R@1 {100 * logs[f'eval_{name}_recall@1']:.1f}"
                for name in ("image_to_text", "text_to_image")
            )
            self.log(f"{place}  validation: {sides}  recall sum {100 * logs[f'eval_{METRIC}']:.1f}")
