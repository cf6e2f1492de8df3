"""The command: measure one model or compare two, print the metrics, write JSON and a page.

Place in the flow: `arguments, DualEncoder -> command (here) -> terminal, files`.
"""

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from alignment.atomic import describe_error, write_file
from alignment.data import Pair, describe_issues, describe_truncated
from alignment.evaluate.arguments import EvalTask, check, parse, read_task
from alignment.evaluate.bootstrap import Difference, Estimate
from alignment.evaluate.eccv import eccv_table, evaluate_eccv
from alignment.evaluate.embedding import Embedded, embed_pairs
from alignment.evaluate.error_analysis import changed_queries, suspected_false_negatives, worst_queries
from alignment.evaluate.html_report import html_page
from alignment.evaluate.retrieval import compare_retrieval, difference_table, evaluate_embedded, report_table
from alignment.evaluate.zero_shot import class_ranks, compare_zero_shot, zero_shot_line, zero_shot_metrics
from alignment.model import DualEncoder
from alignment.picture_limits import use_size_options
from alignment.preprocess import join_first

logger = logging.getLogger(__name__)

EXAMPLES = 12  # of each kind and direction on the page


@dataclass(frozen=True)
class ModelOutput:
    """The output of a model on an `EvalTask`; `cut` are the captions longer than the `max_length` tokens it reads."""

    fingerprint: str
    embedded: Embedded | None
    class_ranks: Tensor | None
    eccv: Mapping[str, float] | None
    cut: Sequence[str]
    max_length: int


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a model, or compare two; returns the exit status, or raises SystemExit when nothing is measured."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        check(arguments)
        use_size_options(arguments.max_megapixels, arguments.max_aspect_ratio)
        task = read_task(arguments)
        _warn_of_repeated(task.pairs or ())
        _evaluate(arguments, task)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"evaluate: {describe_error(error)}") from error
    if task.reading is None or task.reading.is_complete:
        return 0
    print("Not all of the data could be read, see above.", file=sys.stderr)
    return 1


def _warn_of_repeated(pairs: Sequence[Pair]) -> None:
    """Warn of captions that several pictures share: each finds one picture at most."""
    images = Counter(caption for pair in pairs for caption in set(pair.captions))
    if repeated := [caption for caption, times in images.items() if times > 1]:
        logger.warning(
            "%d of %d captions belong to several pictures (%s): ties count against the model, so recall@1 can be low, "
            "or 0, whatever the model.", len(repeated), len(images), join_first(repeated),
        )  # fmt: skip


def _measure(name: str, task: EvalTask, arguments: argparse.Namespace) -> ModelOutput:
    """Load a model and encode the data; its memory is freed before the next model is loaded."""
    encoder = DualEncoder.load(name, revision=arguments.revision, device=arguments.device)
    embedded = ranks = eccv = None
    cut: Sequence[str] = ()
    options: dict[str, Any] = {"batch_size": arguments.batch_size, "progress": _Progress()}
    if task.pairs is not None:
        embedded = embed_pairs(encoder, task.pairs, **options)
        cut = encoder.preprocessor.truncated(embedded.texts)
    if task.photos is not None:
        ranks = class_ranks(encoder, task.photos, templates=task.templates, **options)
    if task.eccv is not None and embedded is not None:
        eccv = evaluate_eccv(embedded, task.eccv)
    return ModelOutput(encoder.fingerprint, embedded, ranks, eccv, cut, encoder.preprocessor.max_length)


def _evaluate(arguments: argparse.Namespace, task: EvalTask) -> None:
    """Measure one model or two; print, and write the JSON file and the page that were asked for."""
    resampling = {"resamples": arguments.resamples, "seed": arguments.seed}
    settings = {"data": arguments.data, "split": arguments.split, **resampling}
    if arguments.zero_shot:
        settings["zero_shot_folder"] = str(arguments.zero_shot)
    models = arguments.compare or [arguments.model]
    found = [_measure(name, task, arguments) for name in models]
    content: dict[str, Any]
    if arguments.compare:
        content = {"compare": models, **settings, "fingerprints": [one.fingerprint for one in found]}
        results, metrics, *shown = _compare(found[0], found[1], resampling)
    else:
        content = {"model": arguments.model, "revision": arguments.revision, **settings}
        content["fingerprint"] = found[0].fingerprint
        results, metrics, *shown = _report(found[0], task, resampling)
    content |= results | _issues(task, found)
    if arguments.json is not None:
        write_file(arguments.json, json.dumps(content, indent=2) + "\n")
    if arguments.html:
        write_file(arguments.html, html_page(models, _facts(arguments, task), metrics, *shown))
        print(f"Page: {arguments.html.absolute()}", file=sys.stderr)


def _report(found: ModelOutput, task: EvalTask, resampling: Mapping[str, int]) -> tuple[Any, ...]:
    """Print the metrics of one model; returns them for the JSON file, for the page, and its worst queries."""
    content: dict[str, Any] = {}
    metrics: dict[str, Estimate] = {}
    shown: tuple[Any, ...] = ()
    if found.embedded is not None:
        report = evaluate_embedded(found.embedded, **resampling)
        print(report_table(report))
        content |= asdict(report)
        metrics |= report.metrics
        shown = [worst_queries(found.embedded, EXAMPLES)], suspected_false_negatives(found.embedded, 2 * EXAMPLES)
    if found.class_ranks is not None and task.photos is not None:
        zero_shot = zero_shot_metrics(found.class_ranks, **resampling)
        sizes = {"num_images": len(found.class_ranks), "num_classes": len(task.photos.class_names)}
        print(zero_shot_line(zero_shot, **sizes))
        content["zero_shot"] = sizes | {"metrics": {name: asdict(one) for name, one in zero_shot.items()}}
        metrics |= zero_shot
    if found.eccv is not None:
        print(eccv_table(found.eccv))
        content["eccv"] = dict(found.eccv)
    return content, metrics, *shown


def _compare(before: ModelOutput, after: ModelOutput, resampling: Mapping[str, int]) -> tuple[Any, ...]:
    """Print the differences between two models; returns them for JSON and page, and the queries that changed most."""
    content: dict[str, Any] = {}
    metrics: dict[str, Difference] = {}
    shown: tuple[Any, ...] = ()
    if before.embedded is not None and after.embedded is not None:
        comparison = compare_retrieval(before.embedded, after.embedded, **resampling)
        content = {"num_images": comparison.num_images, "num_texts": comparison.num_texts}
        metrics |= comparison.metrics
        better = after.embedded if comparison["recall_sum"] >= 0 else before.embedded
        changed = changed_queries(before.embedded, after.embedded, EXAMPLES)
        shown = changed, suspected_false_negatives(better, 2 * EXAMPLES)
    if before.class_ranks is not None and after.class_ranks is not None:
        metrics |= compare_zero_shot(before.class_ranks, after.class_ranks, **resampling)
    print(difference_table(metrics))
    rows = {name: asdict(found) for name, found in metrics.items()}
    content["metrics"] = {name: {**row, "not_better": row.pop("p_not_better")} for name, row in rows.items()}
    if before.eccv is not None and after.eccv is not None:
        content["eccv"] = [dict(before.eccv), dict(after.eccv)]
        print(f"\nModel A\n{eccv_table(before.eccv)}\n\nModel B\n{eccv_table(after.eccv)}")
    return content, metrics, *shown


def _issues(task: EvalTask, measured: Sequence[ModelOutput]) -> dict[str, Any]:
    """Print how the data was read: left out, repaired, unread, truncated; returns it for the JSON file."""
    lines = describe_issues(task.reading) if task.reading else []
    captioned = {pair.image: pair.id for pair in task.pairs or () if pair.captions}
    for found in measured:
        opened = set(found.embedded.images if found.embedded is not None else captioned)
        if unopened := list(dict.fromkeys(name for image, name in captioned.items() if image not in opened)):
            lines.append(f"left out, pictures that cannot be opened: {len(unopened):,} ({join_first(unopened)})")
        lines += describe_truncated(found.cut, found.max_length)
    for line in dict.fromkeys(lines):
        print(f"- {line}")
    if task.reading is None:
        return {}
    content: dict[str, Any] = {name: dict(getattr(task.reading, name)) for name in ("left_out", "repaired", "unread")}
    content["cut"] = [{"max_tokens": found.max_length, "captions": len(found.cut)} for found in measured]
    return content


class _Progress:
    """Print progress on standard error: in place on a terminal, else one line per tenth."""

    printed = ("", -1)

    def __call__(self, what: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what} {done:,}/{total:,}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif self.printed != (what, done * 10 // total):
            self.printed = (what, done * 10 // total)
            print(f"{what} {done:,}/{total:,}", file=sys.stderr, flush=True)


def _facts(arguments: argparse.Namespace, task: EvalTask) -> dict[str, str]:
    facts = {}
    if task.pairs is not None:
        facts["Data"] = f"{arguments.data}{f', split {arguments.split}' if arguments.split else ''}"
        captions = sum(len(pair.captions) for pair in task.pairs)
        facts["Size"] = f"{len(task.pairs):,} images, {captions:,} captions"
    if task.photos is not None:
        size = f"{len(task.photos.images):,} pictures, {len(task.photos.class_names):,} classes"
        facts["Zero-shot"] = f"{arguments.zero_shot}: {size}"
    return facts | {"Intervals": f"{arguments.resamples:,} resamples, seed {arguments.seed}"}
