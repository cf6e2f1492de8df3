"""A checkpoint's image processor and tokenizer; transformers is imported only for what is not written here."""

import math
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from PIL import Image
from torch import Tensor

from alignment.preprocess.config import load_json
from alignment.preprocess.image_transform import ImageTransform
from alignment.preprocess.images import ImageSource, open_image
from alignment.preprocess.tokenizer import FileTokenizer, TokenizerSpec, TransformersTokenizer

_MIN_VOCABULARY = 10
_TRUNCATION_BATCH = 4096  # captions tokenized at once in `truncated`
_DRAFT_SCALE = 1.44  # shorter side of a draft over that of the model's input; 12 megapixels at 1/8 (3000 / 8) reach 260
_MIN_DRAFT_SIZE = 320  # a gallery makes its thumbnail from the same draft


class Preprocessor:
    """A checkpoint's image processor and tokenizer, applied as in its training.

    What most checkpoints ask for is computed here, with the same result as in transformers, which does the rest.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, tokenizer_spec: TokenizerSpec) -> None:
        is_ours = isinstance(image_processor, ImageTransform)
        self._image_processor, self._tokenizer = image_processor, tokenizer
        self._transform = image_processor if is_ours else ImageTransform.from_config(image_processor.to_dict())
        is_ours = isinstance(tokenizer, FileTokenizer)
        self._tokenize = tokenizer if is_ours else TransformersTokenizer(tokenizer, tokenizer_spec)
        self.tokenizer_spec = tokenizer_spec
        self.max_length = self._tokenize.max_length  # tokens to which a caption is truncated
        # As `ImageTransform.side`; None where that varies, as for NaFlex.
        self.image_side = self._transform.side if self._transform else None

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str], text: str | os.PathLike[str] | None = None) -> Self:
        """Load the preprocessor of a checkpoint, given by its folder or Hub id; `text` has the tokenizer, if given.

        Raises:
            FileNotFoundError: when a checkpoint, or its image processor or tokenizer, is missing.
        """
        source = name_or_path if text is None else text
        try:
            transform = ImageTransform.load(Path(name_or_path)) or _auto_image_processor(name_or_path)
            config = load_json(Path(source) / "config.json") or _hub_config(source)
            model_type, spec = str(config.get("model_type")), TokenizerSpec.from_config(config)
            tokenizer = FileTokenizer.load(Path(source), model_type, spec) or _auto_tokenizer(source)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{name_or_path} lacks its image processor, or {source} its tokenizer or config.json: check the path, "
                "or save them next to the weights with `processor.save_pretrained(FOLDER)`."
            ) from error
        return cls(transform, tokenizer, spec)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the image processor and the tokenizer; `tokenizer_spec` follows from the model's `config.json`."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @cached_property
    def image_processor(self) -> Any:
        """The image processor of transformers, loaded on first access."""
        ours = self._image_processor
        return _auto_image_processor(ours.folder) if isinstance(ours, ImageTransform) else ours

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, loaded on first access, its padding and truncation set."""
        if not isinstance(self._tokenizer, FileTokenizer):
            return self._tokenizer
        tokenizer = _auto_tokenizer(self._tokenizer.folder)
        TransformersTokenizer(tokenizer, self.tokenizer_spec)
        return tokenizer

    @property
    def draft_size(self) -> int | None:
        """The `draft_size` with which pictures may be opened without a loss; None: only at full size."""
        return None if self.image_side is None else max(math.ceil(_DRAFT_SCALE * self.image_side), _MIN_DRAFT_SIZE)

    def image(self, source: ImageSource) -> dict[str, Tensor]:
        """Open one picture, as a draft if possible, and return what `images` returns of it; thread-safe."""
        return self.images([open_image(source, draft_size=self.draft_size)])

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Resize and normalise opened images.

        Returns:
            `pixel_values`, and whatever else the vision tower reads (NaFlex: `pixel_attention_mask`, `spatial_shapes`).
        """
        if self._transform is not None and all(image.mode == "RGB" for image in images):
            return {"pixel_values": self._transform(images)}
        return dict(self.image_processor(list(images), return_tensors="pt"))

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize captions: `input_ids`, and `attention_mask` if the text tower reads it."""
        return self._tokenize(self._cased(texts))

    def truncated(self, texts: Iterable[str]) -> list[str]:
        """List the captions that have more than `max_length` tokens, each once."""
        # A token takes at least one byte, apart from the special ones and the mark of a word's beginning.
        long = [text for text in dict.fromkeys(texts) if len(text.encode(errors="replace")) + 4 > self.max_length]
        flags: list[bool] = []
        for start in range(0, len(long), _TRUNCATION_BATCH):
            flags += self._tokenize.is_truncated(self._cased(long[start : start + _TRUNCATION_BATCH]))
        return [text for text, is_truncated in zip(long, flags, strict=True) if is_truncated]

    def _cased(self, texts: Sequence[str]) -> Sequence[str]:
        return [text.lower() for text in texts] if self.tokenizer_spec.lower else texts


def _hub_config(source: str | os.PathLike[str]) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    return dict(PreTrainedConfig.get_config_dict(source)[0])


def _auto_image_processor(source: str | os.PathLike[str] | None) -> Any:
    from transformers import AutoImageProcessor

    # PIL even where torchvision is installed: the same pixels on every machine.
    return AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)


def _auto_tokenizer(source: str | os.PathLike[str]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # Without a vocabulary file transformers builds a tokenizer of special tokens only.
    if len(tokenizer) - len(tokenizer.all_special_ids) < _MIN_VOCABULARY:
        raise ValueError(f"{source} lacks its vocabulary")
    return tokenizer
