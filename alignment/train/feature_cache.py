"""What training leaves alone is computed once: the frozen beginning of the image side, kept for every picture.

Place in the flow: between `presets`, which say what is trained, and `examples`. A locked image tower costs one pass
over the pictures instead of one an epoch, which makes a locked tower, or heads alone, a matter of minutes on a laptop.
The price is that a kept picture comes in a few fixed views instead of endlessly many.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor, nn
from torch.nn import functional

from alignment.durable import read_sealed, sha256_of, sole_writer, sync, sync_tree, write_sealed
from alignment.model import DualEncoder
from alignment.preprocess import open_image

logger = logging.getLogger(__name__)

Inputs = Mapping[str, Tensor]

_TEXT_SIDE = ("text_model.", "text_projection.", "logit_")
_TRUNK = ("vision_model.stem.", "vision_model.trunk.", "vision_model.concept.")  # of our own compact model
_HASHES = "kept.json"
_SMALLEST_WINDOW = 0.75  # of the side of a kept map


@dataclass(frozen=True)
class FreezePoint:
    """A place in the image side before which nothing is trained.

    Attributes:
        name: what is kept, for people to read.
        before: preprocessor output -> what is kept of the images, by name, (n, ...) each.
        after: the rest of the way, to (n, embed_dim) unit norm.
    """

    name: str
    before: Callable[[Inputs], dict[str, Tensor]]
    after: Callable[[Inputs], Tensor]


def find_freeze_point(encoder: DualEncoder) -> FreezePoint | None:
    """Find the last place before which the image side is frozen; None where its first layers are trained."""
    module = encoder.module
    trained = tuple(
        name for name, weight in module.named_parameters() if weight.requires_grad and not name.startswith(_TEXT_SIDE)
    )
    if not trained:
        return FreezePoint(
            "finished embeddings",
            lambda inputs: {"embeds": encoder.embed_images(inputs)},
            lambda kept: kept["embeds"].to(encoder.device),
        )
    if all(name.startswith("visual_projection.") for name in trained):
        return FreezePoint(
            "features before the projection",
            lambda inputs: {"features": _input_of(module.visual_projection, encoder, inputs)},
            lambda kept: _projected(module.visual_projection, kept["features"].to(encoder.device)),
        )
    tower = module.vision_model
    aligned = hasattr(tower, "until") and tower.config.embed_dim  # the plain tower has no concepts to keep
    if aligned and not any(name.startswith(_TRUNK) for name in trained):
        stage = "last_maps" if all(name.startswith("vision_model.head.") for name in trained) else "trunk_maps"
        return FreezePoint(
            "maps before the trained layers",
            lambda inputs: tower.until(stage, inputs["pixel_values"].to(encoder.device)),
            encoder.embed_images,
        )
    return None


def _projected(projection: nn.Module, features: Tensor) -> Tensor:
    return functional.normalize(projection(features).float(), dim=-1)


def _input_of(projection: nn.Module, encoder: DualEncoder, inputs: Mapping[str, Tensor]) -> Tensor:
    """Embed images and return what the projection was given."""
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        encoder.embed_images(inputs)
    finally:
        handle.remove()
    return seen[0]


class CachedFeatures:
    """What the frozen part made of every image, as it is and mirrored, in files on disk.

    Half-precision memory maps: 1 to 3 KB an image for embeddings and features, 70 to 210 KB for the compact model's
    maps, twice that with mirror images. They are named after the frozen weights and the images, so a resumed run finds
    them and no other run is given them by mistake.
    """

    def __init__(
        self, cut: FreezePoint, encoder: DualEncoder, images: Sequence[str], folder: Path, *, augment: bool
    ) -> None:
        self.cut, self.encoder, self.images = cut, encoder, list(images)
        self.views = 2 if augment else 1
        self.folder = folder / f"{self._key()}"
        self._kept: dict[str, np.ndarray] = {}

    def fill(self, *, batch_size: int = 16, progress: Callable[[int, int], None] | None = None) -> None:
        """Make the files, unless they are there and whole; what a killed run has begun is made anew."""
        if not self._is_whole():
            with sole_writer(self.folder.parent, patience=-1):  # another run may be making the same
                if not self._is_whole():
                    shutil.rmtree(self.folder, ignore_errors=True)
                    partial = self.folder.with_suffix(".partial")
                    self._write(partial, batch_size, progress)
                    partial.replace(self.folder)
            sync(self.folder.parent)
        self._kept = {path.stem: np.load(path, mmap_mode="r") for path in sorted(self.folder.glob("*.npy"))}

    def _write(self, folder: Path, batch_size: int, progress: Callable[[int, int], None] | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with ExitStack() as opened:
            files = {}
            for name, view in self._compute([0]).items():
                files[name] = opened.enter_context((folder / f"{name}.npy").open("wb"))
                shape = (len(self.images), *view.shape[1:])
                about = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False}
                np.lib.format.write_array_header_1_0(files[name], about | {"shape": shape})
            for start in range(0, len(self.images), batch_size):
                rows = range(start, min(start + batch_size, len(self.images)))
                for name, views in self._compute(rows).items():
                    files[name].write(views.half().cpu().contiguous().numpy().data)
                if progress is not None:
                    progress(rows.stop, len(self.images))
        write_sealed(folder / _HASHES, {path.name: sha256_of(path) for path in sorted(folder.glob("*.npy"))})
        sync_tree(folder)

    def _is_whole(self) -> bool:
        """Whether the files are there, every byte as it was written."""
        try:
            files = read_sealed(self.folder / _HASHES)
            return all(sha256_of(self.folder / name) == sha256 for name, sha256 in files.items())
        except (OSError, ValueError) as error:
            if self.folder.exists():
                logger.warning("%s is damaged and is made again: %s", self.folder, error)
            return False

    def __call__(self, row: int, rng: np.random.Generator, *, mirror: bool = True) -> Inputs:
        """Return one view of an image as a batch of one; the image as it is unless it may be mirrored."""
        return self._batch([row], int(rng.integers(self.views)) if mirror else 0)

    @torch.no_grad()
    def embed(self, rows: Sequence[int], batch_size: int = 64) -> Tensor:
        """Finish images as they are: (n, embed_dim) float32, CPU, unit norm."""
        with _evaluating(self.encoder.module):
            parts = [
                self.cut.after(self._batch(rows[start : start + batch_size], 0)).cpu()
                for start in range(0, len(rows), batch_size)
            ]
        return torch.cat([torch.empty(0, self.encoder.embed_dim), *parts])

    def _batch(self, rows: Sequence[int], view: int) -> Inputs:
        assert self._kept, "fill() comes first"
        return {
            name: torch.from_numpy(np.stack([kept[row, view] for row in rows]).astype(np.float32))
            for name, kept in self._kept.items()
        }

    @torch.no_grad()
    def _compute(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return (n, views, ...) by name."""
        with _evaluating(self.encoder.module):
            pictures = [open_image(self.images[row]) for row in rows]
            mirrored = [ImageOps.mirror(picture) for picture in pictures] if self.views > 1 else []
            prepare = self.encoder.preprocessor.images
            views = [self.cut.before(prepare(view)) for view in (pictures, mirrored) if view]
        return {name: torch.stack([view[name] for view in views], dim=1) for name in views[0]}

    def _key(self) -> str:
        """Tell apart what may differ: where it was cut, the pictures, how they are prepared, the frozen weights."""
        trained = {name for name, weight in self.encoder.module.named_parameters() if weight.requires_grad}
        files = [(image, os.stat(image).st_size, os.stat(image).st_mtime_ns) for image in self.images]
        prepared = self.encoder.preprocessor.image_processor.to_json_string()
        digest = hashlib.sha256(f"{self.cut.name} {self.views} {files} {prepared}".encode())
        for name, value in self.encoder.module.state_dict().items():
            if name not in trained and not name.startswith(_TEXT_SIDE):
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def random_window(kept: Inputs) -> Inputs:
    """Cut one square window out of kept maps (n, channels, side, side), the same for all; the rest stays as it is."""
    cut = dict(kept)
    for name, maps in kept.items():
        if maps.ndim == 4:
            side = maps.shape[-1]
            width = int(torch.randint(round(_SMALLEST_WINDOW * side), side + 1, ()))
            top, left = (int(torch.randint(side - width + 1, ())) for _ in range(2))
            cut[name] = maps[:, :, top : top + width, left : left + width]
    return cut


@contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
