"""Search a gallery both ways; refuse one that another model made.

Place in the flow: `gallery folder -> Gallery (here) -> matches -> engine`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from alignment.calibration import Direction, Judgement
from alignment.catalogue import Caption, Catalogue, Picture, Stamp, read_catalogue, rebuild_command, write_catalogue
from alignment.gallery.judging import Judge
from alignment.index import Index
from alignment.model import DualEncoder
from alignment.similarity import fold_alike, logits_per_image, match_probabilities, top_k

logger = logging.getLogger(__name__)

Item = TypeVar("Item", Picture, Caption)

THUMBNAILS = "thumbnails"

NEARLY_SAME = 0.15
"""Two pictures are nearly the same if they lie this close, as a share of how far unrelated pictures lie apart.

For the compact model that is a cosine of 0.873. Of 250 pictures of Flickr8k dev it misses 3 % saved again as a poor
JPEG or cropped by 5 % on every side; of 1,000 distinct ones seven have a neighbour that near (measured by
`tests/benchmarks/composition.py`).
"""

_FOLDED = 1000  # of the ranking are looked at

Judged: TypeAlias = Callable[[Tensor, Tensor], Judgement | None]
"""Judges results: their rows and those of all candidates, best first -> what to think of them."""


@dataclass(frozen=True)
class Match(Generic[Item]):
    """One search result.

    Attributes:
        rank: from 1.
        item: what was found.
        similarity: cosine, in [-1, 1]; of a composed query its score, see `alignment.engine.queries`.
        share: the model's softmax over all candidates of the search, or its sigmoid for this one alone; 0 for a
            composed query.
        probability: that this is a match, calibrated, see `Judge`; None where nothing tells.
    """

    rank: int
    item: Item
    similarity: float
    share: float
    probability: float | None = None


@dataclass(frozen=True)
class Found(Generic[Item]):
    """The answer to one query.

    Attributes:
        matches: best first.
        fits: whether anything fits; if not, the matches are the least bad ones.
        something_fits: calibrated probability that any candidate is a match; None where nothing tells.
        senseless: whether the query is nonsense or an empty picture.
        composed: whether the query was more than one caption.
        nonsense: which of its captions say nothing.
        groups: the k best pictures that differ, each followed by those that are nearly the same, see `NEARLY_SAME`;
            empty where nobody can tell.
    """

    matches: tuple[Match[Item], ...]
    fits: bool = True
    something_fits: float | None = None
    senseless: bool = False
    composed: bool = False
    nonsense: tuple[str, ...] = ()
    groups: tuple[tuple[Match[Item], ...], ...] = ()


class Gallery:
    """Pictures and captions with their embeddings: the candidates of every search.

    Attributes:
        pictures: in the order of the rows of `image_embeds`.
        captions: in the order of the rows of `text_embeds`.
        image_embeds: (num_pictures, embed_dim) float32, unit norm.
        text_embeds: (num_captions, embed_dim) float32, unit norm.
        stamp: the model they belong to.
        judge: tells matches from accidents; None in galleries built before there was one.
        folder: where the thumbnails lie, if there are any.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        captions: Sequence[Caption],
        image_embeds: Tensor,
        text_embeds: Tensor,
        stamp: Stamp,
        *,
        judge: Judge | None = None,
        folder: Path | None = None,
    ) -> None:
        """Put the pieces together; embeddings may be half precision.

        Raises:
            ValueError: when there is not one embedding for each item.
        """
        if len(pictures) != len(image_embeds) or len(captions) != len(text_embeds):
            raise ValueError(
                f"{len(pictures)} pictures have {len(image_embeds)} embeddings and {len(captions)} captions "
                f"{len(text_embeds)}: each item needs one."
            )
        self.pictures, self.captions = tuple(pictures), tuple(captions)
        self.image_embeds = functional.normalize(image_embeds.float(), dim=-1)
        self.text_embeds = functional.normalize(text_embeds.float(), dim=-1)
        self.stamp = replace(stamp, num_pictures=len(pictures), num_captions=len(captions))
        self.judge = judge
        self.folder = folder
        self._image_index, self._text_index = Index(self.image_embeds), Index(self.text_embeds)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: DualEncoder) -> Gallery:
        """Read a gallery that this encoder made.

        Pictures inside a package that is not installed here are left out, with a line in the log.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when another model made it, or it is damaged. Both errors say what to run.
        """
        folder = Path(folder)
        stored = read_catalogue(folder, encoder.name)
        stamp = stored.stamp
        if stamp.fingerprint != encoder.fingerprint:
            raise ValueError(
                f"The gallery in {folder} was made by the model {stamp.model} ({stamp.fingerprint[:12]}), but the one "
                f"in use is {encoder.name} ({encoder.fingerprint[:12]}), and their embeddings cannot be compared. "
                f"Rebuild it with: {rebuild_command(folder, encoder.name, stamp)}"
            )
        rows = _rows_at_hand(stored.pictures)
        pictures = [stored.pictures[row] for row in rows]
        rebuild = rebuild_command(folder, encoder.name, stamp)
        try:
            judge = Judge.restored(stamp.calibration, stored.background)
        except ValueError as error:
            raise ValueError(f"The gallery in {folder} is damaged ({error}) Rebuild it with: {rebuild}") from error
        if judge is None:
            logger.warning(
                "The gallery in %s cannot tell when nothing fits. Bring it up to date with: %s", folder, rebuild
            )
        return cls(
            pictures,
            stored.captions,
            stored.image_embeds[rows],
            stored.text_embeds,
            stamp,
            judge=judge,
            folder=folder,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the gallery with its thumbnails; what lay there before stays usable until the last moment."""
        folder = Path(folder)
        background = self.judge.background.tensors() if self.judge else {}
        write_catalogue(
            folder,
            Catalogue(self.pictures, self.captions, self.image_embeds, self.text_embeds, self.stamp, background),
        )
        if self.folder and (self.folder / THUMBNAILS).is_dir() and self.folder.resolve() != folder.resolve():
            shutil.copytree(self.folder / THUMBNAILS, folder / THUMBNAILS, dirs_exist_ok=True)

    @property
    def languages(self) -> tuple[str, ...]:
        """The known languages of the captions, in order of appearance."""
        return tuple(dict.fromkeys(caption.lang for caption in self.captions if caption.lang))

    def thumbnail(self, picture: Picture) -> Path:
        """Find what to show of a picture: its thumbnail, or the file itself if it is a package's."""
        if picture.package or self.folder is None:
            return picture.path
        return self.folder / THUMBNAILS / f"{picture.id}.webp"

    def search_images(self, text_embed: Tensor, k: int) -> Found[Picture]:
        """Find the k pictures that fit a caption best; fewer where the gallery holds fewer.

        Args:
            text_embed: (embed_dim,) or (1, embed_dim), unit norm.
            k: how many.

        Raises:
            ValueError: on an embedding of another shape, or a negative k.
        """
        return self._search(self._image_index, self.pictures, text_embed, k, "text_to_image")

    def rank_images(self, scores: Tensor, k: int, judged: Judged, *, without: Collection[str] = ()) -> Found[Picture]:
        """Find the k pictures with the best scores, of whatever making; the answer has them for cosines.

        Args:
            scores: (num_pictures,).
            k: how many.
            judged: judges the results.
            without: ids of pictures that do not compete.
        """
        rows = torch.tensor([row for row, picture in enumerate(self.pictures) if picture.id not in without]).long()
        best, order = top_k(scores[rows], len(rows))
        ids = rows[order]

        def judge(places: list[int]) -> Judgement | None:
            return judged(ids[places], ids)

        return self._found(self.pictures, ids, best, torch.zeros(len(ids)), k, self._folded(ids, k), judge)

    def search_captions(self, image_embed: Tensor, k: int, *, lang: str | None = None) -> Found[Caption]:
        """Find the k captions that fit a picture best; as `search_images`.

        Args:
            image_embed: (embed_dim,) or (1, embed_dim), unit norm.
            k: how many.
            lang: let only captions of this language compete; no match when there are none.
        """
        subset = None if lang is None else [row for row, caption in enumerate(self.captions) if caption.lang == lang]
        return self._search(self._text_index, self.captions, image_embed, k, "image_to_text", subset)

    def _search(
        self,
        index: Index,
        items: Sequence[Item],
        query: Tensor,
        k: int,
        direction: Direction,
        subset: list[int] | None = None,
    ) -> Found[Item]:
        if k < 0 or query.dim() > 2 or (query.dim() == 2 and len(query) != 1):
            raise ValueError(f"A search takes one embedding and a k of at least 0, not {tuple(query.shape)} and {k}.")
        rows = None if subset is None else torch.tensor(subset, dtype=torch.int64)
        # All candidates are asked for, not only k: the softmax runs over all of them.
        similarity, ids = index.search(query.reshape(1, -1), len(index), subset=rows)
        bias = self.stamp.logit_bias
        logits = logits_per_image(similarity, self.stamp.logit_scale, bias)
        shares = match_probabilities(logits, dim=1, logit_bias=bias)[0]
        groups = self._folded(ids[0], k) if direction == "text_to_image" else []

        def judge(places: list[int]) -> Judgement | None:
            if self.judge is None:
                return None
            return self.judge.judge(similarity[0, places], query.reshape(-1), direction, similarity.shape[1])

        return self._found(items, ids[0], similarity[0], shares, k, groups, judge)

    def _found(
        self,
        items: Sequence[Item],
        ids: Tensor,
        scores: Tensor,
        shares: Tensor,
        k: int,
        groups: list[list[int]],
        judge: Callable[[list[int]], Judgement | None],
    ) -> Found[Item]:
        """Put an answer together for a ranking; groups and what is judged are places in it."""
        places = sorted(set(range(min(k, len(ids)))).union(*groups))
        if not places:
            return Found((), False)
        says = judge(places)
        chances: list[float | None] = says.probabilities.tolist() if says else [None] * len(places)
        matches = {
            place: Match(place + 1, items[int(ids[place])], float(scores[place]), float(shares[place]), chance)
            for place, chance in zip(places, chances, strict=True)
        }
        best = tuple(match for place, match in matches.items() if place < k)
        folded = tuple(tuple(matches[place] for place in group) for group in groups)
        if says is None:
            return Found(best, groups=folded)
        return Found(best, says.fits, says.something_fits, says.senseless, groups=folded)

    def _folded(self, ids: Tensor, k: int) -> list[list[int]]:
        """Fold pictures that are nearly the same; places in the ranking `ids`."""
        unrelated = self.judge.unrelated_pictures if self.judge else None
        if unrelated is None:
            return []
        return fold_alike(self.image_embeds[ids[:_FOLDED]], k, 1 - NEARLY_SAME * (1 - unrelated))


def _rows_at_hand(pictures: Sequence[Picture]) -> list[int]:
    """Leave out pictures of packages that are not there; the user's own have thumbnails and are kept anyway."""
    missing: Counter[str] = Counter()
    rows = []
    for row, picture in enumerate(pictures):
        if picture.package and not _exists(picture):
            missing[picture.package] += 1
        else:
            rows.append(row)
    for package, count in missing.items():
        logger.warning("%d pictures of the package %s are left out: it is not installed here.", count, package)
    return rows


def _exists(picture: Picture) -> bool:
    try:
        return picture.path.is_file()
    except FileNotFoundError:
        return False
