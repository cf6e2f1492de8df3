"""The making of the compact model: its parts one by one, then all stages in miniature, then the files it writes."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from alignment.compact.convert import convert_image_tower, convert_text_tower, convert_tokenizer
from alignment.compact.features import (
    VIEWS,
    ImageFeatures,
    TextFeatures,
    image_features,
    read_class_names,
    read_scenes,
    text_features,
)
from alignment.compact.recipe import (
    Aligner,
    Captions,
    Prototypes,
    Recipe,
    Teacher,
    TextTargets,
    Training,
    train_heads,
    train_tail,
    train_text,
)
from alignment.compact.release import assemble, compact_preprocessor, save_compact
from alignment.compact.scenes import read_flickr8k_cn, read_photos
from alignment.losses import softmax_loss
from alignment.preprocess import Preprocessor, open_image
from alignment.towers import (
    AlignmentHead,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    NgramTextConfig,
    NgramTextModel,
    join_parts,
)

ROOT = Path(__file__).parents[1]
SIDE, EMBED_DIM, WIDTH = 64, 16, 20
SMALL = NgramTextConfig(embed_dim=EMBED_DIM, num_queries=4, hidden_dim=32, dropout=0.1)
TEXTS = ("a dog", "一只猫在桌子上睡觉", "two children play football on the wet grass", "x")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return convert_tokenizer()


@pytest.fixture(scope="module")
def preprocessor(tokenizer: PreTrainedTokenizerFast) -> Preprocessor:
    return compact_preprocessor(tokenizer, SIDE)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def small_image_tower() -> EfficientNetLiteModel:
    config = EfficientNetLiteConfig(
        image_size=SIDE, width_multiplier=0.25, depth_multiplier=0.5, num_classes=7, concept_dim=12, tail_start=5
    )
    model = EfficientNetLiteModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return model


def small_text_tower() -> NgramTextModel:
    model = NgramTextModel(NgramTextConfig(token_dim=16, gram_dim=8, sentence_dim=12)).eval()
    model.table.codes.random_(0, 255)
    model.table.scale.fill_(0.01)
    model.table.offset.fill_(-1.27)
    return model


# ---------------------------------------------------------------- the parts


def test_recipe_refuses_unknown_keys() -> None:
    with pytest.raises(TypeError, match="heads_epoch"):
        Recipe(**{"heads_epoch": 3})


def test_prototypes_are_classified_as_their_own_class() -> None:
    """On the real classifier, with the features of photographs."""
    tower, spec = convert_image_tower(), find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "brick.png")
    pictures = [open_image(Path(spec.origin).parent / "data" / name).resize((260, 260)) for name in names]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        prototypes = Prototypes(tower.classifier, tower(pixels).pooler_output.unsqueeze(1))
        classes = torch.arange(1000)
        assert (tower.classifier(prototypes.features).argmax(-1) == classes).float().mean() > 0.99
        drawn = prototypes.draw(classes)
        assert (tower.classifier(drawn).argmax(-1) == classes).float().mean() > 0.9
        assert drawn.min() >= 0, "averaged features come out of a ReLU6"
        assert not torch.equal(drawn, prototypes.draw(classes))


def test_draw_stays_with_the_picture_and_repeats_nothing_while_it_lasts() -> None:
    count = torch.tensor([5, 1, 3, 2, 7])
    first = count.cumsum(0) - count
    captions = Captions(torch.zeros(int(count.sum()), 2), first, count)
    images = torch.tensor([4, 1, 0, 2, 3, 1, 4])
    seen: list[set[int]] = [set() for _ in images]
    for _ in range(60):
        rows = captions.draw(images, 3)
        assert rows.shape == (7, 3)
        for place, image in enumerate(images.tolist()):
            drawn = rows[place].tolist()
            assert all(first[image] <= row < first[image] + count[image] for row in drawn)
            assert len(set(drawn)) == min(3, int(count[image]))
            seen[place] |= set(drawn)
    assert [len(rows) for rows in seen] == count[images].tolist(), "every caption gets its turn"


def test_windows_are_cut_from_the_right_place_of_the_right_view() -> None:
    maps = np.arange(3 * VIEWS * 2 * 5 * 5, dtype=np.float16).reshape(3, VIEWS, 2, 5, 5)
    features = ImageFeatures(maps, torch.zeros(3, VIEWS, 4))
    images, views = torch.tensor([2, 0]), torch.tensor([1, 0])
    whole = features.windows(images, views, 5)
    assert whole.dtype == torch.float32
    assert np.array_equal(whole.numpy(), np.stack([maps[2, 1], maps[0, 0]]))
    assert np.array_equal(features.windows(images, views, 3).numpy(), whole[:, :, :3, :3].numpy())
    places = set()
    rng = np.random.default_rng(0)
    for _ in range(60):
        for cut, full in zip(features.windows(images, views, 3, rng), whole, strict=True):
            top, left = divmod(int(cut[0, 0, 0] - full[0, 0, 0]), 5)
            assert torch.equal(cut, full[:, top : top + 3, left : left + 3])
            places.add((top, left))
    assert places == {(top, left) for top in range(3) for left in range(3)}


@torch.no_grad()
def test_text_features_are_what_the_tower_makes_of_a_batch(preprocessor: Preprocessor) -> None:
    tower = small_text_tower()
    features = text_features(tower, preprocessor, TEXTS, batch_size=2)
    rows = torch.tensor([2, 0, 1, 3, 0])
    tokens, sentences, mask = features.batch(rows)
    inputs = preprocessor.texts([TEXTS[row] for row in rows])
    expected, expected_sentences = tower.sentences(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(mask, inputs["attention_mask"])
    torch.testing.assert_close(tokens, expected, atol=5e-3, rtol=1e-3)  # kept in half precision
    torch.testing.assert_close(sentences, expected_sentences)
    assert expected.abs().max() > 0.5
    short = features.batch(torch.tensor([3]))[0]
    assert short.shape[1] == int(inputs["attention_mask"][3].sum())


@torch.no_grad()
def test_image_features_hold_every_view_and_are_computed_once(preprocessor: Preprocessor, tmp_path: Path) -> None:
    tower, paths = small_image_tower(), painted(tmp_path, 3)
    features = image_features(tower, paths, preprocessor, tmp_path, batch_size=2)
    pixels = preprocessor.images([open_image(path) for path in paths])["pixel_values"]
    for view, seen in enumerate((pixels, pixels.flip(-1))):
        expected = tower(seen).pooler_output
        scale = expected.abs().max()
        torch.testing.assert_close(features.pooled[:, view] / scale, expected / scale, atol=5e-2, rtol=0)  # bfloat16
        maps = torch.from_numpy(np.array(features.maps[:, view])).float()
        expected_maps = tower.trunk_maps(seen)
        assert functional.cosine_similarity(maps.flatten(1), expected_maps.flatten(1)).min() > 0.99
    for view in range(1, VIEWS):
        assert (features.pooled[:, 0] - features.pooled[:, view]).abs().max() > 1e-3
    for parameter in tower.parameters():
        parameter.fill_(float("nan"))  # a second run has to take what the first one left
    again = image_features(tower, paths, preprocessor, tmp_path, batch_size=2)
    assert torch.equal(again.pooled, features.pooled)


def test_a_stopped_pass_over_the_pictures_goes_on(preprocessor: Preprocessor, tmp_path: Path) -> None:
    tower, paths = small_image_tower(), painted(tmp_path, 3)
    whole = image_features(tower, paths, preprocessor, tmp_path, batch_size=2)
    (progress,) = tmp_path.glob("maps-*.json")
    progress.write_text("2")
    pooled = whole.pooled.clone()
    (kept,) = tmp_path.glob("pooled-*.npy")
    array = np.load(kept, mmap_mode="r+")
    array[:] = -1
    array.flush()
    again = image_features(tower, paths, preprocessor, tmp_path, batch_size=2)
    assert (again.pooled[:2] == -1).all(), "what was done is not done again"
    torch.testing.assert_close(again.pooled[2], pooled[2], atol=1e-2, rtol=1e-2)


def test_photographs_are_read_with_both_languages(tmp_path: Path) -> None:
    for folder, name in (("own", "7.png"), ("flickr", "1_a.png")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / name)
    row = '{{"file_name": "7.png", "split": "dev", "captions": ["{}"]}}\n'
    (tmp_path / "own" / "captions.en.jsonl").write_text(row.format("a dog"), "utf-8")
    (tmp_path / "own" / "captions.zh.jsonl").write_text(row.format("一只狗"), "utf-8")
    (tmp_path / "flickr" / "captions.csv").write_text("image,caption,split\n1_a.png,a cat,train\n", "utf-8")
    chinese = tmp_path / "zh.txt"
    chinese.write_text("1_a.jpg#zhc#0 一只猫。\n1_a.jpg#zhc#1 猫\n", "utf-8")
    flickr, own = read_photos([tmp_path / "own", tmp_path / "flickr"], chinese)
    assert (own.source, own.split, dict(own.captions)) == ("own", "dev", {"en": ("a dog",), "zh": ("一只狗",)})
    assert (flickr.source, flickr.split) == ("flickr", "train")
    assert dict(flickr.captions) == {"en": ("a cat",), "zh": ("一只猫。", "猫")}
    chinese.write_text("1_a.jpg#zhc#0 一只猫。\nnot a caption\n", "utf-8")
    with pytest.raises(ValueError, match="line 2"):
        read_flickr8k_cn(chinese)
    chinese.write_text("other.jpg#zhc#0 一只猫。\n", "utf-8")
    with pytest.raises(ValueError, match="names none"):
        read_photos([tmp_path / "flickr"], chinese)


def small_aligner(tower: EfficientNetLiteModel) -> Aligner:
    head = AlignmentHead(1280, 1280, SMALL)
    teachers = {language: Teacher(WIDTH, EMBED_DIM, 0.1) for language in ("en", "zh")}
    return Aligner(copy.deepcopy(tower.tail), head, teachers)


def test_the_aligners_loss_in_closed_form() -> None:
    aligner = small_aligner(small_image_tower())
    eye = torch.eye(4)
    alike = aligner.loss(eye[[0, 0, 0]], eye[[1, 1, 1]].unsqueeze(1))
    torch.testing.assert_close(alike.item(), math.log(3), atol=1e-5, rtol=0)
    scale = 1 / 0.07
    right = math.log(1 + 3 * math.exp(-scale))
    wrong = scale + right
    captions = torch.stack([eye, eye.roll(1, 0)], dim=1)
    torch.testing.assert_close(aligner.loss(eye, captions).item(), (right + wrong) / 2, atol=1e-4, rtol=0)
    aligner.logit_scale.data.fill_(20.0)  # held at a scale of 100
    torch.testing.assert_close(aligner.loss(eye, captions[:, 1:]).item(), 100.0, atol=1e-3, rtol=0)


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    module = nn.Linear(2, 1)
    optimiser = Recipe().optimiser(module, [(list(module.parameters()), 1e-2)], 30)
    before = module.weight.detach().clone()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="learning rates"):
            optimiser.step(module(torch.ones(1, 2)).sum() * bad)
    assert torch.equal(module.weight, before)
    optimiser.step(module(torch.ones(1, 2)).sum())
    assert not torch.equal(module.weight, before)


def test_the_average_is_what_is_kept() -> None:
    module = nn.Linear(1, 1, bias=False)
    optimiser = Recipe(average=0.5).optimiser(module, [([module.weight], 1e-1)], 30)
    averaged = None
    for _ in range(4):
        optimiser.step(module(torch.ones(1, 1)).sum())
        now = module.weight.detach().clone()
        averaged = now if averaged is None else 0.5 * averaged + 0.5 * now
    optimiser.keep_average()
    torch.testing.assert_close(module.weight.detach(), averaged)
    assert not torch.equal(module.weight, now)
    assert not module.training


def test_class_names_and_scenes_are_complete() -> None:
    names = read_class_names(ROOT / "assets/class_names.tsv")
    assert len(names) == 1000
    assert names[1].english[0] == "goldfish"
    assert names[1].chinese[0] == "金鱼"
    texts = [text for known in names for text in (*known.english, *known.chinese)]
    assert all(text == text.strip() and text for text in texts)
    scenes = read_scenes(ROOT / "assets/gallery/sources/captions.jsonl")
    assert len(scenes) >= 1000
    assert all(english.isascii() or "é" in english for english, _ in scenes[:20])


# ---------------------------------------------------------------- all stages in miniature


def painted(folder: Path, count: int) -> list[str]:
    """Paint pictures that differ: a bright bar at a place and an angle of its own on a colour of its own."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        canvas = np.ones((48, 60, 3), np.uint8) * rng.integers(0, 256, 3, dtype=np.uint8)
        canvas[:, number % 12 * 5 : number % 12 * 5 + 9] = rng.integers(0, 256, 3, dtype=np.uint8)
        path = folder / f"{number:02}.png"
        Image.fromarray(canvas).save(path)
        paths.append(str(path))
    return paths


@dataclass
class Miniature:
    features: ImageFeatures
    aligner: Aligner
    data: Training
    recipe: Recipe

    @torch.no_grad()
    def caption_loss(self, module: Aligner | None = None) -> float:
        """Measure on whole pictures, without dropout."""
        aligner = copy.deepcopy(module or self.aligner).eval()
        train = self.data.train
        maps = self.features.windows(train, torch.zeros_like(train), self.features.maps.shape[-1])
        english = self.data.captions["en"]
        captions = aligner.teachers["en"](english.features[english.first[train]])
        return aligner.loss(aligner.images(maps)[0], captions.unsqueeze(1)).item()


@pytest.fixture
def miniature(preprocessor: Preprocessor, tmp_path: Path) -> Miniature:
    torch.manual_seed(0)
    recipe = Recipe(
        heads_epochs=6,
        tail_epochs=(8, 6),
        text_epochs=40,
        batch_size=6,
        captions_per_image=2,
        dropout=0.1,
        tail_dropout=0.1,
        text_dropout=0.0,
        windows=(3, 4),
        names_per_step=4,
        teacher_weight=0.5,
        extras_per_step=5,
        average=0.8,
        tail_rate=3e-4,
        tuned_rate=2e-3,
        heads_rate=5e-3,
        text_rate=1e-2,
    )
    tower, paths = small_image_tower(), painted(tmp_path, 26)
    features = image_features(tower, paths, preprocessor, tmp_path)
    count = torch.full((26,), 3)
    meaning = torch.randn(26, WIDTH).repeat_interleave(3, 0)
    captions = {
        language: Captions(meaning + 0.1 * torch.randn(78, WIDTH), count.cumsum(0) - count, count)
        for language in ("en", "zh")
    }
    train = torch.arange(1, 25)  # rows and places in the list differ, as they do where dev pictures lie between
    names = {language: [torch.randn(1 + number % 3, WIDTH) for number in range(7)] for language in ("en", "zh")}
    prototypes = Prototypes(tower.classifier, features.pooled[train])
    aligner = small_aligner(tower)
    for norm in (aligner.head.summary_norm, aligner.head.token_norm):
        norm.mean.copy_(features.pooled.mean((0, 1)))
        norm.deviation.copy_(features.pooled.std((0, 1)) + 0.05)
    return Miniature(features, aligner, Training(train, features, captions, prototypes, names, recipe), recipe)


def test_the_heads_learn_and_leave_the_tower_alone(miniature: Miniature) -> None:
    before, tail = miniature.caption_loss(), copy.deepcopy(miniature.aligner.tail.state_dict())
    train_heads(miniature.aligner, miniature.data)
    assert miniature.caption_loss() < 0.6 * before
    kept = miniature.aligner.tail.state_dict()
    assert all(torch.equal(kept[name], tail[name]) for name in tail)


def test_the_tail_learns_in_runs(miniature: Miniature, tmp_path: Path) -> None:
    start, before = copy.deepcopy(miniature.aligner.state_dict()), miniature.caption_loss()
    epochs: list[tuple[int, float]] = []

    def measured(epoch: int, average: Aligner) -> None:
        epochs.append((epoch, miniature.caption_loss(average)))

    for run in range(len(miniature.recipe.tail_epochs)):
        miniature.aligner.load_state_dict(start)
        train_tail(miniature.aligner, miniature.data, run, measured, tmp_path / f"state{run}.safetensors")
        assert epochs[-1][1] == pytest.approx(miniature.caption_loss(), abs=1e-5), "what is kept is what was measured"
        assert miniature.aligner.head.summary.dropout.p == miniature.recipe.tail_dropout
    assert [epoch for epoch, _ in epochs] == [*range(1, 9), *range(1, 7)]
    assert miniature.caption_loss() < 0.6 * before
    kept = miniature.aligner.tail.state_dict()
    assert any(not torch.equal(kept[name], start[f"tail.{name}"]) for name in kept)


def test_a_stopped_tail_stage_goes_on_from_its_last_epoch(miniature: Miniature, tmp_path: Path) -> None:
    state, start = tmp_path / "state.safetensors", copy.deepcopy(miniature.aligner)
    data = replace(miniature.data, recipe=replace(miniature.recipe, tail_epochs=(4,)))
    seen: list[int] = []

    def stop(epoch: int, average: Aligner) -> None:
        seen.append(epoch)
        if seen == [1, 2, 3]:
            raise KeyboardInterrupt

    train_tail(miniature.aligner, data, 0, lambda epoch, average: None, tmp_path / "unbroken.safetensors")
    with pytest.raises(KeyboardInterrupt):
        train_tail(copy.deepcopy(start), data, 0, stop, state)
    resumed = copy.deepcopy(start)
    train_tail(resumed, data, 0, stop, state)
    assert seen == [1, 2, 3, 3, 4], "the epoch that was broken off is done again, the others are not"
    whole = miniature.aligner.state_dict()
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole[name], atol=1e-5, rtol=1e-4)


def test_the_text_head_learns(miniature: Miniature, preprocessor: Preprocessor) -> None:
    data, recipe, aligner = miniature.data, miniature.recipe, miniature.aligner.eval()
    captions = [f"picture {number}, {word}" for number in range(26) for word in ["one", "two", "three"]]
    texts = [*captions, "a red bus", "一辆红色的公交车", *(f"name {number}" for number in range(7))]
    features = text_features(small_text_tower(), preprocessor, texts)
    with torch.no_grad():
        english = data.captions["en"]
        teacher = aligner.teachers["en"](english.features)
        pictures = teacher[english.first].unsqueeze(1) + 0.05 * torch.randn(26, VIEWS, EMBED_DIM)
        targets = TextTargets(
            features=features,
            captions={"en": Captions(teacher, english.first, english.count)},
            rows={"en": torch.arange(78)},
            scenes=torch.tensor([78, 79]),
            scene_teacher=functional.normalize(torch.randn(1, EMBED_DIM), dim=-1).repeat(2, 1),
            names=[torch.tensor([80 + number]) for number in range(7)],
            images=join_parts(
                functional.normalize(pictures, dim=-1),
                functional.normalize(torch.randn(26, VIEWS, 12), dim=-1),
                recipe.trained_image_weight[0],
            ),
            center=features.sentences.mean(0),
        )
    head = AlignmentHead(12, 40, SMALL)
    head.summary_norm.deviation.fill_(12**-0.5)
    frozen = copy.deepcopy(aligner.state_dict())
    before = text_losses(head, targets, features, data.train)
    train_text(head, aligner, data, targets)
    after = text_losses(head, targets, features, data.train)
    assert (after < 0.6 * before).all(), (before, after)
    assert all(torch.equal(value, frozen[name]) for name, value in aligner.state_dict().items())


@torch.no_grad()
def text_losses(head: AlignmentHead, targets: TextTargets, features: TextFeatures, train: Tensor) -> Tensor:
    """Contrast with the pictures, distance from the teacher's captions, distance from the teacher's scenes."""
    head.eval()
    english = targets.captions["en"]
    rows = torch.cat([english.first[train], targets.scenes])
    tokens, sentences, mask = features.batch(rows)
    captions, scenes = head(sentences, tokens, mask).split([len(train), len(targets.scenes)])
    wholes = targets.whole(captions, sentences[: len(train)], Recipe.trained_text_weight)
    contrast = softmax_loss(targets.images[train, 0] @ wholes.T / 0.07)
    held = (1 - (captions * english.features[rows[: len(train)]]).sum(-1)).mean()
    return torch.stack([contrast, held, (1 - (scenes * targets.scene_teacher).sum(-1)).mean()])


# ---------------------------------------------------------------- what is written


def test_the_checkpoint_holds_its_limits_and_rewrites_only_what_was_trained(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    image, text = convert_image_tower(), convert_text_tower()
    teachers = {"en": Teacher(1664, 512, 0.3), "zh": Teacher(896, 512, 0.3)}
    aligner = Aligner(
        copy.deepcopy(image.tail), AlignmentHead(1280, 1280, EfficientNetLiteConfig(embed_dim=512)), teachers
    )
    head = AlignmentHead(512, 1280, NgramTextConfig(embed_dim=512))
    class_embeds = functional.normalize(torch.randn(1000, 512), dim=-1)
    preprocessor, folder = compact_preprocessor(tokenizer, 260), tmp_path / "compact"
    center = 0.05 * torch.randn(512)
    model = assemble(image, text, aligner, head, class_embeds, center, Recipe(image_weight=(0.1, 0.5), text_weight=0.3))
    encoder = save_compact(model, preprocessor, folder)

    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    weights = {name: size for name, size in files.items() if name.endswith(".safetensors")}
    assert weights.keys() == {"frozen.safetensors", "trained.safetensors"}
    assert max(weights.values()) < 95e6
    assert sum(files.values()) <= 110e6
    with safe_open(folder / "frozen.safetensors", "pt") as frozen:
        assert frozen.get_tensor("text_model.table.codes").dtype == torch.uint8
        assert not any(".head." in name and "tail" not in name for name in frozen.keys())  # noqa: SIM118 - a method

    inputs = {
        "pixel_values": torch.randn(2, 3, 260, 260),
        **preprocessor.texts(["a dog on a beach", "沙滩上的狗"]),
    }
    with torch.no_grad():
        expected, found = model(**inputs), encoder.module(**inputs)
    for side in ("image_embeds", "text_embeds"):
        assert (getattr(expected, side) * getattr(found, side)).sum(-1).min() > 0.9999
    torch.testing.assert_close(encoder.logit_scale, 1 / 0.07)
    assert encoder.embed_dim == 1024
    assert encoder.module.state_dict()["vision_model.stem.weight"].dtype == torch.float32

    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    with torch.no_grad():
        model.text_model.head.summary.linear.weight.add_(0.01)
    again = save_compact(model, preprocessor, folder)
    after = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert after["frozen.safetensors"] == before["frozen.safetensors"]
    assert after["trained.safetensors"][2] != before["trained.safetensors"][2]
    assert again.fingerprint != encoder.fingerprint
