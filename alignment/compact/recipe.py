"""Align the two towers: heads on frozen features first, then the image tower's last blocks, then the text side.

Place in the flow: the last step of `python -m alignment.compact`. The weights of several runs of the second stage are
averaged (Wortsman et al., 2022, "Model soups"). Every stage also learns the thousand ImageNet class names, from
`Prototypes` in place of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from alignment.compact.features import VIEWS, ImageFeatures, TextFeatures
from alignment.compact.optimiser import Groups, Optimiser
from alignment.losses import softmax_loss
from alignment.towers import AlignmentHead, ResidualMLP, Tail, join_parts

MAX_SCALE = 100.0


@dataclass(frozen=True)
class Recipe:
    """All that a run of the recipe may vary."""

    seed: int = 0
    heads_epochs: int = 20  # passes over the training pictures
    tail_epochs: tuple[int, ...] = (13, 8, 8)  # of each run of the tail stage; all start from the same heads
    text_epochs: int = 60
    batch_size: int = 256  # pictures a step in the tail stage; the other stages take twice as many
    captions_per_image: int = 2  # drawn for each picture of a step, in each language
    dropout: float = 0.3  # of the heads stage
    tail_dropout: float = 0.25
    text_dropout: float = 0.1
    heads_rate: float = 2e-3  # peak learning rates
    tail_rate: float = 3e-4
    tuned_rate: float = 5e-4  # of the heads while the tail is tuned
    text_rate: float = 2e-3
    weight_decay: float = 0.05
    windows: tuple[int, ...] = (13, 14, 15, 17)  # sides of the windows cut from the 17 x 17 maps, one drawn a step
    neighbours: int = 4  # pictures with similar captions in a batch, so that negatives are hard; 1 for none
    chinese_weight: float = 0.7  # of the Chinese captions beside the English
    names_weight: float = 0.5  # of the class names beside the captions
    names_per_step: int = 256  # class names in a step of the first two stages
    extras_per_step: int = 160  # class names, and as many scenes, in a step of the text stage
    hold_weight: float = 0.1  # of staying near the pretrained features, on whole pictures
    teacher_weight: float = 10.0  # of staying near the teachers' caption embeddings in the text stage
    scenes_weight: float = 1.0  # of the bilingual scenes there
    average: float = 0.995  # decay of the running average of the weights, which is what is kept
    image_weight: tuple[float, float] = (0.0, 0.45)  # of the concept part where ImageNet's head is unsure, and sure
    text_weight: float = 0.15  # of the plain sentence embedding of a text
    trained_image_weight: tuple[float, float] = (0.1, 0.4)  # both while the text head learns: better on dev than those
    trained_text_weight: float = 0.2

    def optimiser(self, module: nn.Module, groups: Groups, steps: int) -> Optimiser:
        """Make the optimiser of a stage."""
        return Optimiser(module, groups, steps, self.weight_decay, self.average)


class Teacher(nn.Module):
    """The caption side of one language that trains the image side: several sentence embeddings side by side."""

    def __init__(self, width: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.project = ResidualMLP(width, embed_dim, 2 * embed_dim, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Embed (..., width) as (..., embed_dim), unit norm."""
        return functional.normalize(self.project(features), dim=-1)


@dataclass(frozen=True)
class Captions:
    """Every caption of one language with the picture it belongs to."""

    features: Tensor  # (num_captions, width), a text side's frozen features
    first: Tensor  # (num_images,) where a picture's captions begin
    count: Tensor  # (num_images,) how many they are

    def draw(self, images: Tensor, each: int) -> Tensor:
        """Choose `each` captions a picture, without repeats while they last: (n, each) row numbers."""
        order = torch.rand(len(images), int(self.count.max()))
        order[torch.arange(order.shape[1]) >= self.count[images, None]] = 2.0
        chosen = order.argsort(dim=1)[:, :each] % self.count[images, None]
        return self.first[images, None] + chosen


class Prototypes:
    """What a picture of each ImageNet class looks like to the pretrained tower, guessed from its classifier.

    A class's row points from the mean feature towards the class; at the typical distance from the mean lies a feature
    that the classifier calls by that class.
    """

    def __init__(self, classifier: nn.Linear, pooled: Tensor) -> None:
        mean, self.spread = pooled.mean((0, 1)), pooled.std((0, 1))
        radius = (pooled - mean).norm(dim=-1).mean()
        rows = classifier.weight.detach()
        self.features = functional.relu(mean + radius * functional.normalize(rows - rows.mean(0), dim=-1))

    def draw(self, classes: Tensor, noise: float = 0.5) -> Tensor:
        """Return noisy features of classes: (n, 1280)."""
        features = self.features[classes]
        return functional.relu(features + noise * self.spread * torch.randn_like(features))


class Aligner(nn.Module):
    """What the first two stages train: the image side, and a teacher for each language."""

    def __init__(self, tail: Tail, head: AlignmentHead, teachers: Mapping[str, Teacher]) -> None:
        super().__init__()
        self.tail, self.head, self.teachers = tail, head, nn.ModuleDict(teachers)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def head_parameters(self) -> list[nn.Parameter]:
        """List what is trained beside the tail."""
        return [*self.head.parameters(), *self.teachers.parameters()]

    def images(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Embed trunk maps; also return the averaged features they went through."""
        with torch.autocast("cpu", torch.bfloat16):
            last = self.tail(maps)
        last = last.float()
        pooled = last.mean((2, 3))
        return self.head(pooled, last.flatten(2).transpose(1, 2)), pooled

    def pooled(self, features: Tensor) -> Tensor:
        """Embed averaged features (n, 1280) as if every token were equal to them."""
        return self.head(features, features.unsqueeze(1))

    def loss(self, images: Tensor, captions: Tensor) -> Tensor:
        """Contrast n pictures with one caption of each, averaged over the captions drawn: (n, each, embed_dim)."""
        scale = self.logit_scale.exp().clamp(max=MAX_SCALE)
        return torch.stack([softmax_loss(scale * images @ drawn.T) for drawn in captions.unbind(1)]).mean()


def train_heads(aligner: Aligner, data: Training) -> None:
    """Stage 1: both heads on frozen features."""
    recipe, size = data.recipe, 2 * data.recipe.batch_size
    steps = recipe.heads_epochs * (len(data.train) // size)
    optimiser = recipe.optimiser(aligner, [(aligner.head_parameters(), recipe.heads_rate)], steps)
    for images in data.batches(size, recipe.heads_epochs):
        embeds = aligner.pooled(data.features.pooled[images, torch.randint(VIEWS, (size,))])
        optimiser.step(data.caption_loss(aligner, embeds, images) + data.names_loss(aligner))
    optimiser.keep_average()


def train_tail(
    aligner: Aligner, data: Training, run: int, measured: Callable[[int, Aligner], None], state: Path
) -> None:
    """Stage 2, one run of it: the heads and the tower's last blocks, on random windows of the cached maps.

    After each epoch `measured` is called with its number and the averaged weights, and the file `state` keeps all that
    a run needs to go on after a stop.
    """
    recipe, features = data.recipe, data.features
    size, whole, epochs = recipe.batch_size, features.maps.shape[-1], recipe.tail_epochs[run]
    set_dropout(aligner, recipe.tail_dropout)
    groups = [(aligner.head_parameters(), recipe.tuned_rate), (list(aligner.tail.parameters()), recipe.tail_rate)]
    steps = len(data.train) // size
    optimiser = recipe.optimiser(aligner, groups, epochs * steps)
    if state.exists():
        optimiser.load(state)
    for epoch in range(optimiser.count // steps, epochs):
        torch.manual_seed(recipe.seed * 10_007 + run * 101 + epoch)
        rng = np.random.default_rng((recipe.seed, run, epoch))
        for images in data.batches(size, 1):
            views, side = torch.randint(VIEWS, (size,)), int(rng.choice(recipe.windows))
            embeds, pooled = aligner.images(features.windows(images, views, side, rng))
            loss = data.caption_loss(aligner, embeds, images) + data.names_loss(aligner)
            if side == whole:
                moved = (pooled - features.pooled[images, views]) / aligner.head.summary_norm.deviation
                loss = loss + recipe.hold_weight * moved.square().mean()
            optimiser.step(loss)
        measured(epoch + 1, cast(Aligner, optimiser.average.module))
        optimiser.save(state)
    optimiser.keep_average()


@dataclass
class Training:
    """The training data of the first two stages."""

    train: Tensor  # rows of the training pictures
    features: ImageFeatures
    captions: Mapping[str, Captions]  # language -> its captions with their teacher's features
    prototypes: Prototypes  # what pictures of the ImageNet classes look like
    names: Mapping[str, Sequence[Tensor]]  # language -> for each class the teacher's features of its names
    recipe: Recipe

    @cached_property
    def near(self) -> Tensor:
        """(num_images, k) rows of the training pictures with the most similar captions."""
        return _nearest(self.train, next(iter(self.captions.values())), k=16)

    def batches(self, size: int, epochs: int) -> Iterator[Tensor]:
        """Draw the training pictures in a new order each epoch; a last incomplete batch is left out."""
        for _ in range(epochs):
            order = self._grouped(self.train[torch.randperm(len(self.train))])
            yield from order[: len(order) // size * size].split(size)

    def _grouped(self, order: Tensor) -> Tensor:
        """Put pictures with similar captions next to each other, in groups of `neighbours` at the most."""
        grouped: dict[int, None] = {}  # an ordered set
        for row in order.tolist():
            if row not in grouped:
                free = [near for near in self.near[row].tolist() if near not in grouped and near != row]
                grouped |= dict.fromkeys([row, *free[: self.recipe.neighbours - 1]])
        start = int(torch.randint(len(grouped), ()))  # late groups are small: they shall not always end the epoch
        return torch.tensor(list(grouped)).roll(-start)

    def caption_loss(self, aligner: Aligner, embeds: Tensor, images: Tensor) -> Tensor:
        """Contrast pictures with captions drawn for them, language by language."""
        total = embeds.new_zeros(())
        for language, captions in self.captions.items():
            told = captions.count[images] > 0
            if told.any():
                rows = captions.draw(images[told], self.recipe.captions_per_image)
                loss = aligner.loss(embeds[told], aligner.teachers[language](captions.features[rows]))
                total = total + self._weight(language) * loss
        return total

    def names_loss(self, aligner: Aligner) -> Tensor:
        """Contrast prototypes with one name of each class, whose text features are in `names`, weighted."""
        total = torch.zeros(())
        for language, names in self.names.items():
            classes = torch.randperm(len(names))[: self.recipe.names_per_step]
            drawn = torch.stack([draw_one(names[row]) for row in classes.tolist()])
            embeds = aligner.pooled(self.prototypes.draw(classes))
            loss = aligner.loss(embeds, aligner.teachers[language](drawn).unsqueeze(1))
            total = total + self._weight(language) * loss
        return self.recipe.names_weight * total

    def _weight(self, language: str) -> float:
        return self.recipe.chinese_weight if language == "zh" else 1.0


def _nearest(train: Tensor, captions: Captions, k: int) -> Tensor:
    """Find for every training picture those with the nearest mean caption features; other rows name themselves."""
    count = captions.count.clamp(min=1)
    owners = torch.arange(len(count)).repeat_interleave(captions.count)
    means = torch.zeros(len(count), captions.features.shape[1]).index_add_(0, owners, captions.features)
    means = functional.normalize(means / count[:, None], dim=-1)
    near = torch.arange(len(count))[:, None].repeat(1, k)
    for rows in train.split(1024):
        similarity = means[rows] @ means[train].T
        near[rows, : min(k, len(train))] = train[similarity.topk(min(k, len(train)), dim=1).indices]
    return near


@dataclass(frozen=True)
class TextTargets:
    """What the text stage learns from; rows index one list of texts."""

    features: TextFeatures  # the frozen text tower's, of all texts
    captions: Mapping[str, Captions]  # language -> its captions with the teacher's embedding of each
    rows: Mapping[str, Tensor]  # language -> rows of its captions
    scenes: Tensor  # rows of the project's own scenes, in English and in Chinese
    scene_teacher: Tensor  # (len(scenes), embed_dim), the English teacher's embedding of the English
    names: Sequence[Tensor]  # rows of each class's names, in both languages
    images: Tensor  # (num_images, views, embed_dim + sentence_dim), the finished image embeddings, both parts
    center: Tensor  # (sentence_dim,), what the concept part takes out of sentence embeddings

    def whole(self, embeds: Tensor, sentences: Tensor, weight: float) -> Tensor:
        """Put the concept part beside aligned texts: (n, embed_dim + sentence_dim), unit norm."""
        return join_parts(embeds, functional.normalize(sentences - self.center, dim=-1), weight)


def train_text(head: AlignmentHead, aligner: Aligner, data: Training, targets: TextTargets) -> None:
    """Stage 3: the text head that ships, against finished image embeddings and the teachers' caption embeddings."""
    recipe, size = data.recipe, 2 * data.recipe.batch_size
    steps = recipe.text_epochs * (len(data.train) // size)
    set_dropout(head, recipe.text_dropout)
    optimiser = recipe.optimiser(head, [(list(head.parameters()), recipe.text_rate)], steps)
    scale = aligner.logit_scale.detach().exp()
    place = torch.full((len(targets.images),), -1)
    place[data.train] = torch.arange(len(data.train))
    for images in data.batches(size, recipe.text_epochs):
        drawn = {language: _draw_one_each(captions, images) for language, captions in targets.captions.items()}
        scenes = torch.randperm(len(targets.scenes))[: recipe.extras_per_step]
        classes = torch.randperm(len(targets.names))[: recipe.extras_per_step]
        named = torch.stack([draw_one(targets.names[row]) for row in classes.tolist()])
        captioned = [targets.rows[language][rows] for language, (rows, _) in drawn.items()]
        tokens, sentences, mask = targets.features.batch(torch.cat([*captioned, targets.scenes[scenes], named]))
        sizes = [*map(len, captioned), len(scenes), len(classes)]
        embeds = head(sentences, tokens, mask)
        parts = embeds.split(sizes)
        wholes = targets.whole(embeds, sentences, recipe.trained_text_weight).split(sizes)
        pictures = targets.images[data.train, torch.randint(VIEWS, (len(data.train),))]
        with torch.no_grad():
            prototypes = aligner.pooled(data.prototypes.draw(classes))
        loss = recipe.scenes_weight * (1 - (parts[-2] * targets.scene_teacher[scenes]).sum(-1)).mean()
        loss = loss + recipe.names_weight * softmax_loss(scale * prototypes @ parts[-1].T)
        for (rows, owned), language, part, whole in zip(drawn.values(), drawn, parts, wholes, strict=False):
            owners = place[owned]
            loss = (
                loss
                + functional.cross_entropy(scale * whole @ pictures.T, owners) / 2
                + functional.cross_entropy(scale * pictures[owners] @ whole.T, torch.arange(len(owners))) / 2
                + recipe.teacher_weight * (1 - (part * targets.captions[language].features[rows]).sum(-1)).mean()
            )
        optimiser.step(loss)
    optimiser.keep_average()


def _draw_one_each(captions: Captions, images: Tensor) -> tuple[Tensor, Tensor]:
    """Choose a caption for each picture that has one: the rows of the captions, and the pictures."""
    told = images[captions.count[images] > 0]
    return captions.draw(told, 1).squeeze(1), told


def set_dropout(module: nn.Module, share: float) -> None:
    """Change the dropout of every layer that has one."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = share


def draw_one(rows: Tensor) -> Tensor:
    """Choose one of some rows."""
    return rows[torch.randint(len(rows), ())]
