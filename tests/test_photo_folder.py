import json
import shutil
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image

import app
from alignment.atomic import exclusive_lock
from alignment.engine import AlignmentEngine, PhotoFolder, Scan, Skipped
from alignment.engine import starter as starter_module
from alignment.engine.photo_folder import photo_folder
from alignment.gallery import Gallery, build_gallery
from alignment.model import DualEncoder
from alignment.picture_limits import use_size_options
from alignment.preprocess import InputError
from alignment.ui.page import scan_value


def photo(path: Path, shade: int) -> None:
    Image.new("RGB", (40, 30), (shade, 200 - shade, 7 * shade % 256)).save(path)


def seen(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def starter(checkpoint, tmp_path_factory) -> tuple[DualEncoder, Gallery]:
    """A tiny random model, and a gallery of one picture and three captions that it made."""
    source = tmp_path_factory.mktemp("source")
    photo(source / "lion.png", 3)
    (source / "pictures.jsonl").write_text(json.dumps({"id": "lion", "source": "lion.png", "en": "a lion"}))
    (source / "captions.jsonl").write_text(json.dumps({"id": "pets", "topic": "", "en": "two cats", "zh": "猫"}))
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    return encoder, build_gallery(source, tmp_path_factory.mktemp("gallery"), encoder)


@pytest.fixture
def engine(starter, tmp_path, monkeypatch) -> AlignmentEngine:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    return AlignmentEngine(*starter, names_files=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Forty photos, one file that is none, and one in a folder."""
    folder = tmp_path / "Pictures"
    (folder / "holiday").mkdir(parents=True)
    for row in range(40):
        photo(folder / f"{row:02}.png", row)
    photo(folder / "holiday" / "beach.png", 120)
    (folder / "broken.jpg").write_text("no picture")
    return folder


def quiet(what: str) -> AbstractContextManager:
    return nullcontext(lambda done, total: None)


def scanned(engine: AlignmentEngine, folder: Path) -> PhotoFolder:
    photos = PhotoFolder(engine, folder, quiet)
    assert photos.start()
    photos.wait()
    return photos


def test_a_folder_is_searched_with_the_starter_captions_and_left_as_it_was(engine, folder):
    before = seen(folder)
    photos = scanned(engine, folder)
    assert (photos.scan.state, photos.scan.added, photos.scan.removed) == ("done", 41, 0)
    assert [(skip.name, skip.error.code) for skip in photos.scan.skipped] == [("broken.jpg", "image.not_an_image")]
    assert {match.item.source for match in engine.search_images("a cat", 50).matches} >= {"00.png", "holiday/beach.png"}
    assert {match.item.text for match in engine.search_captions(engine.embed_image(folder / "00.png")).matches} == {
        "a lion",
        "two cats",
        "猫",
    }
    assert engine.thumbnail(engine.gallery.pictures[0].id)
    assert engine.thumbnail("lion")  # of the worked examples
    assert seen(folder) == before


def test_what_is_embedded_so_far_can_be_searched_before_the_scan_ends(engine, folder):
    counts = []
    photos = PhotoFolder(
        engine, folder, lambda what: nullcontext(lambda done, total: counts.append(len(engine.gallery.pictures)))
    )
    photos.start()
    photos.wait()
    assert counts[0] == 1  # the starter gallery's
    assert any(1 < count < 41 for count in counts)
    assert len(engine.gallery.pictures) == 41


def test_a_rescan_takes_in_what_has_changed_while_the_old_gallery_answers(engine, folder):
    photos = scanned(engine, folder)
    old, ids = engine.gallery, {picture.source: picture.id for picture in engine.gallery.pictures}
    thumbnail = engine.thumbnail(ids["01.png"])
    (folder / "00.png").unlink()
    photo(folder / "01.png", 250)
    photo(folder / "new.png", 251)
    answered = []
    photos.bar = lambda what: nullcontext(lambda done, total: answered.append((engine.gallery, photos.start())))
    photos.start()
    photos.wait()
    assert set(answered) == {(old, False)}  # and only one scan goes on at a time
    assert (photos.scan.added, photos.scan.changed, photos.scan.removed) == (1, 1, 1)
    assert engine.gallery.pictures.find(ids["00.png"]) is None
    assert engine.thumbnail(ids["01.png"]) != thumbnail
    with pytest.raises(KeyError):
        engine.thumbnail(ids["00.png"])


def test_the_next_start_searches_at_once_what_the_last_one_made(engine, starter, folder):
    scanned(engine, folder)
    again = AlignmentEngine(*starter)
    photos = PhotoFolder(again, folder, quiet)
    assert len(again.gallery.pictures) == 41
    photos.start()
    photos.wait()
    assert (photos.scan.added, photos.scan.changed, photos.scan.removed) == (0, 0, 0)


def test_a_scan_that_was_stopped_is_gone_on_with(engine, starter, folder, caplog):
    def stop_at_ten(done: int, total: int) -> None:
        if done == 10:
            stopping.start()
            stopping.join(0.2)  # it waits for the scan

    photos = PhotoFolder(engine, folder, lambda what: nullcontext(stop_at_ten))
    stopping = Thread(target=photos.stop)
    photos.start()
    photos.wait()
    stopping.join()
    assert not photos.scan.running
    assert not photos.start()
    assert not (photos.out / "gallery.json").exists()
    assert scanned(AlignmentEngine(*starter), folder).scan.added == 41
    assert "embeddings that were made before are taken over" in caplog.text


def test_of_two_apps_on_a_folder_the_second_waits(engine, folder):
    with ExitStack() as other:
        tries: list[str] = []

        def bar(what: str) -> AbstractContextManager:
            tries.append(photos.scan.state)
            if len(tries) == 2:
                other.close()
            return quiet(what)

        photos = PhotoFolder(engine, folder, bar)
        photos.retry = 0.0
        other.enter_context(exclusive_lock(photos.out))
        photos.start()
        photos.wait()
    assert tries == ["running", "waiting"]
    assert (photos.scan.state, photos.scan.added) == ("done", 41)


def test_an_empty_folder_is_told_from_one_that_cannot_be_read(engine, folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    photos = scanned(engine, empty)
    assert (photos.scan.state, len(engine.gallery.pictures)) == ("empty", 1)
    (empty / "broken.jpg").write_text("no picture")
    photos.start()
    photos.wait()
    assert (photos.scan.state, [skip.name for skip in photos.scan.skipped]) == ("failed", ["broken.jpg"])
    photo(empty / "a.png", 9)
    photos.start()
    photos.wait()
    assert (photos.scan.state, photos.scan.added, len(engine.gallery.pictures)) == ("done", 1, 1)
    for path in empty.iterdir():
        path.unlink()
    photos.start()
    photos.wait()
    assert (photos.scan.state, engine.gallery.pictures[0].source) == ("empty", "a.png")  # perhaps a disk is not there


def test_a_photo_that_is_too_large_is_told_by_which_option_it_comes_in(engine, folder):
    Image.new("1", (8000, 8000)).save(folder / "large.png")
    photos = scanned(engine, folder)
    (found,) = [skip for skip in photos.scan.skipped if skip.name == "large.png"]
    assert found.error.code == "photo.too_large"
    for lang in ("en", "zh"):
        shown = dict(scan_value(photos, lang)["skipped"])
        assert "50" in shown["large.png"]
        assert "--max-megapixels" in shown["large.png"]
    try:
        use_size_options(64)
        photos.start()
        photos.wait()
    finally:
        use_size_options()
    assert [skip.name for skip in photos.scan.skipped] == ["broken.jpg"]


def test_captions_of_the_folder_itself_are_kept(engine, folder):
    (folder / "captions.csv").write_text("image,caption\n00.png,a grey square\n01.png,a green square\n")
    scanned(engine, folder)
    assert [caption.text for caption in engine.gallery.captions] == ["a grey square", "a green square"]


def test_a_folder_that_cannot_be_listed_is_named_without_the_folders_around_it(engine, folder, tmp_path):
    (folder / "holiday" / "disk").symlink_to(tmp_path / "not mounted")
    (found,) = [skip for skip in scanned(engine, folder).scan.skipped if skip.error.code == "photo.unlisted"]
    assert found.name == "holiday/disk"


def test_a_captions_file_that_cannot_be_read_is_named_on_the_page_and_in_the_log(engine, folder, caplog):
    (folder / "captions.xlsx").touch()
    (folder / "captions.csv").write_text("image,caption\n00.png,a square\ngone.png,nothing\n")
    photos = scanned(engine, folder)
    shown = dict(scan_value(photos, "en")["skipped"])
    assert "spreadsheet" in shown["captions.xlsx"]
    assert "missing pictures: 1 (gone.png)" in caplog.text


def test_a_gallery_of_another_model_is_not_shown(engine, checkpoint, folder, tmp_path):
    other = DualEncoder.load(checkpoint("siglip"), device="cpu")
    with pytest.raises(ValueError, match="made by"):
        engine.show(build_gallery(folder, tmp_path / "out", other, calibrate=False))


# ---------------------------------------------------------------- what the page says


SKIPPED = (Skipped("a/b.jpg", InputError("This file is not a picture.", "image.not_an_image")),)


@pytest.mark.parametrize(
    "scan",
    [
        Scan(),
        Scan("running"),
        Scan("running", 3, 10),
        Scan("running", 10, 10),
        Scan("starter"),
        Scan("starter", 3, 10),
        Scan("starter", 10, 10),
        Scan("waiting"),
        Scan("done", added=1, changed=2, removed=3, skipped=SKIPPED),
        Scan("empty"),
        Scan("failed"),
    ],
    ids=lambda scan: f"{scan.state} {scan.done}",
)
def test_the_page_says_how_far_it_is_in_both_languages_and_no_path(engine, folder, scan):
    photos = PhotoFolder(engine, folder, quiet)
    photos.scan = scan
    english, chinese = scan_value(photos, "en"), scan_value(photos, "zh")
    assert english["running"] == chinese["running"] == scan.running
    assert english["text"] != chinese["text"]
    assert "Pictures" in english["text"] + english["more"] or "Pictures" in chinese["text"]
    assert [name for name, _ in english["skipped"]] == [skip.name for skip in scan.skipped]
    assert str(folder.parent) not in json.dumps([english, chinese])


# ---------------------------------------------------------------- the command


@pytest.fixture
def come_along(starter, tmp_path, monkeypatch) -> Path:
    """The small gallery as if it came along, with its sources."""
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    encoder, small = starter
    folder = tmp_path / "come along"
    shutil.copytree(small.metadata.source, folder / "sources")
    build_gallery(folder / "sources", folder, encoder, calibrate=False)
    for module in (app, starter_module):
        monkeypatch.setattr(module, "bundled", lambda name: str(folder))
    return folder


def test_any_model_makes_its_starter_gallery_once_while_the_page_is_there(
    checkpoint, starter, come_along, tmp_path, capsys
):
    args = app.parse(["--model", str(checkpoint("siglip"))])
    engine = app.load_engine(args)
    scan = app.background_scan(engine, args)
    assert [picture.id for picture in engine.gallery.pictures] == ["lion"]
    assert [caption.text for caption in engine.gallery.captions] == ["a lion"]
    assert engine.search_images("a lion").matches[0].item.id == "lion"
    assert engine.thumbnail("lion")
    scan.start()
    scan.wait()
    assert "Embedding the starter gallery" in capsys.readouterr().err
    assert (scan.scan.state, scan.version, scan_value(scan, "en")["button"]) == ("none", 1, "")
    assert engine.gallery is engine.starter
    assert engine.gallery.metadata.fingerprint == engine.encoder.fingerprint != starter[0].fingerprint
    assert [caption.text for caption in engine.gallery.captions] == [caption.text for caption in starter[1].captions]
    assert engine.gallery.judge is not None
    again = app.load_engine(args)
    assert app.background_scan(again, args) is None
    assert len(again.gallery.captions) == len(starter[1].captions)
    with (come_along / "sources" / "captions.jsonl").open("a") as file:  # a later version of the code brings more
        file.write('\n{"id": "more", "topic": "", "en": "three dogs"}')
    assert app.background_scan(app.load_engine(args), args) is not None


def test_photos_follow_the_starter_gallery_of_a_new_model(checkpoint, folder, come_along):
    args = app.parse(["--model", str(checkpoint("siglip")), "--photos", str(folder)])
    engine = app.load_engine(args)
    photos = app.background_scan(engine, args)
    states = []
    photos.bar = lambda what: nullcontext(lambda done, total: states.append(photos.scan.state))
    photos.start()
    photos.wait()
    assert list(dict.fromkeys(states)) == ["starter", "running"]
    assert (photos.scan.state, len(engine.gallery.pictures)) == ("done", 41)
    assert {"a lion", "two cats"} <= {caption.text for caption in engine.gallery.captions}
    assert engine.gallery.judge is not None


@pytest.mark.parametrize("photographs", [True, False])
def test_without_room_for_the_starter_gallery_the_page_goes_on(
    checkpoint, folder, come_along, tmp_path, monkeypatch, photographs
):
    args = app.parse(["--model", str(checkpoint("siglip")), *(["--photos", str(folder)] if photographs else [])])
    engine = app.load_engine(args)
    scan = app.background_scan(engine, args)
    (tmp_path / "cache" / "galleries").mkdir(parents=True, exist_ok=True)
    place = tmp_path / "cache" / "galleries" / engine.encoder.fingerprint[:12]
    place.touch()  # a file where the folder would be
    scan.start()
    scan.wait()
    assert scan.scan.state == "failed"
    assert engine.search_images("a lion").matches[0].item.id == "lion"
    assert all(scan_value(scan, lang)["text"] for lang in ("en", "zh"))


@pytest.mark.parametrize(
    ("path", "said"),
    [("nowhere", "There is no folder"), ("file.jpg", "is a file"), ("~who/x", "There is no folder")],
)
def test_photos_have_to_be_a_folder(tmp_path, monkeypatch, capsys, free_port, path, said):
    monkeypatch.chdir(tmp_path)
    Path("file.jpg").touch()
    assert app.main(["--photos", path, "--port", free_port]) == 2
    assert said in capsys.readouterr().err


def test_home_and_links_are_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "disk").mkdir()
    (tmp_path / "Pictures").symlink_to("disk")
    assert Path(photo_folder("~/Pictures")) == (tmp_path / "disk").resolve()


@pytest.mark.parametrize("other", ["--gallery", "--index"])
def test_photos_go_with_no_other_gallery(tmp_path, capsys, other):
    with pytest.raises(SystemExit) as ended:
        app.main(["--photos", str(tmp_path), other, "http://127.0.0.1:1"])
    assert ended.value.code == 2
    assert other in capsys.readouterr().err
