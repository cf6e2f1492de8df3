import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignment.engine import AlignmentEngine, dataset_eval
from alignment.engine.dataset_eval import EvalResult, Progress, measure_archive, random_baseline
from alignment.evaluate import evaluate_embeddings
from alignment.gallery import build_gallery
from alignment.model import DualEncoder
from alignment.preprocess import InputError
from alignment.ui.strings import error_text, strings

CAPTIONS = ["two cats", "pasta", "a dog runs on the beach"]


def picture(seed: int, side: int = 50) -> bytes:
    torch.manual_seed(seed)
    buffer = io.BytesIO()
    Image.fromarray(torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {f"{seed}.png": picture(seed) for seed in range(3)}
TABLE = "image,caption\n" + "\n".join(f"{seed}.png,{text}" for seed, text in enumerate(CAPTIONS))


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory) -> AlignmentEngine:
    source = tmp_path_factory.mktemp("source")
    (source / "one.png").write_bytes(picture(0))
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    return AlignmentEngine(encoder, build_gallery(source, tmp_path_factory.mktemp("gallery"), encoder))


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch) -> Path:
    """Where temporary folders are made; whatever a test does, nothing may be left in it."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    yield folder
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def zipped(tmp_path):
    def write(members: dict[str, str | bytes]) -> Path:
        path = tmp_path / "upload.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members.items():
                file.writestr(name, data)
        return path

    return write


def measured(engine, path) -> EvalResult:
    *steps, last = measure_archive(engine, path)
    assert all(isinstance(step, Progress) for step in steps)
    assert isinstance(last, EvalResult)
    return last


def refused(engine, path) -> str:
    """Name the error, which has to be a sentence in both languages that tells nothing of this machine."""
    with pytest.raises(InputError) as raised:
        list(measure_archive(engine, path))
    error = raised.value
    assert f"error.{error.code}" in strings()["zh"], error.code
    assert error_text("en", error) == str(error)
    assert "{" not in error_text("zh", error)
    assert "/" not in str(error)
    return error.code


# ---------------------------------------------------------------- every form that is read


def in_lines(form: str) -> str:
    return "\n".join(form.format(name=f"{seed}.png", text=text) for seed, text in enumerate(CAPTIONS))


KARPATHY = {
    "images": [{"filename": f"{s}.png", "split": "test", "sentences": [{"raw": t}]} for s, t in enumerate(CAPTIONS)]
}
COCO = {
    "images": [{"id": seed, "file_name": f"{seed}.png"} for seed in range(3)],
    "annotations": [{"image_id": seed, "caption": text} for seed, text in enumerate(CAPTIONS)],
}
FORMS = {
    "csv": {"captions.csv": TABLE},
    "tsv": {"captions.tsv": TABLE.replace(",", "\t")},
    "jsonl": {"data.jsonl": in_lines('{{"image": "{name}", "caption": "{text}"}}')},
    "imagefolder": {"metadata.csv": TABLE.replace("image,", "file_name,")},
    "flickr8k": {"Flickr8k.token.txt": in_lines("{name}#0\t{text}")},
    "karpathy": {"dataset_mine.json": json.dumps(KARPATHY)},
    "coco": {"captions_val2017.json": json.dumps(COCO)},
    "utf-16": {"captions.csv": TABLE.encode("utf-16")},
    "without a header": {"captions.csv": TABLE.removeprefix("image,caption\n")},
    "map": {"captions.json": json.dumps({f"{seed}.png": text for seed, text in enumerate(CAPTIONS)})},
    "coco by another name": {"annotations.json": json.dumps(COCO)},
    "texts beside": {f"{seed}.txt": text for seed, text in enumerate(CAPTIONS)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("folder", ["", "my data/"])
def test_every_form_of_captions_is_measured_alike(engine, zipped, form, folder):
    found = measured(engine, zipped({folder + name: data for name, data in {**PICTURES, **FORMS[form]}.items()}))
    told = {"files not in UTF-8": ["captions.csv as utf-16"]} if form == "utf-16" else {}
    assert (found.num_images, found.num_texts, found.left_out) == (3, 3, told)
    images = engine.embed_images([Image.open(io.BytesIO(data)) for data in PICTURES.values()])
    expected = evaluate_embeddings(images, engine.embed_captions(CAPTIONS), torch.arange(3), resamples=0)
    assert {name: figure.value for name, figure in found.metrics.items()} == pytest.approx(
        {name: figure.value for name, figure in expected.metrics.items()}
    )
    for figure in found.metrics.values():
        assert figure.low <= figure.value <= figure.high


def test_progress_goes_from_unpacking_to_captions(engine, zipped):
    steps = [
        step for step in measure_archive(engine, zipped({**PICTURES, **FORMS["csv"]})) if isinstance(step, Progress)
    ]
    assert [step.what for step in steps] == ["unpacking", "pictures", "captions"]
    assert [step.total for step in steps] == [4, 3, 3]


def test_a_run_that_is_stopped_half_way_leaves_nothing(engine, zipped, scratch):
    steps = measure_archive(engine, zipped({**PICTURES, **FORMS["csv"]}))
    assert next(steps).what == "unpacking"
    assert list(scratch.iterdir()) != []
    steps.close()
    assert list(scratch.iterdir()) == []


def test_examples_name_pictures_as_the_zip_does_and_show_them(engine, zipped):
    members = {f"pictures/{seed}.png": picture(seed, side=300) for seed in range(8)}
    table = "image,caption\n" + "\n".join(f"pictures/{seed}.png,{CAPTIONS[seed % 3]} {seed}" for seed in range(8))
    found = measured(engine, zipped({**members, "captions.csv": table}))
    assert found.worst
    for example in found.worst:
        shown = [example.query] if example.direction == "image_to_text" else [example.answer, *example.tops]
        assert set(shown) <= set(members) & set(found.thumbnails)
        assert example.ranks[0] > 1
    for suspect in found.suspects:
        assert suspect.image != suspect.owner
        assert f"{suspect.owner.removeprefix('pictures/')[0]}" in suspect.rival
        assert {suspect.image, suspect.owner} <= set(found.thumbnails)
    for data in found.thumbnails.values():
        assert Image.open(io.BytesIO(data)).size == (200, 200)


# ---------------------------------------------------------------- what is left out


def test_what_is_left_out_is_named_with_its_reason(engine, zipped):
    table = TABLE + "\nbad.jpg,broken\nlost.png,missing\n1.png,\ncopy.png,two sleeping cats\n"
    members = {**PICTURES, "bad.jpg": b"hello", "copy.png": picture(0), "lonely.png": picture(9), "run.exe": b"MZ"}
    found = measured(engine, zipped({**members, "captions.csv": table, "inner.zip": b"PK"}))
    assert (found.num_images, found.num_texts) == (3, 4)  # the copy's caption belongs to its double now
    assert found.left_out == {
        "kind": ["run.exe", "inner.zip"],
        "missing pictures": ["lost.png"],
        "empty captions": ["1.png"],
        "pictures that no caption names": ["lonely.png"],
        "doubles": ["copy.png"],
        "image.not_an_image": ["bad.jpg"],
    }


def test_an_open_quotation_mark_and_a_long_caption_are_named(engine, zipped):
    table = TABLE.replace("1.png,", '1.png,"').replace("two cats", " ".join(["cat"] * 80))
    found = measured(engine, zipped({**PICTURES, "captions.csv": table}))
    assert (found.num_images, found.num_texts) == (3, 3)
    assert set(found.left_out) == {"lines with a quotation mark that is not closed", "cut"}


def test_pictures_without_captions_are_counted(engine, zipped):
    table = TABLE.replace("image,", "file_name,")
    found = measured(engine, zipped({**PICTURES, "lonely.png": picture(9), "metadata.csv": table}))
    assert found.left_out == {"uncaptioned": ["lonely.png"]}


# ---------------------------------------------------------------- hostile archives


@pytest.mark.parametrize(
    "name", ["{file}", "../outside.png", "..\\outside.png", "a/../../outside.png", "/proc/self/exe"]
)
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("form", ["csv", "jsonl", "metadata.csv", "metadata.jsonl"])
def test_a_picture_elsewhere_on_the_disk_is_never_reached(engine, zipped, tmp_path, name, exists, form):
    outside = tmp_path / "outside.png"
    if exists:
        outside.write_bytes(picture(7))
    named = name.format(file=outside)
    rows = [
        ("file_name", "caption"),
        *((f"{row}.png", text) for row, text in enumerate(CAPTIONS)),
        (named, "secret"),
        (named, ""),
    ]
    if form.endswith("csv"):
        table = "\n".join(f'"{image}","{text}"' for image, text in rows)
    else:
        table = "\n".join(json.dumps({"file_name": image, "caption": text}) for image, text in rows[1:])
    found = measured(engine, zipped({**PICTURES, form if "." in form else f"captions.{form}": table}))
    assert (found.num_images, found.num_texts) == (3, 3)
    # The same answer whether there is such a file or not.
    assert found.left_out == {"paths outside the data set": [named]}


def test_links_in_an_archive_are_not_followed(engine, zipped, tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(picture(7))
    path = zipped({**PICTURES, "captions.csv": TABLE + "\nlink.png,secret"})
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(link, str(outside))
    found = measured(engine, path)
    assert found.left_out == {"link": ["link.png"], "missing pictures": ["link.png"]}


@pytest.mark.parametrize(
    ("reason", "name"), [("name", "../../evil.png"), ("name", "0.png/evil.png"), ("kind", "evil-000.tar")]
)
def test_names_that_climb_or_need_a_folder_in_place_of_a_file_and_shards_are_not_written(
    engine, zipped, tmp_path, reason, name
):
    found = measured(engine, zipped({**PICTURES, "captions.csv": TABLE, name: picture(8)}))
    assert found.left_out == {reason: [name]}
    assert list(tmp_path.rglob("evil*")) == []


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"captions.csv": TABLE}, "zip.no_pictures"),
        (PICTURES, "trial.few"),
        ({**PICTURES, "captions.csv": "image,caption\n0.png,two cats"}, "trial.few"),
        ({"0.png": b"hello", "1.png": b"hello", "captions.csv": TABLE}, "trial.few"),
        ({**PICTURES, "labels.csv": "filename,label\n0.png,cat\n1.png,dog"}, "trial.classes"),
        ({**PICTURES, "captions.csv": "image,caption\na.png,two cats\nb.png,a dog"}, "trial.missing"),
        ({**PICTURES, "captions.csv": "image,caption\na.png,two cats\n1.png,a dog"}, "trial.missing"),
        ({**PICTURES, "captions.csv": TABLE, "more.csv": TABLE}, "trial.unreadable"),
        ({**PICTURES, "captions_x.json": '{"images": [{}], "annotations": 5}'}, "trial.unreadable"),
        ({**PICTURES, "captions_x.json": '{"images": ' + "[" * 50_000}, "trial.unreadable"),
        ({**PICTURES, "metadata.jsonl": b'{"file_name": "\xff"}'}, "trial.unread"),
        (
            {**PICTURES, "captions.csv": "image,first,second\n0.png,one here,two there\n1.png,three here,four there\n"},
            "trial.unread",
        ),
        (
            {**{f"{a}/{name}": PICTURES[name] for a in "xy" for name in PICTURES}, "captions.csv": TABLE},
            "trial.ambiguous",
        ),
        ({**PICTURES, "captions.csv": TABLE + "\n0.png,x" * 60_000}, "trial.lines"),
        (
            {**PICTURES, "captions.csv": "image,caption\n" + "".join(f"{row % 2}.png,x{row}\n" for row in range(6000))},
            "trial.captions",
        ),
        ({**PICTURES, **{f"{row}/x.png": b"" for row in range(60)}}, "trial.folders"),
        ({**PICTURES, "captions.csv": os.urandom(11 * 2**20)}, "upload.size"),
    ],
)
def test_what_cannot_be_measured_is_said_in_words(engine, zipped, members, code):
    assert refused(engine, zipped(members)) == code


def test_too_many_pictures_are_refused_before_any_is_opened(engine, zipped, monkeypatch):
    monkeypatch.setattr(dataset_eval, "open_image", None)
    members = {f"{row}.png": b"%d" % row for row in range(501)}
    table = "image,caption\n" + "\n".join(f"{row}.png,a caption" for row in range(501))
    assert refused(engine, zipped({**members, "captions.csv": table})) == "trial.pictures"


def test_what_is_no_zip_is_refused(engine, tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(b"hello")
    assert refused(engine, path) == "zip.damaged"


# ---------------------------------------------------------------- chance


def test_chance_is_what_drawing_lots_earns():
    level = random_baseline([5] * 20)
    assert level["text_to_image_recall@1"] == 1 / 20
    assert level["text_to_image_recall@10"] == 0.5
    assert level["text_to_image_median_rank"] == 10
    assert level["image_to_text_recall@1"] == pytest.approx(5 / 100)
    assert level["image_to_text_recall@5"] == pytest.approx(1 - 95 * 94 * 93 * 92 * 91 / (100 * 99 * 98 * 97 * 96))


def test_chance_agrees_with_random_embeddings():
    counts = [1, 2, 5, 3, 1, 4, 2, 2]
    owners = torch.repeat_interleave(torch.tensor(counts))
    torch.manual_seed(0)
    runs = [
        evaluate_embeddings(torch.randn(8, 64), torch.randn(20, 64), owners, resamples=0).metrics for _ in range(600)
    ]
    level = random_baseline(counts)
    for name in (
        "image_to_text_recall@1",
        "image_to_text_recall@5",
        "text_to_image_recall@1",
        "text_to_image_recall@5",
    ):
        assert sum(run[name].value for run in runs) / len(runs) == pytest.approx(level[name], abs=0.02)


def test_few_candidates_are_all_found():
    assert random_baseline([1, 1])["image_to_text_recall@10"] == 1.0
