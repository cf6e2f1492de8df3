"""Data sets of the Hugging Face Hub, through its library `datasets`, which only this reader needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment.data.collector import Collection, Row
from alignment.data.columns import columns_of
from alignment.data.files import canonical_split
from alignment.data.image_store import stored
from alignment.data.records import row_of
from alignment.preprocess import join_first


def read_hub(source: Path, into: Collection) -> Iterator[Row]:
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
        chosen = [split for split in names if canonical_split(split) == into.wanted] or names
        tables = {split: datasets.load_dataset(name, revision=revision or None, split=split) for split in chosen}
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no {name} here, and the Hugging Face Hub did not provide a data set of that name "
            f"({type(error).__name__}: {error}); check the spelling and the network."
        ) from error
    store = Path(datasets.config.HF_DATASETS_CACHE, "alignment", name.replace("/", "___"))
    for split, table in tables.items():
        column = columns_of(tuple(table.column_names)).image
        if column is None:
            raise ValueError(f"None of the columns of {name} ({join_first(table.column_names, 9)}) names an image.")
        for record in table.cast_column(column, datasets.Image(decode=False)):
            row, image = row_of(record), _picture(record[column], store)
            yield row._replace(image=image, split=row.split or split, id=row.id or Path(image).stem)


def _picture(cell: Mapping[str, Any] | None, store: Path) -> str | Path:
    """Find the picture of a cell: bytes are written out, a path is taken as it is."""
    if cell and cell["bytes"] is not None:
        return stored(cell["bytes"], Path(cell["path"] or "").suffix, store)
    path = Path(cell["path"] or "") if cell else Path()
    return path if path.is_file() else ""
