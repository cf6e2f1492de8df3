import re

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from alignment.ui.examples import DESCRIBED
from alignment.ui.strings import text
from tests.browser_window import files_in, open_tab

TABS = ("captions", "pictures", "matrix", "photos", "evaluate")


def show_tab(page: Page, key: str, lang: str = "en") -> None:
    open_tab(page, key, lang)
    expect(page.locator(f"#{key}-{'table td' if key == 'matrix' else 'results li'}").first).to_be_visible()


def drop(page: Page, key: str, *files) -> None:
    page.locator(f"#{key}-drop input[type=file]").set_input_files([str(file) for file in files])


def ranked(page: Page, key: str) -> list[str]:
    return page.locator(f"#{key}-results li .al-text").all_inner_texts()


def search(page: Page, key: str, caption: str) -> None:
    box = page.locator(f"#{key}-query").get_by_role("textbox")
    box.fill(caption)
    box.press("Enter")


# ---------------------------------------------------------------- first look


@pytest.mark.parametrize(("lang", "locale"), [("en", "en-US"), ("zh", "zh-CN")])
def test_every_tab_opens_with_a_worked_example_in_the_browsers_language(visit, lang, locale):
    page = visit(locale=locale)
    expect(page).to_have_title(text(lang, "title"))
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN" if lang == "zh" else "en")
    for key in TABS:
        show_tab(page, key, lang)
    expect(page.locator("#photos-results h2")).to_have_text(text(lang, "pictures.results"))


def test_results_show_rank_bar_cosine_and_probability_with_its_meaning(visit):
    page = visit()
    first = page.locator("#captions-results li").first
    expect(first.locator(".al-rank")).to_contain_text("1")
    expect(first.locator(".al-bar > span")).to_have_attribute("style", re.compile("width: 100"))
    assert re.fullmatch(r"-?\d\.\d{3}", first.locator("dd").nth(1).inner_text())
    assert re.fullmatch(r"[<>]?\d+\.\d %", first.locator("dd").nth(0).inner_text())
    expect(page.locator("#captions-results .al-note")).to_contain_text(first.locator("dd").nth(0).inner_text())


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_sticks_out_on_a_phone(visit, lang, dark):
    page = visit(f"?lang={lang}&__theme={'dark' if dark else 'light'}", width=390, height=844)
    expect(page.get_by_role("tab")).to_have_count(5)  # none is hidden in a menu
    for key in TABS:
        show_tab(page, key, lang)
        widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert widths[0] <= widths[1], (key, widths)
    dark_body = page.evaluate("document.body.classList.contains('dark')")
    assert dark_body == dark


def test_the_grids_show_thumbnails_not_originals(visit):
    page = visit()
    show_tab(page, "pictures")
    image = page.locator("#pictures-results img").first
    expect(image).to_have_js_property("complete", True)
    assert 0 < image.evaluate("node => Math.max(node.naturalWidth, node.naturalHeight)") <= 320


def test_the_page_does_not_say_where_anything_lies_on_the_server(visit, engine):
    page = visit()
    for key in TABS:
        show_tab(page, key)
    html = page.content()
    for picture in engine.gallery.pictures:
        assert str(picture.path) not in html


# ---------------------------------------------------------------- image to captions


def test_a_photo_of_a_cat_finds_captions_about_cats(visit, picture, uploads):
    page = visit()
    drop(page, "captions", picture("cat"))
    expect(page.locator("#captions-drop img")).to_have_attribute("alt", re.compile(picture("cat").name))
    captions = page.locator("#captions-results .al-words p").all_text_contents()
    assert any("cat" in caption.lower() for caption in captions[:5]), captions
    assert files_in(uploads) == []  # nothing stays


def test_a_picture_is_read_as_a_person_sees_it(visit, picture, tmp_path):
    upright = Image.open(picture("coffee")).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    upright.transpose(Image.Transpose.ROTATE_90).convert("CMYK").save(tmp_path / "turned.jpg", exif=exif)
    page = visit()
    drop(page, "captions", tmp_path / "turned.jpg")
    image = page.locator("#captions-drop img")
    expect(image).to_have_attribute("alt", re.compile("turned.jpg"))
    expect(image).to_have_js_property("naturalWidth", 600)
    captions = page.locator("#captions-results .al-words p").all_text_contents()
    assert any(word in " ".join(captions[:5]).lower() for word in ("coffee", "cup", "espresso", "tea")), captions


def test_a_bad_file_is_named_and_the_page_goes_on(visit, bad_file, picture):
    page = visit()
    drop(page, "captions", bad_file)
    problem = page.locator("#captions-drop [role=alert]")
    expect(problem).to_have_text(f"notes.jpg: {text('en', 'error.image.not_an_image')}")
    expect(page.locator("#captions-results .al-words")).to_have_count(10)
    page.locator("#language").get_by_text("中文").click()
    expect(problem).to_have_text(f"notes.jpg: {text('zh', 'error.image.not_an_image')}")
    drop(page, "captions", bad_file)  # the same file again is judged again
    expect(problem).to_be_visible()
    drop(page, "captions", picture("coffee"))
    expect(problem).to_have_count(0)
    expect(page.locator("#captions-drop img")).to_have_attribute("alt", re.compile(picture("coffee").name))


def test_an_example_is_one_click_away_also_by_keyboard(visit):
    page = visit()
    page.locator("#captions-examples button").first.focus()
    page.keyboard.press("Enter")
    name = text("en", f"example.query.{DESCRIBED[0]}")
    expect(page.locator("#captions-drop img")).to_have_attribute("alt", re.compile(name))


def test_a_pasted_picture_is_taken(visit, picture):
    page = visit()
    page.evaluate(
        """async (url) => {
            const blob = await (await fetch(url)).blob();
            const data = new DataTransfer();
            data.items.add(new File([blob], "pasted.webp", { type: "image/webp" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        }""",
        "thumbnails/coffee.webp",
    )
    expect(page.locator("#captions-drop img")).to_have_attribute("alt", re.compile("pasted.webp"))


# ---------------------------------------------------------------- caption to images


def test_a_caption_in_either_language_finds_the_picture(visit):
    page = visit()
    show_tab(page, "pictures")
    for query, found in (("一杯咖啡", "espresso"), ("a red motorcycle", "motorcycle")):
        before = ranked(page, "pictures")
        search(page, "pictures", query)
        expect(page.locator("#pictures-results li .al-text").first).to_contain_text(found)
        assert ranked(page, "pictures") != before


def test_an_empty_caption_is_answered_in_words(visit):
    page = visit("?lang=zh")
    show_tab(page, "pictures", "zh")
    search(page, "pictures", "   ")
    expect(page.locator("#pictures-results [role=alert]")).to_have_text(text("zh", "error.caption.empty"))
    page.locator("#pictures-examples button").first.click()
    expect(page.locator("#pictures-results li")).to_have_count(12)


# ---------------------------------------------------------------- languages


def test_switching_the_language_keeps_the_state(visit, picture):
    page = visit("?lang=en", locale="zh-CN")
    drop(page, "captions", picture("rocket"))
    expect(page.locator("#captions-drop img")).to_have_attribute("alt", re.compile(picture("rocket").name))
    show_tab(page, "pictures")
    search(page, "pictures", "a cheetah of my own choosing")
    expect(page.locator("#pictures-results li .al-text").first).to_contain_text("cheetah")
    order = [
        image.split("?")[0]
        for image in page.locator("#pictures-results img").evaluate_all("all => all.map(i => i.src)")
    ]

    page.locator("#language").get_by_text("中文").click()
    expect(page.locator("#pictures-results h2")).to_have_text(text("zh", "pictures.results"))
    expect(page.locator("#pictures-query").get_by_role("textbox")).to_have_value("a cheetah of my own choosing")
    after = page.locator("#pictures-results img").evaluate_all("all => all.map(i => i.src)")
    assert [image.split("?")[0] for image in after] == order
    open_tab(page, "captions", "zh")
    expect(page.locator("#captions-drop img")).to_have_attribute("alt", re.compile(picture("rocket").name))
    expect(page.locator("#captions-results li p[lang=zh]")).to_have_count(10)


def test_all_of_the_page_changes_its_language_at_once(visit, window):
    page = visit("?lang=en", locale="zh-CN")
    posted: list[str] = []
    window.listen("request", lambda request: request.method == "POST" and posted.append(request.url))
    page.locator("#language").get_by_text("中文").click()
    for key in TABS:
        show_tab(page, key, "zh")
    assert len(posted) == 1, posted
