"""Tell matches from accidents: the background and the calibration that a gallery keeps.

Place in the flow: `encoder -> background + calibration (here) -> gallery folder -> search`. The background is the same
everyday pictures and captions for every gallery, so that probabilities stay comparable; only the model differs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.calibration import BORROWED, Background, Calibration, Direction, Judgement
from alignment.catalogue import Caption, Picture, read_hand_written
from alignment.gallery.storage import Rows
from alignment.model import DualEncoder
from alignment.nonsense import empty_pictures, nonsense_texts
from alignment.similarity import cosines_within

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parents[2] / "assets"
BACKGROUND_CAPTIONS = 1024

MIN_FITTED = 100
"""Captioned pictures below which the curves are borrowed."""

MAX_FITTED = 1000
"""Captioned pictures that the curves are fitted on; more only take longer."""

MAX_FITTED_CAPTIONS = 5  # of a picture
_DRAWN = "alignment"  # the package of the drawings: the curves were fitted against the photographs alone
_FEW = 3  # pictures of a background that say nothing about how far pictures lie apart


@dataclass(frozen=True)
class Judge:
    """A calibration with the background it was fitted against.

    Attributes:
        calibration: the curves.
        background: unrelated pictures and captions.
    """

    calibration: Calibration
    background: Background

    @classmethod
    def restored(cls, calibration: Mapping[str, Any] | None, background: Mapping[str, Tensor]) -> Judge | None:
        """Put together what a gallery folder holds; None where it holds none.

        Raises:
            ValueError: when it is damaged.
        """
        if calibration is None or not background:
            return None
        try:
            tensors = {name: embeds.float() for name, embeds in background.items()}
            return cls(Calibration.from_dict(calibration), Background(**tensors))
        except TypeError as error:
            raise ValueError(f"This is no background: {error}") from error

    @cached_property
    def unrelated_pictures(self) -> float | None:
        """Mean cosine between pictures that have nothing to do with each other; None where too few tell."""
        pictures = self.background.image_embeds
        return None if len(pictures) < _FEW else cosines_within(pictures).mean().item()

    def judge(self, similarity: Tensor, query_embed: Tensor, direction: Direction, num_candidates: int) -> Judgement:
        """Judge the results of one query, see `Calibration.judge`."""
        return self.calibration.judge(
            similarity, query_embed, direction, num_candidates=num_candidates, background=self.background
        )


def background_items() -> tuple[list[str], list[str]]:
    """List the background's pictures that are on this machine, and its captions.

    Returns:
        Paths of pictures inside installed packages, and captions in English and Chinese.
    """
    pictures, _ = read_hand_written(ASSETS / "gallery" / "sources")
    pictures = [picture for picture in pictures if picture.package != _DRAWN]
    lines = (ASSETS / "parallel_captions.jsonl").read_text("utf-8").splitlines()
    captions = [caption for line in lines for caption in json.loads(line).values()]
    paths = []
    for picture in pictures:
        try:
            paths.append(str(picture.path))
        except FileNotFoundError:
            logger.warning("%s is not installed, so one picture less tells accidents from matches.", picture.package)
    return paths, random.Random(0).sample(captions, BACKGROUND_CAPTIONS)


def background_name() -> str:
    """Name the background by its content, so that a gallery knows when it is out of date."""
    paths, captions = background_items()
    text = json.dumps([[Path(path).name for path in paths], captions])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def build_background(encoder: DualEncoder) -> Background:
    """Embed the background; some seconds for the compact model.

    Raises:
        InputError: when one of its pictures is damaged.
    """
    paths, captions = background_items()
    return Background(
        encoder.encode_images(paths),
        encoder.encode_texts(captions),
        encoder.encode_images(empty_pictures()),
        encoder.encode_texts(nonsense_texts()),
    )


def fit_calibration(
    pictures: Sequence[Picture],
    captions: Sequence[Caption],
    image_embeds: Rows,
    text_embeds: Rows,
    background: Background,
) -> tuple[Calibration, str]:
    """Fit the curves on a gallery's own captioned pictures, or borrow the compact model's where these are few.

    Pictures that the model was trained on make it look surer than it is.

    Args:
        pictures: in the order of the rows of `image_embeds`.
        captions: in the order of the rows of `text_embeds`; `scene` names the picture.
        image_embeds: (num_pictures, embed_dim).
        text_embeds: (num_captions, embed_dim).
        background: none of these items.

    Returns:
        The calibration, and what it was fitted on, in words.
    """
    own: dict[str, list[int]] = {picture.id: [] for picture in pictures}
    for row, caption in enumerate(captions):
        if len(own.get(caption.scene, ())) < MAX_FITTED_CAPTIONS and caption.scene in own:
            own[caption.scene].append(row)
    captioned = [row for row, picture in enumerate(pictures) if own[picture.id]]
    if len(captioned) < MIN_FITTED:
        return BORROWED, "borrowed from the compact model"
    chosen = sorted(random.Random(0).sample(captioned, min(len(captioned), MAX_FITTED)))
    texts = [(place, row) for place, image in enumerate(chosen) for row in own[pictures[image].id]]
    owners, rows = torch.tensor(texts).T
    relevance = (owners[None] == torch.arange(len(chosen))[:, None]).float()
    fitted = Calibration.fit(
        image_embeds[torch.tensor(chosen)].float(), text_embeds[rows].float(), relevance, background, prior=BORROWED
    )
    return fitted, f"fitted on {len(chosen)} pictures with {len(rows)} captions of this gallery"
