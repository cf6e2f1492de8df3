"""Records of pictures and captions, and hand-written lists."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.gallery.records import (
    CAPTIONS,
    PICTURES,
    Caption,
    FileFingerprint,
    GalleryMetadata,
    Picture,
    folder_of,
    is_hand_written,
    item_ids,
    language_of,
    read_captioned,
    read_hand_written,
    rebuild_command,
)


def write(path: Path, *lines: object) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


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


# ---------------------------------------------------------------- ids, and the command that rebuilds


def test_ids_are_made_of_what_an_item_is() -> None:
    first = Picture("p", "a.jpg", file=FileFingerprint(1, 1, "x"))
    other, later = replace(first, file=FileFingerprint(1, 1, "y")), replace(first, file=FileFingerprint(9, 9, "x"))
    ids = item_ids([first, other, later])
    assert ids[0] != ids[1]  # another content
    assert item_ids([first])[0] == ids[0]
    assert ids[2] == item_ids([first, first])[1]  # size and time say nothing; the second of two equal ones
    assert len(ids.unique()) == 3
    assert (ids >= 0).all()
    assert item_ids([Caption("c", "a", "en")]) != item_ids([Caption("c", "a", "zh")])
    # Collections on servers have rows of these ids.
    assert item_ids([first, Caption("c", "a", "en")]).tolist() == [7559240969414471364, 8724946494080326547]


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("beach.jpg", ""),
        ("holiday/2024/beach.jpg", "holiday/2024"),
        ("/far/away/beach.jpg", ""),
        ("package:skimage/data/chelsea.png", ""),
    ],
)
def test_folders_are_those_below_the_source(source: str, folder: str) -> None:
    assert folder_of(source) == folder


def test_the_rebuild_command_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metadata = GalleryMetadata("f", "m", 1.0, None, str(tmp_path / "my photos"), "--split dev")
    assert rebuild_command(Path("out"), "a/b", metadata) == (
        "python -m alignment.gallery build 'my photos' --out out --model a/b --split dev"
    )
