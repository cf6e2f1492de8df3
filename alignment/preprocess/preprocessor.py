"""A checkpoint's image processor and tokenizer, used the way the model was trained."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from alignment.preprocess.image_transform import ImageTransform
from alignment.preprocess.images import ImageSource, open_image
from alignment.preprocess.tokenizer import MIN_VOCABULARY, FileTokenizer, TokenizerSpec, TransformersTokenizer

_CHECKED = 4096  # captions whose tokens are counted together
_SPARE = 1.44  # of a reduced picture's shorter side over the model's: 12 megapixels (3000 / 8) still reach 260
_SMALLEST = 320  # so that a thumbnail can be made of the same picture


class Preprocessor:
    """A checkpoint's own image processor and tokenizer, used the way the model was trained.

    What most checkpoints ask for is done here, for the same result; the rest is left to transformers.

    Attributes:
        tokenizer_spec: how the text tower wants its captions.
        max_length: tokens a caption is cut to.
        image_side: pixels a picture's shorter side is resized to, or its longest where both are fixed; None where that
            cannot be known, as for NaFlex.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, rules: TokenizerSpec) -> None:
        known = isinstance(image_processor, ImageTransform)
        self._image_processor, self._tokenizer = image_processor, tokenizer
        self._pixels = image_processor if known else ImageTransform.of(image_processor.to_dict())
        self._words = tokenizer if isinstance(tokenizer, FileTokenizer) else TransformersTokenizer(tokenizer, rules)
        self.tokenizer_spec = rules
        self.max_length = self._words.max_length
        self.image_side = self._pixels.side if self._pixels else None

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        text: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
    ) -> Preprocessor:
        """Load the preprocessor of a checkpoint, or join that of a vision tower with that of a text tower.

        Args:
            name_or_path: folder or Hub id.
            text: another checkpoint to take the tokenizer from.
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: when a checkpoint, or its image processor or tokenizer, is missing.
        """
        source = name_or_path if text is None else text
        try:
            image_processor = ImageTransform.read(Path(name_or_path)) or _library_images(name_or_path, revision)
            config = _config(source, revision)
            rules = TokenizerSpec.of(config)
            model_type = str(config.get("model_type"))
            tokenizer = FileTokenizer.read(Path(source), model_type, rules) or _library_tokenizer(source, revision)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{name_or_path} lacks its image processor, or {source} its tokenizer or config.json: check the path, "
                "or save them next to the weights with `processor.save_pretrained(FOLDER)`."
            ) from error
        preprocessor = cls(image_processor, tokenizer, rules)
        if preprocessor._words.vocabulary < MIN_VOCABULARY:
            raise FileNotFoundError(f"{source} lacks its vocabulary: save its tokenizer next to the weights.")
        return preprocessor

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the image processor and the tokenizer; the text rules follow from the model's `config.json`."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def image_processor(self) -> Any:
        """The image processor of transformers, loaded when first asked for."""
        if isinstance(self._image_processor, ImageTransform):
            self._image_processor = _library_images(self._image_processor.folder, None)
        return self._image_processor

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, loaded when first asked for, its padding and truncation fixed."""
        if isinstance(self._tokenizer, FileTokenizer):
            tokenizer = _library_tokenizer(self._tokenizer.folder, None)
            TransformersTokenizer(tokenizer, self.tokenizer_spec)
            self._tokenizer = tokenizer
        return self._tokenizer

    @property
    def draft_size(self) -> int | None:
        """Pixels that a picture's shorter side must keep when it is opened in reduced size; None: it may not be."""
        return None if self.image_side is None else max(math.ceil(_SPARE * self.image_side), _SMALLEST)

    def image(self, source: ImageSource) -> dict[str, Tensor]:
        """Open one picture, in reduced size where that will do, and make its inputs; for many threads at once.

        Returns:
            What `images` returns of one picture.

        Raises:
            InputError: when it cannot be opened.
        """
        return self.images([open_image(source, draft_size=self.draft_size)])

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Resize and normalise opened images.

        Returns:
            `pixel_values`, and whatever else the vision tower reads (NaFlex: `pixel_attention_mask`, `spatial_shapes`).
        """
        if self._pixels is not None and all(image.mode == "RGB" for image in images):
            return {"pixel_values": self._pixels(images)}
        return dict(self.image_processor(list(images), return_tensors="pt"))

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize captions: `input_ids`, and `attention_mask` for the towers that read one."""
        return self._words(self._cased(texts))

    def truncated(self, texts: Iterable[str]) -> list[str]:
        """List the captions that are longer than the text tower reads, each once."""
        # A token is at least one byte, but for the special ones and the mark of a word's beginning.
        long = [text for text in dict.fromkeys(texts) if len(text.encode(errors="replace")) + 4 > self.max_length]
        blocks = (long[start : start + _CHECKED] for start in range(0, len(long), _CHECKED))
        return [
            text
            for block in blocks
            for text, is_cut in zip(block, self._words.is_truncated(self._cased(block)), strict=True)
            if is_cut
        ]

    def _cased(self, texts: Sequence[str]) -> Sequence[str]:
        return [text.lower() for text in texts] if self.tokenizer_spec.lower else texts


def _config(source: str | os.PathLike[str], revision: str | None) -> dict[str, Any]:
    path = Path(source) / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{path} is damaged.")
        return config
    from transformers import PreTrainedConfig

    return dict(PreTrainedConfig.get_config_dict(source, revision=revision)[0])


def _library_images(source: str | os.PathLike[str] | None, revision: str | None) -> Any:
    from transformers import AutoImageProcessor

    # PIL even where torchvision is installed: the same pixels on every machine.
    return AutoImageProcessor.from_pretrained(source, revision=revision, backend="pil", trust_remote_code=False)


def _library_tokenizer(source: str | os.PathLike[str], revision: str | None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
