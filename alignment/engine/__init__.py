"""Floor 4, serving: what the page may ask.

Place in the flow: `upload -> preprocess -> model -> similarity -> matches`, strung together here.

| module   | what it does |
|----------|--------------|
| `albums` | a visitor's pictures as a zip, out and in |
| `archives` | zip files, taken for an attack until they are not |
| `batching` | requests that wait, encoded together |
| `core`   | one encoder and one gallery, searched both ways |
| `explaining` | why a picture and a caption match |
| `matrix` | pictures against captions, under one model or two |
| `photo_folder` | a folder of photos, brought up to date while it is searched |
| `photos` | a visitor's own pictures |
| `queries` | captions and pictures composed into one query |
| `trial`  | a visitor's data set, measured |
"""

from alignment.engine.core import AlignmentEngine
from alignment.engine.explanation import Explanation, Scale
from alignment.engine.matrix import Alignment, SecondModel
from alignment.engine.photo_folder import PhotoFolder, Scan
from alignment.engine.photos import MAX_PHOTOS, Photos, Skipped, as_webp
from alignment.engine.queries import MAX_TERMS, Query, Term, parse_query, write_query
from alignment.engine.safe_zip import MAX_ZIP_MB

__all__ = [
    "MAX_PHOTOS",
    "MAX_TERMS",
    "MAX_ZIP_MB",
    "Alignment",
    "AlignmentEngine",
    "Explanation",
    "PhotoFolder",
    "Photos",
    "Query",
    "Scale",
    "Scan",
    "SecondModel",
    "Skipped",
    "Term",
    "as_webp",
    "parse_query",
    "write_query",
]
