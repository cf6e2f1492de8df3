"""A gallery whose embeddings lie on a Milvus server: pushed, served, brought up to date, fetched back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import app
from alignment.catalogue import Caption, FileState, Picture, Stamp
from alignment.confidence import DEFAULT_CALIBRATION, Cohort
from alignment.engine.queries import parse_query
from alignment.gallery import BuildReport, Gallery, MatchCalibrator, build_gallery, main
from alignment.gallery.remote import Remote
from alignment.index import MilvusIndex, Server
from alignment.model import DualEncoder

MANY, DIM = 4500, 24
NUMBERS = count()


class Encoder:
    """What `Gallery.load` wants to know of the model."""

    name, fingerprint = "some/model", "f00d" * 16


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def made(count: int = MANY) -> Gallery:
    pictures = [
        Picture(f"p{row}", f"trip {row % 3}/{row // 100}/{row}.jpg", file=FileState(1, 1, f"sha{row}"))
        for row in range(count)
    ]
    captions = [Caption(f"c{row}", f"caption {row}", ("en", "zh", "")[row % 3]) for row in range(20)]
    judge = MatchCalibrator(DEFAULT_CALIBRATION, Cohort(unit(30, DIM, seed=8), unit(40, DIM, seed=9)))
    stamp = Stamp(
        Encoder.fingerprint, Encoder.name, 20.0, None, calibration=DEFAULT_CALIBRATION.to_dict(), judged_by="borrowed"
    )
    return Gallery(pictures, captions, unit(count, DIM), unit(20, DIM, seed=1), stamp, judge=judge)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A gallery folder whose name nobody else has on the server."""
    folder = tmp_path / f"album_{next(NUMBERS)}"
    made().save(folder)
    return folder


@pytest.fixture
def remote(folder: Path, place: Server) -> Iterator[Remote]:
    """Where it goes; deleted afterwards."""
    remote = Remote(place, folder.name, folder)
    yield remote
    for index in remote.sides(Encoder.fingerprint, ("image_embeds", "text_embeds")):
        index.drop()
        index.close()


def load(folder: Path, remote: Remote | None = None) -> Gallery:
    return Gallery.load(folder, Encoder(), remote)  # type: ignore[arg-type]


def push(folder: Path, remote: Remote, *options: str) -> int:
    return main(["push", str(folder), "--index", remote.server.uri, *options])


def test_results_are_those_of_the_folder(folder: Path, remote: Remote) -> None:
    assert push(folder, remote) == 0
    here, there = load(folder), load(folder, remote)
    shutil.rmtree(next(folder.glob("image_embeds-*")))  # it is not needed any more
    assert there.pictures == here.pictures
    assert there.folders == here.folders
    assert "embeds" not in vars(there.images)
    for query in unit(6, DIM, seed=5):
        for tag in (None, "trip 1", "trip 1/7", "nowhere"):
            one, other = here.search_images(query, 12, tag=tag), there.search_images(query, 12, tag=tag)
            assert [match.item.id for match in other.matches] == [match.item.id for match in one.matches]
            for what in ("similarity", "share", "probability"):
                said = [[getattr(match, what) for match in found.matches] for found in (one, other)]
                near = 0.25 if what == "share" else 0.01  # shares are estimates, see `Side.shares`
                assert said[1] == pytest.approx(said[0], rel=near, abs=2e-3)
            assert (other.fits, len(other.groups)) == (one.fits, len(one.groups))
        one, other = here.search_captions(query, 5, lang="zh"), there.search_captions(query, 5, lang="zh")
        assert [match.item.id for match in other.matches] == [match.item.id for match in one.matches]
    rows = torch.tensor([4000, 3, 3, 17])
    torch.testing.assert_close(there.images[rows], made().images[rows], atol=1e-3, rtol=0)


def test_a_push_says_what_it_does_and_a_second_one_does_nothing(
    folder: Path, remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{folder.name}_image_embeds_f00df00df00d"
    assert push(folder, remote, "--dry-run") == 0
    assert f"{name}: {MANY} rows, {MANY} to be sent, 0 to be taken out" in capsys.readouterr().out
    assert not MilvusIndex.exists(remote.server, name)
    assert push(folder, remote) == 0
    assert f"{name}: {MANY} rows, {MANY} sent, 0 were there, 0 taken out" in capsys.readouterr().out
    assert push(folder, remote) == 0
    assert f"{name}: {MANY} rows, 0 sent, {MANY} were there, 0 taken out" in capsys.readouterr().out
    assert push(folder, remote, "--drop") == 0
    assert f"{name}: deleted, {MANY} rows" in capsys.readouterr().out
    assert not MilvusIndex.exists(remote.server, name)


def test_a_push_that_was_interrupted_goes_on(
    folder: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upsert = MilvusIndex.upsert

    def half(index: MilvusIndex, ids: torch.Tensor, embeds: torch.Tensor, tags: list) -> None:
        upsert(index, ids[:2000], embeds[:2000], tags[:2000])
        raise KeyboardInterrupt

    monkeypatch.setattr(MilvusIndex, "upsert", half)
    assert push(folder, remote) == 130
    assert "The same command goes on from here" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"is not what .* says\. .*gallery push {folder} --index"):
        load(folder, remote)
    assert push(folder, remote) == 0
    assert f"{MANY} rows, {MANY - 2000} sent, 2000 were there" in capsys.readouterr().out
    assert (
        load(folder, remote).images.search(unit(DIM), 3, 3)[1].tolist()
        == made().images.search(unit(DIM), 3, 3)[1].tolist()
    )


def test_what_changed_in_the_gallery_is_pushed_and_the_old_app_goes_on(folder: Path, remote: Remote) -> None:
    assert push(folder, remote) == 0
    old, gallery = load(folder, remote), made()
    pictures = [*gallery.pictures[3:], *(Picture(f"new{row}", f"new/{row}.jpg") for row in range(4))]
    pictures[10] = replace(pictures[10], file=FileState(2, 2, "other"))
    embeds = torch.cat([gallery.image_embeds[3:], unit(4, DIM, seed=7)])
    embeds[10] = unit(DIM, seed=8)
    Gallery(pictures, gallery.captions, embeds, gallery.texts, gallery.stamp, judge=gallery.judge).save(folder)
    with pytest.raises(ValueError, match="bring the server up to date"):
        load(folder, remote)
    assert push(folder, remote) == 0
    new = load(folder, remote)
    assert len(new.images.index) == len(pictures) == len(new.pictures)
    assert new.search_images(unit(DIM, seed=8), 1).matches[0].item == pictures[10]
    assert new.folders["new"] == 4
    for query in unit(4, DIM, seed=7):  # the new pictures' own embeddings
        assert new.search_images(query, 1).matches[0].item.id.startswith("new")
        found = old.search_images(query, 12).matches
        assert len(found) == 12
        assert not any(match.item.id.startswith("new") for match in found)


def test_another_gallery_of_the_same_name_is_not_written_over(
    folder: Path, remote: Remote, tmp_path: Path, capsys
) -> None:
    assert push(folder, remote) == 0
    other = tmp_path / "elsewhere" / folder.name
    gallery = made(50)
    foreign = [replace(picture, id=f"x{picture.id}") for picture in gallery.pictures]
    Gallery(foreign, (), gallery.images, torch.empty(0, DIM), gallery.stamp).save(other)
    assert push(other, remote) == 2
    assert f"holds {MANY} rows of another gallery" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not what"):
        load(other, Remote(remote.server, remote.name, other))


def test_another_gallery_of_the_same_name_is_not_touched_though_a_picture_is_in_both(
    folder: Path, remote: Remote, tmp_path: Path, capsys
) -> None:
    assert push(folder, remote) == 0
    here, other, copy = load(folder, remote), tmp_path / "elsewhere" / folder.name, tmp_path / "copy" / folder.name
    made(50).save(other)
    for options in ((), ("--dry-run",)):
        assert push(other, remote, *options) == 2
        assert f"holds {MANY} rows of another gallery" in capsys.readouterr().err
    shutil.copytree(folder, copy)
    assert push(copy, remote) == 0
    assert "0 sent" in capsys.readouterr().out
    assert len(here.images) == MANY
    load(folder, remote)


def test_what_an_earlier_model_left_is_told_and_deleted(folder: Path, remote: Remote, capsys) -> None:
    assert push(folder, remote) == 0
    old = remote.collection("image_embeds", Encoder.fingerprint)
    gallery = made(30)
    other = replace(gallery.stamp, fingerprint="beef" * 16)
    foreign = MilvusIndex.create(remote.server, f"{remote.name}_image_embeds_0123456789ab", DIM, {"owner": "else"})
    Gallery(gallery.pictures, (), gallery.images, torch.empty(0, DIM), other).save(folder)
    capsys.readouterr()
    try:
        assert push(folder, remote) == 0
        assert f"there is still {old} ({MANY} rows)" in capsys.readouterr().out
        assert push(folder, remote, "--drop") == 0
        assert not MilvusIndex.exists(remote.server, old)
        assert not MilvusIndex.exists(remote.server, remote.collection("image_embeds", "beef" * 16))
        assert MilvusIndex.exists(remote.server, foreign.name)
    finally:
        foreign.drop()
        foreign.close()


def test_damaged_rows_are_not_sent(folder: Path, remote: Remote, capsys) -> None:
    rows = max(next(folder.glob("image_embeds-*")).rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    rows.write_bytes(content)
    assert push(folder, remote) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_gallery_that_was_never_pushed_says_how(folder: Path, remote: Remote) -> None:
    with pytest.raises(ValueError, match=rf"has no collection .*gallery push {folder} --index {remote.server.uri}"):
        load(folder, remote)


def test_a_collection_of_another_model_is_refused(folder: Path, remote: Remote) -> None:
    name = remote.collection("image_embeds", Encoder.fingerprint)
    MilvusIndex.create(remote.server, name, DIM, {"fingerprint": "beef" * 16})
    try:
        with pytest.raises(ValueError, match="made by another model"):
            load(folder, remote)
        assert push(folder, remote) == 2
    finally:
        MilvusIndex(remote.server, name).drop()


def test_embeddings_of_another_width_are_refused(folder: Path, remote: Remote, capsys) -> None:
    name = remote.collection("image_embeds", Encoder.fingerprint)
    MilvusIndex.create(remote.server, name, DIM + 1, {"fingerprint": Encoder.fingerprint})
    assert push(folder, remote) == 2
    assert f"{DIM + 1} wide" in capsys.readouterr().err


def test_rows_that_somebody_took_out_are_missed(folder: Path, remote: Remote) -> None:
    assert push(folder, remote) == 0
    index = MilvusIndex(remote.server, remote.collection("image_embeds", Encoder.fingerprint))
    index.delete(index.ids()[:1])
    with pytest.raises(ValueError, match="bring the server up to date"):
        load(folder, remote)
    assert push(folder, remote) == 0
    assert len(load(folder, remote).images) == MANY


def test_it_is_fetched_back(folder: Path, remote: Remote, capsys) -> None:
    expected = load(folder).images.embeds
    assert push(folder, remote) == 0
    place = next(folder.glob("image_embeds-*"))
    shutil.rmtree(place)
    with pytest.raises(ValueError, match="If it lies on a Milvus server, say --index"):
        load(folder)
    assert push(folder, remote) == 0  # nothing is missing there, so nothing is looked for here
    assert main(["pull", str(folder), "--index", remote.server.uri]) == 0
    assert f"{MANY} pictures and 20 captions are here again" in capsys.readouterr().out
    torch.testing.assert_close(load(folder).images.embeds, expected, atol=1e-3, rtol=0)


# ---------------------------------------------------------------- built and served by a model


def test_a_gallery_is_built_onto_the_server_and_served_from_it(
    checkpoint: Callable[[str], Path], place: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    source, out = tmp_path / "photos", tmp_path / f"built_{next(NUMBERS)}"
    source.mkdir()
    rng = np.random.default_rng(0)
    for row in range(6):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(source / f"{row}.png")
    remote = Remote.of(place.uri, out)
    assert remote is not None
    build_gallery(source, out, encoder, calibrate=False, remote=remote)
    assert not list(out.glob("*_embeds-*"))
    assert (out / "embeddings.safetensors").stat().st_size < 1000
    (source / "0.png").unlink()
    Image.new("RGB", (48, 48), "red").save(source / "red.png")
    report = BuildReport()
    again = build_gallery(source, out, encoder, calibrate=False, report=report, remote=remote)
    assert (report.encoded["pictures"], report.reused["pictures"]) == (1, 5)
    expected = encoder.encode_images([picture.path for picture in again.pictures])
    torch.testing.assert_close(again.image_embeds, expected, atol=1e-3, rtol=0)
    assert len(again.images.index) == 6
    assert json.loads((out / "gallery.json").read_text())["num_pictures"] == 6

    monkeypatch.setenv("ALIGNMENT_INDEX", place.uri)
    engine = app.load_engine(app.parse(["--model", str(checkpoint("clip")), "--gallery", str(out)]))
    assert isinstance(engine.gallery.images.index, MilvusIndex)
    found = engine.search_images("a dog", 6)
    assert [match.rank for match in found.matches] == list(range(1, 7))
    assert sum(match.share for match in found.matches) == pytest.approx(1, abs=1e-4)
    composed = engine.compose_query(parse_query("a dog + a cat - a tree"))
    assert len(engine.search_images(composed, 4).matches) == 4
    kept = torch.stack([engine.picture_embed(picture.id) for picture in again.pictures])
    torch.testing.assert_close(kept, expected, atol=1e-3, rtol=0)
    assert main(["push", str(out), "--drop"]) == 0


def test_the_starter_gallery_is_served_from_the_server(place: Server, tmp_path: Path) -> None:
    folder = tmp_path / f"starter_{next(NUMBERS)}"
    shutil.copytree(app.ROOT / "assets" / "gallery", folder)
    assert main(["push", str(folder), "--index", place.uri]) == 0
    ours = ["--model", str(app.ROOT / "checkpoints/compact"), "--gallery", str(folder)]
    local, served = (app.load_engine(app.parse([*ours, *more])) for more in ([], ["--index", place.uri]))
    for caption in ("a cat", "a cup of coffee", "一只猫"):
        one, other = (engine.search_images(caption, 8) for engine in (local, served))
        assert [match.item.id for match in other.matches] == [match.item.id for match in one.matches]
        assert [match.share for match in other.matches] == pytest.approx(
            [match.share for match in one.matches], abs=1e-3
        )
        assert other.fits == one.fits
    cat = local.gallery.pictures[0].id
    one, other = (engine.search_captions(engine.picture_image(cat), 5) for engine in (local, served))
    assert [match.item.id for match in other.matches] == [match.item.id for match in one.matches]
    assert main(["push", str(folder), "--index", place.uri, "--drop"]) == 0
