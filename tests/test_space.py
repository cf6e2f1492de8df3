"""What a Space consists of: the files that it needs, and nothing that was not meant for everybody."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from PIL import Image

from alignment.bundled import ROOT
from alignment.gallery import Gallery, build_gallery
from alignment.gallery.database import GalleryDatabase
from alignment.model import DualEncoder
from alignment.space import ModelSource, Space, choose_model, main, stage
from alignment.space.checks import check_folder, check_variables, private_paths
from alignment.space.folder import card, contents, requirements

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in folders whose names are nobody's business, with a remark in their metadata."""
    folder = tmp_path_factory.mktemp("private") / "photos"
    for row, name in enumerate(("Ännchen/one.jpg", "Ännchen/Schulfest 2024/two.jpg", "three.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture, exif = Image.new("RGB", (600, 400), (80 * row, 120, 200 - 60 * row)), Image.Exif()
        exif[0x010E] = "taken at home"
        picture.save(folder / name, exif=exif)
    return folder


@pytest.fixture(scope="module")
def built(checkpoint: Callable[[str], Path], photos: Path) -> Path:
    """A folder with a tiny model, what training leaves in it, and a gallery of its own."""
    home = photos.parent
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    encoder.save(home / "my model")
    for name in ("README.md", "run.json", "report.md", "optimizer.pt", ".env", "logs/events"):
        (home / "my model" / name).parent.mkdir(exist_ok=True)
        (home / "my model" / name).write_text("private" if name != "README.md" else "A model card", "utf-8")
    build_gallery(photos, home / "my gallery", encoder)
    (home / "my gallery" / "notes.txt").write_text("private", "utf-8")
    return home


@pytest.fixture
def tiny(built: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the model and the gallery, to do with as one likes."""
    model, gallery = (Path(shutil.copytree(built / name, tmp_path / name)) for name in ("my model", "my gallery"))
    return model, gallery


def of(model: Path, gallery: Path | None) -> Space:
    return Space("me/app", choose_model(str(model)), gallery)


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


# ---------------------------------------------------------------- the Space of the repository


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "look"
    assert main(["publish", "me/app", "--export", str(folder)]) == 0
    return folder


def test_it_holds_what_the_app_needs_and_nothing_else(exported: Path) -> None:
    names = set(contents(exported))
    assert {"app.py", "LICENSE", "README.md", "requirements.txt", "checkpoints/compact/config.json"} < names
    assert {"assets/gallery/gallery.db", "assets/ui/words/page.json"} < names
    assert {name.split("/")[0] for name in names if "/" in name} == {"alignment", "assets", "checkpoints"}
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "alignment").rglob("*.py")}
    left_out = code - names
    assert {name.split("/")[1] for name in left_out} == {"train", "compact", "space"}
    assert not [name for name in names if re.search(r"(^|/)\.|__pycache__", name)]


def test_the_exported_folder_answers(exported: Path, first_answer: Callable[..., dict]) -> None:
    found = first_answer([sys.executable, "app.py"], exported, "a red motorcycle")
    assert found["matches"][0]["id"] == "motorcycle"
    assert found["fits"]


def test_its_requirements_are_what_is_installed_here() -> None:
    on_cpu, on_gpu = requirements(None), requirements("zero-a10g")
    torch = version("torch").partition("+")[0]
    assert f"\ntorch=={torch}+cpu\n" in on_cpu
    assert "--extra-index-url https://download.pytorch.org/whl/cpu\n" in on_cpu
    assert f"\ntorch=={torch}\n" in on_gpu
    assert "download.pytorch.org" not in on_gpu
    assert requirements("cpu-upgrade") == on_cpu
    names = set(re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"^([\w-]+)==", on_gpu, re.MULTILINE)) == names - {"gradio", "huggingface-hub"}


def test_the_card_is_what_the_hub_expects_and_the_readme_says_the_same(exported: Path) -> None:
    front = front_matter((exported / "README.md").read_text("utf-8"))
    assert (front["sdk"], front["sdk_version"]) == ("gradio", version("gradio"))
    assert (front["python_version"], front["app_file"], front["suggested_hardware"]) == ("3.12", "app.py", "cpu-basic")
    assert len(front["short_description"]) <= 60  # the Hub refuses more
    assert front["thumbnail"].endswith("/spaces/me/app/resolve/main/assets/screenshots/search_en.png")
    assert (exported / front["thumbnail"].partition("/main/")[2]).is_file()
    ours = front_matter((ROOT / "README.md").read_text("utf-8"))
    assert {key: front[key] for key in ours} == ours


def test_a_dry_run_lists_every_file_and_needs_no_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, exported: Path
) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("a dry run has nothing to ask")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["publish", "me/app", "--dry-run", "--variable", "ALIGNMENT_LANG=zh", "--title", "Photos: mine"]) == 0
    shown = capsys.readouterr().out
    lines = re.findall(r"^ *([\d,]+)  (\S+)(?:  \(.*)?$", shown, re.MULTILINE)
    listed = {name: int(size.replace(",", "")) for size, name in lines}
    files = contents(exported)
    assert listed.keys() == files.keys()
    assert {name for name in files if listed[name] != files[name]} == {"README.md"}  # the title
    assert re.findall(r"(\S+)  \(to the store", shown) == [
        "assets/gallery/gallery.db",
        "checkpoints/compact/frozen.safetensors",
        "checkpoints/compact/trained.safetensors",
    ]
    assert front_matter(shown)["title"] == "Photos: mine"
    assert "  ALIGNMENT_MODEL=checkpoints/compact\n  ALIGNMENT_GALLERY=assets/gallery\n" in shown
    assert "  ALIGNMENT_LANG=zh\n" in shown
    assert shown.endswith("Nothing was sent.\n")


# ---------------------------------------------------------------- a gallery and a model of one's own


def everything(folder: Path) -> bytes:
    return b"\0".join(path.name.encode() + path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_of_ones_own_photos_only_thumbnails_captions_and_names_become_public(
    tiny: tuple[Path, Path], photos: Path, tmp_path: Path
) -> None:
    space, folder = of(*tiny), tmp_path / "space"
    note = stage(space, folder)
    assert note.startswith("Whoever may open the Space sees 3 of your pictures as thumbnails")
    names = contents(folder)
    assert space.variables["ALIGNMENT_GALLERY"] == "galleries/my-gallery"
    assert [name for name in names if name.startswith("galleries")] == ["galleries/my-gallery/gallery.db"]
    sent = everything(folder)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in photos.rglob("*") if path.is_file()]
    for word in (str(photos.parent), str(tmp_path), "Ännchen", "Schulfest", "taken at home", *hashes):
        assert word.encode() not in sent, word
    copy = GalleryDatabase(folder / space.place)
    pictures = copy.pictures(copy.ids("picture").tolist())
    assert sorted(picture.source for picture in pictures) == ["one.jpg", "three.png", "two.jpg"]
    assert {(picture.file.size, picture.file.mtime_ns) for picture in pictures} == {(0, 0)}
    assert all(copy.thumbnail(picture) for picture in pictures)
    assert copy.check() == []
    check_folder(folder, private_paths(tmp_path, photos.parent))
    assert not [name for name in names if name.startswith("assets/gallery/") and "sources" not in name]


def test_the_copy_of_a_gallery_finds_what_the_gallery_finds(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model, gallery = tiny
    space = of(model, gallery)
    stage(space, tmp_path / "space")
    encoder = DualEncoder.load(tmp_path / "space" / space.model.name, device="cpu")
    query = encoder.encode_texts(["a dog"])
    found = [
        [(match.item.id, match.similarity, match.probability) for match in one.search_images(query, 3).matches]
        for one in (Gallery.load(gallery, encoder), Gallery.load(tmp_path / "space" / space.place, encoder))
    ]
    assert found[0] == found[1]


def test_records_deleted_from_a_gallery_are_not_in_its_copy(
    tiny: tuple[Path, Path], photos: Path, tmp_path: Path
) -> None:
    model, gallery = tiny
    shutil.copytree(photos, tmp_path / "fewer")
    (tmp_path / "fewer" / "secret-plan.png").write_bytes((photos / "three.png").read_bytes() + b"\0")
    encoder = DualEncoder.load(model, device="cpu")
    build_gallery(tmp_path / "fewer", gallery, encoder)
    (tmp_path / "fewer" / "secret-plan.png").unlink()
    build_gallery(tmp_path / "fewer", gallery, encoder)
    space = of(model, gallery)
    stage(space, tmp_path / "space")
    assert b"secret-plan" not in everything(tmp_path / "space" / space.place)


@pytest.mark.parametrize("caption", ["my key is hf_" + "aB3" * 11, "password: hunter22"])
def test_a_secret_in_the_database_stops_it(tiny: tuple[Path, Path], tmp_path: Path, caption: str) -> None:
    model, gallery = tiny
    source = tmp_path / "photos"
    source.mkdir()
    Image.new("RGB", (60, 40)).save(source / "one.png")
    (source / "metadata.jsonl").write_text(json.dumps({"file_name": "one.png", "text": caption}), "utf-8")
    build_gallery(source, gallery, DualEncoder.load(model, device="cpu"), calibrate=False)
    with pytest.raises(ValueError, match="looks like a secret"):
        stage(of(model, gallery), tmp_path / "space")


def test_of_a_model_its_own_files_are_sent_and_not_what_lies_beside_them(
    tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    space = of(*tiny)
    stage(space, tmp_path / "space")
    sent = {name for name in contents(tmp_path / "space") if name.startswith("checkpoints/")}
    assert {name.removeprefix("checkpoints/my-model/") for name in sent} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert space.variables["ALIGNMENT_MODEL"] == "checkpoints/my-model"


def test_a_gallery_of_another_model_is_refused(
    tiny: tuple[Path, Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"was not made by .*python -m alignment.gallery build"):
        stage(of(checkpoint("chinese-clip"), tiny[1]), tmp_path / "space")
    with pytest.raises(ValueError, match=r"another one needs its own.*--model checkpoints/my-model"):
        stage(of(tiny[0], None), tmp_path / "other")


def test_a_model_that_is_called_like_ours_is_not_taken_for_it(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model = tiny[0].rename(tmp_path / "compact")
    assert choose_model(str(model)).name == "checkpoints/compact-2"
    assert choose_model(str(ROOT / "checkpoints/compact")).name == "checkpoints/compact"


@pytest.mark.parametrize("damage", ["DELETE FROM thumbnail", "UPDATE thumbnail SET webp = zeroblob(length(webp))"])
def test_a_gallery_without_its_thumbnails_is_refused(damage: str, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    with closing(sqlite3.connect(tiny[1] / "gallery.db")) as database, database:
        assert database.execute(f"{damage} WHERE id = (SELECT min(id) FROM thumbnail)").rowcount == 1
    with pytest.raises(ValueError, match="lacks the thumbnails of 1 pictures"):
        stage(of(*tiny), tmp_path / "space")


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE embedding SET embeds = zeroblob(length(embeds)) WHERE id = 2",
        "UPDATE picture SET credit = 'x'",
        "UPDATE meta SET value = zeroblob(length(value)) WHERE key = 'picture'",
    ],
)
def test_a_damaged_gallery_is_not_copied(damage: str, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    with closing(sqlite3.connect(tiny[1] / "gallery.db")) as database, database:
        assert database.execute(damage).rowcount
    with pytest.raises(ValueError, match="is damaged"):
        stage(of(*tiny), tmp_path / "space")


def test_a_caption_that_says_where_the_gallery_came_from_stops_it(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model, gallery = tiny
    source = tmp_path / "holiday" / "photos"
    source.mkdir(parents=True)
    Image.new("RGB", (60, 40)).save(source / "one.png")
    (source / "metadata.jsonl").write_text(json.dumps({"file_name": "one.png", "text": f"kept in {source}"}), "utf-8")
    build_gallery(source, gallery, DualEncoder.load(model, device="cpu"), calibrate=False)
    with pytest.raises(ValueError, match="names a folder of this machine"):
        stage(of(model, gallery), tmp_path / "space")


def test_an_export_that_was_refused_is_not_left_and_can_be_tried_again(
    tiny: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, gallery = tiny
    look = tmp_path / "new" / "look"
    command = ["publish", "me/app", "--model", str(model), "--gallery", str(gallery), "--export", str(look)]
    (model / "README.md").write_text("hf_" + "aB3" * 11, "utf-8")
    assert main(command) == 2
    assert "secret" in capsys.readouterr().err
    assert list(look.parent.iterdir()) == []
    (model / "README.md").write_text("A model card", "utf-8")
    assert main(command) == 0
    assert [path.name for path in look.parent.iterdir()] == ["look"]
    assert (look / "app.py").is_file()


def test_a_folder_with_something_in_it_is_not_written_to(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    assert main(["publish", "me/app", "--export", str(photos)]) == 2
    assert "is not empty" in capsys.readouterr().err


# ---------------------------------------------------------------- a model of the Hub


@pytest.fixture
def fetched(tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same model as if it had been fetched from the Hub: the id under which it lies in the cache."""
    cache = tmp_path / "hub"
    place = cache / "models--someone--clip"
    snapshot = place / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir()
    for path in tiny[0].iterdir():
        if path.suffix in (".json", ".safetensors", ".md"):
            (place / "blobs" / path.name).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(place / "blobs" / path.name)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT, "utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache))
    return "someone/clip"


def test_a_model_of_the_hub_is_fetched_by_the_space_at_the_commit_that_lies_here(
    fetched: str, tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    space = Space("me/app", choose_model(fetched), tiny[1], hardware="zero-a10g")
    stage(space, tmp_path / "space")
    assert space.variables == {
        "ALIGNMENT_MODEL": fetched,
        "ALIGNMENT_REVISION": COMMIT,
        "ALIGNMENT_GALLERY": "galleries/my-gallery",
        "GRADIO_SSR_MODE": "False",
    }
    assert not [name for name in contents(tmp_path / "space") if name.startswith("checkpoints")]
    front = front_matter((tmp_path / "space" / "README.md").read_text("utf-8"))
    (preload,) = front["preload_from_hub"]
    name, files, commit = preload.split(" ")
    assert (name, commit, front["models"]) == (fetched, COMMIT, [fetched])
    assert set(files.split(",")) == {
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert front["suggested_hardware"] == "zero-a10g"
    metadata = GalleryDatabase(tmp_path / "space" / space.place).metadata
    assert (metadata.model, metadata.source, metadata.options) == (fetched, "", "")


def test_a_model_that_was_never_fetched_is_named(capsys: pytest.CaptureFixture[str], fetched: str) -> None:
    assert main(["publish", "me/app", "--dry-run", "--model", "google/siglip2-base-patch16-224"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: The model google/siglip2-base-patch16-224 is not on this machine")
    assert "hf download google/siglip2-base-patch16-224`" in said


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".env", "A=1"),
        ("assets/id_rsa", "x"),
        ("certificate.pem", "x"),
        ("app.py", 'token = "hf_' + "aB3" * 11 + '"'),
        ("words.json", "-----BEGIN OPENSSH PRIVATE KEY-----"),
        ("deep/down.txt", "AKIA" + "ABCDEFGH12345678"),
        ("notes.md", "ghp_" + "a1B2" * 9),
        ("captions.jsonl", "AIza" + "Sy0_-" * 7),
        ("captions.jsonl", "https://bob:s3cr3t@db.example.com"),
        ("captions.jsonl", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4"),
        ("captions.jsonl", "My password: hunter2"),
        ("captions.jsonl", "密码是 hunter2"),
    ],
)
def test_what_looks_like_a_secret_stops_the_publication(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(ValueError, match="secret") as raised:
        check_folder(tmp_path)
    assert name in str(raised.value)
    assert content not in str(raised.value)


def test_a_secret_is_found_at_the_end_of_many_captions(tmp_path: Path) -> None:
    with (tmp_path / "captions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f'{{"id": "{row}", "text": "{"a caption " * 100}"}}\n' for row in range(17_000))
        file.write("hf_" + "aB3" * 11)
    assert (tmp_path / "captions.jsonl").stat().st_size > 2**24
    with pytest.raises(ValueError, match=r"secret \(hf_aB3"):
        check_folder(tmp_path)


def test_captions_that_only_speak_of_secrets_and_weights_are_welcome(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text(
        "a note with a password on it\nthe time is 12:30@home, see http://a.b:80/", "utf-8"
    )
    (tmp_path / "app.py").write_text("password: str = read()", "utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 9 + b"hf_" + b"aB3" * 11)
    check_folder(tmp_path)


def test_what_names_a_folder_of_this_machine_stops_it_too(tmp_path: Path) -> None:
    private = private_paths(Path("/home/someone"), Path("/root"))
    assert private == ["/home/someone"]  # "/root" means something elsewhere too
    (tmp_path / "config.json").write_text('{"path": "/home/someone-else/x"}', "utf-8")
    check_folder(tmp_path, private)
    (tmp_path / "config.json").write_text('{"path": "/home/someone/x"}', "utf-8")
    with pytest.raises(ValueError, match="names a folder of this machine"):
        check_folder(tmp_path, private)


def test_too_many_files_in_a_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignment.space.checks.MAX_IN_A_FOLDER", 2)
    for name in "abc":
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="publish a smaller gallery"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    "variable", ["HF_TOKEN=x", "MY_PASSWORD=x", "OPENAI_PASS=x", "OPENAI_API_KEY=x", f"X=hf_{'a' * 30}", "1X=y", "X"]
)
def test_variables_are_public_and_so_are_no_place_for_secrets(
    variable: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", "me/app", "--dry-run", "--variable", variable]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.match("error: .*(secret|no name for|is no variable)", said.err)


def test_ordinary_variables_are_welcome() -> None:
    check_variables({"ALIGNMENT_LANG": "zh", "GRADIO_SSR_MODE": "False"})


@pytest.mark.parametrize("name", ["app", "a/b/c", "me/../you", ""])
def test_a_space_has_an_owner_and_a_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", name, "--dry-run"]) == 2
    assert "write USER/NAME" in capsys.readouterr().err


def test_a_title_cannot_break_the_card_open() -> None:
    model = ModelSource("checkpoints/compact", ROOT, ())
    front = front_matter(card(Space("me/app", model, title="A: 'b' \"c\"\n---\nsdk: docker")))
    assert (front["title"], front["sdk"]) == ("A: 'b' \"c\" --- sdk: docker", "gradio")
    with pytest.raises(ValueError, match="needs a title"):
        card(Space("me/app", model, title=" "))
