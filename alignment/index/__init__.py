"""Floor 2, nearest neighbours of an embedding, behind one interface.

Place in the flow: `encode (model) -> nearest candidates (here) -> matches (gallery)`.

| module         | what it does |
|----------------|--------------|
| `vector_index` | the interface: `VectorIndex` |
| `local`        | the index of one process, in memory or in a mapped file: `LocalIndex` |
| `exact`        | exact ranking: float32 selects, float64 decides |
| `quantized`    | the mapped file, and candidates by faiss |
| `milvus`       | the index on a Milvus server: `MilvusIndex` |
| `server`       | the connection to that server: `Server` |
"""

from alignment.index.local import EXACT_ROWS, LocalIndex
from alignment.index.milvus import MilvusIndex
from alignment.index.server import Server
from alignment.index.vector_index import VectorIndex

__all__ = ["EXACT_ROWS", "LocalIndex", "MilvusIndex", "Server", "VectorIndex"]
