"""Floor 2, the data: read an annotated data set as images with their captions.

Place in the flow: `data set -> read_pairs (here) -> train, evaluate, gallery`. The format is found from the path:

| format      | what it is |
|-------------|------------|
| `karpathy`  | `dataset_{flickr8k,flickr30k,coco}.json` with its splits (`restval` counts as train) |
| `flickr8k`  | `Flickr8k.token.txt` with the lists `Flickr_8k.{train,dev,test}Images.txt` beside it |
| `flickr30k` | `results_20130124.token`, or `results.csv` parted by bars; lists `{train,val,test}.txt` if beside it |
| `coco`      | `captions_{train,val}{2014,2017}.json` |
| `jsonl`     | JSON lines (or one JSON list) with a column for the image and one or more for its captions |
| `csv`       | the same as CSV or TSV with a header; Kaggle's `captions.txt` too |
| `folder`    | pictures, captioned by a `metadata.csv` or `metadata.jsonl` if there is one (the Hub's imagefolder) |
| `hub`       | OWNER/NAME or OWNER/NAME@REVISION of a data set on the Hugging Face Hub (the extra `hub`) |

A reader a format, listed in `_FORMATS`, only says what is written; `_Collection` decides what of it counts.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignment.preprocess import MAX_CAPTION_CHARS, InputError, clean_caption

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "image_name", "filepath", "path", "img")
CAPTION_COLUMNS = ("caption", "sentence", "raw", "text", "title", "description", "comment")
ID_COLUMNS = ("id", "image_id", "img_id", "imgid", "cocoid")

_PICTURES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm"}
_OTHER_PICTURES = {".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw"}
_SPLITS = {"train": "train", "training": "train", "restval": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("dev", "val", "valid", "validation"), "dev")
_SPLIT_IN_NAME = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])")
_SPLIT_LIST = re.compile(r"(?:flickr_?\d+k[._])?(train|dev|val|test)(?:images)?\.txt", re.IGNORECASE)
# Folders that hold only annotations; the data set, pictures and all, is the folder around them.
_ANNOTATION_FOLDERS = {"annotations", "flickr8k_text", "karpathy", "caption_datasets"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class Pair:
    """An image with the captions that describe it.

    Attributes:
        image: absolute path.
        captions: cleaned, in the order written; none if the data set has none for this picture.
        split: "train", "dev", "test", another name the data set uses, or "".
        id: what the data set calls the image, else its path below the data set's folder.
    """

    image: str
    captions: tuple[str, ...]
    split: str = ""
    id: str = ""


def read_pairs(source: str | os.PathLike[str], *, format: str | None = None, split: str | None = None) -> list[Pair]:
    """Read the pictures of a data set, each once, with all captions that belong to it.

    Missing pictures, empty captions and unreadable lines are left out, counted, and logged as one summary. A picture
    named without its folder is looked for up to two folders deep. Names never lead out of the data set's folder by
    ".."; absolute paths count only in a CSV or JSON-lines file of one's own.

    Args:
        source: folder, annotation file, or Hub id.
        format: a name from the module's table, where the found one is wrong.
        split: keep only this one; "val" and "dev" mean the same.

    Returns:
        One entry per image, in the order of the data set.

    Raises:
        FileNotFoundError: when there is no such folder, file or Hub data set.
        ValueError: when the format is unknown, the annotations cannot be read, or no picture is left.
    """
    name, files = _detect(Path(source), format)
    collection = _Collection(_root_of(Path(source)), _canonical(split or ""), absolute=name in ("csv", "jsonl"))
    for file in files:
        try:
            for row in _FORMATS[name].read(file, collection):
                collection.add(row)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file} cannot be read as {name} ({type(error).__name__}: {error}); "
                "check that it is complete and saved as UTF-8, or name another format."
            ) from error
    return collection.pairs(f"{source} ({name})")


def positives_of(pairs: Sequence[Pair]) -> tuple[Tensor, list[str]]:
    """Lay the captions out flat and say which belong to which image.

    Args:
        pairs: images in the order of the rows; one without captions is a row without a positive.

    Returns:
        Bool (num_images, num_texts), and the num_texts captions, image by image.
    """
    texts = [caption for pair in pairs for caption in pair.captions]
    owners = torch.repeat_interleave(torch.tensor([len(pair.captions) for pair in pairs], dtype=torch.long))
    return owners == torch.arange(len(pairs))[:, None], texts


# ---------------------------------------------------------------- what a reader says, and what of it counts


class _Row(NamedTuple):
    """What one annotation says, unchecked."""

    image: str | Path  # a name to look up, or the path of a file already found
    captions: Sequence[str] = ()
    split: str = ""
    id: str = ""
    folder: Path | None = None  # where the name starts from, if not at the data set's folder


class _Collection:
    """The pictures found so far, each with its rows, and what was left out."""

    def __init__(self, root: Path, wanted: str, *, absolute: bool) -> None:
        self.root = os.fspath(root)
        self.wanted = wanted
        self.absolute = absolute
        self.rows: dict[str, list[_Row]] = {}
        self.splits: set[str] = set()
        self.skipped: defaultdict[str, list[str]] = defaultdict(list)
        self._found: dict[tuple[str | Path, Path | None], str | None] = {}
        self._folders: list[Path] | None = None

    def skip(self, reason: str, what: object) -> None:
        """Note what was left out, and why."""
        self.skipped[reason].append(str(what))

    def add(self, row: _Row) -> None:
        """Take a row in, if it is of the split asked for and its picture is there."""
        row = row._replace(split=_canonical(row.split))
        self.splits.add(row.split)
        if self.wanted in ("", row.split):
            key = (row.image, row.folder)
            if key not in self._found:
                self._found[key] = self._find(row)
            if path := self._found[key]:
                self.rows.setdefault(path, []).append(row)

    def pairs(self, title: str) -> list[Pair]:
        """Merge the rows of each picture and log what happened."""
        pairs = [self._merge(path, rows) for path, rows in self.rows.items()]
        left_out = "; ".join(
            f"{len(what)} {reason} ({', '.join(what[:3])}{', ...' if len(what) > 3 else ''})"
            for reason, what in self.skipped.items()
        )
        if not pairs:
            asked = f" of split {self.wanted!r}; its splits are {sorted(self.splits)}" if self.wanted else ""
            reason = f"; left out: {left_out}" if left_out else ""
            raise ValueError(f"{title} has no pictures{asked}{reason}. Check the path, the format and the split.")
        logger.info("%s: %d pictures, %d captions.", title, len(pairs), sum(len(pair.captions) for pair in pairs))
        if left_out:
            logger.warning("%s: left out %s.", title, left_out)
        return pairs

    def _merge(self, path: str, rows: list[_Row]) -> Pair:
        captions = tuple(caption for row in rows for text in row.captions if (caption := self._clean(text, path)))
        split = next((row.split for row in rows if row.split), "")
        name = Path(path).relative_to(self.root).as_posix() if self._holds(path) else path
        return Pair(path, captions, split, next((row.id for row in rows if row.id), name))

    def _clean(self, text: str, path: str) -> str:
        """Tidy one caption; no text tower reads as far as a long one is cut here."""
        if len(text) > MAX_CAPTION_CHARS:
            self.skip("ends of very long captions", os.path.basename(path))
        try:
            return clean_caption(text[:MAX_CAPTION_CHARS])
        except InputError:
            self.skip("empty captions", os.path.basename(path))
            return ""

    def _find(self, row: _Row) -> str | None:
        """Find the picture a row names: beside its annotation, in the data set's folder, or below that."""
        if isinstance(row.image, Path):
            return os.path.abspath(row.image)
        name = row.image.strip().replace("\\", "/")
        if os.path.isabs(name):
            paths = [name] if self.absolute else []
        else:
            starts = [row.folder or self.root, self.root]
            paths = [os.path.abspath(os.path.join(start, name)) for start in starts]
            paths = [path for path in paths if self._holds(path)]
        if not paths:
            self.skip("paths outside the data set" if name else "lines without a picture", row.image or row.captions)
            return None
        found = next(filter(os.path.isfile, paths), None) or self._search(os.path.normpath(name))
        if found is None:
            self.skip("missing pictures", row.image)
        return found

    def _search(self, name: str) -> str | None:
        """Look two folders deep for a picture that is named without its folder."""
        if name.startswith("..") or os.path.isabs(name):
            return None
        if self._folders is None:
            self._folders = _near(Path(self.root), "*/")
        return next(filter(os.path.isfile, (os.path.join(folder, name) for folder in self._folders)), None)

    def _holds(self, path: str) -> bool:
        return path.startswith(os.path.join(self.root, ""))


def _canonical(split: str) -> str:
    split = split.strip().lower()
    return _SPLITS.get(split, split)


# ---------------------------------------------------------------- finding the format


def _detect(source: Path, format: str | None) -> tuple[str, list[Path]]:
    """Name the format, and the annotation files to read."""
    if format is not None and format not in _FORMATS:
        raise ValueError(f"Unknown format {format!r}; choose one of {', '.join(_FORMATS)}.")
    if format == "hub" or (format and source.is_file()):
        return format, [source]
    for name in [format] if format else _FORMATS:
        files = _FORMATS[name].detect(source)
        if len(files) > 1 and not all(_split_of(file) for file in files):
            listed = ", ".join(str(file.relative_to(source)) for file in files)
            raise ValueError(f"{source} holds several {name} annotation files ({listed}); give the path of one.")
        if files:
            return name, files
    if not source.exists():
        raise FileNotFoundError(
            f"There is no {source}; give a folder, an annotation file, or OWNER/NAME of a Hugging Face data set."
        )
    raise ValueError(f"{source} holds nothing to read as {format or 'pairs'}; formats are {', '.join(_FORMATS)}.")


def _root_of(source: Path) -> Path:
    """Find the data set's folder: around an annotation file, and around a folder of nothing but annotations."""
    folder = Path(os.path.abspath(source if source.is_dir() else source.parent))
    return folder.parent if folder.name.lower() in _ANNOTATION_FOLDERS else folder


def _near(folder: Path, *patterns: str) -> list[Path]:
    """Find files (or, by a pattern that ends in a slash, folders) up to two deep, in alphabetical order."""
    found = {path for pattern in patterns for deep in (pattern, f"*/{pattern}") for path in folder.glob(deep)}
    return sorted(path for path in found if not any(map(_is_hidden, path.relative_to(folder).parts)))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _named(*patterns: str, fits: Callable[[Path], bool]) -> Callable[[Path], list[Path]]:
    """Detect a file by what is in it, or those of a folder by their usual names too."""

    def detect(source: Path) -> list[Path]:
        files = [source] if source.is_file() else _near(source, *patterns)
        return [file for file in files if fits(file)]

    return detect


def _tables(*suffixes: str) -> Callable[[Path], list[Path]]:
    """Detect a table by its ending, or those at the top of a folder that have an image and a caption column."""

    def fits(file: Path) -> bool:
        try:
            columns = _columns(tuple(next(_records(file), {})))
        except (ValueError, TypeError, csv.Error):
            return False
        return columns.image is not None and bool(columns.captions)

    def detect(source: Path) -> list[Path]:
        if source.is_file():
            return [source] if source.suffix.lower() in suffixes else []
        # A folder's metadata belongs to its pictures, and a .json there can be anything of any size.
        files = [file for suffix in suffixes if suffix != ".json" for file in sorted(source.glob(f"*{suffix}"))]
        return [file for file in files if file.stem != "metadata" and not _is_hidden(file.name) and fits(file)]

    return detect


def _begins(file: Path) -> str:
    """Read enough of a file to tell one layout from another."""
    with file.open(encoding="utf-8-sig", errors="replace") as handle:
        return handle.read(65536).lstrip()


def _is_karpathy(file: Path) -> bool:
    return file.suffix.lower() == ".json" and _begins(file).startswith("{") and '"sentences"' in _begins(file)


def _is_coco(file: Path) -> bool:
    return file.suffix.lower() == ".json" and bool(re.match(r"\{.*\"(images|annotations)\"", _begins(file), re.DOTALL))


def _is_flickr8k(file: Path) -> bool:
    return file.name == "Flickr8k.token.txt"


def _is_flickr30k(file: Path) -> bool:
    return file.suffix == ".token" or (file.suffix == ".csv" and _begins(file).startswith("image_name|"))


def _split_of(file: Path) -> str:
    """Read the split off a name such as `captions_val2017.json` or `train.csv`; "" if there is none in it."""
    found = _SPLIT_IN_NAME.search(file.stem.lower())
    return found[1] if found else ""


# ---------------------------------------------------------------- readers: one a format


def _read_karpathy(file: Path, into: _Collection) -> Iterator[_Row]:
    for image in json.loads(file.read_text(encoding="utf-8-sig"))["images"]:
        name = "/".join(filter(None, [image.get("filepath"), image["filename"]]))
        captions = [sentence["raw"] for sentence in image["sentences"]]
        yield _Row(name, captions, image.get("split", ""), str(image.get("cocoid", image.get("imgid", ""))))


def _read_coco(file: Path, into: _Collection) -> Iterator[_Row]:
    data = json.loads(file.read_text(encoding="utf-8-sig"))
    captions = defaultdict(list)
    for annotation in data["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in data["images"]:
        yield _Row(image["file_name"], captions[image["id"]], _split_of(file), str(image["id"]))


def _read_flickr(file: Path, into: _Collection) -> Iterator[_Row]:
    """Read `name#number<tab>caption` lines."""
    splits = _split_lists(file.parent)
    for line in file.read_text(encoding="utf-8-sig").split("\n"):
        if found := re.fullmatch(r"(.+?)(?:#\d+)?\t(.*)", line):
            yield _Row(found[1], [found[2]], splits.get(Path(found[1]).stem, ""), found[1])
        elif line.strip():
            into.skip("unreadable lines", line[:40])


def _read_flickr30k(file: Path, into: _Collection) -> Iterator[_Row]:
    """Read the token file, or `name| number| caption` lines below a header."""
    if file.suffix == ".token":
        yield from _read_flickr(file, into)
        return
    splits = _split_lists(file.parent)
    for line in file.read_text(encoding="utf-8-sig").split("\n")[1:]:
        # One line of the published file lacks the second bar: "2199200615.jpg| 4   A dog runs ...".
        if found := re.fullmatch(r"([^|]+)\|\s*\d+(?:\s*\||\s)(.*)", line):
            yield _Row(found[1], [found[2]], splits.get(Path(found[1]).stem, ""), found[1])
        elif line.strip():
            into.skip("unreadable lines", line[:40])


def _split_lists(folder: Path) -> dict[str, str]:
    """Map the pictures listed in files such as `Flickr_8k.devImages.txt`, without their endings, to the split."""
    lists = ((file, _SPLIT_LIST.fullmatch(file.name)) for file in sorted(folder.glob("*.txt")))
    return {
        name.removesuffix(".jpg"): listed[1]
        for file, listed in lists
        if listed
        for name in file.read_text(encoding="utf-8-sig").split()
    }


def _read_table(file: Path, into: _Collection) -> Iterator[_Row]:
    for row in _table_rows(file, into):
        yield row._replace(split=row.split or _split_of(file))


def _read_folder(folder: Path, into: _Collection) -> Iterator[_Row]:
    """Read the metadata files anywhere below, then list the pictures; a folder named like a split is one."""
    pictures = []
    for file in _walk(folder):
        split = next((part for part in file.relative_to(folder).parts[:-1] if part.lower() in _SPLITS), "")
        if file.name in ("metadata.csv", "metadata.jsonl"):
            for row in _table_rows(file, into):
                yield row._replace(split=row.split or split)
        elif file.suffix.lower() in _PICTURES:
            pictures.append(_Row(file, split=split))
        elif file.suffix.lower() in _OTHER_PICTURES:
            into.skip("pictures of a kind not read here", file.name)
    yield from pictures


def _walk(folder: Path) -> Iterator[Path]:
    """List files in alphabetical order, through linked folders too, but each folder once."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        yield from (Path(parent, name) for name in sorted(files) if not _is_hidden(name))


def _read_hub(source: Path, into: _Collection) -> Iterator[_Row]:
    """Read a data set of the Hub; its pictures are written out beside the library's own cache."""
    name, _, revision = source.as_posix().partition("@")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"There is no {name} here, so it is taken for a data set on the Hugging Face Hub; reading one needs the "
            "library `datasets`: install this project with its extra `hub` (pip install '.[hub]')."
        ) from error
    try:
        names = datasets.get_dataset_split_names(name, revision=revision or None)
        chosen = [split for split in names if _canonical(split) == into.wanted] or names
        tables = {split: datasets.load_dataset(name, revision=revision or None, split=split) for split in chosen}
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no {name} here, and the Hugging Face Hub did not provide a data set of that name "
            f"({type(error).__name__}: {error}); check the spelling and the network."
        ) from error
    store = Path(datasets.config.HF_DATASETS_CACHE, "alignment", name.replace("/", "___"))
    for split, table in tables.items():
        column = _columns(tuple(table.column_names)).image
        if column is None:
            raise ValueError(f"None of the columns {table.column_names} of {name} names an image; choose another.")
        for record in table.cast_column(column, datasets.Image(decode=False)):
            row, image = _row_of(record), _stored(record[column], store)
            yield row._replace(image=image, split=row.split or split, id=row.id or Path(image).stem)


def _stored(cell: Mapping[str, Any] | None, store: Path) -> str | Path:
    """Write a picture under the hash of its bytes, so that one repeated for each caption is one picture."""
    if not cell or cell["bytes"] is None:
        path = Path(cell["path"] or "") if cell else Path()
        return path if path.is_file() else ""
    ending = Path(cell["path"] or "").suffix.lower() or ".jpg"
    file = store / f"{hashlib.sha256(cell['bytes']).hexdigest()}{ending}"
    if not file.exists():
        store.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_bytes(cell["bytes"])
        partial.replace(file)
    return file


# ---------------------------------------------------------------- tables


class _Columns(NamedTuple):
    """Which columns of a table mean what."""

    image: str | None
    captions: tuple[str, ...]
    split: str | None
    id: str | None


@lru_cache(maxsize=64)
def _columns(names: tuple[str, ...]) -> _Columns:
    """Find the columns by their usual names; of several kinds of caption the first in `CAPTION_COLUMNS` counts.

    All columns of that kind do: `caption` and `captions`, `caption_1` to `caption_5`, `caption_en` and `caption_zh`.
    """
    known = {name.strip().lower(): name for name in reversed(names)}

    def first(usual: Iterable[str]) -> str | None:
        return next((known[name] for name in usual if name in known), None)

    kinds = (re.compile(rf"\s*{kind}s?([_ -]?(\d+|[a-z]{{2}}))?\s*", re.IGNORECASE) for kind in CAPTION_COLUMNS)
    captions = (tuple(filter(kind.fullmatch, names)) for kind in kinds)
    return _Columns(first(IMAGE_COLUMNS), next(filter(None, captions), ()), first(["split"]), first(ID_COLUMNS))


def _table_rows(file: Path, into: _Collection) -> Iterator[_Row]:
    """Read the lines of a table that name an image."""
    for record in _records(file, into.skip):
        if _columns(tuple(record)).image is None:
            into.skip(f"lines whose columns {list(record)} name no image", file.name)
        else:
            yield _row_of(record)._replace(folder=file.parent)


def _row_of(record: Mapping[str, Any]) -> _Row:
    """Read one line of a table."""
    columns = _columns(tuple(record))
    image, split, identity = (record[name] if name else "" for name in (columns.image, columns.split, columns.id))
    captions = [text for name in columns.captions for text in _texts(record[name])]
    identity = "" if identity is None else str(identity)
    return _Row(image if isinstance(image, str) else "", captions, str(split or ""), identity)


def _texts(value: object) -> list[str]:
    """Flatten what a caption column holds: a text, a list of them (as JSON too), or Karpathy's sentences."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(json.JSONDecodeError):  # else it is a caption that begins with a bracket
            value = json.loads(value)
    if isinstance(value, Mapping):
        value = next((value[name] for name in CAPTION_COLUMNS if name in value), None)
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return [value if isinstance(value, str) else ""]


def _records(file: Path, skip: Callable[[str, object], None] = lambda reason, what: None) -> Iterator[dict[str, Any]]:
    """Read a table, line by line, as column name -> value."""
    if file.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return _json_records(file, skip)
    return _csv_records(file)


def _json_records(file: Path, skip: Callable[[str, object], None]) -> Iterator[dict[str, Any]]:
    """Read one object a line, or a single list of objects."""
    if _begins(file).startswith("["):
        yield from json.loads(file.read_text(encoding="utf-8-sig"))
        return
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            record: object = {}
            with suppress(json.JSONDecodeError):
                record = json.loads(line) if line.strip() else None
            if isinstance(record, dict) and record:
                yield record
            elif record is not None:
                skip("unreadable lines", f"{file.name}:{number}")


def _csv_records(file: Path) -> Iterator[dict[str, Any]]:
    """Read a table with a header, parted by comma, tab, semicolon or bar, whichever gives most columns."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        header = lines.readline()
        delimiter = max(",\t;|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
        lines.seek(0)
        rows = csv.reader(lines, delimiter=delimiter)
        names: list[str] = []
        for name in next(rows, []):  # two columns may go by one name
            names.append(f"{name}_{len(names)}" if name in names else name)
        for row in filter(any, rows):
            while len(row) > len(names) and not row[-1]:
                row.pop()
            if len(row) > len(names):  # commas in a caption without quotes, which comes last
                row[len(names) - 1 :] = [delimiter.join(row[len(names) - 1 :])]
            yield dict(zip(names, row + [""] * (len(names) - len(row)), strict=True))


# ---------------------------------------------------------------- registry


class _Format(NamedTuple):
    """How to recognise a format, giving the files to read, and how to read one of them."""

    detect: Callable[[Path], list[Path]]
    read: Callable[[Path, _Collection], Iterator[_Row]]


def _hub_id(source: Path) -> list[Path]:
    return [source] if not source.exists() and _HUB_ID.fullmatch(source.as_posix()) else []


_FORMATS: dict[str, _Format] = {
    "karpathy": _Format(_named("dataset*.json", fits=_is_karpathy), _read_karpathy),
    "flickr8k": _Format(_named("Flickr8k.token.txt", fits=_is_flickr8k), _read_flickr),
    "flickr30k": _Format(_named("results_20130124.token", "results.csv", fits=_is_flickr30k), _read_flickr30k),
    "coco": _Format(_named("captions*.json", fits=_is_coco), _read_coco),
    "jsonl": _Format(_tables(".jsonl", ".ndjson", ".json"), _read_table),
    "csv": _Format(_tables(".csv", ".tsv", ".txt"), _read_table),
    "folder": _Format(lambda source: [source] if source.is_dir() else [], _read_folder),
    "hub": _Format(_hub_id, _read_hub),
}
