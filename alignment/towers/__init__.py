"""Floor 1, the two towers of the compact model, registered with transformers' Auto classes.

Place in the flow: `model` loads them like any other tower. Each comes in two forms. Plain (`embed_dim` 0), it is the
pretrained network as published: `EfficientNetLiteModel` classifies ImageNet, `NgramTextModel` embeds sentences of
sixteen languages. Aligned (`embed_dim` > 0), its `pooler_output` is the finished unit-norm embedding, two parts side
by side:

    image   sqrt(1 - g) * aligned picture     |  sqrt(g) * what the ImageNet head sees, as a sentence embedding
    text    sqrt(1 - w) * aligned sentence    |  sqrt(w) * the sentence embedding itself

so that one dot product adds what captioned photographs taught to what a thousand class names already knew. The weight
g follows how sure the ImageNet head is; w is one number.
"""

from transformers import AutoConfig, AutoModel

from alignment.towers.heads import AlignmentHead, ResidualMLP, join_parts
from alignment.towers.image import HEAD_CHANNELS, EfficientNetLiteConfig, EfficientNetLiteModel, SameConv, Tail
from alignment.towers.text import NgramTextConfig, NgramTextModel, QuantizedTable

__all__ = [
    "HEAD_CHANNELS", "AlignmentHead", "EfficientNetLiteConfig", "EfficientNetLiteModel", "NgramTextConfig",
    "NgramTextModel", "QuantizedTable", "ResidualMLP", "SameConv", "Tail", "join_parts",
]  # fmt: skip

for _model in (EfficientNetLiteModel, NgramTextModel):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModel.register(_model.config_class, _model, exist_ok=True)
