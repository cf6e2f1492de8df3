"""`app.py --photos`: the page says how far the scan is, shows the photos as they come, and starts the next scan."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

import app
from alignment.engine import AlignmentEngine, PhotoFolder
from alignment.server import Service, Settings
from alignment.ui.strings import text
from tests.browser_window import Window, open_tab


@pytest.fixture
def folder(tmp_path, picture) -> Path:
    folder = tmp_path / "Pictures"
    folder.mkdir()
    for id in ("cat", "coffee", "lion"):
        shutil.copy(picture(id), folder / f"my {id}.jpg")
    (folder / "broken.jpg").write_text("no picture")
    return folder


@pytest.fixture
def photos(engine, folder, tmp_path, monkeypatch) -> PhotoFolder:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    searching = AlignmentEngine(engine.encoder, engine.gallery, names_files=True)
    return PhotoFolder(searching, folder, lambda what: nullcontext(lambda done, total: None))


@pytest.fixture
def open_page(window, profile, photos, uploads, monkeypatch) -> Iterator[Callable[..., Page]]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    page = app.build_page(photos.engine, "en", photos=photos)
    options = app.launch_options(photos.engine, Service(Settings(rate=0)), photos)
    _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", **options)
    windows: list[Window] = []
    complaints: list[str] = []

    def visit(locale: str, width: int) -> Page:
        windows.append(Window(profile.new_page()) if windows else window)
        windows[-1].listen("pageerror", lambda error: complaints.append(f"script: {error}"))
        windows[-1].listen("console", lambda line: line.type == "error" and complaints.append(f"console: {line.text}"))
        shown = windows[-1].open(url, locale, width)
        expect(shown.locator("#scan button")).to_be_enabled()
        return shown

    yield visit
    for other in windows[1:]:
        other.page.close()
    window.forget()
    page.close()
    assert complaints == []


def test_photos_take_the_starter_gallerys_place_and_a_rescan_takes_in_what_changed(open_page, photos, folder):
    page, other = open_page("en-US", 1280), open_page("zh-CN", 390)
    expect(page.locator("#footer")).to_contain_text("28 pictures")  # of the starter gallery
    box = page.locator("#pictures-query").get_by_role("textbox")
    box.fill("half a que")

    other.locator("#scan button").click()  # one page starts the scan, every open page shows its result
    expect(other.locator("#scan")).to_contain_text(text("zh", "scan.ready", count="3", folder="Pictures"))
    expect(other.locator("#pictures-results .al-card").first).to_contain_text("my cat.jpg")
    expect(other.locator("#scan summary")).to_be_visible()  # broken.jpg
    assert other.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(other.locator("#footer")).to_contain_text("3 张图片")

    page.locator("#scan button").click()
    expect(page.locator("#scan")).to_contain_text(text("en", "scan.ready", count="3", folder="Pictures"))
    expect(page.locator("#footer")).to_contain_text("3 pictures")
    expect(page.locator("#pictures-results .al-card").first).to_contain_text("my cat.jpg")
    expect(box).to_have_value("half a que")

    (folder / "my lion.jpg").unlink()
    (folder / "broken.jpg").unlink()
    page.locator("#scan button").click()
    expect(page.locator("#scan")).to_contain_text(text("en", "scan.changes", added=0, changed=0, removed=1))
    expect(page.locator("#footer")).to_contain_text("2 pictures")
    expect(page.locator("#scan summary")).to_have_count(0)

    page.locator("#pictures-results [data-act=why]").first.click()
    expect(page.locator("#explanation img").first).to_be_visible()
    page.keyboard.press("Escape")
    open_tab(page, "captions")
    expect(page.locator("#captions-drop img")).to_have_attribute("alt", re.compile("my cat.jpg"))
    expect(page.locator("#captions-results li").first).to_be_attached()  # a caption of the starter gallery
