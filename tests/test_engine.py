import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignment.engine import MAX_PHOTOS, AlignmentEngine, Term, as_webp
from alignment.engine.core import Thumbnails
from alignment.gallery import Gallery, Picture, build_gallery
from alignment.gallery.records import FileFingerprint
from alignment.model import DualEncoder
from alignment.preprocess import InputError, open_image

CAPTIONS = {
    "beach": ("a dog runs on the beach", "一只狗在海滩上奔跑"),
    "cats": ("two cats", "猫"),
    "dish": ("pasta", ""),
}


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory) -> AlignmentEngine:
    source = tmp_path_factory.mktemp("source")
    for row, name in enumerate(("one", "two", "three")):
        image = Image.effect_noise((90 + 30 * row, 60), 80).convert("RGB")
        image.paste((40 * row, 200 - 60 * row, 90), (0, 0, 40, 60))
        image.save(source / f"{name}.png")
    pictures = [{"id": name, "source": f"{name}.png", "en": f"picture {name}"} for name in ("one", "two", "three")]
    lines = [{"id": id, "en": en, **({"zh": zh} if zh else {})} for id, (en, zh) in CAPTIONS.items()]
    (source / "pictures.jsonl").write_text("\n".join(map(json.dumps, pictures)), "utf-8")
    (source / "captions.jsonl").write_text(
        "\n".join(json.dumps({**line, "topic": ""}, ensure_ascii=False) for line in lines), "utf-8"
    )
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    return AlignmentEngine(encoder, build_gallery(source, tmp_path_factory.mktemp("gallery"), encoder))


def photo(seed: int, format: str = "PNG") -> bytes:
    torch.manual_seed(seed)
    image = Image.fromarray(torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8).numpy())
    buffer = BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


# ---------------------------------------------------------------- search


def test_captions_are_ranked_by_their_cosine(engine, pictures):
    embed = engine.embed_image(pictures[0])
    matches = engine.search_captions(embed, k=4).matches
    texts = [caption.text for caption in engine.gallery.captions]
    cosines = engine.gallery.texts.embeds @ embed
    best = cosines.argsort(descending=True, stable=True)[:4].tolist()
    assert [match.item.text for match in matches] == [texts[row] for row in best]
    assert [match.similarity for match in matches] == pytest.approx(cosines[best].tolist(), abs=2e-3)
    assert [match.rank for match in matches] == [1, 2, 3, 4]


@pytest.mark.parametrize(("lang", "count"), [("en", 6), ("zh", 2), ("fr", 8), (None, 8)])
def test_only_captions_of_the_language_compete_where_there_are_any(engine, pictures, lang, count):
    matches = engine.search_captions(engine.embed_image(pictures[0]), k=20, lang=lang).matches
    assert len(matches) == count
    assert lang not in ("en", "zh") or {match.item.lang for match in matches} == {lang}
    assert sum(match.share for match in matches) == pytest.approx(1)


def test_images_are_found_in_the_gallery_or_among_the_photos(engine):
    assert {match.item.id for match in engine.search_images("two cats").matches} == {"one", "two", "three"}
    photos, _ = engine.add_photos(engine.no_photos(), [("mine.png", photo(0))])
    assert [match.item.source for match in engine.search_images("two cats", photos=photos).matches] == ["mine.png"]
    assert engine.search_images("two cats", photos=engine.no_photos()).matches == ()


@pytest.mark.parametrize("caption", ["", " \n\u200b ", "x" * 1001])
def test_a_caption_that_is_none_is_refused(engine, caption):
    with pytest.raises(InputError, match="caption"):
        engine.search_images(caption)


def test_a_picture_that_is_none_is_refused(engine):
    with pytest.raises(InputError, match="not a picture"):
        engine.embed_image(b"hello")


# ---------------------------------------------------------------- matrix


def test_alignment_is_the_models_own_arithmetic(engine, pictures):
    captions = ["two cats", "pasta"]
    alignment = engine.align(engine.embed_images(pictures), captions)
    expected = engine.encoder.encode_images(pictures) @ engine.encoder.encode_texts(captions).T
    torch.testing.assert_close(alignment.similarity, expected)
    torch.testing.assert_close(alignment.logits_per_image, expected * engine.encoder.logit_scale)


# ---------------------------------------------------------------- photos


def test_bad_files_are_named_and_the_others_kept(engine):
    files = [
        ("a.png", photo(1)),
        ("bad.jpg", b"hello"),
        ("cut.png", photo(2)[:200]),
        ("none.gif", b""),
        ("b.jpg", photo(3)),
    ]
    photos, skipped = engine.add_photos(engine.no_photos(), files)
    assert [picture.source for picture in photos.gallery.pictures] == ["a.png", "b.jpg"]
    assert [(skip.name, skip.error.code) for skip in skipped] == [
        ("bad.jpg", "image.not_an_image"),
        ("cut.png", "image.truncated"),
        ("none.gif", "image.empty"),
    ]
    torch.testing.assert_close(photos.gallery.images.embeds[1], engine.embed_image(photo(3)))


def test_photos_are_added_to_those_there_without_changing_them(engine):
    first, _ = engine.add_photos(engine.no_photos(), [("a.png", photo(1))])
    second, skipped = engine.add_photos(first, [("again.png", photo(1)), ("b.png", photo(2)), ("b2.png", photo(2))])
    assert (len(first), len(second)) == (1, 2)
    assert [skip.error.code for skip in skipped] == ["photo.duplicate"] * 2
    assert set(second.thumbnails) == {picture.id for picture in second.gallery.pictures}


def test_the_limit_counts_what_is_there(engine):
    first, _ = engine.add_photos(engine.no_photos(), [("a.png", photo(1))], limit=2)
    second, skipped = engine.add_photos(first, [("b.png", photo(2)), ("c.png", photo(3))], limit=2)
    assert len(second) == 2
    assert [(skip.name, skip.error.code, skip.error.values) for skip in skipped] == [
        ("c.png", "photo.limit", {"limit": 2})
    ]
    assert MAX_PHOTOS == 500


def test_a_photo_can_be_taken_out(engine):
    photos, _ = engine.add_photos(engine.no_photos(), [("a.png", photo(1)), ("b.png", photo(2))])
    left = engine.without(photos, photos.gallery.pictures[0].id)
    assert [picture.source for picture in left.gallery.pictures] == ["b.png"]
    torch.testing.assert_close(left.gallery.images.embeds, photos.gallery.images.embeds[1:])
    assert len(engine.without(left, "unknown")) == 1


def test_the_gallerys_pictures_can_be_taken_as_photos(engine):
    photos = engine.gallery_photos(["three", "one"])
    assert [picture.id for picture in photos.gallery.pictures] == ["three", "one"]
    torch.testing.assert_close(photos.gallery.images.embeds[1], engine.picture_embed("one"))


# ---------------------------------------------------------------- pictures to show


def test_thumbnails_are_those_of_the_gallery(engine):
    assert open_image(engine.thumbnail("three")).size == (150, 60)
    assert engine.thumbnail("three") == engine.gallery.thumbnail(engine.gallery.pictures.find("three"))
    with pytest.raises(KeyError):
        engine.thumbnail("unknown")


def test_thumbnails_that_a_gallery_lacks_are_made_once_for_each_state_of_a_file(engine, tmp_path):
    def with_file(sha256: str) -> Gallery:
        picture = Picture("a", str(tmp_path / "a.png"), file=FileFingerprint(1, 1, sha256))
        known = engine.gallery
        return Gallery([picture], (), known.images.embeds[:1], known.texts.embeds[:0], known.metadata)

    (tmp_path / "a.png").write_bytes(photo(1))
    other = AlignmentEngine(engine.encoder, with_file("00"))
    data = other.thumbnail("a")
    (tmp_path / "a.png").write_bytes(photo(2))
    assert other.thumbnail("a") is data
    other.show(with_file("01"))
    assert other.thumbnail("a") != data


def test_a_record_that_another_process_deletes_is_left_out_of_the_results(engine, tmp_path):
    source, out = tmp_path / "source", tmp_path / "gallery"
    source.mkdir()
    for seed in range(6):
        (source / f"{seed}.png").write_bytes(photo(seed))
    build_gallery(source, out, engine.encoder, calibrate=False)
    old = AlignmentEngine(engine.encoder, Gallery.load(out, engine.encoder))
    before = {picture.source: picture.id for picture in old.gallery.pictures}
    (source / "3.png").unlink()
    build_gallery(source, out, engine.encoder, calibrate=False)
    kept = {id for name, id in before.items() if name != "3.png"}
    found = old.search_images("two cats", 6)
    assert {match.item.id for match in found.matches} == {picture.id for picture in old.gallery.pictures} == kept
    assert old.gallery.pictures.find(before["3.png"]) is None
    composed = old.compose_query([Term("two cats"), Term("pasta", -1.0)])
    assert {match.item.id for match in old.search_images(composed, 6).matches} == kept
    with pytest.raises(KeyError):
        old.thumbnail(before["3.png"])


def test_webp_fits_the_square():
    assert open_image(as_webp(Image.new("RGB", (1000, 400)))).size == (320, 128)
    assert open_image(as_webp(Image.new("RGB", (10, 40)))).size == (10, 40)  # never larger than it was


def test_several_visitors_at_once_get_what_one_gets(engine, pictures):
    expected = engine.embed_image(pictures[0]), engine.embed_caption("two cats")
    results: list[tuple[torch.Tensor, torch.Tensor]] = []

    def visit() -> None:
        results.append((engine.embed_image(pictures[0]), engine.embed_caption("two cats")))

    threads = [threading.Thread(target=visit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for image, text in results:
        torch.testing.assert_close((image, text), expected)


# ---------------------------------------------------------------- several visitors at once


LONG = "a dog and two cats run on the beach while someone eats a plate of pasta"


def test_captions_that_wait_are_encoded_together_and_embedded_as_if_alone(engine, monkeypatch):
    captions = ["two cats", LONG, "pasta", "一只狗在海滩上奔跑", "two cats", "a"]
    alone = [engine.encoder.encode_texts([caption])[0] for caption in captions]
    begun, may_go_on, batches = threading.Event(), threading.Event(), []
    encode = engine.encoder.encode_texts

    def slowly(texts):
        batches.append(list(texts))
        begun.set()
        assert may_go_on.wait(30)
        return encode(texts)

    monkeypatch.setattr(engine.encoder, "encode_texts", slowly)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(engine.embed_caption, "beach")
        assert begun.wait(30)
        rest = [pool.submit(engine.embed_caption, caption) for caption in captions]
        empty = pool.submit(engine.embed_caption, " ")
        with pytest.raises(InputError, match="caption is empty"):  # at once, and for this request alone
            empty.result(30)
        for _ in range(3000):
            if len(engine._encode_texts._waiting) == len(captions):
                break
            time.sleep(0.01)
        may_go_on.set()
        found = [future.result(30) for future in rest]
    torch.testing.assert_close(first.result(), encode(["beach"])[0], atol=1e-5, rtol=0)
    assert [sorted(batch) for batch in batches] == [["beach"], sorted(captions)]
    for embed, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(embed, expected, atol=1e-5, rtol=0)


class Slow:
    """A path that takes its time."""

    def __init__(self, path: Path) -> None:
        self.path, self.begun, self.may_go_on = path, threading.Event(), threading.Event()

    def __fspath__(self) -> str:
        self.begun.set()
        assert self.may_go_on.wait(30)
        return str(self.path)


def test_decoding_one_picture_does_not_delay_other_requests(engine, pictures, tmp_path):
    slow = Slow(tmp_path / "slow.png")
    slow.path.write_bytes(photo(5))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.embed_image, slow)
        assert slow.begun.wait(30)
        assert engine.embed_image(pictures[0]).shape == engine.embed_caption("two cats").shape
        assert not waiting.done()
        slow.may_go_on.set()
        torch.testing.assert_close(waiting.result(30), engine.embed_image(photo(5)))


@pytest.mark.usefixtures("no_thread_stays")
def test_many_pictures_are_embedded_in_order_and_as_if_alone(engine):
    photos = [photo(seed) for seed in range(20)]
    expected = torch.stack([engine.embed_image(data) for data in photos])
    torch.testing.assert_close(engine.embed_images(photos), expected, atol=1e-5, rtol=0)
    assert engine.embed_images([]).shape == (0, engine.encoder.embed_dim)
    with pytest.raises(InputError, match="not a picture"):
        engine.embed_images([*photos[:10], b"hello", *photos[10:]])


def test_what_is_still_there_to_show_is_told_without_opening_it(engine, tmp_path):
    pictures = [Picture("there", "there.png", root=str(tmp_path)), Picture("gone", "gone.png", root=str(tmp_path))]
    pictures.append(Picture("package", "package:nowhere_at_all/x.png"))
    (tmp_path / "there.png").write_bytes(b"of any kind")
    embeds = engine.gallery.images.embeds[[0, 1, 2]]
    none = torch.empty(0, engine.encoder.embed_dim)
    other = AlignmentEngine(engine.encoder, Gallery(pictures, (), embeds, none, engine.gallery.metadata))
    assert [other.can_show(picture.id) for picture in pictures] == [True, False, False]


def test_thumbnails_of_the_gallerys_pictures_are_made_when_they_are_looked_up(engine):
    made = []
    thumbnails = Thumbnails(["one", "two"], lambda id: made.append(id) or engine.thumbnail(id))
    assert (list(thumbnails), len(thumbnails), "three" in thumbnails, made) == (["one", "two"], 2, False, [])
    assert thumbnails["two"] == engine.thumbnail("two")
    assert made == ["two"]
    with pytest.raises(KeyError):
        thumbnails["three"]


# ---------------------------------------------------------------- meaning


@pytest.mark.parametrize(
    ("query", "id"),
    [
        ("a cup of coffee", "coffee"),
        ("一杯咖啡", "coffee"),
        ("a cat", "cat"),
        ("一只猫", "cat"),
        ("a motorcycle", "motorcycle"),
    ],
)
def test_the_compact_model_finds_the_picture(compact_engine, query, id):
    assert id in [match.item.id for match in compact_engine.search_images(query, 3).matches]


@pytest.mark.parametrize(("lang", "word"), [("en", "cat"), ("zh", "猫")])
def test_the_compact_model_finds_a_caption(compact_engine, lang, word):
    embed = compact_engine.embed_image(compact_engine.gallery.pictures.find("cat").path)
    matches = compact_engine.search_captions(embed, 5, lang).matches
    assert {match.item.lang for match in matches} == {lang}
    assert any(word in match.item.text.lower() for match in matches)
