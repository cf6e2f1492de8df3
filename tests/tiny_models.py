"""Tiny random models of every family, made from their configurations, with their tokenizers and image processors."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from tokenizers import pre_tokenizers

SIDE = 32  # pixels of a tiny model's input
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**WIDTHS, "image_size": SIDE, "patch_size": 8}


def save_tiny_model(name: str, folder: Path) -> None:
    """Save the model of a key of `BUILDERS`; the same name gives the same weights."""
    torch.manual_seed(sum(map(ord, name)))
    model, *processors = BUILDERS[name]()
    for part in (_lively(model), *processors):
        part.save_pretrained(folder)


def _lively(model: torch.nn.Module) -> torch.nn.Module:
    """Spread the weights: at their usual scale a tiny model embeds everything alike, and a test could not tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if hasattr(model, "logit_scale"):
            model.logit_scale.fill_(2.5)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-3.0)
    return model


# ---------------------------------------------------------------- tokenizers


def _byte_vocab(*specials: str, ends: bool) -> dict[str, int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*specials, *letters, *(letter + "</w>" for letter in letters if ends)]
    return {token: index for index, token in enumerate(tokens)}


def _clip_tokenizer() -> transformers.CLIPTokenizer:
    vocab = _byte_vocab("<|startoftext|>", "<|endoftext|>", ends=True)
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _roberta_tokenizer() -> transformers.RobertaTokenizer:
    vocab = _byte_vocab("<s>", "<pad>", "</s>", "<unk>", "<mask>", ends=False)
    return transformers.RobertaTokenizer(vocab=vocab, merges=[])


def _bert_tokenizer() -> transformers.BertTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *("##" + c for c in letters),
        *"一只狗在海滩上奔跑猫",
    ]
    return transformers.BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


def _siglip_tokenizer() -> transformers.SiglipTokenizer:
    import sentencepiece

    buffer = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["a dog runs on the beach", "the quick brown fox jumps over two lazy cats", "pasta"] * 9
        ),
        model_writer=buffer,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with TemporaryDirectory() as folder:
        path = Path(folder, "spiece.model")
        path.write_bytes(buffer.getvalue())
        return transformers.SiglipTokenizer(str(path), model_input_names=["input_ids"])


def _gemma_tokenizer(kind: type) -> transformers.PreTrainedTokenizerBase:
    """Upper and lower case are different tokens here, as in Gemma's vocabulary."""
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    ]
    return kind(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        padding_side="right",
        model_input_names=["input_ids"],
    )


# ---------------------------------------------------------------- families


def _clip() -> tuple:
    tokenizer = _clip_tokenizer()
    text = {
        **WIDTHS,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    return transformers.CLIPModel(config), _clip_images(), tokenizer


def _clip_images() -> transformers.CLIPImageProcessorPil:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def _siglip(tokenizer: transformers.PreTrainedTokenizerBase | None = None) -> tuple:
    tokenizer = tokenizer or _siglip_tokenizer()
    text = {**WIDTHS, "vocab_size": len(tokenizer), "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    images = transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return transformers.SiglipModel(config), images, tokenizer


def _siglip2() -> tuple:
    """Build SigLIP2 of a fixed size as Google published it: SigLIP's architecture with Gemma's tokenizer."""
    return _siglip(_gemma_tokenizer(transformers.GemmaTokenizer))


def _naflex() -> tuple:
    tokenizer = _gemma_tokenizer(transformers.Siglip2Tokenizer)
    text = {**WIDTHS, "vocab_size": len(tokenizer)}
    config = transformers.Siglip2Config(text_config=text, vision_config={**WIDTHS, "patch_size": 16})
    return transformers.Siglip2Model(config), transformers.Siglip2ImageProcessorPil(), tokenizer


def _chinese_clip() -> tuple:
    tokenizer = _bert_tokenizer()
    config = transformers.ChineseCLIPConfig(
        text_config={**WIDTHS, "vocab_size": len(tokenizer)}, vision_config=VISION, projection_dim=24
    )
    images = transformers.ChineseCLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return transformers.ChineseCLIPModel(config), images, tokenizer


def _vit() -> tuple:
    images = transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return transformers.ViTModel(transformers.ViTConfig(**VISION)), images


def _bert() -> tuple:
    tokenizer = _bert_tokenizer()
    return transformers.BertModel(transformers.BertConfig(**WIDTHS, vocab_size=len(tokenizer))), tokenizer


def _roberta() -> tuple:
    tokenizer = _roberta_tokenizer()
    config = transformers.RobertaConfig(
        **WIDTHS, vocab_size=len(tokenizer), max_position_embeddings=66, type_vocab_size=1
    )
    return transformers.RobertaModel(config), tokenizer


def _distilbert() -> tuple:
    tokenizer = _bert_tokenizer()
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    return transformers.DistilBertModel(config), tokenizer


def _t5() -> tuple:
    tokenizer = _bert_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5Model(config), tokenizer


def _gpt2() -> tuple:
    vocab = _byte_vocab("<|endoftext|>", ends=False)
    config = transformers.GPT2Config(
        vocab_size=len(vocab), n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2Model(config), transformers.GPT2Tokenizer(vocab=vocab, merges=[])


def _convnext() -> tuple:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    images = transformers.ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_pct=1.0)
    return transformers.ConvNextModel(config), images


def _dual(vision: tuple, text: tuple) -> tuple:
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision[0].config, text[0].config, projection_dim=24
    )
    model = transformers.VisionTextDualEncoderModel(config, vision_model=vision[0], text_model=text[0])
    return model, vision[1], text[1]


def _clip_vision() -> tuple:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)), _clip_images()


BUILDERS: dict[str, Callable[[], tuple]] = {
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "siglip2-naflex": _naflex,
    "chinese-clip": _chinese_clip,
    "vit-bert": lambda: _dual(_vit(), _bert()),
    "clip-roberta": lambda: _dual(_clip_vision(), _roberta()),
    "vit": _vit,
    "convnext": _convnext,
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "t5": _t5,
    "gpt2": _gpt2,
}
