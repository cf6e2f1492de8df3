"""Records, hand-written lists and the gallery folder, without a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from alignment.catalogue import (
    CAPTIONS,
    PICTURES,
    Caption,
    Catalogue,
    FileState,
    Picture,
    Stamp,
    is_hand_written,
    language_of,
    read_captioned,
    read_catalogue,
    read_hand_written,
    rebuild_command,
    write_catalogue,
)


def write(path: Path, *lines: object) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def example(**stamp: object) -> Catalogue:
    """Two pictures and three captions, of which no file needs to exist."""
    pictures = [
        Picture("a", "one/two.jpg", {"en": "A cat.", "zh": "一只猫。"}, "Ann, CC0", "/root", FileState(3, 4, "ab")),
        Picture("b", "package:skimage/data/coffee.png"),
    ]
    captions = [Caption("a.en", "A cat.", "en", "a"), Caption("a.zh", "一只猫。", "zh", "a"), Caption("x", "A dog.")]
    generator = torch.Generator().manual_seed(0)
    image_embeds, text_embeds = torch.randn(2, 4, generator=generator), torch.randn(3, 4, generator=generator)
    return Catalogue(pictures, captions, image_embeds, text_embeds, Stamp("f00d", "some/model", 12.5, None, **stamp))


# ---------------------------------------------------------------- records


def test_a_package_is_found_without_being_imported() -> None:
    sys.modules.pop("wave", None)
    picture = Picture("a", "package:xml/dom/minidom.py")
    already = "xml.dom" in sys.modules
    assert picture.package == "xml"
    assert picture.path.is_file()
    assert ("xml.dom" in sys.modules) == already


@pytest.mark.parametrize("name", ["surely_not_installed_here", "os", "not.a.package", ""])
def test_a_package_that_is_not_there_is_named(name: str) -> None:
    picture = Picture("a", f"package:{name}/x.png")
    if name:
        with pytest.raises(FileNotFoundError, match=f"package {name} is not installed"):
            _ = picture.path
    else:
        assert picture.package == ""


def test_the_users_pictures_lie_below_the_root_or_at_an_absolute_path(tmp_path: Path) -> None:
    assert Picture("a", "x/y.jpg", root=str(tmp_path)).path == tmp_path / "x" / "y.jpg"
    assert Picture("a", str(tmp_path / "z.jpg"), root="/elsewhere").path == tmp_path / "z.jpg"
    assert Picture("a", "x/y.jpg").package == ""


def test_a_picture_describes_itself_in_the_language_asked_for_or_another() -> None:
    picture = Picture("a", "x.jpg", {"zh": "一只猫。", "en": "A cat."})
    assert [picture.caption(lang) for lang in ("en", "zh", "de")] == ["A cat.", "一只猫。", "一只猫。"]
    assert Picture("a", "x.jpg").caption() == ""


def test_records_can_be_kept_in_sets() -> None:
    assert len({Picture("a", "x.jpg", {"en": "A cat."}), Picture("a", "x.jpg", {"en": "A cat."})}) == 1


@pytest.mark.parametrize(
    ("text", "lang"),
    [("一只猫。", "zh"), ("A cat.", ""), ("猫が窓辺で眠る。", ""), ("고양이 猫", ""), ("T恤", "zh"), ("", "")],
)
def test_chinese_is_told_from_what_may_be_anything(text: str, lang: str) -> None:
    assert language_of(text) == lang


# ---------------------------------------------------------------- captioned data sets


def test_a_data_set_becomes_records() -> None:
    images = [("/data/a/1.jpg", ["A cat.", "一只猫。", "Cats."]), ("/elsewhere/2.jpg", [])]
    pictures, captions = read_captioned(images, "/data")
    assert [picture.source for picture in pictures] == ["a/1.jpg", "/elsewhere/2.jpg"]
    assert [str(picture.path) for picture in pictures] == ["/data/a/1.jpg", "/elsewhere/2.jpg"]
    assert pictures[0].captions == {"": "A cat.", "zh": "一只猫。"}
    assert pictures[1].captions == {}
    assert [(caption.text, caption.lang) for caption in captions] == [("A cat.", ""), ("一只猫。", "zh"), ("Cats.", "")]
    assert {caption.scene for caption in captions} == {pictures[0].id}
    assert len({caption.id for caption in captions}) == 3


def test_ids_follow_the_path_and_fit_a_file_name() -> None:
    images = [("/data/a/b.jpg", []), ("/data/a_b.jpg", []), ("/data/caf\udce9.jpg", [])]
    ids = [picture.id for picture in read_captioned(images, "/data")[0]]
    assert len(set(ids)) == 3
    assert all(name.isalnum() and name.isascii() for name in ids)
    assert ids == [picture.id for picture in read_captioned(images, "/data")[0]]


# ---------------------------------------------------------------- hand-written lists


def test_a_hand_written_list_is_read(tmp_path: Path) -> None:
    write(
        tmp_path / PICTURES,
        {"id": "cat", "source": "cat.jpg", "en": " A  cat. ", "zh": "一只猫。", "credit": "Ann, CC0"},
    )
    write(tmp_path / CAPTIONS, {"id": "pets-01", "topic": "pets", "en": "A dog.", "zh": "一只狗。"}, "")
    assert is_hand_written(tmp_path)
    pictures, captions = read_hand_written(tmp_path)
    assert pictures == [Picture("cat", "cat.jpg", {"en": "A cat.", "zh": "一只猫。"}, "Ann, CC0")]
    assert pictures[0].path == tmp_path / "cat.jpg"
    assert captions == [
        Caption("pets-01.en", "A dog.", "en", "pets-01", "pets"),
        Caption("pets-01.zh", "一只狗。", "zh", "pets-01", "pets"),
        Caption("cat.en", "A cat.", "en", "cat"),
        Caption("cat.zh", "一只猫。", "zh", "cat"),
    ]


def test_either_file_may_be_missing(tmp_path: Path) -> None:
    write(tmp_path / CAPTIONS, {"id": "a", "topic": "", "de": "Ein Hund."})
    assert is_hand_written(tmp_path)
    assert read_hand_written(tmp_path) == ([], [Caption("a.de", "Ein Hund.", "de", "a")])


def test_a_captioned_table_of_that_name_is_no_hand_written_list(tmp_path: Path) -> None:
    assert not is_hand_written(tmp_path)
    write(tmp_path / CAPTIONS, {"image": "cat.jpg", "caption": "A cat."})
    assert not is_hand_written(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 must be an object"),
        ({"source": "a.jpg"}, 'line 2 needs a text for "id"'),
        ({"id": "a"}, 'line 2 needs a text for "source"'),
        ({"id": "a", "source": 3}, 'line 2 needs a text for "source"'),
        ({"id": "../a", "source": "a.jpg"}, "may only hold letters"),
        ({"id": "a", "source": "a.jpg", "crdit": "me"}, '"crdit" is neither id, source, credit nor a language'),
        ({"id": "a", "source": "a.jpg", "en": " "}, '"en": The caption is empty'),
        ({"id": "ok", "source": "a.jpg"}, "id more than once: ok"),
    ],
)
def test_a_slip_of_the_pen_is_named_with_its_place(tmp_path: Path, line: object, message: str) -> None:
    write(tmp_path / PICTURES, {"id": "ok", "source": "ok.jpg"}, line)
    with pytest.raises(ValueError, match=message):
        read_hand_written(tmp_path)


# ---------------------------------------------------------------- the gallery folder


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    source = str(tmp_path.parent)
    written = example(source=source, built="2026-11-23T20:00:00+00:00", num_pictures=2, num_captions=3)
    write_catalogue(tmp_path, written)
    read = read_catalogue(tmp_path, "m")
    assert read.pictures == written.pictures
    assert [(p.file, p.root) for p in read.pictures] == [(FileState(3, 4, "ab"), source), (None, source)]
    assert read.captions == written.captions
    assert read.stamp == written.stamp
    assert torch.equal(read.image_embeds, written.image_embeds.half())
    assert torch.equal(read.text_embeds, written.text_embeds.half())


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_catalogue(tmp_path / folder, example())
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["captions.jsonl", "embeddings.safetensors", "gallery.json", "pictures.jsonl"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert len({(tmp_path / "a" / name).stat().st_mode for name in names}) == 1


def test_chinese_can_be_read_in_the_files(tmp_path: Path) -> None:
    write_catalogue(tmp_path, example())
    assert "一只猫。" in (tmp_path / CAPTIONS).read_text("utf-8")


def test_a_file_name_that_is_no_unicode_survives(tmp_path: Path) -> None:
    blank = torch.zeros(1, 4), torch.zeros(0, 4)
    write_catalogue(tmp_path, Catalogue([Picture("a", "caf\udce9 \u2028.jpg")], [], *blank, example().stamp))
    assert read_catalogue(tmp_path, "m").pictures[0].source == "caf\udce9 \u2028.jpg"


def test_line_ends_of_another_system_do_no_harm(tmp_path: Path) -> None:
    write_catalogue(tmp_path, example())
    for name in (PICTURES, CAPTIONS):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"\n", b"\r\n"))
    assert read_catalogue(tmp_path, "m").pictures == example().pictures


def test_gallery_and_source_may_move_together(tmp_path: Path) -> None:
    photos, gallery = tmp_path / "here" / "photos", tmp_path / "here" / "gallery"
    photos.mkdir(parents=True)
    write_catalogue(gallery, example(source=str(photos)))
    assert str(tmp_path) not in (gallery / "gallery.json").read_text("utf-8")
    (tmp_path / "here").rename(tmp_path / "there")
    read = read_catalogue(tmp_path / "there" / "gallery", "m")
    assert read.stamp.source == str(tmp_path / "there" / "photos")
    assert read.pictures[0].path == tmp_path / "there" / "photos" / "one" / "two.jpg"


@pytest.mark.parametrize("source", ["", "owner/name@main", "/far/away"])
def test_a_source_elsewhere_is_kept_as_it_is(tmp_path: Path, source: str) -> None:
    write_catalogue(tmp_path, example(source=source))
    assert read_catalogue(tmp_path, "m").stamp.source == source


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / PICTURES).unlink(),
        lambda folder: (folder / "embeddings.safetensors").write_bytes(b"version https://git-lfs"),
        lambda folder: (folder / CAPTIONS).write_text((folder / CAPTIONS).read_text("utf-8").replace("dog", "cow")),
        lambda folder: (folder / "gallery.json").write_text("{}"),
        lambda folder: (folder / "gallery.json").write_text("<<<<<<< HEAD"),
        lambda folder: (folder / "gallery.json").write_text(
            (folder / "gallery.json").read_text().replace("f00d", "beef")
        ),
    ],
    ids=["missing file", "LFS pointer", "edited", "no stamp", "merge conflict", "stamp of another build"],
)
def test_damage_is_noticed_and_the_way_out_named(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    write_catalogue(tmp_path, example())
    harm(tmp_path)
    with pytest.raises(
        ValueError, match=r"is damaged .*python -m alignment.gallery build \S+ --out .* --model my/model"
    ):
        read_catalogue(tmp_path, "my/model")


def test_no_gallery_at_all_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no gallery in .*build SOURCE --out .* --model my/model"):
        read_catalogue(tmp_path, "my/model")


def test_the_rebuild_command_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stamp = Stamp("f", "m", 1.0, None, str(tmp_path / "my photos"), "--split dev")
    assert rebuild_command(Path("out"), "a/b", stamp) == (
        "python -m alignment.gallery build 'my photos' --out out --model a/b --split dev"
    )
