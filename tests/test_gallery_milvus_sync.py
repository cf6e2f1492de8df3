"""Names and options for a gallery on a Milvus server, and the errors of app and commands without a server."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import app
from alignment.gallery import main
from alignment.gallery.milvus_sync import Remote, add_index_options, default_name, digest
from alignment.gallery.records import GalleryMetadata, Picture
from alignment.gallery.writer import write_gallery
from alignment.index import Server


@pytest.fixture
def closed_port() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """A gallery folder with one picture."""
    pictures, metadata = [Picture("a", "a.jpg")], GalleryMetadata("f" * 64, "some/model", 1.0, None)
    embeds = torch.ones(1, 1)
    write_gallery(tmp_path, pictures, [], {"picture": [embeds], "caption": []}, 1, metadata, {})
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("photos", "photos"),
        ("far/away/my_photos/", "my_photos"),
        ("2024", "gallery_2024_"),
        ("my photos", "gallery_my_photos_"),
        ("我的图库", "gallery_"),
        ("x" * 300, "gallery_" + "x" * 60 + "_"),
        ("\udcff", "gallery_"),
    ],
)
def test_a_gallery_is_named_by_its_folder(folder: str, name: str) -> None:
    made = default_name(folder)
    assert made.startswith(name)
    assert (made == name) or len(made) == len(name) + 8
    assert made.isascii()
    assert made.isidentifier()
    assert len(Remote(Server("http://h"), made, Path(folder)).collection("picture", "f" * 64)) < 200


def test_different_folders_have_different_names() -> None:
    assert len({default_name(folder) for folder in ("a b", "a_b", "a-b", "山", "水", "a b ")}) == 6


def test_options_and_environment_give_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*argv: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        add_index_options(parser)
        return parser.parse_args(argv)

    args = parsed()
    assert Remote.of(args.index, "photos", args.index_name) is None
    monkeypatch.setenv("ALIGNMENT_INDEX", "http://one:19530")
    monkeypatch.setenv("ALIGNMENT_INDEX_NAME", "holidays")
    args = parsed()
    assert Remote.of(args.index, "photos", args.index_name) == Remote(
        Server("http://one:19530"), "holidays", Path("photos")
    )
    args = parsed("--index", "http://two:19530", "--index-name", "mine")
    remote = Remote.of(args.index, "photos", args.index_name)
    assert remote == Remote(Server("http://two:19530"), "mine", Path("photos"))
    assert remote.push_command() == (
        "python -m alignment.gallery push photos --index http://two:19530 --index-name mine"
    )
    for wrong in ("1st", "a-b", "名", "a" * 101):
        with pytest.raises(ValueError, match="letters, digits and underscores"):
            Remote.of("http://two:19530", "photos", wrong)


def test_a_digest_depends_on_the_ids_and_not_on_their_order() -> None:
    ids = torch.tensor([3, 1, 2])
    assert digest(ids) == digest(ids.flip(0))
    assert digest(ids) != digest(ids[:2])
    assert digest(ids).isalnum()
    assert digest(ids[:0]).isalnum()


# ---------------------------------------------------------------- commands without a server


def test_the_app_fails_without_a_server(closed_port: str, free_port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--index", closed_port, "--port", free_port]) == 2
    shown = capsys.readouterr().err
    assert f"error: The Milvus server at {closed_port} does not answer" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("address", ["http://me:secret@localhost:19530", "http://localhost:19530/?token=secret"])
def test_the_app_refuses_a_secret_in_the_address(
    address: str, free_port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["--index", address, "--port", free_port]) == 2
    shown = capsys.readouterr().err
    assert "ALIGNMENT_INDEX_TOKEN" in shown
    assert "secret" not in shown


@pytest.mark.parametrize("command", [["push"], ["push", "--dry-run"], ["push", "--drop"], ["pull"]])
def test_the_commands_fail_without_a_server(
    command: list[str], gallery: Path, closed_port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(gallery), "--index", closed_port]) == 2
    assert f"error: The Milvus server at {closed_port} does not answer" in capsys.readouterr().err


def test_a_build_connects_before_it_embeds(
    closed_port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    assert main(["build", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--index", closed_port]) == 2
    assert "does not answer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_push_needs_an_address(
    gallery: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALIGNMENT_INDEX", raising=False)
    with pytest.raises(SystemExit):
        main(["push", str(gallery)])
    assert "--index" in capsys.readouterr().err
    monkeypatch.setenv("ALIGNMENT_INDEX", "nonsense")
    assert main(["push", str(gallery)]) == 2
    assert "looks like http://host:19530" in capsys.readouterr().err


def test_a_folder_without_a_gallery_is_refused_before_connecting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(tmp_path), "--index", "http://localhost:1"]) == 2
    assert f"There is no gallery in {tmp_path}" in capsys.readouterr().err
