"""Measure "nothing fits": `python tests/benchmarks/abstention.py --data DATASET --split dev [--keep FILE]`.

The pictures are split in two; what is fitted on one half is measured on the other, both ways. Half of the queries lose
their true items. The calibration is compared with one flat line on the cosine: each with the line that has the best F1
on the fitting half, and a logistic curve over the cosine where a probability is needed. Nonsense and empty pictures
search the same galleries; here each has the line that refuses a tenth of the true queries of the fitting half. Lorem
ipsum, hashes and blurred blots are of kinds that the background does not hold; the rest are other examples of its own.
Intervals are 95 %, over pictures drawn with all their queries. `--save` fits on all of the split.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignment.calibration import DIRECTIONS, REFUSED, SIZES, Background, Calibration, Curve, Direction, _searches
from alignment.catalogue import read_hand_written
from alignment.evaluate import embed_pairs
from alignment.model import DualEncoder
from alignment.nonsense import empty_pictures as empty_cohort
from alignment.nonsense import nonsense_texts
from alignment.pairs import read_pairs

ROOT = Path(__file__).resolve().parents[2]
BACKGROUND_CAPTIONS = 1024
NONSENSE, EMPTY = 60, 30  # of each kind
WHOLE = 10**9  # all the candidates there are
ECE_BINS = 15


# ---------------------------------------------------------------- what should find nothing


def nonsense(seed: int = 1) -> dict[str, list[str]]:
    """Make strings that say nothing, by kind."""
    rng = random.Random(seed)
    ranges = {"han": (0x4E00, 0x9F00), "cyrillic": (0x430, 0x450), "thai": (0xE01, 0xE2E), "hangul": (0xAC00, 0xD7A0)}
    alphabets = {name: [chr(code) for code in range(*bounds)] for name, bounds in ranges.items()}
    lorem = re.findall(
        r"\w+", "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt"
    )

    def word(alphabet: str | list[str], shortest: int, longest: int) -> str:
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(shortest, longest)))

    def words(alphabet: str | list[str], most: int) -> str:
        return " ".join(word(alphabet, 2, 8) for _ in range(rng.randint(1, most)))

    def mashing() -> str:
        row = rng.choice(["qwertyuiop", "asdfghjkl", "zxcvbnm"])
        start = rng.randrange(len(row) - 3)
        return row[start : start + rng.randint(3, 5)] * rng.randint(1, 4)

    kinds: dict[str, Callable[[], str]] = {
        "letters": lambda: words(string.ascii_lowercase, 7),
        "mashing": mashing,
        "lorem ipsum": lambda: " ".join(rng.choices(lorem, k=rng.randint(3, 10))),
        "punctuation": lambda: word("!?.,;:-_#*+~/|()[]{}<>@%&=^", 1, 20),
        "digits": lambda: words(string.digits, 5),
        "hashes": lambda: word(string.hexdigits, 16, 40),
        "random Han": lambda: word(alphabets["han"], 3, 14),
        "random Cyrillic, Thai, Hangul": lambda: words(alphabets[rng.choice(["cyrillic", "thai", "hangul"])], 6),
    }
    return {kind: [make() for _ in range(NONSENSE)] for kind, make in kinds.items()}


def empty_pictures(seed: int = 1) -> dict[str, list[Image.Image]]:
    """Make pictures that show nothing, by kind."""
    rng = np.random.default_rng(seed)
    side = 224

    def grey_noise() -> np.ndarray:
        noise = rng.uniform(40, 215) + rng.normal(0, rng.uniform(5, 60), (side, side, 1))
        return np.broadcast_to(np.clip(noise, 0, 255), (side, side, 3))

    def gradient() -> np.ndarray:
        start, end = rng.uniform(0, 255, (2, 3))
        angle = rng.uniform(0, 2 * np.pi)
        rows, columns = np.mgrid[0:side, 0:side] / (side - 1) - 0.5
        along = np.clip(columns * np.cos(angle) + rows * np.sin(angle) + 0.5, 0, 1)
        return start + (end - start) * along[..., None]

    def blots() -> np.ndarray:
        few = rng.integers(0, 256, (*rng.integers(3, 12, 2), 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(few).resize((side, side), Image.Resampling.BICUBIC))

    kinds: dict[str, Callable[[], np.ndarray]] = {
        "one colour": lambda: np.full((side, side, 3), rng.integers(0, 256, 3)),
        "noise": lambda: rng.integers(0, 256, (side, side, 3)),
        "grey noise": grey_noise,
        "gradient": gradient,
        "blurred blots of colour": blots,
    }
    return {k: [Image.fromarray(make().astype(np.uint8)) for _ in range(EMPTY)] for k, make in kinds.items()}


# ---------------------------------------------------------------- embeddings


def embed_everything(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Embed the split, the background and what is empty; read it from `--keep` if that is there."""
    if arguments.keep and Path(arguments.keep).is_file():
        return load_file(arguments.keep)
    encoder = DualEncoder.load(arguments.model, device="cpu")
    data = embed_pairs(encoder, read_pairs(arguments.data, split=arguments.split))
    found = {"image": data.image_embeds, "text": data.text_embeds, "owners": data.owners}
    found |= embed_rest(encoder)
    if arguments.keep:
        save_file(found, arguments.keep)
    return found


def embed_rest(encoder: DualEncoder) -> dict[str, Tensor]:
    """Embed the background and what is empty."""
    pictures, _ = read_hand_written(ROOT / "assets" / "gallery" / "sources")
    lines = (ROOT / "assets" / "parallel_captions.jsonl").read_text("utf-8").splitlines()
    captions = [caption for line in lines for caption in json.loads(line).values()]
    found = {
        "background.image": encoder.encode_images([str(picture.path) for picture in pictures]),
        "background.text": encoder.encode_texts(random.Random(0).sample(captions, BACKGROUND_CAPTIONS)),
        "nonsense.image": encoder.encode_images(empty_cohort()),
        "nonsense.text": encoder.encode_texts(nonsense_texts()),
    }
    found |= {f"text_to_image.{kind}": encoder.encode_texts(texts) for kind, texts in nonsense().items()}
    return found | {f"image_to_text.{kind}": encoder.encode_images(few) for kind, few in empty_pictures().items()}


# ---------------------------------------------------------------- measures


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Chance that a positive scores above a negative; ties count half."""
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()
    positives = int(labels.sum())
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * (len(labels) - positives)))


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Gap between what was said and what happened, over bins of equal width."""
    bins = (probabilities * ECE_BINS).long().clamp(0, ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, dtype=torch.double).index_add(0, bins, probabilities - labels.double())
    return float(gaps.abs().sum() / len(labels))


def f1(said: Tensor, labels: Tensor) -> float:
    """F1 of "something fits"."""
    return float(2 * (said & labels).sum() / (said.sum() + labels.sum()).clamp_min(1))


@dataclass
class Rows:
    """Judged searches: probability, raw score, what was said, what is so, and the picture it belongs to."""

    probability: Tensor
    score: Tensor
    said: Tensor
    label: Tensor
    image: Tensor

    def take(self, rows: Tensor) -> Rows:
        return Rows(*(getattr(self, name)[rows] for name in ("probability", "score", "said", "label", "image")))

    def measures(self) -> dict[str, float]:
        return {
            "AUROC": auroc(self.score, self.label),
            "ECE": calibration_error(self.probability, self.label),
            "F1": f1(self.said, self.label),
            "F1 of nothing fits": f1(~self.said, ~self.label),
        }


def join(parts: list[Rows]) -> Rows:
    return Rows(
        *(torch.cat([getattr(p, n) for p in parts]) for n in ("probability", "score", "said", "label", "image"))
    )


def compare(ours: Rows, flat: Rows, resamples: int) -> None:
    """Print both with intervals, and the difference."""
    generator, samples = torch.Generator().manual_seed(0), []
    order = ours.image.argsort(stable=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ours.image.bincount().cumsum(0)])
    images = [order[starts[i] : starts[i + 1]] for i in range(len(starts) - 1) if starts[i] < starts[i + 1]]
    for _ in range(resamples):
        rows = torch.cat([images[i] for i in torch.randint(len(images), (len(images),), generator=generator).tolist()])
        a, b = ours.take(rows).measures(), flat.take(rows).measures()
        samples.append([(a[name], b[name], a[name] - b[name]) for name in a])
    bounds = torch.tensor(samples).quantile(torch.tensor([0.025, 0.975]), dim=0)
    a, b = ours.measures(), flat.measures()
    for row, name in enumerate(a):
        values = (a[name], b[name], a[name] - b[name])
        cells = [f"{v:+.3f}" if i == 2 else f"{v:.3f}" for i, v in enumerate(values)]
        spans = [f"[{bounds[0, row, i]:.3f}, {bounds[1, row, i]:.3f}]" for i in range(3)]
        print(f"    {name:20}" + "".join(f"{c:>9} {s:17}" for c, s in zip(cells, spans, strict=True)))


# ---------------------------------------------------------------- one direction


@dataclass
class Half:
    """One half of the pictures as a search: rows are queries."""

    similarity: Tensor
    positives: Tensor
    queries: Tensor
    candidates: Tensor
    images: Tensor


def half_of(data: Mapping[str, Tensor], direction: Direction, part: int) -> tuple[Half, tuple[Tensor, Tensor, Tensor]]:
    """Take one half; also as what `Calibration.fit` takes."""
    mine = torch.randperm(len(data["image"]), generator=torch.Generator().manual_seed(1)) % 2 == part
    texts = mine[data["owners"]]
    images, captions, owners = data["image"][mine], data["text"][texts], (mine.cumsum(0) - 1)[data["owners"][texts]]
    positives, similarity = owners[None] == torch.arange(len(images))[:, None], images @ captions.T
    numbers = mine.nonzero()[:, 0]
    if direction == "image_to_text":
        half = Half(similarity, positives, images, captions, numbers)
    else:
        half = Half(similarity.T, positives.T, captions, images, numbers[owners])
    return half, (images, captions, owners)


def best_line(probabilities: Tensor, kept: Tensor) -> float:
    """Find the line above which "something fits" has the best F1."""
    lines = torch.linspace(0.02, 0.98, 97, dtype=torch.double)
    return float(max(lines, key=lambda line: f1(probabilities >= line, kept)))


def flat_curve(cosines: Tensor, labels: Tensor) -> Curve:
    """Fit a logistic curve over the cosine alone."""
    columns = torch.zeros(len(cosines), 4, dtype=torch.double)
    columns[:, 0] = cosines
    return Curve.fit(columns, labels)


def on_cosine(curve: Curve, cosines: Tensor) -> Tensor:
    """Read such a curve."""
    return (cosines.double() * curve.score + curve.bias).sigmoid()


def measure(data: Mapping[str, Tensor], direction: Direction, background: Background, resamples: int) -> None:
    """Cross-fit one direction and print its tables."""
    kinds = [name for name in data if name.startswith(f"{direction}.")]
    rows: dict[str, tuple[list[Rows], list[Rows]]] = {}
    refused: dict[str, list[Tensor]] = {}
    for part in (0, 1):
        (fitting, pairs), (measured, _) = half_of(data, direction, part), half_of(data, direction, 1 - part)
        ours = Calibration.fit(*pairs, background)
        seen = list(
            _searches(fitting.similarity, fitting.positives, SIZES[direction], torch.Generator().manual_seed(0))
        )
        best, kept = torch.cat([s.similarity[:, 0] for s in seen]), torch.cat([s.kept for s in seen])
        results = torch.cat([s.similarity for s in seen]), torch.cat([s.right for s in seen])
        real = results[0] > -1.5
        flat, flat_match = flat_curve(best, kept), flat_curve(results[0][real], results[1][real])
        again = torch.cat([background.evidence(s.similarity[:, :1], fitting.queries, s.sizes, direction) for s in seen])
        line = best_line(ours.fits[direction].probability(again)[:, 0], kept)
        flat_line = best_line(on_cosine(flat, best), kept)
        lenient, flat_lenient = ours.lines[direction].may_fit, on_cosine(flat, best)[kept].quantile(REFUSED)
        print(f"  half {part}: {ours.fits[direction]}, line {lenient:.2f}, for F1 {line:.2f}")
        generator = torch.Generator().manual_seed(100 + part)
        for size in (*SIZES[direction], WHOLE):
            (found,) = _searches(measured.similarity, measured.positives, [size], generator)
            p = ours.fits[direction].probability(
                background.evidence(found.similarity, measured.queries, found.sizes, direction)
            )[:, 0]
            m = ours.probability(
                found.similarity, measured.queries, direction, num_candidates=found.sizes, background=background
            )
            cosine, images = found.similarity, measured.images
            q, n = on_cosine(flat, cosine[:, 0]), on_cosine(flat_match, cosine)
            name = "whole half" if size == WHOLE else "galleries of all sizes"
            pair = rows.setdefault(f"something fits, {name}", ([], []))
            pair[0].append(Rows(p, p, p >= line, found.kept, images))
            pair[1].append(Rows(q, q, q >= flat_line, found.kept, images))
            if size == WHOLE:
                empty = background.is_senseless(measured.queries, direction)
                for title, top in (("the best result is right", 1), ("each of ten results is right", 10)):
                    pair = rows.setdefault(f"{title}, whole half", ([], []))
                    truth, who = found.right[:, :top].flatten(), images.repeat_interleave(top)
                    x, y = m[:, :top].flatten(), n[:, :top].flatten()
                    pair[0].append(Rows(x, x, x >= 0.5, truth, who))
                    pair[1].append(Rows(y, y, y >= 0.5, truth, who))
                refused.setdefault(f"(true queries, {len(measured.candidates)} candidates)", []).append(
                    torch.stack([(p < lenient) | empty, q < flat_lenient, empty])[:, found.kept]
                )
        for count in (len(measured.candidates) // 10, len(measured.candidates)):
            chosen = measured.candidates[torch.randperm(len(measured.candidates), generator=generator)[:count]]
            for kind in kinds:
                nearest = (data[kind] @ chosen.T).max(1, keepdim=True).values
                p = ours.fits[direction].probability(background.evidence(nearest, data[kind], count, direction))[:, 0]
                empty = background.is_senseless(data[kind], direction)
                said = torch.stack([(p < lenient) | empty, on_cosine(flat, nearest[:, 0]) < flat_lenient, empty])
                refused.setdefault(f"{kind.partition('.')[2]}, {count} candidates", []).append(said)
    print(f"    {'':20}{'calibrated':27}{'flat cosine':27}difference")
    for title, (left, right) in rows.items():
        print(f"  {title}")
        compare(join(left), join(right), resamples)
    print(f"  refused: {'':43} calibrated            flat cosine           as nonsense alone")
    for title, parts in refused.items():
        shares = torch.cat(parts, dim=1)
        print(f"    {title:50}" + "  ".join(wilson(row) for row in shares))


def wilson(hits: Tensor) -> str:
    """Print a share with its interval."""
    n, p, z = len(hits), float(hits.double().mean()), 1.96
    centre, reach = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((centre + sign * reach) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:5.1f} [{100 * low:4.1f}, {100 * high:5.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "compact"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="dev", help="pictures that the model was not trained on")
    parser.add_argument("--keep", help="file for the embeddings, to measure again without the model")
    parser.add_argument("--save", help="JSON file for the calibration fitted on the whole split")
    parser.add_argument("--resamples", type=int, default=500)
    arguments = parser.parse_args()
    data = embed_everything(arguments)
    names = ("background.image", "background.text", "nonsense.image", "nonsense.text")
    background = Background(*(data[name] for name in names))
    for direction in DIRECTIONS:
        print(direction)
        measure(data, direction, background, arguments.resamples)
    if arguments.save:
        fitted = Calibration.fit(data["image"], data["text"], data["owners"], background)
        Path(arguments.save).write_text(json.dumps(fitted.to_dict(), indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
