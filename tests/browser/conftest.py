"""The page as it is served, with the compact model and the starter gallery, in a real browser."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, expect, sync_playwright

import app
from alignment.gallery import Gallery, Picture
from alignment.server import Service, Settings
from alignment.ui.strings import pick_language, text

SLOW = 30_000  # milliseconds; the machine may be busy
expect.set_options(timeout=SLOW)
LOCALE = "en-US"
CHROMIUM = {
    "executable_path": shutil.which("chromium") or None,
    "args": ["--no-sandbox", "--disable-dev-shm-usage"],
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def engine():
    return app.load_engine(app.parse(["--model", str(app.ROOT / "checkpoints/compact")]))


@pytest.fixture(scope="session")
def uploads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="session")
def address(engine, uploads) -> Iterator[str]:
    """Serve the page once for all tests, on any free port."""
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


@pytest.fixture(scope="session")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="session")
def browser(playwright) -> Iterator[Browser]:
    """A browser whose contexts are new ones, and know nothing."""
    browser = playwright.chromium.launch(**CHROMIUM)
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def profile(playwright, tmp_path_factory) -> Iterator[BrowserContext]:
    """A browser that keeps compiled scripts on disk: to compile them is half of the work of opening the page."""
    folder = tmp_path_factory.mktemp("profile")
    profile = playwright.chromium.launch_persistent_context(folder, locale=LOCALE, **CHROMIUM)
    profile.set_default_timeout(SLOW)
    yield profile
    profile.close()


def forget(profile: BrowserContext, address: str) -> None:
    """Close the pages of a test, and delete what they have left: all but files of the server and compiled scripts."""
    first, *pages = profile.pages
    for page in pages:
        page.close()
    kept = "cookies,local_storage,indexeddb,service_workers,cache_storage,file_systems"
    session = profile.new_cdp_session(first)
    session.send("Storage.clearDataForOrigin", {"origin": address.rstrip("/"), "storageTypes": kept})
    session.detach()
    profile.clear_cookies()
    profile.clear_permissions()


@pytest.fixture
def visit(browser, profile, address) -> Iterator[Callable[..., Page]]:
    """Open the page: `visit("?lang=zh", locale=..., width=...)`; no complaint and no foreign request goes unnoticed.

    Each visit of a test is another visitor's, with a context of its own.
    """
    contexts, complaints = [], []

    def open_context(locale: str, **options) -> BrowserContext:
        if locale == LOCALE and not options and profile not in contexts:
            return profile
        context = browser.new_context(locale=locale, **options)
        context.set_default_timeout(SLOW)
        return context

    def open_page(query: str = "", *, locale: str = LOCALE, width: int = 1280, height: int = 900, **options) -> Page:
        context = open_context(locale, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": height})

        def check(request):
            if not request.url.startswith((address, address.replace("http", "ws"), "data:", "blob:")):
                complaints.append(f"foreign request: {request.url}")

        page.on("request", check)
        page.on("pageerror", lambda error: complaints.append(f"script: {error}"))
        page.on("console", lambda line: line.type == "error" and complaints.append(f"console: {line.text}"))
        page.goto(address + query)
        expect(page.locator("#captions-results h2")).to_be_attached()  # an address may lead to another tab
        expect(page.locator("#link button")).to_be_visible()
        # All of the page changes its language at once; what is typed or dropped before is drawn over.
        lang = pick_language(dict(parse_qsl(query.lstrip("?"))), locale)
        expect(page.locator("#captions-drop .al-drop-how")).to_have_text(text(lang, "drop.how"))
        expect(page.get_by_role("tab", name=text(lang, "evaluate.tab"), exact=True)).to_be_attached()
        return page

    yield open_page
    for context in contexts:
        if context is profile:
            forget(profile, address)
        else:
            context.close()
    assert complaints == []


@pytest.fixture(scope="session")
def picture(engine) -> Callable[[str], Path]:
    """File of one of the starter gallery's pictures, by its id."""
    gallery: Gallery = engine.gallery
    pictures: dict[str, Picture] = {picture.id: picture for picture in gallery.pictures}
    return lambda id: pictures[id].path


@pytest.fixture(scope="session")
def bad_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bad") / "notes.jpg"
    path.write_text("This is no picture.")
    return path
