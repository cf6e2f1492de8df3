"""Rate the results of a gallery's searches by a calibration and its cohort, and fit the two on its own pictures.

Place in the flow: `cohort + captioned pictures -> MatchCalibrator (here) -> gallery -> search`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from alignment.confidence.calibration import DEFAULT_CALIBRATION, Calibration, MatchConfidence
from alignment.confidence.cohort import Cohort, Direction

MIN_FITTED = 100
"""Captioned pictures below which `DEFAULT_CALIBRATION` is used."""

_MAX_FITTED = 1000  # captioned pictures; more only take longer
_MAX_CAPTIONS = 5  # of a picture


class Embeddings(Protocol):
    """Embeddings by position: a tensor, or what reads them when asked."""

    def __getitem__(self, positions: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class MatchCalibrator:
    """A calibration with the cohort it was fitted on."""

    calibration: Calibration
    cohort: Cohort

    @classmethod
    def restored(cls, calibration: Mapping[str, Any] | None, cohort: Mapping[str, Tensor]) -> MatchCalibrator | None:
        """Restore what a gallery holds; None where it holds no calibration or no cohort.

        Raises:
            ValueError: when it is damaged.
        """
        if calibration is None or not cohort:
            return None
        try:
            tensors = {name: embeds.float() for name, embeds in cohort.items()}
            return cls(Calibration.from_dict(calibration), Cohort(**tensors))
        except TypeError as error:
            raise ValueError(f"This is no cohort: {error}") from error

    def assess(
        self, similarity: Tensor, query_embed: Tensor, direction: Direction, num_candidates: int
    ) -> MatchConfidence:
        """Rate the results of one query, see `Calibration.assess`."""
        return self.calibration.assess(
            similarity, query_embed, direction, num_candidates=num_candidates, cohort=self.cohort
        )


def fit_calibration(
    picture_ids: Sequence[str],
    scenes: Sequence[str],
    image_embeds: Embeddings,
    text_embeds: Embeddings,
    cohort: Cohort,
) -> tuple[Calibration, str]:
    """Fit the curves on a gallery's own captioned pictures; below `MIN_FITTED` of them take `DEFAULT_CALIBRATION`.

    On pictures that the model was trained on, the probabilities come out too high.

    Args:
        picture_ids: of each row of `image_embeds` (num_pictures, embed_dim).
        scenes: ids of the pictures that the rows of `text_embeds` (num_captions, embed_dim) describe.
        image_embeds: of the pictures.
        text_embeds: of the captions.
        cohort: holds none of these items.

    Returns:
        The calibration, and a description of what it was fitted on.
    """
    own: dict[str, list[int]] = {id: [] for id in picture_ids}
    for row, scene in enumerate(scenes):
        if scene in own:
            own[scene].append(row)
    captioned = [row for row, id in enumerate(picture_ids) if own[id]]
    if len(captioned) < MIN_FITTED:
        return DEFAULT_CALIBRATION, "borrowed from the compact model"
    chosen = sorted(random.Random(0).sample(captioned, min(len(captioned), _MAX_FITTED)))
    texts = [(place, row) for place, image in enumerate(chosen) for row in own[picture_ids[image]][:_MAX_CAPTIONS]]
    owners, rows = torch.tensor(texts).T
    relevance = (owners[None] == torch.arange(len(chosen))[:, None]).float()
    images, captions = image_embeds[torch.tensor(chosen)].float(), text_embeds[rows].float()
    fitted = Calibration.fit(images, captions, relevance, cohort, prior=DEFAULT_CALIBRATION)
    return fitted, f"fitted on {len(chosen)} pictures with {len(rows)} captions of this gallery"
