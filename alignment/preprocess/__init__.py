"""Floor 1, input: turn files, pictures and texts from outside into model inputs.

Place in the flow: `upload -> open_image / parse_captions -> Preprocessor (here) -> model`. Serving, gallery builds and
training all decode and tokenize here, so a model sees the same pixels everywhere; input is validated nowhere else.
transformers takes seconds to import, so it is imported only for checkpoints that need it.
"""

from alignment.preprocess.captions import MAX_CAPTION_CHARS, clean_caption, join_first, parse_captions, sanitize_text
from alignment.preprocess.errors import InputError, message_with_option
from alignment.preprocess.images import IMAGE_SUFFIXES, ImageSource, open_image
from alignment.preprocess.preprocessor import Preprocessor
from alignment.preprocess.tokenizer import TokenizerSpec

__all__ = ["IMAGE_SUFFIXES", "MAX_CAPTION_CHARS", "ImageSource", "InputError", "Preprocessor", "TokenizerSpec"]
__all__ += ["clean_caption", "join_first", "message_with_option", "open_image", "parse_captions", "sanitize_text"]
