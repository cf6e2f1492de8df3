"""Markup, template syntax and marks that turn text round, put wherever a visitor can put text: shown, and never run."""

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Page, Request, expect

from alignment.ui.strings import text
from tests.browser_window import open_tab

RUN = "window.__ran=1"
PAYLOADS = {
    "image": f"<img src=hostile-probe onerror={RUN}>",
    "script": f"<script>{RUN}</script><script src=hostile-probe></script>",
    "svg": f"'\"><svg onload={RUN}><iframe srcdoc='<script>parent.__ran=1</script>'>",
    "literal": f"${{{RUN}}}`${{{RUN}}}`\\${{{RUN}}}",
    "handlebars": f"{{{{{RUN}}}}}{{{{#with constructor}}}}<%{RUN}%>",
    "link": f"[x](javascript:{RUN})![y](hostile-probe)<a href=javascript:{RUN}>z</a>",
    "style": "<style>@import 'hostile-probe';*{display:none}</style><link rel=stylesheet href=hostile-probe>",
    "alert": "<details open ontoggle=alert(1)><marquee onstart=alert(2)>",
}
NAME = f"<img src=hostile-probe onerror={RUN}>${{{RUN}}}{{{{x}}}}.png"  # of a file
ASK = f"<img src=hostile-probe onerror={RUN}>${{{RUN}}}{{{{x}}}}"
SLOW = 30_000  # milliseconds; the first explanation takes longest
FORMULAS = ("=1+cmd|'/C calc'!A0", "+1+1", "-1+1", "@SUM(1)", "＝1+1", " =1+1", '"=1+1', "\t=1+1")
HEBREW = "שלום עולם 123"
TURNING = "a\u202egnp.exe\u2066\u200fb"


@pytest.fixture
def watched(visit, window) -> Iterator[Callable[..., Page]]:
    """Open the page as `visit` does; whatever runs, asks for something, or turns text round, is noticed at the end."""
    pages, seen = [], []

    def note(request: Request) -> None:
        if "hostile-probe" in urlsplit(request.url).path:
            seen.append(request.url)

    def open_page(query: str = "", **options) -> Page:
        page = visit(query, **options)
        window.listen("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
        window.listen("request", note)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.wait_for_timeout(100)
        assert page.evaluate("window.__ran") is None
        assert page.locator("[onerror], [onload], [src='hostile-probe'], iframe, marquee").count() == 0
        shown = page.evaluate("document.body.innerText + document.body.innerHTML")
        assert not re.search("[\u202a-\u202e\u2066-\u2069]", shown)
    assert seen == []


def photo(name: str, colour: str = "teal") -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (80, 60), colour).save(buffer, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}


def drop(page: Page, key: str, *files: dict) -> None:
    page.locator(f"#{key}-drop input[type=file]").set_input_files(list(files))


def search(page: Page, key: str, query: str) -> None:
    box = page.locator(f"#{key}-query").get_by_role("textbox")
    box.fill(query)
    box.press("Enter")


def test_a_query_is_text(watched):
    page = watched()
    open_tab(page, "pictures")
    for hostile in PAYLOADS.values():
        search(page, "pictures", f"2 x {hostile} + dog")
        expect(page.locator("#pictures-composer .al-part-name").first).to_have_text(hostile)
    for summary in page.locator("#pictures-results .al-verdict summary").all():
        summary.click()
    page.locator("#pictures-results [data-act=why]").first.click()
    expect(page.get_by_role("dialog").locator(".al-explain-body")).to_contain_text("ontoggle")


def test_captions_of_the_matrix_are_text(watched):
    page = watched()
    open_tab(page, "matrix")
    page.locator("#matrix-captions textarea").fill("\n".join(PAYLOADS.values()))
    page.locator("#matrix-compare").click()
    expect(page.locator("#matrix-table tbody th")).to_have_text(list(PAYLOADS.values()))
    page.locator("#matrix-table .al-cell").first.hover()
    expect(page.locator("#matrix-table .al-detail-caption")).to_have_text(PAYLOADS["image"])
    with page.expect_download() as waiting:
        page.locator("#matrix-table [data-tool=png]").click()
    assert re.fullmatch(r"[\w-]+\.png", waiting.value.suggested_filename)
    page.locator("#matrix-table .al-cell").first.click()
    shown = page.get_by_role("dialog")
    expect(shown.locator(".al-explain-overlay")).to_be_visible(timeout=4 * SLOW)
    expect(shown.locator(".al-explain-terms")).to_contain_text("onerror")


def test_names_of_files_are_text_on_every_tab(watched):
    lang = "zh"
    page, bad = watched(f"?lang={lang}"), {"name": NAME, "mimeType": "image/png", "buffer": b"no picture"}
    drop(page, "captions", bad)
    expect(page.locator("#captions-drop .al-problem")).to_contain_text(NAME)
    drop(page, "captions", photo(NAME))
    expect(page.locator("#captions-drop img")).to_have_attribute("alt", re.compile(re.escape(NAME)))
    page.locator("#captions-results [data-act=why]").first.wait_for(state="attached")
    open_tab(page, "pictures", lang)
    drop(page, "pictures", bad)
    expect(page.locator("#pictures-drop .al-problem")).to_contain_text(NAME)
    drop(page, "pictures", photo(NAME))
    expect(page.locator("#pictures-composer img").first).to_have_attribute("title", NAME)
    open_tab(page, "matrix", lang)
    drop(page, "matrix", bad, photo(NAME))
    expect(page.locator("#matrix-drop .al-problem strong")).to_have_text(NAME)
    expect(page.locator("#matrix-table thead img")).to_have_attribute("alt", NAME)
    open_tab(page, "photos", lang)
    drop(page, "photos", bad, photo(NAME), photo("b.png", "red"))
    expect(page.locator("#photos-drop .al-problem strong")).to_have_text(NAME)
    for summary in page.locator("#photos-results .al-verdict summary").all():
        summary.click()
    expect(page.locator("#photos-results .al-text", has_text=NAME)).to_be_attached()
    open_tab(page, "evaluate", lang)
    drop(page, "evaluate", {**bad, "name": NAME + ".zip"})
    expect(page.locator("#evaluate-drop .al-problem")).to_contain_text(NAME)


LINKS = (
    *({"tab": key, "q": ASK, "lang": f"<b>{ASK}"} for key in ("captions", "pictures", "matrix", "photos", "evaluate")),
    *({"tab": ASK, "lang": ASK}, {"q": ASK, ASK: ASK, "view": ASK}, {"tab": "matrix", "q": "\0\u202e"}),
)


@pytest.mark.parametrize("query", LINKS, ids=range(len(LINKS)))
def test_links_run_nothing(watched, query):
    page = watched(f"?{urlencode(query)}")
    key = query.get("tab", "")
    if key in ("pictures", "photos"):
        expect(page.locator(f"#{key}-query").get_by_role("textbox")).to_have_value(ASK)
        expect(page.locator(f"#{key}-results h2")).to_be_visible()
    if key == "matrix" and ASK in query["q"]:
        expect(page.locator("#matrix-table tbody th").first).to_have_text(ASK)
    assert page.evaluate("window.__ran") is None


def test_a_data_set_is_text_in_its_report(watched, tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as file:
        lines = [{"file_name": f"../{NAME}", "caption": "x"}, {"file_name": f"lost \ud800{TURNING}", "caption": "x"}]
        for row, colour in enumerate(("red", "green", "blue", "white")):
            name = f"{row}{NAME}"
            file.writestr(name, photo(name, colour)["buffer"])
            lines.append({"file_name": name, "caption": f"{row} {list(PAYLOADS.values())[row]} {TURNING}"})
        file.writestr(f"{TURNING}.png", b"x")
        file.writestr("metadata.jsonl", "\n".join(json.dumps(line) for line in lines))
    page = watched()
    open_tab(page, "evaluate")
    page.locator("#evaluate-drop input[type=file]").set_input_files(
        {"name": f"{TURNING}.zip", "mimeType": "application/zip", "buffer": path.read_bytes()}
    )
    heading = page.locator("#evaluate-results h2")
    expect(heading).to_have_text(text("en", "evaluate.yours", name="agnp.exeb.zip"))
    page.locator("#evaluate-results .al-left-out summary").click()
    expect(page.locator("#evaluate-results .al-left-out")).to_contain_text(NAME)
    expect(page.locator("#evaluate-results .al-example-words dd").filter(has_text="<").first).to_be_visible()
    with page.expect_download() as waiting:
        page.locator("#evaluate-download button").click()
    report = json.loads(Path(waiting.value.path()).read_text("utf-8"))
    assert report["data"] == "agnp.exeb.zip"


def test_marks_that_turn_text_round_are_left_out(watched):
    page = watched()
    open_tab(page, "photos")
    drop(page, "photos", photo(f"{TURNING}.png"), {"name": f"{TURNING}.gif", "mimeType": "image/gif", "buffer": b"x"})
    expect(page.locator("#photos-drop .al-problem strong")).to_have_text("agnp.exeb.gif")
    for summary in page.locator("#photos-results .al-verdict summary").all():
        summary.click()
    expect(page.locator("#photos-results .al-text").first).to_have_text("agnp.exeb.png")
    search(page, "photos", f"2 x {TURNING} + dog")
    expect(page.locator("#photos-composer .al-part-name").first).to_have_text("agnp.exeb")
    page.locator("#photos-query").get_by_role("textbox").fill("")


def test_words_written_from_the_right_stand_apart_and_no_cell_of_a_file_is_a_formula(watched):
    page = watched()
    open_tab(page, "matrix")
    drop(page, "matrix", photo("=1+1.png"), photo("@x.png", "red"))
    expect(page.locator("#matrix-table thead img")).to_have_count(2)
    page.locator("#matrix-captions textarea").fill("\n".join([*FORMULAS, HEBREW]))
    page.locator("#matrix-compare").click()
    captions = page.locator("#matrix-table tbody th > div")
    expect(captions).to_have_count(len(FORMULAS) + 1)
    expect(captions.last).to_have_text(HEBREW)
    directions = captions.evaluate_all("nodes => nodes.map((node) => getComputedStyle(node).direction)")
    assert directions == [*["ltr"] * len(FORMULAS), "rtl"]
    with page.expect_download() as waiting:
        page.locator("#matrix-table [data-tool=csv]").click()
    head, *rows = csv.reader(io.StringIO(Path(waiting.value.path()).read_text("utf-8-sig")))
    assert head[1:] == ["'=1+1.png", "'@x.png"]
    for row, caption in zip(rows[:-1], FORMULAS, strict=True):
        caption = caption.strip()
        assert row[0] == (caption if caption.startswith('"') else f"'{caption}")
        assert all(re.fullmatch(r"-?\d+(\.\d+)?", number) for number in row[1:])
