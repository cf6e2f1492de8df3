"""Floor 2, nearest neighbours of an embedding, behind one face.

Place in the flow: `encode (model) -> nearest candidates (here) -> matches (gallery)`.

| module      | what it does |
|-------------|--------------|
| `face`      | what every index can do: `Index` |
| `embedded`  | the index of this process's own, in memory or in a folder: `EmbeddedIndex` |
| `segment`   | rows that never change, and the search among them |
| `exact`     | ranks rows exactly: float32 finds who may be among the best, float64 decides |
| `codes`     | a first look at many rows, by faiss |
| `tags`      | which rows carry which tag |
| `melting`   | makes one segment of several |
| `files`     | the folder |
| `milvus`    | the index on a Milvus server: `MilvusIndex` |
| `server`    | the way to that server: `Server` |
| `incoming`  | looks at what comes in, for both |
"""

from alignment.index.embedded import EmbeddedIndex
from alignment.index.face import Index
from alignment.index.milvus import MilvusIndex
from alignment.index.segment import EXACT_ROWS
from alignment.index.server import Server

__all__ = ["EXACT_ROWS", "EmbeddedIndex", "Index", "MilvusIndex", "Server"]
