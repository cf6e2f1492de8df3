"""What a fine-tuning chooses by itself: sensible for each kind of model, overruled by every option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from alignment.model import DualEncoder
from alignment.train import settings
from alignment.train.settings import TrainConfig, TrainRecipe, complete, kind_of
from alignment.train.start import build_scratch

Load = Callable[[str], DualEncoder]
COMPACT = Path(__file__).parents[1] / "checkpoints" / "compact"


@pytest.fixture
def load(checkpoint: Callable[[str], Path]) -> Load:
    return lambda name: DualEncoder.load(checkpoint(name), device="cpu")


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**({"data": "d", "output": "o", "model": "m"} | options))


def on_gpu(encoder: DualEncoder) -> DualEncoder:
    """Pretend: what is chosen hangs on the device's name, and nothing is run."""
    encoder.device = type(encoder.device)("cuda")
    return encoder


# ---------------------------------------------------------------- kinds of start


def test_each_start_is_recognised(load: Load) -> None:
    encoder = load("composed")
    assert kind_of(config(), load("clip")) == "pretrained"
    assert kind_of(config(), encoder) == "pretrained"  # joined once, trained since
    assert kind_of(config(model=None, vision="v", text="t"), encoder) == "composed"
    assert kind_of(config(model=None, scratch="tiny"), encoder) == "scratch"
    assert kind_of(config(), DualEncoder.load(COMPACT, device="cpu")) == "compact"


def test_a_laptop_locks_the_image_tower_of_a_large_model_and_a_gpu_tunes_it(load: Load) -> None:
    clip = load("clip")
    assert complete(config(), clip, 1000).preset == "lit"
    assert complete(config(model=None, vision="v", text="t"), clip, 1000).preset == "lit"
    assert complete(config(model=None, scratch="tiny"), clip, 1000).preset == "full"
    assert complete(config(), on_gpu(clip), 1000).preset == "full"


def test_fresh_weights_take_larger_steps_than_pretrained_ones(load: Load) -> None:
    clip = load("clip")
    pretrained, composed, scratch = (
        complete(config(preset="full", **start), clip, 1000)
        for start in ({}, {"model": None, "vision": "v", "text": "t"}, {"model": None, "scratch": "tiny"})
    )
    assert pretrained.learning_rate < composed.learning_rate < scratch.learning_rate
    assert pretrained.head_learning_rate == pretrained.learning_rate
    assert composed.head_learning_rate > 10 * composed.learning_rate
    assert (pretrained.interpolate, composed.interpolate, scratch.interpolate) == (True, False, False)


def test_the_loss_is_the_one_the_model_was_trained_with(load: Load) -> None:
    assert complete(config(), load("siglip"), 1000).loss == "sigmoid"
    assert complete(config(), load("clip"), 1000).loss == "softmax"
    assert complete(config(loss="softmax"), load("siglip"), 1000).loss == "softmax"


def test_the_compact_model_has_its_own_choices() -> None:
    recipe = complete(config(), DualEncoder.load(COMPACT, device="cpu"), 6000)
    assert (recipe.preset, recipe.captions_per_image, recipe.interpolate) == ("full", 3, True)
    assert recipe.learning_rate == 1e-4


# ---------------------------------------------------------------- batch and length


@pytest.mark.parametrize(("images", "batch"), [(4, 4), (20, 16), (160, 16), (400, 32), (6000, 256), (10**6, 256)])
def test_the_batch_grows_with_the_data(load: Load, images: int, batch: int) -> None:
    recipe = complete(config(), load("clip"), images)
    assert recipe.batch_size == batch
    assert recipe.max_steps == 10 * (images // batch)


def test_a_batch_is_never_larger_than_the_data_and_a_chunk_never_larger_than_the_batch(load: Load) -> None:
    recipe = complete(config(batch_size=512, chunk_size=600), load("clip"), 100)
    assert (recipe.batch_size, recipe.chunk_size, recipe.max_steps) == (100, 100, 10)


def test_a_processor_that_trains_a_large_image_tower_does_so_in_chunks(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chunks(encoder: DualEncoder) -> dict[str, int]:
        presets = ("full", "lit", "heads", "lora")
        return {one: complete(config(batch_size=512, preset=one), encoder, 10**4).chunk_size for one in presets}

    assert set(chunks(load("clip")).values()) == {512}
    monkeypatch.setattr(settings, "LARGE", 1000)
    assert chunks(load("clip")) == {"full": 64, "lit": 512, "heads": 512, "lora": 64}
    assert set(chunks(on_gpu(load("clip"))).values()) == {512}


def test_every_process_has_an_equal_part_of_the_batch(load: Load) -> None:
    for processes, batch in ((1, 10), (2, 10), (3, 9), (4, 8)):
        recipe = complete(config(batch_size=10), load("clip"), 100, num_processes=processes)
        assert recipe.batch_size == batch
        assert recipe.max_steps == 10 * (100 // batch)


def test_the_shortest_length_counts(load: Load) -> None:
    clip = load("clip")
    assert complete(config(epochs=0.5, batch_size=10), clip, 100).max_steps == 5
    assert complete(config(epochs=2, max_steps=7, batch_size=10), clip, 100).max_steps == 7
    assert complete(config(max_steps=700, batch_size=10), clip, 100).max_steps == 700
    assert complete(config(epochs=0.001, batch_size=10), clip, 100).max_steps == 1


def test_it_is_measured_once_a_pass_but_some_fifteen_times_at_most(load: Load) -> None:
    clip = load("clip")
    assert complete(config(batch_size=10), clip, 100).measure_every == 10
    assert complete(config(batch_size=10, epochs=60), clip, 100).measure_every == 40
    assert complete(config(batch_size=10, max_steps=3), clip, 100).measure_every == 3
    assert complete(config(batch_size=10, measure_every=4), clip, 100).measure_every == 4


# ---------------------------------------------------------------- options


OVERRULED = {
    "preset": "heads",
    "loss": "softmax",
    "batch_size": 24,
    "chunk_size": 8,
    "captions_per_image": 3,
    "learning_rate": 2e-3,
    "head_learning_rate": 3e-3,
    "weight_decay": 0.2,
    "warmup": 0.3,
    "augment": False,
    "keep_images": False,
    "measure_every": 5,
    "patience": 2,
    "interpolate": False,
    "precision": "bf16",
    "gradient_checkpointing": True,
    "workers": 3,
    "seed": 7,
    "max_steps": 11,
}


def test_every_choice_can_be_overruled(load: Load) -> None:
    assert set(OVERRULED) == {field.name for field in fields(TrainRecipe)}
    chosen, overruled = (asdict(complete(config(**o), load("siglip"), 1000)) for o in ({}, OVERRULED))
    assert overruled == OVERRULED
    assert not [name for name in OVERRULED if chosen[name] == overruled[name]]


def test_one_learning_rate_given_is_that_of_the_heads_too(load: Load) -> None:
    recipe = complete(config(model=None, vision="v", text="t", learning_rate=5e-4), load("clip"), 100)
    assert (recipe.learning_rate, recipe.head_learning_rate) == (5e-4, 5e-4)


def test_images_are_kept_where_a_frozen_part_is_large_or_the_machine_slow(load: Load) -> None:
    assert complete(config(preset="full"), load("clip"), 100).keep_images
    gpu = on_gpu(load("clip"))
    kept = {
        preset: complete(config(preset=preset), gpu, 100).keep_images for preset in ("full", "lit", "heads", "lora")
    }
    assert kept == {"full": False, "lit": True, "heads": True, "lora": False}


def test_what_cannot_work_together_is_said_in_one_sentence(load: Load) -> None:
    compact = DualEncoder.load(COMPACT, device="cpu")
    with pytest.raises(ValueError, match=r"^Preset 'lora' is not for a compact model; choose 'full' or 'lit' or"):
        complete(config(preset="lora"), compact, 100)
    scratch = build_scratch(["a dog"], "tiny", device="cpu")
    with pytest.raises(ValueError, match=r"^Preset 'heads' is not for a scratch model; choose 'full'\.$"):
        complete(config(model=None, scratch="tiny", preset="heads"), scratch, 100)
    with pytest.raises(ValueError, match=r"clip has no logit bias, .* needs; choose --loss softmax\.$"):
        complete(config(loss="sigmoid"), load("clip"), 100)
