import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.engine import AlignmentEngine
from alignment.engine.batching import DynamicBatcher
from alignment.gallery import Gallery
from alignment.gallery.records import GalleryMetadata
from alignment.model import DualEncoder
from alignment.preprocess import InputError

SLOW = 30  # seconds; the machine may be busy


class Squares:
    """An encoder of numbers that says what it was given, and runs only once it may."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.running = 0

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        self.running += 1
        assert self.running == 1, "two encodings at once"
        try:
            self.batches.append(list(numbers))
            self.begun.set()
            assert self.may_go_on.wait(SLOW)
            if -1 in numbers:
                raise InputError("There is no root of -1.", "number.negative")
            return torch.tensor([[number, number**2] for number in numbers]).float().reshape(-1, 2)
        finally:
            self.running -= 1


@pytest.fixture
def encoder() -> Squares:
    return Squares()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


@pytest.fixture
def queued(encoder, pool) -> Callable[..., tuple[DynamicBatcher[int], list[Future[Tensor]]]]:
    """Let requests wait, in this order, while the first of them is being encoded."""

    def queue(*requests: Sequence[int], max_batch: int = 32) -> tuple[DynamicBatcher[int], list[Future[Tensor]]]:
        batcher = DynamicBatcher(encoder, max_batch)
        futures = [pool.submit(batcher, requests[0])]
        assert encoder.begun.wait(SLOW)
        for place, request in enumerate(requests[1:], 1):
            futures.append(pool.submit(batcher, request))
            until(lambda place=place: len(batcher._waiting) == place)
        return batcher, futures

    return queue


def until(true: Callable[[], bool]) -> None:
    for _ in range(SLOW * 1000):
        if true():
            return
        threading.Event().wait(0.001)
    raise AssertionError("It never came true.")


def squares(numbers: Sequence[int]) -> list[list[float]]:
    return [[number, number**2] for number in numbers]


def test_who_finds_nobody_there_is_encoded_at_once(encoder):
    encoder.may_go_on.set()
    batcher = DynamicBatcher(encoder, 8)
    assert batcher([3]).tolist() == squares([3])
    assert batcher([]).shape == (0, 2)
    assert encoder.batches == [[3], []]


def test_who_waits_is_encoded_together_and_gets_their_own(encoder, queued):
    _, futures = queued([1], [2, 3], [], [4])
    encoder.may_go_on.set()
    assert [future.result(SLOW).tolist() for future in futures] == [squares([1]), squares([2, 3]), [], squares([4])]
    assert encoder.batches == [[1], [2, 3, 4]]


def test_what_one_gets_does_not_hold_what_the_others_got(encoder, queued):
    _, futures = queued([1], [2], list(range(20)))
    encoder.may_go_on.set()
    assert futures[1].result(SLOW).untyped_storage().nbytes() == 8


def test_a_batch_has_its_bounds_and_nobody_is_overtaken(encoder, queued):
    _, futures = queued([0], [1, 2], [3], [4, 5], list(range(6, 16)), [16], max_batch=4)
    encoder.may_go_on.set()
    assert [future.result(SLOW)[0, 0].item() for future in futures] == [0, 1, 3, 4, 6, 16]
    assert encoder.batches == [[0], [1, 2, 3], [4, 5], list(range(6, 16)), [16]]


def test_a_request_that_is_wrong_fails_alone_and_with_its_own_error(encoder, queued):
    _, futures = queued([1], [2], [-1], [3])
    encoder.may_go_on.set()
    assert [futures[place].result(SLOW).tolist() for place in (0, 1, 3)] == [squares([n]) for n in (1, 2, 3)]
    error = futures[2].exception(SLOW)
    assert isinstance(error, InputError)
    assert error.code == "number.negative"


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyError])
def test_a_failure_of_the_encoder_reaches_everybody_as_it_is_and_ends_nothing(error, pool):
    broken = threading.Event()
    broken.set()

    def encode(numbers: Sequence[int]) -> Tensor:
        if broken.is_set():
            raise error("broken")
        return torch.zeros(len(numbers), 2)

    batcher = DynamicBatcher(encode, 8)
    for future in [pool.submit(batcher, [number]) for number in range(20)]:
        with pytest.raises(error, match="broken"):
            future.result(SLOW)
    broken.clear()
    assert batcher([1]).shape == (1, 2)


def test_who_is_interrupted_while_encoding_for_others_leaves_them_to_the_next(encoder, pool):
    interrupted: list[list[int]] = []

    def encode(numbers: Sequence[int]) -> Tensor:
        if len(numbers) > 1 and not interrupted:
            interrupted.append(list(numbers))
            raise KeyboardInterrupt
        return encoder(numbers)

    batcher = DynamicBatcher(encode, 8)
    futures = [pool.submit(batcher, [0])]
    assert encoder.begun.wait(SLOW)
    futures += [pool.submit(batcher, [number]) for number in range(1, 5)]
    until(lambda: len(batcher._waiting) == 4)
    encoder.may_go_on.set()
    errors = [future.exception(SLOW) for future in futures]
    assert sum(isinstance(error, KeyboardInterrupt) for error in errors) == 1
    assert errors.count(None) == 4
    answered = [number for number, error in enumerate(errors) if error is None]
    assert [futures[number].result().tolist() for number in answered] == [squares([number]) for number in answered]
    assert batcher([9]).tolist() == squares([9])


def test_who_is_interrupted_while_waiting_is_forgotten(encoder, queued):
    batcher, futures = queued([1], [2])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            batcher([3])
    finally:
        signal.signal(signal.SIGALRM, before)
    encoder.may_go_on.set()
    assert [future.result(SLOW).tolist() for future in futures] == [squares([1]), squares([2])]
    assert encoder.batches == [[1], [2]]


@pytest.mark.usefixtures("no_thread_stays")
def test_of_many_at_once_none_is_lost(encoder):
    encoder.may_go_on.set()
    batcher = DynamicBatcher(encoder, 8)
    answers: dict[int, list[list[float]]] = {}

    def visit(visitor: int) -> None:
        for number in range(visitor, visitor + 1000, 20):
            answers[number * 100 + visitor] = batcher([number, visitor]).tolist()

    visitors = [threading.Thread(target=visit, args=(visitor,)) for visitor in range(32)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(SLOW)
    assert len(answers) == 32 * 50
    assert all(answer == squares([key // 100, key % 100]) for key, answer in answers.items())
    assert max(map(len, encoder.batches)) <= 8
    assert sum(map(len, encoder.batches)) == 32 * 50 * 2


# ---------------------------------------------------------------- in the engine


@pytest.fixture(scope="module")
def engine(checkpoint) -> AlignmentEngine:
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    none, metadata = (
        torch.empty(0, encoder.embed_dim),
        GalleryMetadata(encoder.fingerprint, "tiny", encoder.logit_scale, None),
    )
    return AlignmentEngine(encoder, Gallery((), (), none, none, metadata))


def together(
    pool: ThreadPoolExecutor, batcher: DynamicBatcher[Any], ask: Callable[[Any], Tensor], queries: Sequence[Any]
):
    """Ask everything while the encoder is busy, so that all of it waits together; the futures."""
    begun, may_go_on, encode = threading.Event(), threading.Event(), batcher._encode

    def hold(items: Sequence[Any]) -> Tensor:
        begun.set()
        assert may_go_on.wait(SLOW)
        return encode(items)

    batcher._encode = hold
    futures = [pool.submit(ask, queries[0])]
    assert begun.wait(SLOW)
    futures += [pool.submit(ask, query) for query in queries[1:]]
    wrong = sum(isinstance(query, str | bytes) and query in ("", b"no picture") for query in queries)
    until(lambda: len(batcher._waiting) == len(queries) - 1 - wrong)
    may_go_on.set()
    return futures


def test_a_poisoned_caption_among_those_that_wait_fails_alone(engine, pool, monkeypatch):
    captions = ["a dog", "two cats", "", "poison", "x" * 2000, "a plate of pasta"]
    alone = {caption: engine.embed_caption(caption) for caption in ("a dog", "two cats", "a plate of pasta")}
    encode = engine.encoder.encode_texts

    def choke(texts: Sequence[str]) -> Tensor:
        if "poison" in texts:
            raise RuntimeError("the tokenizer choked")
        return encode(texts)

    monkeypatch.setattr(engine.encoder, "encode_texts", choke)
    batcher = engine._encode_texts
    futures = together(pool, batcher, engine.embed_caption, [caption for caption in captions if len(caption) < 2000])
    answers = dict(zip(["a dog", "two cats", "", "poison", "a plate of pasta"], futures, strict=True))
    for caption, embed in alone.items():
        torch.testing.assert_close(answers[caption].result(SLOW), embed, atol=1e-5, rtol=0)
    assert isinstance(answers[""].exception(SLOW), InputError)
    assert str(answers["poison"].exception(SLOW)) == "the tokenizer choked"
    with pytest.raises(InputError, match="2000 characters"):
        engine.embed_caption(captions[4])


def test_a_broken_picture_among_those_that_wait_fails_alone(engine, pool, pictures, encoded, monkeypatch):
    good = [encoded(picture, "PNG") for picture in pictures]
    alone = [engine.embed_image(data) for data in good]
    cut = encoded(pictures[0].resize((400, 400)), "JPEG")[:900]
    monkeypatch.setattr(engine._encode_images, "max_batch", 32)  # as on a GPU; a CPU takes pictures one by one
    futures = together(pool, engine._encode_images, engine.embed_image, [good[0], b"no picture", good[1], good[2]])
    for place, embed in zip((0, 2, 3), alone, strict=True):
        torch.testing.assert_close(futures[place].result(SLOW), embed, atol=1e-5, rtol=0)
    assert isinstance(futures[1].exception(SLOW), InputError)
    with pytest.raises(InputError):
        engine.embed_image(cut)
