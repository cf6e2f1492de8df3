"""What holds for every tab, whatever it shows: contrast and roles, one language, Chinese input, the keyboard."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from alignment.ui.strings import strings, text
from tests.browser_window import let_finish

QUALITY = (Path(__file__).parent / "quality.js").read_text("utf-8")
REFUSED = ("", "xqzv wkjh", "字" * 1001, "\n".join("一二三四五" * 14))  # nothing, nonsense, too long, too many
STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"


def tabs(page: Page) -> Iterator[tuple[str, Locator]]:
    """Open one tab after the other, each with what it shows at first; gives its name and its panel."""
    page.add_style_tag(content=STILL)
    page.evaluate(QUALITY)
    for tab in page.get_by_role("tab").all():
        tab.click()
        let_finish(page)
        panel = page.locator("[role=tabpanel]:visible")
        expect(panel.locator("[data-act], td, input, button").first).to_be_visible()
        yield tab.inner_text(), panel


def explain(page: Page) -> Locator:
    """Open the explanation of the first picture found."""
    page.get_by_role("tab").nth(1).click()
    page.locator("#pictures-results [data-act=why]:visible").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("h3").last).to_be_visible()
    return dialog


# ---------------------------------------------------------------- axe-core


def violations(page: Page, *places: Locator) -> list[str]:
    """Ask axe-core about the page or places of it; what it finds serious, with the place and the reason."""
    look = "(places) => axe.run(places.length ? { include: places } : document, { resultTypes: ['violations'] })"
    found = page.evaluate(look, [handle for place in places for handle in place.element_handles()])["violations"]
    return [
        f"{rule['id']}: {' '.join(map(str, node['target']))}: {node['failureSummary']}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


# The other pairs of theme and width are those of the next test.
@pytest.mark.parametrize(("lang", "theme", "width"), [("en", "light", 1280), ("zh", "dark", 390)])
def test_axe_finds_nothing_serious(visit, lang, theme, width):
    page = visit(f"?lang={lang}&__theme={theme}", width=width)
    page.evaluate(Axe().axe_script)
    found = [("page", wrong) for wrong in violations(page)]
    for place, (name, panel) in enumerate(tabs(page)):
        if place:  # what is around the panels stays
            found += [(name, wrong) for wrong in violations(page, page.get_by_role("tablist"), panel)]
        if folded := unfold(panel):
            found += [(f"{name}, unfolded", wrong) for wrong in violations(page, *folded)]
    found += [("dialog", wrong) for wrong in violations(page, explain(page))]
    assert found == []


@pytest.mark.parametrize(("theme", "width", "kinds"), [("light", 390, 2), ("dark", 1280, 4)])
def test_axe_finds_nothing_serious_and_no_english_where_things_went_wrong(
    visit, bad_file, tmp_path, theme, width, kinds
):
    Image.new("RGB", (1200, 10)).save(tmp_path / "窄.png")
    page = visit(f"?lang=zh&__theme={theme}", locale="zh-CN", width=width)
    page.evaluate(Axe().axe_script)
    found, english = list[str](), set[tuple[str, str]]()

    def look(kind: int, *places: Locator) -> None:
        if kind < 2:  # the others look alike
            found.extend(violations(page, *places))
        english.update(not_chinese(page))

    for _, panel in tabs(page):
        provoke(page, panel, [bad_file, tmp_path / "窄.png"][: kinds // 2], REFUSED[:kinds], look)
    assert found == []
    assert english == set()


def test_axe_would_find_what_is_wrong(visit):
    page = visit()
    page.evaluate(Axe().axe_script)
    page.evaluate("document.body.append(document.createElement('button'))")
    page.add_style_tag(content=".al-tagline { color: #ccc !important; background: #fff !important; }")
    assert {wrong.split(":")[0] for wrong in violations(page)} >= {"button-name", "color-contrast"}


# ---------------------------------------------------------------- one language

ENGLISH = re.compile(r"[A-Za-z][A-Za-z'’-]*(?: [A-Za-z][A-Za-z'’-]*){2,}")
RAW = re.compile(r"__i18n__|\{\w+\}|\bundefined\b|\bNaN\b|\[object ")


def not_chinese(page: Page) -> set[tuple[str, str]]:
    english = {sentence for sentence in strings()["en"].values() if len(sentence) > 8}  # shorter ones may be names
    keys = strings()["en"].keys()
    page.evaluate(QUALITY)
    said = [(kind, words) for kind, words in page.evaluate("quality.said()")]
    assert len(said) > 15
    return {
        (kind, words)
        for kind, words in said
        if words in english
        or (kind == "text" and any(sentence in words for sentence in english))
        or ENGLISH.search(words)
        or RAW.search(words)
        or keys & set(words.split())
    }


def test_the_rule_tells_english_from_chinese_with_names_in_it():
    assert ENGLISH.search("图片：The file is damaged")
    assert not ENGLISH.search("支持 JPEG、PNG、WebP、GIF，R@1 为 softmax 的结果，文件 my cat.jpg")
    assert RAW.search("共 {count} 张")


def test_the_chinese_page_says_nothing_in_english(visit):
    page = visit("?lang=zh", locale="zh-CN")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    explain(page)
    found = not_chinese(page)
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    for _, panel in tabs(page):
        found |= not_chinese(page)
        unfold(panel)
        found |= not_chinese(page)
    assert found == set()


def unfold(panel: Locator) -> list[Locator]:
    """Open whatever is folded away; what was opened."""
    folded = [details for details in panel.locator("details").all() if not details.evaluate("node => node.open")]
    for details in folded:
        details.evaluate("node => { node.open = true; }")
    return folded


def provoke(page: Page, panel: Locator, files: list[Any], words: Sequence[str], check: Callable[..., None]) -> None:
    """Make everything go wrong that can (files that are no pictures, words that are not searched for) and look.

    `check` gets the number of the file or word, and the places that have changed.
    """
    for drop in panel.locator("input[type=file]").all():
        for kind, file in enumerate(files, 1):
            drop.set_input_files(str(file))
            expect(panel.get_by_role("alert").first).to_be_visible()
            check(kind, drop.locator("xpath=ancestor::*[contains(@class, 'al-widget')]"))
    for box in panel.locator("input[type=text]:visible, textarea:visible").all():
        for kind, typed in enumerate(words):
            box.fill(typed)
            before = panel.inner_text()
            go(panel, box)
            expect(panel).not_to_have_text(before, use_inner_text=True)
            page.wait_for_timeout(300)  # where more follows
            check(kind, panel, page.locator(".toast-wrap"))


def go(panel: Locator, box: Locator) -> None:
    """Ask for what a box says: Enter where it is one line, else the tab's main button."""
    if box.evaluate("node => node.tagName === 'TEXTAREA' && node.rows > 1"):
        panel.locator("button.primary:visible").first.click()
    else:
        box.press("Enter")


# ---------------------------------------------------------------- Chinese input


def test_enter_inside_a_chinese_composition_searches_nothing(visit, window):
    page = visit("?lang=zh", locale="zh-CN")
    asked: list[str] = []
    joins = ("/queue/join?", "/queue/join")
    window.listen("request", lambda request: request.url.endswith(joins) and asked.append(request.url))
    keyboard = page.context.new_cdp_session(page)
    enter = {"key": "Enter", "code": "Enter"}
    boxes = 0
    for _, panel in tabs(page):
        for box in panel.locator("input[type=text]:visible, textarea:visible").all():
            if box.evaluate("node => node.tagName === 'TEXTAREA' && node.rows > 1"):
                continue  # Enter is a new line there
            boxes += 1
            box.fill("")
            asked.clear()
            keyboard.send("Input.imeSetComposition", {"text": "mao", "selectionStart": 3, "selectionEnd": 3})
            for kind in ("rawKeyDown", "keyUp"):  # 229: the input method has the key
                keyboard.send("Input.dispatchKeyEvent", {"type": kind, "windowsVirtualKeyCode": 229, **enter})
            keyboard.send("Input.insertText", {"text": "猫"})
            expect(box).to_have_value("猫")
            page.wait_for_timeout(500)
            assert asked == []
            with page.expect_request(lambda request: "/queue/join" in request.url):
                box.press("Enter")
    assert boxes >= 2


# ---------------------------------------------------------------- the keyboard


@pytest.mark.parametrize("width", [1280, 390])
def test_everything_is_reached_by_tab_and_shows_where_the_focus_is(visit, width):
    page = visit(width=width)
    missed, unframed = [], []
    for name, _ in tabs(page):
        stops = page.evaluate("quality.stops()")
        reached, without = walk(page, len(stops))
        missed += [(name, stop) for place, stop in enumerate(stops) if str(place) not in reached]
        unframed += [(name, stops[int(place)]) for place in without if place.isdigit()]
    assert missed == []
    assert unframed == []


def walk(page: Page, steps: int) -> tuple[set[str], set[str]]:
    """Press Tab from the top to the bottom: the stops that were reached, and those that looked as before."""
    page.evaluate("quality.start()")
    reached, without = set(), set()
    for _ in range(steps + 10):
        page.keyboard.press("Tab")
        stop, bare = page.evaluate("quality.step()")
        without |= {bare} - {None}
        if stop is None:
            break
        reached.add(stop)
    return reached, without


def test_the_walk_would_miss_what_cannot_be_reached_or_seen(visit):
    page = visit()
    _, panel = next(tabs(page))
    page.add_style_tag(content="#captions-examples button { outline: none !important; box-shadow: none !important; }")
    page.add_style_tag(content=".tab-container [role=tab]:focus-visible { outline-offset: 2px !important; }")
    chips = panel.locator("#captions-examples button")
    stops = page.evaluate("quality.stops()")
    chips.nth(1).evaluate("node => { node.tabIndex = -1; }")
    first, second = (int(chips.nth(place).get_attribute("data-stop") or "") for place in range(2))
    reached, without = walk(page, len(stops))
    assert str(first) in reached & without
    assert page.get_by_role("tab").nth(1).get_attribute("data-stop") in without  # the ring is there, but cut off
    assert str(second) not in reached


def test_the_dialog_keeps_the_focus_and_gives_it_back(visit):
    page = visit()
    dialog = explain(page)
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    assert page.evaluate("document.activeElement.dataset.act") == "why"


def test_results_are_found_again_after_the_language_has_changed(visit):
    page = visit()
    page.locator("#language").get_by_text("中文").click()
    expect(page.locator("#captions-results h2")).to_have_text(text("zh", "captions.results"))
    expect(page.get_by_role("tab", name=text("zh", "evaluate.tab"), exact=True)).to_be_attached()
    assert not_chinese(page) == set()
