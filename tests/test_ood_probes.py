"""The same seed makes the same nonsense, and it is of the promised kinds."""

import numpy as np

from alignment.confidence.cohort import blank_images, random_texts


def test_seed_decides() -> None:
    assert random_texts(seed=1) == random_texts(seed=1) != random_texts(seed=2)
    first, again, other = (np.stack([np.asarray(image) for image in blank_images(2, seed)]) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_every_kind_is_there() -> None:
    texts = random_texts(3)
    assert len(texts) == 3 * 8
    assert all(text.strip() for text in texts)
    assert sum(text.replace(" ", "").isdigit() for text in texts) == 3
    assert sum(not any(letter.isalnum() for letter in text) for text in texts) == 3


def test_pictures_of_one_colour_hold_one_colour_and_noise_does_not() -> None:
    pictures = [np.asarray(image) for image in blank_images(4)]
    assert [len(np.unique(image.reshape(-1, 3), axis=0)) == 1 for image in pictures] == [True, False, False, False] * 4
    greys = [image[0, 0] for image in pictures[4::8]]
    assert all(len(set(grey.tolist())) == 1 for grey in greys)
    assert greys[-1].tolist() == [255] * 3
