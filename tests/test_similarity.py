"""Cosines, logits, probabilities and rankings against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.similarity import cosine_similarity, logits_per_image, match_probabilities, top_k


def test_cosine_similarity_has_images_as_rows() -> None:
    images = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    expected = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    torch.testing.assert_close(cosine_similarity(images, texts), expected)


def test_cosine_similarity_ignores_length() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(5, 8, generator=generator), torch.randn(7, 8, generator=generator)
    torch.testing.assert_close(cosine_similarity(images * 37, texts / 11), cosine_similarity(images, texts))


def test_cosine_similarity_lifts_half_precision_before_it_multiplies() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(5, 64, generator=generator).half(), torch.randn(7, 64, generator=generator).half()
    similarity = cosine_similarity(images, texts)
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity, cosine_similarity(images.double(), texts.double()).float())


def test_cosine_similarity_of_a_zero_vector_is_zero() -> None:
    assert cosine_similarity(torch.zeros(1, 4), torch.ones(2, 4)).tolist() == [[0.0, 0.0]]


def test_cosine_similarity_of_nothing_is_an_empty_matrix() -> None:
    assert cosine_similarity(torch.zeros(0, 4), torch.ones(3, 4)).shape == (0, 3)


@pytest.mark.parametrize(("images", "texts"), [((2, 3), (2, 4)), ((3,), (2, 3)), ((2, 3), (3,)), ((1, 2, 3), (2, 3))])
def test_cosine_similarity_refuses_shapes_that_do_not_fit(images: tuple[int, ...], texts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one width"):
        cosine_similarity(torch.ones(images), torch.ones(texts))


def test_logits_are_scaled_and_shifted() -> None:
    similarity = torch.tensor([[0.5, -0.25]])
    assert logits_per_image(similarity, 100.0).tolist() == [[50.0, -25.0]]
    assert logits_per_image(similarity, 10.0, -2.0).tolist() == [[3.0, -4.5]]
    assert logits_per_image(similarity, 10.0, 0.0).tolist() == [[5.0, -2.5]]


def test_logits_keep_the_gradient_of_scale_and_bias() -> None:
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    logits_per_image(torch.tensor([[0.5, 0.25]]), scale, bias).sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == 0.75
    assert bias.grad is not None
    assert bias.grad.item() == 2.0


def test_probabilities_without_a_bias_compete_along_the_asked_axis() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    torch.testing.assert_close(match_probabilities(logits, dim=1), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    torch.testing.assert_close(match_probabilities(logits, dim=0), torch.tensor([[0.5, 0.75], [0.5, 0.25]]))


def test_probabilities_with_a_bias_judge_each_pair_alone_and_do_not_add_it_again() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    expected = torch.tensor([[0.5, 0.75]])
    torch.testing.assert_close(match_probabilities(logits, dim=1, logit_bias=-10.0), expected)
    torch.testing.assert_close(match_probabilities(logits, dim=0, logit_bias=0.0), expected)


def test_probabilities_survive_half_precision_and_large_logits() -> None:
    probabilities = match_probabilities(torch.tensor([[300.0, 299.0, -300.0]]).half(), dim=1)
    assert probabilities.dtype == torch.float32
    assert probabilities.sum().item() == pytest.approx(1.0)
    assert probabilities[0, 0].item() == pytest.approx(1 / (1 + math.exp(-1)))


def test_top_k_is_best_first_with_ties_by_index() -> None:
    values, indices = top_k(torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]), 4)
    assert values.tolist() == [[3.0, 3.0, 3.0, 2.0]]
    assert indices.tolist() == [[1, 2, 4, 3]]


def test_top_k_clips_k_and_takes_a_vector() -> None:
    values, indices = top_k(torch.tensor([0.1, 0.2]), 10)
    assert indices.tolist() == [1, 0]
    assert values.shape == (2,)
    assert top_k(torch.tensor([0.1, 0.2]), 0)[1].tolist() == []
    with pytest.raises(ValueError, match="negative"):
        top_k(torch.tensor([0.1]), -1)


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(0, 50))
def test_top_k_equals_a_sort_by_score_then_index(scores: list[int], k: int) -> None:
    expected = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:k]
    values, indices = top_k(torch.tensor(scores, dtype=torch.float32), k)
    assert indices.tolist() == expected
    assert values.tolist() == [float(scores[index]) for index in expected]
