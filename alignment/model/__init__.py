"""Floor 2, the encoder: load, compose, run and save a dual encoder of any family behind one face.

Place in the flow: `preprocess -> model (here) -> similarity`, and the model that `train` improves.

    encoder      DualEncoder: what everybody talks to
    runtime      the towers as graphs that a CPU runs several times faster than PyTorch does
    lent         many pictures on a GPU that is lent for seconds, as on Hugging Face's ZeroGPU
    graphs       where those graphs are kept from one start to the next
    checkpoints  folders and Hub ids, weights
    devices      which device it runs on
    composition  any two towers as one model; imported when a model is built, not when one is served
"""

from alignment.model.devices import best_device, find_device
from alignment.model.encoder import DualEncoder
from alignment.model.lent import together

__all__ = ["DualEncoder", "best_device", "find_device", "together"]
