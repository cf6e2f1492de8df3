"""Colour maps that are even and monotone, overlays that sit where they should."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from alignment.heatmap import heat_colours, patch_overlay

MODES = pytest.mark.parametrize("dark", [False, True])


def linear_rgb(colours: NDArray[np.uint8]) -> NDArray[np.float64]:
    channels = colours / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def cielab(colours: NDArray[np.uint8]) -> NDArray[np.float64]:
    """CIELAB under D65: another model of perception than the OKLab the maps were made in."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear_rgb(colours) @ to_xyz.T / [0.9505, 1.0, 1.089]
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def contrast(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    low, high = sorted(float(linear_rgb(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@MODES
def test_lightness_never_turns_back(dark: bool) -> None:
    lightness = cielab(heat_colours(np.linspace(0, 1, 64), dark=dark))[:, 0]
    steps = np.diff(lightness) * (1 if dark else -1)
    assert (steps > 0).all()


@MODES
def test_equal_steps_look_equal(dark: bool) -> None:
    steps = np.linalg.norm(np.diff(cielab(heat_colours(np.linspace(0, 1, 17), dark=dark)), axis=0), axis=1)
    # A rainbow map's largest step is over ten times its smallest; matplotlib's viridis stays below two and a half.
    assert steps.max() / steps.min() < 2.5


@MODES
def test_low_values_recede_into_the_page_and_high_ones_stand_out(dark: bool) -> None:
    page = np.array([20, 20, 28] if dark else [255, 255, 255], dtype=np.uint8)
    low, high = heat_colours([0.0, 1.0], dark=dark)
    assert contrast(low, page) < 1.3
    assert contrast(high, page) > 10


def test_colours_are_clipped_and_keep_the_shape() -> None:
    colours = heat_colours(np.array([[-5.0, 0.0], [1.0, 7.0], [np.nan, np.inf]]))
    assert colours.shape == (3, 2, 3)
    assert colours.dtype == np.uint8
    assert (colours[0, 0] == colours[0, 1]).all()
    assert (colours[1, 0] == colours[1, 1]).all()
    assert (colours[2] == 128).all()


def test_changing_a_result_does_not_spoil_the_map() -> None:
    heat_colours([0.0, 1.0])[:] = 0
    assert heat_colours([0.0]).sum() > 600


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (2, 2, 2)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matrix"):
        patch_overlay(Image.new("RGB", (8, 8)), np.zeros(shape), limits=(0, 1))


def test_the_overlay_glows_where_the_relevance_is_and_nowhere_else() -> None:
    photo = Image.new("RGB", (90, 60), (120, 120, 120))
    relevance = np.zeros((2, 3))
    relevance[1, 2] = 5.0
    overlay = np.asarray(patch_overlay(photo, relevance, limits=(0, 5))).astype(int).sum(axis=-1)
    assert np.unravel_index(overlay.argmax(), overlay.shape) >= (30, 60)
    assert overlay[45:, 75:].min() > 360 > overlay[:20, :50].max()


def test_the_overlay_keeps_size_and_takes_any_mode() -> None:
    for mode in ("L", "RGBA", "P", "CMYK"):
        image = patch_overlay(Image.new(mode, (31, 17)), np.eye(4), limits=(0, 1))
        assert image.mode == "RGB"
        assert image.size == (31, 17)


def test_the_overlay_does_not_depend_on_the_unit_of_the_relevance() -> None:
    photo = Image.effect_noise((40, 40), 60)
    relevance = np.random.default_rng(0).random((5, 5))
    one = patch_overlay(photo, relevance, limits=(0, 1))
    other = patch_overlay(photo, relevance * 1000 - 77, limits=(-77, 923))
    assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_limits_make_overlays_comparable() -> None:
    photo = Image.effect_noise((40, 40), 60).convert("RGB")
    faint = np.array([[0.0, 0.1], [0.0, 0.1]])
    glowing, dark = (patch_overlay(photo, faint, limits=(0, most)) for most in (0.1, 1))
    assert np.asarray(dark).mean() < np.asarray(glowing).mean() - 30
    assert patch_overlay(photo, faint * 10, limits=(0, 1)).tobytes() == glowing.tobytes()


def test_what_lies_beyond_the_limits_is_as_dark_or_as_bright_as_can_be() -> None:
    photo = Image.new("RGB", (60, 60), (90, 90, 90))
    inside, beyond = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[-7.0, 90.0], [1.0, -0.5]])
    one, other = (patch_overlay(photo, relevance, limits=(0, 1)) for relevance in (inside, beyond))
    assert one.tobytes() == other.tobytes()


def test_with_limits_even_relevance_is_laid_over_too() -> None:
    photo = Image.new("RGB", (20, 20), (90, 90, 90))
    nothing, unknown, half, all_of_it = (
        np.asarray(patch_overlay(photo, np.full((2, 2), value), limits=(0, 2))).astype(int).sum()
        for value in (0, np.nan, 1, 2)
    )
    assert nothing == unknown < half < all_of_it


@pytest.mark.parametrize("limits", [(1.0, 0.0), (0.5, 0.5), (float("nan"), 1.0)])
def test_limits_must_rise(limits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="low, high"):
        patch_overlay(Image.new("RGB", (8, 8)), np.eye(2), limits=limits)


def test_a_patch_without_a_number_counts_as_the_least() -> None:
    photo = Image.new("RGB", (40, 40), (90, 90, 90))
    unknown, least, other = (
        patch_overlay(photo, [[value, 1.0], [0.0, 1.0]], limits=(0, 1)).tobytes() for value in (np.nan, 0.0, 0.5)
    )
    assert unknown == least != other


@pytest.mark.parametrize("opacity", [-0.1, 1.1, float("nan")])
def test_an_opacity_that_is_none_is_refused(opacity: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        patch_overlay(Image.new("RGB", (8, 8)), np.eye(2), limits=(0, 1), opacity=opacity)
    photo = Image.new("RGB", (8, 8), (9, 8, 7))
    assert patch_overlay(photo, np.eye(2), limits=(0, 1), opacity=0.0).tobytes() == photo.tobytes()
