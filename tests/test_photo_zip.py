import io
import json
import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

import app
from alignment.engine import AlignmentEngine, Photos
from alignment.engine.photo_zip import add_archive, export_zip
from alignment.engine.safe_zip import MAX_INFLATED_MB, MAX_MEMBERS, open_archive
from alignment.gallery import Gallery, build_gallery
from alignment.model import DualEncoder
from alignment.preprocess import InputError, open_image
from alignment.ui.strings import error_text, strings


def picture(seed: int, format: str = "PNG", side: int = 50) -> bytes:
    torch.manual_seed(seed)
    buffer = io.BytesIO()
    Image.fromarray(torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory) -> AlignmentEngine:
    source = tmp_path_factory.mktemp("secret-source")
    (source / "one.png").write_bytes(picture(0))
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    return AlignmentEngine(encoder, build_gallery(source, tmp_path_factory.mktemp("gallery"), encoder))


@pytest.fixture(scope="module")
def photos(engine) -> Photos:
    files = [(f"{seed}.png", picture(seed, side=500)) for seed in range(1, 6)]
    return engine.add_photos(engine.no_photos(), files)[0]


@pytest.fixture(scope="module")
def album(engine, photos) -> bytes:
    return export_zip(photos, engine.encoder)


@pytest.fixture
def zipped(tmp_path):
    """Write a zip: `zipped({"a.png": data})`, or of entries with their own headers."""

    def write(members, method=zipfile.ZIP_DEFLATED) -> Path:
        path = tmp_path / "upload.zip"
        with zipfile.ZipFile(path, "w", method) as file:
            for name, data in members.items() if isinstance(members, dict) else members:
                file.writestr(name, data)
        return path

    return write


def unpacked(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def code_of(call) -> str:
    """Name the error, which has to be a sentence in both languages."""
    with pytest.raises(InputError) as raised:
        call()
    assert f"error.{raised.value.code}" in strings()["zh"], raised.value.code
    assert error_text("en", raised.value) == str(raised.value)
    assert "{" not in error_text("zh", raised.value)
    return raised.value.code


def opened(path: Path) -> str:
    def call():
        with open_archive(path):
            pass

    return code_of(call)


def added(engine, path, photos=None, **options):
    """Add a whole archive; returns the photos and the codes of what was left out."""
    photos, skipped = photos or engine.no_photos(), []
    for step in add_archive(engine, photos, path, **options):
        photos, skipped = step.photos, skipped + [skip.error.code for skip in step.skipped]
    return photos, skipped


def refused(engine, path) -> str:
    return code_of(lambda: list(add_archive(engine, engine.no_photos(), path)))


# ---------------------------------------------------------------- what a zip may be


def test_a_plain_archive_gives_its_files_and_nothing_else(zipped):
    path = zipped({"b/": b"", "b/cat.png": b"cat", "./a.txt": b"text", ".DS_Store": b"x", "__MACOSX/b/._cat.png": b"x"})
    with open_archive(path) as archive:
        assert list(archive.members) == ["b/cat.png", "a.txt"]
        assert archive.read("a.txt", 1) == b"text"
        assert archive.pictures() == ["b/cat.png"]
        assert not archive.left_out


@pytest.mark.parametrize("data", [b"", b"PK", b"hello" * 99, b"PK\x05\x06" + bytes(7), b"PK\x03\x04" + bytes(99)])
def test_what_is_no_zip_is_said_to_be_none(tmp_path, data):
    path = tmp_path / "upload.zip"
    path.write_bytes(data)
    assert opened(path) == "zip.damaged"


def test_a_zip_cut_off_or_with_changed_bytes_is_damaged(zipped):
    path = zipped({"a.png": picture(1)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert opened(path) == "zip.damaged"
    changed = bytearray(whole)
    changed[200] ^= 255
    path.write_bytes(changed)
    with open_archive(path) as archive:
        assert code_of(lambda: archive.read("a.png", 1)) == "zip.damaged"


@pytest.mark.parametrize(
    "name",
    [
        "../up.png",
        "a/../../up.png",
        "/etc/x.png",
        "C:\\x.png",
        "..\\up.png",
        "a//b.png",
        "a/\x01.png",
        "x" * 200 + ".png",
    ],
)
def test_names_that_lead_anywhere_are_left_out(zipped, name):
    path = zipped({name: b"x", "good.png": b"y", "/".join("abcdefghij"): b"deep"})
    with open_archive(path) as archive:
        assert list(archive.members) == ["good.png"]
        assert len(archive.left_out["name"]) == 2


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_left_out(zipped, kind):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (kind | 0o777) << 16
    with open_archive(zipped([(link, "/etc/passwd"), ("good.png", b"y")])) as archive:
        assert list(archive.members) == ["good.png"]
        assert archive.left_out == {"link": ["link.png"]}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_files_of_one_name_the_first_counts(zipped):
    with open_archive(zipped([("a.png", b"first"), ("a.png", b"second"), ("./a.png", b"third")])) as archive:
        assert archive.read("a.png", 1) == b"first"
        assert archive.left_out == {"twice": ["a.png", "a.png"]}


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_chinese_names_are_read_in_either_encoding(tmp_path, encoding):
    raw = "狗在海滩上.png".encode(encoding)
    path = tmp_path / "upload.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x" * len(raw), b"cat")
    path.write_bytes(path.read_bytes().replace(b"x" * len(raw), raw))
    with open_archive(path) as archive:
        assert archive.read("狗在海滩上.png", 1) == b"cat"


def test_too_many_files_are_refused(zipped):
    assert opened(zipped({f"{row}.png": b"" for row in range(MAX_MEMBERS + 1)})) == "zip.members"


def test_a_directory_of_millions_is_not_even_read(tmp_path):
    entry = b"PK\x01\x02" + bytes(42)
    directory = entry * 100_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, len(directory), 0, 0)
    (tmp_path / "upload.zip").write_bytes(directory + end)
    assert opened(tmp_path / "upload.zip") == "zip.members"


def test_a_bomb_is_refused_by_its_ratio_before_anything_is_inflated(zipped):
    assert opened(zipped({"bomb.png": bytes(50 * 2**20)})) == "zip.ratio"


def declared(path: Path, size: int) -> Path:
    """Change the size that the directory and the file's own header declare."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        struct.pack_into("<L", data, data.rindex(signature) + offset, size)
    path.write_bytes(data)
    return path


def test_what_declares_too_much_is_refused(zipped):
    path = declared(zipped({"a.png": os.urandom(2**20)}), MAX_INFLATED_MB * 2**20 + 1)
    assert opened(path) == "zip.inflated"


@pytest.mark.parametrize(("size", "claimed"), [(50 * 2**20, 100), (5, 1000)], ids=["bomb", "cut off"])
def test_a_file_of_another_size_than_declared_is_damaged_and_not_inflated_further(zipped, size, claimed):
    with open_archive(declared(zipped({"a.png": bytes(size)}), claimed)) as archive:
        assert code_of(lambda: archive.read("a.png", 1)) == "zip.damaged"


def test_a_large_file_is_refused_by_its_declared_size(zipped):
    with open_archive(zipped({"a.png": os.urandom(2**21)})) as archive:
        assert code_of(lambda: archive.read("a.png", 1)) == "upload.size"


def test_passwords_and_odd_packing_are_said(zipped):
    assert opened(zipped({"a.png": b"x"}, zipfile.ZIP_LZMA)) == "zip.method"
    path = zipped({"a.png": b"x"})
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, data.rindex(b"PK\x01\x02") + 8, 1)
    path.write_bytes(data)
    assert opened(path) == "zip.encrypted"


# ---------------------------------------------------------------- pictures in a zip


def test_pictures_of_any_zip_are_taken_as_photos(engine, zipped):
    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w") as file:
        file.writestr("inner.png", picture(9))
    members = {f"holiday/{seed}.png": picture(seed) for seed in range(6)}
    members |= {"bad.jpg": b"hello", "notes.txt": b"hello", "again.png": picture(0), "inner.zip": nested.getvalue()}
    path = zipped(members)
    steps = list(add_archive(engine, engine.no_photos(), path))
    assert [(len(step.photos), step.done, step.total) for step in steps] == [(4, 4, 8), (6, 8, 8)]
    assert [picture.source for picture in steps[-1].photos.gallery.pictures] == [f"{seed}.png" for seed in range(6)]
    assert [skip.error.code for skip in steps[-1].skipped] == ["image.not_an_image", "photo.duplicate"]
    expected = engine.embed_image(picture(3))
    torch.testing.assert_close(steps[-1].photos.gallery.images.embeds[3], expected)


def test_a_zip_without_pictures_is_said_to_have_none(engine, zipped):
    assert refused(engine, zipped({"notes.txt": b"hello"})) == "zip.no_pictures"


def test_the_limit_holds_for_zips_too(engine, zipped):
    path = zipped({f"{seed}.png": picture(seed) for seed in range(5)})
    found, skipped = added(engine, path, limit=3)
    assert (len(found), skipped) == (3, ["photo.limit"] * 2)


# ---------------------------------------------------------------- an album leaves and comes back


def test_an_album_comes_back_without_being_embedded_again(engine, photos, album, tmp_path, monkeypatch):
    path = tmp_path / "my_photos.zip"
    path.write_bytes(album)
    monkeypatch.setattr(engine.encoder, "encode_images", None)
    back, skipped = added(engine, path)
    assert skipped == []
    assert [(p.id, p.source) for p in back.gallery.pictures] == [(p.id, p.source) for p in photos.gallery.pictures]
    torch.testing.assert_close(back.gallery.images.embeds, photos.gallery.images.embeds, atol=1e-3, rtol=0)
    assert {id: open_image(data).size for id, data in back.thumbnails.items()} == dict.fromkeys(
        photos.thumbnails, (320, 320)
    )
    assert engine.search_images("two cats", 3, photos=back).matches[0].probability is not None
    again, skipped = added(engine, path, back)
    assert (len(again), skipped) == (5, ["photo.duplicate"] * 5)


def test_an_unpacked_album_is_a_gallery_for_the_app(engine, photos, album, checkpoint, tmp_path):
    with zipfile.ZipFile(io.BytesIO(album)) as file:
        file.extractall(tmp_path)
    args = app.parse(["--model", str(checkpoint("clip")), "--gallery", str(tmp_path / "my_photos")])
    served = app.load_engine(args)
    assert [picture.source for picture in served.gallery.pictures] == [f"{seed}.png" for seed in range(1, 6)]
    assert served.gallery.judge is not None
    ours = engine.search_images("two cats", 3, photos=photos).matches
    theirs = served.search_images("two cats", 3).matches
    assert [match.item.id for match in theirs] == [match.item.id for match in ours]
    assert open_image(served.thumbnail(theirs[0].item.id)).size == (320, 320)
    app.build_page(served, "en")


def test_an_album_does_not_tell_where_anything_lies_on_the_server(engine, album):
    files = unpacked(album)
    assert sum(name.endswith(".webp") for name in files) == 5
    for name, data in files.items():
        for folder in (
            str(engine.gallery.folder),
            engine.gallery.metadata.source,
            str(Path(engine.encoder.name).parent),
        ):
            assert folder.encode() not in data, name


def test_an_album_is_deleted_from_the_disk_at_once(engine, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    export_zip(photos, engine.encoder)
    assert list(tmp_path.iterdir()) == []


def test_names_of_photos_leave_and_come_back_as_plain_names(engine, tmp_path):
    names = ["package:gradio/x.png", "/etc/passwd.png", "..\\..\\up.png", "C:\\a\\b.png", "猫.png"]
    photos, _ = engine.add_photos(engine.no_photos(), [(name, picture(row)) for row, name in enumerate(names)])
    path = tmp_path / "album.zip"
    path.write_bytes(export_zip(photos, engine.encoder))
    back, _ = added(engine, path)
    assert [p.source for p in back.gallery.pictures] == ["x.png", "passwd.png", "up.png", "b.png", "猫.png"]
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path)
    assert len(Gallery.load(tmp_path / "my_photos", engine.encoder).pictures) == 5


# ---------------------------------------------------------------- hostile albums


@pytest.fixture
def tampered(album, zipped):
    """Write the album with files changed: `tampered({"gallery.json": data})`; None takes one out."""

    def write(changes: dict[str, bytes | None], folder: str = "my_photos/") -> Path:
        files = unpacked(album) | {f"my_photos/{name}": data for name, data in changes.items()}
        return zipped(
            {folder + name.removeprefix("my_photos/"): data for name, data in files.items() if data is not None}
        )

    return write


def changed_lines(album: bytes, change) -> bytes:
    lines = [json.loads(line) for line in unpacked(album)["my_photos/pictures.jsonl"].splitlines()]
    return "\n".join(json.dumps(line) for line in change(lines)).encode()


def test_an_album_may_lie_at_the_top_and_hold_strangers(engine, tampered):
    found, skipped = added(engine, tampered({"evil.py": b"import os", "a/gallery.json": b"{}"}, folder=""))
    assert (len(found), skipped) == (5, [])


def test_an_album_of_another_model_is_named(engine, tampered, album):
    stamp = json.loads(unpacked(album)["my_photos/gallery.json"])
    foreign = {**stamp, "fingerprint": "0" * 64, "model": "some/other\x00-model" + "x" * 999}
    path = tampered({"gallery.json": json.dumps(foreign).encode()})
    assert refused(engine, path) == "album.model"
    with pytest.raises(InputError) as raised:
        list(add_archive(engine, engine.no_photos(), path))
    assert "some/other-model" in error_text("zh", raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("name", ["pictures.jsonl", "embeddings.safetensors"])
def test_an_album_that_lacks_a_file_names_it(engine, tampered, name):
    assert refused(engine, tampered({name: None})) == "album.missing"


@pytest.mark.parametrize("stamp", [b"", b"[]", b"{", b"{}", b'{"fingerprint": 5}', b"[" * 100_000, b"\xff\xfe\xff"])
def test_a_stamp_of_wrong_shape_is_damaged(engine, tampered, stamp):
    assert refused(engine, tampered({"gallery.json": stamp})) == "album.damaged"


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [],
        lambda lines: lines[:4],
        lambda lines: [*lines[:4], lines[0]],
        lambda lines: [*lines[:4], {**lines[4], "id": "../../etc/passwd"}],
        lambda lines: [*lines[:4], {**lines[4], "id": 5}],
        lambda lines: [*lines[:4], {**lines[4], "source": ["x"]}],
        lambda lines: [*lines[:4], "text"],
    ],
)
def test_lines_of_wrong_shape_are_damaged(engine, tampered, album, change):
    assert refused(engine, tampered({"pictures.jsonl": changed_lines(album, change)})) == "album.damaged"


def test_an_album_of_too_many_photos_is_refused(engine, tampered, album):
    lines = changed_lines(album, lambda lines: [{**lines[0], "id": str(row)} for row in range(501)])
    assert refused(engine, tampered({"pictures.jsonl": lines})) == "photo.limit"


@pytest.mark.parametrize(
    "embeds",
    [
        torch.ones(4, 24) / 24**0.5,
        torch.ones(5, 23) / 23**0.5,
        torch.ones(5, 24, 1),
        torch.ones(5, 24, dtype=torch.int64),
        torch.full((5, 24), torch.nan),
        torch.full((5, 24), torch.inf),
        torch.zeros(5, 24),
        torch.full((5, 24), 1e30),
    ],
)
def test_embeddings_of_wrong_shape_or_not_finite_are_damaged(engine, tampered, embeds):
    path = tampered({"embeddings.safetensors": save({"image_embeds": embeds})})
    assert refused(engine, path) == "album.damaged"


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04\x95hello.", b"\xff" * 64, struct.pack("<Q", 2**40) + b"{}", save({"other": torch.ones(5, 24)})],
)
def test_embeddings_that_are_no_safetensors_are_damaged(engine, tampered, data):
    assert refused(engine, tampered({"embeddings.safetensors": data})) == "album.damaged"


def test_thumbnails_are_decoded_and_encoded_anew(engine, tampered, album):
    names = [name.removeprefix("my_photos/") for name in unpacked(album) if name.endswith(".webp")]
    marked = io.BytesIO()
    Image.new("RGB", (100, 60), "teal").save(marked, "WEBP", exif=b"Exif\0\0secret-place")
    vast = io.BytesIO()
    Image.new("RGB", (9000, 900)).save(vast, "WEBP")
    bad: dict[str, bytes | None] = {names[0]: marked.getvalue(), names[1]: b"<svg onload=alert(1)>", names[2]: None}
    bad |= {names[3]: picture(1), names[4]: vast.getvalue()}
    found, skipped = added(engine, tampered(bad))
    (thumbnail,) = found.thumbnails.values()
    assert b"secret-place" not in thumbnail
    assert open_image(thumbnail).size == (100, 60)
    assert sorted(skipped) == ["album.damaged"] * 3 + ["album.missing"]
    assert len(found.gallery.images.embeds) == 1


def test_embeddings_follow_the_photos_that_are_left(engine, tampered, album, photos):
    first, third = (photos.gallery.pictures[row].id for row in (0, 2))
    found, _ = added(engine, tampered({f"thumbnails/{first}.webp": b"x", f"thumbnails/{third}.webp": b"x"}))
    torch.testing.assert_close(found.gallery.images.embeds, photos.gallery.images.embeds[[1, 3, 4]], atol=1e-3, rtol=0)


def test_the_background_of_a_stranger_judges_nothing(engine, tampered, album):
    tensors = load(unpacked(album)["my_photos/embeddings.safetensors"])
    tensors["background.image_embeds"] = torch.full_like(tensors["background.image_embeds"], torch.nan)
    found, _ = added(engine, tampered({"embeddings.safetensors": save(tensors)}))
    assert found.gallery.judge is engine.gallery.judge
