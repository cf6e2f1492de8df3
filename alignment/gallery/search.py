"""Search a gallery: the pictures that fit a caption, the captions that fit a picture.

Place in the flow: `gallery folder -> Gallery (here) -> matches -> engine`.
"""

import logging
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Generic, Self, TypeAlias

import torch
from torch import Tensor

from alignment.confidence import Direction, MatchCalibrator, MatchConfidence, Verdict
from alignment.gallery.database import GalleryDatabase
from alignment.gallery.milvus_sync import Remote
from alignment.gallery.modality import Item, Modality, Records
from alignment.gallery.records import Caption, GalleryMetadata, Picture, rebuild_command
from alignment.model import DualEncoder
from alignment.similarity import group_near_duplicates

logger = logging.getLogger(__name__)

NEAR_DUPLICATE_DISTANCE = 0.15
"""Cosine distance of two near-duplicate pictures, as a share of the mean distance of unrelated pictures.

For the compact model that is a cosine of 0.873. Of 250 pictures of Flickr8k dev it misses 3 % saved again as a poor
JPEG or cropped by 5 % on every side; of 1,000 distinct ones seven have a neighbour that near (`composition.py`).
"""

SAME_CAPTION = 0.9  # cosine from which two captions are near duplicates
_HEAD = 128  # results that are weighed exactly where the softmax is an estimate
_GROUPED, _MAX_GROUPED = 4, 1000  # results searched for near duplicates: times k, or more if too few differ; at most
_TRIES = 10  # to open a gallery that other processes replace

Assess: TypeAlias = Callable[[list[int]], MatchConfidence | None]  # rates results at some places of a ranking


@dataclass(frozen=True)
class Match(Generic[Item]):
    """One search result; probability and verdict are None without a calibration."""

    rank: int  # from 1
    item: Item
    similarity: float  # cosine, in [-1, 1]; of a composed query its score, see `alignment.engine.queries`
    probability: float | None = None  # calibrated, that this is a match
    verdict: Verdict | None = None
    shares: Callable[[], Sequence[float]] | None = field(default=None, compare=False, repr=False)  # of all results

    @property
    def share(self) -> float:
        """The model's softmax over all candidates, or its sigmoid; 0 for a composed query. See `Modality.softmax`."""
        return 0.0 if self.shares is None else self.shares()[self.rank - 1]


@dataclass(frozen=True)
class SearchResult(Generic[Item]):
    """The answer to one query.

    `duplicates` are the k best items that differ, each followed by its near duplicates among the best 4k, see
    `NEAR_DUPLICATE_DISTANCE` and `SAME_CAPTION`; empty without a calibration, as verdict and probability are None.
    """

    matches: tuple[Match[Item], ...]  # best first
    verdict: Verdict | None = None  # on the whole answer, the best of its results' verdicts
    p_any_match: float | None = None  # calibrated probability that any candidate is a match
    composed: bool = False  # whether the query was more than one caption
    ood_captions: tuple[str, ...] = ()  # captions of the query that are out of distribution
    duplicates: tuple[tuple[Match[Item], ...], ...] = ()

    @property
    def fits(self) -> bool:
        """Whether anything fits or may fit; if not, the matches are only the nearest candidates."""
        return self.verdict not in ("nothing_close", "no_meaning")

    @property
    def is_out_of_distribution(self) -> bool:
        """Whether the query is a random text or a blank image."""
        return self.verdict == "no_meaning"


class Gallery:
    """Pictures and captions with their embeddings: the candidates of every search.

    `images` and `texts` are modalities, `pictures` and `captions` their records. `judge` computes match probabilities,
    and is None without a calibration. `database`, in `folder`, holds records and thumbnails; None if all is in memory.
    """

    def __init__(
        self, pictures: Sequence[Picture], captions: Sequence[Caption], image_embeds: Tensor | Modality[Picture],
        text_embeds: Tensor | Modality[Caption], metadata: GalleryMetadata, *, judge: MatchCalibrator | None = None,
        database: GalleryDatabase | None = None,
    ) -> None:  # fmt: skip
        """Combine modalities that are open, or hold records and their embeddings in memory, see `Modality`."""
        self.images = image_embeds if isinstance(image_embeds, Modality) else Modality.in_memory(pictures, image_embeds)
        self.texts = text_embeds if isinstance(text_embeds, Modality) else Modality.in_memory(captions, text_embeds)
        self.pictures: Records[Picture] = self.images.items
        self.captions: Records[Caption] = self.texts.items
        self.metadata = replace(metadata, num_pictures=len(self.images), num_captions=len(self.texts))
        self.judge, self.database, self.folder = judge, database, database.folder if database else None

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: DualEncoder, remote: Remote | None = None) -> Self:
        """Open a gallery that this encoder made, without pictures of packages that are not installed here.

        If `remote` is given, that server is searched. FileNotFoundError without a gallery, ValueError when another
        model made it or it is damaged, which both say what to run; OSError when the server does not answer.
        """
        for _ in range(_TRIES):
            with suppress(KeyError):  # another process replaced the gallery meanwhile
                return cls._load(GalleryDatabase(Path(folder), encoder.name), encoder, remote)
        raise ValueError(f"The gallery in {folder} was replaced {_TRIES} times while it was opened.")

    @classmethod
    def _load(cls, database: GalleryDatabase, encoder: DualEncoder, remote: Remote | None) -> Self:
        folder, metadata = database.folder, database.metadata
        rebuild = rebuild_command(folder, encoder.name, metadata)
        if metadata.fingerprint != encoder.fingerprint:
            theirs, ours = metadata.fingerprint[:12], encoder.fingerprint[:12]
            raise ValueError(
                f"The gallery in {folder} was made by the model {metadata.model} ({theirs}), but the one in use is "
                f"{encoder.name} ({ours}), and their embeddings cannot be compared. Open it with its own, --model "
                f"{shlex.quote(metadata.model)}, or make it anew for this one. Rebuild it with: {rebuild}"
            )
        try:
            judge = MatchCalibrator.restored(metadata.calibration, database.cohort())
        except ValueError as error:
            raise database.damaged(error) from error
        if judge is None:
            logger.warning("The gallery in %s is not calibrated. Bring it up to date with: %s", folder, rebuild)
        images = Modality[Picture].open(database, "picture", remote)
        texts = Modality[Caption].open(database, "caption", remote)
        return cls((), (), images, texts, metadata, judge=judge, database=database)

    @property
    def languages(self) -> tuple[str, ...]:
        """The known languages of the captions."""
        return tuple(filter(None, self.captions.tags))

    def with_captions_of(self, other: "Gallery") -> "Gallery":
        """Combine these pictures with another gallery's captions, both embedded by the same model."""
        return Gallery((), (), self.images, other.texts, self.metadata, judge=self.judge, database=self.database)

    def thumbnail(self, picture: Picture) -> bytes | Path:
        """Find what to show of a picture: its thumbnail, WebP, or the file that one can be made of."""
        return (self.database.thumbnail(picture) if self.database and not picture.package else None) or picture.path

    def search_images(self, text_embed: Tensor, k: int, *, tag: str | None = None) -> SearchResult[Picture]:
        """Find the k pictures that fit a caption best; fewer where the gallery, or its folder `tag`, holds fewer.

        `text_embed` is (embed_dim,) or (1, embed_dim), unit norm; ValueError on another shape, or a negative k.
        """
        return self._search(self.images, text_embed, k, "text_to_image", tag)

    def search_captions(self, image_embed: Tensor, k: int, *, lang: str | None = None) -> SearchResult[Caption]:
        """Find the k captions that fit a picture best, of one language only if one is given; as `search_images`."""
        return self._search(self.texts, image_embed, k, "image_to_text", lang)

    def rank_images(self, scores: Tensor, positions: Tensor, k: int, assess: Assess) -> SearchResult[Picture]:
        """Answer with the pictures at these positions, ranked by scores of any kind, (n,) both and best first."""
        ranked = self._grouped(self.images, lambda head: (scores[:head], positions[:head]), k, len(positions))
        return _result(self.images, *ranked, k, assess)

    def _search(
        self, modality: Modality[Item], query: Tensor, k: int, direction: Direction, tag: str | None
    ) -> SearchResult[Item]:
        query, count = query.reshape(-1), modality.count(tag)
        ranked = self._grouped(modality, lambda head: modality.search(query, k, head, tag), k, count)
        scores = ranked[0]

        @cache
        def shares() -> list[float]:
            found = modality.search(query, k, max(len(scores), _HEAD), tag)[0]
            scale, bias = self.metadata.logit_scale, self.metadata.logit_bias
            return modality.softmax(query, found, scale, bias, tag).tolist()

        def assess(places: list[int]) -> MatchConfidence | None:
            rated = torch.from_numpy(scores.numpy()[places])
            return None if self.judge is None else self.judge.assess(rated, query, direction, count)

        return _result(modality, *ranked, k, assess, shares)

    def _grouped(
        self, modality: Modality[Item], search: Callable[[int], tuple[Tensor, Tensor]], k: int, count: int
    ) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Search until k results differ, or there are no more, and group near duplicates.

        Pictures are not grouped without a calibration. `search` returns the scores and positions of as many of the
        `count` candidates as it is asked for; both are returned with the groups, see `group_near_duplicates`.
        """
        head: int = _GROUPED * k
        threshold = SAME_CAPTION
        if modality is self.images:
            unrelated = self.judge.cohort.unrelated_pictures if self.judge else None
            if unrelated is None:
                return *search(head), []
            threshold = 1 - NEAR_DUPLICATE_DISTANCE * (1 - unrelated)
        while True:
            scores, positions = search(head)
            groups = group_near_duplicates(modality[positions], k, threshold)
            if len(groups) >= k or head >= min(count, _MAX_GROUPED):
                return scores, positions, groups
            head = min(head * _GROUPED, _MAX_GROUPED)


def _result(
    modality: Modality[Item], scores: Tensor, positions: Tensor, groups: list[list[int]], k: int, assess: Assess,
    shares: Callable[[], Sequence[float]] | None = None,
) -> SearchResult[Item]:  # fmt: skip
    """Build the answer of a ranking; groups and what is assessed are places in it. numpy: tensors take far longer."""
    wanted = sorted(set(range(min(k, len(positions)))).union(*groups))
    fetched = zip(wanted, modality.items.fetch(positions.numpy()[wanted].tolist()), strict=True)
    items: dict[int, Item] = {place: item for place, item in fetched if item is not None}  # None: deleted meanwhile
    if not items:
        return SearchResult((), "nothing_close")
    places = list(items)
    says = assess(places)
    chances: list[float | None] = says.probabilities.tolist() if says else [None] * len(items)
    verdicts: Sequence[Verdict | None] = says.verdicts if says else [None] * len(items)
    rated = zip(places, scores.numpy()[places].tolist(), chances, verdicts, strict=True)
    matches = {
        place: Match(place + 1, items[place], score, chance, verdict, shares) for place, score, chance, verdict in rated
    }
    best = tuple(match for place, match in matches.items() if place < k)
    there = (tuple(matches[place] for place in group if place in matches) for group in groups)
    verdict, chance = (says.verdict, says.p_any_match) if says else (None, None)
    return SearchResult(best, verdict, chance, duplicates=tuple(filter(None, there)))
