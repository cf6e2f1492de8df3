"""Zero-shot classification: the class whose names lie closest to the picture.

Place in the flow: `folder of class folders + encoder -> zero_shot (here) -> report`. A class is the normalised mean of
the normalised embeddings of all its names in all templates, as in the CLIP paper.

Source: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, section 3.1.4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from alignment.evaluate.bootstrap import Bootstrap, Difference, Estimate, bootstrap, differences, estimates
from alignment.evaluate.class_folders import LabelledImages
from alignment.evaluate.embedding import Encoder, NamedProgress, embed_images, with_name
from alignment.evaluate.ranks import ROUNDING, retrieval_ranks
from alignment.similarity import cosine_similarity

ENGLISH_TEMPLATES = (
    "{}", "a photo of a {}", "a picture of the {}", "a close-up of a {}", "a {} seen from afar",
    "several {} in one picture",
)  # fmt: skip
CHINESE_TEMPLATES = ("{}", "一张{}的照片", "图片里有{}", "{}的特写", "远处的{}", "这是{}")

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_TOPS = (1, 5)


@dataclass(frozen=True)
class ZeroShotReport:
    """Zero-shot accuracy.

    Attributes:
        num_images: pictures classified.
        num_classes: classes to choose from.
        metrics: `zero_shot_top1` and `zero_shot_top5`: share of pictures whose class is among the first 1 or 5.
    """

    num_images: int
    num_classes: int
    metrics: Mapping[str, Estimate]

    def __getitem__(self, name: str) -> float:
        return self.metrics[name].value


def class_ranks(
    encoder: Encoder,
    data: LabelledImages,
    *,
    templates: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: NamedProgress | None = None,
) -> Tensor:
    """Rank each picture's class among all classes, from 1; ties count against the model.

    Args:
        encoder: the model.
        data: pictures, each path once; those that cannot be opened are left out and logged.
        templates: sentences with {} for the name; by default Chinese or English ones by the script of each name.
        batch_size: images per forward pass.
        progress: called with ("pictures" or "class names", done, total).

    Returns:
        (num_images,) int64.

    Raises:
        ValueError: without pictures, on a label without a class, a class without a name, or a template without {}.
    """
    label_of = dict(zip(data.images, data.labels, strict=True))
    if not label_of or not set(data.labels) <= set(range(len(data.class_names))):
        raise ValueError("Zero-shot classification needs pictures, and a class for each of their labels.")
    classes = class_embeddings(encoder, data.class_names, templates, progress)
    images, embeds = embed_images(encoder, data.images, batch_size=batch_size, progress=progress, name="pictures")
    labels = torch.tensor([label_of[image] for image in images])
    positives = functional.one_hot(labels, len(classes)).bool()
    return retrieval_ranks(cosine_similarity(embeds, classes), positives, tolerance=ROUNDING)


def class_embeddings(
    encoder: Encoder,
    class_names: Sequence[Sequence[str]],
    templates: Sequence[str] | None = None,
    progress: NamedProgress | None = None,
) -> Tensor:
    """Embed classes by their names: (num_classes, embed_dim), unit norm; arguments as for `class_ranks`."""
    if any(isinstance(names, str) or not names for names in class_names):
        raise ValueError("Give a list of names for every class, with at least one in it.")
    if templates is not None and not (templates and all(template.count("{}") == 1 for template in templates)):
        raise ValueError(f"Templates hold {{}} once each, where the class name goes, unlike these: {list(templates)}.")
    sentences = [
        [template.replace("{}", name) for name in names for template in templates or _templates_for(name)]
        for names in class_names
    ]
    texts = [text for group in sentences for text in group]
    embeds = functional.normalize(encoder.encode_texts(texts, progress=with_name(progress, "class names")), dim=-1)
    groups = embeds.split([len(group) for group in sentences])
    return functional.normalize(torch.stack([group.mean(dim=0) for group in groups]), dim=-1)


def _templates_for(name: str) -> Sequence[str]:
    return CHINESE_TEMPLATES if _CHINESE.search(name) else ENGLISH_TEMPLATES


def zero_shot_report(ranks: Tensor, num_classes: int, *, resamples: int = 1000, seed: int = 0) -> ZeroShotReport:
    """Compute the accuracy from the ranks of `class_ranks`."""
    return ZeroShotReport(len(ranks), num_classes, estimates(_bootstrap(ranks, resamples, seed)))


def compare_zero_shot(before: Tensor, after: Tensor, *, resamples: int = 1000, seed: int = 0) -> dict[str, Difference]:
    """Compare model A (`before`) with model B (`after`) by their `class_ranks` of the same pictures.

    Raises:
        ValueError: when the two have different numbers of pictures.
    """
    if before.shape != after.shape:
        raise ValueError("The two models were given different pictures; compare them on the same.")
    return differences(_bootstrap(before, resamples, seed), _bootstrap(after, resamples, seed))


def _bootstrap(ranks: Tensor, resamples: int, seed: int) -> Bootstrap:
    hits = {f"zero_shot_top{k}": ranks <= k for k in _TOPS}

    def statistics(draws: Tensor) -> dict[str, float]:
        return {name: int(draws[hit].sum()) / len(ranks) for name, hit in hits.items()}

    return bootstrap(statistics, len(ranks), resamples=resamples, seed=seed)


def zero_shot_line(report: ZeroShotReport) -> str:
    """Format a report as one line of text, in percent."""
    shown = [
        f"top-{name.removeprefix('zero_shot_top')} {found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"
        for name, found in report.metrics.items()
    ]
    return f"zero-shot     {', '.join(shown)}; {report.num_images} pictures, {report.num_classes} classes"
