"""The command line: what was typed, whether it goes together, and the data it names.

Place in the flow: `argv -> parse, check, read_task (here) -> command`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from alignment.evaluate.class_folders import LabelledImages, read_class_folders, read_templates
from alignment.evaluate.eccv import EccvData, read_eccv
from alignment.model import find_device
from alignment.pairs import Pair, Reading, read_data, told
from alignment.picture_limits import add_size_options

_EXAMPLES_OF_USE = """\
examples:
  recall with intervals, and the worst queries as a page
    python -m alignment.evaluate --model checkpoints/compact --data DATASET --split dev --html

  what fine-tuning brought: differences with intervals, and what got better and worse
    python -m alignment.evaluate --compare checkpoints/compact runs/mine --data DATASET --split dev

  class names instead of captions: PHOTOS/cat/1.jpg, PHOTOS/hot_dog/1.jpg, ...
    python -m alignment.evaluate --model checkpoints/compact --zero-shot PHOTOS

  COCO with the labels it lacks (pip install '.[coco]')
    python -m alignment.evaluate --model MODEL --data coco/dataset_coco.json --split test --eccv

Recalls are hit rates in percent, of all images and captions of the split; ties count against the model. The figures in
brackets are 95 % bootstrap intervals over images.

exit status: 0; 1 if a captions file could not be read or a folder not listed, which is named (the figures are those of
the rest), or if nothing was measured
"""


@dataclass(frozen=True)
class Task:
    """What to measure models on; either may be missing.

    Attributes:
        pairs: images with captions.
        reading: what of the data set they are from was left out.
        eccv: COCO's test split with its ids.
        photos: pictures with classes.
        templates: sentences around class names, if not the usual ones.
    """

    pairs: Sequence[Pair] | None
    reading: Reading | None
    eccv: EccvData | None
    photos: LabelledImages | None
    templates: Sequence[str] | None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `html` is the path of the page, if there is to be one."""
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
        description="Say what a model is worth on your data, or what one model gains over another.",
        epilog=_EXAMPLES_OF_USE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    who = parser.add_argument_group("who is measured")
    model = who.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=expanduser, metavar="MODEL", help="checkpoint folder or Hub id")
    model.add_argument(
        "--compare", type=expanduser, nargs=2, metavar=("A", "B"), help="two of them: what B gains over A"
    )
    who.add_argument("--revision", help="branch, tag or commit of a --model on the Hub")

    what = parser.add_argument_group("on what")
    what.add_argument("--data", type=expanduser, help="captioned images: folder, annotation file, or Hub id")
    what.add_argument("--format", help="of the data set, if the one found is wrong: csv, jsonl, coco, karpathy, ...")
    what.add_argument("--split", help="train, dev or test; everything if left out")
    what.add_argument("--eccv", action="store_true", help="--data is COCO: also ECCV Caption's mAP@R and CxC's recall")
    what.add_argument("--zero-shot", type=_path, metavar="FOLDER", help="pictures in a folder for each class")
    what.add_argument(
        "--class-names",
        type=_path,
        metavar="FILE",
        help="better names than the folders': lines of folder, tab, name(s), or JSON {folder: name or [names]}",
    )
    what.add_argument(
        "--templates", type=_path, metavar="FILE", help="sentences around a class name, one a line, {} where it goes"
    )

    add_size_options(what)

    how = parser.add_argument_group("how")
    how.add_argument("--device", help="cuda, mps or cpu; the best there is if left out")
    how.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per forward pass (%(default)s)")
    how.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="bootstrap samples for the intervals (%(default)s)"
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (%(default)s)")

    output = parser.add_argument_group("output, besides the figures on the terminal")
    output.add_argument("--json", type=_path, metavar="OUT", help="the figures")
    output.add_argument(
        "--html",
        nargs="?",
        type=_path,
        const=True,
        metavar="OUT",
        help="a page with the worst queries, or with --compare those that changed most, and labels that may be missing "
        "(evaluation.html; --compare always writes one, comparison.html)",
    )
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: saying what to type instead.
    """
    if not arguments.data and not arguments.zero_shot:
        raise ValueError("Say what to measure on: --data for captioned images, --zero-shot for class folders, or both.")
    needs = {
        "--split": "--data", "--format": "--data", "--eccv": "--data", "--revision": "--model",
        "--class-names": "--zero-shot", "--templates": "--zero-shot",
    }  # fmt: skip
    given = {name: getattr(arguments, name.removeprefix("--").replace("-", "_")) for name in {*needs, *needs.values()}}
    for option, other in needs.items():
        if given[option] and not given[other]:
            raise ValueError(f"{option} goes with {other}, which is missing.")
    find_device(arguments.device)
    if arguments.batch_size < 1 or arguments.resamples < 0:
        raise ValueError("--batch-size is at least 1 and --resamples at least 0.")
    for out in filter(None, (arguments.json, arguments.html)):
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise ValueError(f"{out} cannot be written: it is a folder, or the folder around it does not exist.")


def read_task(arguments: argparse.Namespace) -> Task:
    """Read what to measure on.

    Raises:
        FileNotFoundError: when something is not there.
        ModuleNotFoundError: when it takes an extra that is not installed.
        ValueError: when it cannot be read or is not what it should be.
    """
    pairs: Sequence[Pair] | None = None
    reading = None
    eccv = photos = None
    templates = read_templates(arguments.templates) if arguments.templates else None
    if arguments.zero_shot:
        photos = read_class_folders(arguments.zero_shot, arguments.class_names)
    if arguments.data:
        reading = read_data(arguments.data, format=arguments.format, split=arguments.split)
        pairs = reading.pairs
        if not any(pair.captions for pair in pairs):
            why = "".join(f"\n- {line}" for line in told(reading))
            raise ValueError(f"{arguments.data}: there is no picture with a caption to measure on.{why}")
    if arguments.eccv and pairs is not None:
        eccv = read_eccv(pairs, Path(arguments.data))
        pairs = eccv.pairs
    return Task(pairs, reading, eccv, photos, templates)
