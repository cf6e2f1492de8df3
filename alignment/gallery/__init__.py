"""Floor 3, the gallery: embed pictures and captions once, store them in one SQLite file, and search them.

Place in the flow: `SOURCE -> records -> embeddings -> gallery.db -> matches -> engine`. A gallery stores which model
made it and refuses to be searched with the embeddings of another.

    python -m alignment.gallery build SOURCE --out DIR [--model PATH_OR_HUB_ID]
    python -m alignment.gallery check DIR
    python -m alignment.gallery push DIR --index http://host:19530
"""

from alignment.gallery.build import BuildReport, build_gallery
from alignment.gallery.command import main, progress_bar
from alignment.gallery.milvus_sync import Remote, add_index_options
from alignment.gallery.records import Caption, Picture
from alignment.gallery.scan import THUMBNAIL_PIXELS
from alignment.gallery.search import Gallery, Match, SearchResult

__all__ = [
    "THUMBNAIL_PIXELS", "BuildReport", "Caption", "Gallery", "Match", "Picture", "Remote", "SearchResult",
    "add_index_options", "build_gallery", "main", "progress_bar",
]  # fmt: skip
