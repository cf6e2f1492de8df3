"""A cache of the features that the frozen layers of the image side compute.

Place in the flow: between `presets`, which freeze layers, and `dataset`. Frozen layers run once per image instead of
once per epoch; the price is that a cached image comes in one or two fixed views instead of a random crop each time.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor, nn
from torch.nn import functional

from alignment.atomic import exclusive_lock, fsync_path
from alignment.model import DualEncoder
from alignment.preprocess import open_image
from alignment.train.run_dir import is_complete, mark_complete

logger = logging.getLogger(__name__)

Inputs = Mapping[str, Tensor]
Progress = Callable[[int, int], None]

_TEXT_SIDE = ("text_model.", "text_projection.", "logit_")
_TRUNK = ("vision_model.stem.", "vision_model.trunk.", "vision_model.concept.")  # of the compact model
_CHECKSUMS = "kept.json"
_MIN_WINDOW = 0.75  # of the side of a cached feature map


@dataclass(frozen=True)
class FreezePoint:
    """A point in the image side before which no weight is trained.

    `before` turns preprocessor output into cached features by name, (n, ...) each, and `after` those into embeddings,
    (n, embed_dim) unit norm; `name` describes the features.
    """

    name: str
    before: Callable[[Inputs], dict[str, Tensor]]
    after: Callable[[Inputs], Tensor]


def find_freeze_point(encoder: DualEncoder) -> FreezePoint | None:
    """Find the last point before which the image side is frozen; None where its first layers are trained."""
    module = encoder.module
    weights = [name for name, weight in module.named_parameters() if weight.requires_grad]
    trained = [name for name in weights if not name.startswith(_TEXT_SIDE)]
    if not trained:
        return FreezePoint(
            "finished embeddings",
            lambda inputs: {"embeds": encoder.embed_images(inputs)},
            lambda cached: cached["embeds"].to(encoder.device),
        )
    if all(name.startswith("visual_projection.") for name in trained):
        project = module.visual_projection
        return FreezePoint(
            "features before the projection",
            lambda inputs: {"features": _input_of(project, encoder, inputs)},
            lambda cached: functional.normalize(project(cached["features"].to(encoder.device)).float(), dim=-1),
        )
    tower = module.vision_model
    has_stages = hasattr(tower, "until") and tower.config.embed_dim  # EfficientNet-Lite alone has no concept features
    if has_stages and not any(name.startswith(_TRUNK) for name in trained):
        stage = "last_maps" if all(name.startswith("vision_model.head.") for name in trained) else "trunk_maps"
        return FreezePoint(
            "maps before the trained layers",
            lambda inputs: tower.until(stage, inputs["pixel_values"].to(encoder.device)),
            encoder.embed_images,
        )
    return None


def _input_of(projection: nn.Module, encoder: DualEncoder, inputs: Inputs) -> Tensor:
    seen: list[Tensor] = []
    with projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])):
        encoder.embed_images(inputs)
    return seen[0]


class CachedFeatures:
    """The features of every image at a freeze point, plain and mirrored, in files on disk.

    Half-precision memory maps: 1 to 3 KB an image for embeddings and features, 70 to 210 KB for the compact model's
    maps, twice that with mirror images. The folder is named by a hash of what they depend on.
    """

    def __init__(
        self, point: FreezePoint, encoder: DualEncoder, images: Sequence[str], folder: Path, *, augment: bool
    ) -> None:
        self.point, self.encoder, self.images = point, encoder, list(images)
        self.views = 2 if augment else 1
        self.folder = folder / self._key()
        self._maps: dict[str, np.ndarray] = {}

    def fill(self, *, batch_size: int = 16, progress: Progress | None = None) -> None:
        """Compute the features, unless the files are there and intact; an interrupted computation starts again."""
        if not is_complete(self.folder, _CHECKSUMS):
            with exclusive_lock(self.folder.parent, timeout=-1):  # another run may be computing the same features
                if not is_complete(self.folder, _CHECKSUMS):
                    if self.folder.exists():
                        logger.warning("%s is damaged and is made again.", self.folder)
                    partial = self.folder.with_suffix(".partial")
                    for folder in (self.folder, partial):
                        shutil.rmtree(folder, ignore_errors=True)
                    self._write(partial, batch_size, progress)
                    partial.replace(self.folder)
            fsync_path(self.folder.parent)
        self._maps = {path.stem: np.load(path, mmap_mode="r") for path in sorted(self.folder.glob("*.npy"))}

    def _write(self, folder: Path, batch_size: int, progress: Progress | None) -> None:
        folder.mkdir(parents=True)
        with ExitStack() as opened:
            files = {}
            for name, views in self._compute([0]).items():
                files[name] = opened.enter_context((folder / f"{name}.npy").open("wb"))
                header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False}
                shape = (len(self.images), *views.shape[1:])
                np.lib.format.write_array_header_1_0(files[name], header | {"shape": shape})
            for start in range(0, len(self.images), batch_size):
                rows = range(start, min(start + batch_size, len(self.images)))
                for name, views in self._compute(rows).items():
                    files[name].write(views.half().cpu().contiguous().numpy().data)
                if progress is not None:
                    progress(rows.stop, len(self.images))
        mark_complete(folder, _CHECKSUMS)

    def __call__(self, row: int, rng: np.random.Generator, *, mirror: bool = True) -> Inputs:
        """Return one view of an image as a batch of one; the plain view unless it may be mirrored."""
        return self.batch([row], int(rng.integers(self.views)) if mirror else 0)

    @torch.no_grad()
    def embed(self, rows: Sequence[int], batch_size: int = 64) -> Tensor:
        """Embed the plain views: (n, embed_dim) float32, CPU, unit norm."""
        parts = [torch.empty(0, self.encoder.embed_dim)]
        with self.encoder.evaluating():
            for start in range(0, len(rows), batch_size):
                parts.append(self.point.after(self.batch(rows[start : start + batch_size])).cpu())
        return torch.cat(parts)

    def batch(self, rows: Sequence[int], view: int = 0) -> Inputs:
        """Read one view of several images; `fill` comes first."""
        return {
            name: torch.from_numpy(np.stack([maps[row, view] for row in rows]).astype(np.float32))
            for name, maps in self._maps.items()
        }

    @torch.no_grad()
    def _compute(self, rows: Sequence[int]) -> dict[str, Tensor]:
        with self.encoder.evaluating():
            images = [open_image(self.images[row]) for row in rows]
            mirrored = [ImageOps.mirror(image) for image in images] if self.views > 1 else []
            prepare = self.encoder.preprocessor.images
            views = [self.point.before(prepare(view)) for view in (images, mirrored) if view]
        return {name: torch.stack([view[name] for view in views], dim=1) for name in views[0]}

    def _key(self) -> str:
        """Hash everything that the features depend on: freeze point, images, preprocessing, frozen weights."""
        trained = {name for name, weight in self.encoder.module.named_parameters() if weight.requires_grad}
        files = [(image, os.stat(image).st_size, os.stat(image).st_mtime_ns) for image in self.images]
        prepared = self.encoder.preprocessor.image_processor.to_json_string()
        digest = hashlib.sha256(f"{self.point.name} {self.views} {files} {prepared}".encode())
        for name, value in self.encoder.module.state_dict().items():
            if name not in trained and not name.startswith(_TEXT_SIDE):
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def random_window(features: Inputs) -> Inputs:
    """Crop one random square window from all feature maps (n, channels, side, side); other features stay."""
    cropped = dict(features)
    for name, maps in features.items():
        if maps.ndim == 4:
            side = maps.shape[-1]
            width = int(torch.randint(round(_MIN_WINDOW * side), side + 1, ()))
            top, left = (int(torch.randint(side - width + 1, ())) for _ in range(2))
            cropped[name] = maps[:, :, top : top + width, left : left + width]
    return cropped
