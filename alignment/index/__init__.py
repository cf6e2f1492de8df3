"""Floor 2, nearest neighbours of an embedding, behind one interface, `VectorIndex`.

Place in the flow: `encode (model) -> nearest candidates (here) -> matches (gallery)`. `local` ranks in one process,
`milvus` asks a Milvus server through `server`.
"""

from alignment.index.local import EXACT_ROWS, FileIndex, LocalIndex
from alignment.index.milvus import MilvusIndex
from alignment.index.server import Server
from alignment.index.vector_index import VectorIndex

__all__ = ["EXACT_ROWS", "FileIndex", "LocalIndex", "MilvusIndex", "Server", "VectorIndex"]
