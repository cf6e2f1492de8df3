"""The start model: loaded, composed of two towers, or (--scratch) a ViT and a BERT with random weights.

The latter, with a vocabulary learnt from the captions, is for teaching and experiments; from a few thousand pictures it
learns colours and scenes.
"""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer
from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTImageProcessorPil, ViTModel

from alignment.data import Pair
from alignment.model import DualEncoder
from alignment.model.composition import ComposedConfig, ComposedModel
from alignment.preprocess import Preprocessor, TokenizerSpec
from alignment.train.config import ScratchSize, TrainConfig

SIZES: dict[ScratchSize, tuple[int, int, int, int, int]] = {  # pixels of image and patch; width, depth, heads of both
    "tiny": (64, 8, 96, 3, 3),
    "small": (112, 16, 256, 6, 4),
}
MAX_TOKENS = 64
VOCABULARY = 8000


def load_start(config: TrainConfig, pairs: Sequence[Pair]) -> DualEncoder:
    """Load, compose or build the start model, run by PyTorch so that it compares with the trained one."""
    if config.scratch:
        captions = [caption for pair in pairs for caption in pair.captions]
        return build_scratch(captions, config.scratch, device=config.device)
    if config.vision and config.text:
        return DualEncoder.compose(config.vision, config.text, device=config.device)
    if config.model:
        return DualEncoder.load(config.model, device=config.device, runtime="torch")
    raise ValueError("Name a model to begin with (--model), two towers to join (--vision, --text), or --scratch.")


def build_scratch(captions: Iterable[str], size: ScratchSize = "small", *, device: str | None = None) -> DualEncoder:
    """Build the model with a vocabulary of these captions; the weights are random: call `torch.manual_seed` first."""
    image, patch, width, depth, heads = SIZES[size]
    shape = {"hidden_size": width, "intermediate_size": 4 * width}
    shape |= {"num_hidden_layers": depth, "num_attention_heads": heads}
    tokenizer = learn_tokenizer(captions)
    # With poolers, though the tokens' mean is used: the towers are built so when the model is loaded again.
    vision = ViTModel(ViTConfig(**shape, image_size=image, patch_size=patch))
    text = BertModel(BertConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS))
    configs = {"vision_config": vision.config.to_dict(), "text_config": text.config.to_dict()}  # copies: are modified
    widths = dict.fromkeys(("projection_dim", "vision_width", "text_width"), width)
    config = ComposedConfig(**configs, **widths, vision_pooling="mean", text_pooling="mean")
    processor = ViTImageProcessorPil(size={"height": image, "width": image})
    preprocessor = Preprocessor(processor, tokenizer, TokenizerSpec(positions=MAX_TOKENS))
    return DualEncoder(ComposedModel(config, vision, text), preprocessor, name=f"scratch-{size}", device=device)


def learn_tokenizer(captions: Iterable[str]) -> BertTokenizer:
    """Learn a lower-case WordPiece vocabulary; every Chinese character is a word."""
    learner = Tokenizer(WordPiece(unk_token="[UNK]"))
    learner.normalizer = BertNormalizer(lowercase=True)
    learner.pre_tokenizer = BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    learner.train_from_iterator(captions, trainer)
    return BertTokenizer(vocab=learner.get_vocab(), model_max_length=MAX_TOKENS)
