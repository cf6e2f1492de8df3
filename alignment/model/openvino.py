"""The OpenVINO back end: several times faster on a CPU than PyTorch, with the same embeddings within `MIN_COSINE`.

Place in the flow: `module -> graph (here) -> embeddings`. A graph is traced once, checked against the module on drawn
pictures or sample captions, and cached. Where OpenVINO is missing, or no graph is accurate, PyTorch runs the tower.

Bfloat16, where the processor has it, doubles the speed. A narrow convolutional network loses accuracy in it: its first
layers then stay in float32, as many as it takes. OpenVINO has no public option for that, so the graph's XML text is
marked; `tests/test_openvino.py` checks the mark.
"""

import logging
import re
import sys
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

from alignment.model.tower import Inputs, Kind
from alignment.prefetch import prefetch_map

logger = logging.getLogger(__name__)

MIN_COSINE = 0.999  # between a graph's embedding and PyTorch's
# Over all probes, which lose more than photographs; a text tower is held to more, for it costs a tenth of the time.
_MIN_COSINE_ON_PROBES: dict[Kind, float] = {"image": MIN_COSINE, "text": 0.9999}
_BATCHES_BEFORE_PARALLEL = 4  # after which a second compilation, for parallel requests, pays
_PRECISE_SHARES = (0.0, 1 / 16, 1 / 8, 1 / 5, 1 / 2)  # of the layers, from the first on, in float32: tried in turn
_KNOWN_INPUTS: dict[Kind, set[str]] = {
    "image": {"pixel_values"},  # a trace would turn the patch grids of NaFlex into constants
    "text": {"input_ids", "attention_mask", "token_type_ids"},
}
_LAYER = re.compile(r"(?=<layer id=)")
_HEAVY = re.compile(r' type="(?:Convolution|GroupConvolution|MatMul)"')
_PRECISE = '<attribute name="precise" version="0" />'  # OpenVINO's mark of an operation that keeps float32
PROBE_CAPTIONS = (  # batches of different sizes and lengths, to check a graph with
    ("a dog runs on the beach", "two children play football in the park"),
    ("一只狗在沙滩上奔跑",),
    ("red", "a plate of pasta with tomatoes, basil and a glass of water on a wooden table by the window", "夜晚的城市"),
    ("A man in a yellow jacket climbs a snowy mountain!", "ein Hund am Strand", "3 cats", "雨中撑伞的人们走过斑马线"),
)


@cache
def openvino() -> Any:
    """Import OpenVINO, None where it is not installed or does not run; says so once."""
    # Blocks telemetry: without this entry, importing openvino sends a report to its makers.
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


def version_token() -> str:
    """Name what a graph depends on besides its model."""
    return f"{openvino().__version__} {native_precision()}"


class OpenVINOTower:
    """One tower, compiled for this processor."""

    backend = "openvino"

    def __init__(self, path: Path, precision: str) -> None:
        """Compile "NAME.xml", with "NAME.bin" beside it, in "bf16" or "f32"; the files are read as they are used."""
        self._path, self._precision = path, precision
        self._single = _Compiled(path, precision, streams=1)
        self._parallel: _Compiled | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: Inputs) -> Tensor:
        """Embed a batch on all cores: (n, embed_dim) float32, unit norm."""
        return self._single(inputs)

    def stream(self, batches: Iterable[Inputs]) -> Generator[Tensor]:
        """Embed batch after batch, in order: the first few on all cores, the others on one core each, in parallel."""
        stream = iter(batches)
        if self._parallel is None:
            yield from map(self._single, islice(stream, _BATCHES_BEFORE_PARALLEL))
        two = list(islice(stream, 2))
        if len(two) < 2:
            yield from map(self._single, two)
            return
        streams = torch.get_num_threads()
        with self._lock:
            if self._parallel is None and streams > 1:
                self._parallel = _Compiled(self._path, self._precision, streams)
        run = self._parallel or self._single
        with closing(prefetch_map(run, chain(two, stream), workers=streams, depth=2 * streams)) as embedded:
            yield from embedded


class _Compiled:
    """A graph compiled for a number of parallel requests."""

    def __init__(self, path: Path, precision: str, streams: int) -> None:
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,  # the threads that decode the next pictures need the cores as well
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


def export_tower(kind: Kind, tower: nn.Module, probes: Sequence[Inputs], path: Path) -> str:
    """Write a tower as a graph, the fastest one that is close enough to PyTorch; returns the precision to run it in.

    The tower takes the tensors of a batch in their order. The first batch of `probes` is traced, the others differ in
    size, which shows constants in the trace. `path` is "NAME.xml"; weights go to "NAME.bin" beside it, in half
    precision. Raises ValueError when no graph of this tower is accurate enough.
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
    halves = [("bf16", share) for share in _PRECISE_SHARES] if native_precision() == "bf16" else []
    for precision, share in (*halves, ("f32", 0.0)):  # the fastest first
        path.write_text(mark_first_layers_precise(plain, share), "utf-8")
        run = OpenVINOTower(path, precision)
        worst = min(float((run(batch) * right).sum(-1).min()) for batch, right in zip(probes, expected, strict=True))
        logger.debug("%s tower in %s, %.0f %% in float32: worst cosine %.5f", kind, precision, 100 * share, worst)
        if worst >= _MIN_COSINE_ON_PROBES[kind]:
            return precision
    raise ValueError(f"the graph is not faithful: worst cosine {worst:.4f}")


def _converted(tower: nn.Module, inputs: Inputs) -> Any:
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.no_grad(), _frozen(tower):
        warnings.simplefilter("ignore")  # the probes find values that a trace took for constants
        # As a function, whose weights are constants: the trace of a module would compile each of its layers first.
        traced = torch.jit.trace(lambda *batch: tower(*batch), tuple(inputs.values()), check_trace=False, strict=False)
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(traced)
        loaded = frontend.load(decoder)  # it reads from the decoder until it is converted
        return frontend.convert(loaded)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let no weight require a gradient meanwhile: a trace takes only such tensors for constants."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def mark_first_layers_precise(graph: str, share: float) -> str:
    """Mark the layers of a graph (its XML, in order of computation) that keep float32: this share of the heavy ones."""
    parts = _LAYER.split(graph)
    heavy = [place for place, part in enumerate(parts) if _HEAVY.search(part[:400])]
    last = heavy[min(round(share * len(heavy)), len(heavy) - 1)] if heavy and share else 0
    return "".join(_marked(part) if 0 < place < last else part for place, part in enumerate(parts))


def _marked(layer: str) -> str:
    if "<rt_info>" in layer:
        return layer.replace("<rt_info>", f"<rt_info>{_PRECISE}", 1)
    return re.sub(r"(<layer [^>]*[^/]>)", rf"\1<rt_info>{_PRECISE}</rt_info>", layer, count=1)


def draw_pictures(count: int = 16, side: int = 320, seed: int = 0) -> list[Image.Image]:
    """Draw pictures with the spectrum of photographs and, on most, a few shapes.

    Source: natural images have an amplitude of about 1 / frequency (Field, 1987).
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1 / side
    blend = 0.64 * np.eye(3) + 0.32  # the three colours of a photograph are correlated
    drawn = []
    for number in range(count):
        noise = np.fft.fft2(rng.normal(size=(3, side, side))) / frequency ** rng.uniform(0.8, 1.6)
        field = np.fft.ifft2(noise).real
        field = (field - field.mean((1, 2), keepdims=True)) / field.std((1, 2), keepdims=True)
        colours = np.einsum("ij,jhw->hwi", blend, field) * rng.uniform(30, 70) + 127 + rng.uniform(-60, 60, 3)
        picture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
        _draw_shapes(picture, number % 5 * 2, rng)
        drawn.append(picture)
    return drawn


def _draw_shapes(picture: Image.Image, count: int, rng: np.random.Generator) -> None:
    canvas = ImageDraw.Draw(picture)
    for _ in range(count):
        corner = rng.integers(0, picture.width, 2)
        box = [*corner.tolist(), *(corner + rng.integers(20, 160, 2)).tolist()]
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        (canvas.ellipse if rng.random() < 0.5 else canvas.rectangle)(box, fill=colour)
