"""Zero-shot classification: the class whose names lie closest to the picture.

Place in the flow: `folder of class folders + encoder -> zero_shot (here) -> report`. A class is the normalised mean of
the normalised embeddings of all its names in all templates (Radford et al. 2021, CLIP, section 3.1.4).
"""

import errno
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from alignment.data.files import UNLISTED, walk
from alignment.evaluate.embedding import NamedProgress, embed_images, with_name
from alignment.evaluate.ranks import ROUNDING, retrieval_ranks
from alignment.evaluate.retrieval import Difference, Estimate, Sampled, bootstrap, differences, estimates
from alignment.model import DualEncoder
from alignment.preprocess import IMAGE_SUFFIXES
from alignment.similarity import cosine_similarity

ENGLISH_TEMPLATES = (
    "{}", "a photo of a {}", "a picture of the {}", "a close-up of a {}", "a {} seen from afar",
    "several {} in one picture",
)  # fmt: skip
CHINESE_TEMPLATES = ("{}", "一张{}的照片", "图片里有{}", "{}的特写", "远处的{}", "这是{}")

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_TOPS = (1, 5)


@dataclass(frozen=True)
class LabelledImages:
    """Paths of pictures, the index of each one's class, and all names of each class."""

    images: Sequence[str]
    labels: Sequence[int]
    class_names: Sequence[Sequence[str]]


def read_class_folders(folder: Path, class_names: Path | None = None) -> LabelledImages:
    """Read a folder that holds a folder of pictures for each class, named like it, with underscores for spaces.

    `class_names` is a file with other names, see `read_class_names`; its classes are the candidates, with or without
    pictures, and every folder must be among them. A folder that cannot be listed raises PermissionError: accuracy on a
    part of a class would mislead.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to classify.")
    found: dict[str, list[str]] = {}
    for path in walk(folder, _raise_unlisted):
        name, *below = path.relative_to(folder).parts
        if below and path.suffix.lower() in IMAGE_SUFFIXES:
            found.setdefault(name, []).append(str(path))
    if not found:
        raise ValueError(f"{folder} has no folder with pictures in it; zero-shot classification needs one per class.")
    names = read_class_names(class_names) if class_names else {name: [name.replace("_", " ")] for name in found}
    unnamed = [name for name in found if name not in names]
    if unnamed:
        raise ValueError(f"{class_names} has no name for the folder {unnamed[0]} (and {len(unnamed) - 1} more).")
    index = {name: label for label, name in enumerate(names)}
    images = [picture for pictures in found.values() for picture in pictures]
    labels = [index[name] for name, pictures in found.items() for _ in pictures]
    return LabelledImages(images, labels, list(names.values()))


def _raise_unlisted(reason: str, folder: Path) -> None:
    if reason == UNLISTED:
        raise PermissionError(errno.EACCES, "its pictures cannot be listed", str(folder))


def read_class_names(file: Path) -> dict[str, list[str]]:
    """Read class names: JSON {folder: name or [names]}, or lines of folder and names separated by tabs."""
    text = _read(file)
    if file.suffix.lower() == ".json":
        try:
            content = json.loads(text)
            names = {folder: [name] if isinstance(name, str) else list(name) for folder, name in content.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} is not a JSON object of class names by folder ({error}).") from error
    else:
        rows = [line.split("\t") for line in text.splitlines() if line.strip()]
        names = {row[0].strip(): [name.strip() for name in row[1:] if name.strip()] for row in rows}
    for folder, given in names.items():
        if not given or not all(isinstance(name, str) and name.strip() for name in given):
            raise ValueError(f"{file} has no name for the class {folder!r}; write folder, tab, name.")
    return names


def read_templates(file: Path) -> list[str]:
    """Read templates, one a line, each with {} once for the name."""
    templates = [line.strip() for line in _read(file).splitlines() if line.strip()]
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"{file} must hold a template a line, with {{}} once where the class name goes.")
    return templates


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text.") from error
    except OSError as error:
        raise FileNotFoundError(f"{file} cannot be read ({error.strerror}).") from error


def class_ranks(
    encoder: DualEncoder, data: LabelledImages, *, templates: Sequence[str] | None = None, batch_size: int = 16,
    progress: NamedProgress | None = None,
) -> Tensor:  # fmt: skip
    """Rank each picture's class among all classes, from 1, (num_images,) int64; ties count against the model.

    Pictures that cannot be opened are left out and logged; without any other, ValueError is raised. `templates` are
    sentences with {} for the name, by default Chinese or English ones by the script of each name. `progress` is called
    with ("pictures" or "class names", done, total).
    """
    label_of = dict(zip(data.images, data.labels, strict=True))
    classes = class_embeddings(encoder, data.class_names, templates, progress)
    images, embeds = embed_images(encoder, data.images, "pictures", batch_size=batch_size, progress=progress)
    labels = torch.tensor([label_of[image] for image in images])
    positives = functional.one_hot(labels, len(classes)).bool()
    return retrieval_ranks(cosine_similarity(embeds, classes), positives, tolerance=ROUNDING)


def class_embeddings(
    encoder: DualEncoder, class_names: Sequence[Sequence[str]], templates: Sequence[str] | None = None,
    progress: NamedProgress | None = None,
) -> Tensor:  # fmt: skip
    """Embed classes by their names: (num_classes, embed_dim), unit norm; arguments as for `class_ranks`."""
    sentences = [
        [template.replace("{}", name) for name in names for template in templates or _default_templates(name)]
        for names in class_names
    ]
    texts = [text for group in sentences for text in group]
    embeds = functional.normalize(encoder.encode_texts(texts, progress=with_name(progress, "class names")), dim=-1)
    groups = embeds.split([len(group) for group in sentences])
    return functional.normalize(torch.stack([group.mean(dim=0) for group in groups]), dim=-1)


def _default_templates(name: str) -> Sequence[str]:
    return CHINESE_TEMPLATES if _CHINESE.search(name) else ENGLISH_TEMPLATES


def zero_shot_metrics(ranks: Tensor, *, resamples: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """Compute `zero_shot_top1` and `zero_shot_top5`: the share of pictures whose class ranks among the first 1 or 5."""
    return estimates(_bootstrap(ranks, resamples, seed))


def compare_zero_shot(before: Tensor, after: Tensor, *, resamples: int = 1000, seed: int = 0) -> dict[str, Difference]:
    """Compare model A (`before`) with model B (`after`) by their `class_ranks` of the same pictures."""
    if before.shape != after.shape:
        raise ValueError("The two models were given different pictures; compare them on the same.")
    return differences(_bootstrap(before, resamples, seed), _bootstrap(after, resamples, seed))


def _bootstrap(ranks: Tensor, resamples: int, seed: int) -> Sampled:
    hits = {f"zero_shot_top{k}": ranks <= k for k in _TOPS}

    def statistics(draws: Tensor) -> dict[str, Tensor]:
        return {name: draws[:, hit].sum(1).double() / len(ranks) for name, hit in hits.items()}

    return bootstrap(statistics, len(ranks), resamples=resamples, seed=seed)


def zero_shot_line(metrics: Mapping[str, Estimate], num_images: int, num_classes: int) -> str:
    """Format metrics as one line of text, in percent."""
    shown = [
        f"top-{name.removeprefix('zero_shot_top')} {found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"
        for name, found in metrics.items()
    ]
    return f"zero-shot     {', '.join(shown)}; {num_images} pictures, {num_classes} classes"
