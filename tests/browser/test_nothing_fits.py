"""Where nothing is likely to be right, the page says so and folds the least bad results away."""

from urllib.parse import quote

import pytest
from PIL import Image
from playwright.sync_api import expect

from alignment.ui.strings import text


@pytest.mark.parametrize(
    ("lang", "query"), [("en", "a plate of spaghetti"), ("zh", "一群人在沙滩上打排球"), ("en", "asdf asdf asdf")]
)
def test_a_caption_of_what_is_not_there_folds_the_results(visit, lang, query):
    page = visit(f"?tab=pictures&q={quote(query)}&lang={lang}")
    verdict = page.locator("#pictures-results .al-verdict")
    expect(verdict.locator(".al-verdict-title")).to_have_text(text(lang, "result.nothing"))
    expect(page.locator("#pictures-results .al-card").first).to_be_hidden()
    verdict.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#pictures-results .al-card").first).to_be_visible()


@pytest.mark.parametrize("query", ["a red motorcycle", "一只猫"])
def test_a_caption_of_what_is_there_shows_them(visit, query):
    page = visit(f"?tab=pictures&q={quote(query)}&lang=en")
    expect(page.locator("#pictures-query").get_by_role("textbox")).to_have_value(query)
    expect(page.locator("#pictures-results .al-card").first).to_be_visible()
    expect(page.locator("#pictures-results .al-verdict")).to_have_count(0)


def test_an_empty_photo_finds_no_caption(visit, tmp_path):
    Image.new("RGB", (640, 480), "white").save(tmp_path / "white.png")
    page = visit("?lang=en")
    page.locator("#captions-drop input[type=file]").set_input_files(str(tmp_path / "white.png"))
    verdict = page.locator("#captions-results .al-verdict")
    expect(verdict).to_contain_text(text("en", "result.senseless"))
    expect(page.locator("#captions-results .al-caption").first).to_be_hidden()
    page.locator("#language").get_by_text("中文").click()
    expect(verdict).to_contain_text(text("zh", "result.senseless"))
