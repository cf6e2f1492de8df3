"""Floor 2, the encoder: load, compose, run and save a dual encoder of any family behind one interface.

Place in the flow: `preprocess -> model (here) -> similarity`, and the model that `train` improves. `DualEncoder` is the
interface and chooses a back end for each side: `torch_tower`, `openvino` or `zerogpu`. To add one, write a `Tower` and
let `DualEncoder.tower` choose it.
"""

from alignment.model.dual_encoder import DualEncoder, best_device, find_device
from alignment.model.zerogpu import chunk_size

__all__ = ["DualEncoder", "best_device", "chunk_size", "find_device"]
