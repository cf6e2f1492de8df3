"""The towers as graphs: as true as they promise to be, kept by content, and never in the way."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignment.gallery.records import read_hand_written
from alignment.model import DualEncoder
from alignment.model.graph_cache import MAX_ENTRIES, GraphCache, checkpoint_digest
from alignment.model.openvino import MIN_COSINE, PROBE_CAPTIONS, draw_pictures, mark_first_layers_precise, openvino
from alignment.preprocess import InputError

Checkpoint = Callable[[str], Path]
Pictures = list[Image.Image]

ROOT = Path(__file__).resolve().parents[1]
COMPACT = ROOT / "checkpoints" / "compact"
CAPTIONS = [
    "a dog runs on the beach", "红色", "two", "A man climbs a snowy mountain while his friends watch from below!",
    "一个女孩在公园里放风筝", "plate of pasta", "雨中撑伞的人们走过斑马线, 身后是一座灯火通明的城市",
]  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours * theirs).sum(-1).min())


# ---------------------------------------------------------------- faithful


def test_the_compact_model_is_as_true_as_promised_on_pictures_and_captions_it_was_not_checked_with() -> None:
    graph, module = DualEncoder.load(COMPACT, device="cpu"), DualEncoder.load(COMPACT, device="cpu", runtime="torch")
    photos = [picture.path for picture in read_hand_written(ROOT / "assets" / "gallery" / "sources")[0]]
    assert worst(graph.encode_images(photos), module.encode_images(photos)) >= MIN_COSINE
    assert worst(graph.encode_texts(CAPTIONS), module.encode_texts(CAPTIONS)) >= MIN_COSINE
    assert {graph.tower(kind).backend for kind in ("image", "text")} == {"openvino"}


def test_every_family_has_faithful_graphs_or_is_run_by_pytorch(
    family: str, checkpoint: Checkpoint, pictures: Pictures, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph = DualEncoder.load(checkpoint(family), device="cpu", runtime="openvino")
    module = DualEncoder.load(checkpoint(family), device="cpu", runtime="torch")
    for count in (1, 3):
        assert worst(graph.encode_images(pictures[:count]), module.encode_images(pictures[:count])) >= MIN_COSINE
    for captions in (CAPTIONS[:1], CAPTIONS[2:5]):
        captions = [caption[:60] for caption in captions]
        assert worst(graph.encode_texts(captions), module.encode_texts(captions)) >= MIN_COSINE
    assert graph.tower("text").backend == "openvino"
    assert (
        (graph.tower("image").backend == "torch")
        == (family == "siglip2-naflex")
        == ("PyTorch runs the image" in caplog.text)
    )


def test_a_graph_that_is_not_faithful_is_not_used(
    checkpoint: Checkpoint, pictures: Pictures, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A branch on the data, which a trace cannot see."""
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu", runtime="openvino")
    module = encoder.module
    plain = module.get_image_features

    def fickle(pixel_values: torch.Tensor) -> object:
        output = plain(pixel_values=pixel_values)
        if len(pixel_values) > 2:
            output.pooler_output = output.pooler_output.flip(-1)
        return output

    module.get_image_features = fickle
    try:
        many = encoder.encode_images(pictures)
    finally:
        del module.get_image_features
    assert "not faithful" in caplog.text
    torch.testing.assert_close(many, encoder.encode_images(pictures[:1] * 0 + pictures).flip(-1))


def test_small_models_are_left_to_pytorch_unless_asked(checkpoint: Checkpoint, cache: Path) -> None:
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    encoder.encode_texts(["a"])
    assert encoder.tower("text").backend == "torch"
    assert not cache.exists()


def test_changed_weights_are_never_served_by_an_old_graph(checkpoint: Checkpoint, cache: Path) -> None:
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu", runtime="openvino")
    before, fingerprint = encoder.encode_texts(CAPTIONS), encoder.fingerprint
    with torch.no_grad():
        encoder.module.text_projection.weight.mul_(torch.linspace(-1, 1, encoder.embed_dim)[:, None])
    after = encoder.encode_texts(CAPTIONS)
    assert worst(before, after) < 0.9
    assert encoder.fingerprint != fingerprint
    exact = encoder.embed_texts(encoder.preprocessor.texts(CAPTIONS)).detach()
    torch.testing.assert_close(after, exact)


def test_many_threads_may_use_one_graph(checkpoint: Checkpoint, cache: Path) -> None:
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu", runtime="openvino")
    alone = [encoder.encode_texts([caption]) for caption in CAPTIONS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda caption: encoder.encode_texts([caption]), CAPTIONS * 8))
    for row, embed in enumerate(together):
        torch.testing.assert_close(embed, alone[row % len(CAPTIONS)], atol=1e-5, rtol=0)


def test_many_batches_side_by_side_are_what_they_are_one_by_one(
    checkpoint: Checkpoint, pictures: Pictures, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu", runtime="openvino")
    seen: list[tuple[int, int]] = []
    many = encoder.encode_images(pictures * 10, batch_size=2, progress=lambda *done: seen.append(done))
    assert seen == [(done, 30) for done in range(2, 31, 2)]
    assert worst(many, encoder.encode_images(pictures).repeat(10, 1)) >= MIN_COSINE
    streamed = encoder.encode_prepared(map(encoder.preprocessor.image, pictures * 10), batch_size=2)
    torch.testing.assert_close(torch.stack(list(streamed)), many)
    with pytest.raises(InputError):
        encoder.encode_images([*pictures * 10, b"no picture"], batch_size=2)


# ---------------------------------------------------------------- kept


@pytest.fixture(scope="module")
def first_kept(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("kept")
        patch.setenv("ALIGNMENT_CACHE", str(home))
        load(checkpoint("clip")).encode_texts(CAPTIONS)
    return home


@pytest.fixture
def kept(first_kept: Path, checkpoint: Checkpoint, tmp_path: Path, cache: Path) -> tuple[Path, Path]:
    """A checkpoint of its own, and the cache entry with its text graph."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("clip"), folder)
    shutil.copytree(first_kept, cache)
    (entry,) = (cache / "graphs").iterdir()
    return folder, entry


def load(folder: Path) -> DualEncoder:
    return DualEncoder.load(folder, device="cpu", runtime="openvino")


def test_a_known_model_answers_text_queries_without_being_built_or_its_image_tower(kept: tuple[Path, Path]) -> None:
    folder, entry = kept
    built, known = DualEncoder.load(folder, device="cpu", runtime="torch"), load(folder)
    assert worst(known.encode_texts(CAPTIONS), built.encode_texts(CAPTIONS)) >= MIN_COSINE
    assert known.fingerprint == built.fingerprint
    assert (known.logit_scale, known.logit_bias, known.embed_dim) == (built.logit_scale, None, built.embed_dim)
    assert known.in_memory == {"text"}
    assert not (entry / "image.xml").exists()
    assert known.module.config.model_type == "clip"
    assert known.fingerprint == built.fingerprint


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "altered": lambda content: content[:-9] + bytes(255 - byte for byte in content[-9:]),
}


@pytest.mark.parametrize("name", ["text.xml", "text.bin", "text.json", "facts.json"])
def test_what_is_damaged_is_made_again(name: str, kept: tuple[Path, Path]) -> None:
    folder, entry = kept
    right = load(folder).encode_texts(CAPTIONS)
    graphs, content = GraphCache.of(folder), (entry / name).read_bytes()

    def is_whole() -> bool:
        return (graphs.info() if name == "facts.json" else graphs.tower("text")) is not None

    assert is_whole()
    for damage in DAMAGES.values():
        (entry / name).write_bytes(damage(content))
        assert not is_whole()
    assert_made_again(folder, entry, right)
    (entry / name).unlink()
    assert not is_whole()
    assert_made_again(folder, entry, right)
    assert is_whole()


def assert_made_again(folder: Path, entry: Path, right: torch.Tensor) -> None:
    served = load(folder)
    torch.testing.assert_close(served.encode_texts(CAPTIONS), right)
    assert served.fingerprint == DualEncoder.load(folder, runtime="torch").fingerprint
    assert all(json.loads((entry / part).read_text()) for part in ("facts.json", "text.json"))
    assert not list(entry.glob("*.new"))


def test_other_weights_under_the_same_name_are_another_model(kept: tuple[Path, Path], checkpoint: Checkpoint) -> None:
    folder, entry = kept
    encoder = DualEncoder.load(folder, device="cpu", runtime="torch")
    with torch.no_grad():
        encoder.module.text_projection.weight.normal_()
    encoder.save(folder)
    served = load(folder)
    assert worst(served.encode_texts(CAPTIONS), encoder.encode_texts(CAPTIONS)) >= MIN_COSINE
    assert served.fingerprint == encoder.fingerprint
    assert len(list(entry.parent.iterdir())) == 2


def test_a_digest_follows_the_configuration_too(kept: tuple[Path, Path]) -> None:
    folder, _ = kept
    before = checkpoint_digest(folder)
    (folder / "README.md").write_text("A model card.")
    assert checkpoint_digest(folder) == before
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_act"] = "relu"
    (folder / "config.json").write_text(json.dumps(config))
    assert checkpoint_digest(folder) != before


def test_a_graph_of_another_openvino_is_made_again(kept: tuple[Path, Path]) -> None:
    folder, entry = kept
    about = json.loads((entry / "text.json").read_text())
    (entry / "text.json").write_text(json.dumps({**about, "made_by": "2020.1 f32"}))
    load(folder).encode_texts(CAPTIONS)
    assert json.loads((entry / "text.json").read_text())["made_by"] == about["made_by"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "file" / "cache"))
    module = DualEncoder.load(checkpoint("clip"), runtime="torch")
    encoder = load(checkpoint("clip"))
    assert worst(encoder.encode_texts(CAPTIONS), module.encode_texts(CAPTIONS)) >= MIN_COSINE
    assert encoder.tower("text").backend == "openvino"


def test_the_oldest_models_are_forgotten(kept: tuple[Path, Path], checkpoint: Checkpoint) -> None:
    _, entry = kept
    for number in range(MAX_ENTRIES + 3):
        old = entry.parent / f"old-{number}"
        old.mkdir()
        os.utime(old, (number, number))
    load(checkpoint("siglip")).encode_texts(CAPTIONS[:1])
    left = {path.name for path in entry.parent.iterdir()}
    assert len(left) == MAX_ENTRIES
    assert entry.name in left
    assert "old-0" not in left


def test_openvino_understands_the_mark_of_layers_that_keep_float32(kept: tuple[Path, Path]) -> None:
    """A contract with OpenVINO's file format: an attribute that it does not know would be passed over in silence."""
    graph = kept[1] / "text.xml"

    def marked() -> int:
        operations = openvino().Core().read_model(graph).get_ordered_ops()
        return sum(key.startswith("DisablePrecisionConversion") for op in operations for key in op.get_rt_info())

    before, plain = marked(), graph.read_text("utf-8")
    graph.write_text(mark_first_layers_precise(plain, 1 / 2), "utf-8")
    added = graph.read_text("utf-8").count('name="precise"') - plain.count('name="precise"')
    assert before < added <= marked()


# ---------------------------------------------------------------- a good neighbour


def run(script: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env={**os.environ, "HOME": str(home), "ALIGNMENT_CACHE": str(home / "cache"), **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_openvino_does_not_report_to_its_makers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It would leave a client id in the home folder, and connect."""
    script = f"""
import socket, sys
def refuse(*_): raise AssertionError("a connection")
socket.socket.connect = socket.create_connection = refuse
from alignment.model import DualEncoder
encoder = DualEncoder.load({str(checkpoint("clip"))!r}, device="cpu", runtime="openvino")
encoder.encode_texts(["a dog"])
assert encoder.tower("text").backend == "openvino" and sys.modules["openvino_telemetry"] is None
"""
    run(script, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


@pytest.fixture
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "openvino", None)
    openvino.cache_clear()
    yield
    openvino.cache_clear()


@pytest.mark.usefixtures("no_openvino")
def test_without_openvino_pytorch_runs_the_towers_and_says_so_once(
    checkpoint: Checkpoint, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        encoder = load(checkpoint("clip"))
        assert encoder.encode_texts(["a dog"]).shape == (1, encoder.embed_dim)
    assert encoder.tower("text").backend == "torch"
    assert caplog.text.count("PyTorch encodes pictures and captions") == 1


def test_probes_are_the_same_pictures_every_time_and_captions_differ_in_length() -> None:
    first, second = draw_pictures(4), draw_pictures(4)
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in second]
    assert len({picture.tobytes() for picture in first}) == 4
    assert len({len(captions) for captions in PROBE_CAPTIONS}) == 4


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "alignment")
