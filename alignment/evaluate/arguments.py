"""The command line of `alignment.evaluate`: parsed, checked, and the data it names read.

Place in the flow: `argv -> parse, check, read_task (here) -> command`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path

from alignment.data import Pair, ReadResult, describe_issues, read_data
from alignment.evaluate.eccv import EccvData, read_eccv
from alignment.evaluate.zero_shot import LabelledImages, read_class_folders, read_templates
from alignment.model import find_device
from alignment.picture_limits import add_size_options

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
    photos: LabelledImages | None = None
    templates: Sequence[str] | None = None


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
    task = EvalTask()
    if arguments.zero_shot:
        templates = read_templates(arguments.templates) if arguments.templates else None
        photos = read_class_folders(arguments.zero_shot, arguments.class_names)
        task = EvalTask(photos=photos, templates=templates)
    if arguments.data:
        reading = read_data(arguments.data, format=arguments.format, split=arguments.split)
        if not any(pair.captions for pair in reading.pairs):
            why = "".join(f"\n- {line}" for line in describe_issues(reading))
            raise ValueError(f"{arguments.data}: there is no picture with a caption to measure on.{why}")
        eccv = read_eccv(reading.pairs, Path(arguments.data)) if arguments.eccv else None
        task = replace(task, pairs=eccv.pairs if eccv else reading.pairs, reading=reading, eccv=eccv)
    return task
