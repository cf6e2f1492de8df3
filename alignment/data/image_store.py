"""Write pictures from shards, parquet tables and Hub data sets to disk once, named after the hash of their bytes."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment.atomic import write_file
from alignment.data.collector import Collector, RawAnnotation
from alignment.data.files import canonical_split
from alignment.data.records import UnreadableTable, find_columns, read_record
from alignment.preprocess import join_first


def cache_folder() -> Path:
    """Return $ALIGNMENT_CACHE, else `~/.cache/alignment`."""
    return Path(os.path.abspath(Path(os.environ.get("ALIGNMENT_CACHE") or "~/.cache/alignment").expanduser()))


def store_image(data: bytes, suffix: str, folder: Path) -> Path:
    """Write a picture unless it is there, so that one repeated for each caption is one file."""
    file = folder / f"{hashlib.sha256(data).hexdigest()}{suffix.lower() or '.jpg'}"
    try:
        is_whole = file.stat().st_size == len(data) and file.read_bytes() == data
    except OSError:
        is_whole = False
    if not is_whole:
        write_file(file, data, fsync=False)  # not synced: a file cut off by a crash is found here
    return file


def _has_bytes(cell: object) -> bool:
    return isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes)


def _store_cell(cell: Mapping[str, Any], folder: Path) -> str | Path:
    """Return the path of a cell's picture, whose bytes are written to `folder`; "" if there is none."""
    path = Path(cell.get("path") or "")
    if _has_bytes(cell):
        return store_image(cell["bytes"], path.suffix, folder)
    return path if path.is_file() else ""


def read_parquet(file: Path, collector: Collector) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read the records of a parquet file; pictures in it are written to the image store."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        message = "reading parquet takes pyarrow: pip install '.[hub]', or save it as CSV"
        raise UnreadableTable(message) from error
    if not collector.trusted:
        raise UnreadableTable("parquet is not read here; save it as CSV")
    folder = cache_folder() / "pictures"
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                cells = {name: cell for name, cell in record.items() if _has_bytes(cell)}
                yield file.name, record | {name: _store_cell(cell, folder) for name, cell in cells.items()}
    except ArrowException as error:
        raise UnreadableTable(f"it is damaged: {error}") from error


def read_hub(source: Path, collector: Collector) -> Iterator[RawAnnotation]:
    """Read a data set of the Hub; its pictures are written to a folder in the library's own cache."""
    name, _, revision = source.as_posix().partition("@")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"There is no {name} here, so it is taken for a data set on the Hugging Face Hub; reading one needs the "
            "library `datasets`: install this project with its extra `hub` (pip install '.[hub]')."
        ) from error
    try:
        splits = datasets.get_dataset_split_names(name, revision=revision or None)
        splits = [split for split in splits if canonical_split(split) == collector.split] or splits
        tables = {split: datasets.load_dataset(name, revision=revision or None, split=split) for split in splits}
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no {name} here, and the Hugging Face Hub did not provide a data set of that name "
            f"({type(error).__name__}: {error}); check the spelling and the network."
        ) from error
    folder = Path(datasets.config.HF_DATASETS_CACHE, "alignment", name.replace("/", "___"))
    for split, table in tables.items():
        column = find_columns(tuple(table.column_names)).image
        if column is None:
            raise ValueError(f"None of the columns of {name} ({join_first(table.column_names, 9)}) names an image.")
        for record in table.cast_column(column, datasets.Image(decode=False)):
            row, image = read_record(record), _store_cell(record[column] or {}, folder)
            yield row._replace(image=image, split=row.split or split, id=row.id or Path(image).stem)
