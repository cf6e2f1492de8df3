"""Read data sets of the Hugging Face Hub through its library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment.data.collector import Collector, RawAnnotation
from alignment.data.columns import find_columns
from alignment.data.files import canonical_split
from alignment.data.image_store import store_image
from alignment.data.records import read_record
from alignment.preprocess import join_first


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
            row, image = read_record(record), _read_image(record[column], folder)
            yield row._replace(image=image, split=row.split or split, id=row.id or Path(image).stem)


def _read_image(cell: Mapping[str, Any] | None, folder: Path) -> str | Path:
    """Return the path of a cell's picture, whose bytes are written to `folder`; "" if there is none."""
    path = Path(cell["path"] or "") if cell else Path()
    if cell and cell["bytes"] is not None:
        return store_image(cell["bytes"], path.suffix, folder)
    return path if path.is_file() else ""
