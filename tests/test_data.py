"""Tables, image folders and data sets of the Hub, whole and with missing, malformed or hostile parts."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from alignment.data import Pair, read_data
from tests.data_sets import read_pairs


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(source: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    """File name -> captions."""
    return {Path(pair.image).name: pair.captions for pair in read_pairs(source, **options)}


def splits(source: Path, **options: Any) -> dict[str, str]:
    return {Path(pair.image).name: pair.split for pair in read_pairs(source, **options)}


def karpathy_image(name: str, split: str, *captions: str, **more: object) -> dict[str, object]:
    sentences = [{"tokens": caption.split(), "raw": caption} for caption in captions]
    return {"filename": name, "split": split, "sentences": sentences, "imgid": 0} | more


@pytest.fixture
def flickr8k(tmp_path: Path) -> Path:
    """Three pictures in the usual layout, one of them in no list, and one that is listed but missing."""
    texts, pictures = tmp_path / "Flickr8k_text", tmp_path / "Flicker8k_Dataset"
    for name in ("a", "b", "c"):
        picture(pictures / f"{name}.jpg")
    lines = [f"{name}.jpg#{number}\t{name} caption {number} ." for name in "abc" for number in range(2)]
    write(texts / "Flickr8k.token.txt", "\n".join([*lines, "gone.jpg.1#0\tA caption .", "gone.jpg.1#1\tAnother ."]))
    write(texts / "Flickr8k.lemma.token.txt", "a.jpg#0\tlemma be not caption")
    write(texts / "Flickr_8k.trainImages.txt", "a.jpg\ngone.jpg\n")
    write(texts / "Flickr_8k.devImages.txt", "b.jpg\n")
    return tmp_path


# ---------------------------------------------------------------- tables


def test_csv_merges_the_rows_of_an_image(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / f"{name}.jpg")
    file = write(tmp_path / "all.csv", 'image,caption\na.jpg,one\nb.jpg,"two, with comma"\na.jpg,three\n')
    assert read(file) == read(tmp_path) == {"a.jpg": ("one", "three"), "b.jpg": ("two, with comma",)}
    assert [pair.id for pair in read_pairs(file)] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("image", ["image", "file_name", "filename", "path", "filepath", "image_path", " Image "])
@pytest.mark.parametrize("caption", ["caption", "captions", "text", "title", "raw", "sentences", "Caption"])
def test_columns_are_found_by_their_usual_names(tmp_path: Path, image: str, caption: str) -> None:
    picture(tmp_path / "a.jpg")
    file = write(tmp_path / "t.csv", f"number,{caption},{image}\n1,a dog,a.jpg\n")
    assert read(file) == {"a.jpg": ("a dog",)}


def test_several_caption_columns_are_merged_but_a_title_is_not_one_beside_captions(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    file = write(tmp_path / "t.csv", "file_name,title,caption_1,caption_2,caption_zh\na.jpg,IMG_1,one,two,三\n")
    assert read(file) == {"a.jpg": ("one", "two", "三")}


def test_two_columns_of_one_name_are_both_read(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    assert read(write(tmp_path / "t.csv", "image,caption,caption\na.jpg,one,two\n")) == {"a.jpg": ("one", "two")}


@pytest.mark.parametrize(("delimiter", "name"), [("\t", "t.tsv"), ("\t", "t.txt"), (";", "t.csv"), ("|", "t.csv")])
def test_other_delimiters(tmp_path: Path, delimiter: str, name: str) -> None:
    picture(tmp_path / "a.jpg")
    file = write(tmp_path / name, delimiter.join(["image", "caption"]) + "\n" + delimiter.join(["a.jpg", "one, two"]))
    assert read(file) == {"a.jpg": ("one, two",)}


def test_kaggle_captions_with_unquoted_commas_and_pictures_in_a_folder(tmp_path: Path) -> None:
    picture(tmp_path / "Images" / "a.jpg")
    write(tmp_path / "captions.txt", "image,caption\na.jpg,red, green , blue .\na.jpg,plain .,,\n")
    assert read(tmp_path) == {"a.jpg": ("red, green , blue .", "plain .")}


def test_excel_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    file = tmp_path / "t.csv"
    file.write_text("image,caption\r\na.jpg,ein Hund läuft\r\n", encoding="utf-8-sig")
    assert read(file) == {"a.jpg": ("ein Hund läuft",)}


def test_captions_written_as_a_json_list_in_a_cell(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle)
        table.writerow(["raw", "filename", "split", "img_id"])
        table.writerow([json.dumps(["one, two", "three"]), "a.jpg", "val", 5])
        table.writerow(["[sic] a dog", "a.jpg", "val", 5])
    assert read_pairs(tmp_path) == [Pair(str(tmp_path / "a.jpg"), ("one, two", "three", "[sic] a dog"), "dev", "5")]


def test_the_split_comes_from_the_column_or_else_from_the_file_name(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / f"{name}.jpg")
    write(tmp_path / "train.csv", "image,caption\na.jpg,one\n")
    write(tmp_path / "val.csv", "image,caption,split\nb.jpg,two,\nc.jpg,three,fold7\n")
    assert splits(tmp_path) == {"a.jpg": "train", "b.jpg": "dev", "c.jpg": "fold7"}
    assert list(read(tmp_path, split="fold7")) == ["c.jpg"]


def test_several_tables_that_are_no_splits_have_to_be_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    for name in ("mine.csv", "yours.csv"):
        write(tmp_path / name, "image,caption\na.jpg,one\n")
    with pytest.raises(ValueError, match=r"several csv annotation files \(mine.csv, yours.csv\)"):
        read_pairs(tmp_path)
    assert read(tmp_path / "mine.csv") == {"a.jpg": ("one",)}


def test_a_table_of_something_else_does_not_hide_the_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    write(tmp_path / "expenses.csv", "date,amount\n1.1.,5\n")
    write(tmp_path / "notes.txt", "buy milk\n")
    assert read(tmp_path) == {"a.jpg": ()}


def test_a_table_without_an_image_column_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "url,caption\nx,y\n")
    with pytest.raises(ValueError, match=r"t\.csv.*\(url, caption\) names pictures"):
        read_pairs(file)


def test_json_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png")
    lines = [
        json.dumps({"image": "images/a.png", "captions": ["one", "two"], "split": "train"}),
        json.dumps({"file_name": "images/b.png", "text": "three"}),
        "",
        "{broken",
        '{"width": 5}',
        '"a string"',
        json.dumps({"path": "c.png", "sentences": [{"raw": "four"}, {"raw": "五"}], "id": 0}),
    ]
    write(tmp_path / "pairs.jsonl", "\n".join(lines))
    assert read(tmp_path) == {"a.png": ("one", "two"), "b.png": ("three",), "c.png": ("four", "五")}
    assert "1 lines whose columns name no image (pairs.jsonl:5: width)" in caplog.text
    assert "2 unreadable lines (pairs.jsonl:4, pairs.jsonl:6)" in caplog.text
    assert [pair.id for pair in read_pairs(tmp_path)] == ["images/a.png", "images/b.png", "0"]


def test_a_json_list(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    file = write(tmp_path / "pairs.json", json.dumps([{"image": "a.png", "caption": "one"}], indent=2))
    assert read(file) == {"a.png": ("one",)}


@pytest.mark.parametrize("content", ["[1, 2]", '[{"image": "a.png"', "{}", ""])
def test_json_that_is_something_else_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match=r"pairs\.json"):
        read_pairs(write(tmp_path / "pairs.json", content))


# ---------------------------------------------------------------- image folders


def test_a_folder_of_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.JPG", "a.png", "sub/deep/c.webp", "train/dog/d.gif", ".hidden/e.png", "__MACOSX/f.png"):
        picture(tmp_path / name)
    write(tmp_path / "g.heic", "from a telephone")
    write(tmp_path / "h.txt", "not a picture")
    pairs = read_pairs(tmp_path)
    assert [pair.id for pair in pairs] == ["a.png", "b.JPG", "sub/deep/c.webp", "train/dog/d.gif"]
    assert [pair.split for pair in pairs] == ["", "", "", "train"]
    assert all(pair.captions == () and Path(pair.image).is_absolute() for pair in pairs)
    assert "1 pictures of a kind not read here (g.heic)" in caplog.text


def test_names_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in (" leading space.png", "back\\slash.png", "猫 — #1%20.png"):
        picture(tmp_path / name)
    assert len(read_pairs(tmp_path)) == 3


@pytest.mark.parametrize("metadata", ["metadata.csv", "metadata.jsonl"])
def test_the_hubs_imagefolder(tmp_path: Path, metadata: str) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("test", "a")):
        picture(tmp_path / split / f"{name}.png")
    for split in ("train", "test"):
        record = {"file_name": "a.png", "text": f"in {split}"}
        content = (
            json.dumps(record) if metadata.endswith("l") else "\n".join([",".join(record), ",".join(record.values())])
        )
        write(tmp_path / split / metadata, content)
    found = {(pair.id, pair.split): pair.captions for pair in read_pairs(tmp_path)}
    assert found == {
        ("train/a.png", "train"): ("in train",),
        ("train/b.png", "train"): (),
        ("test/a.png", "test"): ("in test",),
    }
    assert len(read_pairs(tmp_path, split="train")) == 2


def test_metadata_at_the_top_names_pictures_below(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    write(tmp_path / "metadata.csv", "file_name,caption\nimages/a.png,one\n")
    assert read(tmp_path) == read(tmp_path, format="folder") == {"a.png": ("one",)}


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    picture(outside / "a.png")
    inside = tmp_path / "set"
    inside.mkdir()
    (inside / "photos").symlink_to(outside)
    (outside / "back").symlink_to(inside)
    assert [pair.id for pair in read_pairs(inside)] == ["photos/a.png"]


@pytest.mark.parametrize("name", ["photos.tar.gz", "a.tgz", "b.zip", "dotted.tar"])
def test_archives_that_are_not_read_are_named(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, "x")
    with pytest.raises(ValueError, match=name):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match=name):
        read_pairs(tmp_path / name)


def test_a_split_of_what_has_none_is_refused_in_words(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="it has no splits"):
        read_pairs(tmp_path, split="test")


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no pictures"):
        read_pairs(tmp_path)


# ---------------------------------------------------------------- paths and other doubts


@pytest.fixture
def outside(tmp_path: Path) -> tuple[Path, Path]:
    """A secret picture, and a data set with a picture of its own beside it."""
    secret = picture(tmp_path / "secret.png")
    picture(tmp_path / "set" / "a.png")
    return tmp_path / "set", secret


@pytest.mark.parametrize("name", ["../secret.png", "x/../../secret.png", "..\\secret.png", "./../secret.png"])
def test_names_do_not_lead_out_of_the_data_set(
    outside: tuple[Path, Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = outside
    write(folder / "t.csv", f"image,caption\na.png,one\n{name},two\n")
    write(folder / "metadata.csv", f"file_name,caption\na.png,one\n{name},two\n")
    write(folder / "dataset_x.json", json.dumps({"images": [karpathy_image(n, "", "x") for n in ("a.png", name)]}))
    for format in ("csv", "folder", "karpathy"):
        caplog.clear()
        assert list(read(folder, format=format)) == ["a.png"]
        assert "1 paths outside the data set" in caplog.text


def test_the_search_below_does_not_lead_out_either(outside: tuple[Path, Path]) -> None:
    folder, _ = outside
    (folder / "x" / "y").mkdir(parents=True)
    write(folder / "x" / "y" / "metadata.csv", "file_name,caption\n../../secret.png,two\n")
    assert list(read(folder)) == ["a.png"]


def test_a_name_may_go_up_inside_the_data_set(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    write(tmp_path / "texts" / "metadata.csv", "file_name,caption\n../images/a.png,one\n")
    assert read(tmp_path) == {"a.png": ("one",)}


def test_absolute_paths_count_in_tables_of_ones_own_only(outside: tuple[Path, Path]) -> None:
    folder, secret = outside
    table = write(folder / "t.csv", f"image,caption\n{secret},one\n")
    assert [(pair.image, pair.id) for pair in read_pairs(table)] == [(str(secret), str(secret))]
    write(folder / "metadata.csv", f"file_name,caption\n{secret},one\n")
    assert list(read(folder, format="folder")) == ["a.png"]
    coco = {"images": [{"id": 1, "file_name": str(secret)}], "annotations": []}
    with pytest.raises(ValueError, match="paths outside the data set"):
        read_pairs(write(folder / "captions_x.json", json.dumps(coco)))


def test_a_picture_beside_the_table_comes_before_one_below(tmp_path: Path) -> None:
    near = picture(tmp_path / "a.png")
    picture(tmp_path / "other" / "a.png")
    assert read_pairs(write(tmp_path / "t.csv", "image,caption\na.png,one\n"))[0].image == str(near)


def test_empty_and_overlong_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "a.png")
    rows = ["", "   ", " two\u200b  words ", "x" * 5000]
    captions = read(write(tmp_path / "t.jsonl", json.dumps({"image": "a.png", "captions": rows})))["a.png"]
    assert captions == ("two words", "x" * 1000)
    assert "2 empty captions (a.png, a.png); 1 ends of very long captions (a.png)" in caplog.text


def test_a_picture_whose_captions_are_all_empty_is_kept_without_any(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert read(write(tmp_path / "t.csv", "image,caption\na.png,\n")) == {"a.png": ()}


@pytest.mark.parametrize("line", ['{"caption": "one", "image": null}', '{"caption": "one", "image": " "}'])
def test_lines_without_a_picture_are_counted(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "a.png")
    read_pairs(write(tmp_path / "t.jsonl", f'{line}\n{{"image": "a.png"}}'))
    assert "1 lines without a picture" in caplog.text


def test_many_problems_are_summed_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "a.png")
    rows = "\n".join(f"no{number}.png,x" for number in range(100))
    read_pairs(write(tmp_path / "t.csv", f"image,caption\na.png,x\n{rows}\n"))
    assert "left out 100 missing pictures (no0.png, no1.png, no2.png and 97 more)" in caplog.text
    assert len(caplog.records) == 1


def test_nothing_but_missing_pictures_says_what_was_looked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "image,caption\na.png,x\n")
    with pytest.raises(ValueError, match=r"no pictures; left out: 1 missing pictures \(a\.png\)"):
        read_pairs(file)


def test_the_format_can_be_overruled(flickr8k: Path) -> None:
    assert read(flickr8k, format="folder") == {"a.jpg": (), "b.jpg": (), "c.jpg": ()}
    with pytest.raises(ValueError, match="holds nothing to read as coco"):
        read_pairs(flickr8k, format="coco")
    with pytest.raises(ValueError, match="Unknown format 'zip'; choose one of karpathy, flickr8k"):
        read_pairs(flickr8k, format="zip")


def test_what_was_left_out_comes_with_the_result(flickr8k: Path) -> None:
    reading = read_data(flickr8k)
    assert reading.pairs == read_pairs(flickr8k)
    assert reading.format == "flickr8k"
    assert reading.left_out == {"missing pictures": ("gone.jpg.1",)}


def test_what_is_not_there_is_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give a folder, an annotation file, or OWNER/NAME"):
        read_pairs(tmp_path / "no such folder")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00"), max_size=30)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.sampled_from(["a.png", "b.png", "gone.png", "../a.png"]), TEXT), max_size=8))
def test_any_csv_reads_like_the_same_json_lines(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    rows = [*rows, ("a.png", "certainly")]
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("image", "caption"), *rows])
    lines = "\n".join(json.dumps({"image": name, "caption": caption}) for name, caption in rows)
    assert read(tmp_path / "t.csv") == read(write(tmp_path / "t.jsonl", lines))


def test_a_name_cannot_do_anything_to_the_terminal_that_shows_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"file_name": "a.jpg", "caption": "a"}, {"file_name": "\x1b[2J\u202egpj.\ud800\nb.png", "caption": "b"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    picture(tmp_path / "a.jpg")
    read_pairs(tmp_path)
    assert "left out 1 missing pictures ([2Jgpj. b.png)" in caplog.text


# ---------------------------------------------------------------- the Hub


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


class Table(list[dict[str, Any]]):
    """The part of `datasets.Dataset` that the reader uses."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def cast_column(self, column: str, feature: object) -> Table:
        assert column == "image"
        return self


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the `datasets` library, an extra that would access the network."""
    tables = {
        "train": Table(
            [
                {"image": {"bytes": png(1), "path": "x.png"}, "caption": ["one", "two"], "id": 1},
                {"image": {"bytes": png(2), "path": None}, "caption": ["three"], "id": None},
                {"image": {"bytes": png(1), "path": "y.png"}, "caption": ["four"], "id": 3},
                {"image": None, "caption": ["lost"], "id": 4},
            ]
        ),
        "validation": Table([{"image": {"bytes": None, "path": str(picture(tmp_path / "v.png"))}, "text": "five"}]),
    }

    def known(name: str, revision: str | None) -> None:
        if name != "someone/photos" or revision not in (None, "v1"):
            raise FileNotFoundError(f"Dataset {name!r} doesn't exist on the Hub")

    def get_dataset_split_names(name: str, revision: str | None = None) -> list[str]:
        known(name, revision)
        return list(tables)

    def load_dataset(name: str, revision: str | None, split: str) -> Table:
        known(name, revision)
        loaded.append(split)
        return tables[split]

    loaded: list[str] = []
    library = ModuleType("datasets")
    library.__dict__.update(
        get_dataset_split_names=get_dataset_split_names,
        load_dataset=load_dataset,
        Image=lambda decode: None,
        config=SimpleNamespace(HF_DATASETS_CACHE=tmp_path / "cache"),
        loaded=loaded,
        tables=tables,
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_hub_data_set_writes_its_pictures_out_once(hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = read_pairs("someone/photos")
    assert [pair.captions for pair in pairs] == [("one", "two", "four"), ("three",), ("five",)]
    assert [pair.split for pair in pairs] == ["train", "train", "dev"]
    assert [pair.id for pair in pairs] == ["1", Path(pairs[1].image).stem, "v"]
    assert [Path(pair.image).read_bytes() for pair in pairs[:2]] == [png(1), png(2)]
    assert len(list((hub / "cache").rglob("*.*"))) == 2
    assert "1 lines without a picture" in caplog.text


def test_only_the_split_asked_for_is_loaded_from_the_hub(hub: Path) -> None:
    assert [pair.captions for pair in read_pairs("someone/photos@v1", split="dev")] == [("five",)]
    assert sys.modules["datasets"].__dict__["loaded"] == ["validation"]


def test_a_hub_data_set_without_pictures_is_refused(hub: Path) -> None:
    sys.modules["datasets"].__dict__["tables"]["train"] = Table([{"question": "why?"}])
    with pytest.raises(ValueError, match=r"None of the columns of someone/photos \(question\) names an image"):
        read_pairs("someone/photos")


@pytest.mark.parametrize("name", ["someone/typo", "someone/photos@v9"])
def test_a_hub_data_set_that_does_not_exist_reads_as_one_sentence(hub: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no someone/\w+ here, and the Hugging Face Hub did not"):
        read_pairs(name)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="extra `hub`"):
        read_pairs("someone/photos")


def test_a_folder_comes_before_a_hub_name(hub: Path) -> None:
    picture(hub / "someone" / "photos" / "a.png")
    assert read(Path("someone/photos")) == {"a.png": ()}
