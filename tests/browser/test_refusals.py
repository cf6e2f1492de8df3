"""What a visitor sees at a limit: a sentence in their language, and a page that goes on."""

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

import app
from alignment.server import Service, Settings
from alignment.ui.strings import text
from tests.browser_window import LOCALE, let_finish
from tests.http_client import free_port


@pytest.fixture(scope="module")
def port() -> int:
    """The same for each service of this module: the browser has compiled the scripts of this address."""
    return free_port()


@pytest.fixture
def strict(engine, window, address, port) -> Iterator[Callable[..., Page]]:
    """Open the page of a service with limits of its own: `strict(rate=10, locale="zh-CN")`."""
    open_now = []

    def start(locale: str = LOCALE, **settings) -> Page:
        page = app.build_page(engine, "en")
        open_now.append(page)
        options = app.launch_options(engine, Service(Settings(**settings)))
        _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", server_port=port, **options)
        tab = window.open(url, locale)
        expect(tab.locator("#link button")).to_be_visible()
        return tab

    yield start
    window.forget()  # or the service would wait for its streams to end
    for page in open_now:
        page.close()


def use_up_the_rate(page: Page) -> None:
    page.evaluate("() => Promise.all([...Array(12)].map(() => fetch('config')))")


@pytest.mark.parametrize(("locale", "said"), [("en-US", "Too many requests from your address"), ("zh-CN", "请求太多")])
def test_who_searches_too_often_reads_why_in_their_language(strict, locale, said):
    page = strict(locale, rate=12)
    expect(page.locator("html")).to_have_attribute("lang", locale if locale == "zh-CN" else "en")
    page.locator("[role=tab]").nth(1).click()
    let_finish(page)
    page.locator("#pictures-query textarea, #pictures-query input").fill("a cat")
    use_up_the_rate(page)
    page.locator("#pictures-search").click()
    expect(page.locator(".toast-body").first).to_contain_text(said)


def test_a_picture_that_is_refused_says_so_and_the_place_for_files_goes_on(strict, picture):
    page = strict(client_mb=0.001)
    drop = page.locator("#captions-drop")
    drop.locator("input[type=file]").set_input_files(picture("coffee"))
    expect(drop).to_contain_text("There are too many files from your address waiting; try again soon.")
    expect(drop).not_to_contain_text(text("en", "drop.busy"))


def test_an_event_that_is_refused_does_not_leave_the_place_for_files_waiting(strict, picture):
    page = strict(rate=12)
    drop = page.locator("#captions-drop")
    use_up_the_rate(page)
    drop.locator("input[type=file]").set_input_files(picture("coffee"))
    expect(page.locator(".toast-body").first).to_contain_text("Too many requests from your address")
    expect(drop).not_to_contain_text(text("en", "drop.busy"))
