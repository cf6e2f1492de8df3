"""The command line of fine-tuning: options in, a run, the result in words."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from os.path import expanduser
from typing import Any

from alignment.durable import explain
from alignment.picture_limits import add_size_options, use_size_options

DESCRIPTION = """\
Fine-tune a dual encoder (CLIP, SigLIP, Chinese-CLIP, the compact model, or any vision and text tower) on captioned
images, and report what it brought. The result folder is a model: the app, the gallery builder and alignment.evaluate
take it, and report.md in it shows the recall before and after with plots.
"""

EXAMPLES = """\
examples:
  look at the data first:
    python -m alignment.train --data my_photos --check
  fine-tune, everything chosen for you, at most half an hour:
    python -m alignment.train --model checkpoints/compact --data my_photos --output tuned --minutes 30
  it was killed; go on:
    python -m alignment.train --output tuned --resume
  what did it bring, picture by picture? (on a data set with a dev split; what was held out of others is in report.md)
    python -m alignment.evaluate --compare checkpoints/compact tuned --data flickr8k --split dev
  use it:
    python -m alignment.gallery build my_photos --model tuned --out my_gallery
    python app.py --gallery my_gallery --model tuned
  join two towers, lock the image side, learn the text side (LiT):
    python -m alignment.train --vision google/vit-base-patch16-224-in21k \\
        --text google-bert/bert-base-multilingual-cased --preset lit --data my_photos --output tuned
  a small model from random weights, to see contrastive learning at work:
    python -m alignment.train --scratch small --data flickr8k --output small
  a large batch on a small card; two cards:
    python -m alignment.train --model openai/clip-vit-base-patch32 --data coco --output tuned \\
        --batch-size 1024 --chunk-size 64
    torchrun --nproc-per-node 2 -m alignment.train --model ... --data ... --output ...

my_photos is a folder of pictures with metadata.csv or metadata.jsonl (columns file_name, caption), a CSV or JSON-lines
file, Flickr8k, Flickr30k, COCO, WebDataset shards, or OWNER/NAME on the Hub.
"""

STATUS = """
exit status: 0; 1 if a captions file could not be read or a folder not listed, which is named (training and --check go
on with the rest), or if nothing was made
"""

_AGAIN = "go on with --resume, or, if it had not begun to train, with the same command"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a fine-tuning from the command line; returns its exit status.

    Raises:
        SystemExit: with the reason, when it fails.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if arguments.check:
            return _check_data(arguments)
        return _train(arguments, sys.argv[1:] if argv is None else argv)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"train: {error.name} is missing; install what training needs with: pip install '.[train]'"
        ) from error
    except (OSError, ValueError, FloatingPointError) as error:
        raise SystemExit(f"train: {explain(error, _AGAIN)}") from error
    except KeyboardInterrupt as error:
        raise SystemExit("train: interrupted; if it was training already, go on with --resume") from error


def _train(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    _warn_nothing()
    from alignment.train.run import train
    from alignment.train.settings import TrainConfig

    options = {name: value for name, value in vars(arguments).items() if value is not None}
    resume = options.pop("resume")
    push, private = options.pop("push_to_hub", None), options.pop("private")
    options.pop("check")
    options.setdefault("data", "")
    record = train(TrainConfig.from_dict(options), resume=resume, log=_say, command=command)
    if int(os.environ.get("RANK", "0")):
        return 0
    print(f"Model and report: {arguments.output} (report.md, plots/, run.json)")
    if push:
        from alignment.train.publish import push_to_hub

        print(f"Uploaded to {push_to_hub(arguments.output, push, private=private)}")
    return _status(record.data_complete)


def _status(is_complete: bool) -> int:
    if is_complete:
        return 0
    print("Not all of the data could be read, see above.", file=sys.stderr)
    return 1


def _check_data(arguments: argparse.Namespace) -> int:
    from alignment.pairs import told_cut
    from alignment.preprocess import Preprocessor
    from alignment.shipped import MODEL, shipped
    from alignment.train.prepare import prepare
    from alignment.train.settings import TrainConfig

    use_size_options(arguments.max_megapixels, arguments.max_aspect_ratio)
    names = ("data", "format", "split", "eval_data", "eval_split", "second_data", "second_split")
    prepared = prepare(TrainConfig(output="", **{name: getattr(arguments, name) for name in names}))
    print(prepared.report.summary())
    for line in prepared.told_of_others():
        print(f"- {line}")
    model = arguments.text or arguments.model or shipped(MODEL)
    preprocessor = Preprocessor.load(model)
    captions = (caption for part in (prepared.train, prepared.evaluation) for pair in part for caption in pair.captions)
    for line in told_cut(preprocessor.cut(captions), preprocessor.max_length):
        print(f"- {line} ({model})")
    print(
        f"A run would learn from {len(prepared.train)} pictures and be measured on {len(prepared.evaluation)} "
        f"({prepared.evaluation_name})."
    )
    return _status(prepared.is_complete)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _warn_nothing() -> None:
    """Let our own lines be the only ones."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    starts = [bool(arguments.model), bool(arguments.vision or arguments.text), bool(arguments.scratch)]
    if not arguments.check and not arguments.output:
        parser.error("--output is needed: a folder for the result")
    if not arguments.data and (arguments.check or not arguments.resume):
        parser.error("--data is needed: the captioned images")
    if bool(arguments.vision) != bool(arguments.text):
        parser.error("--vision and --text go together: name both towers")
    for option, other in (("second_split", "second_data"), ("private", "push_to_hub")):
        if getattr(arguments, option) and not getattr(arguments, other):
            parser.error(f"--{option.replace('_', '-')} goes with --{other.replace('_', '-')}, which is missing")
    if not (arguments.check or arguments.resume) and sum(starts) != 1:
        parser.error("name one start: --model, or --vision with --text, or --scratch")


def _positive(kind: type) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    read.__name__ = "number"
    return read


def _between(lowest: float, highest: float, kind: type = float) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text} is not between {lowest:g} and {highest:g}")
        return value

    read.__name__ = "number"
    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m alignment.train",
        description=DESCRIPTION,
        epilog=EXAMPLES + STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    start = parser.add_argument_group("start (one of three)")
    start.add_argument("--model", type=expanduser, help="checkpoint folder or Hub id")
    start.add_argument("--vision", type=expanduser, help="vision tower to join with --text: folder or Hub id")
    start.add_argument("--text", type=expanduser, help="text tower")
    start.add_argument("--scratch", choices=["tiny", "small"], help="a ViT and a BERT with random weights")

    data = parser.add_argument_group("data")
    data.add_argument("--data", type=expanduser, help="folder, annotation file, shards or Hub id of captioned images")
    data.add_argument("--format", help="of the data, if the one found is wrong (see alignment/pairs)")
    data.add_argument("--split", help="what to learn from (train, and what is in no split)")
    data.add_argument(
        "--eval-data", type=expanduser, help="another data set to measure on (the dev split, else a part held out)"
    )
    data.add_argument("--eval-split", help="its split, or that of --data")
    data.add_argument(
        "--second-data",
        type=expanduser,
        help="a data set of another kind: what does fine-tuning make the model forget?",
    )
    data.add_argument("--second-split", help="its split")
    data.add_argument("--check", action="store_true", help="only check the data and say what is in them")
    add_size_options(data)

    how = parser.add_argument_group("training (what is left out is chosen by model, data and machine)")
    how.add_argument(
        "--preset",
        choices=["full", "lit", "heads", "lora"],
        help="train everything, all but the image tower, the projections, or low-rank adapters",
    )
    how.add_argument("--loss", choices=["softmax", "sigmoid"], help="CLIP's or SigLIP's; as the model was trained")
    how.add_argument("--minutes", type=_positive(float), help="end within this time, with the best weights so far")
    how.add_argument("--epochs", type=_positive(float), help="passes over the pictures")
    how.add_argument("--max-steps", type=_positive(int), help="optimiser steps at most")
    how.add_argument("--batch-size", type=_positive(int), help="pictures contrasted with each other (up to 256)")
    how.add_argument("--chunk-size", type=_positive(int), help="pictures in memory together; same result, less memory")
    how.add_argument("--captions-per-image", type=_positive(int), help="captions of a picture in one step")
    how.add_argument("--learning-rate", type=_positive(float), help="peak, of the towers")
    how.add_argument("--head-learning-rate", type=_positive(float), help="peak, of projections and adapters")
    how.add_argument("--weight-decay", type=_between(0, 10), help="of matrices (0.05)")
    how.add_argument("--warmup", type=_between(0, 1), help="share of the steps in which the learning rate rises (0.1)")
    how.add_argument("--patience", type=_positive(int), help="measurements without a better recall sum (5)")
    how.add_argument("--measure-every", type=_positive(int), help="steps between measurements, each with a checkpoint")
    how.add_argument("--augment", action=argparse.BooleanOptionalAction, help="crop and mirror pictures (yes)")
    how.add_argument(
        "--interpolate",
        action=argparse.BooleanOptionalAction,
        help="afterwards choose between start and end weights, WiSE-FT (yes for pretrained models)",
    )
    how.add_argument("--seed", type=_between(0, 2**32 - 1, int), help="of everything random (0)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=["cuda", "mps", "cpu"], help="the best there is")
    machine.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="bf16 on a GPU that has it")
    machine.add_argument("--workers", type=_between(0, 1024, int), help="processes that read pictures")
    machine.add_argument("--gradient-checkpointing", action="store_true", default=None, help="less memory, more time")
    machine.add_argument(
        "--keep-images",
        action=argparse.BooleanOptionalAction,
        help="compute the frozen part of the image side once (yes where that saves time)",
    )
    machine.add_argument(
        "--kept-folder", type=expanduser, help="where to keep it, for several runs to share (below --output)"
    )

    result = parser.add_argument_group("result")
    result.add_argument("--output", type=expanduser, help="folder for model, report, plots and logs; must be new")
    result.add_argument("--resume", action="store_true", help="go on with the run in --output")
    result.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the result with its model card")
    result.add_argument("--private", action="store_true", help="as a private repository")
    return parser
