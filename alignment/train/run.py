"""One fine-tuning from start to end: data, model, plan, training, choice of weights, result and report.

Place in the flow: `command -> run (here)`, which calls the functions of `phases` in order. A run that was killed is
called again with `resume` and ends with the weights that it would have had.
"""

import logging
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from alignment.atomic import exclusive_lock, fsync_path, write_json_checksummed
from alignment.data import describe_truncated
from alignment.evaluate import Difference, Embedded, Estimate, compare_retrieval, difference_table, evaluate_embedded
from alignment.model import find_device
from alignment.picture_limits import use_size_options
from alignment.train.callbacks import GracefulStop
from alignment.train.config import TrainConfig
from alignment.train.phases import Log, Setup, fit, interpolate_weights, log_progress, make_plan
from alignment.train.prepare import prepare
from alignment.train.presets import merge_lora
from alignment.train.record import RunRecord
from alignment.train.report import model_card, write_report
from alignment.train.run_dir import RECORD, SETTINGS, acquire, clear_away, read_resume_state, wrap_write_errors

logger = logging.getLogger(__name__)

_LOCK_TIMEOUT = 10.0  # seconds; worker processes outlive a killed run by some seconds and hold its lock
_COLLECTIVE_TIMEOUT = timedelta(hours=12)  # for processes that wait while one caches features; torchrun sees a crash


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
    if device is None and resume and (folder / SETTINGS).exists():
        device = read_resume_state(folder).config.device
    processes = PartialState(cpu=find_device(device).type == "cpu", timeout=_COLLECTIVE_TIMEOUT)
    with ExitStack() as held:
        if processes.is_main_process:
            held.enter_context(exclusive_lock(folder, timeout=_LOCK_TIMEOUT if resume else 0))
            acquire(folder, resume=resume)
        processes.wait_for_everyone()
        log = log if processes.is_main_process else lambda _: None
        return _train(config, processes, resume, log, sys.argv[1:] if command is None else command)


def _train(config: TrainConfig, processes: PartialState, resume: bool, log: Log, command: Sequence[str]) -> RunRecord:
    started, folder = time.monotonic(), Path(config.output)
    saved = read_resume_state(folder).resume(config) if resume else None
    config = saved.config if saved else config
    stop = GracefulStop(None if config.minutes is None else started + 60 * config.minutes)
    use_size_options(config.max_megapixels, config.max_aspect_ratio)
    if processes.num_processes > 1 and processes.device.type == "cpu":
        config = replace(config, device="cpu")  # else Trainer looks for GPUs and runs the processes independently
    prepared = prepare(config, progress=log_progress(log, "checking pictures"))
    log(prepared.report)
    setup = Setup(config, prepared, folder, log, command=command, saved=saved)
    preprocessor = setup.encoder.preprocessor
    captions = (caption for pair in prepared.train for caption in pair.captions)
    truncated = describe_truncated(preprocessor.truncated(captions), preprocessor.max_length)
    began = time.monotonic()
    before = setup.validator.embed()
    seconds = time.monotonic() - began
    second_before = setup.second.embed() if setup.second else None
    plan = make_plan(setup, seconds, deadline=None if saved else stop.deadline)
    if not saved and processes.is_main_process:
        write_json_checksummed(folder / SETTINGS, asdict(setup.state))  # from now on there is a run to resume
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
    found: dict[str, Mapping[str, Estimate | Difference]] = {
        "before": evaluate_embedded(before).metrics,
        "after": evaluate_embedded(after).metrics,
        "difference": difference,
    }
    return {
        prefix + what: {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in metrics.items()}
        for what, metrics in found.items()
    }


def _hub_id(name: str | None) -> str | None:
    """Return a name that looks like OWNER/NAME and is no path on this machine."""
    return name if name and name.count("/") == 1 and not Path(name).exists() else None


def _write(setup: Setup, record: RunRecord) -> None:
    """Write model, report and model card, then delete what only training needs."""
    folder = setup.folder
    with wrap_write_errors(folder):
        setup.encoder.save(folder)
    write_report(record, folder)
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")
    for path in filter(Path.is_file, folder.iterdir()):
        fsync_path(path)
    record.to_json(folder / RECORD)  # from now on the run counts as finished
    clear_away(folder)
