import re
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from alignment.gallery import Gallery
from alignment.ui.strings import text
from tests.browser_window import files_in, open_tab


def open_photos(page: Page, lang: str = "en") -> None:
    open_tab(page, "photos", lang)
    expect(page.locator("#photos-results li").first).to_be_visible()


def drop(page: Page, *files) -> None:
    page.locator("#photos-drop input[type=file]").set_input_files([str(file) for file in files])


def ranked(page: Page) -> list[str]:
    return page.locator("#photos-results li .al-text").all_text_contents()


def search(page: Page, caption: str) -> None:
    box = page.locator("#photos-query").get_by_role("textbox")
    box.fill(caption)
    box.press("Enter")


def best(page: Page, name: str) -> None:
    expect(page.locator("#photos-results li .al-text").first).to_have_text(name)


def status(page: Page, words: str) -> None:
    expect(page.locator("#photos-drop [role=status]")).to_have_text(words)


def download(page: Page, folder: Path) -> Path:
    button = page.locator("#photos-download button")
    expect(button).to_be_enabled()
    with page.expect_download() as waiting:
        button.click()
    assert waiting.value.suggested_filename == "my_photos.zip"
    waiting.value.save_as(folder / "my_photos.zip")
    return folder / "my_photos.zip"


@pytest.fixture
def drawings(tmp_path) -> list[Path]:
    """Files of 30 plain pictures, each another."""
    files = [tmp_path / f"{row:02}.png" for row in range(30)]
    for row, file in enumerate(files):
        Image.new("RGB", (64, 64), (row * 8, 90, 90)).save(file)
    return files


def test_own_photos_are_searched_and_cleared(visit, bad_file, picture, uploads):
    page = visit()
    open_photos(page)
    for button in ("#photos-clear", "#photos-download button"):
        expect(page.locator(button)).to_be_disabled()
    names = [picture(id).name for id in ("cat", "coffee", "rocket")]
    drop(page, *(picture(id) for id in ("cat", "coffee", "rocket")), bad_file, picture("cat"))
    status(page, "3 pictures added.")
    expect(page.locator("#photos-drop .al-problem li")).to_have_text(
        [
            f"notes.jpg {text('en', 'error.image.not_an_image')}",
            f"{names[0]} {text('en', 'error.photo.duplicate')}",
        ]
    )
    for query, name in (("a cat", names[0]), ("一杯咖啡", names[1])):
        search(page, query)
        best(page, name)
        assert sorted(ranked(page)) == sorted(names)
    assert files_in(uploads) == []

    other = visit()  # another visitor sees the sample only
    open_photos(other)
    expect(other.locator("#photos-notes")).to_have_text(text("en", "photos.sample"))

    page.locator("#photos-clear").click()
    status(page, text("en", "photos.cleared"))
    expect(page.locator("#photos-notes")).to_have_text(text("en", "photos.sample"))
    assert not set(names) & set(ranked(page))


def test_photos_come_in_parts_and_all_of_them_count(visit, drawings, bad_file):
    page = visit()
    open_photos(page)
    page.evaluate(
        """() => {
            window.bars = [];
            const place = document.querySelector("#photos-drop");
            const note = () => place.querySelectorAll("progress").forEach((bar) => window.bars.push(bar.value));
            new MutationObserver(note).observe(place, { childList: true, subtree: true, attributes: true });
        }"""
    )
    drop(page, *drawings[:5], bad_file, *drawings[5:])
    status(page, "30 pictures added.")
    expect(page.locator("#photos-drop .al-problem li")).to_have_count(1)
    bars = page.evaluate("window.bars")
    assert bars == sorted(bars)
    assert {4, 16, 28} <= set(bars)
    expect(page.locator("#photos-notes")).to_contain_text("30 photos")
    search(page, "a red square")  # all of them compete, though nothing may fit and the results be folded
    page.locator("#photos-results .al-card .al-text", has_text=re.compile(r"\d\d\.png")).first.wait_for(
        state="attached"
    )


def test_the_first_photos_can_be_searched_while_the_rest_is_on_its_way_and_it_can_be_stopped(visit, picture, drawings):
    page = visit()
    open_photos(page)
    routes: list[Route] = []

    def hold(route: Route) -> None:  # the first part goes through, what comes after is held up on its way
        routes.append(route)
        if len(routes) <= 12:
            route.continue_()

    page.route("**/upload", hold)
    drop(page, picture("cat"), picture("coffee"), *drawings)
    expect(page.locator("#photos-notes")).to_contain_text("12 photos")
    search(page, "a cup of coffee")
    best(page, picture("coffee").name)
    expect(page.locator("#photos-drop progress")).to_be_visible()
    page.locator("#photos-drop [data-act=stop]").click()
    expect(page.locator("#photos-drop [data-act=stop]")).to_have_text(text("en", "drop.stopping"))
    for route in routes[12:]:
        route.continue_()
    expect(page.locator("#photos-drop [role=status]")).to_have_text(re.compile(r"Stopped\. 1\d pictures added\."))
    expect(page.locator("#photos-drop progress")).to_have_count(0)
    best(page, picture("coffee").name)  # what was searched for meanwhile is still shown


def test_reading_a_zip_can_be_stopped(visit, drawings, large_pictures, tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as file:
        for row, data in enumerate(large_pictures(300)):
            file.writestr(f"{row}.png", data)
    page = visit()
    open_photos(page)
    drop(page, tmp_path / "many.zip")
    page.locator("#photos-drop [data-act=stop]").click()
    expect(page.locator("#photos-drop [role=status]")).to_have_text(re.compile(r"Stopped\. \d+ pictures? added\."))
    added = int(re.search(r"\d+", page.locator("#photos-drop [role=status]").inner_text())[0])
    assert 0 < added < 300
    expect(page.locator("#photos-notes")).to_contain_text(f"{added} photo")
    drop(page, *drawings[:1])  # and the page goes on
    status(page, "1 picture added.")


def test_an_album_brings_the_photos_back(visit, engine, picture, tmp_path, uploads):
    page = visit()
    open_photos(page)
    ids = ("cat", "coffee", "rocket", "motorcycle")
    drop(page, *(picture(id) for id in ids))
    status(page, "4 pictures added.")
    search(page, "a red motorcycle")
    best(page, picture("motorcycle").name)
    cosines = page.locator("#photos-results li dd").all_inner_texts()
    album = download(page, tmp_path)
    assert files_in(uploads) == []
    with zipfile.ZipFile(album) as file:
        file.extractall(tmp_path)
    assert len(Gallery.load(tmp_path / "my_photos", engine.encoder).pictures) == 4
    assert download(page, tmp_path).stat().st_size == album.stat().st_size  # and again

    other = visit()
    open_photos(other)
    drop(other, album)
    status(other, "4 pictures added.")
    search(other, "a red motorcycle")
    best(other, picture("motorcycle").name)
    again = other.locator("#photos-results li dd").all_inner_texts()
    assert [float(word.rstrip(" %").lstrip("<>")) for word in again] == pytest.approx(
        [float(word.rstrip(" %").lstrip("<>")) for word in cosines], abs=0.11
    )
    drop(other, picture("cat"))  # known by its content
    expect(other.locator("#photos-drop .al-problem li")).to_contain_text(text("en", "error.photo.duplicate"))


def test_a_bad_album_is_refused_in_chinese_and_what_was_there_stays(visit, picture, tmp_path):
    page = visit("?lang=zh")
    open_photos(page, "zh")
    drop(page, picture("cat"))
    status(page, text("zh", "drop.added.one"))
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr("my_photos/gallery.json", '{"fingerprint": "0", "model": "别的模型"}')
    (tmp_path / "none.zip").write_bytes(b"hello")
    drop(page, tmp_path / "bad.zip")
    expect(page.locator("#photos-drop .al-problem li")).to_have_text(
        f"bad.zip {text('zh', 'error.album.model', theirs='别的模型', ours='compact')}"
    )
    drop(page, tmp_path / "none.zip")
    expect(page.locator("#photos-drop .al-problem li")).to_have_text(f"none.zip {text('zh', 'error.zip.damaged')}")
    search(page, "一只猫")
    best(page, picture("cat").name)
    expect(page.locator("#photos-notes")).to_contain_text("1 张照片")


def test_photos_like_one_of_them_are_found(visit, picture):
    page = visit()
    open_photos(page)
    drop(page, *(picture(id) for id in ("cheetah-running", "cheetah-face", "coffee", "rocket")))
    status(page, "4 pictures added.")
    search(page, "a cup of coffee")
    best(page, picture("coffee").name)
    page.locator("#photos-results li", has_text=picture("cheetah-face").name).locator("[data-act=more]").click()
    parts = page.locator("#photos-composer li")
    expect(parts).to_have_count(2)
    expect(parts.nth(1)).to_contain_text(picture("cheetah-face").name)
    parts.first.locator("[data-act=remove]").click()
    best(page, picture("cheetah-running").name)


def test_photos_are_removed_one_by_one(visit, picture):
    page = visit()
    open_photos(page)
    names = [picture(id).name for id in ("coffee", "rocket", "lion")]
    drop(page, *(picture(id) for id in ("coffee", "rocket", "lion")))
    status(page, "3 pictures added.")
    search(page, "a cup of coffee")
    best(page, names[0])
    for left in (2, 1):
        page.locator("#photos-results [data-act=remove]").last.click()
        expect(page.locator("#photos-results li")).to_have_count(left)
        status(page, text("en", "photos.removed"))
    assert ranked(page) == names[:1]
    page.locator("#photos-results [data-act=remove]").click()
    expect(page.locator("#photos-notes")).to_have_text(text("en", "photos.sample"))  # the sample is back


def test_why_a_photo_fits_is_explained(visit, picture):
    page = visit()
    open_photos(page)
    drop(page, picture("coffee"), picture("rocket"))
    status(page, "2 pictures added.")
    search(page, "a cup of coffee")
    best(page, picture("coffee").name)
    page.locator("#photos-results [data-act=why]").first.click()
    dialog = page.locator("#explanation dialog[open]")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text("coffee")
