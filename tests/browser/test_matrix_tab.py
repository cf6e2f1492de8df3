"""The similarity matrix in a real browser: what it shows is what Python computes."""

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, expect

import app
from alignment.engine import AlignmentEngine, SecondModel
from alignment.evaluate.ranks import retrieval_ranks
from alignment.losses import sigmoid_loss, softmax_loss
from alignment.server import Service, Settings
from alignment.ui.examples import FAVOURITES
from alignment.ui.matrix_tab import NUM_COMPARED
from alignment.ui.strings import text
from alignment.ui.widgets import ASSETS
from tests.browser_window import Window, open_tab

SWAPPED = (
    "a cup of coffee on a wooden table\na cat with green eyes\na red motorcycle in a garage\na plane in a blue sky"
)
IDS = FAVOURITES[:NUM_COMPARED]


def open_matrix(page: Page, lang: str = "en") -> Page:
    open_tab(page, "matrix", lang)
    expect(page.locator("#matrix-table .al-cell").first).to_be_visible()
    # The example captions change with the label: what is typed before would be replaced.
    expect(page.locator("#matrix-captions")).to_contain_text(text(lang, "matrix.captions"))
    return page


def compare(page: Page, captions: str) -> None:
    page.locator("#matrix-captions textarea").fill(captions)
    page.locator("#matrix-compare").click()
    rows = page.locator("#matrix-table .al-matrix tbody th")
    expect(rows).to_have_text([re.sub(r"^\S+\.\w+: ", "", line) for line in captions.split("\n")])


def drop(page: Page, *files: Path) -> None:
    page.locator("#matrix-drop input[type=file]").set_input_files([str(file) for file in files])
    expect(page.locator("#matrix-table .al-matrix thead img")).to_have_count(len(files))


def pick(page: Page, key: str, name: str = "view") -> None:
    page.locator(f"#matrix-table input[data-set={name}][value={key}]").check(force=True)


def tool(page: Page, name: str) -> None:
    page.locator(f"#matrix-table [data-tool={name}]").click()


def cell(page: Page, row: int, column: int):
    return page.locator("#matrix-table .al-matrix tbody tr").nth(row).locator(".al-cell").nth(column)


def shown(page: Page) -> list[list[float]]:
    """Read the numbers of the table."""
    rows = page.locator("#matrix-table .al-matrix tbody tr").evaluate_all(
        "rows => rows.map((row) => [...row.querySelectorAll('.al-cell')].map((cell) => cell.firstChild.data))"
    )
    return [[float(cell.strip("<> %")) for cell in row] for row in rows]


def measures(page: Page) -> list[str]:
    return page.locator("#matrix-table .al-measures dd").all_inner_texts()


def with_class(page: Page, name: str) -> list[tuple[int, int]]:
    rows = page.locator("#matrix-table .al-matrix tbody tr").evaluate_all(
        "(rows, name) => rows.map((row) => [...row.querySelectorAll('.al-cell')].map((one) => one.matches(name)))",
        f".{name}",
    )
    return [(row, column) for row, line in enumerate(rows) for column, found in enumerate(line) if found]


@pytest.fixture(scope="session")
def sample(engine):
    """The scores of the page's own pictures and the swapped captions."""
    return engine.align_both(engine.gallery_photos(IDS), SWAPPED.split("\n"))[0]


# ---------------------------------------------------------------- the arithmetic of the page


@pytest.fixture(scope="module")
def maths(profile) -> Iterator[Callable[[str, object], object]]:
    """Call a function of matrix_maths.js."""
    page = profile.new_page()
    source = (ASSETS / "matrix_maths.js").read_text("utf-8")

    def call(expression: str, values: object) -> object:
        return page.evaluate(f"(values) => {{ {source}; return ({expression})(values); }}", values)

    yield call
    page.close()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bias", [None, -2.5])
def test_loss_and_recall_are_those_of_the_package(maths, seed, bias):
    torch.manual_seed(seed)
    num_images, num_texts = 5, 7  # two texts of one image, an image without a text, a text without an image
    similarity = torch.rand(num_images, num_texts).double() * 2 - 1
    owners = [0, 1, 1, 2, 4, -1, 4]
    positives = torch.tensor([[owner == image for owner in owners] for image in range(num_images)])
    values = {"model": {"cosines": similarity.T.tolist(), "scale": 12.5, "bias": bias}, "owners": owners}
    found = maths("({ model, owners }) => figures(model, 2, pairsOf(owners, 5))", values)
    logits = similarity * 12.5 / 2 + (bias or 0)
    expected = (softmax_loss if bias is None else sigmoid_loss)(logits, positives)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-9)
    for name, scores, own in (("captions", similarity, positives), ("pictures", similarity.T, positives.T)):
        asked = own.any(dim=1)
        assert [hit is not None for hit in found[name]] == asked.tolist()
        hits = [hit for hit in found[name] if hit is not None]
        assert sum(hits) / len(hits) == pytest.approx(
            (retrieval_ranks(scores[asked], own[asked]) == 1).double().mean().item()
        )


def test_ties_count_against_the_model_and_nothing_is_counted_without_pairs(maths):
    values = {"cosines": [[0.5, 0.5], [0.5, 0.5]], "scale": 10, "bias": None}
    found = maths("(model) => figures(model, 1, pairsOf([0, 1], 2))", values)
    assert (found["captions"], found["pictures"]) == ([False, False], [False, False])
    found = maths("(model) => figures(model, 1, pairsOf([-1, -1], 2))", values)
    assert (found["captions"], found["loss"]) == ([None, None], None)


def test_the_strongest_pairs_go_to_the_diagonal_and_the_rest_stays_near(maths):
    cosines = [[0.1, 0.9, 0.0], [0.2, 0.8, 0.1], [0.7, 0.1, 0.2], [0.1, 0.2, 0.3]]
    assert maths("strongestFirst", cosines) == {"rows": [0, 1, 2, 3], "columns": [1, 0, 2]}
    assert maths("strongestFirst", [[0.1, 0.2, 0.3]]) == {"rows": [0], "columns": [2, 0, 1]}


# ---------------------------------------------------------------- views, pairs, temperature


def test_every_view_shows_what_python_computes(visit, sample):
    page = open_matrix(visit())
    compare(page, SWAPPED)
    for view, expected, step in (
        ("cosine", sample.similarity, 1e-3),
        ("captions", sample.logits_per_image.softmax(1) * 100, 0.1),
        ("pictures", sample.logits_per_image.softmax(0) * 100, 0.1),
    ):
        pick(page, view)
        expect(page.locator("#matrix-table .al-below .al-note")).to_have_text(text("en", f"matrix.meaning.{view}"))
        torch.testing.assert_close(torch.tensor(shown(page)), expected.T, atol=step, rtol=0)
    expect(page.locator("#matrix-table input[value=sigmoid]")).to_have_count(0)  # the model has no bias


def test_an_error_is_a_ring_without_a_mark(visit, sample):
    page = open_matrix(visit())
    compare(page, SWAPPED)
    assert with_class(page, "al-pair") == [(0, 0), (1, 1), (2, 2), (3, 3)]
    best_captions, best_pictures = (sample.similarity.argmax(dim).tolist() for dim in (1, 0))
    assert with_class(page, "al-best-picture") == [(row, column) for row, column in enumerate(best_pictures)]
    assert sorted(with_class(page, "al-best-caption")) == sorted((row, c) for c, row in enumerate(best_captions))
    expect(cell(page, 0, 0)).to_have_text(re.compile(f", {text('en', 'matrix.label.pair')}$"))
    assert "al-best" not in cell(page, 0, 0).get_attribute("class")
    pick(page, "none", "pairing")
    assert with_class(page, "al-pair") == []
    expect(page.locator("#matrix-table .al-block .al-note")).to_have_text(text("en", "matrix.label.noPairs"))


def test_recall_and_loss_are_those_of_the_package_at_every_temperature(visit, sample):
    page = open_matrix(visit())
    compare(page, SWAPPED)
    assert measures(page) == ["50 % (2/4)", "50 % (2/4)", f"{float(softmax_loss(sample.logits_per_image)):.4f}"]
    slider = page.locator("#matrix-table input[type=range]")
    own = slider.get_attribute("aria-valuetext")
    assert own.startswith(f"{1 / sample.logit_scale:.3g} ")
    pick(page, "pictures")
    slider.fill("2")
    hot = sample.similarity * sample.logit_scale / 4
    expect(page.locator("#matrix-table .al-measures dd").nth(2)).to_have_text(f"{float(softmax_loss(hot)):.4f}")
    torch.testing.assert_close(torch.tensor(shown(page)), hot.softmax(0).T * 100, atol=0.1, rtol=0)
    tool(page, "own")
    expect(slider).to_have_attribute("aria-valuetext", own)
    expect(page.locator("#matrix-table .al-measures dd").nth(2)).to_have_text(measures(page)[2])
    torch.testing.assert_close(torch.tensor(shown(page)), sample.logits_per_image.softmax(0).T * 100, atol=0.1, rtol=0)


def test_captions_are_paired_by_the_file_names_before_them(visit, picture):
    page = open_matrix(visit())
    files = [picture(id) for id in ("cat", "coffee")]
    drop(page, *files)
    names = [file.name for file in files]
    compare(page, f"{names[1]}: a cup of coffee\n{names[0]}: a cat\n{names[1]}: an espresso")
    assert with_class(page, "al-pair") == [(0, 1), (1, 0), (2, 1)]
    assert measures(page)[:2] == ["100 % (3/3)", "100 % (2/2)"]
    compare(page, "a cat\na cup of coffee")
    assert with_class(page, "al-pair") == [(0, 0), (1, 1)]
    pick(page, "name", "pairing")
    expect(page.locator("#matrix-table .al-block .al-note")).to_have_text(text("en", "matrix.label.noNames"))


def test_the_colours_have_fixed_ends_that_the_legend_tells(visit, engine):
    page = open_matrix(visit())
    low = engine.scale.unrelated - 2 * engine.scale.spread
    high = engine.scale.unrelated + 6 * engine.scale.spread
    said = text("en", "matrix.label.colours", low=f"{low:.2f}", high=f"{high:.2f}")
    expect(page.get_by_role("img", name=said)).to_be_visible()
    compare(page, "a cat")
    expect(page.get_by_role("img", name=said)).to_be_visible()
    pick(page, "captions")
    expect(page.locator("#matrix-table .al-ramp")).to_have_text("0.0 %100.0 %")


def test_switching_the_language_keeps_view_pairs_and_temperature(visit):
    page = open_matrix(visit())
    pick(page, "captions")
    pick(page, "none", "pairing")
    page.locator("#matrix-table input[type=range]").fill("-1")
    page.locator("#language").get_by_text("中文").click()
    expect(page.locator("#matrix-table .al-below .al-note")).to_have_text(text("zh", "matrix.meaning.captions"))
    expect(page.locator("#matrix-table .al-block .al-note")).to_have_text(text("zh", "matrix.label.noPairs"))
    expect(page.locator("#matrix-table input[type=range]")).to_have_value("-1")


# ---------------------------------------------------------------- keyboard, detail, explanation


def test_arrow_keys_walk_over_the_cells_and_show_picture_caption_and_ranks(visit, sample):
    page = open_matrix(visit())
    compare(page, SWAPPED)
    detail = page.locator("#matrix-table .al-detail")
    expect(detail).to_have_text(text("en", "matrix.label.hint"))
    assert page.locator("#matrix-table .al-cell[tabindex='0']").count() == 1
    cell(page, 0, 0).focus()
    for key, (row, column) in (("ArrowRight", (0, 1)), ("ArrowDown", (1, 1)), ("End", (1, 3)), ("Home", (1, 0))):
        page.keyboard.press(key)
        expect(cell(page, row, column)).to_be_focused()
        expect(cell(page, row, column)).to_have_attribute("tabindex", "0")
    assert page.locator("#matrix-table .al-cell[tabindex='0']").count() == 1
    expect(detail.locator(".al-detail-caption")).to_have_text("a cat with green eyes")
    expect(detail.locator("dd").first).to_have_text(f"{float(sample.similarity[0, 1]):.3f}")
    caption_rank = 1 + int((sample.similarity[0] > sample.similarity[0, 1]).sum())
    picture_rank = 1 + int((sample.similarity[:, 1] > sample.similarity[0, 1]).sum())
    expect(detail).to_contain_text(text("en", "matrix.label.rankCaption", rank=caption_rank, of=4))
    expect(detail).to_contain_text(text("en", "matrix.label.rankPicture", rank=picture_rank, of=4))
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#matrix-table .al-remove").first).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(cell(page, 0, 0)).to_be_focused()


@pytest.mark.parametrize("by", ["click", "Enter"])
def test_a_cell_opens_the_explanation_of_its_match(visit, by):
    page = open_matrix(visit())
    if by == "click":
        cell(page, 2, 2).click()
    else:
        cell(page, 2, 2).focus()
        page.keyboard.press(by)
    dialog = page.locator("#explanation dialog")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text("motorcycle")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(cell(page, 2, 2)).to_be_focused()


def test_screen_readers_find_a_table_with_heads_and_marks_in_words(visit):
    page = open_matrix(visit())
    grid = page.get_by_role("grid", name=text("en", "matrix.table", captions=4, pictures=4))
    expect(grid.get_by_role("rowheader")).to_have_count(4)
    expect(grid.get_by_role("columnheader")).to_have_count(5)
    marks = [text("en", f"matrix.label.{name}") for name in ("bestPicture", "bestCaption", "pair")]
    expect(grid.get_by_role("gridcell", name=re.compile(", ".join(marks)))).to_have_count(4)


# ---------------------------------------------------------------- order and files


def test_reordering_puts_the_best_on_the_diagonal_and_back(visit):
    page = open_matrix(visit())
    compare(page, SWAPPED)
    before = page.locator("#matrix-table .al-matrix tbody th").all_inner_texts()
    tool(page, "sort")
    expect(page.locator("#matrix-table [data-tool=sort]")).to_have_text(text("en", "matrix.label.unsort"))
    numbers = torch.tensor(shown(page))
    assert numbers.diagonal().tolist() == sorted(numbers.diagonal().tolist(), reverse=True)
    assert with_class(page, "al-best-picture") == [(0, 0), (1, 1), (2, 2), (3, 3)]
    row, column = next(place for place in with_class(page, "al-pair") if place[0] != place[1])
    cell(page, row, column).hover()
    caption = page.locator("#matrix-table .al-matrix tbody th").nth(row).inner_text()
    expect(page.locator("#matrix-table .al-detail-caption")).to_have_text(caption)
    tool(page, "sort")
    assert page.locator("#matrix-table .al-matrix tbody th").all_inner_texts() == before


def test_the_csv_holds_the_view_and_no_formula(visit, engine):
    page = open_matrix(visit("?lang=zh"), "zh")
    captions = ['=HYPERLINK("x")', "-1 猫", "木桌上的一杯咖啡"]
    compare(page, "\n".join(captions))
    with page.expect_download() as waiting:
        tool(page, "csv")
    assert waiting.value.suggested_filename.endswith("cosine.csv")
    data = Path(waiting.value.path()).read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")
    head, *rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"))))
    assert head[0] == text("zh", "matrix.view.cosine")
    assert [row[0] for row in rows] == ["'" + captions[0], "'" + captions[1], captions[2]]
    expected = engine.align_both(engine.gallery_photos(IDS), captions)[0].similarity.T
    numbers = torch.tensor([[float(number) for number in row[1:]] for row in rows])
    torch.testing.assert_close(numbers, expected, atol=1e-6, rtol=0)


def test_the_png_shows_pictures_captions_and_colours(visit):
    page = open_matrix(visit())
    with page.expect_download() as waiting:
        tool(page, "png")
    image = Image.open(waiting.value.path()).convert("RGB")
    width, height = image.size
    assert width > 1200
    assert height > 800
    colours = {colour for _, colour in image.getcolors(width * height)}
    painted = page.evaluate(
        "[...document.querySelectorAll('#matrix-table .al-cell')].map((cell) => getComputedStyle(cell).backgroundColor)"
    )
    assert {tuple(map(int, re.findall(r"\d+", colour))) for colour in painted} <= colours
    assert len(colours) > 5000  # of the photographs


# ---------------------------------------------------------------- pictures and errors


def test_pictures_of_the_matrix_can_be_removed_one_by_one_or_all(visit, bad_file, picture):
    page = open_matrix(visit())
    page.locator("#matrix-drop input[type=file]").set_input_files(
        [str(file) for file in (picture("cat"), bad_file, picture("rocket"))]
    )
    expect(page.locator("#matrix-drop [role=alert]")).to_contain_text("notes.jpg")
    expect(page.locator("#matrix-table thead img")).to_have_count(2)
    page.locator("#matrix-table .al-remove").first.click()
    expect(page.locator("#matrix-table thead img")).to_have_count(1)
    page.locator("#matrix-clear").click()
    expect(page.locator("#matrix-table").get_by_text(text("en", "matrix.empty"))).to_be_visible()
    expect(page.locator("#matrix-table thead img")).to_have_count(0)


def test_too_many_captions_are_answered_in_words(visit):
    page = open_matrix(visit())
    page.locator("#matrix-captions textarea").fill("\n".join(f"caption {row}" for row in range(65)))
    page.locator("#matrix-compare").click()
    expect(page.locator("#matrix-table [role=alert]")).to_contain_text("65 captions")


@pytest.fixture(scope="module")
def many_photos(engine, tmp_path_factory) -> list[Path]:
    """64 photographs: different parts of the starter gallery's."""
    folder = tmp_path_factory.mktemp("many")
    paths = []
    for row in range(64):
        image = Image.open(engine.gallery.pictures[row % 16].path).convert("RGB")
        image.thumbnail((400, 400))
        left = row // 16 * image.width // 8
        path = folder / f"photo {row:02}.jpg"
        image.crop((left, 0, left + image.width // 2, image.height)).save(path)
        paths.append(path)
    return paths


def test_sixty_four_pictures_and_captions_stay_in_reach(visit, many_photos):
    page = open_matrix(visit())
    drop(page, *many_photos)
    compare(page, "\n".join(f"a photograph of thing number {row}" for row in range(64)))
    assert page.locator("#matrix-table .al-cell").count() == 64 * 64
    assert len(with_class(page, "al-pair")) == 64
    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]
    region = page.locator("#matrix-table .al-scroll")
    heads = page.locator("#matrix-table .al-matrix thead img")
    first = page.locator("#matrix-table .al-matrix tbody th").nth(40)
    cell(page, 0, 0).focus()
    page.keyboard.press("Control+End")
    expect(cell(page, 63, 63)).to_be_focused()
    expect(cell(page, 63, 63)).to_be_in_viewport()
    assert region.evaluate("node => node.scrollLeft > 0 && node.scrollTop > 0")
    top, left = region.evaluate("node => [node.getBoundingClientRect().top, node.getBoundingClientRect().left]")
    assert heads.last.bounding_box()["y"] >= top - 1  # the heads stay
    assert first.bounding_box()["x"] >= left - 1
    page.set_viewport_size({"width": 390, "height": 844})
    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]


# ---------------------------------------------------------------- two models


@pytest.fixture(scope="module")
def second(checkpoint) -> SecondModel:
    """A tiny random model, whose pictures are smaller and whose temperature is another."""
    return SecondModel.load(checkpoint("clip"))


@pytest.fixture(scope="module")
def both(engine, second, uploads) -> AlignmentEngine:
    return AlignmentEngine(engine.encoder, engine.gallery, second)


@pytest.fixture(scope="module")
def comparing(both, profile, uploads) -> Iterator[Page]:
    """A page that compares two models; for the last tests here, as `visit` clears the cookies of all windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        blocks = app.build_page(both, "en")
        _, url, _ = blocks.launch(
            prevent_thread_lock=True, server_name="127.0.0.1", **app.launch_options(both, Service(Settings(rate=0)))
        )
        page = Window(profile.new_page()).open(url)
        yield open_matrix(page)
        page.close()
        blocks.close()


def test_before_after_and_difference_stand_side_by_side(comparing, both):
    page = comparing
    captions = SWAPPED.split("\n")
    before, after = both.align_both(both.gallery_photos(IDS, both=True), captions)
    compare(page, SWAPPED)
    titles = page.locator("#matrix-table .al-titles th[colspan]")
    expect(titles).to_have_text(["Before: compact", "After: clip", "Difference"])
    expected = torch.cat([before.similarity.T, after.similarity.T, (after.similarity - before.similarity).T], dim=1)
    torch.testing.assert_close(torch.tensor(shown(page)), expected, atol=0.0051, rtol=0)
    pick(page, "difference", "show")
    expect(titles).to_have_text(["Difference"])
    torch.testing.assert_close(torch.tensor(shown(page)), expected[:, 8:], atol=0.00051, rtol=0)
    pick(page, "captions")
    change = (after.logits_per_image.softmax(1) - before.logits_per_image.softmax(1)).T * 100
    torch.testing.assert_close(torch.tensor(shown(page)), change, atol=0.051, rtol=0)
    pick(page, "cosine")
    pick(page, "all", "show")


def test_recall_and_loss_of_both_models_and_what_changed_are_shown(comparing, both):
    page = comparing
    before, after = both.align_both(both.gallery_photos(IDS, both=True), SWAPPED.split("\n"))
    compare(page, SWAPPED)
    rows = page.locator("#matrix-table table.al-measures tbody tr")
    losses = [float(softmax_loss(one.logits_per_image)) for one in (before, after)]
    change = f"{losses[1] - losses[0]:+.4f}"
    expect(rows.nth(2).locator("td")).to_have_text([f"{losses[0]:.4f}", f"{losses[1]:.4f}", change])
    found = [[best == row for row, best in enumerate(one.similarity.argmax(0).tolist())] for one in (before, after)]
    for column, hits in enumerate(found):
        expect(rows.nth(0).locator("td").nth(column)).to_have_text(f"{25 * sum(hits)} % ({sum(hits)}/4)")
    gained = sum(new and not old for old, new in zip(*found, strict=True))
    lost = sum(old and not new for old, new in zip(*found, strict=True))
    flips = text("en", "matrix.label.flips", gained=gained, lost=lost)
    expect(rows.nth(0).locator("td").nth(2)).to_have_text(flips if gained or lost else text("en", "matrix.label.same"))


def test_uploads_are_embedded_by_both_models(comparing, both, picture):
    page = comparing
    files = [picture(id) for id in ("rocket", "coffee")]
    drop_count = page.locator("#matrix-table .al-matrix thead img")
    page.locator("#matrix-drop input[type=file]").set_input_files([str(file) for file in files])
    expect(drop_count).to_have_count(6)  # two in each of three tables
    compare(page, "a rocket\n一杯咖啡")
    images = [Image.open(file) for file in files]
    for encoder, first in ((both.encoder, 0), (both.second.encoder, 2)):
        expected = encoder.encode_texts(["a rocket", "一杯咖啡"]) @ encoder.encode_images(images).T
        torch.testing.assert_close(torch.tensor(shown(page))[:, first : first + 2], expected, atol=0.0051, rtol=0)
