"""What each word of a caption adds to its match with a picture.

Place in the flow: `caption -> words (here) -> encoder -> cosine with and without`. Only the text tower runs, once.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from alignment.model import DualEncoder
from alignment.preprocess import clean_caption
from alignment.similarity import cosine_similarity

_INNER = "'’-"  # part of a word between two letters: "dog's", "T-shirt"
_JOINERS = "\u200d\ufe0f"  # hold an emoji of several characters together

# Chinese has no spaces. Words of their own: number and measure word, particles, prepositions, the verb "to wear".
_HAN_WORD = re.compile(
    "[一二两三四五六七八九十几半这那每]+[个只位名条张匹辆群座头把杯件对双块片架艘朵棵间家排堆根支本部台幅种些身道口]"
    "|[的了着是在和与及或被把从向对穿戴里]|上(?![衣面])|下(?![雨面])"
)


@dataclass(frozen=True)
class WordContribution:
    """One word, at `caption[start:end]`, and what it adds to the match.

    `contributions` are per picture the cosine lost when the word is left out, in [-2, 2]; negative where the caption
    fits better without it. The scale is the same for every caption and every picture of a model.
    """

    word: str
    start: int
    end: int
    contributions: tuple[float, ...]


def word_contributions(
    encoder: DualEncoder, image_embeds: Tensor, caption: str, *, background: float = 0.0
) -> list[WordContribution]:
    """Leave each word of a caption out in turn and see what the match loses.

    Punctuation is no word, and a caption of nothing else has none.

    `image_embeds` is (num_images, embed_dim), or (embed_dim,) for one picture. A caption of a single word is compared
    with `background`, the cosine of unrelated pictures and captions. An empty or too long one raises InputError.

    Source: leave-one-out, or erasure (Li, Monroe and Jurafsky, 2016).
    """
    clean_caption(caption)
    spans = split_words(caption)
    if not spans:
        return []
    rests = [caption[:start] + _seam(caption, start, end) + caption[end:] for start, end in spans]
    asked = [caption, *(rest for rest in rests if split_words(rest))]
    cosines = cosine_similarity(image_embeds.reshape(-1, image_embeds.shape[-1]), encoder.encode_texts(asked)).T
    whole, without = cosines[0], iter(cosines[1:])
    losses = [whole - (next(without) if split_words(rest) else background) for rest in rests]
    return [
        WordContribution(caption[start:end], start, end, tuple(loss.tolist()))
        for (start, end), loss in zip(spans, losses, strict=True)
    ]


def split_words(caption: str) -> list[tuple[int, int]]:
    """Find the (start, end) of each word of a caption in any script, in order.

    Letters, digits and their marks make words; runs of Chinese characters are cut at particles and after measure words
    and the rest into pieces of two or three, which is how long Chinese words mostly are; Japanese changes its script
    between words; an emoji is a word.
    """
    spans: list[tuple[int, int]] = []
    for kind, places in groupby(range(len(caption)), lambda place: _kind(caption, place)):
        run = list(places)
        start, end = run[0], run[-1] + 1
        if kind == "han":
            spans += [(start + first, start + last) for first, last in _han_words(caption[start:end])]
        elif kind is not None:
            spans.append((start, end))
    return spans


def _kind(caption: str, place: int) -> str | None:
    """Classify a character: one of the scripts, an emoji, or None for what separates words."""
    character = caption[place]
    if character in _JOINERS or unicodedata.category(character)[0] == "M":
        return _kind(caption, place - 1) if place else None
    if character in _INNER:
        inside = 0 < place < len(caption) - 1 and caption[place - 1].isalnum() and caption[place + 1].isalnum()
        return "letters" if inside else None
    if character.isalnum() or character == "ー":
        name = unicodedata.name(character, "")
        if name.startswith("CJK") or character in "々〇":
            return "han"
        return next((script for script in ("HIRAGANA", "KATAKANA") if script in name), "letters")
    return "emoji" if unicodedata.category(character) in ("So", "Sk") else None


def _han_words(run: str) -> Iterator[tuple[int, int]]:
    """Cut a run of Chinese characters into (start, end): known words, and twos, the last a three if that is odd."""
    start = 0
    for first, last in [*(match.span() for match in _HAN_WORD.finditer(run)), (len(run), len(run))]:
        while first - start > 3:
            yield start, start + 2
            start += 2
        yield from (span for span in ((start, first), (first, last)) if span[0] < span[1])
        start = last


def _seam(caption: str, start: int, end: int) -> str:
    """Keep the neighbours of what was cut out apart; Chinese neighbours touched before."""
    before, after = caption[:start][-1:], caption[end:][:1]
    touching = "han" in (_kind(before, 0) if before else None, _kind(after, 0) if after else None)
    return "" if touching or not before or not after or before.isspace() else " "
