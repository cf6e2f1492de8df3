"""Recognise files that are probably meant as captions but are of a kind that is not read, and say what to do."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from alignment.data.files import ARCHIVE_SUFFIXES, TEXT_SUFFIXES
from alignment.data.image_index import ImageIndex
from alignment.preprocess import sanitize_text

_SPREADSHEETS = {".xlsx", ".ods", ".xls", ".xlsm", ".numbers"}
_OTHERS = {
    *("", ".dat", ".data", ".tab", ".psv", ".bak", ".rtf", ".odt", ".html", ".md", ".doc", ".docx", ".pdf", ".xml"),
    *(".yaml", ".yml", ".arrow", ".feather", ".pkl", ".pickle", ".h5", ".hdf5", ".npy", ".npz", ".mat"),
    *(".db", ".sqlite", ".lmdb", ".tfrecord"),
}
_CAPTIONS_NAME = re.compile(r"caption|metadata|annotation|descri(be|pt)|sentences")
_IMAGE_NAME = re.compile(rb"\.(jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)
_MAX_BYTES = 64 * 2**20


def may_be_captions(file: Path, index: ImageIndex) -> bool:
    """Tell whether a file is named like captions, or is a spreadsheet that names pictures."""
    suffix = file.suffix.lower()
    if suffix in ARCHIVE_SUFFIXES:  # COCO's archives of annotations often lie beside what they contain
        return Path(file.stem).suffix.lower() in TEXT_SUFFIXES or "caption" in file.stem.lower()
    if suffix in _SPREADSHEETS | _OTHERS and _CAPTIONS_NAME.search(file.stem.lower()):
        return bool(index.paths)
    return suffix in _SPREADSHEETS and _names_images(file)


def explain_unsupported(file: Path) -> str:
    """Say what to do with a file of a kind that is not read."""
    if file.suffix.lower() in _SPREADSHEETS:
        return "a spreadsheet; save it as CSV (UTF-8), with the columns image and caption"
    if file.suffix.lower() in ARCHIVE_SUFFIXES:
        return "it has to be unpacked first"
    ending = f"that end in {sanitize_text(file.suffix.lower(), 20)}" if file.suffix else "without an ending"
    return f"files {ending} are not read as captions; save it as CSV with the columns image and caption"


def _names_images(file: Path) -> bool:  # a zip file of XML, or the older binary format
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as sheet:
                members = [entry for entry in sheet.infolist() if entry.filename.endswith(".xml")]
                return any(_IMAGE_NAME.search(sheet.read(entry)) for entry in members if entry.file_size < _MAX_BYTES)
        with file.open("rb") as handle:
            return bool(_IMAGE_NAME.search(handle.read(_MAX_BYTES).replace(b"\0", b"")))
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        return False
