"""One fine-tuning from start to end: data, model, plan, training, choice of weights, result and report.

Place in the flow: `command -> run (here)`, which strings `prepare`, `presets`, `trainer` and `report` together. A run
that was killed is called again with `resume` and ends with the weights it would have had.
"""

from __future__ import annotations

import logging
import math
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import set_seed

from alignment.durable import foreign_errors, sole_writer, sync
from alignment.evaluate import Difference, Estimate, compare_retrieval, difference_table, evaluate_embedded
from alignment.model import DualEncoder, find_device
from alignment.pairs import told_cut
from alignment.picture_limits import use_size_options
from alignment.train.dataset import Captions, ContrastiveDataset
from alignment.train.feature_cache import CachedFeatures, FreezePoint
from alignment.train.objective import Objective, gather
from alignment.train.plan import Plan, plan_text
from alignment.train.prepare import Prepared, prepare
from alignment.train.presets import Towers, apply_preset, checkpoint_activations, merge_lora, snapshot, weight_groups
from alignment.train.record import Interval, RunRecord
from alignment.train.report import model_card, write_report
from alignment.train.run_dir import RECORD, SETTINGS, ResumeState, acquire, clear_away, read_resume_state
from alignment.train.scratch import build_scratch
from alignment.train.settings import ALPHAS, TrainConfig, complete
from alignment.train.trainer import (
    METRIC,
    ConsoleLogger,
    ContrastiveTrainer,
    EarlyStopping,
    GracefulStop,
    duration,
    last_checkpoint,
    stop_on_signals,
    training_arguments,
)
from alignment.train.validator import Validator

logger = logging.getLogger(__name__)

_PROBE_IMAGES = 32
_OUTLIVED = 10.0  # seconds
_LONGEST = timedelta(hours=12)  # that processes wait for one which keeps the pictures of all; torchrun sees who dies
_SHARE_OF_TIME = 0.85  # of the minutes given goes into steps; the rest into the choice of weights and the report

Log = Callable[[str], None]


def train(
    config: TrainConfig, *, resume: bool = False, log: Log = logger.info, command: Sequence[str] | None = None
) -> RunRecord:
    """Fine-tune a dual encoder on captioned images.

    Args:
        config: what to do; what is None is chosen.
        resume: go on with the run whose folder `config.output` is.
        log: takes each line that a person should see.
        command: the arguments it was called with, for the report; those of this process if left out.

    Returns:
        The record of the run; model, report and logs are in `config.output`.

    Raises:
        BlockingIOError: when another run is writing to the output folder.
        FileExistsError: when the output folder holds something and `resume` is off.
        FileNotFoundError: when data or model are missing.
        ValueError: on data or settings that do not work, or that a run to go on with did not begin with.
        FloatingPointError: when the loss is no longer a number, naming the step and the cure.
    """
    folder = Path(config.output)
    state = PartialState(cpu=_on_cpu(config, folder, resume), timeout=_LONGEST)
    with ExitStack() as held:
        if state.is_main_process:
            # Processes that read pictures outlive a killed run by some seconds, and hold its lock as long.
            held.enter_context(sole_writer(folder, patience=_OUTLIVED if resume else 0))
            acquire(folder, resume=resume)
        state.wait_for_everyone()
        return _train(config, state, folder, resume, log, command)


def _on_cpu(config: TrainConfig, folder: Path, resume: bool) -> bool:
    """Whether a run does without an accelerator: it is told so, was when it began, or there is none.

    Raises:
        ValueError: when the device it is told is not there.
    """
    device = config.device
    if device is None and resume and (folder / SETTINGS).exists():
        device = read_resume_state(folder).config.device
    return find_device(device).type == "cpu"


def _train(
    config: TrainConfig,
    state: PartialState,
    folder: Path,
    resume: bool,
    log: Log,
    command: Sequence[str] | None,
) -> RunRecord:
    started = time.monotonic()
    saved = read_resume_state(folder) if resume else None
    if saved:
        saved.check_options(config)
        config = saved.resume_config(config)
    use_size_options(config.max_megapixels, config.max_aspect_ratio)
    if state.num_processes > 1 and state.device.type == "cpu":
        config = replace(config, device="cpu")  # else Trainer looks for GPUs, finds none and lets each train alone
    log = log if state.is_main_process else _nothing
    prepared = prepare(config, progress=_progress(log, "checking pictures"))
    log(prepared.report.summary())
    run = Run(config, prepared, folder, saved, log, sys.argv[1:] if command is None else command)
    if config.minutes is not None:
        run.stop.deadline = started + 60 * config.minutes
    with state.main_process_first():
        run.cache_features()
    captions = (caption for pair in prepared.train for caption in pair.captions)
    cut = told_cut(run.encoder.preprocessor.cut(captions), run.encoder.preprocessor.max_length)
    run.measure_start()
    run.plan()
    run.fit(resume)
    run.interpolate_weights()
    record = run.record(started)
    if state.is_main_process:
        run.write(record)
    for line in [*prepared.told(), *cut]:
        log(f"- {line}")
    state.wait_for_everyone()
    return record


class Run:
    """The parts of one fine-tuning, and its steps in order."""

    def __init__(
        self,
        config: TrainConfig,
        prepared: Prepared,
        folder: Path,
        saved: ResumeState | None,
        log: Log,
        command: Sequence[str] = (),
    ) -> None:
        self.prepared, self.folder, self.log, self.saved = prepared, folder, log, saved
        set_seed(config.seed or 0)
        self.encoder = _start(config, prepared)
        self.encoder.module.to(memory_format=torch.channels_last)  # convolutions run up to twice as fast
        self.base_fingerprint = self.encoder.fingerprint
        self.config = config
        self.recipe = complete(config, self.encoder, len(prepared.train), num_processes=PartialState().num_processes)
        if config.batch_size and self.recipe.batch_size < config.batch_size:
            log(f"--batch-size {config.batch_size} is more than there are: {self.recipe.batch_size} pictures a step.")
        self.command = shlex.join(["python", "-m", "alignment.train", *command])
        self.since = datetime.now(UTC).isoformat(timespec="seconds")
        if saved is not None:
            saved.check(prepared, self.base_fingerprint)
            self.recipe, self.since, self.command = saved.recipe, saved.started, saved.command
        self.start = snapshot(self.encoder.module)
        if self.recipe.gradient_checkpointing:
            checkpoint_activations(self.encoder)
        apply_preset(self.encoder, self.recipe.preset)
        self.towers = Towers(self.encoder)
        self.captions = Captions(prepared.train, prepared.look_alikes)
        self.kept: dict[str, CachedFeatures] = {}
        self.stop = GracefulStop()
        self.interpolation: list[dict[str, float | None]] = []
        self.alpha: float | None = None

    # ------------------------------------------------------------ before training

    def cache_features(self) -> None:
        """Compute what is frozen of the image side, once for every picture."""
        cut = self.towers.cache_features(augment=self.recipe.augment) if self.recipe.keep_images else None
        if cut is None and (self.config.keep_images or self.config.kept_folder):
            self.log(
                "--keep-images and --kept-folder have no effect: with this preset no part of the image side is frozen."
            )
        if cut is not None:
            self.kept["train"] = self._keep(cut, self.prepared.train, augment=self.recipe.augment, what="training")
            self.kept["eval"] = self._keep(cut, self.prepared.evaluation, augment=False, what="validation")
        second = self.prepared.second
        self.measure = Validator(self.encoder, self.prepared.evaluation, self.kept.get("eval"))
        self.second = Validator(self.encoder, second, None) if second else None

    def _keep(self, cut: FreezePoint, pairs: Sequence[Any], *, augment: bool, what: str) -> CachedFeatures:
        folder = Path(self.config.kept_folder or self.folder / "kept")
        kept = CachedFeatures(cut, self.encoder, [pair.image for pair in pairs], folder, augment=augment)
        kept.fill(progress=_progress(self.log, f"{what} pictures: {cut.name}"))
        return kept

    def measure_start(self) -> None:
        """Measure the start weights; how long that takes tells how often it is worth it."""
        began = time.monotonic()
        self.before = self.measure.embedded()
        self.measuring = time.monotonic() - began
        self.second_before = self.second.embedded() if self.second else None

    def plan(self) -> None:
        """Try a step, see how long the run will be, fit it into the minutes given, and say all that."""
        seconds, memory = self._probe()
        recipe = self.recipe
        own = torch.tensor([seconds + self.measuring / recipe.measure_every], device=self.encoder.device)
        each = float(gather(own).max())  # the slowest process's: all must plan the same
        if self.stop.deadline is not None and self.saved is None:
            left = self.stop.deadline - time.monotonic()
            steps = max(1, min(recipe.max_steps, int(_SHARE_OF_TIME * left / each)))
            every = min(recipe.measure_every, math.ceil(steps / 6))  # a short run has a best moment, too
            recipe = self.recipe = replace(recipe, max_steps=steps, measure_every=every)
        parameters = list(self.encoder.module.parameters())
        self.planned = Plan(
            train_images=len(self.prepared.train),
            train_captions=len(self.captions.texts),
            eval_images=len(self.prepared.evaluation),
            eval_captions=len(self.before.texts),
            steps=recipe.max_steps,
            epochs=round(recipe.max_steps / max(1, len(self.prepared.train) // recipe.batch_size), 2),
            batch_size=recipe.batch_size,
            chunk_size=recipe.chunk_size,
            processes=PartialState().num_processes,
            trainable_parameters=sum(weight.numel() for weight in parameters if weight.requires_grad),
            total_parameters=sum(weight.numel() for weight in parameters),
            device=str(self.encoder.device),
            precision=recipe.precision,
            estimated_seconds=each * recipe.max_steps,
            peak_memory_bytes=memory,
        )
        self.log(plan_text(self.planned, self.recipe, self.encoder.name, self.prepared.evaluation_name))

    def _probe(self) -> tuple[float, int]:
        """Time one step and take the memory it needs; weights and random numbers are as before."""
        few = min(_PROBE_IMAGES, self.recipe.chunk_size)
        examples = self._examples(batch_size=few, steps=2)
        objective = Objective(self.towers, self.captions.positive_mask, loss=self.recipe.loss)
        self.towers.train()
        with torch.random.fork_rng():
            for step in range(2):  # the first one warms up
                began = time.monotonic()
                objective.backward(examples.batch(step % examples.steps_per_epoch))
                seconds = time.monotonic() - began
        self.encoder.module.zero_grad()
        twice = 4 / 3 if self.recipe.chunk_size < self.recipe.batch_size else 1.0
        scaled = seconds / few * self.recipe.batch_size / PartialState().num_processes * twice
        if self.encoder.device.type == "cuda":
            return scaled, torch.cuda.max_memory_allocated()
        return scaled, psutil.Process().memory_info().rss

    # ------------------------------------------------------------ training

    def fit(self, resume: bool) -> None:
        """Train to the end, to the best or to the deadline, and come back with the best weights."""
        if self.saved is None:
            self._note_settings()  # before anything else is written: from here on there is a run to go on with
        trainer = self._trainer()
        checkpoint = last_checkpoint(Path(trainer.args.output_dir)) if resume else None
        with stop_on_signals(self.stop), _threads_log_errors():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.history = trainer.state.log_history
        self.best_step = trainer.state.best_global_step or trainer.state.global_step
        early = trainer.state.global_step < self.recipe.max_steps
        self.stopped = self.stop.reason or (
            "the validation recall sum had stopped rising" if early else "all steps done"
        )
        self.log(f"Training ended: {self.stopped}. Best weights: step {self.best_step}.")

    def _trainer(self) -> ContrastiveTrainer:
        recipe = self.recipe
        arguments = training_arguments(
            self.folder,
            batch_size=recipe.batch_size,
            num_steps=recipe.max_steps,
            measure_every=recipe.measure_every,
            warmup_steps=round(recipe.warmup * recipe.max_steps),
            seed=recipe.seed,
            bf16=recipe.precision == "bf16",
            fp16=recipe.precision == "fp16",
            dataloader_num_workers=0 if "train" in self.kept else recipe.workers,
            use_cpu=self.encoder.device.type == "cpu",
        )
        self.encoder.device = arguments.device
        return ContrastiveTrainer(
            self.towers,
            arguments,
            examples=self._examples(batch_size=recipe.batch_size, steps=recipe.max_steps),
            objective=Objective(
                self.towers, self.captions.positive_mask, loss=recipe.loss, chunk_size=recipe.chunk_size
            ),
            measure=self.measure.figures,
            groups=weight_groups(
                self.encoder.module,
                rate=recipe.learning_rate,
                head_rate=recipe.head_learning_rate,
                weight_decay=recipe.weight_decay,
            ),
            callbacks=[self.stop, EarlyStopping(recipe.patience), ConsoleLogger(self.log)],
        )

    def _examples(self, *, batch_size: int, steps: int) -> ContrastiveDataset:
        return ContrastiveDataset(
            self.prepared.train,
            self.captions,
            self.encoder.preprocessor,
            batch_size=batch_size,
            num_steps=steps,
            captions_per_image=self.recipe.captions_per_image,
            augment=self.recipe.augment,
            seed=self.recipe.seed,
            kept=self.kept.get("train"),
        )

    def _note_settings(self) -> None:
        if PartialState().is_main_process:
            ResumeState(
                self.config, self.recipe, self.since, self.command, self.prepared.digest, self.base_fingerprint
            ).write(self.folder)
        PartialState().wait_for_everyone()

    # ------------------------------------------------------------ after training

    def interpolate_weights(self) -> None:
        """Go from the start weights to the tuned ones and stay where validation is best.

        Source: WiSE-FT, Wortsman et al. 2022.
        """
        merge_lora(self.encoder.module)
        if not self.recipe.interpolate:
            return
        weights = {name: weight for name, weight in self.encoder.module.named_parameters() if name in self.start}
        end = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        sums = {}
        for alpha in ALPHAS:
            self._mix(weights, end, alpha)
            sums[alpha] = self.measure.figures()[METRIC]
            second = self.second.figures()[METRIC] if self.second else None
            self.interpolation.append({"alpha": alpha, "recall_sum": sums[alpha], "second_recall_sum": second})
        # Of equals the one that has learnt more.
        alpha = max(ALPHAS, key=lambda alpha: (sums[alpha], alpha))
        self._mix(weights, end, alpha)
        self.alpha = alpha
        curve = ", ".join(f"{alpha:g}: {100 * sums[alpha]:.1f}" for alpha in ALPHAS)
        self.log(f"Recall sum on validation from start (0) to tuned weights (1): {curve}. Kept: {self.alpha:g}.")
        if alpha == 0:
            self.log("No tuned weights do better there than the start's, so the result is the start model.")

    @torch.no_grad()
    def _mix(self, weights: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> None:
        for name, weight in weights.items():
            if not torch.equal(self.start[name], end[name]):
                weight.copy_((1 - alpha) * self.start[name] + alpha * end[name])

    def record(self, started: float) -> RunRecord:
        """Measure the result and put everything down that is known about the run."""
        after = self.measure.embedded()
        second = self.second.embedded() if self.second else None
        gained = compare_retrieval(self.before, after).metrics
        self.log(f"Validation, before (A) and after (B):\n{difference_table(gained)}")
        return RunRecord(
            command=self.command,
            started=self.since,
            seconds=time.monotonic() - started,
            versions={name: version(name) for name in ("torch", "transformers", "accelerate")}
            | {"python": platform.python_version()},
            settings=self.config.as_dict() | asdict(self.recipe),
            plan=asdict(self.planned),
            data=self.prepared.report.summary(),
            data_complete=self.prepared.is_complete,
            base_model=self.encoder.name,
            base_fingerprint=self.base_fingerprint,
            fingerprint=self.encoder.fingerprint,
            history=self.history,
            before=_intervals(evaluate_embedded(self.before).metrics),
            after=_intervals(evaluate_embedded(after).metrics),
            difference=_intervals(gained),
            stopped=self.stopped,
            best_step=self.best_step,
            second_data=self.config.second_data,
            second_before=_intervals(evaluate_embedded(self.second_before).metrics) if self.second_before else None,
            second_after=_intervals(evaluate_embedded(second).metrics) if second else None,
            second_difference=_intervals(compare_retrieval(self.second_before, second).metrics)
            if self.second_before and second
            else None,
            interpolation=self.interpolation,
            alpha=self.alpha,
            model_type=self.encoder.module.config.model_type,
            data_name=Path(self.config.data).name,
            base_model_id=_hub_id(self.config.model),
            dataset_id=_hub_id(self.config.data),
        )

    def write(self, record: RunRecord) -> None:
        """Write model, report and model card, and clear away what only training needed."""
        with foreign_errors(self.folder):
            self.encoder.save(self.folder)
        write_report(record, self.folder)
        (self.folder / "README.md").write_text(model_card(record), encoding="utf-8")
        for path in self.folder.iterdir():
            if path.is_file():
                sync(path)
        record.to_json(self.folder / RECORD)  # from now on the run counts as finished
        clear_away(self.folder)


def _start(config: TrainConfig, prepared: Prepared) -> DualEncoder:
    """Load, join or build the model to begin with."""
    # PyTorch runs the untrained model too: it is compared with the trained one.
    if config.scratch:
        captions = [caption for pair in prepared.train for caption in pair.captions]
        return build_scratch(captions, config.scratch, device=config.device)
    if config.vision and config.text:
        return DualEncoder.compose(config.vision, config.text, device=config.device)
    if config.model:
        return DualEncoder.load(config.model, device=config.device, runtime="torch")
    raise ValueError("Name a model to begin with (--model), two towers to join (--vision, --text), or --scratch.")


# ---------------------------------------------------------------- small things


def _intervals(metrics: Mapping[str, Estimate | Difference]) -> dict[str, Interval]:
    return {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in metrics.items()}


def _hub_id(name: str | None) -> str | None:
    """Return a name that is no path on this machine and looks like OWNER/NAME."""
    return name if name and name.count("/") == 1 and not Path(name).exists() else None


def _progress(log: Log, what: str) -> Callable[[int, int], None]:
    """Log every ten seconds how far a slow thing is."""
    began = told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > 10:
            told = now
            log(f"{what}: {done} of {total}, {duration((now - began) / done * (total - done))} left")

    return progress


@contextmanager
def _threads_log_errors() -> Iterator[None]:
    """Keep threads from printing tracebacks; the one that writes TensorBoard's log fails beside us on a full disk."""
    before = threading.excepthook
    threading.excepthook = lambda told: logger.warning("In the background: %s", told.exc_value)
    try:
        yield
    finally:
        threading.excepthook = before


def _nothing(_: str) -> None:
    """Log nothing: another process does."""
