"""One fine-tuning from start to end: data, model, plan, training, choice of weights, result and report.

Place in the flow: `command -> run (here)`: `train` calls `Setup -> make_plan -> fit -> interpolate_weights`. A run that
was killed is called again with `resume` and ends with the weights that it would have had.
"""

import logging
import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from transformers import TrainerState, set_seed

from alignment.atomic import exclusive_lock, fsync_path
from alignment.checksum import write_json_checksummed
from alignment.data import Pair, describe_truncated
from alignment.evaluate import Difference, Embedded, Estimate, compare_retrieval, difference_table, evaluate_embedded
from alignment.model import find_device
from alignment.picture_limits import use_size_options
from alignment.signals import handle_signals
from alignment.train import run_dir
from alignment.train.config import TrainConfig
from alignment.train.dataset import CaptionIndex, ContrastiveDataset, Prepared, prepare
from alignment.train.feature_cache import CachedFeatures
from alignment.train.objective import Objective, gather
from alignment.train.presets import Towers, apply_preset, checkpoint_activations, merge_lora, snapshot, weight_groups
from alignment.train.record import RunRecord
from alignment.train.report import model_card, write_report
from alignment.train.settings import ALPHAS, TrainRecipe, complete, format_duration, plan_text
from alignment.train.start import load_start
from alignment.train.trainer import (
    METRIC,
    ConsoleLogger,
    ContrastiveTrainer,
    EarlyStopping,
    GracefulStop,
    Validator,
    training_arguments,
)

logger = logging.getLogger(__name__)

_PROBE_IMAGES = 32
_SHARE_OF_TIME = 0.85  # of --minutes goes into steps; the rest into the choice of weights and the report
_LOCK_TIMEOUT = 10.0  # seconds; worker processes outlive a killed run by some seconds and hold its lock
_COLLECTIVE_TIMEOUT = timedelta(hours=12)  # for processes that wait while one caches features; torchrun sees a crash

Log = Callable[[str], None]


def train(
    config: TrainConfig, *, resume: bool = False, log: Log = logger.info, command: Sequence[str] | None = None
) -> RunRecord:
    """Fine-tune a dual encoder on captioned images.

    Args:
        config: the options; what is None is chosen. Model, report and logs go to `config.output`.
        resume: go on with the run there.
        log: called with each line of progress.
        command: the arguments of the call, for the report; those of this process if left out.

    Raises:
        BlockingIOError, FileExistsError: when the output folder is written to, or not empty and `resume` is off.
        FileNotFoundError: when data or model are missing.
        ValueError: on unusable data or settings, or options that differ from those of the run to resume.
        FloatingPointError: when training diverges, naming the step and the cure.
    """
    folder = Path(config.output)
    device = config.device
    if device is None and resume and (folder / run_dir.SETTINGS).exists():
        device = run_dir.read_resume_state(folder).config.device
    processes = PartialState(cpu=find_device(device).type == "cpu", timeout=_COLLECTIVE_TIMEOUT)
    with ExitStack() as held:
        if processes.is_main_process:
            held.enter_context(exclusive_lock(folder, timeout=_LOCK_TIMEOUT if resume else 0))
            run_dir.acquire(folder, resume=resume)
        processes.wait_for_everyone()
        log = log if processes.is_main_process else lambda _: None
        return _train(config, processes, resume, log, sys.argv[1:] if command is None else command)


def _train(config: TrainConfig, processes: PartialState, resume: bool, log: Log, command: Sequence[str]) -> RunRecord:
    started, folder = time.monotonic(), Path(config.output)
    saved = run_dir.read_resume_state(folder).resume(config) if resume else None
    config = saved.config if saved else config
    stop = GracefulStop(None if config.minutes is None else started + 60 * config.minutes)
    use_size_options(config.max_megapixels, config.max_aspect_ratio)
    if processes.num_processes > 1 and processes.device.type == "cpu":
        config = replace(config, device="cpu")  # else Trainer looks for GPUs and runs the processes independently
    prepared = prepare(config, progress=log_progress(log, "checking pictures"))
    log(prepared.report)
    setup = Setup(config, prepared, folder, log, command=command, saved=saved)
    preprocessor = setup.encoder.preprocessor
    truncated = describe_truncated(preprocessor.truncated(setup.captions.texts), preprocessor.max_length)
    began = time.monotonic()
    before = setup.validator.embed()
    seconds = time.monotonic() - began
    second_before = setup.second.embed() if setup.second else None
    plan = make_plan(setup, seconds, deadline=None if saved else stop.deadline)
    if not saved and processes.is_main_process:
        write_json_checksummed(folder / run_dir.SETTINGS, asdict(setup.state))  # from now on there is a run to resume
    processes.wait_for_everyone()
    trained, stopped = fit(setup, stop, resume=resume)
    merge_lora(setup.encoder.module)
    points, alpha = interpolate_weights(setup) if setup.recipe.interpolate else ([], None)
    record = RunRecord(
        **_facts(setup),
        **_compared(setup, "", before, setup.validator.embed()),
        **_compared(setup, "second_", second_before, setup.second.embed() if setup.second else None),
        plan=plan,
        history=trained.log_history,
        best_step=trained.best_global_step,
        stopped=stopped,
        interpolation=points,
        alpha=alpha,
        seconds=time.monotonic() - started,
    )
    if processes.is_main_process:
        _write(setup, record)
    for line in [*prepared.summaries(), *truncated]:
        log(f"- {line}")
    processes.wait_for_everyone()
    return record


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
        saved: run_dir.ResumeState | None = None,
    ) -> None:
        """Load the start model, choose the settings, freeze weights, and cache the features of frozen layers.

        Raises ValueError on settings that do not fit the model, or when `saved` is of other data or start weights.
        """
        set_seed(config.seed or 0)
        self.prepared, self.folder, self.log = prepared, folder, log
        self.encoder = encoder = load_start(config, prepared.train)
        encoder.module.to(memory_format=torch.channels_last)  # convolutions run up to twice as fast
        recipe = complete(config, encoder, len(prepared.train), num_processes=PartialState().num_processes)
        if config.batch_size and recipe.batch_size < config.batch_size:
            log(f"--batch-size {config.batch_size} is more than there are: {recipe.batch_size} pictures a step.")
        started = datetime.now(UTC).isoformat(timespec="seconds")
        call = shlex.join(["python", "-m", "alignment.train", *command])
        self.state = run_dir.ResumeState(config, recipe, started, call, prepared.digest, encoder.fingerprint)
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
        options = {name: getattr(self.recipe, name) for name in ("captions_per_image", "augment", "seed")}
        self.dataset = partial(
            ContrastiveDataset, prepared.train, self.captions, encoder.preprocessor, cache=self.cache, **options
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
        place = Path(config.kept_folder or self.folder / run_dir.FEATURES)

        def fill(pairs: Sequence[Pair], what: str, *, augment: bool) -> CachedFeatures:
            cache = CachedFeatures(point, self.encoder, [pair.image for pair in pairs], place, augment=augment)
            cache.fill(progress=log_progress(self.log, f"{what} pictures: {point.name}"))
            return cache

        train = fill(self.prepared.train, "training", augment=augment)
        return train, fill(self.prepared.evaluation, "validation", augment=False)


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
    checkpoint = run_dir.last_checkpoint(setup.folder / run_dir.CHECKPOINTS) if resume else None

    def end_early(number: int, _: object) -> None:
        stop.request(f"stopped by {signal.Signals(number).name}")
        restore()  # a second signal ends the process at once

    with handle_signals(end_early, signal.SIGINT, signal.SIGTERM) as restore:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    is_early = state.global_step < recipe.max_steps
    stopped = stop.reason or ("the validation recall sum had stopped rising" if is_early else "all steps done")
    setup.log(f"Training ended: {stopped}. Best weights: step {state.best_global_step}.")
    return state, stopped


@torch.no_grad()
def interpolate_weights(setup: Setup) -> tuple[list[dict[str, Any]], float]:
    """Measure mixtures of start and tuned weights, and keep the one with the best validation recall sum.

    Returns `interpolation` and `alpha` of a `RunRecord`. Source: WiSE-FT, Wortsman et al. 2022.
    """
    start, end = setup.start_weights, snapshot(setup.encoder.module)

    def mix(alpha: float) -> None:
        for name, weight in setup.encoder.module.named_parameters():
            if not torch.equal(start[name], end[name]):
                weight.copy_((1 - alpha) * start[name] + alpha * end[name])

    points: list[dict[str, Any]] = []
    for alpha in ALPHAS:
        mix(alpha)
        second = setup.second.metrics()[METRIC] if setup.second else None
        points.append({"alpha": alpha, "recall_sum": setup.validator.metrics()[METRIC], "second_recall_sum": second})
    best = max(points, key=lambda point: (point["recall_sum"], point["alpha"]))["alpha"]  # of equals the more tuned one
    mix(best)
    curve = ", ".join(f"{point['alpha']:g}: {100 * point['recall_sum']:.1f}" for point in points)
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


def _facts(setup: Setup) -> dict[str, Any]:
    """Collect what is known about model, data and settings, by the names of `RunRecord`."""
    config, encoder = setup.state.config, setup.encoder
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {
        "command": setup.state.command,
        "started": setup.state.started,
        "versions": packages | {"python": platform.python_version()},
        "settings": asdict(config) | asdict(setup.recipe),
        "data": setup.prepared.report,
        "data_complete": setup.prepared.is_complete,
        "data_name": Path(config.data).name,
        "dataset_id": _hub_id(config.data),
        "second_data": config.second_data,
        "base_model": encoder.name,
        "base_model_id": _hub_id(config.model),
        "base_fingerprint": setup.state.base_fingerprint,
        "fingerprint": encoder.fingerprint,
        "model_type": encoder.module.config.model_type,
    }


def _compared(setup: Setup, prefix: str, before: Embedded | None, after: Embedded | None) -> dict[str, Any]:
    """Compute the metrics before and after and their difference, by the names of `RunRecord`."""
    if before is None or after is None:
        return {}
    difference = compare_retrieval(before, after).metrics
    if not prefix:
        setup.log(f"Validation, before (A) and after (B):\n{difference_table(difference)}")
    measured: list[Mapping[str, Estimate | Difference]]
    measured = [evaluate_embedded(before).metrics, evaluate_embedded(after).metrics, difference]
    return {
        prefix + what: {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in metrics.items()}
        for what, metrics in zip(("before", "after", "difference"), measured, strict=True)
    }


def _hub_id(name: str | None) -> str | None:
    """Return a name that looks like OWNER/NAME and is no path on this machine."""
    return name if name and name.count("/") == 1 and not Path(name).exists() else None


def _write(setup: Setup, record: RunRecord) -> None:
    """Write model, report and model card, then delete what only training needs."""
    folder = setup.folder
    with run_dir.wrap_write_errors(folder):
        setup.encoder.save(folder)
    write_report(record, folder)
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")
    for path in filter(Path.is_file, folder.iterdir()):
        fsync_path(path)
    record.to_json(folder / run_dir.RECORD)  # from now on the run counts as finished
    run_dir.clear_away(folder)
