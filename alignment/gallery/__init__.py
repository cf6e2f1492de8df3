"""Floor 3, the gallery: precompute, persist, stamp and search embeddings.

Place in the flow: `SOURCE -> records (pairs, catalogue) -> embeddings -> gallery (here) -> matches -> engine`. A
gallery knows which model made it and refuses to be searched with the embeddings of another.

    python -m alignment.gallery build SOURCE --out DIR [--model PATH_OR_HUB_ID]
    python -m alignment.gallery check DIR
    python -m alignment.gallery push DIR --index http://host:19530

| module       | what it does |
|--------------|--------------|
| `building`   | embeds what is new of a source into a gallery folder |
| `unfinished` | keeps what a build has embedded so far, for the next one if it is killed |
| `kept`       | embeddings by what they are of, wherever they lie |
| `together`   | lets the processes of a `torchrun` know of each other |
| `looking`    | reads, hashes and decodes pictures in threads, ahead of the model |
| `search`     | finds the pictures of a caption and the captions of a picture |
| `remote`     | where embeddings lie on a Milvus server |
| `pushing`    | moves them there and back |
| `cached`     | galleries that the app makes for itself, in the cache folder |
| `command`    | the command |
"""

from alignment.catalogue import Caption, Picture
from alignment.gallery.building import BuildReport, build_gallery
from alignment.gallery.cached import build_starter, cached_folder, starter_gallery
from alignment.gallery.command import Show, main, progress_bar
from alignment.gallery.looking import THUMBNAIL_PIXELS, is_whole
from alignment.gallery.remote import Remote, add_index_options
from alignment.gallery.search import Found, Gallery, Match

__all__ = [
    "THUMBNAIL_PIXELS",
    "BuildReport",
    "Caption",
    "Found",
    "Gallery",
    "Match",
    "Picture",
    "Remote",
    "Show",
    "add_index_options",
    "build_gallery",
    "build_starter",
    "cached_folder",
    "is_whole",
    "main",
    "progress_bar",
    "starter_gallery",
]
