"""The command line of fine-tuning: `argv -> command (here) -> run`; `config` declares the options of a run."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

from alignment.file_errors import describe_error
from alignment.picture_limits import add_size_options, use_size_options
from alignment.train.config import DATA, MACHINE, RESULT, START, TRAINING, TrainConfig

DESCRIPTION = """\
Fine-tune a dual encoder (CLIP, SigLIP, Chinese-CLIP, the compact model, or any vision and text tower) on captioned
images, and report the gain. The result folder is a model: the app, the gallery builder and alignment.evaluate take it,
and report.md in it shows the recall before and after with plots.
"""

EPILOG = """\
examples:
  look at the data first:
    python -m alignment.train --data my_photos --check
  fine-tune, everything chosen for you, at most half an hour:
    python -m alignment.train --model checkpoints/compact --data my_photos --output tuned --minutes 30
  it was killed; go on:
    python -m alignment.train --output tuned --resume
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

exit status: 0; 1 if a captions file could not be read or a folder not listed, which is named (training and --check go
on with the rest), or if nothing was made
"""

_RETRY = "go on with --resume, or, if it had not begun to train, with the same command"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a fine-tuning from the command line; returns its exit status, or raises SystemExit with the reason."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if arguments.check:
            return _check_data(arguments)
        return _train(arguments, sys.argv[1:] if argv is None else argv)
    except ModuleNotFoundError as error:
        cure = "install what training needs with: pip install '.[train]'"
        raise SystemExit(f"train: {error.name} is missing; {cure}") from error
    except (OSError, ValueError, FloatingPointError) as error:
        raise SystemExit(f"train: {describe_error(error, _RETRY)}") from error
    except KeyboardInterrupt as error:
        raise SystemExit("train: interrupted; if it was training already, go on with --resume") from error


def _train(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    import transformers

    from alignment.train.run import train

    transformers.utils.logging.set_verbosity_error()  # only the lines of `log` are printed
    transformers.utils.logging.disable_progress_bar()
    options = {name: value for name, value in vars(arguments).items() if value is not None}
    resume, push, private, _ = (options.pop(name, None) for name in ("resume", "push_to_hub", "private", "check"))
    options.setdefault("data", "")
    log = partial(print, file=sys.stderr, flush=True)
    record = train(TrainConfig(**options), resume=resume, log=log, command=command)
    if int(os.environ.get("RANK", "0")):
        return 0
    print(f"Model and report: {arguments.output} (report.md, plots/, run.json)")
    if push:
        from alignment.train.publish import push_to_hub

        print(f"Uploaded to {push_to_hub(arguments.output, push, private=private)}")
    return _status(record.data_complete)


def _status(is_complete: bool) -> int:
    if not is_complete:
        print("Not all of the data could be read, see above.", file=sys.stderr)
    return 0 if is_complete else 1


def _check_data(arguments: argparse.Namespace) -> int:
    from alignment.bundled import MODEL, bundled
    from alignment.data import describe_truncated
    from alignment.preprocess import Preprocessor
    from alignment.train.dataset import prepare

    use_size_options(arguments.max_megapixels, arguments.max_aspect_ratio)
    names = ("data", "format", "split", "eval_data", "eval_split", "second_data", "second_split")
    prepared = prepare(TrainConfig(output="", **{name: getattr(arguments, name) for name in names}))
    print(prepared.report)
    for line in prepared.summaries(others_only=True):
        print(f"- {line}")
    model = arguments.text or arguments.model or bundled(MODEL)
    preprocessor = Preprocessor.load(model)
    captions = (caption for part in (prepared.train, prepared.evaluation) for pair in part for caption in pair.captions)
    for line in describe_truncated(preprocessor.truncated(captions), preprocessor.max_length):
        print(f"- {line} ({model})")
    found, measured = len(prepared.train), f"{len(prepared.evaluation)} ({prepared.evaluation_name})"
    print(f"A run would learn from {found} pictures and be measured on {measured}.")
    return _status(prepared.is_complete)


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
            parser.error(f"--{option} goes with --{other}, which is missing".replace("_", "-"))
    if not (arguments.check or arguments.resume) and sum(starts) != 1:
        parser.error("name one start: --model, or --vision with --text, or --scratch")


def build_parser() -> argparse.ArgumentParser:
    """Lay out the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alignment.train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = {group: parser.add_argument_group(group) for group in (START, DATA, TRAINING, MACHINE, RESULT)}
    for option in fields(TrainConfig):
        if group := option.metadata.get("group"):
            flag = f"--{option.name.replace('_', '-')}"
            groups[group].add_argument(flag, default=None, **option.metadata["argument"])
    groups[DATA].add_argument("--check", action="store_true", help="only check the data and print what is in them")
    add_size_options(groups[DATA])
    result = groups[RESULT]
    result.add_argument("--resume", action="store_true", help="go on with the run in --output")
    result.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the result with its model card")
    result.add_argument("--private", action="store_true", help="as a private repository")
    return parser
