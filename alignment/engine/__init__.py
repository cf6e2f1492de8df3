"""Floor 4, serving: everything that the page asks of a model and a gallery.

Place in the flow: `upload -> preprocess -> model -> similarity -> matches`, called by `core`. Captions and pictures are
combined by `queries`, batched by `batching`, compared and explained by `matrix`; `photo_folder` and
`photo_zip` read a user's own pictures; `dataset_eval` evaluates an upload, opened by `safe_zip`.
"""

from alignment.engine.core import MAX_PHOTOS, AlignmentEngine, Photos, Skipped, as_webp
from alignment.engine.explanation import Explanation, Scale
from alignment.engine.matrix import Alignment, SecondModel
from alignment.engine.photo_folder import PhotoFolder, Scan
from alignment.engine.queries import MAX_TERMS, Query, Term, parse_query, write_query
from alignment.engine.safe_zip import MAX_ZIP_MB

__all__ = [
    "MAX_PHOTOS", "MAX_TERMS", "MAX_ZIP_MB", "Alignment", "AlignmentEngine", "Explanation", "PhotoFolder", "Photos",
    "Query", "Scale", "Scan", "SecondModel", "Skipped", "Term", "as_webp", "parse_query", "write_query",
]  # fmt: skip
