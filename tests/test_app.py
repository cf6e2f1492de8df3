import json
import re
import socket
import string
import subprocess
import sys
from pathlib import Path
from runpy import run_module
from typing import Any, NoReturn
from urllib.request import ProxyHandler, build_opener

import pytest
from PIL import Image

import app
from alignment import preprocess
from alignment.confidence import VERDICTS
from alignment.data.image_folder import UNUSED_SIDECARS
from alignment.data.tables import CLASSES_ONLY
from alignment.engine import AlignmentEngine, Skipped
from alignment.evaluate.error_analysis import DIRECTIONS
from alignment.gallery import Caption, Gallery, Match, SearchResult, build_gallery
from alignment.model import DualEncoder
from alignment.preprocess import InputError, clean_caption, open_image, parse_captions
from alignment.server import Service, Settings, host_in_url
from alignment.ui.api import Api
from alignment.ui.examples import Examples
from alignment.ui.results import cosine, percent, results_value
from alignment.ui.strings import WORDS, count_text, error_text, pick_language, strings, text
from alignment.ui.uploads import (
    PhotoState,
    Upload,
    add_uploads,
    delete_uploads,
    photos_drop_value,
    read_upload,
    uploads_of,
)
from alignment.ui.widgets import ASSETS, user_errors
from tests.http_client import shown

UI = Path(app.__file__).parent / "alignment" / "ui"


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a tiny random model and a gallery of its own."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("gallery")
    for row, name in enumerate(("one", "two", "three")):
        Image.new("RGB", (600, 400), (80 * row, 120, 200 - 60 * row)).save(source / f"{name}.png")
    lines = [
        {"id": name, "source": f"{name}.png", "en": f"picture {name}", "zh": f"狗{name}"} for name in ("one", "two")
    ]
    lines.append({"id": "three", "source": "three.png"})
    (source / "pictures.jsonl").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    build_gallery(source, out, DualEncoder.load(checkpoint("clip"), device="cpu"))
    return checkpoint("clip"), out


@pytest.fixture(scope="module")
def engine(folders) -> AlignmentEngine:
    encoder = DualEncoder.load(folders[0], device="cpu")
    return AlignmentEngine(encoder, Gallery.load(folders[1], encoder))


def without_settings(patch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL", "REVISION", "GALLERY", "COMPARE", "LANG", "MCP"):
        patch.delenv(f"ALIGNMENT_{name}", raising=False)
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
        patch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def upload_folder(tmp_path, monkeypatch) -> Path:
    without_settings(monkeypatch)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


# ---------------------------------------------------------------- command line


def test_without_arguments_the_page_serves_what_the_repository_holds(monkeypatch):
    monkeypatch.chdir(app.ROOT)
    args = app.parse([])
    assert (args.model, args.gallery, args.host, args.port) == (
        "checkpoints/compact",
        "assets/gallery",
        "127.0.0.1",
        7860,
    )
    assert (args.revision, args.lang, args.compare, args.mcp) == (None, "en", None, False)


def test_it_finds_them_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Path(app.parse([]).gallery) == app.ROOT / "assets/gallery"


def test_the_environment_speaks_where_no_option_does(monkeypatch):
    for name, value in {
        "ALIGNMENT_MODEL": "some/model",
        "ALIGNMENT_REVISION": "v2",
        "ALIGNMENT_GALLERY": "g",
        "ALIGNMENT_COMPARE": "other/model",
        "ALIGNMENT_LANG": "zh",
        "ALIGNMENT_MCP": "1",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_SERVER_PORT": "8123",
    }.items():
        monkeypatch.setenv(name, value)
    args = app.parse([])
    assert (
        vars(args).items()
        >= {
            "model": "some/model",
            "revision": "v2",
            "gallery": "g",
            "compare": "other/model",
            "lang": "zh",
            "host": "0.0.0.0",
            "port": 8123,
            "mcp": True,
        }.items()
    )
    assert app.parse(["--model", "other", "--port", "9000"]).model == "other"
    assert app.parse(["--port", "9000"]).port == 9000


def test_help_names_every_variable(capsys):
    with pytest.raises(SystemExit) as ended:
        app.parse(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in ("MODEL", "REVISION", "GALLERY", "COMPARE", "LANG", "MCP"):
        assert f"ALIGNMENT_{name}" in shown
    assert "GRADIO_SERVER_PORT" in shown


@pytest.mark.parametrize("port", ["0", "-1", "70000", "abc", "7860.5", ""])
def test_a_port_that_is_none_is_refused(port, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        app.parse([f"--port={port}"])
    assert ended.value.code == 2
    if port:
        monkeypatch.setenv("GRADIO_SERVER_PORT", port)
        with pytest.raises(SystemExit):
            app.parse([])
    assert f"{port!r} is no port" in capsys.readouterr().err


def test_a_port_that_is_taken_and_a_host_that_is_elsewhere_are_said_before_anything_is_loaded(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert app.main(["--port", str(port), "--model", "nowhere"]) == 2
    assert f"Port {port} is taken" in capsys.readouterr().err
    for host in ("203.0.113.7", "no.such.host.invalid", "2001:db8::1"):
        assert app.main(["--host", host, "--model", "nowhere"]) == 2
        assert f"{host} is no address of this machine" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("[::]", "[::]"), ("127.0.0.1", "127.0.0.1")])
def test_an_address_of_ipv6_is_written_in_brackets(host, shown):
    assert host_in_url(host) == shown


def test_a_missing_checkpoint_ends_in_a_sentence(capsys, tmp_path, free_port):
    assert app.main(["--model", str(tmp_path), "--port", free_port]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "config.json" in shown
    assert "Traceback" not in shown


def interrupted(*args: object) -> NoReturn:
    raise KeyboardInterrupt


def test_ctrl_c_while_it_loads_shows_no_traceback(monkeypatch, free_port):
    monkeypatch.setattr(app, "load_engine", interrupted)
    assert app.main(["--port", free_port]) == 130


@pytest.mark.parametrize("name", ["evaluate", "gallery", "space", "train"])
def test_ctrl_c_shows_no_traceback_of_a_command(name, monkeypatch):
    monkeypatch.setattr(f"alignment.{name}.command.main", interrupted)
    with pytest.raises(SystemExit) as ended:
        run_module(f"alignment.{name}", run_name="__main__", alter_sys=True)
    assert ended.value.code == 130


def test_a_gallery_of_another_model_ends_in_the_command_that_rebuilds_it(capsys, folders, checkpoint, free_port):
    model, gallery = str(checkpoint("chinese-clip")), str(folders[1])
    assert app.main(["--model", model, "--gallery", gallery, "--port", free_port]) == 2
    shown = capsys.readouterr().err
    assert "python -m alignment.gallery build" in shown
    assert "Traceback" not in shown


# ---------------------------------------------------------------- start

HEAVY = (
    *("transformers", "accelerate", "peft", "datasets", "openvino", "faiss", "matplotlib", "scipy", "sklearn"),
    *("skimage", "sympy", "sentencepiece", "tensorboard", "torch._dynamo", "torch.distributed.tensor"),
)
LOADED = f"print(*[name for name in {HEAVY} if name in sys.modules])"
IMPORT = f"import gc, sys, app; {LOADED}; print(gc.isenabled())"
SERVE = "engine = app.load_engine(app.parse([])); page = app.build_page(engine); engine.search_images('a dog')"
SEE = "engine.embed_image(engine.gallery.pictures[0].path)"


@pytest.fixture(scope="module")
def started() -> list[str]:
    """Import the app, answer a caption and embed a picture in a process of its own; what it prints."""
    command = [sys.executable, "-c", f"{IMPORT}; {SERVE}; {LOADED}; print(*engine.encoder.in_memory); {SEE}; {LOADED}"]
    with pytest.MonkeyPatch.context() as patch:
        without_settings(patch)
        engine = app.load_engine(app.parse([]))  # the first start of all makes the graphs
        engine.search_images("a dog")
        engine.embed_image(engine.gallery.pictures[0].path)
        done = subprocess.run(command, cwd=app.ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_what_is_heavy_and_not_needed_to_serve_is_not_imported(started):
    assert started[:2] == ["", "True"]


def test_captions_are_answered_without_the_image_tower_and_what_builds_models(started):
    loaded, towers, loaded_by_pictures = started[2:]
    assert loaded.split() == ["openvino"]  # the starter gallery is searched in memory, without faiss
    assert towers.split() == ["text"]
    assert loaded_by_pictures.split() == ["openvino"]


# ---------------------------------------------------------------- words


def placeholders(sentence: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}


def test_both_languages_say_the_same_things():
    assert strings()["en"].keys() == strings()["zh"].keys()
    for key, english in strings()["en"].items():
        chinese = strings()["zh"][key]
        assert english.strip()
        assert chinese.strip()
        if not key.startswith("meaning."):
            assert placeholders(english) == placeholders(chinese), key
        assert re.search("[\u4e00-\u9fff]", chinese), f"{key} is not Chinese"
        assert not re.search("[\u4e00-\u9fff]", english), f"{key} is not English"


def test_every_key_used_is_there_and_every_one_there_is_used():
    sources = "\n".join(path.read_text("utf-8") for path in (*UI.glob("*.py"), Path(app.__file__)))
    sources = sources.replace((UI / "strings.py").read_text("utf-8"), "")
    scripts = "\n".join(path.read_text("utf-8") for path in ASSETS.glob("*.js"))
    for key in re.findall(r'text\(lang, "([\w.]+)"', sources):
        assert key in strings()["en"]
    # Put together from their parts.
    built = ("error.", "example.", "matrix.view.", "matrix.meaning.", "matrix.label.", "drawing.")
    built += ("result.more.short", "result.less.short", *(f"evaluate.{name}" for name in DIRECTIONS))
    reasons = json.loads((WORDS / "evaluate.json").read_text("utf-8"))
    for key in strings()["en"]:
        last = key.removesuffix(".one").partition(".")[2] or key
        told = key.startswith(built) or last in VERDICTS or reasons.get(key, {}).get("reasons")
        told = told or (key.startswith("evaluate.") and f'"{last}"' in sources)  # a label that its script looks up
        told = told or re.search(rf'labels\.{re.escape(last)}\b|labels\["{re.escape(last)}"\]', scripts)
        assert told or f'"{key.removesuffix(".one")}"' in sources or f".{last}" in sources, key


def test_every_reason_that_the_code_names_by_a_constant_has_its_sentence():
    known = [entry.get("reasons", []) for entry in json.loads((WORDS / "evaluate.json").read_text("utf-8")).values()]
    assert {UNUSED_SIDECARS, CLASSES_ONLY} <= {reason for reasons in known for reason in reasons}


def test_every_error_of_the_door_is_translated():
    door = Path(preprocess.__file__).parent.glob("*.py")
    engine = (UI.parent / "engine" / f"{name}.py" for name in ("core", "photo_folder"))
    sources = "".join(path.read_text("utf-8") for path in (*door, *engine, *UI.glob("*.py")))
    codes = set(re.findall(r'"((?:image|caption|captions|photo|photos|upload)\.[a-z_]+)"', sources))
    codes -= {key for key in codes if key in strings()["en"]}  # words of a tab
    assert len(codes) >= 14
    for code in codes:
        assert f"error.{code}" in strings()["zh"], code


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: open_image(b""),
        lambda: open_image(b"hello"),
        lambda: open_image(b"\x89PNG\r\n\x1a\n broken"),
        lambda: open_image(Image.new("1", (8000, 8000))),
        lambda: open_image(Image.new("1", (1000, 10))),
        lambda: open_image(b"\x00\x00\x00\x20ftypheic" + bytes(50)),
        lambda: clean_caption(" "),
        lambda: clean_caption("x" * 2000),
        lambda: parse_captions("\n"),
        lambda: parse_captions("a\nb", limit=1),
    ],
)
def test_errors_are_said_in_the_language_of_the_page(wrong):
    with pytest.raises(InputError) as raised:
        wrong()
    assert error_text("en", raised.value) == str(raised.value)
    chinese = error_text("zh", raised.value)
    assert re.search("[\u4e00-\u9fff]", chinese)
    assert "{" not in chinese
    assert not re.search(r"[a-z]{4}", re.sub("JPEG|PNG|WebP|HEIC", "", chinese))


def test_an_error_without_a_translation_speaks_english():
    assert error_text("zh", InputError("Something {what}.", "image.unheard_of", what="odd")) == "Something odd."
    assert error_text("zh", InputError("Too large.", "image.too_large")) == "Too large."  # its values are missing


def test_the_door_does_not_tell_where_files_lie(tmp_path):
    with pytest.raises(InputError) as raised:
        open_image(tmp_path / "secret.png")
    assert "secret" not in error_text("en", raised.value) + error_text("zh", raised.value)


@pytest.mark.parametrize(
    ("query", "header", "lang"),
    [
        ({"lang": "zh"}, "en-US,en;q=0.9", "zh"),
        ({"lang": "zh-CN"}, "", "zh"),
        ({"lang": "fr"}, "zh-Hans-CN,en;q=0.5", "zh"),
        ({}, "de;q=0.9,en;q=0.5,zh;q=0.7", "zh"),
        ({}, "fr-FR,fr;q=0.9", "en"),
        ({}, "zh;q=0,en", "en"),
        ({}, "zh;q=high", "en"),
        ({}, "", "en"),
    ],
)
def test_the_language_is_asked_for_or_guessed(query, header, lang):
    assert pick_language(query, header) == lang


def test_counting_knows_one():
    assert count_text("en", "drop.added", 1) == "1 picture added."
    assert count_text("en", "drop.added", 2) == "2 pictures added."


@pytest.mark.parametrize(
    ("share", "written"),
    [(0, "0.0 %"), (0.0004, "<0.1 %"), (0.1234, "12.3 %"), (0.9996, ">99.9 %"), (1, "100.0 %")],
)
def test_probabilities_do_not_pass_for_certainty(share, written):
    assert percent(share) == written


def test_cosines_have_three_places_and_no_minus_before_nothing():
    assert [cosine(value) for value in (0.31249, -0.0001, -0.5)] == ["0.312", "0.000", "-0.500"]


def captions_value(found: SearchResult[Caption], lang: str) -> dict[str, Any]:
    return results_value("captions", found, lang, 9, lambda caption: {"id": caption.id})


def answer(*chances: float, verdicts: str) -> SearchResult[Caption]:
    """An answer of captions, the last of which says the same as the first."""
    matches = [
        Match(rank, Caption(f"c{rank}", f"number {rank}", "en"), chance, chance, verdict)
        for rank, (chance, verdict) in enumerate(zip(chances, verdicts.split(), strict=True), start=1)
    ]
    first, *others, last = matches
    duplicates = ((first, last), *((match,) for match in others))
    return SearchResult(tuple(matches), first.verdict, first.probability, duplicates=duplicates)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_results_carry_their_verdict_and_fold_what_says_the_same(lang):
    value = captions_value(answer(0.38, 0.2, 0.04, verdicts="fits may_fit nothing_close"), lang)
    assert [(row["rank"], row["step"], row["word"]) for row in value["rows"]] == [
        (1, "fits", text(lang, "result.fits")),
        (2, "may_fit", text(lang, "result.may_fit")),
    ]
    assert [[row["id"] for row in row["alike"]] for row in value["rows"]] == [["c3"], []]
    assert value["verdict"] == {"step": "fits", "word": text(lang, "result.fits"), "text": text(lang, "captions.fits")}
    assert "38.0 %" in value["note"]
    assert " 38 " in value["note"]


def test_results_are_listed_where_nothing_is_close_and_folded_where_nothing_was_asked():
    far = captions_value(answer(0.04, 0.004, 0.001, verdicts="nothing_close " * 3), "en")
    assert (far["verdict"]["step"], far["verdict"]["word"]) == ("nothing_close", text("en", "result.nothing"))
    assert "4.0 %" in far["verdict"]["text"]
    assert "anyway" not in far["verdict"]
    none = captions_value(answer(0, 0, 0, verdicts="no_meaning " * 3), "en")
    assert (none["verdict"]["step"], none["verdict"]["text"]) == ("no_meaning", text("en", "result.senseless"))
    assert none["verdict"]["anyway"]
    assert {row["step"] for row in none["rows"]} == {None}
    assert (none["note"], none["count"]) == ("", "")


def test_without_a_calibration_there_is_no_verdict():
    found = SearchResult((Match(1, Caption("c", "a", "en"), 0.5),))
    value = captions_value(found, "en")
    assert "verdict" not in value
    assert (value["rows"][0]["step"], value["rows"][0]["word"]) == (None, "")
    assert value["note"] == text("en", "result.meaning.uncalibrated")


# ---------------------------------------------------------------- uploads


def uploaded(folder: Path, name: str, data: bytes) -> Upload:
    path = folder / name
    path.write_bytes(data)
    return Upload(name, str(path))


def test_an_upload_is_read_and_forgotten(upload_folder):
    upload = uploaded(upload_folder, "a.png", b"data")
    assert read_upload(upload, 9) == b"data"
    delete_uploads([upload])
    assert list(upload_folder.iterdir()) == []
    with pytest.raises(InputError, match="did not arrive"):
        read_upload(upload, 9)


@pytest.mark.parametrize("path", ["{outside}", "{uploads}/../outside.png", "", "\0", "{uploads}"])
def test_nothing_outside_the_upload_folder_is_read_or_deleted(upload_folder, tmp_path, path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"secret")
    upload = Upload("x.png", path.format(outside=outside, uploads=upload_folder))
    with pytest.raises(InputError, match="did not arrive"):
        read_upload(upload, 9)
    delete_uploads([upload])
    assert outside.read_bytes() == b"secret"


def test_what_a_page_sends_is_doubted():
    assert uploads_of({}) == uploads_of({"files": "x"}) == uploads_of({"files": [1, None]}) == []
    assert uploads_of({"files": [{"name": 5, "path": None, "problem": "size"}]}) == [Upload("5", "", "size")]
    assert len(uploads_of({"files": [{"name": "x" * 999}]})[0].name) == 120


def test_a_path_longer_than_any_of_ours_is_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(self: Path) -> Path:
        raise AssertionError("to take it apart would take minutes")

    monkeypatch.setattr(Path, "resolve", look)
    with pytest.raises(InputError):
        read_upload(Upload("a", "a/" * 20_000), 1)
    delete_uploads([Upload("a", "a/" * 20_000)])


@pytest.mark.parametrize(
    ("problem", "code"), [("size", "upload.size"), ("limit", "photo.limit"), ("empty", "image.empty")]
)
def test_what_the_page_refused_is_said(problem, code):
    with pytest.raises(InputError) as raised:
        read_upload(Upload("x", "", problem), 9)
    assert raised.value.code == code


def test_uploads_are_added_step_by_step_and_replace_the_sample(engine, upload_folder, encoded):
    images = [Image.new("RGB", (40, 40), (row * 9, 0, 0)) for row in range(10)]
    uploads = [uploaded(upload_folder, f"{row}.png", encoded(image, "PNG")) for row, image in enumerate(images)]
    uploads.append(uploaded(upload_folder, "bad.jpg", b"hello"))
    uploads.append(uploads[0])
    steps = list(add_uploads(engine, PhotoState(engine.gallery_photos(["one"])), uploads, limit=200))
    assert [(len(state.photos), state.sample, done, total) for state, done, total in steps] == [
        (1, True, 0, 12),
        (4, False, 4, 12),
        (8, False, 8, 12),
        (10, False, 12, 12),
    ]
    last = steps[-1][0]
    assert (last.added, [skip.error.code for skip in last.skipped]) == (10, ["image.not_an_image", "photo.duplicate"])
    assert list(upload_folder.iterdir()) == []


def test_the_sample_stays_where_no_file_was_any_good(engine, upload_folder):
    sample = PhotoState(engine.gallery_photos(["one"]))
    *_, (state, _, _) = add_uploads(engine, sample, [Upload("x", "", "size")], limit=200)
    assert (len(state.photos), state.sample, len(state.skipped)) == (1, True, 1)


def test_many_problems_are_counted_not_listed(engine):
    skipped = tuple(Skipped(str(row), InputError("No.", "photo.duplicate")) for row in range(15))
    value = photos_drop_value("en", "Add", PhotoState(engine.no_photos(), False, 0, skipped), 200)
    assert value["skippedTitle"] == "15 files were left out:"
    assert value["skipped"][-1] == ["…", "and 5 more"]
    assert len(value["skipped"]) == 11


def test_a_failure_of_ours_becomes_a_sentence(caplog):
    with pytest.raises(InputError) as raised, user_errors():
        raise RuntimeError("/secret/path")
    assert "secret" not in str(raised.value)
    assert "/secret/path" in caplog.text


# ---------------------------------------------------------------- examples and values


def test_any_gallery_gives_worked_examples(engine):
    examples = Examples(engine)
    assert [picture.id for picture in examples.pictures] == ["one", "two", "three"]
    assert examples.queries("zh") == ["狗one", "狗two"]
    assert examples.image_of(examples.pictures[0]).startswith("thumbnails/one.webp?")
    assert not examples.are_samples


def test_a_gallery_with_nothing_in_it_still_makes_a_page(engine):
    none = engine.gallery_photos([]).gallery
    assert Examples(AlignmentEngine(engine.encoder, none)).queries("en")[0] == text("en", "example.any.1")
    app.build_page(AlignmentEngine(engine.encoder, none), "en")


# ---------------------------------------------------------------- the page, served


@pytest.fixture
def served(engine):
    page = app.build_page(engine, "en")
    _, url, _ = page.launch(prevent_thread_lock=True, **app.launch_options(engine, Service(Settings(rate=0))))
    yield url
    page.close()


def fetch(url: str) -> tuple[int, str, bytes]:
    opener = build_opener(ProxyHandler({}))
    with opener.open(url) as answer:
        return answer.status, answer.headers["content-type"], answer.read()


def test_the_page_serves_thumbnails(served):
    status, kind, data = fetch(f"{served}thumbnails/one.webp")
    assert (status, kind) == (200, "image/webp")
    assert max(open_image(data).size) == 320
    with pytest.raises(OSError, match="404"):
        fetch(f"{served}thumbnails/unknown.webp")


def test_statistics_are_not_public(served):
    with pytest.raises(OSError, match=r"403|404"):
        fetch(f"{served}monitoring/summary")


def test_the_first_page_holds_results_in_every_tab(engine):
    config = app.build_page(engine, "zh").get_config_file()
    values = {part["props"].get("elem_id"): shown(part["props"].get("value")) for part in config["components"]}
    assert values["captions-results"]["rows"]
    assert values["pictures-results"]["rows"]
    assert values["matrix-table"]["rows"]
    assert values["photos-results"]["rows"]
    assert values["captions-results"]["heading"] == text("zh", "captions.results")
    assert not any("__i18n__" in json.dumps(value, default=str) for value in values.values())


def test_what_the_page_does_is_private_and_what_programs_may_ask_is_not(engine, served):
    config = app.build_page(engine, "en").get_config_file()
    public = {part["api_name"] for part in config["dependencies"] if part["api_visibility"] != "private"}
    methods = {name for name, part in vars(Api).items() if callable(part) and not name.startswith("_")}
    assert public == methods
    offered = json.loads(fetch(f"{served}gradio_api/info")[2])
    assert {name.strip("/") for name in offered["named_endpoints"]} == methods
    assert offered["unnamed_endpoints"] == {}
