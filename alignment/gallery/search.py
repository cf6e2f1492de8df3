"""Search a gallery both ways; refuse one that another model made.

Place in the flow: `gallery folder -> Gallery (here) -> matches -> engine`.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from alignment.atomic import exclusive_lock
from alignment.calibration import Direction, Judgement
from alignment.catalogue import Caption, Catalogue, Picture, Stamp, place_of, read_catalogue, rebuild_command, settled
from alignment.gallery.judging import Judge
from alignment.gallery.remote import Remote
from alignment.gallery.sides import Side
from alignment.gallery.storage import open_sides, tags_of, write_gallery
from alignment.gallery.unfinished import THUMBNAILS
from alignment.model import DualEncoder
from alignment.similarity import fold_alike, top_k
from alignment.verdicts import Verdict

logger = logging.getLogger(__name__)

Item = TypeVar("Item", Picture, Caption)

NEARLY_SAME = 0.15
"""Two pictures are nearly the same if they lie this close, as a share of how far unrelated pictures lie apart.

For the compact model that is a cosine of 0.873. Of 250 pictures of Flickr8k dev it misses 3 % saved again as a poor
JPEG or cropped by 5 % on every side; of 1,000 distinct ones seven have a neighbour that near (measured by
`tests/benchmarks/composition.py`).
"""

SAME_CAPTION = 0.9
"""Cosine of two captions' embeddings from which they say the same."""

_HEAD = 128
"""Results that are weighed one by one, where shares are an estimate."""

_FOLDED, _MOST_FOLDED = 4, 1000
"""Results that are looked at for ones that are nearly the same: so many times k; more if they leave less than k that
differ, and so many at the most.
"""

Judged: TypeAlias = Callable[[Tensor, Tensor], Judgement | None]
"""Judges results: their rows and those of all candidates, best first -> what to think of them."""


@dataclass(frozen=True)
class Match(Generic[Item]):
    """One search result.

    Attributes:
        rank: from 1.
        item: what was found.
        similarity: cosine, in [-1, 1]; of a composed query its score, see `alignment.engine.queries`.
        probability: that this is a match, calibrated, see `Judge`; None where nothing tells.
        verdict: what to think of that; None where nothing tells.
        shares: works out what `share` tells, for all results; None for a composed query.
    """

    rank: int
    item: Item
    similarity: float
    probability: float | None = None
    verdict: Verdict | None = None
    shares: Callable[[], Sequence[float]] | None = field(default=None, compare=False, repr=False)

    @property
    def share(self) -> float:
        """The model's softmax over all candidates of the search, or its sigmoid for this one alone.

        Worked out when first asked for. Among more than some thousand candidates the softmax is an estimate, see
        `Side.shares`. 0 for a composed query.
        """
        return 0.0 if self.shares is None else self.shares()[self.rank - 1]


@dataclass(frozen=True)
class Found(Generic[Item]):
    """The answer to one query.

    Attributes:
        matches: best first.
        verdict: what to think of the answer, the best of its results' verdicts; None where nothing tells.
        something_fits: calibrated probability that any candidate is a match; None where nothing tells.
        composed: whether the query was more than one caption.
        nonsense: which of its captions say nothing.
        groups: the k best items that differ, each followed by those of the best 4k that are nearly the same, see
            `NEARLY_SAME` and `SAME_CAPTION`; empty where nothing tells.
    """

    matches: tuple[Match[Item], ...]
    verdict: Verdict | None = None
    something_fits: float | None = None
    composed: bool = False
    nonsense: tuple[str, ...] = ()
    groups: tuple[tuple[Match[Item], ...], ...] = ()

    @property
    def fits(self) -> bool:
        """Whether anything fits or may; if not, the matches are the least bad ones."""
        return self.verdict not in ("nothing_close", "no_meaning")

    @property
    def senseless(self) -> bool:
        """Whether the query is nonsense or an empty picture."""
        return self.verdict == "no_meaning"


class Gallery:
    """Pictures and captions with their embeddings: the candidates of every search.

    Attributes:
        pictures: by their position.
        captions: by their position.
        images: the pictures' embeddings, by position.
        texts: the captions'.
        stamp: the model they belong to.
        judge: tells matches from accidents; None in galleries built before there was one.
        folder: where the thumbnails lie, if there are any.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        captions: Sequence[Caption],
        image_embeds: Tensor | Side,
        text_embeds: Tensor | Side,
        stamp: Stamp,
        *,
        judge: Judge | None = None,
        folder: Path | None = None,
    ) -> None:
        """Put the pieces together; embeddings may be half precision, or a side that was opened.

        Raises:
            ValueError: when there is not one embedding for each item.
        """
        if len(pictures) != len(image_embeds) or len(captions) != len(text_embeds):
            raise ValueError(
                f"{len(pictures)} pictures have {len(image_embeds)} embeddings and {len(captions)} captions "
                f"{len(text_embeds)}: each item needs one."
            )
        self.pictures, self.captions = tuple(pictures), tuple(captions)
        self.stamp = replace(stamp, num_pictures=len(pictures), num_captions=len(captions))
        self.judge = judge
        self.folder = folder
        self.images = _side(image_embeds, self.pictures)
        self.texts = _side(text_embeds, self.captions)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: DualEncoder, remote: Remote | None = None) -> Gallery:
        """Read a gallery that this encoder made.

        Pictures inside a package that is not installed here are left out, with a line in the log.

        Args:
            folder: the gallery's.
            encoder: the model in use.
            remote: the server where the embeddings lie, if not in the folder.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when another model made it, or it is damaged. Both errors say what to run.
            OSError: when the server does not answer or refuses us.
        """
        folder = Path(folder)
        return settled(folder, lambda: cls._load(folder, encoder, remote))

    @classmethod
    def _load(cls, folder: Path, encoder: DualEncoder, remote: Remote | None) -> Gallery:
        stored = read_catalogue(folder, encoder.name)
        stamp = stored.stamp
        if stamp.fingerprint != encoder.fingerprint:
            raise ValueError(
                f"The gallery in {folder} was made by the model {stamp.model} ({stamp.fingerprint[:12]}), but the one "
                f"in use is {encoder.name} ({encoder.fingerprint[:12]}), and their embeddings cannot be compared. "
                f"Open it with its own, --model {shlex.quote(stamp.model)}, or make it anew for this one. "
                f"Rebuild it with: {rebuild_command(folder, encoder.name, stamp)}"
            )
        rows = _rows_at_hand(stored.pictures)
        images, texts = open_sides(folder, stored, rows, remote)
        rebuild = rebuild_command(folder, encoder.name, stamp)
        try:
            judge = Judge.restored(stamp.calibration, stored.background)
        except ValueError as error:
            raise ValueError(f"The gallery in {folder} is damaged ({error}) Rebuild it with: {rebuild}") from error
        if judge is None:
            logger.warning(
                "The gallery in %s cannot tell when nothing fits. Bring it up to date with: %s", folder, rebuild
            )
        pictures = [stored.pictures[row] for row in rows]
        return cls(pictures, stored.captions, images, texts, stamp, judge=judge, folder=folder)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the gallery with its thumbnails; what lay there before stays usable until the last moment."""
        folder = Path(folder)
        background = self.judge.background.tensors() if self.judge else {}
        none = torch.empty(0, self.images.index.embed_dim)
        catalogue = Catalogue(self.pictures, self.captions, none, none, self.stamp, background)
        with exclusive_lock(folder):
            write_gallery(folder, catalogue, (self.images, self.texts))
        if self.folder and (self.folder / THUMBNAILS).is_dir() and self.folder.resolve() != folder.resolve():
            shutil.copytree(self.folder / THUMBNAILS, folder / THUMBNAILS, dirs_exist_ok=True)

    @property
    def image_embeds(self) -> Tensor:
        """(num_pictures, embed_dim) float32, unit norm; of many pictures, rather take a few out of `images`."""
        return self.images.embeds

    @property
    def text_embeds(self) -> Tensor:
        """(num_captions, embed_dim) float32, unit norm; of many captions, rather take a few out of `texts`."""
        return self.texts.embeds

    @cached_property
    def languages(self) -> tuple[str, ...]:
        """The known languages of the captions, in order of appearance."""
        return tuple(dict.fromkeys(caption.lang for caption in self.captions if caption.lang))

    @cached_property
    def picture_rows(self) -> Mapping[str, int]:
        """The position of each picture, by its id."""
        return {picture.id: row for row, picture in enumerate(self.pictures)}

    @cached_property
    def caption_rows(self) -> Mapping[str, int]:
        """The position of each caption, by its id."""
        return {caption.id: row for row, caption in enumerate(self.captions)}

    def picture(self, id: str) -> Picture | None:
        """Look a picture up; None where there is none of this id."""
        row = self.picture_rows.get(id)
        return None if row is None else self.pictures[row]

    def with_captions_of(self, other: Gallery) -> Gallery:
        """Make a gallery of these pictures and another gallery's captions, both embedded by the same model."""
        sides = self.images, other.texts
        return Gallery(self.pictures, other.captions, *sides, self.stamp, judge=self.judge, folder=self.folder)

    @property
    def folders(self) -> Mapping[str, int]:
        """How many pictures lie in each folder, however deep; what `search_images` takes for a tag."""
        return self.images.tags

    def thumbnail(self, picture: Picture) -> Path:
        """Find what to show of a picture: its thumbnail, or the file itself if it is a package's."""
        if picture.package or self.folder is None:
            return picture.path
        return place_of(self.folder, f"{THUMBNAILS}/{picture.id}.webp")

    def search_images(self, text_embed: Tensor, k: int, *, tag: str | None = None) -> Found[Picture]:
        """Find the k pictures that fit a caption best; fewer where the gallery holds fewer.

        Args:
            text_embed: (embed_dim,) or (1, embed_dim), unit norm.
            k: how many.
            tag: let only the pictures of this folder compete, see `folders`; no match when there are none.

        Raises:
            ValueError: on an embedding of another shape, or a negative k.
        """
        return self._search(self.images, self.pictures, text_embed, k, "text_to_image", tag)

    def rank_images(
        self, scores: Tensor, rows: Tensor, k: int, judged: Judged, *, without: Collection[str] = ()
    ) -> Found[Picture]:
        """Find the k pictures with the best scores, of whatever making; the answer has them for cosines.

        Args:
            scores: (n,).
            rows: (n,) positions of the pictures that were scored, ascending.
            k: how many.
            judged: judges the results.
            without: ids of pictures that do not compete.
        """
        kept = [place for place, row in enumerate(rows.tolist()) if self.pictures[row].id not in without]
        best, order = top_k(scores[kept], len(kept))
        ids = rows[kept][order]

        def judge(places: list[int]) -> Judgement | None:
            return judged(ids[places], ids)

        return self._found(self.pictures, ids, best, k, self._folded(self.images, ids, k), judge)

    def search_captions(self, image_embed: Tensor, k: int, *, lang: str | None = None) -> Found[Caption]:
        """Find the k captions that fit a picture best; as `search_images`.

        Args:
            image_embed: (embed_dim,) or (1, embed_dim), unit norm.
            k: how many.
            lang: let only captions of this language compete; no match when there are none.
        """
        return self._search(self.texts, self.captions, image_embed, k, "image_to_text", lang)

    def _search(
        self, side: Side, items: Sequence[Item], query: Tensor, k: int, direction: Direction, tag: str | None
    ) -> Found[Item]:
        if k < 0 or query.dim() > 2 or (query.dim() == 2 and len(query) != 1):
            raise ValueError(f"A search takes one embedding and a k of at least 0, not {tuple(query.shape)} and {k}.")
        query, count = query.reshape(-1), side.count(tag)
        head = _FOLDED * k
        scores, rows = side.search(query, k, head, tag)
        groups = self._folded(side, rows, k)
        while groups and len(groups) < k and len(rows) < min(count, _MOST_FOLDED):
            head *= _FOLDED
            scores, rows = side.search(query, k, head, tag)
            groups = self._folded(side, rows, k)

        @cache
        def shares() -> list[float]:
            found = side.search(query, k, max(len(rows), _HEAD), tag)[0]
            return side.shares(query, found, self.stamp.logit_scale, self.stamp.logit_bias, tag).tolist()

        def judge(places: list[int]) -> Judgement | None:
            return None if self.judge is None else self.judge.judge(scores[places], query, direction, count)

        return self._found(items, rows, scores, k, groups, judge, shares)

    def _found(
        self,
        items: Sequence[Item],
        rows: Tensor,
        scores: Tensor,
        k: int,
        groups: list[list[int]],
        judge: Callable[[list[int]], Judgement | None],
        shares: Callable[[], Sequence[float]] | None = None,
    ) -> Found[Item]:
        """Put an answer together for a ranking; groups and what is judged are places in it."""
        places = sorted(set(range(min(k, len(rows)))).union(*groups))
        if not places:
            return Found((), "nothing_close")
        says = judge(places)
        chances: list[float | None] = says.probabilities.tolist() if says else [None] * len(places)
        verdicts: Sequence[Verdict | None] = says.verdicts if says else [None] * len(places)
        columns = places, rows[places].tolist(), scores[places].tolist(), chances, verdicts
        matches = {
            place: Match(place + 1, items[row], score, chance, verdict, shares)
            for place, row, score, chance, verdict in zip(*columns, strict=True)
        }
        best = tuple(match for place, match in matches.items() if place < k)
        folded = tuple(tuple(matches[place] for place in group) for group in groups)
        if says is None:
            return Found(best, groups=folded)
        return Found(best, says.verdict, says.something_fits, groups=folded)

    def _folded(self, side: Side, rows: Tensor, k: int) -> list[list[int]]:
        """Fold items that are nearly the same; places in the ranking `rows`."""
        threshold, looked_at, most = self._same(side), _FOLDED * k, min(len(rows), _MOST_FOLDED)
        if threshold is None:
            return []
        while len(groups := fold_alike(side[rows[:looked_at]], k, threshold)) < k and looked_at < most:
            looked_at = min(looked_at * _FOLDED, most)
        return groups

    def _same(self, side: Side) -> float | None:
        """Cosine from which two items of a side are nearly the same; None where nothing tells."""
        if side is self.texts:
            return SAME_CAPTION
        unrelated = self.judge.unrelated_pictures if self.judge else None
        return None if unrelated is None else 1 - NEARLY_SAME * (1 - unrelated)


def _side(embeds: Tensor | Side, items: Sequence[Picture] | Sequence[Caption]) -> Side:
    return embeds if isinstance(embeds, Side) else Side.in_memory(embeds, tags_of(items))


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
