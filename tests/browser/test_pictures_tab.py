import json
import re

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from alignment.ui.strings import text
from tests.browser_window import files_in, open_tab

PARTS = "#pictures-composer .al-part"


@pytest.fixture
def composer(visit):
    """Open the tab: `composer(lang)`."""

    def open_composer(lang: str = "en", **options) -> Page:
        page = visit(f"?lang={lang}", **options)
        open_tab(page, "pictures", lang)
        expect(page.locator("#pictures-results li").first).to_be_visible()
        return page

    return open_composer


def box(page: Page):
    return page.locator("#pictures-query").get_by_role("textbox")


def search(page: Page, query: str) -> None:
    box(page).fill(query)
    expect(box(page)).to_have_value(query)
    box(page).press("Enter")


def parts(page: Page) -> list[str]:
    return page.locator(f"{PARTS} > .al-hidden").all_inner_texts()


def first_result(page: Page):
    return page.locator("#pictures-results .al-card img").first


def shows(page: Page, id: str) -> None:
    expect(first_result(page)).to_have_attribute("src", re.compile(f"thumbnails/{id}.webp"))


def test_a_query_in_parts_is_shown_as_it_was_read_and_changed_by_its_buttons(composer):
    page = composer()
    expect(page.locator(PARTS)).to_have_count(0)  # the page stays calm for one caption
    search(page, "a cheetah + 2 x running")
    expect(page.locator(PARTS)).to_have_count(2)
    assert parts(page) == ["Plus: a cheetah 1×", "Plus: running 2×"]
    shows(page, "cheetah-running")
    expect(page.locator("#pictures-results .al-note")).to_have_text(text("en", "result.meaning.composed"))

    page.get_by_role("button", name=text("en", "pictures.term.avoid", name="running")).click()
    expect(box(page)).to_have_value("a cheetah - 2 x running")
    shows(page, "cheetah-(cub|face)")
    page.get_by_role("button", name=text("en", "pictures.term.less", name="running")).press("Enter")
    expect(box(page)).to_have_value("a cheetah - 1.5 x running")
    expect(page.get_by_role("button", name=text("en", "pictures.term.less", name="running"))).to_be_focused()
    page.get_by_role("button", name=text("en", "pictures.term.remove", name="running")).click()
    expect(box(page)).to_have_value("a cheetah")
    expect(page.locator(PARTS)).to_have_count(0)


def test_results_can_be_asked_for_more_or_less_of_their_kind(composer):
    page = composer()
    search(page, "a cheetah")
    shows(page, "cheetah-running")
    page.locator("#pictures-results button[data-act=more][data-id=cheetah-face]").click()
    expect(page.locator(f"{PARTS} img")).to_have_count(1)
    expect(page.locator("#pictures-results button[data-id=cheetah-face]")).to_have_count(0)  # not itself
    shows(page, "cheetah-(cub|running)")
    page.locator("#pictures-results button[data-act=less][data-id=cheetah-cub]").click()
    expect(page.locator(PARTS)).to_have_count(3)
    expect(page.locator(f"{PARTS}.al-minus img")).to_have_count(1)
    box(page).fill("")
    page.locator("#pictures-search").click()
    expect(page.locator(PARTS)).to_have_count(2)
    expect(page.locator("#pictures-results button[data-act=why]")).to_have_count(0)  # no words to explain
    expect(page.locator("#pictures-results .al-note")).to_have_text(text("en", "result.meaning.pictures"))
    while page.locator(PARTS).count():
        before = page.locator(PARTS).count()
        page.locator(f"{PARTS} button[data-act=remove]").first.click()
        expect(page.locator(PARTS)).to_have_count(before - 1)
    expect(page.locator("#pictures-results [role=alert]")).to_have_text(text("en", "error.caption.empty"))


def test_a_picture_of_ones_own_joins_the_query_by_button_and_by_drop(composer, picture, bad_file, uploads):
    page = composer("zh")
    search(page, "一张脸")
    page.locator("#pictures-drop input[type=file]").set_input_files(str(bad_file))
    expect(page.locator("#pictures-drop [role=alert]")).to_contain_text(text("zh", "error.image.not_an_image"))
    page.locator("#pictures-drop input[type=file]").set_input_files(str(picture("cheetah-face")))
    expect(page.locator(f"{PARTS} img")).to_have_count(1)
    expect(page.locator("#pictures-drop [role=alert]")).to_have_count(0)
    assert parts(page) == ["加上：一张脸 1×", f"加上：{picture('cheetah-face').name} 1×"]
    shows(page, "cheetah-face")  # the visitor's own: the gallery may have it
    page.evaluate(
        """async () => {
            const blob = await (await fetch("thumbnails/coffee.webp")).blob();
            const data = new DataTransfer();
            data.items.add(new File([blob], "dropped.webp", { type: "image/webp" }));
            const place = document.querySelector("#pictures-results");
            for (const kind of ["dragover", "drop"])
                place.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
        }"""
    )
    expect(page.locator(f"{PARTS} img")).to_have_count(2)
    assert "加上：dropped.webp 1×" in parts(page)
    assert files_in(uploads) == []


def test_the_query_and_its_parts_survive_a_change_of_language(composer):
    page = composer()
    search(page, "a cheetah - running")
    expect(page.locator(PARTS)).to_have_count(2)
    page.locator("#pictures-results button[data-act=more][data-id=lion]").click()
    expect(page.locator(PARTS)).to_have_count(3)
    page.locator("#language").get_by_text("中文").click()
    expect(page.locator(f"{PARTS} > .al-hidden").first).to_have_text("加上：a cheetah 1×")
    expect(page.locator(PARTS)).to_have_count(3)
    expect(box(page)).to_have_value("a cheetah - running")
    expect(page.locator("#pictures-help summary")).to_have_text(text("zh", "pictures.help"))


def test_a_query_that_makes_no_sense_is_answered_in_words(composer):
    page, values = composer("zh"), {"limit": 8, "count": 9, "low": "0.1", "high": "10"}
    for query, code in (("- a cat", "only_minus"), (" + ".join("abcdefghi"), "too_many"), ("0 x a cat", "weight")):
        search(page, query)
        expect(page.locator("#pictures-results [role=alert]")).to_have_text(text("zh", f"error.query.{code}", **values))


def test_nonsense_in_a_query_is_named(composer):
    page = composer()
    search(page, "a cat + xqzt bvvk wpl")
    expect(page.locator("#pictures-results .al-verdict")).to_contain_text("“xqzt bvvk wpl” says nothing")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_help_shows_by_example(composer, lang):
    page = composer(lang)
    page.locator("#pictures-help summary").click()
    page.locator("#pictures-help button").nth(1).click()
    expect(box(page)).to_have_value(text(lang, "pictures.help.without.query"))
    shows(page, "cheetah-face")
    expect(page.locator("#pictures-help details")).to_have_attribute("open", "")


def test_why_explains_the_first_caption_that_is_wanted(composer):
    page = composer()
    search(page, "- running + a cheetah")
    shows(page, "cheetah-face")
    page.locator("#pictures-results button[data-act=why]").first.click()
    dialog = page.locator("#explanation dialog")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text("cheetah")
    expect(dialog).not_to_contain_text("running")


def test_a_chinese_input_method_never_fires_a_search_half_way(composer, window):
    page = composer("zh")
    before = first_result(page).get_attribute("src")
    joined = []
    window.listen("request", lambda request: "queue/join" in request.url and joined.append(request.post_data))
    box(page).fill("")
    client = page.context.new_cdp_session(page)
    for letters in ("k", "ka", "kafei"):
        client.send(
            "Input.imeSetComposition", {"text": letters, "selectionStart": len(letters), "selectionEnd": len(letters)}
        )
    # What a browser sends for the Enter that takes the letters over: key code 229 while composing.
    enter = {"key": "Process", "code": "Enter", "windowsVirtualKeyCode": 229, "nativeVirtualKeyCode": 229}
    client.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
    client.send("Input.dispatchKeyEvent", {"type": "keyUp", **enter, "key": "Enter"})
    client.send("Input.insertText", {"text": "一杯咖啡"})
    box(page).evaluate(
        """(node) => {
            const enter = { key: "Enter", code: "Enter", keyCode: 229, isComposing: true, bubbles: true };
            for (const kind of ["keydown", "keypress", "keyup"]) node.dispatchEvent(new KeyboardEvent(kind, enter));
        }"""
    )
    page.wait_for_timeout(500)
    expect(box(page)).to_have_value("一杯咖啡")
    assert [json.loads(data or "{}").get("data") for data in joined] == []
    assert first_result(page).get_attribute("src") == before
    box(page).press("Enter")
    shows(page, "coffee")
    assert len(joined) == 1


def test_pictures_that_are_nearly_the_same_are_folded_and_open_in_place(visit, picture, tmp_path):
    image = Image.open(picture("cat")).convert("RGB")
    width, height = image.size
    image.save(tmp_path / "again.jpg", quality=40)
    image.crop((width // 20, height // 20, width - width // 20, height - height // 20)).save(tmp_path / "cropped.png")
    page = visit()
    open_tab(page, "photos")
    files = [picture("cat"), tmp_path / "again.jpg", tmp_path / "cropped.png", picture("coffee")]
    page.locator("#photos-drop input[type=file]").set_input_files([str(file) for file in files])
    expect(page.locator("#photos-results .al-card")).to_have_count(2)
    query = page.locator("#photos-query").get_by_role("textbox")
    query.fill("a cat")
    query.press("Enter")
    card = page.locator("#photos-results .al-card").first
    expect(card.locator("summary")).to_have_text("+2 nearly the same")
    expect(card.locator(".al-alike img").first).to_be_hidden()
    page.wait_for_timeout(1000)  # a late answer draws the results anew, and closes what is open
    card.locator("summary").press("Enter")
    expect(card.locator(".al-alike img")).to_have_count(2)
    expect(card.locator(".al-alike img").first).to_be_visible()
