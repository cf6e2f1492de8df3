"""Floor 2, the encoder: load, compose, run and save a dual encoder of any family behind one face.

Place in the flow: `preprocess -> model (here) -> similarity`, and the model that `train` improves. Every family answers
to transformers' `get_image_features` and `get_text_features`, so there is one code path and no branch on the family.
What leaves is float32, on the CPU and of unit norm; device and precision are nobody else's business.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils import logging as transformers_logging

from alignment import towers  # noqa: F401 - registers the compact model's towers with the Auto classes
from alignment.preprocess import ImageSource, Preprocessor, clean_caption, open_image

Pooling = Literal["mean", "cls", "pooler"]
Projection = Literal["linear", "mlp", "none"]
Progress = Callable[[int, int], None]
Item = TypeVar("Item")

FRESH_LOGIT_SCALE = math.log(1 / 0.07)  # where CLIP's temperature starts before training


class DualEncoder:
    """A pair of encoders that put images and texts into one space.

    Attributes:
        module: the transformers model, float32, in evaluation mode.
        preprocessor: turns opened images and captions into its inputs.
        name: what it was loaded from.
        device: where it runs.
    """

    def __init__(
        self, module: Any, preprocessor: Preprocessor, *, name: str, device: str | torch.device | None = None
    ) -> None:
        self.device = torch.device(device or _best_device())
        self.module = module.to(self.device).eval()
        self.preprocessor = preprocessor
        self.name = name
        self._hashed: tuple[object, str] = (None, "")

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
    ) -> DualEncoder:
        """Load a CLIP, SigLIP, SigLIP2, Chinese-CLIP, vision-text-dual-encoder or composed checkpoint.

        Args:
            name_or_path: folder, or Hub id.
            revision: branch, tag or commit on the Hub.
            device: "cuda", "mps", "cpu"; the best one there is when None.

        Raises:
            FileNotFoundError: when the checkpoint, its safetensors, tokenizer or image processor is missing.
            ValueError: when it is no dual encoder, is damaged, or would need code of its own.
        """
        folder = _checkpoint_folder(os.fspath(name_or_path), revision)
        module, missing = _load_weights(AutoModel, folder)
        if not all(hasattr(module, name) for name in ("get_image_features", "get_text_features", "logit_scale")):
            raise ValueError(
                f"{name_or_path} is a {module.config.model_type} model, not a dual encoder: choose a CLIP, SigLIP, "
                "SigLIP2, Chinese-CLIP or vision-text-dual-encoder checkpoint, or join two towers with `compose`."
            )
        if missing:
            raise ValueError(f"{name_or_path} lacks weights ({', '.join(missing[:3])}): train or download it again.")
        return cls(module, Preprocessor.load(folder), name=os.fspath(name_or_path), device=device)

    @classmethod
    def compose(
        cls,
        vision: str | os.PathLike[str],
        text: str | os.PathLike[str],
        *,
        embed_dim: int = 512,
        pooling: Pooling | tuple[Pooling, Pooling] = ("pooler", "mean"),
        projection: Projection = "linear",
        device: str | torch.device | None = None,
    ) -> DualEncoder:
        """Join a vision tower and a text tower with fresh projections; train it before use.

        Args:
            vision: folder or Hub id of any vision tower; of a dual encoder the vision half is taken.
            text: the same for the text tower.
            embed_dim: width of the space they share.
            pooling: how a tower's tokens become one vector, for both towers or as (vision, text): the mean of all
                tokens (padding left out), the first token, or the tower's own pooler.
            projection: "linear", "mlp" for a linear layer plus a two-layer correction, or "none" for towers that
                already share a space of width `embed_dim`.
            device: as for `load`.

        Raises:
            FileNotFoundError: when a tower, its safetensors, tokenizer or image processor is missing.
            ValueError: when a tower has no such pooling, or a pooler that was never trained.
        """
        folders = _checkpoint_folder(os.fspath(vision), None), _checkpoint_folder(os.fspath(text), None)
        vision_pooling, text_pooling = (pooling, pooling) if isinstance(pooling, str) else pooling
        preprocessor = Preprocessor.load(*folders)
        vision_model = _load_tower(folders[0], "vision", vision_pooling)
        text_model = _load_tower(folders[1], "text", text_pooling)
        blank = preprocessor.images([Image.new("RGB", (64, 64))])
        config = ComposedConfig(
            vision_config=vision_model.config.to_dict(),  # a copy: the new config resets what it is given
            text_config=text_model.config.to_dict(),
            projection_dim=embed_dim,
            vision_pooling=vision_pooling,
            text_pooling=text_pooling,
            vision_width=_width(vision_model, vision_pooling, blank, "pixel_attention_mask"),
            text_width=_width(text_model, text_pooling, preprocessor.texts(["a"]), "attention_mask"),
            projection=projection,
        )
        module = ComposedModel(config, vision_model, text_model)
        return cls(module, preprocessor, name=f"{os.fspath(vision)} + {os.fspath(text)}", device=device)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights (float32 safetensors), configuration, image processor and tokenizer; `load` reads them back."""
        with _without_progress_bar():
            self.module.save_pretrained(folder)
        self.preprocessor.save(folder)

    @property
    def logit_scale(self) -> float:
        """Multiplier of the cosines, already exponentiated."""
        return float(self.module.logit_scale.detach().exp())

    @property
    def logit_bias(self) -> float | None:
        """What is added to the scaled cosines; None for models trained with a softmax."""
        bias = getattr(self.module, "logit_bias", None)
        return None if bias is None else float(bias.detach())

    @property
    def embed_dim(self) -> int:
        """Width of the shared space."""
        config = self.module.config
        return int(getattr(config, "projection_dim", None) or config.text_config.projection_size)

    @property
    def fingerprint(self) -> str:
        """Sha256 over names, types, shapes and bytes of the weights.

        Computed when asked for, and anew once they change (other than through `.data`, which leaves no trace).
        """
        state = self.module.state_dict()
        seen = tuple((tensor.data_ptr(), tensor._version) for tensor in state.values())
        if self._hashed[0] != seen:
            self._hashed = (seen, _sha256(state))
        return self._hashed[1]

    def encode_images(
        self, images: Sequence[ImageSource], *, batch_size: int = 16, progress: Progress | None = None
    ) -> Tensor:
        """Embed pictures; they are opened a batch at a time.

        Args:
            images: anything `open_image` takes.
            batch_size: pictures per forward pass.
            progress: called after each batch with (done, total).

        Returns:
            (n, embed_dim) float32, CPU, unit norm, in the order given.

        Raises:
            InputError: when one of them cannot be opened.
        """
        return self._encode(images, self._image_batch, self.embed_images, batch_size, progress)

    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 64, progress: Progress | None = None) -> Tensor:
        """Embed captions; arguments and result as for `encode_images`.

        Raises:
            InputError: when one of them is empty or too long.
        """
        return self._encode(texts, self._text_batch, self.embed_texts, batch_size, progress)

    def embed_images(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embed what `preprocessor.images` made; on the device and with gradients, for training."""
        return self._embed(self.module.get_image_features, inputs)

    def embed_texts(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embed what `preprocessor.texts` made; on the device and with gradients, for training."""
        return self._embed(self.module.get_text_features, inputs)

    def _embed(self, features_of: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
        features = features_of(**{name: tensor.to(self.device) for name, tensor in inputs.items()}).pooler_output
        return functional.normalize(features.float(), dim=-1)

    def _image_batch(self, images: Sequence[ImageSource]) -> dict[str, Tensor]:
        # One at a time: a batch of photos in full size would take gigabytes, one of model inputs takes megabytes.
        inputs = [self.preprocessor.images([open_image(image)]) for image in images]
        return {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}

    def _text_batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.preprocessor.texts([clean_caption(text) for text in texts])

    def _encode(
        self,
        items: Sequence[Item],
        prepare: Callable[[Sequence[Item]], dict[str, Tensor]],
        embed: Callable[[dict[str, Tensor]], Tensor],
        batch_size: int,
        progress: Progress | None,
    ) -> Tensor:
        if isinstance(items, str | bytes):
            raise TypeError("Pass a list, even for a single item.")
        embeds = [torch.empty(0, self.embed_dim)]
        with self._evaluating(), torch.no_grad():
            for start in range(0, len(items), batch_size):
                inputs = prepare(items[start : start + batch_size])
                batch = embed(inputs) if self.device.type == "cpu" else _in_half(embed, inputs, self.device.type)
                embeds.append(batch.cpu())
                if progress is not None:
                    progress(min(start + batch_size, len(items)), len(items))
        return torch.cat(embeds)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Switch dropout off, and back on if this is the middle of training."""
        training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training)


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _in_half(embed: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], device_type: str) -> Tensor:
    """Run in half precision, as a GPU likes it; the weights stay float32, and what overflows is run again in full."""
    with torch.autocast(device_type, dtype=torch.float16):
        embeds = embed(inputs)
    return embeds if bool(embeds.isfinite().all()) else embed(inputs)


def _sha256(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------- checkpoints

_SMALL_FILES = ["*.json", "*.txt", "*.model"]  # configuration and vocabularies: no code, no pickle
_INDEX = "model.safetensors.index.json"


def _checkpoint_folder(name: str, revision: str | None) -> Path:
    """Find a checkpoint on disk; a Hub id is fetched first: configuration, vocabulary, safetensors, nothing else."""
    folder = Path(name)
    if not folder.is_dir():
        folder = _fetched(name, revision)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} is not a checkpoint: it has no config.json; check the path.")
    if not any((folder / file).is_file() for file in ("model.safetensors", _INDEX)):
        raise FileNotFoundError(
            f"{name} has no model.safetensors, and pickled weights are not read: convert it once with transformers' "
            "`save_pretrained`, or choose a checkpoint or revision in safetensors."
        )
    return folder


def _fetched(name: str, revision: str | None) -> Path:
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL_FILES))
        index = folder / _INDEX
        weights = {"model.safetensors"}
        if index.is_file():
            weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL_FILES, *sorted(weights)]))
    except (OSError, ValueError) as error:
        wanted = f"{name} at revision {revision}" if revision else name
        raise FileNotFoundError(
            f"No checkpoint {wanted}: there is no such folder, and the Hugging Face Hub did not provide it "
            f"({type(error).__name__}); check the spelling and the network, or fetch it with `hf download {name}`."
        ) from error


def _load_weights(auto: Any, folder: Path) -> tuple[Any, list[str]]:
    """Read a checkpoint in float32; also which of its weights were not there and are therefore random."""
    try:
        with _without_progress_bar():
            module, report = auto.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{folder} cannot be loaded ({reason}): it is damaged, of another family, or needs code of its own, which "
            "is never run; download it again or choose another checkpoint."
        ) from error
    return module, sorted(report["missing_keys"])


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing on the terminal; library code logs."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


# ---------------------------------------------------------------- composition


class ComposedConfig(PreTrainedConfig):
    """Two towers, how each is pooled, and the projections that join them."""

    model_type = "composed-dual-encoder"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 - transformers' protocol

    def __init__(
        self,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        projection_dim: int = 512,
        vision_pooling: Pooling = "pooler",
        text_pooling: Pooling = "mean",
        vision_width: int = 768,
        text_width: int = 768,
        projection: Projection = "linear",
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(vision_config or {"model_type": "vit"})
        self.text_config = _sub_config(text_config or {"model_type": "bert"})
        self.projection_dim = projection_dim
        self.vision_pooling = vision_pooling
        self.text_pooling = text_pooling
        self.vision_width = vision_width
        self.text_width = text_width
        self.projection = projection
        super().__init__(**kwargs)


def _sub_config(config: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    # Where a tower once lay on somebody's disk is not written into the composition.
    return AutoConfig.for_model(**{name: value for name, value in config.items() if name != "_name_or_path"})


@dataclass
class ComposedOutput(ModelOutput):
    """What transformers' dual encoders return from `forward`, without the loss."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class MlpProjection(nn.Module):
    """A linear projection and a two-layer correction to it."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, embed_dim, bias=False)
        self.hidden = nn.Linear(width, 2 * embed_dim)
        self.out = nn.Linear(2 * embed_dim, embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project (n, width) to (n, embed_dim)."""
        projected: Tensor = self.linear(features) + self.out(functional.gelu(self.hidden(features)))
        return projected


def _projection(config: ComposedConfig, width: int) -> nn.Module:
    if config.projection == "mlp":
        return MlpProjection(width, config.projection_dim)
    if config.projection == "linear":
        return nn.Linear(width, config.projection_dim, bias=False)
    if config.projection == "none":  # towers that already speak the shared space, such as the compact model's
        if width != config.projection_dim:
            raise ValueError(f"A tower of width {width} needs a projection to width {config.projection_dim}.")
        return nn.Identity()
    raise ValueError(f"There is no projection {config.projection!r}: choose 'linear', 'mlp' or 'none'.")


class ComposedModel(PreTrainedModel):
    """Any vision tower and any text tower, joined; an ordinary transformers dual encoder to everyone else."""

    config_class = ComposedConfig
    base_model_prefix = "composed"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: ComposedConfig, vision_model: Any = None, text_model: Any = None) -> None:
        super().__init__(config)
        self.vision_model = vision_model if vision_model is not None else _build_tower(config.vision_config)
        self.text_model = text_model if text_model is not None else _build_tower(config.text_config)
        self.visual_projection = _projection(config, config.vision_width)
        self.text_projection = _projection(config, config.text_width)
        self.logit_scale = nn.Parameter(torch.tensor(FRESH_LOGIT_SCALE))
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor | None = None, **inputs: Tensor | None
    ) -> BaseModelOutputWithPooling:
        """Project pictures into the shared space: `pooler_output`, un-normalised."""
        inputs["pixel_values"] = pixel_values
        states, pooled = _pooled(self.vision_model, self.config.vision_pooling, inputs, "pixel_attention_mask")
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.visual_projection(pooled))

    def get_text_features(self, input_ids: Tensor, **inputs: Tensor | None) -> BaseModelOutputWithPooling:
        """Project captions into the shared space: `pooler_output`, un-normalised."""
        inputs["input_ids"] = input_ids
        states, pooled = _pooled(self.text_model, self.config.text_pooling, inputs, "attention_mask")
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.text_projection(pooled))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> ComposedOutput:
        """Score every picture against every caption."""
        images = self.get_image_features(
            pixel_values, pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes
        )
        texts = self.get_text_features(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        image_embeds = functional.normalize(images.pooler_output, dim=-1)
        text_embeds = functional.normalize(texts.pooler_output, dim=-1)
        logits_per_image = image_embeds @ text_embeds.T * self.logit_scale.exp()
        return ComposedOutput(logits_per_image, logits_per_image.T, image_embeds, text_embeds)


AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
AutoModel.register(ComposedConfig, ComposedModel, exist_ok=True)


def _auto_class(config: PreTrainedConfig) -> Any:
    """Choose the Auto class that builds a tower: of an encoder-decoder such as T5, the encoder alone."""
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _build_tower(config: PreTrainedConfig) -> Any:
    if type(config) in MODEL_MAPPING or type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return _auto_class(config).from_config(config)
    # The text halves of SigLIP and Chinese-CLIP: no Auto class knows them.
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(f"transformers builds no tower from a {config.model_type} config; choose another tower.")
    return kind(config)


def _load_tower(folder: Path, side: Literal["vision", "text"], pooling: Pooling) -> Any:
    """Load one tower; of a dual encoder, the half on this side."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tower, missing = _load_weights(_auto_class(config), folder)
    if isinstance(getattr(config, f"{side}_config", None), PreTrainedConfig):
        half = getattr(tower, f"{side}_model")
        half.config.architectures = [type(half).__name__]
        tower = _build_tower(half.config)  # as it will be built when the composition is loaded again
        missing = tower.load_state_dict(half.state_dict(), strict=False).missing_keys
    if pooling == "pooler" and any("pooler" in name for name in missing):
        raise ValueError(f"{folder} holds no trained pooler for its {side} tower: choose pooling 'mean' or 'cls'.")
    return tower.float().eval()


def _pooled(tower: Any, pooling: str, inputs: Mapping[str, Tensor | None], mask: str) -> tuple[Tensor | None, Tensor]:
    """Run a tower and make one vector of its tokens; also the tokens, (n, length, width), if it shows them."""
    known = inspect.signature(tower.forward).parameters  # a BERT tokenizer's token_type_ids mean nothing to DistilBERT
    output = tower(**{name: value for name, value in inputs.items() if name in known and value is not None})
    states, pooled = output.last_hidden_state, None
    is_map = states is not None and states.ndim == 4
    if is_map:  # convolutional: its places are the tokens, and none of them is special
        states = states.flatten(2).transpose(1, 2)
    if pooling == "pooler":
        pooled = getattr(output, "pooler_output", None)
    elif states is not None and not (is_map and pooling == "cls"):
        keep = inputs.get(mask)
        pooled = _pool_tokens(states, pooling, states.new_ones(states.shape[:2]) if keep is None else keep)
    if pooled is None:
        raise ValueError(f"A {tower.config.model_type} tower cannot be pooled by {pooling!r}: choose another pooling.")
    return states, pooled.flatten(1)


def _pool_tokens(states: Tensor, pooling: str, keep: Tensor) -> Tensor | None:
    """Pool tokens (n, length, width) by their mean or to the first; `keep` is (n, length), 0 at padding."""
    if pooling == "mean":
        weights = keep.to(states.dtype)
        return (states * weights[:, :, None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
    if pooling == "cls":
        return states[torch.arange(len(states), device=states.device), keep.int().argmax(dim=1)]
    return None


@torch.no_grad()
def _width(tower: Any, pooling: Pooling, inputs: Mapping[str, Tensor], mask: str) -> int:
    """Width of a tower's pooled output, measured: configs name it in a dozen ways."""
    return int(_pooled(tower, pooling, inputs, mask)[1].shape[-1])
