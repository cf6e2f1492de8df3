"""A gallery that is built onto a Milvus server and served from it gives the answers of the gallery folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import app
from alignment.confidence import DEFAULT_CALIBRATION
from alignment.engine.queries import parse_query
from alignment.gallery import BuildReport, Caption, Gallery, Picture, build_gallery, main
from alignment.gallery.database import GalleryDatabase
from alignment.gallery.milvus_sync import Remote
from alignment.gallery.records import FileFingerprint, GalleryMetadata
from alignment.gallery.writer import write_gallery
from alignment.index import MilvusIndex, Server
from alignment.model import DualEncoder

COUNT, DIM = 5000, 24
OLD = app.ROOT / "tests" / "old_gallery"


class Encoder:
    """What `Gallery.load` reads of a model."""

    name, fingerprint = "some/model", "f00d" * 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / f"app_{tmp_path.name[-1]}"


@pytest.fixture
def remote(folder: Path, place: Server) -> Iterator[Remote]:
    remote = Remote(place, folder.name, folder)
    yield remote
    assert main(["push", str(folder), "--index", place.uri, "--drop"]) == 0


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_results_are_those_of_the_folder(folder: Path, remote: Remote) -> None:
    pictures = [
        Picture(f"p{row}", f"trip {row % 3}/{row // 100}/{row}.jpg", file=FileFingerprint(1, 1, f"{row:064x}"))
        for row in range(COUNT)
    ]
    captions = [Caption(f"c{row}", f"caption {row}", ("en", "zh", "")[row % 3]) for row in range(20)]
    metadata = GalleryMetadata(Encoder.fingerprint, Encoder.name, 20.0, None, calibration=DEFAULT_CALIBRATION.to_dict())
    cohort = {"image_embeds": unit(30, DIM, seed=8), "text_embeds": unit(40, DIM, seed=9)}
    embeds = {"picture": [unit(COUNT, DIM)], "caption": [unit(20, DIM, seed=1)]}
    write_gallery(folder, pictures, captions, embeds, DIM, metadata, cohort)
    assert main(["push", str(folder), "--index", remote.server.uri]) == 0
    here, there = (Gallery.load(folder, Encoder(), where) for where in (None, remote))  # type: ignore[arg-type]
    assert isinstance(there.images.index, MilvusIndex)
    assert there.pictures.tags == here.pictures.tags
    for query in unit(6, DIM, seed=5):
        for tag in (None, "trip 1", "trip 1/7", "nowhere"):
            one, other = (gallery.search_images(query, 12, tag=tag) for gallery in (here, there))
            assert [match.item.id for match in other.matches] == [match.item.id for match in one.matches]
            for what in ("similarity", "share", "probability"):
                expected, said = ([getattr(match, what) for match in found.matches] for found in (one, other))
                assert said == pytest.approx(expected, rel=0.01, abs=2e-3)
            assert (other.verdict, len(other.duplicates)) == (one.verdict, len(one.duplicates))
        one, other = (gallery.search_captions(query, 5, lang="zh") for gallery in (here, there))
        assert [match.item.id for match in other.matches] == [match.item.id for match in one.matches]


def test_a_gallery_is_built_onto_the_server_and_served_from_it(
    checkpoint: Callable[[str], Path], folder: Path, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    source = tmp_path / "photos"
    source.mkdir()
    rng = np.random.default_rng(0)
    for row in range(6):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(source / f"{row}.png")
    build_gallery(source, folder, encoder, calibrate=False, remote=remote)
    (source / "0.png").unlink()
    Image.new("RGB", (48, 48), "red").save(source / "red.png")
    report = BuildReport()
    again = build_gallery(source, folder, encoder, calibrate=False, report=report, remote=remote)
    assert (report.encoded["pictures"], report.reused["pictures"]) == (1, 5)
    assert len(again.images.index) == 6
    expected = encoder.encode_images([picture.path for picture in again.pictures])
    torch.testing.assert_close(again.images.embeds, expected, atol=1e-3, rtol=0)
    assert main(["check", str(folder), "--index", remote.server.uri]) == 0

    monkeypatch.setenv("ALIGNMENT_INDEX", remote.server.uri)
    engine = app.load_engine(app.parse(["--model", str(checkpoint("clip")), "--gallery", str(folder)]))
    assert isinstance(engine.gallery.images.index, MilvusIndex)
    found = engine.search_images("a dog", 6)
    assert [match.rank for match in found.matches] == list(range(1, 7))
    assert sum(match.share for match in found.matches) == pytest.approx(1, abs=1e-4)
    composed = engine.compose_query(parse_query("a dog + a cat - a tree"))
    assert len(engine.search_images(composed, 4).matches) == 4


def test_the_starter_gallery_is_served_from_the_server(folder: Path, remote: Remote) -> None:
    shutil.copytree(app.ROOT / "assets" / "gallery", folder)
    assert main(["push", str(folder), "--index", remote.server.uri]) == 0
    ours = ["--model", str(app.ROOT / "checkpoints/compact"), "--gallery", str(folder)]
    local, served = (app.load_engine(app.parse([*ours, *more])) for more in ([], ["--index", remote.server.uri]))
    for caption in ("a cat", "a cup of coffee", "一只猫"):
        one, other = (engine.search_images(caption, 8) for engine in (local, served))
        assert [match.item.id for match in other.matches] == [match.item.id for match in one.matches]
        shares = [match.share for match in one.matches]
        assert [match.share for match in other.matches] == pytest.approx(shares, abs=1e-3)
        assert other.verdict == one.verdict
    cat = local.picture_embed(local.gallery.pictures[0].id)
    one, other = (engine.search_captions(cat, 5) for engine in (local, served))
    assert [match.item.id for match in other.matches] == [match.item.id for match in one.matches]


def test_a_gallery_of_the_previous_format_is_fetched_from_the_server(folder: Path, remote: Remote) -> None:
    """Builds with --index left the embeddings of many items to the server, and out of the folder."""
    here, there = (Path(shutil.copytree(OLD, folder.parent / name / folder.name)) for name in ("here", "there"))
    shutil.copytree(here, folder)
    assert main(["push", str(here), "--index", remote.server.uri]) == 0
    shutil.rmtree(next(there.glob("text_embeds-*")))
    shutil.copy(here / "milvus.json", there)
    shutil.copy(here / "milvus.json", folder)
    with pytest.raises(FileNotFoundError):
        GalleryDatabase(there)
    assert main(["pull", str(there), "--index", remote.server.uri]) == 0
    with closing(GalleryDatabase(here)) as pushed, closing(GalleryDatabase(there)) as pulled:
        assert pulled.check() == []
        ids = pulled.ids("caption")
        assert pulled.embeds("caption", ids).equal(pushed.embeds("caption", ids))
