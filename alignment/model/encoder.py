"""The face of a dual encoder: whatever its family and whatever runs it, pictures and captions in, embeddings out.

Place in the flow: `preprocess -> encoder (here) -> similarity`. Every family answers to transformers'
`get_image_features` and `get_text_features`, so there is one code path and no branch on the family. What leaves is
float32, on the CPU and of unit norm; device, precision and run-time are nobody else's business.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from alignment.ahead import ahead
from alignment.durable import open_up
from alignment.model.checkpoints import checkpoint_folder, load_dual_encoder, load_tower, without_progress_bar
from alignment.model.devices import best_device, find_device
from alignment.model.graphs import Facts, Graphs
from alignment.model.lent import LentTower, apart, ask_no_driver, is_lent
from alignment.model.runtime import (
    PROBE_CAPTIONS,
    Kind,
    Tower,
    export_tower,
    openvino,
    probe_pictures,
)
from alignment.preprocess import ImageSource, Preprocessor, clean_caption

if TYPE_CHECKING:  # what builds models is imported when one is built
    from alignment.model.composition import Pooling, Projection

logger = logging.getLogger(__name__)

Runtime = Literal["auto", "openvino", "torch"]
Progress = Callable[[int, int], None]
Item = TypeVar("Item")

WORTH_A_GRAPH = 2_000_000
"""Weights from which "auto" makes graphs; below, they take longer to make than they save."""

_IMAGES_AT_ONCE = {"cpu": 8, "cuda": 256}  # pictures per forward pass by device
_TEXTS_AT_ONCE = {"cpu": 64, "cuda": 1024}
_WORTH_WIDENING = 4  # batches after which it pays to compile a tower a second time, for several at once


class DualEncoder:
    """A pair of encoders that put images and texts into one space; safe to use from several threads.

    Attributes:
        preprocessor: turns opened images and captions into the model's inputs.
        name: what it was loaded from.
        device: where it runs.
        runtime: "openvino" runs the towers as OpenVINO graphs on a CPU, "torch" the module itself; "auto" chooses
            graphs where they are worth it. Weights that were changed are always run by PyTorch.
    """

    def __init__(
        self,
        module: Any,
        preprocessor: Preprocessor,
        *,
        name: str,
        device: str | torch.device | None = None,
        runtime: Runtime = "auto",
    ) -> None:
        """Take a transformers model; it is moved to the device and switched to evaluation.

        Args:
            module: a model, or a function that loads one when it is first needed.
            preprocessor: of the same checkpoint.
            name: what it was loaded from.
            device: "cuda", "mps", "cpu"; the best one there is when None.
            runtime: see the class.
        """
        self.device = torch.device(device or best_device())
        self.preprocessor = preprocessor
        self.name = name
        self.runtime = runtime
        self._graphs = Graphs(None)
        self._facts: Facts | None = None
        self._towers: dict[Kind, Tower | None] = {}
        self._lent: LentTower | None = None
        self._lock = threading.RLock()
        self._load: Callable[[], Any] | None = None
        self._module: Any = None
        self._as_loaded: object = None
        self._handed_out = False  # to whoever may change it
        self._hashed: tuple[object, str] = (None, "")
        if isinstance(module, nn.Module):
            self._take(module)
            self._handed_out = True
        else:
            self._load = module

    def _take(self, module: Any) -> None:
        self._module = module.to(self.device).eval()
        self._as_loaded = self._state_seen()

    @property
    def module(self) -> Any:
        """The transformers model, float32, in evaluation mode; built when first asked for."""
        module, self._handed_out = self._built(), True
        return module

    def _built(self) -> Any:
        if self._module is None:  # who only reads it need not wait for a graph that another thread is making
            with self._lock:
                if self._module is None:
                    assert self._load is not None
                    self._take(self._load())
        return self._module

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        runtime: Runtime = "auto",
    ) -> DualEncoder:
        """Load a CLIP, SigLIP, SigLIP2, Chinese-CLIP, vision-text-dual-encoder or composed checkpoint.

        Args:
            name_or_path: folder, or Hub id.
            revision: branch, tag or commit on the Hub.
            device: "cuda", "mps", "cpu"; the best one there is when None, and on ZeroGPU the CPU, which borrows a GPU
                for many pictures, see `alignment.model.lent`.
            runtime: see the class.

        Raises:
            FileNotFoundError: when the checkpoint, its safetensors, tokenizer or image processor is missing.
            ValueError: when it is no dual encoder, is damaged or needs code of its own, or there is no such device.
        """
        name = os.fspath(name_or_path)
        borrow = device is None and is_lent()
        device = find_device("cpu" if borrow else device)
        folder = checkpoint_folder(name, revision)
        graphs = Graphs(None) if device.type != "cpu" or runtime == "torch" or openvino() is None else Graphs.of(folder)
        facts = graphs.facts()
        # An unknown model shows its faults now, a known one is only built if anybody needs more than its graphs.
        module = load_dual_encoder(folder, name) if facts is None else lambda: load_dual_encoder(folder, name)
        encoder = cls(module, Preprocessor.load(folder), name=name, device=device, runtime=runtime)
        encoder._graphs, encoder._facts, encoder._handed_out = graphs, facts, False
        if borrow:
            ask_no_driver()
            there = cls(load_dual_encoder(folder, name), encoder.preprocessor, name=name, device="cuda")
            encoder._lent = LentTower(partial(there._run, "image"), partial(encoder._run_here, "image"))
        return encoder

    @classmethod
    def compose(
        cls,
        vision: str | os.PathLike[str],
        text: str | os.PathLike[str],
        *,
        embed_dim: int = 512,
        pooling: Pooling | tuple[Pooling, Pooling] = ("pooler", "mean"),
        projection: Projection = "linear",
        device: str | torch.device | None = None,
    ) -> DualEncoder:
        """Join a vision tower and a text tower with fresh projections; train it before use.

        Args:
            vision: folder or Hub id of any vision tower; of a dual encoder the vision half is taken.
            text: the same for the text tower.
            embed_dim: width of the space they share.
            pooling: how a tower's tokens become one vector, for both towers or as (vision, text): the mean of all
                tokens (padding left out), the first token, or the tower's own pooler.
            projection: "linear", "mlp" for a linear layer plus a two-layer correction, or "none" for towers that
                already share a space of width `embed_dim`.
            device: as for `load`.

        Raises:
            FileNotFoundError: when a tower, its safetensors, tokenizer or image processor is missing.
            ValueError: when a tower has no such pooling, or a pooler that was never trained.
        """
        from alignment.model.composition import ComposedConfig, ComposedModel, pooled_width

        device = find_device(device)
        folders = checkpoint_folder(os.fspath(vision), None), checkpoint_folder(os.fspath(text), None)
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
        return cls(module, preprocessor, name=f"{os.fspath(vision)} + {os.fspath(text)}", device=device)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights (float32 safetensors), configuration, image processor and tokenizer; `load` reads them back."""
        with without_progress_bar():
            self.module.save_pretrained(folder)
        for weights in Path(folder).glob("*.safetensors"):
            open_up(weights)
        self.preprocessor.save(folder)

    @property
    def logit_scale(self) -> float:
        """Multiplier of the cosines, already exponentiated."""
        return self._known.logit_scale

    @property
    def logit_bias(self) -> float | None:
        """What is added to the scaled cosines; None for models trained with a softmax."""
        return self._known.logit_bias

    @property
    def embed_dim(self) -> int:
        """Width of the shared space."""
        return self._known.embed_dim

    @property
    def fingerprint(self) -> str:
        """Sha256 over names, types, shapes and bytes of the weights.

        Computed when asked for, and anew once they change (other than through `.data`, which leaves no trace).
        """
        if self._module is None and self._facts is not None:
            return self._facts.fingerprint
        return self._hash()

    def _hash(self) -> str:
        state, seen = self._built().state_dict(), self._state_seen()
        if self._hashed[0] != seen:
            self._hashed = (seen, _sha256(state))
        return self._hashed[1]

    @property
    def _known(self) -> Facts:
        """What is true of the model now; its fingerprint, which takes long, is left out unless it is known anyway."""
        if self._module is None and self._facts is not None:
            return self._facts
        module = self._built()
        config, bias = module.config, getattr(module, "logit_bias", None)
        return Facts(
            fingerprint="",
            logit_scale=float(module.logit_scale.detach().exp()),
            logit_bias=None if bias is None else float(bias.detach()),
            embed_dim=int(getattr(config, "projection_dim", None) or config.text_config.projection_size),
        )

    def _state_seen(self) -> object:
        """Read off what changes with the weights."""
        return tuple((tensor.data_ptr(), tensor._version) for tensor in self._module.state_dict().values())

    def encode_images(
        self, images: Sequence[ImageSource], *, batch_size: int | None = None, progress: Progress | None = None
    ) -> Tensor:
        """Embed pictures; they are opened as they are needed.

        Args:
            images: anything `open_image` takes.
            batch_size: pictures per forward pass; what suits the device when None.
            progress: called after each batch with (done, total).

        Returns:
            (n, embed_dim) float32, CPU, unit norm, in the order given.

        Raises:
            InputError: when one of them cannot be opened.
        """
        sources, size = _listed(images), batch_size or _IMAGES_AT_ONCE.get(self.device.type, 8)
        if len(sources) < 2:
            inputs = (self.preprocessor.image(source) for source in sources)
        else:  # one picture is decoded while another is embedded
            inputs = ahead(self.preprocessor.image, sources)
        with closing(inputs), closing(self._batched(inputs, size)) as batches:
            return self._encode_batches("image", batches, len(sources), progress)

    def encode_texts(
        self, texts: Sequence[str], *, batch_size: int | None = None, progress: Progress | None = None
    ) -> Tensor:
        """Embed captions; arguments and result as for `encode_images`.

        Raises:
            InputError: when one of them is empty or too long.
        """
        captions = [clean_caption(text) for text in _listed(texts)]
        size = batch_size or _TEXTS_AT_ONCE.get(self.device.type, 64)
        batches = (self.preprocessor.texts(captions[start : start + size]) for start in range(0, len(captions), size))
        return self._encode_batches("text", batches, len(captions), progress)

    def encode_prepared(
        self, inputs: Iterable[Mapping[str, Tensor]], *, batch_size: int | None = None
    ) -> Iterator[Tensor]:
        """Embed pictures whose inputs are ready, as they come.

        Args:
            inputs: what `preprocessor.images` made of one picture each.
            batch_size: as for `encode_images`.

        Yields:
            (embed_dim,) for each, in order; float32, CPU, unit norm.
        """
        size = batch_size or _IMAGES_AT_ONCE.get(self.device.type, 8)
        with closing(self._batched(inputs, size)) as batches, closing(self._run_all("image", batches)) as embedded:
            for embeds in map(self._checked, embedded):
                yield from embeds

    def embed_images(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embed what `preprocessor.images` made; on the device and with gradients, for training."""
        return self._embed(self._built().get_image_features, inputs)

    def embed_texts(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embed what `preprocessor.texts` made; on the device and with gradients, for training."""
        return self._embed(self._built().get_text_features, inputs)

    def _embed(self, features_of: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
        features = features_of(**{name: self._moved(tensor) for name, tensor in inputs.items()}).pooler_output
        return functional.normalize(features.float(), dim=-1)

    def _moved(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and not torch.is_grad_enabled():  # training chooses for itself; convolutions like it best
            return tensor.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return tensor.to(self.device, non_blocking=True)

    # ------------------------------------------------------------ running the towers

    def _batched(self, inputs: Iterable[Mapping[str, Tensor]], size: int) -> Generator[dict[str, Tensor]]:
        """Join the inputs of single items to batches; for a GPU while it computes the one before."""
        stream = iter(inputs)
        groups = iter(lambda: list(islice(stream, size)), [])
        if self.device.type != "cuda":
            yield from map(_joined, groups)
            return
        with closing(ahead(_pinned, groups, workers=1, depth=2)) as batches:
            yield from batches

    def _encode_batches(
        self, kind: Kind, batches: Iterable[Mapping[str, Tensor]], total: int, progress: Progress | None
    ) -> Tensor:
        embeds, done = [torch.empty(0, self.embed_dim)], 0
        with closing(self._run_all(kind, batches)) as embedded:
            for rows in map(self._checked, embedded):
                embeds.append(rows)
                done += len(rows)
                if progress is not None:
                    progress(done, total)
        return torch.cat(embeds)

    def _checked(self, embeds: Tensor) -> Tensor:
        """Refuse embeddings that are no numbers."""
        if not bool(embeds.isfinite().all()):
            raise ValueError(
                f"{self.name} makes embeddings that are no numbers (NaN or infinite): its weights are damaged, or its "
                "training failed. Download or train it again, or choose another --model."
            )
        return embeds

    def _run_all(self, kind: Kind, batches: Iterable[Mapping[str, Tensor]]) -> Generator[Tensor]:
        """Embed batch after batch; several at a time where graphs run them and there are many."""
        stream, tower = iter(batches), self._tower(kind)
        if tower is None:
            yield from (self._run(kind, inputs) for inputs in stream)
            return
        if not tower.is_wide:
            yield from (tower(inputs) for inputs in islice(stream, _WORTH_WIDENING))
        two = list(islice(stream, 2))
        if len(two) < 2:
            yield from (tower(inputs) for inputs in two)
            return
        with closing(tower.many(chain(two, stream))) as embedded:
            yield from embedded

    def _run(self, kind: Kind, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embed one batch by whatever is fastest; float32, CPU."""
        return self._run_by(self._tower(kind), kind, inputs)

    def _run_here(self, kind: Kind, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embed one batch on this encoder's own device."""
        return self._run_by(self._own_tower(kind), kind, inputs)

    def _run_by(self, tower: Tower | LentTower | None, kind: Kind, inputs: Mapping[str, Tensor]) -> Tensor:
        if tower is not None:
            return tower(inputs)
        embed = self.embed_images if kind == "image" else self.embed_texts
        with self.evaluating(), torch.no_grad():
            embeds = embed(inputs) if self.device.type == "cpu" else _in_half(embed, inputs, self.device.type)
            return embeds.cpu()

    def _tower(self, kind: Kind) -> Tower | LentTower | None:
        """Choose what runs a tower: a lent GPU, its graph, or None for PyTorch."""
        if kind == "image" and self._lent is not None:
            return None if self._is_changed() else self._lent
        return self._own_tower(kind)

    def _is_changed(self) -> bool:
        return self._handed_out and self._state_seen() != self._as_loaded

    def _own_tower(self, kind: Kind) -> Tower | None:
        """Look up the graph of a tower, made when first asked for; None where PyTorch has to run it."""
        if self._is_changed():
            return None
        if kind not in self._towers:
            with self._lock:
                if kind not in self._towers:
                    self._towers[kind] = self._find_tower(kind)
        return self._towers[kind]

    def _find_tower(self, kind: Kind) -> Tower | None:
        if self.device.type != "cpu" or self.runtime == "torch" or openvino() is None:
            return None
        if (tower := self._graphs.tower(kind)) is not None:
            if self._graphs.facts() is None:
                self._remember()
            return tower
        module = self._built()
        if self.runtime == "auto" and sum(weight.numel() for weight in module.parameters()) < WORTH_A_GRAPH:
            return None
        try:
            make = partial(self._graphs.make, kind, partial(self._export, kind))
            tower = make() if self._lent is None else apart(make)
            self._remember()
            return tower
        except Exception as error:  # a family that cannot be traced raises anything; PyTorch runs it as well
            logger.warning("PyTorch runs the %s tower of %s, more slowly than a graph: %s", kind, self.name, error)
            return None

    def _remember(self) -> None:
        self._graphs.remember(replace(self._known, fingerprint=self._hash()))

    def _export(self, kind: Kind, path: Path) -> str:
        if kind == "image":
            pictures = probe_pictures()
            probes = [self.preprocessor.images(some) for some in (pictures[:2], pictures[2:])]
        else:
            probes = [self.preprocessor.texts(captions) for captions in PROBE_CAPTIONS]
        return export_tower(kind, _Half(self._built(), kind, list(probes[0])).eval(), probes, path)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch dropout off, and back on if this is the middle of training."""
        module = self._built()
        training = module.training
        module.eval()
        try:
            yield
        finally:
            module.train(training)


class _Half(nn.Module):
    """One side of a dual encoder, as a function of its inputs in order."""

    def __init__(self, module: Any, kind: Kind, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.kind, self.names = module, kind, tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Embed (n, ...) as (n, embed_dim), unit norm."""
        features_of = self.module.get_image_features if self.kind == "image" else self.module.get_text_features
        features = features_of(**dict(zip(self.names, tensors, strict=True))).pooler_output
        return functional.normalize(features.float(), dim=-1)


def _listed(items: Sequence[Item]) -> Sequence[Item]:
    if isinstance(items, str | bytes):
        raise TypeError("Pass a list, even for a single item.")
    return items


def _joined(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the inputs of single items to a batch."""
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


def _pinned(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join them in memory that a GPU reads by itself, beside its computation."""
    batch = {}
    for name, first in items[0].items():
        shape = sum(len(item[name]) for item in items), *first.shape[1:]
        place = torch.empty(shape, dtype=first.dtype, pin_memory=True)
        batch[name] = torch.cat([item[name] for item in items], out=place)
    return batch


def _in_half(embed: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor], device_type: str) -> Tensor:
    """Run in half precision, as a GPU likes it; the weights stay float32, and what overflows is run again in full."""
    with torch.autocast(device_type, dtype=torch.float16):
        embeds = embed(inputs)
    return embeds if bool(embeds.isfinite().all()) else embed(inputs)


def _sha256(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
