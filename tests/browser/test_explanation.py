""" "Why this match", opened from the tabs as a person would."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from alignment.ui.examples import DESCRIBED
from alignment.ui.strings import text


def why(page: Page, example: int, lang: str = "en", place: int = 0) -> Locator:
    """Ask for an example picture's captions and find a button "Why?"."""
    before = page.locator("#captions-drop img").get_attribute("src")
    page.locator("#captions-examples button").nth(example).click()
    if example:
        expect(page.locator("#captions-drop img")).not_to_have_attribute("src", before or "")
    button = page.locator("#captions-results [data-act=why]").nth(place)
    expect(button).to_have_text(text(lang, "result.why"))
    return button


def dialog(page: Page, lang: str = "en") -> Locator:
    return page.get_by_role("dialog", name=text(lang, "explain.title"))


def explained(page: Page, lang: str = "en") -> Locator:
    shown = dialog(page, lang)
    expect(shown.locator(".al-explain-overlay")).to_be_visible()
    return shown


def test_a_click_opens_words_picture_and_scale(visit):
    page = visit()
    button = why(page, 1)
    row = page.locator("#captions-results li").first
    caption, cosine = row.locator("p").inner_text(), row.locator("dd").nth(1).inner_text()
    button.click()
    shown = explained(page)
    words = [word.inner_text().split("\n")[0] for word in shown.locator(".al-weighed").all()]
    assert [word.lower() for word in words] == re.findall(r"[\w'’-]+", caption.lower())
    numbers = shown.locator(".al-weighed small").all_inner_texts()
    assert all(re.fullmatch(r"[+−]\d\.\d{3}|0\.000", number) for number in numbers), numbers
    expect(shown.locator(".al-axis-pair")).to_contain_text(cosine)
    for image in shown.locator(".al-explain-photo img").all():
        expect(image).to_have_js_property("complete", True)
        assert image.evaluate("node => node.naturalWidth") >= 300
    image = shown.locator(".al-explain-photo img").first
    expect(image).to_have_attribute(
        "alt", text("en", "explain.picture", name=text("en", f"example.query.{DESCRIBED[1]}"))
    )


def test_escape_closes_and_the_focus_returns_by_keyboard_alone(visit):
    page = visit()
    button = why(page, 1, place=1)
    button.focus()
    page.keyboard.press("Enter")
    shown = explained(page)
    expect(shown.get_by_role("button", name=text("en", "explain.close"))).to_be_focused()
    page.keyboard.press("Tab")
    slider = shown.get_by_role("slider", name=text("en", "explain.places.slider"))
    expect(slider).to_be_focused()
    page.keyboard.press("Home")
    expect(shown.locator(".al-explain-overlay")).to_have_css("opacity", "0")
    page.keyboard.press("End")
    expect(shown.locator(".al-explain-overlay")).to_have_css("opacity", "1")
    page.keyboard.press("Escape")
    expect(shown).to_be_hidden()
    expect(button).to_be_focused()


def test_another_result_opens_another_explanation_and_the_button_closes_it(visit):
    page = visit()
    why(page, 1).click()
    first = explained(page).locator(".al-explain-terms").inner_text()
    dialog(page).get_by_role("button", name=text("en", "explain.close")).click()
    expect(dialog(page)).to_be_hidden()
    page.locator("#captions-results [data-act=why]").nth(2).click()
    expect(explained(page).locator(".al-explain-terms")).not_to_have_text(first)
    page.mouse.click(5, 5)  # beside it
    expect(dialog(page)).to_be_hidden()


def test_an_uploaded_picture_is_explained_and_goes_by_its_name(visit, picture):
    page = visit()
    page.locator("#captions-drop input[type=file]").set_input_files(str(picture("rocket")))
    expect(page.locator("#captions-drop img")).to_have_attribute("alt", re.compile(picture("rocket").name))
    page.locator("#captions-results [data-act=why]").first.evaluate("node => node.click()")
    image = explained(page).locator(".al-explain-photo img").first
    expect(image).to_have_attribute("alt", re.compile(re.escape(picture("rocket").name)))


def test_the_dialog_speaks_chinese_and_changes_its_language_while_it_is_open(visit):
    page = visit("?lang=zh")
    expect(page.locator("#captions-results h2")).to_have_text(text("zh", "captions.results"))
    why(page, 1, "zh").click()
    shown = explained(page, "zh")
    words = shown.inner_text()
    assert not re.search(r"[A-Za-z]{2,}", words), words
    terms = shown.locator(".al-weighed > span:first-child").all_inner_texts()
    assert len(terms) >= 3
    assert all(re.search("[\u4e00-\u9fff]", term) for term in terms), terms
    page.locator("#language input[value=en]").evaluate("node => node.click()")
    expect(explained(page, "en").locator(".al-explain-terms")).to_contain_text(terms[0])
    page.keyboard.press("Escape")
    expect(dialog(page)).to_be_hidden()
    expect(page.locator("#captions-results [data-act=why]").first).to_have_text(text("en", "result.why"))


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_phone_shows_it_over_the_full_width(visit, lang):
    page = visit(f"?lang={lang}", width=390, height=844)
    expect(page.locator("#captions-results h2")).to_have_text(text(lang, "captions.results"))
    why(page, 1, lang).click()
    shown = explained(page, lang)
    box = shown.bounding_box()
    assert box
    assert (box["x"], box["width"]) == (0, 390)
    assert shown.evaluate("node => node.scrollWidth <= node.clientWidth")
    for part in (".al-explain-photo", ".al-explain-terms", ".al-axis-pair", ".al-axis-unrelated"):
        part_box = shown.locator(part).bounding_box()
        assert part_box
        assert part_box["x"] >= 0
        assert part_box["x"] + part_box["width"] <= 390
