"""A tower as an OpenVINO graph: several times faster on a CPU than PyTorch, and as true to it as `FAITHFUL` says.

Place in the flow: `module -> graph (here) -> embeddings`; private to the encoder, which falls back to PyTorch wherever
there is no OpenVINO, or a graph does not compute what the module does. A graph is traced once, marked, checked against
the module on drawn pictures or sample captions, and written to a file that `graphs` keeps.

Where the processor computes in bfloat16 so does the graph, which doubles the speed. A vision transformer does not mind,
a narrow convolutional network does: its first layers then stay in float32, as many as it takes.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

from alignment.prefetch import prefetch_map

logger = logging.getLogger(__name__)

Kind = Literal["image", "text"]
Inputs = Mapping[str, Tensor]

FAITHFUL = 0.999
"""Least cosine between a graph's embedding and PyTorch's."""

_ON_PROBES: dict[Kind, float] = {"image": FAITHFUL, "text": 0.9999}
"""The same over all probes. Photographs are easier than what is drawn here; a caption costs a tenth of a picture and is
compared with everything, so its tower is given the bits it needs.
"""

_EXACT_SHARES = (0.0, 1 / 16, 1 / 8, 1 / 5, 1 / 2)  # of the layers, from the first on, in float32: tried in turn
_KNOWN_INPUTS: dict[Kind, set[str]] = {
    "image": {"pixel_values"},  # NaFlex also tells its grids, and a trace would make constants of them
    "text": {"input_ids", "attention_mask", "token_type_ids"},
}
_LAYER = re.compile(r"(?=<layer id=)")
_HEAVY = re.compile(r' type="(?:Convolution|GroupConvolution|MatMul)"')
_IN_FULL = '<attribute name="precise" version="0" />'  # OpenVINO's mark of an operation that keeps float32


@cache
def openvino() -> Any:
    """Import OpenVINO, None where it is not installed or does not run; says so once."""
    # It reports every import to its makers, unless the package that does is missing. Nothing leaves this machine.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino as found

        found.Core().get_property("CPU", "FULL_DEVICE_NAME")
    except Exception as error:  # a broken installation raises anything
        logger.warning("PyTorch encodes pictures and captions, several times slower than OpenVINO would (%s).", error)
        return None
    return found


@cache
def _core() -> Any:
    return openvino().Core()


def native_precision() -> Literal["bf16", "f32"]:
    """Tell what this processor computes fastest in."""
    return "bf16" if _core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name() == "bf16" else "f32"


class Tower:
    """One tower, compiled for this processor; safe to call from several threads."""

    def __init__(self, path: Path, precision: str) -> None:
        """Compile.

        Args:
            path: of the graph, "NAME.xml" with "NAME.bin" beside it; both are read as they are used.
            precision: "bf16" or "f32".
        """
        self._path, self._precision = path, precision
        self._alone = _Compiled(path, precision, streams=1)
        self._side_by_side: _Compiled | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: Inputs) -> Tensor:
        """Embed a batch on all cores: (n, embed_dim) float32, unit norm."""
        return self._alone(inputs)

    @property
    def is_wide(self) -> bool:
        """Whether `many` needs no further compilation."""
        return self._side_by_side is not None

    def many(self, batches: Iterable[Inputs]) -> Generator[Tensor]:
        """Embed batch after batch, each on a core of its own: they never wait for each other, nor for who feeds them.

        Args:
            batches: read in the caller's thread, a few ahead.

        Yields:
            For each batch what a call would return, in order.
        """
        streams = torch.get_num_threads()
        with self._lock:
            if self._side_by_side is None and streams > 1:
                self._side_by_side = _Compiled(self._path, self._precision, streams)
        return prefetch_map(self._side_by_side or self._alone, batches, workers=streams, depth=2 * streams)


class _Compiled:
    """A graph compiled to answer so many requests at a time."""

    def __init__(self, path: Path, precision: str, streams: int) -> None:
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,  # others, who decode the next pictures, need the cores as well
        }
        self._compiled = _core().compile_model(_core().read_model(path), "CPU", options)
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    def __call__(self, inputs: Inputs) -> Tensor:
        with self._lock:
            request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        try:
            arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
            request.infer(arrays, share_inputs=True)
            embeds = torch.from_numpy(request.get_output_tensor(0).data.copy())
        finally:
            with self._lock:
                self._idle.append(request)
        return functional.normalize(embeds, dim=-1)


# ---------------------------------------------------------------- export


def export_tower(kind: Kind, tower: nn.Module, probes: Sequence[Inputs], path: Path) -> str:
    """Write a tower as a graph that is as fast as it may be while it stays faithful.

    Args:
        kind: which one.
        tower: takes the probes' tensors in their order, returns (n, embed_dim), unit norm.
        probes: batches of inputs. The first is traced; the others differ from it in size, to catch a trace that made a
            constant of one.
        path: "NAME.xml"; weights go to "NAME.bin" beside it, in half precision.

    Returns:
        The precision to run it in.

    Raises:
        ValueError: when this tower has no faithful graph.
    """
    names = list(probes[0])
    if not set(names) <= _KNOWN_INPUTS[kind]:
        raise ValueError(f"a tower that reads {', '.join(names)} is not exported")
    with torch.no_grad():
        expected = [tower(*batch.values()) for batch in probes]
    model = _converted(tower, probes[0])
    for port, name in zip(model.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    # The shapes stay free: with fixed ones, OpenVINO fuses layers over the marks that keep some of them exact.
    openvino().save_model(model, path, compress_to_fp16=True)
    plain = path.read_text("utf-8")
    for precision, share in _attempts():
        path.write_text(_exact_from_the_start(plain, share), "utf-8")
        run = Tower(path, precision)
        worst = min(float((run(batch) * right).sum(-1).min()) for batch, right in zip(probes, expected, strict=True))
        logger.debug("%s tower in %s, %.0f %% exact: worst cosine %.5f", kind, precision, 100 * share, worst)
        if worst >= _ON_PROBES[kind]:
            return precision
    raise ValueError(f"the graph is not faithful: worst cosine {worst:.4f}")


def _attempts() -> Iterator[tuple[str, float]]:
    """Precision and the share of layers in float32, the fastest first."""
    if native_precision() == "bf16":
        yield from (("bf16", share) for share in _EXACT_SHARES)
    yield "f32", 0.0


def _converted(tower: nn.Module, inputs: Inputs) -> Any:
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what a trace takes for a constant is found out by the probes
        traced = torch.jit.trace(tower, tuple(inputs.values()), check_trace=False, strict=False)
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(traced)
        loaded = frontend.load(decoder)  # it reads from the decoder until it is converted
        return frontend.convert(loaded)


def _exact_from_the_start(graph: str, share: float) -> str:
    """Mark the layers of a graph (its XML, in order of computation) that keep float32: this share of the heavy ones."""
    parts = _LAYER.split(graph)
    heavy = [place for place, part in enumerate(parts) if _HEAVY.search(part[:400])]
    last = heavy[min(round(share * len(heavy)), len(heavy) - 1)] if heavy and share else 0
    return "".join(_marked(part) if 0 < place < last else part for place, part in enumerate(parts))


def _marked(layer: str) -> str:
    if "<rt_info>" in layer:
        return layer.replace("<rt_info>", f"<rt_info>{_IN_FULL}", 1)
    return re.sub(r"(<layer [^>]*[^/]>)", rf"\1<rt_info>{_IN_FULL}</rt_info>", layer, count=1)


# ---------------------------------------------------------------- probes


def probe_pictures(count: int = 16, side: int = 320, seed: int = 0) -> list[Image.Image]:
    """Draw pictures with the spectrum of photographs, half of them with a few shapes: to check a graph with.

    Source: natural images have an amplitude of about 1 / frequency (Field, 1987).
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1 / side
    blend = 0.64 * np.eye(3) + 0.32  # the three colours of a photograph go together
    pictures = []
    for number in range(count):
        noise = np.fft.fft2(rng.normal(size=(3, side, side))) / frequency ** rng.uniform(0.8, 1.6)
        field = np.fft.ifft2(noise).real
        field = (field - field.mean((1, 2), keepdims=True)) / field.std((1, 2), keepdims=True)
        colours = np.einsum("ij,jhw->hwi", blend, field) * rng.uniform(30, 70) + 127 + rng.uniform(-60, 60, 3)
        picture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
        _draw_shapes(picture, number % 5 * 2, rng)
        pictures.append(picture)
    return pictures


def _draw_shapes(picture: Image.Image, count: int, rng: np.random.Generator) -> None:
    canvas = ImageDraw.Draw(picture)
    for _ in range(count):
        corner = rng.integers(0, picture.width, 2)
        box = [*corner.tolist(), *(corner + rng.integers(20, 160, 2)).tolist()]
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        (canvas.ellipse if rng.random() < 0.5 else canvas.rectangle)(box, fill=colour)


PROBE_CAPTIONS = (
    ("a dog runs on the beach", "two children play football in the park"),
    ("一只狗在沙滩上奔跑",),
    ("red", "a plate of pasta with tomatoes, basil and a glass of water on a wooden table by the window", "夜晚的城市"),
    ("A man in a yellow jacket climbs a snowy mountain!", "ein Hund am Strand", "3 cats", "雨中撑伞的人们走过斑马线"),
)
"""Batches of different sizes and lengths."""
