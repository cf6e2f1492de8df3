"""Files that lie beside pictures and may well be meant as their captions, but are of a kind not read here."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from alignment.data.files import ARCHIVES, TEXTS
from alignment.data.image_index import PictureIndex
from alignment.preprocess import sanitize_text

_SHEETS = {".xlsx", ".ods", ".xls", ".xlsm", ".numbers"}
_OTHERS = {".arrow", ".feather", ".pkl", ".pickle", ".h5", ".hdf5", ".npy", ".npz", ".mat", ".xml", ".yaml", ".yml"}
_OTHERS |= {"", ".dat", ".data", ".tab", ".psv", ".bak", ".rtf", ".odt"}
_OTHERS |= {".html", ".md", ".doc", ".docx", ".pdf", ".db", ".sqlite", ".lmdb", ".tfrecord"}
_MEANT = re.compile(r"caption|metadata|annotation|descri(be|pt)|sentences")
_NAMED = re.compile(rb"\.(jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)
_TOLD = 5
_MAX_BYTES = 64 * 2**20


def told_unread(unread: Mapping[str, str]) -> list[str]:
    """Say of the first few files why they could not be read, and how many more there are."""
    lines = [
        f"{sanitize_text(file, 150)}: {sanitize_text(reason, 300)}" for file, reason in islice(unread.items(), _TOLD)
    ]
    return lines + ([f"and {len(unread) - _TOLD:,} more files of captions"] if len(unread) > _TOLD else [])


def could_be_captions(file: Path, index: PictureIndex) -> bool:
    """Whether a file of another kind is called like captions, or is a spreadsheet that names pictures."""
    ending = file.suffix.lower()
    if ending in ARCHIVES:  # one of annotations may well lie there unpacked too, as COCO's does
        return Path(file.stem).suffix.lower() in TEXTS or "caption" in file.stem.lower()
    if ending in _SHEETS | _OTHERS and _MEANT.search(file.stem.lower()):
        return bool(index.paths)
    return ending in _SHEETS and _names_pictures(file)


def why_unread(file: Path) -> str:
    """Say what to do with a file of another kind."""
    if file.suffix.lower() in _SHEETS:
        return "a spreadsheet; save it as CSV (UTF-8), with the columns image and caption"
    if file.suffix.lower() in ARCHIVES:
        return "it has to be unpacked first"
    ending = f"that end in {sanitize_text(file.suffix.lower(), 20)}" if file.suffix else "without an ending"
    return f"files {ending} are not read as captions; save it as CSV with the columns image and caption"


def _names_pictures(file: Path) -> bool:
    """Look into a spreadsheet: a zip file of XML, or one of the older kind, with its texts in one or two bytes each."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as sheet:
                members = [entry for entry in sheet.infolist() if entry.filename.endswith(".xml")]
                return any(_NAMED.search(sheet.read(entry)) for entry in members if entry.file_size < _MAX_BYTES)
        with file.open("rb") as handle:
            return bool(_NAMED.search(handle.read(_MAX_BYTES).replace(b"\0", b"")))
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        return False
