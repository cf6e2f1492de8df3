"""A browser's window that one test after the other uses, and what tests of the page do in it."""

import os
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from alignment.ui.strings import text

LOCALE = "en-US"
SLOW = 30_000  # milliseconds; the machine may be busy


def open_tab(page: Page, key: str, lang: str = "en") -> None:
    """Open a tab by its key, and let Gradio finish it."""
    page.get_by_role("tab", name=text(lang, f"{key}.tab"), exact=True).click()
    let_finish(page)


def let_finish(page: Page) -> None:
    """Wait until the open tab's boxes keep what is typed: some 70 ms after they appear, Gradio sets them once more."""
    expect(page.locator("[role=tabpanel]:visible .al-root").first).to_be_attached()
    page.evaluate("() => new Promise((done) => setTimeout(() => requestIdleCallback(() => done()), 100))")


def files_in(folder: Path) -> list[Path]:
    """List the files below a folder, in which others may be deleted meanwhile."""
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]


class Window:
    """A page of the profile that one test after the other uses: a new one starts a process and reads every script."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self._session = page.context.new_cdp_session(page)
        self._agent = page.evaluate("navigator.userAgent")
        self._listeners: list[tuple[str, Callable[..., object]]] = []

    def listen(self, event: str, handler: Callable[..., object]) -> None:
        """Let a handler hear an event of the page until the test is over."""
        self.page.on(event, handler)
        self._listeners.append((event, handler))

    def open(self, url: str, locale: str = LOCALE, width: int = 1280, height: int = 900) -> Page:
        """Load an address as a browser with this language and size does."""
        self._session.send("Emulation.setLocaleOverride", {"locale": locale})
        agent = {"userAgent": self._agent, "acceptLanguage": locale}
        self._session.send("Emulation.setUserAgentOverride", agent)
        self.page.bring_to_front()  # one behind another is not drawn
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.goto(url)
        return self.page

    def forget(self) -> None:
        """Leave the page, and delete what it has left: all but files of the server and compiled scripts."""
        for event, handler in self._listeners:
            self.page.remove_listener(event, handler)
        self._listeners.clear()
        self.page.unroute_all()
        kept = "cookies,local_storage,indexeddb,service_workers,cache_storage,file_systems"
        if self.page.url.startswith("http"):
            self.page.evaluate("sessionStorage.clear()")
            origin = self.page.evaluate("location.origin")
            self.page.goto("about:blank")
            self._session.send("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": kept})
        self.page.mouse.move(0, 0)  # nothing of the next page is under it
        self.page.context.clear_cookies()
        self.page.context.clear_permissions()
