"""Recall by hand, against a slow reference, and the whole flow with encoders whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional

from alignment.data import Pair
from alignment.evaluate import KS, Estimate, embed_pairs, evaluate_embedded, evaluate_embeddings, main
from alignment.evaluate.embedding import NamedProgress
from alignment.evaluate.ranks import ROUNDING, retrieval_ranks
from alignment.evaluate.retrieval import RetrievalReport, report_table
from alignment.preprocess import InputError


def slow_recall(similarity: Tensor, positives: Tensor, k: int) -> float:
    """Sort the candidates of each query, strangers first among equals, and look at the first k."""
    hits = 0
    for scores, own in zip(similarity.tolist(), positives.tolist(), strict=True):
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], own[index]))
        hits += any(own[index] for index in order[:k])
    return hits / len(similarity)


def recall_at_k(similarity: Tensor, positives: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    ranks = retrieval_ranks(similarity, positives)
    return {k: (ranks <= k).double().mean().item() for k in ks}


def random_embeds(*shape: int, seed: int = 0) -> Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---------------------------------------------------------------- ranks

SCORES = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.7, 0.6, 0.5, 0.5]])
POSITIVES = torch.tensor([[False, True, False, False], [False, False, False, True]])


def test_the_example_of_the_docstring() -> None:
    assert retrieval_ranks(SCORES, POSITIVES).tolist() == [2, 4]
    assert recall_at_k(SCORES, POSITIVES, [1, 2, 3, 4]) == {1: 0.0, 2: 0.5, 3: 0.5, 4: 1.0}


def test_one_of_several_positives_is_enough_and_they_do_not_stand_in_each_others_way() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.95], [0.9, 0.8, 0.7, 0.1]])
    positives = torch.tensor([[True, True, True, False], [False, False, True, True]])
    assert retrieval_ranks(scores, positives).tolist() == [2, 3]
    assert recall_at_k(scores, positives, [1, 2, 3]) == {1: 0.0, 2: 0.5, 3: 1.0}


@pytest.mark.parametrize("level", [0.0, 1.0, -3.0])
def test_a_collapsed_model_earns_nothing_until_everything_is_returned(level: float) -> None:
    scores, positives = torch.full((12, 12), level), torch.eye(12, dtype=torch.bool)
    assert recall_at_k(scores, positives, [1, 5, 10, 11, 12]) == {1: 0.0, 5: 0.0, 10: 0.0, 11: 0.0, 12: 1.0}


def test_duplicated_candidates_tie_against_the_query() -> None:
    """Two copies of each image: the right one is never alone at the top."""
    originals = torch.eye(6)
    similarity = originals @ torch.cat([originals, originals]).T
    positives = torch.cat([torch.eye(6, dtype=torch.bool), torch.zeros(6, 6, dtype=torch.bool)], dim=1)
    assert recall_at_k(similarity, positives, [1, 2]) == {1: 0.0, 2: 1.0}


def test_a_tolerance_makes_ties_of_scores_that_differ_by_rounding() -> None:
    scores, positives = torch.tensor([[0.5, 0.5 - 1e-7, 0.4]]), torch.tensor([[True, False, False]])
    assert retrieval_ranks(scores, positives).tolist() == [1]
    assert retrieval_ranks(scores, positives, tolerance=1e-6).tolist() == [2]


@st.composite
def tied_queries(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Few distinct scores, so that ties abound, and at least one positive a query."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    cells = rows * columns
    scores = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=cells, max_size=cells)))
    positives = torch.tensor(draw(st.lists(st.booleans(), min_size=cells, max_size=cells)))
    scores, positives = scores.view(rows, columns).float(), positives.view(rows, columns)
    for row in range(rows):
        positives[row, draw(st.integers(0, columns - 1))] = True
    return scores, positives


@settings(deadline=None, max_examples=200)
@given(tied_queries())
def test_recall_equals_the_slow_reference(case: tuple[Tensor, Tensor]) -> None:
    scores, positives = case
    ks = range(1, scores.shape[1] + 3)
    assert recall_at_k(scores, positives, list(ks)) == {k: slow_recall(scores, positives, k) for k in ks}


@settings(deadline=None, max_examples=50)
@given(tied_queries(), st.floats(0.01, 100))
def test_only_the_order_of_the_scores_counts(case: tuple[Tensor, Tensor], scale: float) -> None:
    scores, positives = case
    expected = recall_at_k(scores, positives)
    assert recall_at_k(scores.double() * scale, positives) == expected
    assert recall_at_k(scores.exp() - 7, positives) == expected
    assert recall_at_k(scores.long(), positives) == expected


@settings(deadline=None, max_examples=50)
@given(tied_queries())
def test_recall_grows_with_k(case: tuple[Tensor, Tensor]) -> None:
    recalls = list(recall_at_k(*case, list(range(1, 10))).values())
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1.0


@pytest.mark.parametrize(
    ("scores", "positives", "message"),
    [
        (torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool), "one .* matrix each"),
        (torch.zeros(3), torch.ones(3, dtype=torch.bool), "one .* matrix each"),
        (torch.zeros(2, 3), torch.ones(2, 3), "bool"),
        (torch.tensor([[0.1, float("nan")]]), torch.tensor([[True, False]]), "NaN"),
        (torch.tensor([[0.1, float("inf")]]), torch.tensor([[True, False]]), "infinity"),
        (torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]), "no positive"),
    ],
)
def test_what_cannot_be_measured_is_refused(scores: Tensor, positives: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(scores, positives)


# ---------------------------------------------------------------- embeddings


def report_of(num_images: int, captions: int, noise: float, **options: int) -> tuple[RetrievalReport, Tensor, Tensor]:
    """Measure captions that are their image plus noise; also the similarity and who owns what."""
    images = random_embeds(num_images, 16)
    owners = torch.arange(num_images).repeat_interleave(captions)
    texts = functional.normalize(images[owners] + noise * random_embeds(len(owners), 16, seed=1), dim=-1)
    return evaluate_embeddings(images, texts, owners, **options), images @ texts.T, owners


@pytest.mark.parametrize("num_images", [3, 40, 1100])
def test_the_report_equals_recall_over_the_whole_matrix(num_images: int) -> None:
    """1,100 images with three captions each do not fit into one block of queries."""
    report, similarity, owners = report_of(num_images, 3, noise=2.0, resamples=0)
    positives = owners == torch.arange(num_images)[:, None]
    for direction, scores, own in (
        ("image_to_text", similarity, positives),
        ("text_to_image", similarity.T, positives.T),
    ):
        for k, recall in recall_at_k(scores, own).items():
            assert report[f"{direction}_recall@{k}"] == pytest.approx(recall, abs=1e-3)
        # torch's median is the lower one, too.
        assert report[f"{direction}_median_rank"] == retrieval_ranks(scores, own).median().item()
    assert (report.num_images, report.num_texts) == (num_images, 3 * num_images)


def test_the_median_of_an_even_number_of_ranks_is_the_lower_one() -> None:
    report = evaluate_embeddings(torch.eye(2), torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.arange(2), resamples=0)
    assert report["text_to_image_recall@1"] == 0.5, "ranks 1 and 2"
    assert report["text_to_image_median_rank"] == 1.0


def test_sums_are_sums() -> None:
    report, _, _ = report_of(30, 2, noise=2.0, resamples=0)
    recalls = {name: report[name] for name in report.metrics if "recall@" in name}
    assert len(recalls) == 6
    assert 0 < report["recall_sum"] < 6
    assert report["recall_sum"] == pytest.approx(sum(recalls.values()))
    one_way = sum(value for name, value in recalls.items() if name.startswith("image_to_text"))
    assert report["image_to_text_recall_sum"] == pytest.approx(one_way)


def test_a_perfect_model_earns_everything_with_certainty() -> None:
    report, _, _ = report_of(20, 5, noise=0.0, resamples=50)
    assert report["recall_sum"] == 6.0
    assert report["text_to_image_median_rank"] == 1.0
    assert all(estimate.low == estimate.value == estimate.high for estimate in report.metrics.values())


@pytest.mark.parametrize("embed_dim", [3, 7, 100, 512])
@pytest.mark.parametrize("num_images", [2, 3, 37])
def test_a_collapsed_model_earns_nothing_although_its_cosines_differ_by_rounding(
    num_images: int, embed_dim: int
) -> None:
    """Equal embeddings do not give equal float32 products at the edges of a matrix multiplication."""
    images = random_embeds(1, embed_dim).repeat(num_images, 1)
    owners = torch.arange(num_images).repeat_interleave(2)
    texts = functional.normalize(random_embeds(1, embed_dim, seed=1) + 1e-8, dim=-1).repeat(len(owners), 1)
    report = evaluate_embeddings(images, texts, owners, resamples=0)
    assert report["text_to_image_recall@1"] == report["image_to_text_recall@1"] == 0.0
    assert report["text_to_image_median_rank"] == num_images
    assert report["image_to_text_median_rank"] == len(owners) - 1


def test_rounding_is_far_below_what_tells_captions_apart() -> None:
    assert torch.finfo(torch.float32).eps < ROUNDING < 1e-5


def test_owners_may_come_in_any_order() -> None:
    images = random_embeds(10, 8)
    owners = torch.arange(10).repeat_interleave(2)
    texts = functional.normalize(images[owners] + random_embeds(20, 8, seed=1), dim=-1)
    shuffle = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    straight = evaluate_embeddings(images, texts, owners, resamples=0)
    assert evaluate_embeddings(images, texts[shuffle], owners[shuffle], resamples=0) == straight


@pytest.mark.parametrize("owners", [[0, 0, 0], [0, 1], [0, 1, 2], []])
def test_owners_must_fit(owners: list[int]) -> None:
    with pytest.raises(ValueError, match="every image must own a text"):
        evaluate_embeddings(random_embeds(2, 4), random_embeds(3, 4), torch.tensor(owners, dtype=torch.long))


def test_embeddings_that_are_not_finite_are_refused() -> None:
    broken = random_embeds(2, 4)
    broken[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        evaluate_embeddings(broken, random_embeds(2, 4), torch.arange(2))


# ---------------------------------------------------------------- bootstrap


def test_the_bootstrap_is_repeatable_and_seeded() -> None:
    one, other = (report_of(40, 2, noise=2.0, resamples=200, seed=1)[0] for _ in range(2))
    assert one == other
    elsewhere = report_of(40, 2, noise=2.0, resamples=200, seed=2)[0]
    assert elsewhere.metrics != one.metrics
    assert {name: elsewhere[name] for name in one.metrics} == {name: one[name] for name in one.metrics}


def test_intervals_hold_the_figure_and_narrow_with_more_images() -> None:
    small, large = (report_of(count, 2, noise=2.0, resamples=300)[0] for count in (25, 400))
    for report in (small, large):
        for estimate in report.metrics.values():
            assert estimate.low <= estimate.value <= estimate.high
    widths = [r.metrics["recall_sum"].high - r.metrics["recall_sum"].low for r in (small, large)]
    assert 0 < widths[1] < widths[0]


def test_the_interval_of_a_share_is_the_textbooks() -> None:
    """Hits of image-to-text are independent draws: the bootstrap must come near 1.96 standard errors."""
    report, _, _ = report_of(400, 1, noise=2.0, resamples=2000)
    estimate = report.metrics["image_to_text_recall@1"]
    textbook = 1.96 * (estimate.value * (1 - estimate.value) / 400) ** 0.5
    assert 0.1 < estimate.value < 0.9
    assert (estimate.high - estimate.low) / 2 == pytest.approx(textbook, rel=0.1)


def test_the_captions_of_an_image_are_drawn_together() -> None:
    """Five equal captions carry the information of one: the interval must not shrink."""
    images = random_embeds(200, 8)
    texts = functional.normalize(images + 1.5 * random_embeds(200, 8, seed=1), dim=-1)
    one = evaluate_embeddings(images, texts, torch.arange(200), resamples=500)
    owners = torch.arange(200).repeat_interleave(5)
    five = evaluate_embeddings(images, texts[owners], owners, resamples=500)
    assert five.metrics["text_to_image_recall@1"] == one.metrics["text_to_image_recall@1"]


def test_without_resamples_the_interval_is_the_figure() -> None:
    report, _, _ = report_of(10, 1, noise=2.0, resamples=0)
    assert all(estimate.low == estimate.value == estimate.high for estimate in report.metrics.values())


# ---------------------------------------------------------------- over a data set


class ColourEncoder:
    """Sees the mean colour of a picture and reads it in a caption: red, green, blue, or nothing at all."""

    def __init__(self, *, collapsed: bool = False) -> None:
        self.collapsed = collapsed
        self.encoded: list[str] = []

    def encode_images(
        self, images: Sequence[str], *, batch_size: int = 16, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        self.encoded = list(images)
        try:
            colours = [Image.open(image).convert("RGB").getpixel((0, 0)) for image in images]
        except OSError as error:
            raise InputError("The picture is damaged.", "image.truncated") from error
        if progress:
            progress(len(images), len(images))
        return self._embeds(torch.tensor(colours, dtype=torch.float32))

    def encode_texts(self, texts: Sequence[str], *, progress: Callable[[int, int], None] | None = None) -> Tensor:
        if progress:
            progress(len(texts), len(texts))
        return self._embeds(
            torch.tensor([[float(name in text) for name in ("red", "green", "blue")] for text in texts])
        )

    def _embeds(self, colours: Tensor) -> Tensor:
        return functional.normalize(torch.ones_like(colours) if self.collapsed else colours, dim=-1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three pictures of one colour each, the third with a caption that is wrong."""
    captions = {"red": ["a red car", "red"], "green": ["green grass"], "blue": ["blue sky", "green sea"]}
    lines = []
    for name, texts in captions.items():
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
        lines += [json.dumps({"image": f"{name}.png", "caption": text, "split": "dev"}) for text in texts]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def pairs_of(data: Path, **captions: Sequence[str]) -> list[Pair]:
    return [Pair(str(data / f"{name}.png"), tuple(texts)) for name, texts in captions.items()]


def evaluate_retrieval(
    encoder: Any, pairs: Sequence[Pair], *, progress: NamedProgress | None = None, **options: int
) -> RetrievalReport[Estimate]:
    return evaluate_embedded(embed_pairs(encoder, pairs, progress=progress), **options)


def test_retrieval_by_hand(data: Path) -> None:
    pairs = pairs_of(data, red=["a red car", "red"], green=["green grass"], blue=["blue sky", "green sea"])
    report = evaluate_retrieval(ColourEncoder(), pairs, resamples=10)
    assert (report.num_images, report.num_texts) == (3, 5)
    # Green ties with the blue picture's "green sea"; "green sea" finds the green picture and, among equals, red first.
    assert report["image_to_text_recall@1"] == pytest.approx(2 / 3)
    assert report["text_to_image_recall@1"] == pytest.approx(4 / 5)
    assert report["image_to_text_recall@5"] == report["text_to_image_recall@5"] == 1.0
    with pytest.raises(FrozenInstanceError):
        report.num_images = 4  # type: ignore[misc]


def test_a_collapsed_encoder_earns_nothing(data: Path) -> None:
    pairs = pairs_of(data, red=["a red car"], green=["green grass"], blue=["blue sky"])
    report = evaluate_retrieval(ColourEncoder(collapsed=True), pairs, resamples=0)
    assert report["image_to_text_recall@1"] == report["text_to_image_recall@1"] == 0.0
    assert report["image_to_text_median_rank"] == report["text_to_image_median_rank"] == 3.0


def test_an_image_given_once_per_caption_is_one_image(data: Path) -> None:
    merged = pairs_of(data, red=["a red car", "red"], green=["green grass"])
    apart = [*pairs_of(data, red=["a red car"], green=["green grass"]), *pairs_of(data, red=["red"])]
    encoder = ColourEncoder()
    assert evaluate_retrieval(encoder, apart, resamples=20) == evaluate_retrieval(encoder, merged, resamples=20)
    assert len(encoder.encoded) == 2


def test_images_without_captions_are_left_out(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = evaluate_retrieval(ColourEncoder(), pairs_of(data, red=["red"], green=["green"], blue=[]), resamples=0)
    assert report.num_images == 2
    assert "Left out 1 images without a caption" in caplog.text
    with pytest.raises(ValueError, match="no image with a caption"):
        evaluate_retrieval(ColourEncoder(), pairs_of(data, red=[], green=[]))


def test_pictures_that_cannot_be_opened_are_left_out(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (data / "blue.png").write_bytes((data / "blue.png").read_bytes()[:30])
    pairs = pairs_of(data, red=["red"], blue=["blue", "sea"], green=["green"])
    report = evaluate_retrieval(ColourEncoder(), pairs, resamples=0)
    assert (report.num_images, report.num_texts) == (2, 2)
    assert report["recall_sum"] == 6.0
    assert "blue.png" in caplog.text
    with pytest.raises(ValueError, match="None of the images can be opened"):
        evaluate_retrieval(ColourEncoder(), pairs_of(data, blue=["blue"]))


def test_progress_is_told_for_both_sides(data: Path) -> None:
    told: list[tuple[str, int, int]] = []
    pairs = pairs_of(data, red=["red", "rose"], green=["green"])
    evaluate_retrieval(ColourEncoder(), pairs, resamples=0, progress=lambda *what: told.append(what))
    assert told == [("images", 2, 2), ("captions", 3, 3)]


# ---------------------------------------------------------------- command


def test_the_command_prints_a_table_and_writes_json(
    data: Path, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = data / "report.json"
    model = str(checkpoint("clip"))
    options = ["--split", "val", "--device", "cpu", "--resamples", "20", "--json", str(out)]
    main(["--model", model, "--data", str(data), *options])
    printed = capsys.readouterr().out
    written = json.loads(out.read_text(encoding="utf-8"))
    assert "image to text" in printed
    assert "3 images, 5 captions" in printed
    assert (written["model"], written["split"], written["num_texts"]) == (model, "val", 5)
    assert len(written["fingerprint"]) == 64
    recall = written["metrics"]["text_to_image_recall@1"]
    assert 0 <= recall["low"] <= recall["value"] <= recall["high"] <= 1
    assert f"{recall['value'] * 100:.1f} [" in printed


def test_the_scale_of_the_model_is_not_used(data: Path, checkpoint: Callable[[str], Path]) -> None:
    from alignment.data import read_data
    from alignment.model import DualEncoder

    encoder = DualEncoder.load(checkpoint("siglip"), device="cpu")
    before = evaluate_retrieval(encoder, read_data(data).pairs, resamples=0)
    with torch.no_grad():
        encoder.module.logit_scale.fill_(-20.0)
        encoder.module.logit_bias.fill_(9.0)
    assert evaluate_retrieval(encoder, read_data(data).pairs, resamples=0) == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "no such model", "no such model"),
        ("--data", "no such data", "There is no no such data"),
        ("--split", "test", "its splits are"),
        ("--format", "zip", "Unknown format"),
    ],
)
def test_the_operators_mistakes_end_in_one_sentence(
    data: Path, checkpoint: Callable[[str], Path], option: str, value: str, message: str
) -> None:
    arguments = {"--model": str(checkpoint("clip")), "--data": str(data), "--device": "cpu"} | {option: value}
    with pytest.raises(SystemExit) as stopped:
        main([word for pair in arguments.items() for word in pair])
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_the_table_shows_percent_with_intervals() -> None:
    report, _, _ = report_of(20, 2, noise=0.0, resamples=10)
    table = report_table(report)
    assert table.count("100.0 [100.0, 100.0]") == 6
    assert "600.0 [600.0, 600.0]" in table
    assert "1 [1, 1]" in table
    assert "20 images, 40 captions" in table


def test_positives_of_agrees_with_the_report(data: Path) -> None:
    """The two ways to say who belongs to whom, a matrix and the flow over pairs, give one figure."""
    pairs = pairs_of(data, red=["a red car", "red"], green=["green grass"], blue=["blue sky", "green sea"])
    texts = [caption for pair in pairs for caption in pair.captions]
    positives = torch.tensor([[text in pair.captions for text in texts] for pair in pairs])
    encoder = ColourEncoder()
    similarity = encoder.encode_images([pair.image for pair in pairs]) @ encoder.encode_texts(texts).T
    report = evaluate_retrieval(encoder, pairs, resamples=0)
    assert recall_at_k(similarity, positives)[1] == report["image_to_text_recall@1"]
    assert recall_at_k(similarity.T, positives.T)[1] == report["text_to_image_recall@1"]
