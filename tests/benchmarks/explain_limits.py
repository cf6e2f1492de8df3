"""What the colours of an explanation mean: `python tests/benchmarks/explain_limits.py --data FOLDER`.

Flickr8k dev pictures are explained, each with a caption of its own and with one of another picture, on the scale of
the gallery's background. Own captions should light up and foreign ones leave the picture dark. Intervals are 95 %
bootstrap intervals over pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from explain_deletion import ROOT, Row, drawn_pairs, table
from numpy.typing import NDArray

from alignment.engine import AlignmentEngine, Explanation
from alignment.gallery import Gallery
from alignment.model import DualEncoder
from alignment.preprocess import open_image


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with Flicker8k_Dataset and Flickr8k_text")
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "compact"))
    parser.add_argument("--gallery", default=str(ROOT / "assets" / "gallery"))
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    encoder = DualEncoder.load(arguments.model, device="cpu")
    engine = AlignmentEngine(encoder, Gallery.load(arguments.gallery, encoder))
    pairs = drawn_pairs(arguments.data, arguments.pictures, arguments.seed)
    rows: list[Row] = []
    for number, (path, caption) in enumerate(pairs):
        image = open_image(path)
        own, foreign = (engine.explain(image, words) for words in (caption, pairs[number - 1][1]))
        row = {f"own caption: {name}": value for name, value in figures(own).items()}
        row |= {f"foreign caption: {name}": value for name, value in figures(foreign).items()}
        row["own caption is the brighter one"] = float(brightness(own).mean() > brightness(foreign).mean())
        rows.append(row)
    print(f"{len(rows)} pictures, {arguments.model}, seed {arguments.seed}, {engine.scale}")
    for line in table(rows, 2000, arguments.seed):
        print(line)


def brightness(explained: Explanation) -> NDArray[np.float64]:
    """Colour each place as the page does, from 0 for night to 1."""
    low, high = explained.scale.places
    return np.clip((explained.places.astype(np.float64) - low) / (high - low), 0, 1)


def figures(explained: Explanation) -> Row:
    """Sum an explanation up."""
    light, full = brightness(explained), explained.scale.words
    added = np.array([word.contributions[0] for word in explained.words])
    return {
        "cosine": explained.cosine,
        "strong": float(explained.strength == "strong"),
        "nothing": float(explained.strength == "none"),
        "mean brightness": float(light.mean()),
        "places that are dark": float((light == 0).mean()),
        "a tenth of the picture glows": float((light > 0.5).mean() >= 0.1),
        "words of the full colour": float((added >= full).mean()),
        "words against": float((added < -0.1 * full).mean()),
    }


if __name__ == "__main__":
    main()
