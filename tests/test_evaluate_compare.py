"""Two models on one data set: paired bootstrap against a slow one, changed queries, missing labels, the page."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from alignment.evaluate import (
    Difference,
    Embedded,
    Estimate,
    compare_retrieval,
    difference_table,
    evaluate_embedded,
    suspected_false_negatives,
    worst_queries,
)
from alignment.evaluate.error_analysis import Example, FalseNegative, changed_queries
from alignment.evaluate.html_report import THUMBNAIL, html_page
from alignment.evaluate.ranks import retrieval_ranks


def random_embeds(*shape: int, seed: int = 0) -> Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def embedded(num_images: int, captions: int, noise: float, seed: int = 1) -> Embedded:
    """Captions that are their image plus noise; the same images, owners and texts whatever the noise."""
    images = random_embeds(num_images, 16)
    owners = torch.arange(num_images).repeat_interleave(captions)
    texts = functional.normalize(images[owners] + noise * random_embeds(len(owners), 16, seed=seed), dim=-1)
    paths = [f"{index}.jpg" for index in range(num_images)]
    return Embedded(paths, [f"caption {index}" for index in range(len(owners))], owners, images, texts)


# ---------------------------------------------------------------- paired bootstrap


def slow_comparison(before: Embedded, after: Embedded, name: str, resamples: int, seed: int) -> list[float]:
    """Build every sample in full, image by image, and measure it from the ranks; gains, one per sample."""
    direction, figure = name.rsplit("_", 1) if "median" not in name else (name.removesuffix("_median_rank"), "median")
    generator = torch.Generator().manual_seed(seed)
    gains = []
    for _ in range(resamples):
        drawn = torch.randint(len(before.images), (len(before.images),), generator=generator).tolist()
        values = []
        for model in (before, after):
            ranks = model.ranks[direction]
            of = torch.arange(len(ranks)) if direction == "image_to_text" else model.image_of_text
            sample = torch.cat([ranks[of == image] for image in drawn])
            k = int(figure.removeprefix("recall@")) if figure != "median" else 0
            values.append((sample <= k).double().mean().item() if k else sample.median().item())
        gains.append(values[1] - values[0])
    return gains


@pytest.mark.parametrize(
    "name", ["image_to_text_recall@1", "text_to_image_recall@5", "text_to_image_median_rank", "image_to_text_recall@10"]
)
def test_the_paired_bootstrap_equals_the_slow_one(name: str) -> None:
    before, after = embedded(60, 3, noise=3.0), embedded(60, 3, noise=2.5)
    found = compare_retrieval(before, after, resamples=80, seed=3).metrics[name]
    gains = torch.tensor(slow_comparison(before, after, name, 80, 3), dtype=torch.double)
    low, high = gains.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
    better = gains < 0 if "rank" in name else gains > 0
    assert found.p_not_better == pytest.approx(1 - better.double().mean().item())
    assert found.low < found.high


def test_the_figures_are_those_of_the_two_reports() -> None:
    before, after = embedded(50, 2, noise=3.0), embedded(50, 2, noise=1.5)
    compared = compare_retrieval(before, after, resamples=10)
    one, other = (evaluate_embedded(side, resamples=0) for side in (before, after))
    assert compared.metrics.keys() == one.metrics.keys()
    for name, found in compared.metrics.items():
        assert (found.before, found.after, found.value) == (one[name], other[name], other[name] - one[name])
    assert (compared.num_images, compared.num_texts) == (50, 100)
    assert compared["recall_sum"] > 0


def test_a_model_gains_nothing_over_itself() -> None:
    side = embedded(30, 2, noise=2.0)
    for found in compare_retrieval(side, embedded(30, 2, noise=2.0), resamples=50).metrics.values():
        assert (found.value, found.low, found.high, found.p_not_better) == (0.0, 0.0, 0.0, 1.0)


def test_pairing_narrows_the_interval() -> None:
    """Two models that err on the same images: the difference is far surer than either figure."""
    before, after = embedded(300, 2, noise=2.0), embedded(300, 2, noise=1.9)
    paired = compare_retrieval(before, after, resamples=300).metrics["recall_sum"]
    alone = evaluate_embedded(before, resamples=300).metrics["recall_sum"]
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)


def test_a_clear_gain_is_sure_and_turned_round_it_is_a_loss() -> None:
    before, after = embedded(100, 2, noise=3.0), embedded(100, 2, noise=1.0)
    gain = compare_retrieval(before, after, resamples=100).metrics
    loss = compare_retrieval(after, before, resamples=100).metrics
    assert gain["recall_sum"].low > 0
    assert gain["recall_sum"].p_not_better == gain["text_to_image_median_rank"].p_not_better == 0.0
    assert gain["text_to_image_median_rank"].value < 0, "ranks fall"
    assert loss["recall_sum"].p_not_better == 1.0
    assert loss["recall_sum"].low == pytest.approx(-gain["recall_sum"].high)


def test_only_the_same_data_can_be_compared() -> None:
    side = embedded(10, 2, noise=1.0)
    renamed = Embedded(
        [*side.images[:-1], "other.jpg"], side.texts, side.image_of_text, side.image_embeds, side.text_embeds
    )
    with pytest.raises(ValueError, match="different images or captions"):
        compare_retrieval(side, renamed)
    with pytest.raises(ValueError, match="different images or captions"):
        compare_retrieval(side, embedded(10, 1, noise=1.0))


def test_the_table_of_differences() -> None:
    metrics = {
        "image_to_text_recall@1": Difference(0.388, 0.412, 0.024, -0.001, 0.05, 0.034),
        "text_to_image_median_rank": Difference(4.0, 3.0, -1.0, -1.0, 0.0, 0.2),
    }
    header, recall, rank = difference_table(metrics).splitlines()
    assert header.split() == ["A", "B", "B", "-", "A", "95", "%", "interval", "B", "not", "better"]
    assert re.split(r"\s{2,}", recall) == ["image to text R@1", "38.8", "41.2", "+2.4", "[-0.1, +5.0]", "3.4%"]
    assert re.split(r"\s{2,}", rank) == ["text to image median rank", "4", "3", "-1", "[-1, +0]", "20.0%"]
    assert len(header) == len(recall) == len(rank)


# ---------------------------------------------------------------- queries


def by_hand() -> tuple[Embedded, Embedded]:
    """Three images on three axes. The second model mends the first image's caption and spoils the third's."""
    axes = torch.eye(3)
    owners, images, texts = torch.arange(3), ["red.png", "green.png", "blue.png"], ["red", "green", "blue"]
    weak = torch.tensor([[0.2, 0.9, 0.5], [0.0, 1.0, 0.0], [0.1, 0.0, 1.0]])
    strong = torch.tensor([[1.0, 0.3, 0.0], [0.0, 1.0, 0.0], [0.7, 0.8, 0.6]])
    return tuple(Embedded(images, texts, owners, axes, rows) for rows in (weak, strong))


def test_changed_queries_by_hand() -> None:
    better, worse = changed_queries(*by_hand(), count=5)
    assert better == [
        # Weak: "red" scores 0.9 with green, 0.5 with blue, 0.2 with red.
        Example("text_to_image", "red", "red.png", (3, 1), ("green.png", "red.png")),
    ]
    assert worse == [
        Example("text_to_image", "blue", "blue.png", (1, 3), ("blue.png", "green.png")),
    ]


def test_worst_queries_by_hand() -> None:
    _, strong = by_hand()
    assert worst_queries(strong, count=5) == [
        Example("text_to_image", "blue", "blue.png", (3,), ("green.png",)),
    ]


def test_examples_agree_with_the_whole_matrix() -> None:
    before, after = embedded(200, 3, noise=3.0), embedded(200, 3, noise=3.0, seed=7)
    similarity = [side.image_embeds @ side.text_embeds.T for side in (before, after)]
    positives = before.image_of_text == torch.arange(200)[:, None]
    better, worse = changed_queries(before, after, count=10)
    assert len(better) == len(worse) == 20
    for example in [*better, *worse]:
        by_image = example.direction == "image_to_text"
        row = before.images.index(example.query) if by_image else before.texts.index(example.query)
        offered = before.texts if by_image else before.images
        own = positives[row] if by_image else positives.T[row]
        for scores, rank, top in zip(similarity, example.ranks, example.tops, strict=True):
            line = scores[row] if by_image else scores.T[row]
            assert retrieval_ranks(line[None], own[None]).item() == rank
            assert line[offered.index(top)] == pytest.approx(line.max().item(), abs=1e-6)
        assert own[offered.index(example.answer)]
    ratios = [example.ranks[0] / example.ranks[1] for example in better[:10]]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] > 1
    assert all(example.ranks[0] < example.ranks[1] for example in worse)


def test_what_did_not_change_is_not_shown() -> None:
    side = embedded(20, 2, noise=2.0)
    assert changed_queries(side, side, count=5) == ([], [])
    perfect = embedded(20, 2, noise=0.0)
    assert worst_queries(perfect, count=5) == []
    assert suspected_false_negatives(perfect, count=5) == []


def test_a_missing_label_is_found() -> None:
    """The second image is nearly the first, and its caption fits the first better than any caption of its own."""
    rows = torch.tensor([[1.0, 0.1, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    captions = torch.tensor([[0.6, 0.0, 0.8], [0.5, 0.0, 0.8], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]])
    images, texts = functional.normalize(rows, dim=-1), functional.normalize(captions, dim=-1)
    paths, words = ["a.png", "b.png", "c.png"], ["own", "other", "rival", "far"]
    side = Embedded(paths, words, torch.tensor([0, 0, 1, 2]), images, texts)
    (found,) = suspected_false_negatives(side, count=5)
    assert (found.image, found.caption, found.rival) == ("a.png", "own", "rival")
    scores = images @ texts.T
    assert found.margin == pytest.approx(min(scores[0, 2] - scores[0, 0], scores[0, 2] - scores[1, 2]).item(), abs=1e-6)


def test_suspects_equal_the_slow_search() -> None:
    side = embedded(120, 3, noise=3.0)
    scores = (side.image_embeds @ side.text_embeds.T).tolist()
    owners = side.image_of_text.tolist()
    slow = {}
    for image, row in enumerate(scores):
        own = max(score for score, owner in zip(row, owners, strict=True) if owner == image)
        margins = {
            text: min(row[text] - own, row[text] - scores[owner][text])
            for text, owner in enumerate(owners)
            if owner != image
        }
        rival = max(margins, key=margins.__getitem__)
        if margins[rival] > 1e-6:
            slow[f"{image}.jpg"] = (f"caption {rival}", margins[rival])
    found = suspected_false_negatives(side, count=1000)
    assert {one.image: one.rival for one in found} == {image: rival for image, (rival, _) in slow.items()}
    widest = sorted((margin for _, margin in slow.values()), reverse=True)
    assert [one.margin for one in found] == pytest.approx(widest, abs=1e-6)
    assert suspected_false_negatives(side, count=3) == found[:3]


# ---------------------------------------------------------------- page

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> \"dog\" & 'cat'"


class Tags(HTMLParser):
    """Collects the tags and the text of a page, and checks that what is opened is closed."""

    OPTIONAL = frozenset({"meta", "img", "br", "dt", "dd", "tr", "td", "th"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "wide & 'odd'.png"
    Image.new("RGB", (640, 320), "navy").save(path)
    return str(path)


def examples(picture: str, models: int) -> list[Example]:
    ranks = (12345, 1)[:models]
    return [
        Example("image_to_text", picture, HOSTILE, ranks, (HOSTILE, "狗在海滩上")[:models]),
        Example("text_to_image", HOSTILE, picture, ranks, (picture, picture)[:models]),
    ]


METRICS = {
    "image_to_text_recall@1": Difference(0.388, 0.412, 0.024, 0.001, 0.05, 0.0),
    "text_to_image_median_rank": Difference(4.0, 5.0, 1.0, 1.0, 2.0, 1.0),
    "recall_sum": Difference(3.1, 3.2, 0.1, -0.1, 0.3, 0.3),
}


def comparison(picture: str) -> str:
    better = examples(picture, models=2)
    negatives = [FalseNegative(picture, "its own", HOSTILE, 0.1234)]
    return html_page((HOSTILE, "runs/mine"), {"Data": HOSTILE}, METRICS, (better, better[:1]), negatives)


def report(picture: str) -> str:
    metrics = {"recall_sum": Estimate(3.123, 3.0, 3.2), "text_to_image_recall@1": Estimate(0.297, 0.28, 0.31)}
    negatives = [FalseNegative(picture, HOSTILE, "b", 0.5)]
    return html_page([HOSTILE], {}, metrics, [examples(picture, models=1)], negatives)


@pytest.mark.parametrize("page", [comparison, report])
def test_what_a_data_set_says_is_text_and_nothing_else(picture: str, page: Callable[[str], str]) -> None:
    seen = Tags(page(picture))
    assert not seen.open
    assert not seen.named("script")
    assert all("onerror" not in attributes for attributes in seen.named("img"))
    assert {image["alt"] for image in seen.named("img")} == {"wide & 'odd'.png"}
    assert seen.text.count(HOSTILE) >= 4


@pytest.mark.parametrize("page", [comparison, report])
def test_the_page_needs_nothing_but_itself(picture: str, page: Callable[[str], str]) -> None:
    html = page(picture)
    assert "http:" not in html
    assert "https:" not in html
    assert not re.search(r"url\(|@import|<link|<iframe", html)
    seen = Tags(html)
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in seen.named("meta"))
    for image in seen.named("img"):
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/jpeg;base64"
        thumbnail = Image.open(BytesIO(b64decode(data)))
        assert thumbnail.size == (THUMBNAIL, THUMBNAIL // 2) == (int(image["width"]), int(image["height"]))


def test_the_comparison_shows_ranks_differences_and_suspects(picture: str) -> None:
    html = comparison(picture)
    text = Tags(html).text
    assert "rank 12,345 → 1" in text
    assert "B’s first, right too狗在海滩上" in text, "another of its captions"
    assert "Right, A’s first, B’s first" in text, "each answer is shown once"
    assert "margin 0.123" in text
    assert "<td>38.8<td>41.2<td class='better'><b>+2.4</b> <small>[+0.1, +5.0]</small><td>0.0%" in html
    assert "<td class='worse'><b>+1</b> <small>[+1, +2]</small>" in html, "a rank that rises is a loss"
    assert "<td class=''><b>+10.0</b> <small>[-10.0, +30.0]</small>" in html, "neither is sure"


def test_the_report_shows_figures_and_the_worst(picture: str) -> None:
    text = Tags(report(picture)).text
    assert "312.3" in text
    assert "[28.0, 31.0]" in text
    assert "Worst queries" in text
    assert "rank 12,345" in text


def test_sections_without_anything_to_show_are_left_out() -> None:
    text = Tags(html_page(("a", "b"), {}, METRICS)).text
    assert "Got better" not in text
    assert "Suspected" not in text


def test_a_picture_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone <b>.png")
    text = Tags(html_page(["m"], {}, {}, [[Example("image_to_text", gone, "a", (2,), ("b",))]])).text
    assert "gone <b>.png" in text
