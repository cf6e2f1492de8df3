"""The command `python -m alignment.gallery`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from alignment.gallery.building import BuildReport, build_gallery
from alignment.model import DualEncoder
from alignment.shipped import MODEL, shipped

_HELP = """\
Embed pictures and captions once, so that the app can search them at once.

SOURCE may be
  a folder of pictures    such as ~/Photos; everything below it counts, but hidden files and folders do not
  a captioned data set    a CSV, TSV or JSON-lines file with the columns `image` and `caption`, or the folder or the
                          annotation file of Flickr8k, Flickr30k or COCO; its captions can then be found as well
  OWNER/NAME[@REVISION]   a data set on the Hugging Face Hub (pip install '.[hub]')
  a hand-written list     a folder with pictures.jsonl and captions.jsonl, such as assets/gallery/sources
"""
_EXAMPLES = """\
examples:
  python -m alignment.gallery build ~/Photos --out my_gallery
  python app.py --gallery my_gallery

  python -m alignment.gallery build captions.csv --out my_gallery --model openai/clip-vit-base-patch32
  python app.py --gallery my_gallery --model openai/clip-vit-base-patch32

Run the same command again after pictures came, went or changed: only new ones are encoded. A gallery belongs to the
model that made it; with another --model everything is encoded again. Pictures that cannot be read are named and
skipped, and until the end of a build the old gallery stays as it is. Your pictures are not copied; DIR gets small
thumbnails.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return _build(args)
    except KeyboardInterrupt:
        print(f"\nInterrupted; what lay in {args.out} is as it was.", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:  # what the person who typed the command can mend
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m alignment.gallery", description="Make galleries to search.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser(
        "build",
        help="embed pictures and captions (build --help says more)",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("source", metavar="SOURCE", help="what to embed, see above")
    build.add_argument(
        "--out", metavar="DIR", required=True, help="the gallery folder, new or to be brought up to date"
    )
    build.add_argument("--model", default=shipped(MODEL), help="folder or Hub id (default: %(default)s)")
    build.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    build.add_argument("--split", help="only this part of a data set, such as train, dev or test")
    build.add_argument("--format", help="of the data set, where the found one is wrong: csv, jsonl, coco, folder, ...")
    build.add_argument(
        "--no-calibration",
        action="store_true",
        help="leave out the background that tells when nothing fits; saves embedding some 1,100 texts and pictures",
    )
    return parser


def _build(args: argparse.Namespace) -> int:
    encoder = DualEncoder.load(args.model, revision=args.revision)
    report = BuildReport()
    with tqdm(desc="Embedding", unit=" items", dynamic_ncols=True) as bar, logging_redirect_tqdm():

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        gallery = build_gallery(
            args.source,
            args.out,
            encoder,
            format=args.format,
            split=args.split,
            calibrate=not args.no_calibration,
            progress=show,
            report=report,
        )
    print(f"{args.out}: {len(gallery.pictures)} pictures and {len(gallery.captions)} captions, by {encoder.name}.")
    for kind in ("pictures", "captions"):
        print(f"  {kind}: {report.encoded[kind]} encoded, {report.reused[kind]} reused")
    print(f"  match probabilities: {gallery.stamp.judged_by or 'not calibrated'}")
    print(f"  skipped: {len(report.skipped)}{', named above' if report.skipped else ''}")
    return 0
