"""The command: measure one model or compare two, print the metrics, write JSON and a page.

Place in the flow: `argv -> parse, check, read_task -> DualEncoder, metrics -> terminal, files`, all called here.
"""

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from torch import Tensor

from alignment.atomic import write_file
from alignment.data import Pair, ReadResult, describe_issues, describe_truncated, read_data
from alignment.evaluate import retrieval, zero_shot
from alignment.evaluate.eccv import EccvData, eccv_table, evaluate_eccv, read_eccv
from alignment.evaluate.embedding import Embedded, embed_pairs
from alignment.evaluate.error_analysis import changed_queries, suspected_false_negatives, worst_queries
from alignment.evaluate.html_report import html_page
from alignment.file_errors import describe_error
from alignment.model import DualEncoder, find_device
from alignment.picture_limits import add_size_options, use_size_options
from alignment.preprocess import join_first

logger = logging.getLogger(__name__)

EXAMPLES = 12  # of each kind and direction on the page

_EPILOG = """\
examples:
  recall with intervals, and the worst queries as a page
    python -m alignment.evaluate --model checkpoints/compact --data DATASET --split dev --html

  the effect of fine-tuning: differences with intervals, and queries that got better and worse
    python -m alignment.evaluate --compare checkpoints/compact runs/mine --data DATASET --split dev

  class names instead of captions: PHOTOS/cat/1.jpg, PHOTOS/hot_dog/1.jpg, ...
    python -m alignment.evaluate --model checkpoints/compact --zero-shot PHOTOS

  COCO with additional labels (pip install '.[coco]')
    python -m alignment.evaluate --model MODEL --data coco/dataset_coco.json --split test --eccv

Recalls are hit rates in percent over all images and captions of the split; ties count against the model. Brackets hold
95 % bootstrap intervals over images.

exit status: 0; 1 if a captions file could not be read or a folder not listed, which is named (the figures are those of
the rest), or if nothing was measured
"""


@dataclass(frozen=True)
class EvalTask:
    """The data to evaluate on: captioned `pairs` and how they were read, `photos` with classes and templates."""

    pairs: Sequence[Pair] | None = None
    reading: ReadResult | None = None
    eccv: EccvData | None = None
    photos: zero_shot.LabelledImages | None = None
    templates: Sequence[str] | None = None


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


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `html` becomes the path of the page, or None."""
    arguments = build_parser().parse_args(argv)
    if arguments.html is True or (arguments.compare and arguments.data and arguments.html is None):
        arguments.html = Path("comparison.html" if arguments.compare else "evaluation.html")
    return arguments


def _path(text: str) -> Path:
    return Path(text).expanduser()


def build_parser() -> argparse.ArgumentParser:
    """Lay out the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alignment.evaluate",
        description="Measure retrieval and zero-shot accuracy of a model on your data, or compare two models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    who = parser.add_argument_group("who is measured")
    model = who.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=expanduser, metavar="MODEL", help="checkpoint folder or Hub id")
    model.add_argument("--compare", type=expanduser, nargs=2, metavar=("A", "B"), help="two models: B minus A")
    who.add_argument("--revision", help="branch, tag or commit of a --model on the Hub")

    what = parser.add_argument_group("on what")
    what.add_argument("--data", type=expanduser, help="captioned images: folder, annotation file, or Hub id")
    what.add_argument("--format", help="of the data set, if the one found is wrong: csv, jsonl, coco, karpathy, ...")
    what.add_argument("--split", help="train, dev or test; everything if left out")
    what.add_argument("--eccv", action="store_true", help="--data is COCO: also ECCV Caption's mAP@R and CxC's recall")
    what.add_argument("--zero-shot", type=_path, metavar="FOLDER", help="pictures in a folder for each class")
    names = "other names than the folders': lines of folder, tab, name(s), or JSON {folder: name or [names]}"
    what.add_argument("--class-names", type=_path, metavar="FILE", help=names)
    templates = "sentences around a class name, one a line, {} where it goes"
    what.add_argument("--templates", type=_path, metavar="FILE", help=templates)
    add_size_options(what)

    how = parser.add_argument_group("how")
    how.add_argument("--device", help="cuda, mps or cpu; the fastest available by default")
    how.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per forward pass (%(default)s)")
    how.add_argument("--resamples", type=int, default=1000, metavar="N", help="bootstrap samples (%(default)s)")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (%(default)s)")

    output = parser.add_argument_group("output, besides the figures on the terminal")
    output.add_argument("--json", type=_path, metavar="OUT", help="the figures")
    page = (
        "a page with the worst queries, or with --compare those that changed most, and labels that may be missing "
        "(evaluation.html; --compare always writes one, comparison.html)"
    )
    output.add_argument("--html", nargs="?", type=_path, const=True, metavar="OUT", help=page)
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError on options that contradict each other, with the option to give instead."""
    if not arguments.data and not arguments.zero_shot:
        raise ValueError("Say what to measure on: --data for captioned images, --zero-shot for class folders, or both.")
    requires = {
        "split": "data", "format": "data", "eccv": "data", "revision": "model", "class_names": "zero_shot",
        "templates": "zero_shot",
    }  # fmt: skip
    for option, other in requires.items():
        if getattr(arguments, option) and not getattr(arguments, other):
            raise ValueError(f"--{option} goes with --{other}, which is missing.".replace("_", "-"))
    find_device(arguments.device)
    if arguments.batch_size < 1 or arguments.resamples < 0:
        raise ValueError("--batch-size is at least 1 and --resamples at least 0.")
    for out in filter(None, (arguments.json, arguments.html)):
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise ValueError(f"{out} cannot be written: it is a folder, or the folder around it does not exist.")


def read_task(arguments: argparse.Namespace) -> EvalTask:
    """Read the data to evaluate on; raises what its readers raise, and ValueError without any caption."""
    photos = templates = None
    if arguments.zero_shot:
        templates = zero_shot.read_templates(arguments.templates) if arguments.templates else None
        photos = zero_shot.read_class_folders(arguments.zero_shot, arguments.class_names)
    if not arguments.data:
        return EvalTask(photos=photos, templates=templates)
    reading = read_data(arguments.data, format=arguments.format, split=arguments.split)
    if not any(pair.captions for pair in reading.pairs):
        why = "".join(f"\n- {line}" for line in describe_issues(reading))
        raise ValueError(f"{arguments.data}: there is no picture with a caption to measure on.{why}")
    eccv = read_eccv(reading.pairs, Path(arguments.data)) if arguments.eccv else None
    return EvalTask(eccv.pairs if eccv else reading.pairs, reading, eccv, photos, templates)


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
        ranks = zero_shot.class_ranks(encoder, task.photos, templates=task.templates, **options)
    if task.eccv is not None and embedded is not None:
        eccv = evaluate_eccv(embedded, task.eccv)
    return ModelOutput(encoder.fingerprint, embedded, ranks, eccv, cut, encoder.preprocessor.max_length)


def _evaluate(arguments: argparse.Namespace, task: EvalTask) -> None:
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
    metrics: dict[str, retrieval.Estimate] = {}
    shown: tuple[Any, ...] = ()
    if found.embedded is not None:
        report = retrieval.evaluate_embedded(found.embedded, **resampling)
        print(retrieval.report_table(report))
        content |= asdict(report)
        metrics |= report.metrics
        shown = [worst_queries(found.embedded, EXAMPLES)], suspected_false_negatives(found.embedded, 2 * EXAMPLES)
    if found.class_ranks is not None and task.photos is not None:
        shares = zero_shot.zero_shot_metrics(found.class_ranks, **resampling)
        sizes = {"num_images": len(found.class_ranks), "num_classes": len(task.photos.class_names)}
        print(zero_shot.zero_shot_line(shares, **sizes))
        content["zero_shot"] = sizes | {"metrics": {name: asdict(one) for name, one in shares.items()}}
        metrics |= shares
    if found.eccv is not None:
        print(eccv_table(found.eccv))
        content["eccv"] = dict(found.eccv)
    return content, metrics, *shown


def _compare(before: ModelOutput, after: ModelOutput, resampling: Mapping[str, int]) -> tuple[Any, ...]:
    """Print the differences between two models; returns them for JSON and page, and the queries that changed most."""
    content: dict[str, Any] = {}
    metrics: dict[str, retrieval.Difference] = {}
    shown: tuple[Any, ...] = ()
    if before.embedded is not None and after.embedded is not None:
        comparison = retrieval.compare_retrieval(before.embedded, after.embedded, **resampling)
        content = {"num_images": comparison.num_images, "num_texts": comparison.num_texts}
        metrics |= comparison.metrics
        better = after.embedded if comparison["recall_sum"] >= 0 else before.embedded
        changed = changed_queries(before.embedded, after.embedded, EXAMPLES)
        shown = changed, suspected_false_negatives(better, 2 * EXAMPLES)
    if before.class_ranks is not None and after.class_ranks is not None:
        metrics |= zero_shot.compare_zero_shot(before.class_ranks, after.class_ranks, **resampling)
    print(retrieval.difference_table(metrics))
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
