"""Where nothing is likely to be right, the page greys the results and says so; what has no meaning folds them away."""

from urllib.parse import quote

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from alignment.ui.strings import text

STEPS = ("fits", "may_fit", "nothing_close")


def asked(visit, query: str, lang: str = "en") -> tuple[Page, Locator]:
    page = visit(f"?tab=pictures&q={quote(query)}&lang={lang}")
    expect(page.locator("#pictures-query").get_by_role("textbox")).to_have_value(query)
    return page, page.locator("#pictures-results")


@pytest.mark.parametrize(("lang", "query"), [("en", "a plate of spaghetti"), ("zh", "一群人在沙滩上打排球")])
def test_a_caption_of_what_is_not_there_greys_the_results(visit, lang, query):
    _, results = asked(visit, query, lang)
    expect(results.get_by_role("status").locator("[data-step=nothing_close]")).to_have_text(
        text(lang, "result.nothing")
    )
    expect(results.locator(".al-far .al-card").first).to_be_visible()
    grey = results.locator(".al-thumb img").first.evaluate("node => getComputedStyle(node).filter")
    assert grey.startswith("grayscale")
    expect(results.locator("details:not(.al-alike)")).to_have_count(0)


def test_nonsense_folds_the_results(visit):
    page, results = asked(visit, "xqzt bvvk wpl")
    expect(results.get_by_role("status")).to_have_text(text("en", "result.senseless"))
    expect(results.locator(".al-card").first).to_be_hidden()
    results.locator(".al-verdict > details > summary").focus()
    page.keyboard.press("Enter")
    expect(results.locator(".al-card").first).to_be_visible()


@pytest.mark.parametrize("query", ["a red motorcycle", "一只猫"])
def test_a_caption_of_what_is_there_shows_them_with_their_verdicts(visit, query):
    _, results = asked(visit, query)
    expect(results.locator(".al-card").first).to_be_visible()
    expect(results.locator(".al-verdict, .al-far")).to_have_count(0)
    steps = results.locator(".al-card .al-step").evaluate_all("all => all.map((node) => node.dataset.step)")
    assert len(steps) == results.locator(".al-card").count()
    assert [STEPS.index(step) for step in steps] == sorted(STEPS.index(step) for step in steps)
    expect(results.get_by_role("status").locator(".al-step")).to_have_attribute("data-step", steps[0])


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_few_sample_pictures_point_to_ones_own(visit, engine, lang):
    page = visit(f"?tab=pictures&lang={lang}")
    sample = page.locator("#pictures-sample")
    expect(sample).to_contain_text(text(lang, "pictures.sample", count=len(engine.gallery.pictures)))
    sample.get_by_role("button", name=text(lang, "photos.tab")).click()
    expect(page.locator("#photos-drop")).to_be_visible()
    expect(sample).to_be_hidden()


def test_an_empty_photo_finds_no_caption(visit, tmp_path):
    Image.new("RGB", (640, 480), "white").save(tmp_path / "white.png")
    page = visit("?lang=en")
    page.locator("#captions-drop input[type=file]").set_input_files(str(tmp_path / "white.png"))
    verdict = page.locator("#captions-results .al-verdict")
    expect(verdict).to_contain_text(text("en", "result.senseless"))
    expect(page.locator("#captions-results .al-caption").first).to_be_hidden()
    page.locator("#language").get_by_text("中文").click()
    expect(verdict).to_contain_text(text("zh", "result.senseless"))
