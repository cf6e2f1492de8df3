import json
import re
import zipfile
from io import BytesIO

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from alignment.ui.strings import text
from tests.browser_window import files_in, open_tab

IDS = ("cat", "coffee", "motorcycle", "rocket", "cheetah-face", "lion")


@pytest.fixture
def data(engine, picture, tmp_path):
    """A zip of real photographs and their captions in a language, with some faults: `data("en")`."""

    def write(lang: str):
        captions = {picture.id: picture.caption(lang) for picture in engine.gallery.pictures}
        table = ["image,caption", *(f'photos/{id}.jpg,"{captions[id]}"' for id in IDS), "photos/lost.jpg,nothing"]
        table.append(f"{picture('rocket')},a picture elsewhere on the disk")
        path = tmp_path / "data.zip"
        with zipfile.ZipFile(path, "w") as file:
            for id in IDS:
                image = Image.open(picture(id)).convert("RGB")
                image.thumbnail((500, 500))
                buffer = BytesIO()
                image.save(buffer, "JPEG")
                file.writestr(f"photos/{id}.jpg", buffer.getvalue())
            file.writestr("captions.csv", "\n".join(table))
        return path

    return write


def open_evaluate(page: Page, lang: str = "en") -> None:
    open_tab(page, "evaluate", lang)
    expect(page.locator("#evaluate-results table")).to_be_visible()


def drop(page: Page, file) -> None:
    page.locator("#evaluate-drop input[type=file]").set_input_files(str(file))


def take(page: Page, button: str):
    with page.expect_download() as waiting:
        page.locator(f"{button} button").click()
    return waiting.value


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_own_data_is_measured_and_reported(visit, data, lang, tmp_path, uploads):
    page = visit(f"?lang={lang}")
    open_evaluate(page, lang)
    expect(page.locator("#evaluate-results h2")).to_have_text(text(lang, "evaluate.example"))
    drop(page, data(lang))
    expect(page.locator("#evaluate-results h2")).to_have_text(text(lang, "evaluate.yours", name="data.zip"))
    expect(page.locator("#evaluate-results .al-heading p")).to_have_text(
        text(lang, "evaluate.count", pictures=6, captions=6)
    )
    cells = page.locator("#evaluate-results tbody tr").first.locator("td")
    expect(cells).to_have_count(4)
    assert re.fullmatch(r"\d+\.\d %", cells.first.locator(".al-figure").inner_text())
    expect(cells.first).to_contain_text(text(lang, "evaluate.chance", value="16.7 %"))
    left_out = page.locator("#evaluate-results .al-left-out")
    left_out.locator("summary").click()
    expect(left_out).to_contain_text(text(lang, "evaluate.left.missing", count=1))
    expect(left_out).to_contain_text(text(lang, "evaluate.left.outside", count=1))

    take(page, "#evaluate-download").save_as(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert (report["data"], report["num_images"], report["model"]) == ("data.zip", 6, "compact")
    assert report["metrics"]["text_to_image_recall@1"]["value"] > 3 * report["chance"]["text_to_image_recall@1"]
    assert report["metrics"]["text_to_image_recall@5"]["low"] <= report["metrics"]["text_to_image_recall@5"]["value"]
    assert files_in(uploads) == []


def test_the_report_speaks_the_other_language_and_stays(visit, data):
    page = visit()
    open_evaluate(page)
    drop(page, data("en"))
    expect(page.locator("#evaluate-results h2")).to_have_text(text("en", "evaluate.yours", name="data.zip"))
    figures = page.locator("#evaluate-results .al-figure").all_inner_texts()
    page.locator("#language").get_by_text("中文").click()
    expect(page.locator("#evaluate-results h2")).to_have_text(text("zh", "evaluate.yours", name="data.zip"))
    assert page.locator("#evaluate-results .al-figure").all_inner_texts() == figures


def test_the_worked_example_shows_pictures_with_their_captions(visit, engine):
    page = visit()
    open_evaluate(page)
    examples = page.locator("#evaluate-results .al-report-examples li")
    expect(examples.first).to_be_visible()
    image = examples.first.locator("img").first
    image.scroll_into_view_if_needed()
    expect(image).to_have_js_property("complete", True)
    assert image.evaluate("node => node.naturalWidth") > 0
    captions = {picture.caption("en") for picture in engine.gallery.pictures}
    assert image.get_attribute("alt") in captions
    assert set(examples.locator("dd").all_inner_texts()) <= captions


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_example_zip_is_one_that_can_be_measured(visit, lang, tmp_path):
    page = visit(f"?lang={lang}")
    open_evaluate(page, lang)
    take(page, "#evaluate-sample").save_as(tmp_path / "example.zip")
    drop(page, tmp_path / "example.zip")
    expect(page.locator("#evaluate-results h2")).to_have_text(text(lang, "evaluate.yours", name="example.zip"))
    expect(page.locator("#evaluate-results .al-heading p")).to_have_text(
        text(lang, "evaluate.count", pictures=12, captions=24)
    )
    expect(page.locator("#evaluate-results .al-left-out")).to_have_count(0)


def test_what_cannot_be_measured_is_said_and_the_report_stays(visit, data, tmp_path):
    page = visit("?lang=zh")
    open_evaluate(page, "zh")
    drop(page, data("zh"))
    expect(page.locator("#evaluate-results h2")).to_have_text(text("zh", "evaluate.yours", name="data.zip"))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb.png", bytes(60 * 2**20))
    (tmp_path / "broken.zip").write_bytes(b"hello")
    problem = page.locator("#evaluate-drop [role=alert]")
    drop(page, tmp_path / "bomb.zip")
    expect(problem).to_have_text(f"bomb.zip: {text('zh', 'error.zip.ratio', limit=40)}")
    page.locator("#language").get_by_text("English").click()
    expect(problem).to_have_text(f"bomb.zip: {text('en', 'error.zip.ratio', limit=40)}")
    drop(page, tmp_path / "broken.zip")
    expect(problem).to_have_text(f"broken.zip: {text('en', 'error.zip.damaged')}")
    expect(page.locator("#evaluate-results h2")).to_have_text(text("en", "evaluate.yours", name="data.zip"))


def test_measuring_can_be_stopped(visit, large_pictures, tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as file:
        for row, data in enumerate(large_pictures(200)):
            file.writestr(f"{row}.png", data)
            file.writestr(f"{row}.txt", f"picture {row}")
    page = visit()
    open_evaluate(page)
    drop(page, tmp_path / "many.zip")
    page.locator("#evaluate-drop [data-act=stop]").click()
    expect(page.locator("#evaluate-drop [role=status]")).to_have_text(text("en", "drop.stopped"))
    expect(page.locator("#evaluate-results h2")).to_have_text(text("en", "evaluate.example"))
    expect(page.locator("#evaluate-drop progress")).to_have_count(0)


def test_what_a_zip_says_never_becomes_markup(visit, data, tmp_path):
    wicked = "<img src=x onerror=window.hit=1>"
    path = data("en")
    with zipfile.ZipFile(tmp_path / "wicked.zip", "w") as new, zipfile.ZipFile(path) as old:
        for name in old.namelist():
            if name.endswith(".jpg"):
                new.writestr(f"{wicked}{name[7:]}", old.read(name))
        names = [f"{wicked}{name[7:]}" for name in old.namelist() if name.endswith(".jpg")]
        table = "image,caption\n" + "\n".join(f'"{name}","{wicked} {row}"' for row, name in enumerate(names))
        new.writestr("captions.csv", table)
    page = visit()
    open_evaluate(page)
    drop(page, tmp_path / "wicked.zip")
    expect(page.locator("#evaluate-results h2")).to_have_text(text("en", "evaluate.yours", name="wicked.zip"))
    expect(page.locator("#evaluate-results dd").first).to_contain_text(wicked)
    assert page.evaluate("window.hit") is None
