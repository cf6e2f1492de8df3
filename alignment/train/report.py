"""What a fine-tuning leaves to look at: one page for a colleague, the curves, and the model card for the Hub.

Place in the flow: `train -> record -> report (here) -> publish`. Everything is written from the `RunRecord` alone, so
a report can be made again from `run.json`:

    write_report(RunRecord.from_json(folder / "run.json"), folder)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from alignment.train.markdown import Change, block, changes, changes_table, code, one_line, plain, reading, table
from alignment.train.plots import write_plots
from alignment.train.record import REPOSITORY, RunRecord

# What transformers itself runs as zero-shot image classification; the others need this package.
_ZERO_SHOT = {"clip", "siglip", "siglip2", "chinese_clip"}

_PLOTS = {
    "loss.png": "Training loss by step",
    "recall.png": "Validation recall by step, both directions",
    "scale.png": "Learned scale by step",
    "interpolation.png": "Recall sum of weights between start and end",
}
_INTERVALS = "Per cent; in brackets 95 % bootstrap intervals over pictures. The median rank is counted from 1."
_PAIRED = "A figure is better or worse where the interval of the difference leaves zero out."
_UNPAIRED = (
    "A figure is better or worse where its interval after leaves the value before out: a rough reading, for the "
    "difference has no interval of its own here."
)
_CHOSEN_ON = (
    "The weights that were kept were chosen on the validation data, so expect a little less on pictures that had no "
    "say. The intervals cover the choice of pictures, not the chance of another seed."
)


def write_report(record: RunRecord, folder: str | os.PathLike[str]) -> Path:
    """Write `report.md` and its `plots/` into the result folder.

    Args:
        record: the run.
        folder: created if need be; an earlier report in it is replaced.

    Returns:
        The path of the report.
    """
    folder = Path(folder)
    plots = write_plots(record, folder / "plots")
    path = folder / "report.md"
    path.write_text("\n\n".join(_report(record, plots)) + "\n", encoding="utf-8")
    return path


def model_card(record: RunRecord) -> str:
    """Write the README.md of the result folder: what the Hub shows, and reads at its top.

    Args:
        record: the run. Of paths, only the names of folders are shown.
    """
    front = _metadata(record).to_yaml(line_break="\n").strip()
    return f"---\n{front}\n---\n" + "\n\n".join(_card(record)) + "\n"


# ---------------------------------------------------------------- the report


def _report(record: RunRecord, plots: list[str]) -> Iterator[str]:
    yield f"# Fine-tuning of {code(record.name)}"
    yield _what(record)
    yield "## What it brought"
    yield from _measured(record)
    if record.interpolation:
        yield "## Between start and tuned weights"
        yield from _mixed(record)
    if plots:
        yield "## Curves"
        yield "\n\n".join(f"![{_PLOTS[name]}](plots/{name})" for name in plots)
    yield "## Do it again"
    yield from _again(record)
    yield "## Training data as checked"
    yield block(record.data, "text")


def _what(record: RunRecord) -> str:
    """Say what was trained on what, for how long and why it ended."""
    plan = record.plan
    best = f"The best step was {record.best_step:,}{_if(plan, 'steps', lambda steps: f' of {_number(steps)} planned')}"
    kept = "its weights were kept"
    if record.alpha is not None and record.alpha < 1:
        kept = f"its weights were mixed with those at the start (alpha {record.alpha:g})"
    sentences = [
        f"{code(record.base_model)} was fine-tuned on {_count(plan, 'train')} from {code(record.data_name)}.",
        f"It started {code(record.started)} and took {_duration(record.seconds)}"
        f"{_if(plan, 'estimated_seconds', lambda seconds: f' ({_duration(seconds)} were estimated)')}.",
        f"Why it ended: {_sentence(record.stopped)}",
        f"{best}; {kept}.",
    ]
    return " ".join(sentences)


def _measured(record: RunRecord) -> Iterator[str]:
    """Set before and after side by side, on the validation data and on the second data set."""
    rule = _PAIRED if record.difference else _UNPAIRED
    yield f"Validation data: {_count(record.plan, 'eval')}. {_INTERVALS} {rule}"
    yield from _compared(changes(record.before, record.after, record.difference))
    yield _CHOSEN_ON
    if record.second_before and record.second_after:
        yield "### On a second data set"
        yield plain(record.second_data or "It had no part in training.")
        yield from _compared(changes(record.second_before, record.second_after, record.second_difference))


def _compared(found: list[Change]) -> Iterator[str]:
    yield changes_table(found)
    yield reading(found)


def _mixed(record: RunRecord) -> Iterator[str]:
    """Tabulate the weights between start and end, the chosen ones marked."""
    chosen = f"alpha {record.alpha:g} was chosen" if record.alpha is not None else "none of them was chosen"
    yield (
        f"Weights at alpha are the start weights plus alpha times what training changed (WiSE-FT); {chosen}, by the "
        "recall sum on the validation data. Recall sums in per cent, of 600."
    )
    second = any(point.get("second_recall_sum") is not None for point in record.interpolation)
    head = ["alpha", "validation data", *(["second data set"] if second else []), ""]
    yield table(head, (_mixed_row(point, record.alpha, second) for point in record.interpolation))


def _mixed_row(point: Mapping[str, float | None], alpha: float | None, second: bool) -> list[str]:
    sums = [point.get("recall_sum"), *([point.get("second_recall_sum")] if second else [])]
    cells = ["–" if value is None else f"{100 * value:.1f}" for value in sums]
    return [f"{point['alpha']:g}", *cells, "chosen" if point["alpha"] == alpha else ""]


def _again(record: RunRecord) -> Iterator[str]:
    yield block(record.command, "sh")
    yield (
        "Paths are cut to their last part here: give your own. With another device, number of processes or version the "
        "weights come out a little different."
    )
    yield _plan_table(record)
    yield "Settings:"
    yield block(json.dumps(record.settings, indent=1, ensure_ascii=False), "json")


def _plan_table(record: RunRecord) -> str:
    """Tabulate what was planned, the machine and the versions."""
    plan = {key: value for key, value in record.plan.items() if value is not None}
    rows = [[_plain_name(key), _plan_cell(key, value)] for key, value in plan.items()]
    rows += [
        ["start weights", code(record.base_fingerprint)],
        ["written weights", code(record.fingerprint)],
        ["versions", code(", ".join(f"{name} {version}" for name, version in record.versions.items()))],
    ]
    return table(["", ""], rows)


# ---------------------------------------------------------------- the model card


def _metadata(record: RunRecord) -> ModelCardData:
    """Gather what the Hub reads: kept to what is known."""
    licence = record.settings.get("license")
    zero_shot = record.model_type in _ZERO_SHOT
    return ModelCardData(
        library_name="transformers" if zero_shot else "image-text-alignment",
        pipeline_tag="zero-shot-image-classification" if zero_shot else "feature-extraction",
        tags=["image-text-retrieval", "dual-encoder", "contrastive"],
        model_name=one_line(record.name),
        eval_results=_results(record),
        license=one_line(licence) if licence else None,
        base_model=record.base_model_id and one_line(record.base_model_id),
        datasets=[one_line(record.dataset_id)] if record.dataset_id else None,
    )


def _results(record: RunRecord) -> list[EvalResult]:
    """List the measured recalls as the Hub's model index has them, in per cent."""
    data = one_line(record.dataset_id or record.data_name)
    return [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-text retrieval",
            dataset_type=data,
            dataset_name=f"{data}, validation part",
            metric_type=change.metric.split("_to_text_")[-1].split("_to_image_")[-1].split("@")[0],
            metric_name=change.label,
            metric_value=round(record.after[change.metric]["value"] * (100 if "recall" in change.metric else 1), 2),
        )
        for change in changes(record.before, record.after)
    ]


def _card(record: RunRecord) -> Iterator[str]:
    yield f"# {code(record.name)}"
    yield (
        "Pictures and captions in one space: it finds pictures by caption and captions by picture. "
        f"Fine-tuned from {code(record.base_model)} on {_count(record.plan, 'train')} from {code(record.data_name)}."
    )
    yield block(_USAGE, "python")
    yield "## Measured"
    yield from _measured(record)
    yield "## How it was trained"
    yield _what(record)
    yield block(record.command, "sh")
    yield _plan_table(record)
    yield "## Limits"
    yield _LIMITS


_USAGE = f"""from alignment.model import DualEncoder

encoder = DualEncoder.load("{REPOSITORY}")  # or the folder this file lies in
similarity = encoder.encode_images(["dog.jpg"]) @ encoder.encode_texts(["a dog on the beach"]).T"""

_LIMITS = """\
- Measured on the data above and nothing else. With pictures of another kind, or captions in another style or language,
  it can do worse than the start weights.
- It always returns a ranking, also where nothing fits; a probability is a softmax over the candidates.
- It carries the biases of its start weights and of its captions. Do not use it to identify people or to decide about
  them.
- The licences of the start weights and of the training data apply; check them before you pass it on."""


# ---------------------------------------------------------------- small words


def _count(plan: Mapping[str, Any], part: str) -> str:
    return f"{_number(plan.get(f'{part}_images'))} pictures with {_number(plan.get(f'{part}_captions'))} captions"


def _number(value: Any) -> str:
    """Print a number with its thousands apart; what is not known as such."""
    if value is None:
        return "an unknown number of"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return code(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _plan_cell(key: str, value: Any) -> str:
    if key.endswith("_seconds") and isinstance(value, int | float):
        return _duration(value)
    if key.endswith("_bytes") and isinstance(value, int | float):
        return f"{value / 1e9:.2f} GB"
    return _number(value)


def _plain_name(key: str) -> str:
    return plain(key.removesuffix("_bytes").removesuffix("_seconds").replace("_", " "))


def _if(plan: Mapping[str, Any], key: str, words: Callable[[Any], str]) -> str:
    return "" if plan.get(key) is None else words(plan[key])


def _sentence(text: str) -> str:
    return plain(text).rstrip(".") + "."


def _duration(seconds: float) -> str:
    """Print a time as people say it: 42 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
