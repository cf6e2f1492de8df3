"""Measure composed queries: `python tests/benchmarks/composition.py --data FLICKR8K [--split dev] [--keep FILE]`.

A picture with a word should find pictures that show the word and lie near the picture; a word without another should
find the one and not the other. A picture shows a word if two of its captions say so, and lacks it if none does; so
one whose captions leave a word out counts as lacking it. The product's scores are compared with adding embeddings as
they are, and its minus with plain subtraction. Then near-duplicates: pictures saved again that are not folded, and
distinct ones that are. Intervals are 95 %, over the queries drawn (seed 0). `--keep` keeps embeddings for another run.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignment.data import read_data
from alignment.engine.queries import Query, Term, scores
from alignment.evaluate import embed_pairs
from alignment.evaluate.retrieval import bootstrap, estimates
from alignment.gallery import Gallery
from alignment.gallery.search import NEAR_DUPLICATE_DISTANCE
from alignment.model import DualEncoder
from alignment.preprocess import open_image
from alignment.similarity import cosines_within

ROOT = Path(__file__).resolve().parents[2]
FORMS = {
    "dog": "dog dogs puppy",
    "man": "man men",
    "woman": "woman women lady",
    "boy": "boy boys",
    "girl": "girl girls",
    "snow": "snow snowy",
    "water": "water ocean sea lake river",
    "beach": "beach sand",
    "grass": "grass grassy lawn",
    "ball": "ball tennis soccer football basketball",
    "bicycle": "bike bicycle bikes bicyclist biker",
    "car": "car cars truck",
    "street": "street sidewalk road city",
    "mountain": "mountain mountains mountainside cliff hill",
    "tree": "tree trees forest woods",
    "horse": "horse horses",
    "hat": "hat cap helmet",
}
TRIALS, TOP, NEAR, AGAIN = 600, 10, 50, 250
Rank = Callable[[Iterable[Term]], Tensor]
Sum = dict[str, float]


def embedded(arguments: argparse.Namespace, encoder: DualEncoder) -> dict[str, Tensor]:
    """Embed the split, the words, and some pictures saved again; read it from `--keep` if that is there."""
    if arguments.keep and Path(arguments.keep).is_file():
        return load_file(arguments.keep)
    pairs = read_data(arguments.data, split=arguments.split).pairs
    data = embed_pairs(encoder, pairs)
    captions = [set(re.findall(r"\w+", caption.lower())) for caption in data.texts]
    said = torch.tensor([[bool(words & set(forms.split())) for forms in FORMS.values()] for words in captions])
    counts = torch.zeros(len(data.images), len(FORMS)).index_add(0, data.image_of_text, said.float())
    found = {"image": data.image_embeds, "counts": counts, "word": encoder.encode_texts(list(FORMS))}
    for name, change in CHANGES.items():
        found[f"again.{name}"] = encoder.encode_images([change(open_image(path)) for path in data.images[:AGAIN]])
    if arguments.keep:
        save_file(found, arguments.keep)
    return found


def jpeg(image: Image.Image) -> Image.Image:
    """Save as a poor JPEG."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return open_image(buffer.getvalue())


def cropped(image: Image.Image) -> Image.Image:
    """Cut 5 % off every side."""
    width, height = image.size
    return image.crop((width // 20, height // 20, width - width // 20, height - height // 20))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG quality 40": jpeg,
    "5 % cut off every side": cropped,
    "half size": lambda image: image.resize((image.width // 2, image.height // 2)),
}


# ---------------------------------------------------------------- ways to rank


def embed(term: Term) -> Tensor:
    assert term.embed is not None
    return term.embed


def rankings(images: Tensor, background: Tensor) -> dict[str, Rank]:
    """Name the ways to score all pictures for some terms."""

    def raw(terms: Iterable[Term]) -> Tensor:
        return images @ torch.stack([term.weight * embed(term) for term in terms]).sum(0)

    def product(terms: Iterable[Term]) -> Tensor:
        return scores(Query(tuple(terms)), images, background)

    def plain(terms: Iterable[Term]) -> Tensor:
        alone = [product([Term("x", 1, embed=embed(term))]) * term.weight for term in terms]
        return torch.stack(alone).sum(0)

    def wanted(terms: Iterable[Term]) -> Tensor:
        return product([term for term in terms if term.wanted])

    return {"no minus": wanted, "embeddings as they are": raw, "plain subtraction": plain, "as in the product": product}


def table(title: str, rows: dict[str, list[Sum]]) -> None:
    """Print the mean of each figure with its interval."""
    print(title)
    for name, results in rows.items():
        figures = {key: torch.tensor([row[key] for row in results], dtype=torch.double) for key in results[0]}

        def means(draws: Tensor, figures: dict[str, Tensor] = figures) -> Sum:
            return {key: float((values * draws).sum() / draws.sum()) for key, values in figures.items()}

        found = estimates(bootstrap(means, len(results), resamples=1000, seed=0))
        cells = [f"{key} {one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for key, one in found.items()]
        print(f"  {name:24}" + "   ".join(cells))


# ---------------------------------------------------------------- what is measured


def pictures_and_words(data: dict[str, Tensor], ways: dict[str, Rank], sign: float) -> None:
    """Add a word to a picture that lacks it, or take one away from a picture that shows it."""
    images, counts, rng = data["image"], data["counts"], random.Random(0)
    trials: list[tuple[int, int]] = []
    while len(trials) < TRIALS:
        image, word = rng.randrange(len(images)), rng.randrange(len(FORMS))
        if (counts[image, word] == 0) if sign > 0 else (counts[image, word] >= 2):
            trials.append((image, word))
    rows: dict[str, list[Sum]] = {name: [] for name in ways}
    for image, word in trials:
        terms = [Term(picture="q", embed=images[image]), Term("w", sign, embed=data["word"][word])]
        near = _without(images @ images[image], image).topk(NEAR if sign > 0 else 2 * NEAR).indices
        for name, rank in ways.items():
            top = _without(rank(terms), image).topk(TOP).indices
            shown = (counts[top, word] >= 1).float().mean()
            rows[name].append({"shows the word": float(shown), "near": float(torch.isin(top, near).float().mean())})
    table(f"picture {'+' if sign > 0 else '-'} word, {TRIALS} queries", rows)


def words_without_words(data: dict[str, Tensor], ways: dict[str, Rank]) -> None:
    """Look for one word without another, where there are pictures with both and with the one alone."""
    counts = data["counts"]
    rows: dict[str, list[Sum]] = {name: [] for name in ways}
    for one, other in itertools.permutations(range(len(FORMS)), 2):
        both = (counts[:, one] >= 2) & (counts[:, other] >= 2)
        alone = (counts[:, one] >= 2) & (counts[:, other] == 0)
        if both.sum() < TOP or alone.sum() < 2 * TOP:
            continue
        terms = [Term("a", 1, embed=data["word"][one]), Term("b", -1, embed=data["word"][other])]
        for name, rank in ways.items():
            top = rank(terms).topk(TOP).indices
            shows, lacks = counts[top, one] >= 1, counts[top, other] == 0
            right = (shows & lacks).float().mean()
            rows[name].append(
                {"right": float(right), "a": float(shows.float().mean()), "b": float((~lacks).float().mean())}
            )
    table(f"word a - word b, {len(rows['no minus'])} queries", rows)


def _without(ranking: Tensor, own: int) -> Tensor:
    ranking = ranking.clone()
    ranking[own] = -torch.inf
    return ranking


def near_duplicates(data: dict[str, Tensor], background: Tensor) -> None:
    """Count copies that are missed and distinct pictures that are folded."""
    threshold = 1 - NEAR_DUPLICATE_DISTANCE * (1 - cosines_within(background).mean().item())
    print(f"near-duplicates, cosine from {threshold:.3f}")
    for name in CHANGES:
        copies = data[f"again.{name}"]
        missed = ((copies * data["image"][: len(copies)]).sum(1) < threshold).float().mean()
        print(f"  {name:24}missed {100 * missed:.1f} % of {len(copies)}")
    folded = (cosines_within(data["image"]).amax(1) >= threshold).sum()
    print(f"  distinct pictures with a neighbour that near: {int(folded)} of {len(data['image'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "compact"))
    parser.add_argument("--gallery", default=str(ROOT / "assets" / "gallery"), help="whose background is used")
    parser.add_argument("--data", required=True, help="captioned in English")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--keep", help="file for the embeddings, to measure again without the model")
    arguments = parser.parse_args()
    encoder = DualEncoder.load(arguments.model, device="cpu")
    judge = Gallery.load(arguments.gallery, encoder).judge
    if judge is None:
        raise SystemExit("The gallery has no cohort; build it again.")
    cohort = judge.cohort.image_embeds
    data = embedded(arguments, encoder)
    ways = rankings(data["image"], cohort)
    plus = {name: ways[name] for name in ("embeddings as they are", "as in the product")}
    pictures_and_words(data, plus, 1.0)
    pictures_and_words(data, ways, -1.0)
    words_without_words(data, ways)
    near_duplicates(data, cohort)


if __name__ == "__main__":
    main()
