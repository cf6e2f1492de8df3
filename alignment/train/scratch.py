"""A small dual encoder with random weights: a ViT and a BERT, its vocabulary learnt from the captions.

Place in the flow: where `run` starts if there is no model to start from. For teaching and for trying things out; with a
few thousand pictures it learns colours and scenes, not what a pretrained tower knows.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer
from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTImageProcessorPil, ViTModel

from alignment.model import DualEncoder
from alignment.model.composition import ComposedConfig, ComposedModel
from alignment.preprocess import Preprocessor, TokenizerSpec

SIZES = {  # side of a picture, of its patches; width, depth and heads of both towers
    "tiny": {"image_size": 64, "patch_size": 8, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3},
    "small": {
        "image_size": 112,
        "patch_size": 16,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    },
}
MAX_TOKENS = 64
VOCABULARY = 8000


def build_scratch(captions: Iterable[str], size: str = "small", *, device: str | None = None) -> DualEncoder:
    """Build the model; call `torch.manual_seed` first to have the same one again.

    Args:
        captions: texts that the vocabulary is learnt from.
        size: a key of SIZES.
        device: as for `DualEncoder.load`.
    """
    image, patch, width = (SIZES[size][name] for name in ("image_size", "patch_size", "hidden_size"))
    shape = {name: SIZES[size][name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    tokenizer = learn_tokenizer(captions)
    # With poolers, though the tokens' mean is used: that is how the towers are built when the model is loaded again.
    vision = ViTModel(ViTConfig(**shape, intermediate_size=4 * width, image_size=image, patch_size=patch))
    text = BertModel(
        BertConfig(**shape, intermediate_size=4 * width, vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS)
    )
    config = ComposedConfig(
        vision_config=vision.config.to_dict(),  # a copy: the new config resets what it is given, attention masks too
        text_config=text.config.to_dict(),
        projection_dim=width,
        vision_pooling="mean",
        text_pooling="mean",
        vision_width=width,
        text_width=width,
    )
    processor = ViTImageProcessorPil(size={"height": image, "width": image})
    preprocessor = Preprocessor(processor, tokenizer, TokenizerSpec(positions=MAX_TOKENS))
    return DualEncoder(ComposedModel(config, vision, text), preprocessor, name=f"scratch-{size}", device=device)


def learn_tokenizer(captions: Iterable[str]) -> BertTokenizer:
    """Learn a lower-case WordPiece vocabulary; every Chinese character is a word of its own."""
    learner = Tokenizer(WordPiece(unk_token="[UNK]"))
    learner.normalizer = BertNormalizer(lowercase=True)
    learner.pre_tokenizer = BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    learner.train_from_iterator(
        captions, WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    )
    return BertTokenizer(vocab=learner.get_vocab(), model_max_length=MAX_TOKENS)
