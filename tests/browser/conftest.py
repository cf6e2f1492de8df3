"""The page as it is served, with the compact model and the starter gallery, in a real browser."""

import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
from filelock import FileLock
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, Request, expect, sync_playwright

import app
from alignment.gallery import Gallery, Picture
from alignment.server import Service, Settings
from alignment.ui.strings import pick_language, text
from tests.browser_window import LOCALE, SLOW, Window

expect.set_options(timeout=SLOW)
CHROMIUM = {"executable_path": shutil.which("chromium") or None}
ARGS = ["--no-sandbox", "--disable-dev-shm-usage"]
# Gradio's "Loading..." counts seconds in every frame, and goes on when it is gone: a tenth of a core for each page.
STOP_COUNTING = """{
  const draw = window.requestAnimationFrame.bind(window);
  window.requestAnimationFrame = (step) => (/performance\\.now\\(\\)-.*1e3/.test(step) ? 0 : draw(step));
}"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def engine():
    with FileLock(Path(os.environ["ALIGNMENT_CACHE"], "browser.lock")):  # one worker makes the graphs for all
        engine = app.load_engine(app.parse(["--model", str(app.ROOT / "checkpoints/compact")]))
        engine.embed_image(engine.gallery.pictures[0].path)
    return engine


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
    browser = playwright.chromium.launch(args=ARGS, **CHROMIUM)
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def profile(playwright, tmp_path_factory) -> Iterator[BrowserContext]:
    """A browser that keeps compiled scripts on disk: to compile them is half of the work of opening the page."""
    folder = tmp_path_factory.mktemp("profile")
    profile = playwright.chromium.launch_persistent_context(folder, args=["--lang=en-US", *ARGS], **CHROMIUM)
    profile.set_default_timeout(SLOW)
    profile.add_init_script(STOP_COUNTING)
    yield profile
    profile.close()


@pytest.fixture(scope="session")
def only_window(profile) -> Window:
    return Window(profile.pages[0])


@pytest.fixture
def window(only_window) -> Iterator[Window]:
    """The window of this test, with nothing in it."""
    yield only_window
    only_window.forget()


@pytest.fixture
def visit(browser_context, window, address) -> Iterator[Callable[..., Page]]:
    """Open the page: `visit("?lang=zh", locale=..., width=...)`; no complaint and no foreign request goes unnoticed.

    Each visit of a test is another visitor's: the second one has a context of its own.
    """
    pages: list[Page] = []
    complaints: list[str] = []

    def check(request: Request) -> None:
        if not request.url.startswith((address, address.replace("http", "ws"), "data:", "blob:")):
            complaints.append(f"foreign request: {request.url}")

    def open_page(query: str = "", *, locale: str = LOCALE, **size: int) -> Page:
        visitor = Window(browser_context().new_page()) if pages else window
        visitor.listen("request", check)
        visitor.listen("pageerror", lambda error: complaints.append(f"script: {error}"))
        visitor.listen("console", lambda line: line.type == "error" and complaints.append(f"console: {line.text}"))
        page = visitor.open(address + query, locale, **size)
        pages.append(page)
        expect(page.locator("#captions-results h2")).to_be_attached()  # an address may lead to another tab
        expect(page.locator("#link button")).to_be_visible()
        # All of the page changes its language at once; what is typed or dropped before is drawn over.
        lang = pick_language(dict(parse_qsl(query.lstrip("?"))), locale)
        expect(page.locator("#captions-drop .al-drop-how")).to_have_text(text(lang, "drop.how"))
        expect(page.get_by_role("tab", name=text(lang, "evaluate.tab"), exact=True)).to_be_attached()
        return page

    yield open_page
    assert complaints == []


@pytest.fixture
def browser_context(request) -> Iterator[Callable[[], BrowserContext]]:
    """Open a context that knows nothing, in a browser that starts only where a test asks for one."""
    contexts: list[BrowserContext] = []

    def open_context() -> BrowserContext:
        contexts.append(request.getfixturevalue("browser").new_context())
        contexts[-1].set_default_timeout(SLOW)
        return contexts[-1]

    yield open_context
    for context in contexts:
        context.close()


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


@pytest.fixture(scope="session")
def large_pictures() -> Callable[[int], list[bytes]]:
    """Make many PNG files that take long to read: `large_pictures(count)`, one picture with another comment in each."""

    def make(count: int) -> list[bytes]:
        buffer = BytesIO()
        Image.new("RGB", (900, 900), (120, 90, 90)).save(buffer, "PNG")
        picture, end = buffer.getvalue()[:-12], buffer.getvalue()[-12:]
        comments = [b"tEXtComment\0%d" % number for number in range(count)]
        sizes = [struct.pack(">I", len(comment) - 4) for comment in comments]
        sums = [struct.pack(">I", zlib.crc32(comment)) for comment in comments]
        return [picture + b"".join(chunk) + end for chunk in zip(sizes, comments, sums, strict=True)]

    return make
