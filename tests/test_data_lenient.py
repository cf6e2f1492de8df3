"""Malformed annotations: every row and every file is read or reported."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignment.data import ReadResult, describe_issues, read_data

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
TEXTS = [f"a dog number {word}" for word in WORDS]


def pictures(folder: Path, names: Any = range(12), ending: str = ".jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shade, name in enumerate(names):
        Image.new("RGB", (4, 4), (shade, len(folder.name), 0)).save(folder / f"{name}{ending}", "PNG")


def found(reading: ReadResult, root: Path) -> dict[str, tuple[str, ...]]:
    return {os.path.relpath(pair.image, root): pair.captions for pair in reading.pairs if pair.captions}


def expected(prefix: str = "", ending: str = ".jpg") -> dict[str, tuple[str, ...]]:
    return {f"{prefix}{number}{ending}": (text,) for number, text in enumerate(TEXTS)}


def dumped(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


def coco(names: list[str], texts: list[Any], image_id: Any = int, text_id: Any = int) -> dict[str, Any]:
    return {
        "images": [{"id": image_id(number), "file_name": name} for number, name in enumerate(names, 1)],
        "annotations": [{"id": n, "image_id": text_id(n), "caption": text} for n, text in enumerate(texts, 1)],
    }


# ---------------------------------------------------------------- lenient lines


def rows(delimiter: str, odd: str) -> str:
    lines = [f"{number}.jpg{delimiter}{text}" for number, text in enumerate(TEXTS)]
    lines[5] = odd.replace(",", delimiter, 1)
    return "\n".join([f"image{delimiter}caption", *lines, ""])


@pytest.mark.parametrize(
    ("odd", "caption", "repaired"),
    [
        ('5.jpg,"No entry sign beside a road', '"No entry sign beside a road', True),
        ('5.jpg,"No entry sign" beside a road', '"No entry sign" beside a road', False),
        ('5.jpg,A pipe of 5" and a half', 'A pipe of 5" and a half', False),
        ('5.jpg, "a dog of ""mine"""', 'a dog of "mine"', False),
        ('5.jpg,"two lines\nin one"', "two lines in one", False),
        ('5.jpg,"one, two\n\nand more"', None, False),
    ],
)
@pytest.mark.parametrize(("delimiter", "name"), [(",", "captions.csv"), ("\t", "captions.tsv"), ("\t", "c.txt")])
def test_a_quotation_mark_costs_no_other_row(
    tmp_path: Path, odd: str, caption: str | None, repaired: bool, delimiter: str, name: str
) -> None:
    pictures(tmp_path)
    (tmp_path / name).write_text(rows(delimiter, odd))
    reading = read_data(tmp_path)
    caption = caption or "one, two and more"
    assert found(reading, tmp_path) == {**expected(), "5.jpg": (caption,)}
    where = {"lines with a quotation mark that is not closed": (f"{name}:7",)} if repaired else {}
    assert (reading.repaired, reading.left_out) == (where, {})


def test_a_mark_that_another_row_would_close_costs_none_either(tmp_path: Path) -> None:
    pictures(tmp_path)
    text = rows(",", '5.jpg,"No entry').replace("8.jpg,a dog number eight", '8.jpg,"stop, please"')
    (tmp_path / "captions.csv").write_text(text.replace("nine", 'a pipe of 5"'))
    captions = found(read_data(tmp_path), tmp_path)
    assert [captions[f"{n}.jpg"] for n in (5, 8, 9)] == [
        ('"No entry',),
        ("stop, please",),
        ('a dog number a pipe of 5"',),
    ]
    assert len(captions) == 12


@pytest.mark.parametrize(
    ("line", "caption", "split"),
    [
        ("0.jpg,a dog, running fast,train", "a dog, running fast", "train"),
        ("0.jpg,a dog,running,train", "a dog,running", "train"),
        ('0.jpg,"a dog, running fast",val', "a dog, running fast", "dev"),
    ],
)
def test_a_comma_without_quotes_belongs_to_the_caption(tmp_path: Path, line: str, caption: str, split: str) -> None:
    pictures(tmp_path, [0, 1])
    (tmp_path / "captions.csv").write_text(f"image,caption,split\n{line}\n1.jpg,a cat,test\n")
    reading = read_data(tmp_path)
    assert [(pair.captions, pair.split) for pair in reading.pairs] == [((caption,), split), (("a cat",), "test")]


def test_a_line_that_can_be_parted_in_two_ways_is_named(tmp_path: Path) -> None:
    pictures(tmp_path, [0, 1, 2])
    lines = ["image,caption,credit", "0.jpg,a dog,Ann", "1.jpg,a cat,sleeping,Bob", "2.jpg,a cow,Smith, Eve"]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    reading = read_data(tmp_path)
    assert found(reading, tmp_path) == {"0.jpg": ("a dog",), "2.jpg": ("a cow",)}
    assert reading.left_out["lines with more values than columns"] == ("captions.csv:3",)


@pytest.mark.parametrize("line", ["a dog, running,{}", "{},a dog, running"])
@pytest.mark.parametrize("first", [True, False])
def test_without_a_header_a_comma_belongs_to_the_caption_too(tmp_path: Path, line: str, first: bool) -> None:
    pictures(tmp_path)
    rows = [(f"{text},{name}" if line.startswith("a") else f"{name},{text}") for name, text in NAMED.items()]
    rows[0 if first else 5] = line.format(f"{0 if first else 5}.jpg")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    changed = {"0.jpg" if first else "5.jpg": ("a dog, running",)}
    assert found(read_data(tmp_path), tmp_path) == expected() | changed


@pytest.mark.parametrize("value", ["nan", "NaN", "None", "null", ""])
def test_what_programs_write_for_no_caption_is_none(tmp_path: Path, value: str) -> None:
    pictures(tmp_path, [0, 1])
    (tmp_path / "captions.csv").write_text(f"image,caption\n0.jpg,{value}\n1.jpg,a nan bread\n")
    reading = read_data(tmp_path)
    assert found(reading, tmp_path) == {"1.jpg": ("a nan bread",)}
    assert reading.left_out == {"empty captions": ("0.jpg",)}


# ---------------------------------------------------------------- values of another type


@pytest.mark.parametrize("value", [None, 7, 1.5, True, {"a": 1}, [], [None], {"raw": None}])
def test_a_caption_that_is_no_text_counts_as_empty(tmp_path: Path, value: object) -> None:
    pictures(tmp_path, [0, 1])
    dumped(tmp_path / "coco" / "captions.json", coco(["0.jpg", "1.jpg"], [value, "a cat"]))
    image = {"filename": "0.jpg", "sentences": [{"raw": value}], "split": None}
    dumped(tmp_path / "karpathy" / "dataset_x.json", {"images": [image, {**image, "filename": "1.jpg"}, None, {}]})
    dumped(tmp_path / "lines" / "c.jsonl", {"image": "0.jpg", "caption": value})
    for name in ("coco", "karpathy", "lines"):
        pictures(tmp_path / name, [0, 1])
        reading = read_data(tmp_path / name, format="jsonl" if name == "lines" else name)
        assert {"0.jpg", "1.jpg"} >= {Path(pair.image).name for pair in reading.pairs}
        assert reading.pairs[0].captions == ()
    assert found(read_data(tmp_path / "coco"), tmp_path / "coco") == {"1.jpg": ("a cat",)}


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("['a dog runs', 'a brown dog']", ("a dog runs", "a brown dog")),
        ("""["a dog's ball", 'a "good" dog']""", ("a dog's ball", 'a "good" dog')),
        ("['a dog runs' 'a brown dog']", ("a dog runs", "a brown dog")),  # numpy
        ("('a dog runs', None)", ("a dog runs",)),
        ("[['a dog runs'], ['a brown dog', None]]", ("a dog runs", "a brown dog")),
        ("[sic] a dog", ("[sic] a dog",)),
        ("['a' + 'b']", ("['a' + 'b']",)),
    ],
)
def test_a_list_as_python_writes_it_is_several_captions(tmp_path: Path, cell: str, captions: tuple[str, ...]) -> None:
    pictures(tmp_path, [0])
    quoted = cell.replace('"', '""')
    (tmp_path / "captions.csv").write_text(f'image,caption\n0.jpg,"{quoted}"\n')
    assert found(read_data(tmp_path), tmp_path) == {"0.jpg": captions}


# ---------------------------------------------------------------- files not understood so far

CHINESE = "image,caption\n" + "".join(f"{number}.jpg,一只狗\n" for number in range(12))


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("text", [CHINESE, CHINESE[: CHINESE.index("1.jpg")]])
def test_chinese_tables_are_read_in_their_encoding(tmp_path: Path, encoding: str, text: str) -> None:
    pictures(tmp_path)
    (tmp_path / "captions.csv").write_bytes(text.encode(encoding))
    reading = read_data(tmp_path)
    assert set(found(reading, tmp_path).values()) == {("一只狗",)}
    assert ("files not in UTF-8" in reading.repaired) == (encoding != "utf-8-sig")


@pytest.mark.parametrize(
    ("encoding", "caption"), [("cp1252", "un café à côté"), ("cp1251", "собака бежит"), ("shift_jis", "犬が走っている")]
)
def test_other_old_encodings_too(tmp_path: Path, encoding: str, caption: str) -> None:
    pictures(tmp_path)
    lines = [f"{number}.jpg,{caption}" for number in range(12)]
    (tmp_path / "captions.csv").write_bytes("\n".join(["image,caption", *lines]).encode(encoding))
    assert set(found(read_data(tmp_path), tmp_path).values()) == {(caption,)}


SHORT = {
    "gbk": ["狗", "两个小孩在海边玩耍", "穿T恤的男人骑自行车"],
    "big5": ["一隻狗在草地上奔跑", "兩個小孩在海邊玩耍，天很藍。"],
    "cp1252": [
        "café",
        "la tête",
        "\u201ca dog\u201d",
        "a dog\u2019s ball",
        "ça va",
        "Übergröße",
        "¿qué niño?",
        "ten \u20ac",
    ],
    "cp1250": ["piękna łódź", "pies biegnie po łące", "žluťoučký kůň"],
    "shift_jis": ["イヌ", "赤い自転車に乗る人", "海で遊ぶ子供"],
    "euc_jp": ["犬が走っている", "ネコ"],
    "cp949": ["개가 달린다", "빨간 자전거"],
    "cp1251": ["кот", "красный велосипед"],
    "utf-16": ["a dog", "一只狗"],
    "utf-16-le": ["a dog", "一只狗, 在跑"],
    "utf-16-be": ["un café"],
}


@pytest.mark.parametrize(("encoding", "text"), [(name, text) for name, texts in SHORT.items() for text in texts])
def test_a_few_words_are_enough_to_tell_an_encoding(tmp_path: Path, encoding: str, text: str) -> None:
    for name, content in (("captions.csv", f'image,caption\n0.jpg,"{text}"\n'), ("0.txt", text)):
        folder = tmp_path / name
        pictures(folder, [0])
        (folder / name).write_bytes(content.encode(encoding))
        reading = read_data(folder)
        assert found(reading, folder) == {"0.jpg": (text,)}
        (told,) = reading.repaired["files not in UTF-8"]
        assert told.startswith(f"{name} as ")


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_an_empty_byte_is_not_another_encoding(tmp_path: Path, name: str) -> None:
    pictures(tmp_path)
    lines = HEADED if name.endswith("csv") else [json.dumps({"image": n, "caption": t}) for n, t in NAMED.items()]
    (tmp_path / name).write_text("\n".join(lines).replace("a dog", "a\0 dog", 1))
    assert len(found(read_data(tmp_path), tmp_path)) == (12 if name.endswith("csv") else 11)


def test_a_file_that_is_cut_off_within_a_letter_is_utf_8_still(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "captions.csv").write_bytes(CHINESE.encode()[:-2])
    reading = read_data(tmp_path)
    assert list(found(reading, tmp_path).values()).count(("一只狗",)) == 11
    assert reading.repaired == {"captions with damaged characters": ("captions.csv: 11.jpg",)}


def test_one_damaged_line_does_not_change_the_encoding_of_the_others(tmp_path: Path) -> None:
    pictures(tmp_path)
    data = CHINESE.encode().replace("3.jpg,一只狗".encode(), b"3.jpg,caf\xe9")
    (tmp_path / "captions.csv").write_bytes(data)
    reading = read_data(tmp_path)
    assert list(found(reading, tmp_path).values()).count(("一只狗",)) == 11
    assert reading.repaired == {"captions with damaged characters": ("captions.csv: 3.jpg",)}


TABLE = [f"{number}.jpg,{text}" for number, text in enumerate(TEXTS)]
HEADED = ["image,caption", *TABLE]


@pytest.mark.parametrize(
    "lines",
    [
        TABLE,
        [f"{text},{number}.jpg" for number, text in enumerate(TEXTS)],
        [f"{number},{number}.jpg,{text}" for number, text in enumerate(TEXTS)],
        ["", *HEADED],
        [",,", *HEADED],
        ["# exported yesterday", "", *HEADED],
        ["# image,caption", *TABLE],
        ["sep=,", *HEADED],
        ["sep=;", *[line.replace(",", ";") for line in HEADED]],
        ['"sep=;"', *[line.replace(",", ";") for line in HEADED]],
        ["image,beschreibung", *TABLE],
        ["picture_of_it,what_it_shows", *TABLE],
        ["image,width,utterance", *[line.replace(",", ",640,") for line in TABLE]],
        [",image,what", *[f"{number},{line}" for number, line in enumerate(TABLE)]],
        ["0,1", *TABLE],
        ["image_id,caption", *[line.replace(".jpg", ".0") for line in TABLE]],
        [line.replace(",", " | ") for line in HEADED],
        ["image_id,caption", *[line.replace(".jpg", "") for line in TABLE]],
        ["id,caption", *[f"{line.replace('.jpg', ''):0>30}" for line in TABLE]],
        [line.replace(".jpg,", ".jpg#0\t") for line in TABLE],
        [line.replace(",", " ") for line in TABLE],
        [line.replace(",", ": ") for line in TABLE],
    ],
)
@pytest.mark.parametrize("name", ["captions.csv", "labels.txt", "metadata.csv"])
def test_tables_are_read_with_or_without_a_header(tmp_path: Path, lines: list[str], name: str) -> None:
    pictures(tmp_path)
    (tmp_path / name).write_text("\n".join(lines), "utf-8")
    reading = read_data(tmp_path)
    assert (found(reading, tmp_path), reading.unread, reading.left_out) == (expected(), {}, {})


NAMED = {f"{number}.jpg": text for number, text in enumerate(TEXTS)}
LLAVA = [
    {
        "id": str(number),
        "image": name,
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": text}],
    }
    for number, (name, text) in enumerate(NAMED.items())
]
LLAVA_LIKE = [{"image": name, "caption": text} for name, text in NAMED.items()]
FORMS = {
    "map": NAMED,
    "map to lists": {name: [text] for name, text in NAMED.items()},
    "map to objects": {name: {"caption": text} for name, text in NAMED.items()},
    "map of stems": {name.removesuffix(".jpg"): text for name, text in NAMED.items()},
    "llava": LLAVA,
    "list": [{"file": name, "caption": text} for name, text in NAMED.items()],
    "wrapped": {"version": 1, "data": [{"image": name, "caption": text} for name, text in NAMED.items()]},
    "columns": {"image": list(NAMED), "caption": TEXTS},
    "pandas": {"image": dict(enumerate(NAMED)), "caption": dict(enumerate(TEXTS))},
    "coco": coco(list(NAMED), TEXTS),
    "coco by file name": coco(list(NAMED), TEXTS, text_id=lambda number: f"{number - 1}.jpg"),
    "captions of images": {"images": [{"file_name": name, "caption": text} for name, text in NAMED.items()]},
    "splits": {"train": LLAVA[:6], "val": [{name: NAMED[name]} for name in list(NAMED)[6:]]},
    "two lists": {"one": [{"image": "0.jpg", "caption": TEXTS[0]}], "two": LLAVA_LIKE[1:], "others": [{"id": 1}] * 50},
    "lists": [[name, text] for name, text in NAMED.items()],
    "objects of one": [{name: text} for name, text in NAMED.items()],
    "names in objects": [{"image": {"file_name": name}, "caption": {"en": text}} for name, text in NAMED.items()],
    "names in lists": [{"image": [name], "caption": {"text": text}} for name, text in NAMED.items()],
    "coco by stem": coco(list(NAMED), TEXTS, lambda number: number + 500, lambda number: str(number - 1)),
    "coco by 1.0": coco(list(NAMED), TEXTS, text_id=lambda number: f"{number}.0"),
    "results": [{"image_id": number, "caption": text} for number, text in enumerate(TEXTS)],
    "without images": {"annotations": [{"image_id": n, "id": 50 - n, "caption": t} for n, t in enumerate(TEXTS)]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["captions.json", "annotations.json", "_annotations.coco.json", "mine.json"])
def test_json_of_many_forms_under_any_name(tmp_path: Path, form: str, name: str) -> None:
    pictures(tmp_path)
    dumped(tmp_path / name, FORMS[form])
    reading = read_data(tmp_path)
    assert (found(reading, tmp_path), reading.unread) == (expected(), {})
    assert found(read_data(tmp_path / name), tmp_path) == expected()


@pytest.mark.parametrize("where", ["{}.txt", "{}.caption", "{}.jpg.txt", "{}.json", "texts/{}.txt"])
@pytest.mark.parametrize("folder", ["", "train/"])
def test_text_that_goes_by_a_pictures_name_is_its_caption(tmp_path: Path, where: str, folder: str) -> None:
    pictures(tmp_path / folder)
    (tmp_path / folder / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        content = json.dumps({"caption": text, "width": 4}) if where.endswith("json") else text + "\n"
        (tmp_path / folder / where.format(number)).write_text(content)
    reading = read_data(tmp_path)
    assert (found(reading, tmp_path), reading.unread) == (expected(folder), {})


def test_text_files_that_come_to_nothing_are_named(tmp_path: Path) -> None:
    pictures(tmp_path, [0, 1, 2])
    pictures(tmp_path / "more", [9])
    pictures(tmp_path / "again", [9])
    texts = {
        "0.txt": " \n",
        "1.txt": "one",
        "1.caption": "uno",
        "2.json": "{",
        "7.txt": "orphan",
        "texts/9.txt": "nine",
    }
    (tmp_path / "texts").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    reading = read_data(tmp_path)
    assert found(reading, tmp_path) == {"1.jpg": ("one",)}
    assert {name for names in reading.left_out.values() for name in names} == {*texts} - {"1.txt"}
    (tmp_path / "captions.csv").write_text("image,caption\n1.jpg,eins\n")
    reading = read_data(tmp_path)
    assert found(reading, tmp_path) == {"1.jpg": ("eins",)}
    assert {"0.txt", "1.txt", "1.caption"} <= {name for names in reading.left_out.values() for name in names}


def test_boxes_beside_pictures_are_no_captions(tmp_path: Path) -> None:
    pictures(tmp_path)
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("0 0.5 0.5 0.2 0.1\n")
    reading = read_data(tmp_path)
    assert found(reading, tmp_path) == {}
    assert len(reading.left_out["text files beside pictures that hold no words"]) == 12


def sheet(path: Path, text: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("xl/sharedStrings.xml", f"<sst><si><t>{text}</t></si></sst>")


def test_a_parquet_file_beside_pictures_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    pictures(tmp_path)
    parquet.write_table(pyarrow.table({"file_name": list(NAMED), "text": TEXTS}), tmp_path / "metadata.parquet")
    assert found(read_data(tmp_path), tmp_path) == expected()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("captions.xlsx", "0.jpg", "CSV"),
        ("mine.xlsx", "0.jpg", "CSV"),
        ("captions.pkl", "", "CSV"),
        ("captions.json.gz", "", "unpacked"),
        ("captions", "0.jpg a dog", "without an ending"),
        ("captions.dat", "0.jpg a dog", "that end in .dat"),
        ("train.csv.gz", "", "unpacked"),
        ("mine.xls", "0\0.\0j\0p\0g\0", "CSV"),
        ("captions.json", "", "empty"),
        ("captions.jsonl", '{"a": "b"}\n{"a": "c"}\n', "names pictures"),
        ("captions.csv", "", "empty"),
        (
            "captions.csv",
            "image,first,second\n0.jpg,a dog runs,ein Hund rennt\n1.jpg,a cat,eine Katze\n",
            "first, second",
        ),
        ("captions.csv", "a.png,a dog\nb.png,a cat\n", "none of its 2 captions"),
        ("captions.json", '{"0.jpg": "a dog", ', "Expecting"),
        ("metadata.csv", "image,one,two\n0.jpg,a dog runs,ein Hund rennt\n1.jpg,a cat,eine Katze\n", "one, two"),
    ],
)
def test_a_file_of_captions_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, reason: str) -> None:
    pictures(tmp_path)
    sheet(tmp_path / name, content) if name.endswith("xlsx") else (tmp_path / name).write_text(content)
    if "none of" in reason:
        with pytest.raises(ValueError, match=r"missing pictures \(a\.png, b\.png\)"):
            read_data(tmp_path)
        return
    reading = read_data(tmp_path)
    assert len(reading.pairs) == 12
    assert list(reading.unread) == [name]
    assert reason in reading.unread[name]
    with pytest.raises(ValueError, match=name):
        read_data(tmp_path / name)


@pytest.mark.parametrize("name", ["val.xlsx", "metadata.csv", "annotations.json"])
def test_beside_a_table_that_is_read_the_others_are_named(tmp_path: Path, name: str) -> None:
    pictures(tmp_path)
    (tmp_path / "captions.csv").write_text("\n".join(HEADED))
    if name.endswith("xlsx"):
        sheet(tmp_path / name, "0.jpg")
    elif name.endswith("json"):
        dumped(tmp_path / name, coco(["0.jpg"], ["a dog"]))
    else:
        (tmp_path / name).write_text("\n".join(HEADED))
    reading = read_data(tmp_path / ".")
    read = "annotations.json" if name == "annotations.json" else "captions.csv"
    assert len(found(reading, tmp_path)) == (1 if read == name else 12)
    named = {*reading.unread, *reading.left_out.get("other files of captions, whose path has to be given", ())}
    assert named == {name, "captions.csv"} - {read}


def test_captions_are_found_at_any_depth(tmp_path: Path) -> None:
    pictures(tmp_path / "a/b/c/d")
    (tmp_path / "a/b/c/d/captions.csv").write_text("\n".join(HEADED))
    assert found(read_data(tmp_path), tmp_path) == expected("a/b/c/d/")


def test_tables_of_something_else_are_not_named(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "expenses.csv").write_text("date,what,amount\n1.1.,new shoes for me,5\n")
    (tmp_path / "readme.txt").write_text("These are my dogs,\nand their friends.\n")
    (tmp_path / "package.json").write_text('{"name": "mine", "version": "1.0"}')
    (tmp_path / "annotations_trainval2017.zip").touch()
    (tmp_path / "sizes.csv").write_text("image,width\n0.jpg,3\n1.jpg,4\n")
    sheet(tmp_path / "expenses.xlsx", "shoes")
    reading = read_data(tmp_path)
    assert (reading.format, len(reading.pairs), reading.unread) == ("folder", 12, {})
    assert reading.left_out == {"archives, which have to be unpacked first": ("annotations_trainval2017.zip",)}


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("label", ["dog", "cat"]),
        ("label", range(12)),
        ("class_id", [0, 1]),
        ("Class Name", ["golden retriever", "tabby cat"]),
        ("kind_of_animal", ["dog", "cat"]),
    ],
)
@pytest.mark.parametrize("name", ["train_labels.csv", "metadata.jsonl"])
def test_a_table_of_classes_is_called_one(tmp_path: Path, column: str, values: Any, name: str) -> None:
    pictures(tmp_path)
    table = [{"filename": image, column: [*values][row % len(values)]} for row, image in enumerate(NAMED)]
    lines = [f"filename,{column}", *[",".join(map(str, row.values())) for row in table]]
    text = "\n".join(lines if name.endswith("csv") else map(json.dumps, table))
    (tmp_path / name).write_text(text)
    for source in (tmp_path, tmp_path / name):
        reading = read_data(source)
        assert (len(reading.pairs), found(reading, tmp_path), reading.unread) == (12, {}, {})
        (reason,) = [reason for reason in reading.left_out if "classes" in reason]
        assert "call their column caption" in reason
        assert reading.left_out[reason] == (f"{name}, column {column}",)


@pytest.mark.parametrize("kind", ["header", "keys", "keys of each line", "map", "names", "files", "one name"])
def test_what_is_said_does_not_grow_with_the_data(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    many = [f"an unknown column {number}" for number in range(5000)]
    pictures(tmp_path, [0, 1])
    if kind == "header":
        (tmp_path / "captions.csv").write_text(f"{','.join(many)}\n{','.join(many)}\n")
    elif kind == "keys":
        dumped(tmp_path / "captions.jsonl", dict.fromkeys(many, "a dog runs"))
    elif kind == "keys of each line":
        rows = [{"image": "0.jpg", "caption": "a dog"}, *[{name: "a dog"} for name in many]]
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "map":
        dumped(tmp_path / "captions.json", dict.fromkeys(many, "a dog runs"))
    elif kind == "names":
        (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *[f"{name}.jpg,a dog" for name in many]]))
    elif kind == "files":
        for number in range(50):
            (tmp_path / f"captions {number}.pkl").touch()
    else:
        (tmp_path / "captions.csv").write_text(f"image,caption\n{'a' * 9999}.jpg,a dog\n{'b' * 9999},a dog\n")
    said: list[str] = []
    for source in (tmp_path, *tmp_path.glob("captions.*")):
        try:
            said += describe_issues(read_data(source))
        except ValueError as error:
            said.append(str(error))
    assert any("captions" in line or "column" in line for line in said)
    assert sum(map(len, said)) + len(caplog.text) < 6000
