from io import BytesIO

import pytest
import torch
from PIL import Image

from alignment.engine import MAX_TERMS, AlignmentEngine, Query, Term, parse_query, write_query
from alignment.engine.queries import MINUS_THRESHOLD, scores, search
from alignment.gallery import Gallery, Picture, modality
from alignment.gallery.modality import Modality
from alignment.preprocess import InputError, open_image
from alignment.similarity import group_near_duplicates
from alignment.ui.strings import error_text


@pytest.fixture(scope="module")
def engine(compact_engine) -> AlignmentEngine:
    return compact_engine


def read(text: str) -> list[tuple[float, str]]:
    return [(term.weight, term.text) for term in parse_query(text)]


def picture(engine: AlignmentEngine, id: str, weight: float = 1.0) -> Term:
    return Term(weight=weight, picture=id, embed=engine.picture_embed(id))


def ids(found) -> list[str]:
    return [match.item.id for match in found.matches]


# ---------------------------------------------------------------- reading and writing


@pytest.mark.parametrize(
    "caption",
    [
        "a t-shirt",
        "2 dogs",
        "a x-ray",
        "2 x-rays on a desk",
        "a 4x4 car",
        "4x4 car",
        "2 x 4 planks",
        "2×4 planks",
        "black-and-white",
        "C++ in a book",
        "a well-known dog – brown",
        "a dog -fruit",
        "-5 degrees",
        "北京-上海高铁",
        "a+b",
    ],
)
def test_an_ordinary_caption_is_not_torn_apart(caption):
    assert read(caption) == [(1, caption)]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("2 x golden retriever + snow - people", [(2, "golden retriever"), (1, "snow"), (-1, "people")]),
        ("2x dog", [(2, "dog")]),
        ("2 × dog", [(2, "dog")]),
        ("0.5*dog", [(0.5, "dog")]),
        ("0,5 × dog", [(0.5, "dog")]),
        ("dog − 1.5 X cat", [(1, "dog"), (-1.5, "cat")]),
        ("2×金毛＋海滩－人", [(2, "金毛"), (1, "海滩"), (-1, "人")]),
        ("金毛+海滩", [(1, "金毛"), (1, "海滩")]),
        ("狗+２x海滩", [(1, "狗"), (2, "海滩")]),
        ("- fruit", [(-1, "fruit")]),
        ("dog +", [(1, "dog")]),
        (" + ", []),
        ('"a dog - brown"', [(1, "a dog - brown")]),
        ('a sign "stop + go" + rain', [(1, 'a sign "stop + go"'), (1, "rain")]),
        ('2 x "3 x dogs"', [(2, "3 x dogs")]),
    ],
)
def test_signs_and_weights_are_read_in_both_languages_habits(text, terms):
    assert read(text) == terms
    assert parse_query(write_query(parse_query(text))) == parse_query(text)


@pytest.mark.parametrize("text", ["a - b", "2 x dogs", "狗+猫", "- a", 'say "hi" + go'])
def test_a_caption_that_looks_like_a_query_is_written_so_that_it_stays_one(text):
    terms = (Term("dog"), Term(text, -2.0))
    if '"' not in text:
        assert parse_query(write_query(terms)) == terms
    assert write_query(terms).startswith("dog - 2 x ")


def test_what_is_wrong_with_a_query_is_said_in_both_languages(engine):
    wrong = {
        "query.weight": lambda: parse_query("20 x dog"),
        "query.too_many": lambda: parse_query(" + ".join(["dog"] * (MAX_TERMS + 1))),
        "query.only_minus": lambda: engine.compose_query(parse_query("- dog - cat")),
        "caption.empty": lambda: engine.compose_query(parse_query(" + ")),
        "caption.too_long": lambda: engine.compose_query(parse_query("dog + " + "x" * 1001)),
    }
    for code, ask in wrong.items():
        with pytest.raises(InputError) as raised:
            ask()
        assert raised.value.code == code
        assert error_text("en", raised.value) == str(raised.value)
        assert any("\u4e00" <= letter <= "\u9fff" for letter in error_text("zh", raised.value))


def test_pictures_count_among_the_parts(engine):
    with pytest.raises(InputError, match=f"{MAX_TERMS} parts"):
        engine.compose_query([picture(engine, "cat")] * (MAX_TERMS + 1))


# ---------------------------------------------------------------- ranking


@pytest.mark.parametrize("text", ["a lion", "2 x a lion", "  一只狮子 "])
def test_one_caption_is_searched_as_ever(engine, text):
    (term,) = parse_query(text)
    assert engine.search_images(engine.compose_query([term]), 5) == engine.search_images(term.text, 5)


@pytest.mark.parametrize("text", ["a lion", "the silhouette of a horse", "黑白照片"])
def test_captions_and_pictures_are_brought_to_one_scale(engine, text):
    """Neither side drowns the other: over unrelated pictures each has mean 0 and spread 1."""
    background = engine.gallery.judge.cohort.image_embeds
    outside = Term(picture="outside", embed=engine.embed_image(Image.effect_noise((99, 80), 90).convert("RGB")))
    for term in (engine.compose_query([Term(text)]).terms[0], outside):
        scored = scores(Query((term,)), background, background)
        assert (scored.mean().item(), scored.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-9)


def test_scores_are_the_weighted_sum_of_the_terms(engine):
    query = engine.compose_query([*parse_query("2 x a lion + a rock - 0.5 x running"), picture(engine, "cat", -1.5)])
    background, pictures = engine.gallery.judge.cohort.image_embeds.double(), engine.gallery.images.embeds.double()
    expected = torch.zeros(len(pictures)).double()
    for term in query.terms:
        unrelated = background @ term.embed.double()
        unrelated = unrelated[unrelated < 0.99]
        standard = (pictures @ term.embed.double() - unrelated.mean()) / unrelated.std(correction=0)
        expected += term.weight * (standard if term.weight > 0 else (standard - MINUS_THRESHOLD).clamp(min=0))
    torch.testing.assert_close(scores(query, engine.gallery.images.embeds, background.float()), expected)
    found = engine.search_images(query, 12)
    rows = {item.id: row for row, item in enumerate(engine.gallery.pictures)}
    assert [match.similarity for match in found.matches] == [float(expected[rows[id]]) for id in ids(found)]
    assert [match.similarity for match in found.matches] == sorted(
        expected[torch.arange(len(expected)) != rows["cat"]]
    )[::-1][:12]


@pytest.mark.parametrize("text", ["a lion + a rock", "2 x a lion - a rock", "a lion + a horse - 3 x running - a cat"])
def test_of_many_pictures_the_best_are_found_without_scoring_all(engine, text, monkeypatch):
    count = 6000
    kinds = engine.gallery.images.embeds[torch.arange(count) % len(engine.gallery.pictures)]
    noise = torch.randn(count, kinds.shape[1], generator=torch.Generator().manual_seed(0))
    embeds = torch.nn.functional.normalize(kinds + 0.08 * noise, dim=-1)
    pictures = [Picture(f"p{row}", f"{row}.jpg") for row in range(count)]
    many = Gallery(pictures, (), embeds, embeds[:0], engine.gallery.metadata, judge=engine.gallery.judge)
    query = engine.compose_query(parse_query(text))
    asked = []
    nearest = Modality.search
    monkeypatch.setattr(Modality, "search", lambda *args: asked.append(args[2]) or nearest(*args))
    found = search(many, query, 12)
    assert max(asked) < count
    monkeypatch.setattr(modality, "LARGE", 10**6)  # everything is scored
    expected = search(many, query, 12)
    assert [match.item.id for match in found.matches] == [match.item.id for match in expected.matches]
    for what in ("similarity", "probability"):
        said = [[getattr(match, what) for match in answer.matches] for answer in (found, expected)]
        assert said[0] == pytest.approx(said[1], abs=1e-6)
    assert found.fits == expected.fits


def test_a_minus_term_never_raises_a_score(engine):
    pictures, background = engine.gallery.images.embeds, engine.gallery.judge.cohort.image_embeds
    plain = scores(engine.compose_query(parse_query("a wild animal")), pictures, background)
    minus = scores(engine.compose_query(parse_query("a wild animal - a lion")), pictures, background)
    assert (minus <= plain + 1e-5).all()
    assert ((minus - plain).abs() < 1e-5).sum() > len(pictures) / 2  # most have nothing of a lion
    lion = next(row for row, item in enumerate(engine.gallery.pictures) if item.id == "lion")
    assert minus[lion] < plain[lion] - 1


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a cheetah + running", "cheetah-running"),
        ("猎豹＋奔跑", "cheetah-running"),
        ("a cheetah - running", "cheetah-face"),
        ("猎豹－奔跑", "cheetah-face"),
        ("a cup of coffee + a wooden table", "coffee"),
        ("2 x a lion + a cup of coffee", "lion"),
        ("a lion + 2 x a cup of coffee", "coffee"),
    ],
)
def test_the_compact_model_finds_what_is_asked_for_in_parts(engine, text, first):
    assert ids(engine.search_images(engine.compose_query(parse_query(text)), 3))[0] == first


def test_more_like_this_finds_its_kind_but_not_itself(engine):
    found = engine.search_images(engine.compose_query([picture(engine, "cheetah-face")]), 30)
    assert ids(found)[:2] == ["cheetah-cub", "cheetah-running"]
    assert len(ids(found)) == len(engine.gallery.pictures) - 1


def test_less_like_this_turns_away_from_its_kind(engine):
    less = ids(
        engine.search_images(engine.compose_query([*parse_query("a cheetah"), picture(engine, "cheetah-face", -0.5)]))
    )
    assert less[0] == "cheetah-running"  # another cheetah's face is more like the one to avoid
    assert "cheetah-face" not in less


def test_a_picture_and_a_caption_both_have_their_say(engine):
    both = ids(
        engine.search_images(engine.compose_query([*parse_query("black and white"), picture(engine, "lion")]), 4)
    )
    only = [
        ids(engine.search_images(engine.compose_query(terms), 4))
        for terms in ([picture(engine, "lion")], parse_query("black and white"))
    ]
    assert set(both) & set(only[0]) - set(only[1])
    assert set(both) & set(only[1]) - set(only[0])


def test_composed_queries_search_a_visitors_photos_too(engine):
    photos = engine.gallery_photos(["lion", "coffee", "cheetah-face", "cheetah-running"])
    found = engine.search_images(engine.compose_query(parse_query("a cheetah - running")), photos=photos)
    assert ids(found)[0] == "cheetah-face"


# ---------------------------------------------------------------- how sure


def chances(engine: AlignmentEngine, text: str) -> dict[str, float]:
    found = engine.search_images(engine.compose_query(parse_query(text)), 30)
    return {match.item.id: match.probability for match in found.matches}


def test_weights_change_the_order_not_the_probability(engine):
    even, heavy = chances(engine, "a lion + a rock"), chances(engine, "3 x a lion + a rock")
    assert list(even) != list(heavy)
    assert even == pytest.approx(heavy, rel=1e-4)


def test_a_minus_caption_multiplies_by_the_odds_of_its_absence(engine):
    plain, minus, unwanted = (chances(engine, text) for text in ("a cheetah", "a cheetah - a lion", "a lion"))
    for id, chance in minus.items():
        assert chance == pytest.approx(plain[id] * (1 - unwanted[id]), rel=1e-4)


def test_captions_of_a_right_picture_back_each_other(engine):
    """As if they were independent, two captions that both fit would look like a miss."""
    both, one, other = (
        chances(engine, text)["coffee"]
        for text in ("a cup of coffee + a wooden table", "a cup of coffee", "a wooden table")
    )
    assert both > 5 * one * other


def test_without_a_caption_to_look_for_there_is_no_probability(engine):
    for terms in ([picture(engine, "lion")], [picture(engine, "lion"), *parse_query("- a rock")]):
        found = engine.search_images(engine.compose_query(terms), 3)
        assert (found.composed, found.fits, found.p_any_match) == (True, True, None)
        assert {match.probability for match in found.matches} == {None}


def test_a_composed_query_that_nothing_fits_says_so(engine):
    assert engine.search_images(engine.compose_query(parse_query("a cheetah + running")), 3).fits
    assert not engine.search_images(engine.compose_query(parse_query("a zebra + snow")), 3).fits


def test_nonsense_among_the_parts_is_named(engine):
    found = engine.search_images(engine.compose_query(parse_query("a cat + xqzt bvvk wpl")), 3)
    assert (found.fits, found.is_out_of_distribution, found.ood_captions) == (False, True, ("xqzt bvvk wpl",))
    assert {match.probability for match in found.matches} == {0.0}


# ---------------------------------------------------------------- nearly the same


def test_items_are_grouped_with_the_best_ranked_one_they_resemble():
    a, b, c = torch.eye(3)
    again = torch.nn.functional.normalize(a + 0.1 * b, dim=0)
    ranked = torch.stack([a, b, again, c])
    assert group_near_duplicates(ranked, 2, 0.9) == [[0, 2], [1]]
    assert group_near_duplicates(ranked, 9, 0.999) == [[0], [1], [2], [3]]
    assert group_near_duplicates(ranked[:0], 2, 0.9) == []


def test_copies_of_a_picture_are_grouped_and_distinct_ones_are_not(engine):
    def copies(id: str) -> list[bytes]:
        image = open_image(next(item.path for item in engine.gallery.pictures if item.id == id))
        width, height = image.size
        edge = (width // 20, height // 20, width - width // 20, height - height // 20)
        made = []
        for copy, quality in ((image, 95), (image, 40), (image.crop(edge), 90)):
            buffer = BytesIO()
            copy.save(buffer, "JPEG", quality=quality)
            made.append(buffer.getvalue())
        return made

    files = [(f"{id}{number}", data) for id in ("cat", "coffee") for number, data in enumerate(copies(id))]
    photos, _ = engine.add_photos(engine.no_photos(), files)
    found = engine.search_images("a cat", 2, photos=photos)
    assert [{match.item.source[:-1] for match in group} for group in found.duplicates] == [{"cat"}, {"coffee"}]
    assert [len(group) for group in found.duplicates] == [3, 3]
    assert len(found.matches) == 2  # the ranking itself is as it was
    ranks = [match.rank for match in found.duplicates[0]]
    assert ranks == sorted(ranks)
    assert all(len(group) == 1 for group in engine.search_images("an animal", len(engine.gallery.pictures)).duplicates)
