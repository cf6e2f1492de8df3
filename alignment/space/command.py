"""The command `python -m alignment.space`."""

import argparse
import sys
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from alignment.bundled import GALLERY, MODEL, ROOT, bundled
from alignment.hub import check_login
from alignment.space.checks import LARGE, check_folder, check_variables, private_paths
from alignment.space.folder import TITLE, Space, choose_model, contents, stage
from alignment.space.publish import AGAIN, check_name, publish

_HELP = """\
Put the app on a Hugging Face Space, with a gallery and a model, or bring a Space up to date.

Sent are the app, a public copy of the gallery (thumbnails, captions and embeddings; never your originals) and a model
that lies in a folder. A model of the Hub is fetched by the Space itself, at the commit that lies on this machine.
Files that the Space no longer needs are deleted there; your own variables and secrets stay.
"""
_EXAMPLES = """\
examples:
  python -m alignment.space publish USER/NAME --dry-run        say what would be sent, and send nothing
  python -m alignment.space publish USER/NAME --export look    write it to the folder `look`, and send nothing
  hf auth login
  python -m alignment.space publish USER/NAME

  python -m alignment.gallery build PHOTOS --out my_gallery --model google/siglip2-base-patch16-224
  python -m alignment.space publish USER/NAME --model google/siglip2-base-patch16-224 --gallery my_gallery
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        _publish(args)
    except KeyboardInterrupt:
        print("\nInterrupted; publish again to finish.", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:  # mistakes in the command, which the message says how to correct
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Build the command line parser."""
    parser = argparse.ArgumentParser(prog="python -m alignment.space", description="Put the app on a Space.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    form = argparse.RawDescriptionHelpFormatter
    short = "create or update a Space (publish --help says more)"
    command = commands.add_parser("publish", help=short, description=_HELP, epilog=_EXAMPLES, formatter_class=form)
    add = command.add_argument
    add("name", metavar="USER/NAME", help="the Space, new or to be brought up to date")
    add("--model", type=expanduser, default=bundled(MODEL), metavar="PATH_OR_HUB_ID",
        help="what it runs (default: %(default)s)")  # fmt: skip
    add("--revision", help="branch, tag or commit of a model on the Hub (default: what was fetched last)")
    add("--gallery", type=expanduser, default=bundled(GALLERY), metavar="DIR",
        help="what it searches (default: %(default)s)")  # fmt: skip
    add("--hardware", help="ask for it, such as cpu-basic, zero-a10g (ZeroGPU) or t4-small; some of it is paid for")
    add("--title", default=TITLE, help="shown on the Space's card (default: %(default)s)")
    add("--private", action="store_true", help="create it for your own eyes; one that exists stays as it is")
    add("--variable", action="append", default=[], metavar="NAME=VALUE",
        help="set one more variable, such as ALIGNMENT_LANG=zh; may be repeated; everybody may read it")  # fmt: skip
    add("--replace", action="store_true", help="overwrite another app that runs under this name")
    add("--dry-run", action="store_true", help="say what would be sent; needs neither a token nor the network")
    add("--export", type=expanduser, metavar="DIR",
        help="write what would be sent to a new folder, to look at it and to try it")  # fmt: skip
    return parser


def _publish(args: argparse.Namespace) -> None:
    check_name(args.name)
    gallery = Path(args.gallery)
    own_gallery = None if gallery.resolve() == (ROOT / GALLERY).resolve() else gallery
    model, more = choose_model(args.model, args.revision), _variables(args.variable)
    space = Space(args.name, model, own_gallery, args.title, args.hardware, more)
    check_variables(space.variables)
    local = args.dry_run or args.export
    if not local:
        check_login(HfApi(), AGAIN)
    export = _new_folder(args.export) if args.export else None
    # An export is staged beside its place and renamed after the checks have passed.
    with TemporaryDirectory(prefix=".alignment-space-", dir=export and export.parent) as scratch:
        folder = Path(scratch, "space")
        note = stage(space, folder)
        own = [] if model.revision else [model.folder]
        check_folder(folder, private_paths(Path.home(), Path.cwd(), ROOT, gallery, folder, *own))
        if export:
            folder = folder.replace(export)
        if local:
            _show(space, folder, note, args.export)
            return
        if note:
            print(note)
        sent = publish(space, folder, private=args.private, replace=args.replace)
    print(f"{'Created' if sent.created else 'Updated'} {sent.url}")
    for title, names in (("Variables set", sent.variables), ("Files deleted", sent.deleted)):
        if names:
            print(f"  {title}: {', '.join(names)}")


def _new_folder(name: str) -> Path:
    folder = Path(name)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if folder.exists():
        raise ValueError(f"{folder} is not empty: name a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _variables(words: Sequence[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word!r} is no variable: write NAME=VALUE.")
    return dict(word.split("=", 1) for word in words)


def _show(space: Space, folder: Path, note: str, export: str | None) -> None:
    files = contents(folder)
    for name, size in files.items():
        large = "  (to the store for large files)" if size > LARGE else ""
        print(f"{size:>12,}  {name}{large}")
    print(f"{sum(files.values()):>12,}  bytes in {len(files):,} files\n")
    print((folder / "README.md").read_text("utf-8").split("\n---\n")[0] + "\n---\n")
    print("Variables:")
    for name, value in space.variables.items():
        print(f"  {name}={value}")
    print(f"Hardware: {space.hardware or 'as the Hub gives it'}")
    if note:
        print(note)
    settings = " ".join(f"{name}={value}" for name, value in space.variables.items() if name.startswith("ALIGNMENT_"))
    print(f"Nothing was sent. Try it: cd {export} && {settings} python app.py" if export else "Nothing was sent.")
