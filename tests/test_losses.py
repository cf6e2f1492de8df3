"""Contrastive losses: closed forms, transformers' and open_clip's own losses, and loops that spell the definitions out.

Of open_clip only the file with its losses is loaded, by its path: the package itself imports torchvision and timm,
which the app does without.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from alignment.losses import sigmoid_loss, softmax_loss
from alignment.similarity import logits_per_image

Loss = Callable[..., Tensor]
LOSS_OF_FAMILY = {
    **dict.fromkeys(("clip", "chinese-clip", "vit-bert", "clip-roberta"), softmax_loss),
    **dict.fromkeys(("siglip", "siglip2", "siglip2-naflex"), sigmoid_loss),
}
PARITY = {"rtol": 1e-5, "atol": 1e-6}


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4


def slow_softmax_loss(logits: Tensor, positives: Tensor, ignored: Tensor) -> float:
    """The definition as loops over queries, candidates and positives, in Python floats."""

    def direction(scores: list[list[float]], own: list[list[bool]], skip: list[list[bool]]) -> float:
        losses = []
        for row, mine, dropped in zip(scores, own, skip, strict=True):
            kept = [score for score, is_mine, drop in zip(row, mine, dropped, strict=True) if is_mine or not drop]
            wanted = [score for score, is_mine in zip(row, mine, strict=True) if is_mine]
            if wanted:
                partition = math.log(sum(math.exp(score) for score in kept))
                losses.append(sum(partition - score for score in wanted) / len(wanted))
        return sum(losses) / len(losses)

    rows = direction(logits.tolist(), positives.tolist(), ignored.tolist())
    columns = direction(logits.T.tolist(), positives.T.tolist(), ignored.T.tolist())
    return (rows + columns) / 2


def slow_sigmoid_loss(logits: Tensor, positives: Tensor, ignored: Tensor) -> float:
    total = 0.0
    for i in range(logits.shape[0]):
        for j in range(logits.shape[1]):
            if positives[i, j]:
                total += math.log1p(math.exp(-logits[i, j].item()))
            elif not ignored[i, j]:
                total += math.log1p(math.exp(logits[i, j].item()))
    return total / logits.shape[0]


@st.composite
def masked_logits(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of any small shape, with masks that leave at least one positive."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    cells = rows * columns
    flags = st.lists(st.booleans(), min_size=cells, max_size=cells)
    positives, ignored = torch.tensor(draw(flags)), torch.tensor(draw(flags))
    positives[draw(st.integers(0, cells - 1))] = True
    logits = random_logits(rows, columns, seed=draw(st.integers(0, 99)))
    return logits, positives.view(rows, columns), ignored.view(rows, columns)


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("level", [0.0, 3.0, -50.0])
def test_equal_logits_cost_log_b(batch: int, level: float) -> None:
    assert softmax_loss(torch.full((batch, batch), level)).item() == pytest.approx(math.log(batch), abs=1e-5)


def test_equal_logits_cost_the_log_of_each_side_whatever_the_positives() -> None:
    positives = torch.tensor([[True, True, False, False, False, False], [False, False, True, True, True, True]])
    expected = (math.log(6) + math.log(2)) / 2
    assert softmax_loss(torch.zeros(2, 6), positives).item() == pytest.approx(expected)


def test_perfect_logits_cost_nothing_with_one_positive_and_log_p_with_several() -> None:
    assert softmax_loss(torch.eye(4) * 100).item() == pytest.approx(0.0, abs=1e-6)
    positives = torch.eye(3, dtype=torch.bool).repeat_interleave(5, dim=1)
    # Five captions share an image's probability: log 5 on the images' side, nothing on the texts' side.
    assert softmax_loss(positives * 100.0, positives).item() == pytest.approx(math.log(5) / 2, abs=1e-6)


@pytest.mark.parametrize("num_texts", [1, 3, 9])
def test_zero_logits_cost_log_2_a_pair(num_texts: int) -> None:
    assert sigmoid_loss(torch.zeros(3, num_texts)).item() == pytest.approx(num_texts * math.log(2))


def test_perfect_logits_cost_the_sigmoid_loss_nothing() -> None:
    assert sigmoid_loss(torch.eye(4) * 200 - 100).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_softmax_loss_equals_transformers_on_random_logits(batch: int) -> None:
    logits = random_logits(batch, batch)
    torch.testing.assert_close(softmax_loss(logits), image_text_contrastive_loss(logits.T))


@pytest.mark.parametrize(("name", "loss"), LOSS_OF_FAMILY.items())
def test_a_loss_equals_what_the_model_returns(name: str, loss: Loss, checkpoint: Callable[[str], Path]) -> None:
    """Value, and gradient with regard to both sides' embeddings, the scale and the bias."""
    model = AutoModel.from_pretrained(checkpoint(name)).eval()
    output = model(**random_inputs(model.config), return_loss=True)
    bias = [model.logit_bias] if hasattr(model, "logit_bias") else []
    wanted = [output.image_embeds, output.text_embeds, model.logit_scale, *bias]
    ours = loss(output.logits_per_image)
    torch.testing.assert_close(ours, output.loss, **PARITY)
    expected = torch.autograd.grad(output.loss, wanted, retain_graph=True)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    torch.testing.assert_close(torch.autograd.grad(ours, wanted), expected, **PARITY)


def random_inputs(config: object) -> dict[str, Tensor]:
    """Six pictures of noise and six texts of random tokens, in the shape the family takes."""
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(5, 30, (6, 8), generator=generator)}
    if config.model_type != "siglip2":
        return inputs | {"pixel_values": torch.randn(6, 3, 32, 32, generator=generator)}
    return inputs | {
        "pixel_values": torch.randn(6, 4, 16 * 16 * 3, generator=generator),
        "pixel_attention_mask": torch.ones(6, 4, dtype=torch.long),
        "spatial_shapes": torch.full((6, 2), 2),
    }


@pytest.fixture(scope="module")
def open_clip_losses() -> ModuleType:
    """Load open_clip's loss.py alone, by its path."""
    path = distribution("open_clip_torch").locate_file("open_clip/loss.py")
    spec = spec_from_file_location("open_clip_losses", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize(
    ("loss", "theirs", "bias"),
    [
        (softmax_loss, "ClipLoss", None),
        (softmax_loss, "ClipLoss", -3.0),
        (sigmoid_loss, "SigLipLoss", -10.0),
        (sigmoid_loss, "SigLipLoss", 1.0),
    ],
)
def test_a_loss_equals_open_clips(
    loss: Loss, theirs: str, batch: int, bias: float | None, open_clip_losses: ModuleType
) -> None:
    """Value, and gradient with regard to both sides' embeddings, the scale and the bias, if there is one."""
    generator = torch.Generator().manual_seed(batch)
    images, texts = (functional.normalize(torch.randn(batch, 16, generator=generator)) for _ in range(2))
    parameters = [images, texts, torch.tensor(10.0), *([] if bias is None else [torch.tensor(bias)])]
    for parameter in parameters:
        parameter.requires_grad_()
    # The embeddings have unit norm already, so their own normalisation must not be differentiated.
    ours = loss(logits_per_image(images @ texts.T, *parameters[2:]))
    expected = getattr(open_clip_losses, theirs)()(*parameters)
    torch.testing.assert_close(ours, expected, **PARITY)
    torch.testing.assert_close(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters), **PARITY
    )


# ---------------------------------------------------------------- several captions, near-duplicates


# Logits that are logs of whole numbers, so that the losses can be worked out by hand: a softmax is a share of the row's
# or the column's sum, and sigmoid(log n) is n / (n + 1).
TWO_CAPTIONS = torch.tensor([[1.0, 2, 1], [1, 1, 2]]).log()
OWN_CAPTIONS = torch.tensor([[True, True, False], [False, False, True]])
LOOK_ALIKES = torch.tensor([[2.0, 5, 1], [7, 4, 2], [1, 1, 3]]).log()
ALIKE = torch.tensor([[False, True, False], [True, False, False], [False, False, False]])


def test_softmax_loss_of_an_image_with_two_captions() -> None:
    images = ((math.log(4 / 1) + math.log(4 / 2)) / 2 + math.log(4 / 2)) / 2
    texts = (math.log(2 / 1) + math.log(3 / 2) + math.log(3 / 2)) / 3
    assert softmax_loss(TWO_CAPTIONS, OWN_CAPTIONS).item() == pytest.approx((images + texts) / 2)


def test_sigmoid_loss_of_an_image_with_two_captions() -> None:
    matches = math.log(2 / 1) + math.log(3 / 2) + math.log(3 / 2)
    mismatches = math.log(2) + math.log(2) + math.log(2)
    assert sigmoid_loss(TWO_CAPTIONS, OWN_CAPTIONS).item() == pytest.approx((matches + mismatches) / 2)


def test_softmax_loss_between_near_duplicates() -> None:
    """Each look-alike competes with the third image alone, however well its sister's caption scores."""
    images = (math.log(3 / 2) + math.log(6 / 4) + math.log(5 / 3)) / 3
    texts = (math.log(3 / 2) + math.log(5 / 4) + math.log(6 / 3)) / 3
    assert softmax_loss(LOOK_ALIKES, ignored=ALIKE).item() == pytest.approx((images + texts) / 2)


def test_sigmoid_loss_between_near_duplicates() -> None:
    matches = math.log(3 / 2) + math.log(5 / 4) + math.log(4 / 3)
    mismatches = math.log(2) + math.log(3) + math.log(2) + math.log(2)
    assert sigmoid_loss(LOOK_ALIKES, ignored=ALIKE).item() == pytest.approx((matches + mismatches) / 3)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_captions_of_one_image_do_not_push_each_other_away(loss: Loss) -> None:
    """What the masks are for: taken for a negative, a second caption or a look-alike's is pushed away."""
    logits = torch.zeros(3, 3, requires_grad=True)
    (plain,) = torch.autograd.grad(loss(logits), logits)
    (owned,) = torch.autograd.grad(loss(logits, torch.eye(3, dtype=torch.bool) | ALIKE), logits)
    (masked,) = torch.autograd.grad(loss(logits, ignored=ALIKE), logits)
    assert (plain[ALIKE] > 0).all()
    assert (owned[ALIKE] < 0).all()
    assert (masked[ALIKE] == 0).all()


@pytest.mark.parametrize(("loss", "slow"), [(softmax_loss, slow_softmax_loss), (sigmoid_loss, slow_sigmoid_loss)])
@settings(deadline=None, max_examples=60)
@given(masked_logits())
def test_a_loss_equals_the_slow_definition(
    loss: Loss, slow: Callable[..., float], case: tuple[Tensor, Tensor, Tensor]
) -> None:
    logits, positives, ignored = case
    expected = slow(logits, positives, ignored)
    assert loss(logits, positives, ignored=ignored).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(masked_logits())
def test_gradients_are_finite_and_zero_where_ignored(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, positives, ignored = case
    for loss in (softmax_loss, sigmoid_loss):
        leaf = logits.clone().requires_grad_()
        loss(leaf, positives, ignored=ignored).backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[ignored & ~positives] == 0).all()


def test_the_default_positives_are_the_identity() -> None:
    logits = random_logits(5, 5)
    for loss in (softmax_loss, sigmoid_loss):
        torch.testing.assert_close(loss(logits), loss(logits, torch.eye(5, dtype=torch.bool)))


def test_texts_beyond_the_images_are_negatives() -> None:
    logits = random_logits(3, 5)
    harder = logits.clone()
    harder[:, 3:] += 5
    for loss in (softmax_loss, sigmoid_loss):
        assert loss(harder) > loss(logits)


def test_an_ignored_pair_is_as_good_as_a_hopeless_one() -> None:
    logits, ignored = random_logits(4, 4), torch.zeros(4, 4, dtype=torch.bool)
    ignored[0, 2] = True
    hopeless = logits.masked_fill(ignored, -1e4)
    torch.testing.assert_close(softmax_loss(logits, ignored=ignored), softmax_loss(hopeless))
    torch.testing.assert_close(sigmoid_loss(logits, ignored=ignored), sigmoid_loss(hopeless))


def test_a_positive_is_never_ignored() -> None:
    logits = random_logits(4, 4)
    own = torch.eye(4, dtype=torch.bool)
    for loss in (softmax_loss, sigmoid_loss):
        torch.testing.assert_close(loss(logits, ignored=own), loss(logits))


def test_softmax_loss_is_symmetric() -> None:
    logits, positives = random_logits(3, 6), torch.eye(3, dtype=torch.bool).repeat(1, 2)
    torch.testing.assert_close(softmax_loss(logits, positives), softmax_loss(logits.T, positives.T))


def test_every_positive_pulls() -> None:
    """The reason for the mean form: a caption left behind costs, although its sister already fits."""
    positives = torch.tensor([[True, True, False], [False, False, True]])
    behind = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]], requires_grad=True)
    softmax_loss(behind, positives).backward()
    assert behind.grad is not None
    assert behind.grad[0, 1] < -0.1


def test_parts_of_a_batch_average_to_the_sigmoid_loss_of_the_whole() -> None:
    logits, positives = random_logits(6, 9), torch.rand(6, 9, generator=torch.Generator().manual_seed(2)) < 0.2
    parts = [sigmoid_loss(logits[i : i + 2], positives[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), sigmoid_loss(logits, positives))


def test_half_precision_logits_are_lifted() -> None:
    logits = random_logits(5, 5).half()
    for loss in (softmax_loss, sigmoid_loss):
        assert loss(logits).dtype == torch.float32
        torch.testing.assert_close(loss(logits), loss(logits.float()))


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
@pytest.mark.parametrize("mask", [torch.ones(2, 3, dtype=torch.bool), torch.ones(3, 3)])
def test_masks_that_do_not_fit_are_refused(loss: Loss, mask: Tensor) -> None:
    with pytest.raises(ValueError, match="positives"):
        loss(torch.zeros(3, 3), mask)
    with pytest.raises(ValueError, match="ignored"):
        loss(torch.zeros(3, 3), ignored=mask)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
@pytest.mark.parametrize("shape", [(3,), (0, 4), (4, 0)])
def test_logits_without_two_sides_are_refused(loss: Loss, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        loss(torch.zeros(shape))


def test_softmax_loss_without_a_positive_is_refused_and_the_sigmoid_is_not() -> None:
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one positive"):
        softmax_loss(torch.zeros(2, 2), nothing)
    assert sigmoid_loss(torch.zeros(2, 2), nothing).item() == pytest.approx(2 * math.log(2))
