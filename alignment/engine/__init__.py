"""Floor 4, serving: what the page may ask.

Place in the flow: `upload -> preprocess -> model -> similarity -> matches`, strung together here.

| module   | what it does |
|----------|--------------|
| `core`   | one encoder and one gallery, searched both ways |
| `photos` | a visitor's own pictures |
"""

from alignment.engine.core import Alignment, AlignmentEngine
from alignment.engine.photos import MAX_PHOTOS, Photos, Skipped, as_webp

__all__ = ["MAX_PHOTOS", "Alignment", "AlignmentEngine", "Photos", "Skipped", "as_webp"]
