"""Compare a query with a cohort: unrelated pictures and captions, the same for every gallery.

Place in the flow: `encoder -> cohort (here) -> calibration -> gallery`. Every gallery has the same cohort, so that
probabilities stay comparable; only the model differs.
"""

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from alignment.bundled import ROOT, installed_file
from alignment.preprocess import ImageSource
from alignment.similarity import cosine_similarity, cosines_within

logger = logging.getLogger(__name__)

Direction = Literal["image_to_text", "text_to_image"]
"""Which way a search goes; the query comes first."""

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
TAIL = 5
"""Items of the cohort closest to a query; their mean score is what unrelated items reach."""

COHORT_CAPTIONS = 1024

_MIN_PICTURES = 3  # fewer do not tell how far apart pictures lie
_MIN_SPREAD = 1e-4  # of cosines; below, the model scores everything alike
_NEAREST = 3  # probes around a query
_DRAWINGS = "package:alignment/"  # the curves were fitted against the photographs alone


class Encoder(Protocol):
    """The part of `DualEncoder` that embeds a cohort."""

    def encode_images(self, images: Sequence[ImageSource]) -> Tensor: ...  # noqa: D102
    def encode_texts(self, texts: Sequence[str]) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Cohort:
    """Unrelated pictures and captions that the scores of every query are compared with.

    Any everyday pictures and captions do, if the same model embedded them. A larger cohort, and one from the domain of
    the gallery, separates matches from non-matches more sharply. A gallery keeps it with the calibration.
    """

    image_embeds: Tensor  # (num_images, embed_dim), at least one
    text_embeds: Tensor  # (num_texts, embed_dim), at least one
    empty_image_embeds: Tensor | None = None  # (num_blank_images, embed_dim), see `blank_images`
    nonsense_text_embeds: Tensor | None = None  # (num_random_texts, embed_dim), see `random_texts`

    def __post_init__(self) -> None:
        shapes = {name: tuple(embeds.shape) for name, embeds in self.tensors().items()}
        one_width = len({shape[1:] for shape in shapes.values()}) == 1 and self.image_embeds.ndim == 2
        if not one_width or not len(self.image_embeds) or not len(self.text_embeds):
            raise ValueError(f"A cohort needs pictures and captions, (n, embed_dim) of one width, not {shapes}.")

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names that galleries hold; `Cohort(**tensors)` inverts it."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: embeds for name, embeds in found.items() if embeds is not None}

    @cached_property
    def units(self) -> dict[Direction, tuple[float, float]]:
        """Mean and standard deviation of cosines between unrelated items; they make models comparable."""
        similarity = cosine_similarity(self.image_embeds, self.text_embeds).double()
        return {
            direction: (matrix.mean().item(), max(matrix.std(1, correction=0).mean().item(), _MIN_SPREAD))
            for direction, matrix in zip(DIRECTIONS, (similarity, similarity.T), strict=True)
        }

    @cached_property
    def unrelated_pictures(self) -> float | None:
        """Mean cosine between unrelated pictures; None where the cohort has too few of them."""
        few = len(self.image_embeds) < _MIN_PICTURES
        return None if few else cosines_within(self.image_embeds).mean().item()

    @cached_property
    def _unit(self) -> dict[str, NDArray[np.float32]]:
        """The tensors with unit norm, computed once."""
        return {name: functional.normalize(embeds.float(), dim=-1).numpy() for name, embeds in self.tensors().items()}

    def is_out_of_distribution(self, query_embeds: Tensor, direction: Direction) -> Tensor:
        """Find the queries, (num_queries, embed_dim) of unit norm, that lie among the random texts or blank images.

        Returns (num_queries,) bool. Such a query is closer to these probes than to any ordinary item, and closer than
        half-way between how close ordinary items come to the probes and how close the probes lie to each other.
        """
        if direction not in self._probes:
            return torch.zeros(len(query_embeds), dtype=torch.bool)
        probes, ordinary, half_way = self._probes[direction]
        queries = query_embeds.float().numpy()
        cosines = queries @ probes.T
        if not (cosines > half_way).any():  # as for nearly all queries
            return torch.zeros(len(queries), dtype=torch.bool)
        here = _mean_of_highest(cosines, _NEAREST)
        return torch.from_numpy((here > half_way) & (here > _nearness(queries, ordinary)))

    @cached_property
    def _probes(self) -> dict[Direction, tuple[NDArray[np.float32], NDArray[np.float32], float]]:
        """Direction, where it has enough probes -> probes, ordinary items, and the threshold half-way between them."""
        unit = self._unit
        found: dict[Direction, tuple[NDArray[np.float32], NDArray[np.float32], float]] = {}
        for direction, side, kind in zip(DIRECTIONS, ("image", "text"), ("empty", "nonsense"), strict=True):
            probes, ordinary = unit.get(f"{kind}_{side}_embeds"), unit[f"{side}_embeds"]
            if probes is not None and len(probes) > _NEAREST:
                among = probes @ probes.T - 2 * np.eye(len(probes), dtype=np.float32)  # without each with itself
                inside = _mean_of_highest(among, _NEAREST).mean()
                found[direction] = probes, ordinary, float(inside + _nearness(ordinary, probes).mean()) / 2
        return found

    def evidence(
        self, similarity: Tensor, query_embeds: Tensor, num_candidates: int | Tensor, direction: Direction
    ) -> Tensor:
        """Compute the features of search results, standardised by the cohort's cosines.

        Args:
            similarity: (num_queries, num_results) cosines.
            query_embeds: (num_queries, embed_dim), unit norm.
            num_candidates: how many were searched, one number or (num_queries,).
            direction: what the queries are.

        Returns:
            (num_queries, num_results, 4) float64: the score; the query's mean score with the `TAIL` closest items of
            the cohort; its mean score with the whole cohort; the logarithm of the number of candidates.
        """
        items = self._unit["text_embeds" if direction == "image_to_text" else "image_embeds"]
        centre, spread = self.units[direction]
        unrelated = ((query_embeds.float().numpy() @ items.T).astype(np.float64) - centre) / spread
        found = np.empty((*similarity.shape, 4))
        found[..., 0] = (similarity.numpy().astype(np.float64) - centre) / spread
        found[..., 1] = _mean_of_highest(unrelated, TAIL)[:, None]
        found[..., 2] = unrelated.mean(1)[:, None]
        found[..., 3] = np.log(np.maximum(np.asarray(num_candidates, np.float64), 1)).reshape(-1, 1)
        return torch.from_numpy(found)


# numpy: for one query, torch spends longer on its calls than on their work.
def _nearness(queries: NDArray[np.float32], items: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean cosine with the `_NEAREST` items; all have unit norm."""
    return _mean_of_highest(queries @ items.T, _NEAREST)


def _mean_of_highest(cosines: NDArray[Any], count: int) -> NDArray[Any]:
    count = min(count, cosines.shape[1])
    return np.add.reduce(np.partition(cosines, -count, axis=1)[:, -count:], axis=1) / count


def cohort_items() -> tuple[list[str], list[str]]:
    """List the cohort's pictures inside packages of this machine, by path, and its captions in English and Chinese."""
    captions = [caption for scene in _read_lines("parallel_captions.jsonl") for caption in scene.values()]
    sources = [picture["source"] for picture in _read_lines("gallery/sources/pictures.jsonl")]
    paths = []
    for source in (source for source in sources if not source.startswith(_DRAWINGS)):
        try:
            paths.append(str(installed_file(source)))
        except FileNotFoundError as error:
            logger.warning("The cohort lacks the picture %s. %s", source, error)
    return paths, random.Random(0).sample(captions, COHORT_CAPTIONS)


def _read_lines(asset: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROOT / "assets" / asset).read_text("utf-8").splitlines()]


def cohort_version() -> str:
    """Hash the cohort's items, so that a gallery tells when its cohort is out of date."""
    paths, captions = cohort_items()
    text = json.dumps([[Path(path).name for path in paths], captions])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def build_cohort(encoder: Encoder) -> Cohort:
    """Embed the cohort; takes some seconds with the compact model. Raises InputError on a damaged picture."""
    paths, captions = cohort_items()
    return Cohort(
        encoder.encode_images(paths),
        encoder.encode_texts(captions),
        encoder.encode_images(blank_images()),
        encoder.encode_texts(random_texts()),
    )


# ---------------------------------------------------------------- out-of-distribution probes

PER_KIND = 8
_SIDE = 224  # pixels
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_SCRIPTS = {
    "Latin": range(0x61, 0x7B),
    "digits": range(0x30, 0x3A),
    "Cyrillic": range(0x430, 0x450),
    "Thai": range(0xE01, 0xE2E),
    "Hangul": range(0xAC00, 0xD7A4),
}
_HAN, _MARKS = range(0x4E00, 0x9FA6), "!?.,;:-_#*+~/|()[]{}<>@%&=^"


def random_texts(count: int = PER_KIND, seed: int = 0) -> list[str]:
    """Make `count` random texts of each kind: letters of several scripts, digits, punctuation, keyboard mashing."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        texts += [" ".join(_word(rng, script, 2, 9) for _ in range(rng.randint(1, 6))) for script in _SCRIPTS.values()]
        texts.append(_word(rng, _HAN, 3, 14))
        texts.append("".join(rng.choices(_MARKS, k=rng.randint(2, 20))))
        texts.append(" ".join(_mashed(rng) for _ in range(rng.randint(1, 4))))
    return texts


def blank_images(count: int = PER_KIND, seed: int = 0) -> list[Image.Image]:
    """Make `count` pictures of each kind: one colour, coloured noise, grey noise, a gradient."""
    rng = np.random.default_rng(seed)
    shape = (_SIDE, _SIDE, 3)
    pictures = []
    for row in range(count):
        shade = 255 * row / max(count - 1, 1)  # every other plain one is grey, from black to white
        plain = np.full(shape, shade if row % 2 else rng.uniform(0, 255, 3))
        grey = rng.uniform(40, 215) + rng.normal(0, rng.uniform(5, 60), (_SIDE, _SIDE, 1))
        pictures += [plain, rng.uniform(0, 255, shape), np.broadcast_to(grey, shape), _gradient(rng)]
    return [Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)) for pixels in pictures]


def _word(rng: random.Random, script: range, shortest: int, longest: int) -> str:
    return "".join(chr(code) for code in rng.choices(script, k=rng.randint(shortest, longest)))


def _mashed(rng: random.Random) -> str:
    """Run along a row of the keyboard, perhaps again and again."""
    keys = rng.choice(_ROWS)
    start = rng.randrange(len(keys) - 3)
    return keys[start : start + rng.randint(3, 5)] * rng.randint(1, 3)


def _gradient(rng: np.random.Generator) -> np.ndarray:
    """Fade from one colour to another, in any direction."""
    start, end = rng.uniform(0, 255, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[0:_SIDE, 0:_SIDE] / (_SIDE - 1) - 0.5
    along = np.clip(columns * np.cos(angle) + rows * np.sin(angle) + 0.5, 0, 1)
    return start + (end - start) * along[..., None]
