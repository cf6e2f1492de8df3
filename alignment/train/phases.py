"""The phases of a run, as functions that pass values on.

Place in the flow: `run` calls `load_setup -> make_plan -> fit -> interpolate_weights`.
"""

from __future__ import annotations

import logging
import math
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import set_seed

from alignment.data import Pair
from alignment.evaluate import Embedded
from alignment.model import DualEncoder
from alignment.train.callbacks import METRIC, ConsoleLogger, EarlyStopping, GracefulStop
from alignment.train.checkpoints import last_checkpoint
from alignment.train.config import TrainConfig
from alignment.train.dataset import CaptionIndex, ContrastiveDataset
from alignment.train.feature_cache import CachedFeatures
from alignment.train.objective import Objective, gather
from alignment.train.plan import Plan, format_duration, plan_text
from alignment.train.prepare import Prepared
from alignment.train.presets import Towers, apply_preset, checkpoint_activations, snapshot, weight_groups
from alignment.train.run_dir import CHECKPOINTS, FEATURES, ResumeState
from alignment.train.scratch import build_scratch
from alignment.train.settings import ALPHAS, TrainRecipe, complete
from alignment.train.trainer import ContrastiveTrainer, training_arguments
from alignment.train.validator import Validator

logger = logging.getLogger(__name__)

_PROBE_IMAGES = 32
_SHARE_OF_TIME = 0.85  # of --minutes goes into steps; the rest into the choice of weights and the report

Log = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """A model ready to train, with its data, settings (`state`) and a copy of the start weights on the CPU.

    `cache` holds features of the training images, if any; `second` measures the second data set, if there is one.
    """

    state: ResumeState
    prepared: Prepared
    folder: Path
    log: Log
    encoder: DualEncoder
    towers: Towers
    start_weights: dict[str, Tensor]
    captions: CaptionIndex
    cache: CachedFeatures | None
    validator: Validator
    second: Validator | None

    @property
    def recipe(self) -> TrainRecipe:
        """The options with every choice made."""
        return self.state.recipe

    def dataset(self, *, batch_size: int, num_steps: int) -> ContrastiveDataset:
        """Build the training data."""
        return ContrastiveDataset(
            self.prepared.train,
            self.captions,
            self.encoder.preprocessor,
            batch_size=batch_size,
            num_steps=num_steps,
            captions_per_image=self.recipe.captions_per_image,
            augment=self.recipe.augment,
            seed=self.recipe.seed,
            cache=self.cache,
        )

    def measure(self) -> Validation:
        """Embed the validation data and the second data set with the present weights."""
        began = time.monotonic()
        embedded = self.validator.embed()
        seconds = time.monotonic() - began
        return Validation(embedded, self.second.embed() if self.second else None, seconds)


@dataclass(frozen=True)
class Validation:
    """The validation data and the second data set as embedded by the model, and the seconds the former took."""

    embedded: Embedded
    second: Embedded | None
    seconds: float


@dataclass(frozen=True)
class Fitted:
    """The course of training, by the names of `RunRecord`."""

    history: list[dict[str, Any]]
    best_step: int
    stopped: str


@dataclass(frozen=True)
class Interpolated:
    """Recall sums between start and tuned weights and the alpha chosen, by the names of `RunRecord`."""

    interpolation: list[dict[str, float | None]] = field(default_factory=list)
    alpha: float | None = None


def load_setup(
    config: TrainConfig,
    prepared: Prepared,
    folder: Path,
    log: Log,
    *,
    command: Sequence[str] = (),
    saved: ResumeState | None = None,
) -> Setup:
    """Load the start model, choose the settings, freeze weights, and cache the features of frozen layers.

    Raises:
        ValueError: on settings that do not fit the model, or when `saved` is of other data or start weights.
    """
    set_seed(config.seed or 0)
    encoder = _load_start(config, prepared)
    encoder.module.to(memory_format=torch.channels_last)  # convolutions run up to twice as fast
    recipe = complete(config, encoder, len(prepared.train), num_processes=PartialState().num_processes)
    if config.batch_size and recipe.batch_size < config.batch_size:
        log(f"--batch-size {config.batch_size} is more than there are: {recipe.batch_size} pictures a step.")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    call = shlex.join(["python", "-m", "alignment.train", *command])
    state = ResumeState(config, recipe, started, call, prepared.digest, encoder.fingerprint)
    if saved is not None:
        saved.check(prepared, encoder.fingerprint)
        state = replace(saved, config=config)
    weights = snapshot(encoder.module)
    if state.recipe.gradient_checkpointing:
        checkpoint_activations(encoder)
    apply_preset(encoder, state.recipe.preset)
    captions, towers = CaptionIndex(prepared.train, prepared.near_duplicates), Towers(encoder)
    with PartialState().main_process_first():
        cache, eval_cache = _cache_features(towers, encoder, state, prepared, folder, log)
    validator = Validator(encoder, prepared.evaluation, eval_cache)
    second = Validator(encoder, prepared.second) if prepared.second else None
    return Setup(state, prepared, folder, log, encoder, towers, weights, captions, cache, validator, second)


def _load_start(config: TrainConfig, prepared: Prepared) -> DualEncoder:
    """Load, compose or build the start model, run by PyTorch so that it compares with the trained one."""
    if config.scratch:
        captions = [caption for pair in prepared.train for caption in pair.captions]
        return build_scratch(captions, config.scratch, device=config.device)
    if config.vision and config.text:
        return DualEncoder.compose(config.vision, config.text, device=config.device)
    if config.model:
        return DualEncoder.load(config.model, device=config.device, runtime="torch")
    raise ValueError("Name a model to begin with (--model), two towers to join (--vision, --text), or --scratch.")


def _cache_features(
    towers: Towers, encoder: DualEncoder, state: ResumeState, prepared: Prepared, folder: Path, log: Log
) -> tuple[CachedFeatures | None, CachedFeatures | None]:
    """Cache the frozen layers' features of training and validation images; None where no layer is frozen."""
    config, augment = state.config, state.recipe.augment
    point = towers.cache_features(augment=augment) if state.recipe.keep_images else None
    if point is None:
        if config.keep_images or config.kept_folder:
            unused = "with this preset no part of the image side is frozen"
            log(f"--keep-images and --kept-folder have no effect: {unused}.")
        return None, None

    def fill(pairs: Sequence[Pair], what: str, *, augment: bool) -> CachedFeatures:
        place = Path(config.kept_folder or folder / FEATURES)
        cache = CachedFeatures(point, encoder, [pair.image for pair in pairs], place, augment=augment)
        cache.fill(progress=log_progress(log, f"{what} pictures: {point.name}"))
        return cache

    train = fill(prepared.train, "training", augment=augment)
    return train, fill(prepared.evaluation, "validation", augment=False)


def make_plan(setup: Setup, before: Validation, *, deadline: float | None) -> tuple[Setup, Plan]:
    """Time one step, fit the run into the time until the deadline (`time.monotonic`), and log the plan.

    Returns:
        The setup with the length that fits, and the plan.
    """
    seconds, memory = _probe(setup)
    recipe = setup.recipe
    own = torch.tensor([seconds + before.seconds / recipe.measure_every], device=setup.encoder.device)
    per_step = float(gather(own).max())  # of the slowest process: all must plan the same
    if deadline is not None:
        steps = max(1, min(recipe.max_steps, int(_SHARE_OF_TIME * (deadline - time.monotonic()) / per_step)))
        every = min(recipe.measure_every, math.ceil(steps / 6))  # a short run is validated several times, too
        recipe = replace(recipe, max_steps=steps, measure_every=every)
    images, weights = len(setup.prepared.train), list(setup.encoder.module.parameters())
    plan = Plan(
        train_images=images,
        train_captions=len(setup.captions.texts),
        eval_images=len(setup.prepared.evaluation),
        eval_captions=len(before.embedded.texts),
        steps=recipe.max_steps,
        epochs=round(recipe.max_steps / max(1, images // recipe.batch_size), 2),
        batch_size=recipe.batch_size,
        chunk_size=recipe.chunk_size,
        processes=PartialState().num_processes,
        trainable_parameters=sum(weight.numel() for weight in weights if weight.requires_grad),
        total_parameters=sum(weight.numel() for weight in weights),
        device=str(setup.encoder.device),
        precision=recipe.precision,
        estimated_seconds=per_step * recipe.max_steps,
        peak_memory_bytes=memory,
    )
    setup.log(plan_text(plan, recipe, setup.encoder.name, setup.prepared.evaluation_name))
    return replace(setup, state=replace(setup.state, recipe=recipe)), plan


def _probe(setup: Setup) -> tuple[float, int]:
    """Return the seconds and the bytes of memory of one step; weights and random state do not change."""
    recipe = setup.recipe
    size = min(_PROBE_IMAGES, recipe.chunk_size)
    dataset = setup.dataset(batch_size=size, num_steps=2)
    objective = Objective(setup.towers, setup.captions.positive_mask, loss=recipe.loss)
    setup.towers.train()
    with torch.random.fork_rng():
        for step in range(2):  # the first one is a warm-up
            began = time.monotonic()
            objective.backward(dataset.batch(step % dataset.steps_per_epoch))
            seconds = time.monotonic() - began
    setup.encoder.module.zero_grad()
    second_forward = 4 / 3 if recipe.chunk_size < recipe.batch_size else 1.0
    seconds *= recipe.batch_size / size / PartialState().num_processes * second_forward
    if setup.encoder.device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated()
    return seconds, psutil.Process().memory_info().rss


def fit(setup: Setup, stop: GracefulStop, *, resume: bool) -> Fitted:
    """Train until the last step, early stopping, the deadline or a signal; the model gets the best weights."""
    trainer = _build_trainer(setup, stop)
    checkpoint = last_checkpoint(setup.folder / CHECKPOINTS) if resume else None
    with stop.on_signals(), _thread_errors_logged():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    best_step = state.best_global_step or state.global_step
    is_early = state.global_step < setup.recipe.max_steps
    stopped = stop.reason or ("the validation recall sum had stopped rising" if is_early else "all steps done")
    setup.log(f"Training ended: {stopped}. Best weights: step {best_step}.")
    return Fitted(state.log_history, best_step, stopped)


def _build_trainer(setup: Setup, stop: GracefulStop) -> ContrastiveTrainer:
    recipe, towers = setup.recipe, setup.towers
    arguments = training_arguments(
        setup.folder,
        batch_size=recipe.batch_size,
        num_steps=recipe.max_steps,
        measure_every=recipe.measure_every,
        warmup_steps=round(recipe.warmup * recipe.max_steps),
        seed=recipe.seed,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        dataloader_num_workers=0 if setup.cache else recipe.workers,
        use_cpu=setup.encoder.device.type == "cpu",
    )
    setup.encoder.device = arguments.device
    rates = {"rate": recipe.learning_rate, "head_rate": recipe.head_learning_rate}
    return ContrastiveTrainer(
        towers,
        arguments,
        dataset=setup.dataset(batch_size=recipe.batch_size, num_steps=recipe.max_steps),
        objective=Objective(towers, setup.captions.positive_mask, loss=recipe.loss, chunk_size=recipe.chunk_size),
        validate=setup.validator.metrics,
        groups=weight_groups(setup.encoder.module, weight_decay=recipe.weight_decay, **rates),
        callbacks=[stop, EarlyStopping(recipe.patience), ConsoleLogger(setup.log)],
    )


@contextmanager
def _thread_errors_logged() -> Iterator[None]:
    """Log errors of threads in one line; TensorBoard's writer thread fails on a full disk before training does."""
    before = threading.excepthook
    threading.excepthook = lambda error: logger.warning("In the background: %s", error.exc_value)
    try:
        yield
    finally:
        threading.excepthook = before


@torch.no_grad()
def interpolate_weights(setup: Setup) -> Interpolated:
    """Measure mixtures of start and tuned weights, and keep the one with the best validation recall sum.

    Source: WiSE-FT, Wortsman et al. 2022.
    """
    start = setup.start_weights
    weights = {name: weight for name, weight in setup.encoder.module.named_parameters() if name in start}
    end = {name: weight.detach().cpu().clone() for name, weight in weights.items()}

    def mix(alpha: float) -> None:
        for name, weight in weights.items():
            if not torch.equal(start[name], end[name]):
                weight.copy_((1 - alpha) * start[name] + alpha * end[name])

    sums: dict[float, float] = {}
    points: list[dict[str, float | None]] = []
    for alpha in ALPHAS:
        mix(alpha)
        sums[alpha] = setup.validator.metrics()[METRIC]
        second = setup.second.metrics()[METRIC] if setup.second else None
        points.append({"alpha": alpha, "recall_sum": sums[alpha], "second_recall_sum": second})
    best = max(ALPHAS, key=lambda alpha: (sums[alpha], alpha))  # of equals the one that has learnt more
    mix(best)
    curve = ", ".join(f"{alpha:g}: {100 * sums[alpha]:.1f}" for alpha in ALPHAS)
    setup.log(f"Recall sum on validation from start (0) to tuned weights (1): {curve}. Kept: {best:g}.")
    if best == 0:
        setup.log("No tuned weights do better there than the start's, so the result is the start model.")
    return Interpolated(points, best)


def log_progress(log: Log, what: str) -> Callable[[int, int], None]:
    """Return a callback that logs progress and the time left every ten seconds."""
    began = logged = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal logged
        now = time.monotonic()
        if now - logged > 10:
            logged = now
            log(f"{what}: {done} of {total}, {format_duration((now - began) / done * (total - done))} left")

    return progress
