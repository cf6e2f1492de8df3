"""The command `python -m alignment.gallery`: build, check, push and pull.

Place in the flow: `command (here) -> build_gallery`. Under `torchrun` each process embeds its share; the first one
gathers what the others report and finishes the gallery. When a process fails, torchrun ends the others.
"""

import argparse
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import TypeAlias

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from alignment.bundled import MODEL, bundled
from alignment.data import Partition, describe_issues, describe_truncated
from alignment.file_errors import describe_error
from alignment.gallery.build import BuildReport, build_gallery, embed_share
from alignment.gallery.database import KINDS, GalleryDatabase
from alignment.gallery.milvus_sync import Remote, add_index_options
from alignment.gallery.search import Gallery
from alignment.model import DualEncoder
from alignment.picture_limits import add_size_options, use_size_options
from alignment.preprocess import join_first
from alignment.signals import handle_signals
from alignment.workers import WorkerGroup, worker_group

Show: TypeAlias = Callable[..., None]  # takes (done, total), and what is done if that changes

_HELP = """\
Embed pictures and captions once, so that the app can search them at once.

SOURCE may be
  a folder of pictures    such as ~/Photos; everything below it counts, but hidden files and folders do not
  a captioned data set    a CSV, TSV or JSON-lines file with the columns `image` and `caption`, or the folder or the
                          annotation file of Flickr8k, Flickr30k or COCO; its captions can then be found as well
  WebDataset shards       a folder of tar files or a pattern in quotes, "shards/{00000..00099}.tar", "shards/*.tar"
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
skipped, and until the end of a build the old gallery stays as it is. A build that was killed, or ran out of room, is
resumed by the same command. Your pictures are not copied; DIR/gallery.db holds small thumbnails. Those in shards are
unpacked once, below $ALIGNMENT_CACHE.

exit status: 0; 1 if a captions file could not be read, a folder not listed, or pictures that the gallery holds not be
read now, all of which are named; 2 if no gallery was made

several GPUs, and several machines that see the same SOURCE, DIR and $ALIGNMENT_CACHE:
  torchrun --nproc-per-node 2 -m alignment.gallery build shards --out my_gallery
  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
      -m alignment.gallery build shards --out my_gallery
or without torchrun, each wherever and whenever you like, and the last one when the others are done:
  python -m alignment.gallery build shards --out my_gallery --share 1/2
  python -m alignment.gallery build shards --out my_gallery --share 2/2
  python -m alignment.gallery build shards --out my_gallery
"""
_PUSH_HELP = """, and wait until it has indexed them. The gallery folder is still needed. Run the command again after an
interruption or when the gallery has changed: only what is missing is sent, and what the gallery has no more is deleted.
User and password, or an API key, are read from ALIGNMENT_INDEX_TOKEN."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return int(args.run(args, Remote.of(args.index, args.folder, args.index_name)))
    except KeyboardInterrupt:
        text = "Interrupted; a gallery that was there is as it was. The same command goes on from here."
        print(f"\n{text}", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:  # what the person who typed the command can mend
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """Lay out the command line."""
    parser = argparse.ArgumentParser(prog="python -m alignment.gallery", description="Make galleries to search.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text, raw = "embed pictures and captions (build --help says more)", argparse.RawDescriptionHelpFormatter
    build = commands.add_parser("build", help=text, description=_HELP, epilog=_EXAMPLES, formatter_class=raw)
    add, add_path = build.add_argument, partial(build.add_argument, type=expanduser)
    add_path("source", metavar="SOURCE", help="what to embed, see above")
    text = "the gallery folder, new or to be brought up to date"
    add_path("--out", metavar="DIR", dest="folder", required=True, help=text)
    add_path("--model", default=bundled(MODEL), help="folder or Hub id (default: %(default)s)")
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add("--split", help="only this part of a data set, such as train, dev or test")
    add("--format", help="of the data set, where the found one is wrong: csv, jsonl, coco, folder, ...")
    add("--share", metavar="K/N", help="only embed the K-th of N shares; finish without this, see below")
    text = "leave out the cohort that tells when nothing fits; saves embedding some 1,100 texts and pictures"
    add("--no-calibration", action="store_true", help=text)
    add_size_options(build)
    add_index_options(build)
    build.set_defaults(run=_build)
    text = "read every byte of a gallery and say whether it is as it was written"
    check = commands.add_parser("check", help=text, description=text.capitalize() + ".")
    text = "copy the embeddings to a Milvus server"
    push = commands.add_parser("push", help=text, description=f"{text.capitalize()}{_PUSH_HELP}")
    push.add_argument("--dry-run", action="store_true", help="say what would be sent and taken out, and change nothing")
    push.add_argument("--drop", action="store_true", help="delete the gallery's collections on the server instead")
    text = "fetch embeddings that are missing or damaged in the gallery folder back from a Milvus server"
    pull = commands.add_parser("pull", help=text)
    for command, metavar, run in ((check, "DIR", _check), (push, "GALLERY", _push), (pull, "GALLERY", _pull)):
        command.add_argument("folder", type=expanduser, metavar=metavar, help="the gallery folder")
        add_index_options(command, required=command is not check)
        command.set_defaults(run=run)
    return parser


def _check(args: argparse.Namespace, remote: Remote | None) -> int:
    with closing(GalleryDatabase(Path(args.folder))) as database:
        if faults := database.check():
            raise database.damaged(join_first(faults))
        metadata = database.metadata
        if remote is not None:
            for kind in (kind for kind in KINDS if len(database.ids(kind))):
                remote.open(kind, metadata.fingerprint, database.ids(kind)).close()
    print(f"{args.folder}: {metadata.num_pictures} pictures and {metadata.num_captions} captions, as written.")
    return 0


def _push(args: argparse.Namespace, remote: Remote) -> int:
    with closing(GalleryDatabase(Path(args.folder))) as database:
        if args.drop:
            for name, count in remote.drop(database.metadata.fingerprint).items():
                print(f"{name}: deleted, {count} rows")
            return 0
        with progress_bar("Sending", unit=" rows", quiet=args.dry_run) as show:
            says = remote.push(database, show, dry_run=args.dry_run)
    print("\n".join(says))
    if old := remote.of_other_models(database.metadata.fingerprint):
        names = ", ".join(f"{index.name} ({len(index)} rows)" for index in old)
        print(f"Of earlier models there is still {names}: push --drop deletes all, and the next push sends anew.")
    return 0


def _pull(args: argparse.Namespace, remote: Remote) -> int:
    with progress_bar("Fetching", unit=" rows") as show:
        pictures, captions = remote.pull(show)
    print(f"{args.folder}: {pictures} pictures and {captions} captions are here again")
    return 0


def _build(args: argparse.Namespace, remote: Remote | None) -> int:
    share, report = None if args.share is None else Partition.parse(args.share), BuildReport()
    use_size_options(args.max_megapixels, args.max_aspect_ratio)
    # torchrun sends SIGTERM when another process has failed; what is embedded is kept, as after Ctrl-C.
    with handle_signals(signal.default_int_handler, signal.SIGTERM), worker_group() as group:
        count = torch.cuda.device_count() if group else 0  # one GPU for each process
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else None
        encoder = DualEncoder.load(args.model, revision=args.revision, device=device)
        if share := Partition(group.rank + 1, group.size) if group else share:
            shared = _embed_share(args, encoder, share, group)
            if not group or share.number > 1:
                return 0
        with progress_bar() as show:
            gallery = build_gallery(
                args.source, args.folder, encoder, format=args.format, split=args.split,
                calibrate=not args.no_calibration, progress=show, report=report, remote=remote,
            )  # fmt: skip
    if share:
        report.encoded, report.reused = shared.encoded + report.encoded, shared.reused
    return _sum_up(args.folder, gallery, report, encoder.preprocessor.max_length)


def _embed_share(
    args: argparse.Namespace, encoder: DualEncoder, share: Partition, group: WorkerGroup | None
) -> BuildReport:
    """Embed one share; returns what was done, under torchrun by all processes."""
    models, report = group.gather(encoder.fingerprint) if group else [], BuildReport()
    if wrong := [rank for rank, model in enumerate(models) if model != models[0]]:
        theirs = f"Process {wrong[0]} has another model ({models[wrong[0]][:12]}) than process 0 ({models[0][:12]})"
        raise ValueError(f"{theirs}: give all of them the same files.")
    with progress_bar(f"Embedding {share}", quiet=bool(group) and share.number > 1) as show:
        data = {"format": args.format, "split": args.split, "progress": show, "report": report}
        embed_share(args.source, args.folder, encoder, share, **data)
    later = "" if group else " Once all are done, finish with the command without --share."
    counts = "{pictures} pictures and {captions} captions encoded".format_map(report.encoded)
    print(f"Share {share}: {counts}.{later}", flush=True)
    if group:
        encoded, reused = zip(*group.gather((report.encoded, report.reused)), strict=True)
        report.encoded, report.reused = sum(encoded, Counter()), sum(reused, Counter())
    return report


@contextmanager
def progress_bar(what: str = "Embedding", *, unit: str = " items", quiet: bool = False) -> Iterator[Show]:
    """Show on the terminal how far a build or a copy is."""
    with tqdm(desc=what, unit=unit, dynamic_ncols=True, disable=quiet) as bar, logging_redirect_tqdm():

        def show(done: int, total: int, what: str = what) -> None:
            bar.desc, bar.total = what, total
            bar.update(done - bar.n)

        yield show


def _sum_up(out: str, gallery: Gallery, report: BuildReport, max_length: int) -> int:
    metadata = gallery.metadata
    print(f"{out}: {len(gallery.pictures)} pictures and {len(gallery.captions)} captions, by {metadata.model}.")
    for kind in ("pictures", "captions"):
        print(f"  {kind}: {report.encoded[kind]} encoded, {report.reused[kind]} reused")
    print(f"  match probabilities: {metadata.judged_by or 'not calibrated'}")
    for line in [*describe_issues(report.reading), *describe_truncated(report.cut, max_length)]:
        print(f"  {line}")
    if report.held:
        print(f"  not readable now, kept as they were: {len(report.held):,} ({join_first(report.held)})")
    print(f"  skipped: {len(report.skipped)}{', named above' if report.skipped else ''}")
    if report.is_complete:
        return 0
    print(f"{out} is not complete: run the same command again once all of it can be read.", file=sys.stderr)
    return 1
