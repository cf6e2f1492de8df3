"""The interface of every dual encoder: pictures and captions in, embeddings out, whatever its family and back end.

Place in the flow: `preprocess -> encoder (here) -> similarity`. Every family has transformers' `get_image_features`
and `get_text_features`, so no code here depends on it. Device, precision and back end stay private to this package.
"""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignment.model import zerogpu
from alignment.model.checkpoints import checkpoint_folder, load_dual_encoder, load_tower, without_progress_bar
from alignment.model.graph_cache import GraphCache, ModelInfo
from alignment.model.openvino import PROBE_CAPTIONS, OpenVINOTower, draw_pictures, export_tower, openvino
from alignment.model.torch_tower import LazyModule, TorchTower, TracedSide, pinned
from alignment.model.tower import Inputs, Kind, Pooling, Projection, Tower, concatenate
from alignment.prefetch import prefetch_map
from alignment.preprocess import ImageSource, Preprocessor, clean_caption

logger = logging.getLogger(__name__)

Runtime = Literal["auto", "openvino", "torch"]
Device = str | torch.device | None
Progress = Callable[[int, int], None]
StrPath = str | os.PathLike[str]
Item = TypeVar("Item")

MIN_PARAMS_TO_EXPORT = 2_000_000  # for "auto"; smaller models take longer to export than graphs save
_IMAGE_BATCH = {"cpu": 8, "cuda": 256}  # pictures per forward pass by device
_TEXT_BATCH = {"cpu": 64, "cuda": 1024}


def best_device() -> str:
    """Name the fastest kind of device that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_device(name: Device = None) -> torch.device:
    """Find "cuda", "cuda:1", "mps", "cpu", or by default the best there is; ValueError when it is not here."""
    name = name or best_device()
    try:
        device = torch.device(name)
    except RuntimeError:  # no name of a device at all
        device = None
    if device is None or not _is_there(device):
        raise ValueError(
            f"PyTorch has no device {str(name)!r} to use here: choose cuda, mps or cpu, or leave --device out for the "
            f"best there is, {best_device()}."
        )
    return device


def _is_there(device: torch.device) -> bool:
    """Look for a device without touching it: each process would take memory of its own there."""
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu" or (device.type == "mps" and torch.backends.mps.is_available())


class DualEncoder:
    """A pair of encoders that put images and texts into one space; safe to use from several threads.

    `runtime` "openvino" runs the towers as OpenVINO graphs on a CPU, "torch" the module itself; "auto" chooses graphs
    where they are worth it. Weights that were changed are always run by PyTorch. `name` is what it was loaded from.
    """

    def __init__(
        self, module: Any, preprocessor: Preprocessor, *, name: str, device: Device = None, runtime: Runtime = "auto"
    ) -> None:
        """Take a transformers model, or a function that loads one when it is first needed; see the class."""
        self.device = torch.device(device or best_device())
        self.preprocessor, self.name, self.runtime = preprocessor, name, runtime
        self._lazy = LazyModule(module, self.device)
        self._cache = GraphCache(None)
        self._info: ModelInfo | None = None
        self._graphs: dict[Kind, OpenVINOTower | None] = {}
        self._torch: dict[Kind, TorchTower] = {kind: TorchTower(self._lazy, kind) for kind in get_args(Kind)}
        self._zerogpu: Tower | None = None
        self._lock = threading.RLock()

    @property
    def module(self) -> Any:
        """The transformers model, float32, in evaluation mode; built when first asked for."""
        self._lazy.exposed = True
        return self._lazy.get()

    @classmethod
    def load(
        cls, name_or_path: StrPath, *, revision: str | None = None, device: Device = None, runtime: Runtime = "auto"
    ) -> Self:
        """Load a CLIP, SigLIP, SigLIP2, Chinese-CLIP, vision-text-dual-encoder or composed checkpoint.

        It is a folder, or a Hub id at a branch, tag or commit (`revision`). The `device` is "cuda", "mps" or "cpu", by
        default the best one there is, and on ZeroGPU the CPU, with a GPU for many pictures at once. Raises
        FileNotFoundError when the checkpoint, its safetensors, tokenizer or image processor is missing, and ValueError
        when it is no dual encoder, is damaged or needs code of its own, or there is no such device.
        """
        name = os.fspath(name_or_path)
        on_zerogpu = device is None and zerogpu.on_zerogpu()
        device = find_device("cpu" if on_zerogpu else device)
        folder = checkpoint_folder(name, revision)
        load_module = partial(load_dual_encoder, folder, name)
        graphs_are_used = device.type == "cpu" and runtime != "torch" and openvino() is not None
        cache = GraphCache.of(folder) if graphs_are_used else GraphCache(None)
        info = cache.info()
        # An unknown model is built now, so that its faults show; a known one only if its graphs are not enough.
        module = load_module() if info is None else load_module
        encoder = cls(module, Preprocessor.load(folder), name=name, device=device, runtime=runtime)
        encoder._cache, encoder._info, encoder._lazy.exposed = cache, info, False
        if on_zerogpu:
            zerogpu.patch_cuda_capture()
            gpu = TorchTower(LazyModule(load_module(), torch.device(zerogpu.GPU_DEVICE)), "image")
            encoder._zerogpu = zerogpu.ZeroGPUTower(gpu, lambda inputs: encoder._local_tower("image")(inputs))
        return encoder

    @classmethod
    def compose(
        cls, vision: StrPath, text: StrPath, *, embed_dim: int = 512,
        pooling: Pooling | tuple[Pooling, Pooling] = ("pooler", "mean"), projection: Projection = "linear",
        device: Device = None,
    ) -> Self:  # fmt: skip
        """Join a vision tower and a text tower with fresh projections; train it before use.

        A tower is a folder or Hub id; of a dual encoder its half is taken. `pooling`, of both or as (vision, text), is
        the mean of all tokens (padding left out), the first token ("cls"), or the tower's own pooler. `projection` is
        "linear", "mlp" for a linear layer plus a two-layer correction, or "none" for towers that already share a space
        of width `embed_dim`. Raises what `load` raises, and ValueError when a tower has no such pooling, or a pooler
        that was never trained.
        """
        from alignment.model.composition import ComposedConfig, ComposedModel, pooled_width

        device = find_device(device)
        names = os.fspath(vision), os.fspath(text)
        folders = checkpoint_folder(names[0], None), checkpoint_folder(names[1], None)
        vision_pooling, text_pooling = (pooling, pooling) if isinstance(pooling, str) else pooling
        preprocessor = Preprocessor.load(*folders)
        vision_model = load_tower(folders[0], "vision", vision_pooling)
        text_model = load_tower(folders[1], "text", text_pooling)
        blank = preprocessor.images([Image.new("RGB", (64, 64))])
        config = ComposedConfig(
            vision_config=vision_model.config.to_dict(),  # a copy: the new config resets what it is given
            text_config=text_model.config.to_dict(),
            projection_dim=embed_dim,
            vision_pooling=vision_pooling,
            text_pooling=text_pooling,
            vision_width=pooled_width(vision_model, vision_pooling, blank, "pixel_attention_mask"),
            text_width=pooled_width(text_model, text_pooling, preprocessor.texts(["a"]), "attention_mask"),
            projection=projection,
        )
        module = ComposedModel(config, vision_model, text_model)
        return cls(module, preprocessor, name=" + ".join(names), device=device)

    def save(self, folder: StrPath) -> None:
        """Write weights (float32 safetensors), configuration, image processor and tokenizer; `load` reads them back."""
        with without_progress_bar():
            self.module.save_pretrained(folder)
        for weights in Path(folder).glob("*.safetensors"):
            shutil.copymode(Path(folder, "config.json"), weights)  # safetensors writes 0600
        self.preprocessor.save(folder)

    @property
    def logit_scale(self) -> float:
        """Multiplier of the cosines, already exponentiated."""
        return self._known_info.logit_scale

    @property
    def logit_bias(self) -> float | None:
        """What is added to the scaled cosines; None for models trained with a softmax."""
        return self._known_info.logit_bias

    @property
    def embed_dim(self) -> int:
        """Width of the shared space."""
        return self._known_info.embed_dim

    @property
    def fingerprint(self) -> str:
        """Sha256 over the weights; anew once they have changed (other than through `.data`, which leaves no trace)."""
        return self._known_info.fingerprint or self._lazy.fingerprint()

    @property
    def _known_info(self) -> ModelInfo:
        """Properties of the model as it is now; the fingerprint is empty once the module is built."""
        return self._lazy.info() if self._lazy.is_built or self._info is None else self._info

    def encode_images(
        self, images: Sequence[ImageSource], *, batch_size: int | None = None, progress: Progress | None = None
    ) -> Tensor:
        """Embed anything `open_image` takes, opened as it is needed: (n, embed_dim) float32, CPU, unit norm, in order.

        A `batch_size` of None suits the device; `progress` is called after each batch with (done, total). Raises
        InputError when a picture cannot be opened.
        """
        sources, prepare = _listed(images), self.preprocessor.image
        # One picture is decoded while another is embedded.
        inputs = prefetch_map(prepare, sources) if len(sources) > 1 else (prepare(source) for source in sources)
        with closing(inputs), closing(self._batched(inputs, batch_size)) as batches:
            return self._encode_batches("image", batches, len(sources), progress)

    def encode_texts(
        self, texts: Sequence[str], *, batch_size: int | None = None, progress: Progress | None = None
    ) -> Tensor:
        """Embed captions; as for `encode_images`, and an InputError when one of them is empty or too long."""
        captions = [clean_caption(text) for text in _listed(texts)]
        size = batch_size or _TEXT_BATCH.get(self.device.type, 64)
        batches = (self.preprocessor.texts(captions[start : start + size]) for start in range(0, len(captions), size))
        return self._encode_batches("text", batches, len(captions), progress)

    def encode_prepared(self, inputs: Iterable[Inputs], *, batch_size: int | None = None) -> Iterator[Tensor]:
        """Embed pictures as their inputs come, each what `preprocessor.images` made of one: (embed_dim,), in order."""
        with closing(self._batched(inputs, batch_size)) as batches, closing(self._stream("image", batches)) as embedded:
            for embeds in embedded:
                yield from embeds

    def embed_images(self, inputs: Inputs) -> Tensor:
        """Embed what `preprocessor.images` made; on the device and with gradients, for training."""
        return self._torch["image"].embed(inputs)

    def embed_texts(self, inputs: Inputs) -> Tensor:
        """Embed what `preprocessor.texts` made; on the device and with gradients, for training."""
        return self._torch["text"].embed(inputs)

    def evaluating(self) -> AbstractContextManager[Any]:
        """Switch dropout off, and back on afterwards if the model is being trained."""
        return self._lazy.evaluating()

    @property
    def in_memory(self) -> frozenset[str]:
        """Name what has been loaded so far: "module" for the PyTorch model, "image" and "text" for graphs."""
        graphs = {str(kind) for kind, graph in self._graphs.items() if graph is not None}
        return frozenset(graphs | ({"module"} if self._lazy.is_built else set()))

    def tower(self, kind: Kind) -> Tower:
        """Choose the back end of one side: ZeroGPU, an OpenVINO graph or PyTorch, which runs changed weights."""
        if kind == "image" and self._zerogpu is not None and not self._lazy.is_changed:
            return self._zerogpu
        return self._local_tower(kind)

    def _local_tower(self, kind: Kind) -> Tower:
        """Choose between the graph of a side, exported when first needed, and PyTorch."""
        if self._lazy.is_changed:
            return self._torch[kind]
        if kind not in self._graphs:
            with self._lock:
                if kind not in self._graphs:
                    self._graphs[kind] = self._find_graph(kind)
        return self._graphs[kind] or self._torch[kind]

    def _find_graph(self, kind: Kind) -> OpenVINOTower | None:
        if self.device.type != "cpu" or self.runtime == "torch" or openvino() is None:
            return None
        if (graph := self._cache.tower(kind)) is not None:
            if self._cache.info() is None:
                self._write_info()
            return graph
        weights = self._lazy.get().parameters()
        if self.runtime == "auto" and sum(weight.numel() for weight in weights) < MIN_PARAMS_TO_EXPORT:
            return None
        try:
            make = partial(self._cache.make, kind, partial(self._export, kind))
            graph = make() if self._zerogpu is None else zerogpu.run_in_thread(make)
            self._write_info()
            return graph
        except Exception as error:  # tracing an unknown family raises anything; PyTorch runs it as well
            logger.warning("PyTorch runs the %s tower of %s, more slowly than a graph: %s", kind, self.name, error)
            return None

    def _write_info(self) -> None:
        self._cache.write_info(replace(self._known_info, fingerprint=self._lazy.fingerprint()))

    def _export(self, kind: Kind, path: Path) -> str:
        if kind == "image":
            drawn = draw_pictures()
            batches = [self.preprocessor.images(pictures) for pictures in (drawn[:2], drawn[2:])]
        else:
            batches = [self.preprocessor.texts(captions) for captions in PROBE_CAPTIONS]
        return export_tower(kind, TracedSide(self._lazy.get(), kind, list(batches[0])).eval(), batches, path)

    def _batched(self, inputs: Iterable[Inputs], size: int | None) -> Generator[Inputs]:
        """Join the inputs of single pictures to batches; for a GPU while it computes the batch before."""
        stream, size = iter(inputs), size or _IMAGE_BATCH.get(self.device.type, 8)
        groups = iter(lambda: list(islice(stream, size)), [])
        cuda = self.device.type == "cuda"
        joined = prefetch_map(pinned, groups, workers=1, depth=2) if cuda else (concatenate(group) for group in groups)
        with closing(joined) as batches:
            yield from batches

    def _encode_batches(self, kind: Kind, batches: Iterable[Inputs], total: int, progress: Progress | None) -> Tensor:
        embeds, done = list[Tensor](), 0
        with closing(self._stream(kind, batches)) as embedded:
            for rows in embedded:
                embeds.append(rows)
                done += len(rows)
                if progress is not None:
                    progress(done, total)
        return embeds[0] if len(embeds) == 1 else torch.cat([torch.empty(0, self.embed_dim), *embeds])

    def _stream(self, kind: Kind, batches: Iterable[Inputs]) -> Generator[Tensor]:
        """Embed batch after batch; refuse embeddings that are not finite."""
        with closing(self.tower(kind).stream(batches)) as embedded:
            for embeds in embedded:
                if not np.isfinite(embeds.numpy()).all():
                    raise ValueError(
                        f"{self.name} makes embeddings that are no numbers (NaN or infinite): its weights are damaged, "
                        "or its training failed. Download or train it again, or choose another --model."
                    )
                yield embeds


def _listed(items: Sequence[Item]) -> Sequence[Item]:
    if isinstance(items, str | bytes):
        raise TypeError("Pass a list, even for a single item.")
    return items
