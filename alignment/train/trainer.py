"""The training loop: transformers' Trainer with a contrastive step and retrieval as validation.

Place in the flow: `dataset + presets + objective -> trainer (here) -> run`. Trainer and accelerate provide mixed
precision, schedules, logging, checkpoints and multiple processes.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from alignment.data import Pair
from alignment.evaluate import Embedded, evaluate_embedded
from alignment.model import DualEncoder
from alignment.train.dataset import ContrastiveDataset
from alignment.train.feature_cache import CachedFeatures
from alignment.train.objective import Batch, Objective, gather, num_processes
from alignment.train.presets import Towers
from alignment.train.run_dir import CHECKPOINTS, WEIGHTS, is_complete, last_checkpoint, mark_complete
from alignment.train.settings import TrainRecipe, format_duration
from alignment.train.trainer_internals import CheckpointHook

logger = logging.getLogger(__name__)

METRIC = "recall_sum"
MAX_LOGIT_SCALE = 100.0  # as CLIP did: beyond it, training is unstable
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
        """Connect the parts; `validate` returns metrics, `recall_sum` among them."""
        self.objective, self.validate, self.steps_per_epoch = objective, validate, dataset.steps_per_epoch
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)  # CLIP's
        optimizer.register_step_post_hook(lambda *_: towers.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE)))
        super().__init__(
            model=towers,
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset,  # required by Trainer; `evaluate` does not read it
            data_collator=dataset.collate,
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
        self.remove_callback(PrinterCallback)  # replaced by `ConsoleLogger`
        if args.should_log:
            self.add_callback(TensorBoardCallback(SummaryWriter(str(Path(args.output_dir).with_name("logs")))))

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        """Train, and load the best weights; raises FloatingPointError naming the step and the cure."""
        before = threading.excepthook
        # TensorBoard's writer thread fails on a full disk before training does: one line in place of a traceback.
        threading.excepthook = lambda error: logger.warning("In the background: %s", error.exc_value)
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **options)
        finally:
            threading.excepthook = before
        # By the step, since the folder may have been moved since Trainer recorded its path.
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        if is_complete(best):
            self.model.load_state_dict(load_file(best / WEIGHTS))
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
            norm = get_total_norm([weight.grad for weight in self.model.parameters() if weight.grad is not None])
            if not bool(norm.isfinite()):
                raise self._divergence(f"The gradient's norm is {norm.item()}")
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

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure retrieval on the validation data; raises FloatingPointError on embeddings that are not finite."""
        try:
            measured = self.validate()
        except ValueError as error:  # the start weights were measured without one
            raise self._divergence("The embeddings are no numbers", self.state.global_step) from error
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the scale beside the loss, and epochs as passes over the images: for Trainer the run is one epoch."""
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        if "loss" in logs:
            logs["logit_scale"] = float(self.model.logit_scale.detach().exp())
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained weights."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.model.state_dict(), folder / WEIGHTS)

    def finish_checkpoint(self, folder: Path) -> None:
        """Mark a checkpoint as complete, and delete old ones."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            # Only now: a kill while an older one is half deleted then leaves this one.
            rotate_checkpoints(self.args.output_dir, _NUM_CHECKPOINTS, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # before another process looks for the best checkpoint


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


class Validator:
    """Retrieval on `pairs`, each image once; `cache` has features of the images. All captions are candidates."""

    def __init__(self, encoder: DualEncoder, pairs: Sequence[Pair], cache: CachedFeatures | None = None) -> None:
        self.encoder, self.cache = encoder, cache
        self.images = [pair.image for pair in pairs]
        self.texts = [caption for pair in pairs for caption in pair.captions]
        self.image_of_text = torch.repeat_interleave(torch.tensor([len(pair.captions) for pair in pairs]))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of a `RetrievalReport`, without intervals."""
        report = evaluate_embedded(self.embed(), resamples=0)
        return {name: estimate.value for name, estimate in report.metrics.items()}

    def embed(self) -> Embedded:
        """Embed images and captions; each process embeds its share."""
        image_embeds = _distributed(range(len(self.images)), self._embed_images)
        text_embeds = _distributed(range(len(self.texts)), self._embed_texts)
        return Embedded(self.images, self.texts, self.image_of_text, image_embeds, text_embeds)

    def _embed_images(self, rows: Sequence[int]) -> Tensor:
        return self.cache.embed(rows) if self.cache else self.encoder.encode_images([self.images[row] for row in rows])

    def _embed_texts(self, rows: Sequence[int]) -> Tensor:
        # Sorted by length, batches have less padding.
        order = sorted(range(len(rows)), key=lambda place: len(self.texts[rows[place]]))
        embeds = self.encoder.encode_texts([self.texts[rows[place]] for place in order], batch_size=256)
        return embeds[torch.tensor(order, dtype=torch.long).argsort()]


def _distributed(rows: range, embed: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """Embed an equal share of the rows on each process, and gather the embeddings of all."""
    if num_processes() == 1:
        return embed(rows)
    parts: list[Any] = [None] * num_processes()
    shares = torch.tensor(rows).tensor_split(num_processes())
    distributed.all_gather_object(parts, embed(shares[distributed.get_rank()].tolist()))
    return torch.cat(parts)


class OneDeviceArguments(TrainingArguments):
    """Arguments of a process that uses one GPU; several GPUs take several processes (torchrun)."""

    @property
    def n_gpu(self) -> int:
        """Number of GPUs of this process, at most one, so that Trainer never wraps the model in DataParallel."""
        return min(1, super().n_gpu)


def training_arguments(folder: Path, recipe: TrainRecipe, *, use_cpu: bool, workers: int) -> TrainingArguments:
    """Fill in the arguments of a run into a result folder; `workers` processes read pictures."""
    return OneDeviceArguments(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=recipe.batch_size // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=recipe.max_steps,
        train_sampling_strategy="sequential",  # the data set is shuffled already
        eval_strategy="steps",
        eval_steps=recipe.measure_every,
        save_strategy="steps",
        save_steps=recipe.measure_every,
        metric_for_best_model=METRIC,
        greater_is_better=True,
        warmup_steps=round(recipe.warmup * recipe.max_steps),
        lr_scheduler_type="cosine",
        logging_steps=math.ceil(recipe.max_steps / 50),
        logging_nan_inf_filter=False,
        report_to=[],  # `ContrastiveTrainer` adds TensorBoard with the folder `logs`
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=workers,
        disable_tqdm=True,
        seed=recipe.seed,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        use_cpu=use_cpu,
    )
