"""The contrastive step against slow references: in chunks and in two processes it is that of the whole batch."""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_injection import forkserver
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing, nn

from alignment.data import Pair
from alignment.evaluate import embed_pairs, evaluate_embedded
from alignment.losses import sigmoid_loss, softmax_loss
from alignment.model import DualEncoder
from alignment.train import objective as objective_module
from alignment.train.dataset import CaptionIndex
from alignment.train.objective import Batch, Objective, gather
from alignment.train.presets import Towers, apply_preset
from alignment.train.trainer import Validator

Checkpoint = Callable[[str], Path]

# Image 5 has a caption of image 0, and images 1 and 4 are one photograph: two processes split both couples.
CAPTIONS = (
    ("a dog runs", "a dog on the beach"),
    ("two cats", "cats jump"),
    ("pasta", "a plate of pasta"),
    ("the quick fox", "a brown fox"),
    ("lazy cats", "a cat"),
    ("A dog runs.", "the dog is quick"),
)
LOOK_ALIKES = ((1, 4),)
EACH = 2
LOSSES = {"siglip": "sigmoid", "siglip2": "softmax", "vit-bert": "softmax", "clip": "softmax"}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def captions_of_data() -> CaptionIndex:
    return CaptionIndex([Pair(f"{row}.png", texts) for row, texts in enumerate(CAPTIONS)], LOOK_ALIKES)


def whole_batch(encoder: DualEncoder) -> Batch:
    """Six pictures of noise with two captions each."""
    noise = np.random.default_rng(1).integers(0, 256, (len(CAPTIONS), 40, 40, 3), dtype=np.uint8)
    captions = captions_of_data()
    return Batch(
        encoder.preprocessor.images([Image.fromarray(pixels) for pixels in noise]),
        encoder.preprocessor.texts(captions.texts),
        torch.arange(len(CAPTIONS)),
        torch.arange(len(captions.texts)),
    )


def part_of(batch: Batch, first: int, last: int) -> Batch:
    texts = slice(first * EACH, last * EACH)
    return Batch(
        {name: value[first:last] for name, value in batch.images.items()},
        {name: value[texts] for name, value in batch.texts.items()},
        batch.rows[first:last],
        batch.captions[texts],
    )


def build(folder: Path, preset: str = "full", *, dropout: float = 0.0) -> tuple[DualEncoder, Towers]:
    """Load a model and ready it for training, with as much dropout as it has places for."""
    encoder = DualEncoder.load(folder, device="cpu")
    for layer in encoder.module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
        elif isinstance(getattr(layer, "dropout", None), float):  # attention calls a function with it
            layer.dropout = dropout
    apply_preset(encoder, preset)
    towers = Towers(encoder)
    towers.train()
    return encoder, towers


def gradients(towers: Towers) -> dict[str, Tensor]:
    """Collect and clear the gradients of what is trained; zeros where there is none."""
    found = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in towers.named_parameters()
        if weight.requires_grad
    }
    towers.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


# ---------------------------------------------------------------- one process


def plainly(objective: Objective, batch: Batch, size: int) -> float:
    """Embed the batch in pieces that all stay in memory, and let autograd do the rest."""
    pieces = [objective.towers(*chunk) for chunk in batch.chunks(size)]
    images, texts = (torch.cat(side) for side in zip(*pieces, strict=True))
    loss = objective.score(images, texts, batch)
    loss.backward()
    return loss.item()


def objective_of(towers: Towers, name: str, chunk_size: int | None = None) -> Objective:
    return Objective(towers, captions_of_data().positive_mask, loss=LOSSES[name], chunk_size=chunk_size)


@pytest.mark.parametrize("name", ["siglip", "siglip2", "vit-bert"])
def test_the_loss_is_that_of_all_pairs(name: str, checkpoint: Checkpoint) -> None:
    """Written out: cosines times the scale plus the bias, own and equal captions positive, look-alikes left out."""
    encoder, towers = build(checkpoint(name))
    batch = whole_batch(encoder)
    images, texts = towers(batch.images, batch.texts)
    logits = images @ texts.T * encoder.logit_scale + (encoder.logit_bias or 0.0)
    owners = torch.arange(len(CAPTIONS)).repeat_interleave(EACH)
    positives = owners == torch.arange(len(CAPTIONS))[:, None]
    positives[0, 10] = positives[5, 0] = True  # "A dog runs." and "a dog runs"
    ignored = torch.zeros_like(positives)
    ignored[1, 8:10] = ignored[4, 2:4] = True
    loss = {"sigmoid": sigmoid_loss, "softmax": softmax_loss}[LOSSES[name]]
    expected = loss(logits, positives, ignored=ignored)
    torch.testing.assert_close(objective_of(towers, name).backward(batch), expected.detach(), **CLOSE)
    assert abs(loss(logits, owners == torch.arange(len(CAPTIONS))[:, None]) - expected) > 1e-3


@pytest.mark.parametrize("preset", ["full", "lit", "heads", "lora"])
@pytest.mark.parametrize("name", ["siglip", "vit-bert"])
def test_chunks_give_the_gradient_of_the_whole(name: str, preset: str, checkpoint: Checkpoint) -> None:
    encoder, towers = build(checkpoint(name), preset)
    batch = whole_batch(encoder)
    loss = objective_of(towers, name).backward(batch)
    expected = gradients(towers)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    for size in (1, 3, 4, 100):
        torch.testing.assert_close(objective_of(towers, name, size).backward(batch), loss, **CLOSE)
        assert_same(gradients(towers), expected)


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize(("name", "preset"), [("siglip", "full"), ("vit-bert", "full"), ("vit-bert", "lit")])
def test_chunks_meet_the_same_dropout_twice(
    name: str, preset: str, size: int, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, towers = build(checkpoint(name), preset, dropout=0.3)
    batch = whole_batch(encoder)
    objective = objective_of(towers, name, size)
    torch.manual_seed(5)
    loss = plainly(objective, batch, size)
    expected, following = gradients(towers), torch.rand(3)
    torch.manual_seed(5)
    assert objective.backward(batch).item() == pytest.approx(loss, rel=1e-5)
    assert_same(gradients(towers), expected)
    assert torch.equal(torch.rand(3), following), "the random numbers go on as after one pass"
    # Without the replay it would be another gradient: the test above can fail.
    careless = partial(objective_module.checkpoint, preserve_rng_state=False)
    monkeypatch.setattr(objective_module, "checkpoint", careless)
    torch.manual_seed(5)
    objective.backward(batch)
    assert distance(gradients(towers), expected) > 1e-3


@pytest.mark.parametrize("size", [None, 1, 4])
def test_kept_images_go_through_chunks(size: int | None, checkpoint: Checkpoint) -> None:
    encoder, towers = build(checkpoint("vit-bert"), "heads")
    batch = whole_batch(encoder)
    loss = objective_of(towers, "vit-bert").backward(batch)
    expected = gradients(towers)
    cut = towers.cache_features(augment=True)
    assert cut is not None
    with torch.no_grad():
        kept = Batch(cut.before(batch.images), batch.texts, batch.rows, batch.captions)
    torch.testing.assert_close(objective_of(towers, "vit-bert", size).backward(kept), loss, **CLOSE)
    assert_same(gradients(towers), expected)


def test_backward_and_precision_are_the_callers(checkpoint: Checkpoint) -> None:
    """A loss scaled by 8 gives 8 times the gradient, in chunks too; half precision is where the towers run."""
    encoder, towers = build(checkpoint("clip"))
    batch = whole_batch(encoder)
    objective_of(towers, "clip").backward(batch)
    expected = {name: 8 * gradient for name, gradient in gradients(towers).items()}
    for size in (None, 4):
        objective_of(towers, "clip", size).backward(batch, lambda loss: (8 * loss).backward())
        torch.testing.assert_close(gradients(towers), expected, rtol=1e-4, atol=1e-4)
        loss = objective_of(towers, "clip", size).backward(batch, precision=lambda: torch.autocast("cpu"))
        assert loss.dtype == torch.float32
        rounded = distance(gradients(towers), {name: gradient / 8 for name, gradient in expected.items()})
        assert 1e-4 < rounded < 1.0


def test_gradients_add_up_over_calls(checkpoint: Checkpoint) -> None:
    encoder, towers = build(checkpoint("clip"))
    batch, objective = whole_batch(encoder), objective_of(towers, "clip", 4)
    objective.backward(batch)
    once = gradients(towers)
    objective.backward(batch)
    objective.backward(batch)
    torch.testing.assert_close(gradients(towers), {name: 2 * gradient for name, gradient in once.items()})


# ---------------------------------------------------------------- two processes

CASES = [
    ("siglip", "full", None),
    ("siglip", "full", 1),
    ("siglip", "heads", None),
    ("vit-bert", "full", None),
    ("vit-bert", "full", 2),
    ("vit-bert", "lit", 2),
    ("composed", "full", None),  # its BERT has a pooler that nothing uses: no gradient to share
]
PROCESSES = 2


def _process(rank: int, folder: str, folders: dict[str, str]) -> None:
    """What each process does: every case on its half of the batch, and a measurement."""
    faulthandler.enable()  # a process that is aborted says where
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=Path(folder, "meet").as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=200),
    )
    each = len(CAPTIONS) // PROCESSES
    for number, (name, preset, size) in enumerate(CASES):
        encoder, towers = build(Path(folders[name]), preset)
        objective = Objective(
            towers, captions_of_data().positive_mask, loss=LOSSES.get(name, "softmax"), chunk_size=size
        )
        loss = objective.backward(part_of(whole_batch(encoder), rank * each, (rank + 1) * each))
        save_file({"loss": loss, **gradients(towers)}, Path(folder, f"{number}-{rank}.safetensors"))
    gathered = gather(torch.full((1, 2), rank + 1.0, requires_grad=True))
    assert gathered[:, 0].tolist() == [1.0, 2.0]
    measure = Validator(DualEncoder.load(folders["clip"], device="cpu"), measured_pairs(Path(folder)))
    embedded = measure.embed()
    save_file(
        {"images": embedded.image_embeds, "texts": embedded.text_embeds}, Path(folder, f"embeds-{rank}.safetensors")
    )
    Path(folder, f"figures-{rank}.json").write_text(json.dumps(dict(measure.metrics())), encoding="utf-8")
    distributed.barrier()  # the first to end closes its connections: the other must be through with them
    distributed.destroy_process_group()


def measured_pairs(folder: Path) -> list[Pair]:
    """Name five pictures (an odd number: the processes' shares differ) with one to three captions."""
    texts = ["a dog", "two cats", "pasta", "the quick brown fox jumps", "a beach", "lazy", "fox", "dogs and cats", "x"]
    counts = (1, 3, 2, 1, 2)
    starts = np.cumsum((0, *counts))
    return [Pair(str(folder / f"{row}.png"), tuple(texts[starts[row] : starts[row + 1]])) for row in range(len(counts))]


@pytest.fixture(scope="module")
def two_processes(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run everything that takes two processes at once, and return the folder of what they found."""
    folder = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(3)
    for pair in measured_pairs(folder):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(pair.image)
    folders = {name: str(checkpoint(name)) for name in ("siglip", "vit-bert", "composed", "clip")}
    # The processes meet at a file: no port that could be taken.
    method = forkserver().get_start_method()
    started = multiprocessing.start_processes(
        _process, (str(folder), folders), nprocs=PROCESSES, join=False, start_method=method
    )
    try:
        for _ in range(24):
            if started.join(timeout=10):
                return folder
        raise TimeoutError("the two processes did not finish")
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_two_processes_give_the_gradient_of_the_joint_batch(
    number: int, two_processes: Path, checkpoint: Checkpoint
) -> None:
    name, preset, _ = CASES[number]
    encoder, towers = build(checkpoint(name), preset)
    objective = Objective(towers, captions_of_data().positive_mask, loss=LOSSES.get(name, "softmax"))
    loss = objective.backward(whole_batch(encoder))
    expected: dict[str, Any] = gradients(towers)
    for parameter in ("module.logit_scale", *(["module.logit_bias"] if name == "siglip" else [])):
        assert expected[parameter].abs() > 1e-4
    for rank in range(PROCESSES):
        found = load_file(two_processes / f"{number}-{rank}.safetensors")
        torch.testing.assert_close(found.pop("loss"), loss, **CLOSE)
        assert_same(found, expected)


def test_a_caption_of_another_process_counts_as_positive(checkpoint: Checkpoint) -> None:
    """The joint batch above holds such captions and look-alikes, and they make a difference."""
    rows, captions = torch.arange(len(CAPTIONS)), torch.arange(EACH * len(CAPTIONS))
    positives, ignored = captions_of_data().positive_mask(rows, captions)
    half, columns = len(rows) // 2, len(captions) // 2
    for mask in (positives, ignored):
        assert mask[:half, columns:].any()
        assert mask[half:, :columns].any()
    encoder, towers = build(checkpoint("vit-bert"))
    with_them = objective_of(towers, "vit-bert").backward(whole_batch(encoder))
    alone = CaptionIndex([Pair(f"{row}.png", (f"{row} a", f"{row} b")) for row in range(len(CAPTIONS))])
    without = Objective(towers, alone.positive_mask).backward(whole_batch(encoder))
    assert abs(with_them - without) > 1e-2


@pytest.mark.timeout(400)
def test_two_processes_measure_what_one_measures(two_processes: Path, checkpoint: Checkpoint) -> None:
    encoder, pairs = DualEncoder.load(checkpoint("clip"), device="cpu"), measured_pairs(two_processes)
    texts = [text for pair in pairs for text in pair.captions]
    report = evaluate_embedded(embed_pairs(encoder, pairs), resamples=0)
    for rank in range(PROCESSES):
        found = load_file(two_processes / f"embeds-{rank}.safetensors")
        torch.testing.assert_close(found["images"], encoder.encode_images([pair.image for pair in pairs]))
        torch.testing.assert_close(found["texts"], encoder.encode_texts(texts))
        figures = json.loads((two_processes / f"figures-{rank}.json").read_text(encoding="utf-8"))
        assert figures == {name: estimate.value for name, estimate in report.metrics.items()}
