"""Hostile uploads on every way that they take: decoded right, or refused in a sentence, and nothing else, ever.

`tests/long/test_fuzz_long.py` opens them by the thousand.
"""

import base64
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from adversarial_images import BOMBS, SIZE, names, outcome, refusal, scene, sound, upload
from adversarial_page import TABS, TEXTS, Visitor
from adversarial_zips import ZIP_BOMBS, archive, archive_names, archives, as_photos, as_trial, opened
from PIL import Image, ImageFile

import app
from alignment.engine import AlignmentEngine, dataset_eval
from alignment.engine.photo_zip import export_zip
from alignment.gallery import build_gallery
from alignment.model import DualEncoder
from alignment.preprocess import InputError, open_image, sanitize_text
from alignment.server import Service, Settings
from alignment.ui.strings import error_text
from alignment.ui.uploads import MAX_NAME
from tests.http_client import entries

SEED = 1
IN_A_PROCESS, HERE, ZIPS, OVER_HTTP = 300, 300, 120, 12

FULL_SIZE_MB = 700
"""The most that opening one picture takes: 50 megapixels of 4 bytes, thrice where transparency comes out on white."""

BOMB_MB = 100
"""The most that any other bomb takes: the largest upload, 30 MB, as it came, without its metadata, and some of both."""


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory) -> AlignmentEngine:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("gallery")
    lines = []
    for angle, name in enumerate(("one", "two")):
        scene().rotate(90 * angle).save(source / f"{name}.png")
        lines.append({"id": name, "source": f"{name}.png", "en": f"picture {name}", "zh": f"狗{name}"})
    (source / "pictures.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    return AlignmentEngine(encoder, build_gallery(source, out, encoder))


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch, no_thread_stays) -> Iterator[Path]:
    """Where temporary files are made; none is left, no thread is either, and Pillow is as it was for everybody else."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    settings = [(Image, "MAX_IMAGE_PIXELS"), (ImageFile, "LOAD_TRUNCATED_IMAGES"), (Image, "WARN_POSSIBLE_FORMATS")]
    before = [getattr(place, name) for place, name in settings]
    yield folder
    assert [getattr(place, name) for place, name in settings] == before
    assert list(folder.iterdir()) == []


def in_a_process(*args: str) -> dict:
    """Let `adversarial_images.py` open pictures: what became of each, and the memory that it took."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("adversarial_images.py")), *args]
    env = {**os.environ, "PYTHONPATH": str(Path(app.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", [kind for kind, file in sound().items() if file.read])
def test_a_sound_picture_comes_out_as_it_was_drawn(kind):
    file = sound()[kind]
    image = open_image(file.data)
    assert (image.mode, image.info) == ("RGB", {})
    assert image.size == ((32, 32) if "ICO" in kind else SIZE)
    if file.tolerance is not None:
        assert np.asarray(image)[2, 2].mean() < np.asarray(image)[-2, -2].mean()  # the dark corner
        far = np.abs(np.asarray(image, dtype=int) - np.asarray(scene(), dtype=int))
        assert far.mean() <= file.tolerance


@pytest.mark.parametrize("kind", [kind for kind, file in sound().items() if not file.read])
def test_what_is_no_picture_or_of_another_kind_is_refused(kind):
    assert outcome(sound()[kind].data) in ("image.not_an_image", "image.unsupported", "image.empty")


def test_mutated_pictures_are_decoded_or_refused():
    found = Counter(outcome(upload(name).data) for name in names(SEED, HERE))
    assert found.keys() >= {"decoded", "image.truncated", "image.not_an_image", "image.unsupported"}
    assert found["decoded"] > HERE / 10


def test_mutated_pictures_take_little_memory():
    done = in_a_process(str(SEED + 1), str(IN_A_PROCESS))
    assert len(done["found"]) == IN_A_PROCESS
    assert done["peak"] - done["base"] < FULL_SIZE_MB


def test_a_mutation_can_be_made_again_by_its_name():
    name = next(names(SEED, 1))
    assert upload(name) == upload(name)
    assert upload(name).data != sound()[name.split("/")[0]].data


def test_bombs_take_little_memory():
    done = in_a_process("bombs")
    assert done["found"].keys() == BOMBS.keys()
    for name, (said, taken, _) in done["found"].items():
        assert taken < (FULL_SIZE_MB if name.startswith("as many pixels") else BOMB_MB), (name, said, taken)
        if name.startswith(("as many", "frames", "ICC", "text,")):
            assert said == "decoded", name
        if name.startswith("pixels"):
            assert said == "image.too_large", name


# ---------------------------------------------------------------- zip files


@pytest.fixture(scope="module")
def album(engine) -> bytes:
    files = [(f"{row}.png", sound()[kind].data) for row, kind in enumerate(("PNG", "JPEG", "GIF"))]
    return export_zip(engine.add_photos(engine.no_photos(), files)[0], engine.encoder)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_mutated_zips_are_taken_or_refused(engine, album, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_eval, "RESAMPLES", 3)
    path, found = tmp_path / "upload.zip", Counter()
    for name in archive_names(SEED, ZIPS, (*archives(), "album")):
        path.write_bytes(archive(name, {"album": album}))
        opened(path)
        found["photos", as_photos(engine, path)] += 1
        found["trial", as_trial(engine, path)] += 1
    for way in ("photos", "trial"):
        assert found[way, "decoded"] > ZIPS / 10
        assert found[way, "zip.damaged"] > ZIPS / 20
    assert {code for _, code in found} >= {"album.damaged", "trial.unreadable"}


def test_no_name_in_a_zip_leads_out_of_its_folder(engine, tmp_path):
    path = tmp_path / "upload.zip"
    path.write_bytes(archives()["slips"])
    assert (as_photos(engine, path), as_trial(engine, path)) == ("decoded", "decoded")
    assert list(tmp_path.rglob("up.png")) == []


@pytest.mark.parametrize("bomb", ZIP_BOMBS)
def test_zip_bombs_do_not_go_off(bomb, engine, tmp_path):
    path = tmp_path / "upload.zip"
    path.write_bytes(ZIP_BOMBS[bomb]())
    assert as_trial(engine, path) != "decoded" or bomb == "one caption"  # which is cut, and said to be
    as_photos(engine, path)


# ---------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def uploads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def address(engine, uploads) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
            patch.delenv(name, raising=False)
        page = app.build_page(engine, "en")
        _, url, _ = page.launch(
            prevent_thread_lock=True, server_name="127.0.0.1", **app.launch_options(engine, Service(Settings(rate=0)))
        )
        yield url
        page.close()


@pytest.fixture
def visitor(address, uploads) -> Iterator[Callable[[str], Visitor]]:
    """Let a visitor come: `visitor("zh")`; no file of theirs stays."""
    visitors: list[Visitor] = []

    def come(lang: str) -> Visitor:
        visitors.append(Visitor(address, lang))
        return visitors[-1]

    yield come
    for one in visitors:
        one.close()
    assert [path for path in entries(uploads) if path.is_file()] == []


def said(name: str, error: InputError | None, lang: str) -> list[str]:
    return [f"{sanitize_text(name, MAX_NAME)}: {error_text(lang, error)}"] if error else []


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("tab", [tab for tab in TABS if tab != "evaluate"])
def test_the_page_takes_a_picture_or_says_why_not(visitor, tab, lang):
    for place, name in enumerate(names(SEED + 2, OVER_HTTP)):
        if place % 20 == 0:  # photos and queries have their limits
            someone = visitor(lang)
        sent = upload(name)
        if not sent.file.endswith(".zip"):
            path = someone.upload(sent.file, sent.data)
            assert someone.drop(tab, (sent.file, path)) == said(sent.file, refusal(sent.data), lang), name


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("tab", ["photos", "evaluate"])
def test_the_page_takes_a_zip_or_says_why_not(visitor, engine, tab, lang, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_eval, "RESAMPLES", 3)
    someone, path = visitor(lang), tmp_path / "upload.zip"
    for name in archive_names(SEED + 3, OVER_HTTP // 3):
        path.write_bytes(archive(name))
        code = (as_photos if tab == "photos" else as_trial)(engine, path)
        told = someone.drop(tab, ("upload.zip", someone.upload("upload.zip", path.read_bytes())))
        if "." not in code:
            assert tab == "photos" or told == [], name
        else:
            assert told, (name, code)
        for sentence in told:
            assert not {"{", "}", "error."} & set(sentence), sentence
            assert lang == "en" or any("\u4e00" <= letter <= "\u9fff" for letter in sentence), sentence
        someone.trigger("photos-clear", "click")


def test_the_api_takes_a_picture_or_says_why_not(visitor):
    someone = visitor("en")
    for place, name in enumerate(names(SEED + 4, OVER_HTTP)):
        sent, error = upload(name), refusal(upload(name).data)
        url = f"data:image/png;base64,{base64.b64encode(sent.data).decode()}"
        image = (
            url if place % 2 else {"path": someone.upload(sent.file, sent.data), "meta": {"_type": "gradio.FileData"}}
        )
        kind, answer = someone.ask("search_captions", image=image)
        if sent.data:
            assert kind == ("error" if error else "complete"), (name, answer)
        if error and sent.data:
            assert answer["error"] == str(error), name


EVENTS = (
    ("pictures-query", "submit"),
    ("photos-query", "submit"),
    ("matrix-compare", "click"),
    ("matrix-table", "why"),
    ("matrix-table", "remove"),
    *((f"{tab}-examples", "pick") for tab in ("captions", "pictures", "photos")),
    *((f"{tab}-composer", "edit") for tab in ("pictures", "photos")),
    *((f"{tab}-results", "why") for tab in ("captions", "pictures", "photos")),
    *((f"{tab}-results", act) for tab in ("pictures", "photos") for act in ("more", "less")),
    ("photos-results", "remove"),
)


@pytest.mark.parametrize("kind", TEXTS)
def test_any_text_is_answered_wherever_it_is_put(visitor, kind):
    place = list(TEXTS).index(kind)
    someone, hostile = visitor(("en", "zh")[place // 3 % 2]), TEXTS[kind]
    data = {"id": hostile, "text": hostile, "picture": hostile, "caption": hostile, "act": "flip", "index": 0}
    for element, event in EVENTS[place % 3 :: 3]:
        shown = someone.trigger(element, event, data, {1: hostile} if "examples" not in element else {})
        json.dumps(shown, ensure_ascii=False).encode()  # no half of a letter
    assert someone.ask("search_images", caption=hostile)[0] in ("complete", "error")


@pytest.mark.parametrize("kind", TEXTS)
def test_a_file_of_any_name_is_taken(visitor, kind):
    """The page says what a file is called, and so may anybody in its place."""
    someone, data = visitor("zh"), sound()["PNG"].data
    for tab in ("photos", TABS[list(TEXTS).index(kind) % len(TABS)]):
        bad = someone.drop(tab, (TEXTS[kind], someone.upload("x.png", b"no picture")))
        assert [line.split(": ")[-1] for line in bad] != []
        someone.drop(tab, (TEXTS[kind], someone.upload(TEXTS[kind][:200].replace("\0", "") or "x.png", data)))


@pytest.mark.parametrize(
    "data", [None, 5, "text", [1], {"files": 5}, {"files": [5, {"path": [], "name": {}}]}, {"run": 10**30}]
)
def test_events_of_no_sense_are_answered(visitor, data):
    someone = visitor("en")
    names = {id: name for name, id in someone.ids.items() if name}
    for id, event in someone.events:
        if id in names and event not in ("change", "load"):
            someone.trigger(names[id], event, data)
