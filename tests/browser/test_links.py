"""An address opens what a visitor saw, and the button makes such an address."""

from urllib.parse import parse_qs, quote, urlsplit

import pytest
from playwright.sync_api import Page, expect

from alignment.ui.strings import text
from tests.browser_window import open_tab


def copied(page: Page, lang: str) -> dict[str, str]:
    """Press the button and take the link apart."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#link button").click()
    expect(page.locator("#link button")).to_have_text(text(lang, "link.copied"))
    parts = urlsplit(page.evaluate("navigator.clipboard.readText()"))
    return {key: values[0] for key, values in parse_qs(parts.query).items()}


@pytest.mark.parametrize(
    ("tab", "asked", "lang", "where", "shown"),
    [
        ("pictures", "a red motorcycle", "en", "#pictures-results .al-text", "motorcycle"),
        ("pictures", "一只猫", "zh", "#pictures-results .al-text", "猫"),
        ("photos", "lions & other cats", "en", "#photos-results .al-text", "lion"),
        ("matrix", "一只猫\na dog", "zh", "#matrix-table tbody th", "一只猫"),
        ("captions", "lion", "en", "#captions-results .al-words p", "lion"),
        ("evaluate", "", "zh", "#evaluate-report", text("zh", "evaluate.tab")),
    ],
)
def test_an_address_opens_the_tab_asks_the_question_and_can_be_copied_again(visit, tab, asked, lang, where, shown):
    page = visit(f"?tab={tab}&q={quote(asked)}&lang={lang}", locale="fr-FR")
    expect(page.get_by_role("tab", name=text(lang, f"{tab}.tab"))).to_have_attribute("aria-selected", "true")
    if tab != "evaluate":
        page.locator(where).filter(has_text=shown).first.wait_for(state="attached")
    expected = {"tab": tab, "lang": lang, **({"q": asked} if asked else {})}
    assert copied(page, lang) == expected


def test_what_was_typed_is_in_the_link(visit):
    page = visit("?lang=en")
    open_tab(page, "pictures")
    box = page.locator("#pictures-query").get_by_role("textbox")
    box.fill("2 x cat - dog")
    box.press("Enter")
    assert copied(page, "en") == {"tab": "pictures", "lang": "en", "q": "2 x cat - dog"}


@pytest.mark.parametrize(
    "query", ["?tab=nonsense&q=x&lang=en", "?tab=captions&q=no-such-picture&lang=en", "?lang=en&q="]
)
def test_an_address_that_leads_nowhere_shows_the_page_as_it_is(visit, query):
    page = visit(query)
    expect(page.get_by_role("tab", name=text("en", "captions.tab"))).to_have_attribute("aria-selected", "true")
    expect(page.locator("#captions-results h2")).to_have_text(text("en", "captions.results"))


def test_markup_in_an_address_is_text(visit):
    wicked = '<img src=x onerror="window.hit=1"> ${window.hit=1}'
    page = visit(f"?tab=matrix&q={quote(wicked)}&lang=en")
    expect(page.locator("#matrix-table tbody th")).to_have_text([wicked])
    assert page.evaluate("window.hit") is None


def test_where_the_clipboard_is_closed_the_link_can_be_copied_by_hand(visit):
    page = visit("?lang=en")
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    page.locator("#link button").click()
    box = page.locator("#link input")
    expect(box).to_be_visible()
    assert "tab=captions" in box.input_value()
    expect(box).to_have_attribute("aria-label", text("en", "link.by_hand"))
