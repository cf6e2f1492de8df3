"""Floor 2, the encoder: load, compose, run and save a dual encoder of any family behind one interface.

Place in the flow: `preprocess -> model (here) -> similarity`, and the model that `train` improves.

| module         | what it does |
|----------------|--------------|
| `dual_encoder` | `DualEncoder`, the interface, which chooses a back end for each side |
| `tower`        | what every back end is |
| `torch_tower`  | PyTorch: any family and device, gradients |
| `openvino`     | graphs that a CPU runs several times faster than PyTorch |
| `zerogpu`      | many pictures on a GPU that Hugging Face's ZeroGPU assigns for seconds |
| `module`       | the PyTorch module, built when first needed |
| `graph_cache`  | graphs kept from one start to the next |
| `probes`       | inputs that graphs are checked with |
| `checkpoints`  | folders and Hub ids, weights |
| `devices`      | which device it runs on |
| `composition`  | any two towers as one model; imported when a model is built, not when one is served |

To add a back end, write a `Tower` and let `DualEncoder.tower` choose it.
"""

from alignment.model.devices import best_device, find_device
from alignment.model.dual_encoder import DualEncoder
from alignment.model.zerogpu import chunk_size

__all__ = ["DualEncoder", "best_device", "chunk_size", "find_device"]
