"""The phases of a run: `run` calls `Setup -> make_plan -> fit -> interpolate_weights`."""

import logging
import math
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from transformers import TrainerState, set_seed

from alignment.data import Pair
from alignment.model import DualEncoder
from alignment.train.callbacks import METRIC, ConsoleLogger, EarlyStopping, GracefulStop
from alignment.train.config import TrainConfig
from alignment.train.dataset import CaptionIndex, ContrastiveDataset
from alignment.train.feature_cache import CachedFeatures
from alignment.train.objective import Objective, gather
from alignment.train.prepare import Prepared
from alignment.train.presets import Towers, apply_preset, checkpoint_activations, snapshot, weight_groups
from alignment.train.run_dir import CHECKPOINTS, FEATURES, ResumeState, last_checkpoint
from alignment.train.scratch import build_scratch
from alignment.train.settings import ALPHAS, TrainRecipe, complete, format_duration, plan_text
from alignment.train.trainer import ContrastiveTrainer, Validator, training_arguments

logger = logging.getLogger(__name__)

_PROBE_IMAGES = 32
_SHARE_OF_TIME = 0.85  # of --minutes goes into steps; the rest into the choice of weights and the report

Log = Callable[[str], None]


class Setup:
    """A model ready to train, with its data, settings (`state`) and a copy of the start weights on the CPU.

    `cache` holds features of the training images, if any; `second` measures the second data set, if there is one.
    """

    def __init__(
        self,
        config: TrainConfig,
        prepared: Prepared,
        folder: Path,
        log: Log,
        *,
        command: Sequence[str] = (),
        saved: ResumeState | None = None,
    ) -> None:
        """Load the start model, choose the settings, freeze weights, and cache the features of frozen layers.

        Raises ValueError on settings that do not fit the model, or when `saved` is of other data or start weights.
        """
        set_seed(config.seed or 0)
        self.prepared, self.folder, self.log = prepared, folder, log
        self.encoder = encoder = _load_start(config, prepared)
        encoder.module.to(memory_format=torch.channels_last)  # convolutions run up to twice as fast
        recipe = complete(config, encoder, len(prepared.train), num_processes=PartialState().num_processes)
        if config.batch_size and recipe.batch_size < config.batch_size:
            log(f"--batch-size {config.batch_size} is more than there are: {recipe.batch_size} pictures a step.")
        started = datetime.now(UTC).isoformat(timespec="seconds")
        call = shlex.join(["python", "-m", "alignment.train", *command])
        self.state = ResumeState(config, recipe, started, call, prepared.digest, encoder.fingerprint)
        if saved is not None:
            saved.check(self.state)
            self.state = replace(saved, config=config)
        self.start_weights = snapshot(encoder.module)
        if self.recipe.gradient_checkpointing:
            checkpoint_activations(encoder)
        apply_preset(encoder, self.recipe.preset)
        self.towers, self.captions = Towers(encoder), CaptionIndex(prepared.train, prepared.near_duplicates)
        with PartialState().main_process_first():
            self.cache, eval_cache = self._cache_features()
        self.dataset = partial(
            ContrastiveDataset,
            prepared.train,
            self.captions,
            encoder.preprocessor,
            captions_per_image=self.recipe.captions_per_image,
            augment=self.recipe.augment,
            seed=self.recipe.seed,
            cache=self.cache,
        )
        self.validator = Validator(encoder, prepared.evaluation, eval_cache)
        self.second = Validator(encoder, prepared.second) if prepared.second else None

    @property
    def recipe(self) -> TrainRecipe:
        """The options with every choice made."""
        return self.state.recipe

    def _cache_features(self) -> tuple[CachedFeatures | None, CachedFeatures | None]:
        """Cache the frozen layers' features of training and validation images; None where no layer is frozen."""
        config, augment = self.state.config, self.recipe.augment
        point = self.towers.cache_features(augment=augment) if self.recipe.keep_images else None
        if point is None:
            if config.keep_images or config.kept_folder:
                why = "with this preset no part of the image side is frozen"
                self.log(f"--keep-images and --kept-folder have no effect: {why}.")
            return None, None
        place = Path(config.kept_folder or self.folder / FEATURES)

        def fill(pairs: Sequence[Pair], what: str, *, augment: bool) -> CachedFeatures:
            cache = CachedFeatures(point, self.encoder, [pair.image for pair in pairs], place, augment=augment)
            cache.fill(progress=log_progress(self.log, f"{what} pictures: {point.name}"))
            return cache

        train = fill(self.prepared.train, "training", augment=augment)
        return train, fill(self.prepared.evaluation, "validation", augment=False)


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


def make_plan(setup: Setup, validation_seconds: float, *, deadline: float | None) -> dict[str, Any]:
    """Time one step, fit the run into the time until the deadline (`time.monotonic`), and log the plan."""
    seconds, memory = _probe(setup)
    recipe = setup.recipe
    own = torch.tensor([seconds + validation_seconds / recipe.measure_every], device=setup.encoder.device)
    per_step = float(gather(own).max())  # of the slowest process: all must plan the same
    if deadline is not None:
        steps = max(1, min(recipe.max_steps, int(_SHARE_OF_TIME * (deadline - time.monotonic()) / per_step)))
        every = min(recipe.measure_every, math.ceil(steps / 6))  # a short run is validated several times, too
        recipe = replace(recipe, max_steps=steps, measure_every=every)
        setup.state = replace(setup.state, recipe=recipe)
    images = len(setup.prepared.train)
    sizes = {weight: weight.numel() for weight in setup.encoder.module.parameters()}
    plan = {
        "train_images": images,
        "train_captions": len(setup.captions.texts),
        "eval_images": len(setup.validator.images),
        "eval_captions": len(setup.validator.texts),
        "steps": recipe.max_steps,
        "epochs": round(recipe.max_steps / max(1, images // recipe.batch_size), 2),
        "batch_size": recipe.batch_size,
        "chunk_size": recipe.chunk_size,
        "processes": PartialState().num_processes,
        "trainable_parameters": sum(size for weight, size in sizes.items() if weight.requires_grad),
        "total_parameters": sum(sizes.values()),
        "device": str(setup.encoder.device),
        "precision": recipe.precision,
        "estimated_seconds": per_step * recipe.max_steps,
        "peak_memory_bytes": memory,
    }
    setup.log(plan_text(plan, recipe, setup.encoder.name, setup.prepared.evaluation_name))
    return plan


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


def fit(setup: Setup, stop: GracefulStop, *, resume: bool) -> tuple[TrainerState, str]:
    """Train, and give the model the best weights; returns Trainer's state, and why training ended."""
    recipe, towers = setup.recipe, setup.towers
    workers, use_cpu = 0 if setup.cache else recipe.workers, setup.encoder.device.type == "cpu"
    arguments = training_arguments(setup.folder, recipe, workers=workers, use_cpu=use_cpu)
    setup.encoder.device = arguments.device
    trainer = ContrastiveTrainer(
        towers,
        arguments,
        dataset=setup.dataset(batch_size=recipe.batch_size, num_steps=recipe.max_steps),
        objective=Objective(towers, setup.captions.positive_mask, loss=recipe.loss, chunk_size=recipe.chunk_size),
        validate=setup.validator.metrics,
        groups=weight_groups(setup.encoder.module, recipe),
        callbacks=[stop, EarlyStopping(recipe.patience), ConsoleLogger(setup.log)],
    )
    checkpoint = last_checkpoint(setup.folder / CHECKPOINTS) if resume else None
    with stop.on_signals(), _thread_errors_logged():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    is_early = state.global_step < recipe.max_steps
    stopped = stop.reason or ("the validation recall sum had stopped rising" if is_early else "all steps done")
    setup.log(f"Training ended: {stopped}. Best weights: step {state.best_global_step}.")
    return state, stopped


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
def interpolate_weights(setup: Setup) -> tuple[list[dict[str, Any]], float]:
    """Measure mixtures of start and tuned weights, and keep the one with the best validation recall sum.

    Returns `interpolation` and `alpha` of a `RunRecord`. Source: WiSE-FT, Wortsman et al. 2022.
    """
    start = setup.start_weights
    weights = dict(setup.encoder.module.named_parameters())
    end = snapshot(setup.encoder.module)

    def mix(alpha: float) -> None:
        for name, weight in weights.items():
            if not torch.equal(start[name], end[name]):
                weight.copy_((1 - alpha) * start[name] + alpha * end[name])

    sums: dict[float, float] = {}
    points = []
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
    return points, best


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
