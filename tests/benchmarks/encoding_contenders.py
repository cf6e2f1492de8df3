"""One contender of `encoding_speed.py`, in a process of its own: it loads its model and encodes when it is told to.

    python tests/benchmarks/encoding_contenders.py NAME FOLDER THREADS

It says {"ready": NAME} once it has loaded its model. Then it reads a JSON object a line, {"paths": [...], "setting":
{...}, "out": FILE}, encodes those files, leaves their embeddings in FILE and answers with {"seconds": ...}. The clock
runs from the paths to the embeddings. Its log goes to stderr.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Embeds = NDArray[np.float32]
Encode = Callable[..., Embeds]  # (paths, **setting) -> (n, width)
RCLIP_MODEL = "ViT-B-32-256-datacomp_s34b_b86k"  # where rclip looks for its model, below its data folder


def main() -> None:
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    _bind(threads)
    encode = CONTENDERS[name](folder, threads)
    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        prepared = PREPARED[name](task["paths"]) if name in PREPARED else task["paths"]
        start = perf_counter()
        embeds = encode(prepared, **task["setting"])
        seconds = perf_counter() - start
        np.save(task["out"], unit(embeds))
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


def unit(embeds: Embeds) -> Embeds:
    """Scale rows to length 1."""
    embeds = np.asarray(embeds, np.float32)
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)


def _bind(threads: int) -> None:
    """Keep the process on as many cores as it may have threads, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


# ---------------------------------------------------------------- ours


def ours(folder: Path, threads: int) -> Encode:
    """Encode as `alignment.gallery` does, with its default batches."""
    import torch

    from alignment.model import DualEncoder

    torch.set_num_threads(threads)
    encoder = DualEncoder.load(folder, device="cpu")
    return lambda paths: encoder.encode_images(paths).numpy()


# ---------------------------------------------------------------- transformers


def transformers_pil(folder: Path, threads: int) -> Encode:
    """Loop over batches with the image processor that transformers takes without torchvision: on PIL."""
    return _transformers(folder, threads, backend="pil")


def transformers_default(folder: Path, threads: int) -> Encode:
    """Loop with the image processor that transformers takes by itself: on torchvision."""
    return _transformers(folder, threads)


def _transformers(folder: Path, threads: int, **options: str) -> Encode:
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    if json.loads((folder / "config.json").read_text())["model_type"] not in ("clip", "siglip"):
        import alignment.model.composition  # noqa: F401 - registers the compact model's classes
    torch.set_num_threads(threads)
    processor = AutoImageProcessor.from_pretrained(folder, **options)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def encode(paths: list[str], batch: int) -> Embeds:
        found = []
        for start in range(0, len(paths), batch):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + batch]]
            found.append(model.get_image_features(**processor(images, return_tensors="pt")).pooler_output)
        return torch.cat(found).numpy()

    return encode


# ---------------------------------------------------------------- sentence-transformers


def sentence_transformers(folder: Path, threads: int) -> Encode:
    """Encode opened pictures with its model class for CLIP and its relatives, on PyTorch."""
    import torch
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda paths, batch: model.encode(
        [Image.open(path) for path in paths], batch_size=batch, show_progress_bar=False
    )


# ---------------------------------------------------------------- open_clip


def open_clip(folder: Path, threads: int) -> Encode:
    """Encode with its transforms in a data loader, with worker processes or without."""
    return _open_clip(folder, threads, half=False)


def open_clip_bf16(folder: Path, threads: int) -> Encode:
    """Do the same under PyTorch's autocast to bfloat16, as its trainer offers."""
    return _open_clip(folder, threads, half=True)


def _open_clip(folder: Path, threads: int, half: bool) -> Encode:
    import open_clip as library
    import torch
    from PIL import Image

    torch.set_num_threads(threads)
    model, _, transform = library.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()

    class Files(torch.utils.data.Dataset):
        def __init__(self, paths: list[str]) -> None:
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(Image.open(self.paths[index]))

    @torch.inference_mode()
    def encode(paths: list[str], batch: int, workers: int) -> Embeds:
        found = []
        for pixels in torch.utils.data.DataLoader(Files(paths), batch_size=batch, num_workers=workers):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                found.append(model.encode_image(pixels).float())
        return torch.cat(found).numpy()

    return encode


# ---------------------------------------------------------------- rclip


def rclip(folder: Path, threads: int) -> Encode:
    """Index a folder as the rclip command does: its reading threads, its preprocessing, its ONNX Runtime session.

    Its own model takes 256 pixels; told 224, it runs the model that all the others run.
    """
    os.environ["RCLIP_DATADIR"] = str(folder)
    import rclip.utils.preprocess as preprocess
    from rclip import db, model
    from rclip.main import RClip

    preprocess.IMAGE_SIZE = 224
    loaded = model.Model()

    def encode(pictures: str, batch: int) -> Embeds:
        with TemporaryDirectory() as scratch:
            database = db.DB(Path(scratch, "db.sqlite3"))
            indexer = RClip(loaded, database, batch, None)
            indexer.ensure_index(pictures)
            rows = sorted((row["filepath"], row["vector"]) for row in database.get_image_vectors_by_dir_path(pictures))
            indexer.close()
            database.close()
        return np.stack([np.frombuffer(vector, np.float32) for _, vector in rows])

    return encode


def _as_folder(paths: list[str], _folders: dict[tuple[str, ...], TemporaryDirectory[str]] = {}) -> str:  # noqa: B006
    """Put the pictures into a folder of their own, once; rclip takes folders."""
    key = tuple(paths)
    if key not in _folders:
        _folders[key] = TemporaryDirectory()
        for path in paths:
            shutil.copy(path, _folders[key].name)
    return _folders[key].name


CONTENDERS: dict[str, Callable[[Path, int], Encode]] = {
    "ours": ours,
    "transformers": transformers_default,
    "transformers-pil": transformers_pil,
    "sentence-transformers": sentence_transformers,
    "open_clip": open_clip,
    "open_clip-bf16": open_clip_bf16,
    "rclip": rclip,
}
PREPARED: dict[str, Callable[[list[str]], Any]] = {"rclip": _as_folder}


if __name__ == "__main__":
    main()
