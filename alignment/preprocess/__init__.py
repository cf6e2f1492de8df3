"""Floor 1, the door: turn what a person gives (file, image, text) into model inputs.

Place in the flow: `upload -> open_image / parse_captions -> Preprocessor (here) -> model`. Serving, building a gallery
and training all come through this door, so a model sees the same pixels everywhere, and nowhere else is input doubted.

| module        | what it does |
|---------------|--------------|
| `refusal`     | the one error a person at the keyboard can mend |
| `formats`     | judges a picture's file by its header, before any pixel is decoded |
| `metadata`    | leaves out of a file what is beside its picture |
| `directories` | looks through what a TIFF file names |
| `images`      | decodes a picture to RGB as a person sees it |
| `captions`    | cleans captions, and makes names fit to be shown |
| `pixels`      | resizes and normalises, bit for bit as transformers does |
| `tokens`      | tokenizes, id for id as transformers does |
| `inputs`      | a checkpoint's image processor and tokenizer |

transformers is imported where a checkpoint needs what is not known here, and not before: it costs seconds.
"""

from alignment.preprocess.captions import (
    MAX_CAPTION_CHARS,
    MAX_CAPTIONS,
    clean_caption,
    count_captions,
    join_first,
    parse_captions,
    sanitize_text,
)
from alignment.preprocess.errors import InputError, message_with_option
from alignment.preprocess.formats import IMAGE_SUFFIXES
from alignment.preprocess.images import ImageSource, open_image
from alignment.preprocess.preprocessor import Preprocessor
from alignment.preprocess.tokenizer import MIN_VOCABULARY, TokenizerSpec

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_CAPTIONS",
    "MAX_CAPTION_CHARS",
    "MIN_VOCABULARY",
    "ImageSource",
    "InputError",
    "Preprocessor",
    "TokenizerSpec",
    "clean_caption",
    "count_captions",
    "join_first",
    "message_with_option",
    "open_image",
    "parse_captions",
    "sanitize_text",
]
