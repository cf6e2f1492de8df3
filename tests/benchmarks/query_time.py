"""Time a caption's way through the warm app: `python tests/benchmarks/query_time.py [--json FILE]`.

What the tab "Caption to images" does with a caption, all of it (read, tokenize, embed, search 100,000 pictures, judge,
lay the answer out and write it as JSON), against the text tower's forward pass alone, on the same tokens: as the app
runs it, and as eager PyTorch does. Round after round asks the same caption of each, every round another one, and times
the second time of two: by then the threads of the one before have gone to sleep.

The pictures are made up: records without files. Their embeddings are mixtures of captions' and noise, so that some are
closer to a query than most, as in any gallery; with `--scattered` they point anywhere, the worst case for an index. The
cohort's captions, with which an index is tuned, are not among them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import app  # noqa: F401 - first: it sets up the process, as for visitors

# isort: split
import gradio as gr
import orjson
import torch
from torch.nn.functional import normalize

from alignment.confidence import DEFAULT_CALIBRATION, MatchCalibrator, build_cohort, cohort_items
from alignment.engine import AlignmentEngine
from alignment.gallery import Gallery, Picture
from alignment.gallery.records import GalleryMetadata
from alignment.gallery.writer import write_gallery
from alignment.model import DualEncoder
from alignment.ui.examples import Examples
from alignment.ui.explanation import ExplanationDialog
from alignment.ui.pictures_tab import PicturesTab
from alignment.ui.widgets import as_json

ROOT = Path(__file__).resolve().parents[2]
AIM = 2.5  # times the forward pass as the app runs it
NOISE = 0.5  # length, beside the 1 of what a picture shows
SUBJECTS = ("dog", "cat", "boy", "girl", "man", "bus", "horse", "bird")
PLACES = ("on a beach", "in the snow", "at night", "by a lake", "in a park", "under a tree")

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=100_000, help="in the gallery (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--models", nargs="+", choices=("compact", "ViT-B/32"), default=["compact", "ViT-B/32"])
    parser.add_argument("--scattered", action="store_true", help="embeddings that have nothing to do with each other")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(model, Path(folder), arguments)
    if arguments.json:
        title = f"A caption answered by the warm app, among {arguments.pictures:,} pictures"
        arguments.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1), encoding="utf-8")


def measure(model: str, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Let handler, forward pass and PyTorch take turns, with one model."""
    checkpoint = ROOT / "checkpoints" / "compact" if model == "compact" else save_clip(folder / "model")
    encoder = DualEncoder.load(checkpoint, device="cpu")
    made = make_gallery(encoder, arguments.pictures, arguments.scattered)
    embeds = {"picture": [made.images.embeds], "caption": [made.texts.embeds]}
    cohort = made.judge.cohort.tensors() if made.judge else {}
    write_gallery(folder / "gallery", made.pictures, made.captions, embeds, encoder.embed_dim, made.metadata, cohort)
    engine = AlignmentEngine(encoder, Gallery.load(folder / "gallery", encoder))
    with gr.Blocks():
        tab = PicturesTab(engine, Examples(engine), ExplanationDialog(engine))
        tab.explanation.build("en")
        tab.build(gr.Radio(["en"]), "en")
    eager = DualEncoder.load(checkpoint, device="cpu", runtime="torch").module.get_text_features
    steps: dict[str, Callable[[str], object]] = {
        "handler": lambda caption: orjson.dumps([*map(as_json, [*tab.search("en", caption, ()).values()][2:])]),
        "embedding": lambda caption: encoder.encode_texts([caption]),
        "search": lambda caption: engine.gallery.search_images(embeds[caption], 12),
    }
    captions = [f"a {subject} {place}" for place in PLACES for subject in SUBJECTS]
    embeds = {caption: encoder.encode_texts([caption])[0] for caption in captions}
    tower, tokens = encoder.tower("text"), {caption: encoder.preprocessor.texts([caption]) for caption in captions}
    steps["forward"] = lambda caption: tower(tokens[caption])
    steps["eager"] = lambda caption: eager(**tokens[caption])
    took: dict[str, list[float]] = {name: [] for name in steps}
    with torch.inference_mode():
        for number in range(-10, arguments.rounds):  # the first ones warm up
            order = list(steps.items())
            for name, step in order[number % len(order) :] + order[: number % len(order)]:
                step(captions[number % len(captions)])
                started = time.perf_counter()
                step(captions[number % len(captions)])
                if number >= 0:
                    took[name].append((time.perf_counter() - started) * 1000)
    return report(model, took)


def report(model: str, took: dict[str, list[float]]) -> list[Row]:
    """Print the medians, and write down the ratios."""
    found = {name: median(times) for name, times in took.items()}
    print(f"{model}: " + ", ".join(f"{name} {time:.2f} ms" for name, time in found.items()))
    rows = []
    references = ("forward", "the forward pass alone", AIM), ("eager", "the forward pass in eager PyTorch", None)
    for reference, what, aim in references:
        ratio = median(ours / other for ours, other in zip(took["handler"], took[reference], strict=True))
        print(f"  handler / {what}: {ratio:.2f} (median of the rounds' ratios; aim: {aim})")
        note = (
            f"embedding {found['embedding']:.2f} ms, search {found['search']:.2f} ms" if reference == "forward" else ""
        )
        rows.append(
            {
                "what": f"{model}: caption to answer, against {what}",
                "unit": "ms",
                "ours": found["handler"],
                "reference": found[reference],
                "ratio": ratio,
                "target": aim,
                "note": note,
            }
        )
    return rows


def make_gallery(encoder: DualEncoder, count: int, scattered: bool) -> Gallery:
    """Make pictures up, with descriptions in English and Chinese, and the model's cohort."""
    torch.manual_seed(0)
    embeds = normalize(torch.randn(count, encoder.embed_dim), dim=-1)
    if not scattered:
        scenes = map(json.loads, (ROOT / "assets" / "parallel_captions.jsonl").read_text("utf-8").splitlines())
        others = dict.fromkeys(text for scene in scenes for text in scene.values()).keys() - set(cohort_items()[1])
        captions = encoder.encode_texts(sorted(others))
        captions -= captions.mean(0)  # what all captions have in common, pictures do not
        shares = torch.distributions.Dirichlet(torch.ones(3)).sample((count,))
        mixed = (captions[torch.randint(0, len(captions), (count, 3))] * shares[:, :, None]).sum(1)
        embeds = normalize(normalize(mixed, dim=-1) + NOISE * embeds, dim=-1)
    pictures = [
        Picture(f"p{row}", f"{row % 100}/p{row}.jpg", {"en": f"picture number {row}", "zh": f"第 {row} 张图片"})
        for row in range(count)
    ]
    judge = MatchCalibrator(DEFAULT_CALIBRATION, build_cohort(encoder))
    metadata = GalleryMetadata(
        encoder.fingerprint,
        encoder.name,
        encoder.logit_scale,
        encoder.logit_bias,
        calibration=DEFAULT_CALIBRATION.to_dict(),
    )
    return Gallery(pictures, (), embeds, torch.empty(0, encoder.embed_dim), metadata, judge=judge)


def save_clip(folder: Path) -> Path:
    """Save a CLIP of ViT-B/32's shape with random weights, text tower and all; its tokenizer knows letters only."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word for text in (*SUBJECTS, *PLACES, "a") for word in text.split()}
    known = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges = [pair for word in sorted(words) for pair in spelled(word)]
    known += dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(known))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=77)
    text = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config={"patch_size": 32})
    model = CLIPModel(config)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:  # at the usual scale of random weights all captions are embedded alike
                weights.normal_(std=weights.shape[-1] ** -0.5)
    for part in (model, CLIPImageProcessorPil(), tokenizer):
        part.save_pretrained(folder)
    return folder


def spelled(word: str) -> list[tuple[str, str]]:
    """List the merges that make one token of a word, as CLIP's tokenizer has for every common one."""
    letters = [*word[:-1], word[-1] + "</w>"]
    return [("".join(letters[:place]), letters[place]) for place in range(1, len(letters))]


if __name__ == "__main__":
    main()
