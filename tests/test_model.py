import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from alignment.model import DualEncoder, best_device, find_device, torch_tower
from alignment.model.torch_tower import embed_in_half, weights_sha256
from alignment.preprocess import InputError
from alignment.similarity import cosine_similarity, logits_per_image

TEXTS = ["a dog runs on the beach", "A PLATE of pasta", "two cats", "一只狗在海滩上奔跑"]
OWN_TEXT = {  # how each family's documentation calls its own processor
    "clip": {"padding": True},
    "siglip": {"padding": "max_length"},
    "siglip2": {"padding": "max_length", "max_length": 64},
    "siglip2-naflex": {},
    "chinese-clip": {"padding": True},
    "vit-bert": {"padding": True},
    "clip-roberta": {"padding": True},
}
Checkpoint = Callable[[str], Path]
Pictures = list[Image.Image]


def load(folder: Path) -> DualEncoder:
    return DualEncoder.load(folder, device="cpu")


def our_logits(encoder: DualEncoder, pictures: Pictures) -> torch.Tensor:
    similarity = cosine_similarity(encoder.encode_images(pictures), encoder.encode_texts(TEXTS))
    return logits_per_image(similarity, encoder.logit_scale, encoder.logit_bias)


def own_logits(folder: Path, inputs: dict) -> torch.Tensor:
    own = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return own(**inputs).logits_per_image


# ---------------------------------------------------------------- the contract


def test_our_similarity_equals_transformers_own(family: str, checkpoint: Checkpoint, pictures: Pictures) -> None:
    encoder = load(checkpoint(family))
    inputs = {**encoder.preprocessor.images(pictures), **encoder.preprocessor.texts(TEXTS)}
    own = own_logits(checkpoint(family), inputs)
    assert own.std() > 0.05  # or everything would be alike, and any two things equal
    torch.testing.assert_close(our_logits(encoder, pictures), own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", OWN_TEXT)
def test_our_similarity_equals_transformers_own_through_its_own_processor(
    family: str, checkpoint: Checkpoint, pictures: Pictures
) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    texts = [text.lower() for text in TEXTS] if family == "siglip2" else TEXTS
    inputs = processor(images=pictures, text=texts, return_tensors="pt", **OWN_TEXT[family])
    own = own_logits(checkpoint(family), inputs)
    torch.testing.assert_close(our_logits(load(checkpoint(family)), pictures), own, rtol=0, atol=1e-4)


def test_only_siglip_has_a_bias(family: str, checkpoint: Checkpoint) -> None:
    encoder = load(checkpoint(family))
    assert encoder.logit_bias == (pytest.approx(-3.0) if family.startswith("siglip") else None)
    expected = 1 / 0.07 if family == "composed" else torch.tensor(2.5).exp().item()
    assert encoder.logit_scale == pytest.approx(expected, rel=1e-5)


def test_embeddings_are_float32_on_the_cpu_and_of_unit_norm(
    family: str, checkpoint: Checkpoint, pictures: Pictures
) -> None:
    encoder = load(checkpoint(family))
    for embeds, count in ((encoder.encode_images(pictures), 3), (encoder.encode_texts(TEXTS), 4)):
        assert embeds.shape == (count, encoder.embed_dim)
        assert (embeds.dtype, embeds.device.type, embeds.requires_grad) == (torch.float32, "cpu", False)
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(count))


def test_nothing_in_gives_nothing_of_the_right_width(family: str, checkpoint: Checkpoint) -> None:
    encoder = load(checkpoint(family))
    assert encoder.encode_images([]).shape == encoder.encode_texts([]).shape == (0, encoder.embed_dim)
    assert encoder.embed_dim == (32 if family.startswith("siglip") else 24)


def test_batches_change_neither_values_nor_order(family: str, checkpoint: Checkpoint, pictures: Pictures) -> None:
    encoder = load(checkpoint(family))
    together, apart = encoder.encode_images(pictures), encoder.encode_images(pictures, batch_size=1)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    # A short caption is padded in company and not alone.
    torch.testing.assert_close(
        encoder.encode_texts(TEXTS), encoder.encode_texts(TEXTS, batch_size=1), rtol=0, atol=1e-5
    )


def test_a_saved_encoder_comes_back_the_same(
    family: str, checkpoint: Checkpoint, pictures: Pictures, tmp_path: Path
) -> None:
    first = load(checkpoint(family))
    first.save(tmp_path)
    second = load(tmp_path)
    assert torch.equal(first.encode_images(pictures), second.encode_images(pictures))
    assert torch.equal(first.encode_texts(TEXTS), second.encode_texts(TEXTS))
    assert first.fingerprint == second.fingerprint
    assert str(checkpoint(family).parent) not in (tmp_path / "config.json").read_text()  # nobody's paths are published
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".py")]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # weights may be read by whoever may read


# ---------------------------------------------------------------- encoding


def test_photos_are_held_one_at_a_time(
    checkpoint: Checkpoint, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(checkpoint("clip"))
    opened, prepare = [], encoder.preprocessor.images
    monkeypatch.setattr(encoder.preprocessor, "images", lambda images: opened.append(len(images)) or prepare(images))
    encoder.encode_images(pictures, batch_size=3)
    assert opened == [1, 1, 1]


def test_progress_is_reported_after_each_batch(checkpoint: Checkpoint, pictures: Pictures) -> None:
    encoder, seen = load(checkpoint("clip")), []
    encoder.encode_images(pictures, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]
    seen.clear()
    encoder.encode_texts([], progress=lambda done, total: seen.append((done, total)))
    assert seen == []


def test_pictures_come_from_anywhere(
    checkpoint: Checkpoint, pictures: Pictures, encoded: Callable, tmp_path: Path
) -> None:
    encoder = load(checkpoint("clip"))
    data = encoded(pictures[0], "PNG")
    (tmp_path / "a.png").write_bytes(data)
    embeds = encoder.encode_images([pictures[0], data, tmp_path / "a.png"])
    assert torch.equal(embeds[0], embeds[1])
    assert torch.equal(embeds[0], embeds[2])


def test_bad_input_is_refused(checkpoint: Checkpoint) -> None:
    encoder = load(checkpoint("clip"))
    with pytest.raises(InputError) as caught:
        encoder.encode_images([Image.new("RGB", (9, 9)), b"no picture"])
    assert caught.value.code == "image.not_an_image"
    with pytest.raises(InputError) as caught:
        encoder.encode_texts(["a dog", " \n"])
    assert caught.value.code == "caption.empty"
    with pytest.raises(TypeError, match="list"):
        encoder.encode_texts("a dog")


def test_whitespace_does_not_change_a_caption(checkpoint: Checkpoint) -> None:
    embeds = load(checkpoint("clip")).encode_texts(["a dog", "  a\n dog\u200b "])
    assert torch.equal(embeds[0], embeds[1])


def test_dropout_is_off_while_encoding_and_back_on_afterwards(checkpoint: Checkpoint) -> None:
    encoder = DualEncoder.compose(checkpoint("vit"), checkpoint("bert"), device="cpu")
    calm = encoder.encode_texts(TEXTS)
    encoder.module.train()
    assert not torch.equal(encoder.embed_texts(encoder.preprocessor.texts(TEXTS)), calm)  # there is dropout
    assert torch.equal(encoder.encode_texts(TEXTS), calm)
    with pytest.raises(InputError):
        encoder.encode_texts([""])
    assert encoder.module.training


def test_frozen_embeddings_can_train_a_head(checkpoint: Checkpoint) -> None:
    embeds = load(checkpoint("clip")).encode_texts(TEXTS)
    head = torch.nn.Linear(24, 8)
    head(embeds).sum().backward()
    assert head.weight.grad is not None


def test_weights_stay_float32_and_a_cpu_computes_in_float32(checkpoint: Checkpoint, tmp_path: Path) -> None:
    half = AutoModel.from_pretrained(checkpoint("clip"), dtype=torch.float16)
    shutil.copytree(checkpoint("clip"), tmp_path, dirs_exist_ok=True)
    half.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["logit_scale"].dtype == torch.float16
    for folder in (tmp_path, checkpoint("clip")):
        encoder = load(folder)
        assert {parameter.dtype for parameter in encoder.module.parameters()} == {torch.float32}
        with torch.no_grad():
            direct = encoder.embed_texts(encoder.preprocessor.texts(TEXTS))
        assert torch.equal(encoder.encode_texts(TEXTS), direct)


def test_half_precision_is_close_and_an_overflow_is_computed_again_in_full(checkpoint: Checkpoint) -> None:
    """What a GPU runs, on the CPU: autocast works there too."""
    encoder = load(checkpoint("clip"))
    inputs, exact = encoder.preprocessor.texts(TEXTS), encoder.encode_texts(TEXTS)
    with torch.no_grad():
        half = embed_in_half(encoder.embed_texts, inputs, "cpu")
        assert half.dtype == torch.float32
        assert not torch.equal(half, exact)
        torch.testing.assert_close(half, exact, rtol=0, atol=5e-3)
        encoder.module.text_projection.weight.mul_(1e6)  # beyond what 16 bits hold
        torch.testing.assert_close(embed_in_half(encoder.embed_texts, inputs, "cpu"), exact)


def test_many_threads_may_encode_at_once(checkpoint: Checkpoint) -> None:
    encoder = load(checkpoint("clip"))
    expected = encoder.encode_texts(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for embeds in pool.map(encoder.encode_texts, [TEXTS] * 12):
            torch.testing.assert_close(embeds, expected)


def test_it_finds_a_device_by_itself(checkpoint: Checkpoint) -> None:
    encoder = DualEncoder.load(checkpoint("clip"))
    assert encoder.device.type == ("cuda" if torch.cuda.is_available() else encoder.device.type)
    assert next(encoder.module.parameters()).device.type == encoder.device.type
    assert encoder.encode_texts(TEXTS).device.type == "cpu"


# ---------------------------------------------------------------- fingerprint


def test_a_fingerprint_is_computed_once_and_only_when_asked_for(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    monkeypatch.setattr(torch_tower, "weights_sha256", lambda state: computed.append(1) or weights_sha256(state))
    encoder = load(checkpoint("clip"))
    encoder.encode_texts(TEXTS)
    assert computed == []
    assert encoder.fingerprint == encoder.fingerprint
    assert computed == [1]
    assert len(encoder.fingerprint) == 64


def test_a_fingerprint_follows_the_weights(checkpoint: Checkpoint) -> None:
    encoder, other = load(checkpoint("clip")), load(checkpoint("clip"))
    before = encoder.fingerprint
    assert other.fingerprint == before
    with torch.no_grad():
        encoder.module.logit_scale.add_(1e-3)
    assert encoder.fingerprint != before
    with torch.no_grad():
        encoder.module.logit_scale.copy_(other.module.logit_scale)
    assert encoder.fingerprint == before
    assert load(checkpoint("siglip")).fingerprint != load(checkpoint("siglip2")).fingerprint


def test_a_fingerprint_tells_names_shapes_and_types_apart() -> None:
    plain = {"a": torch.zeros(4), "b": torch.ones(1)}
    swapped = {"b": plain["a"], "a": plain["b"]}
    reshaped = {**plain, "a": torch.zeros(2, 2)}
    retyped = {**plain, "a": torch.zeros(4, dtype=torch.int32)}
    reordered = dict(reversed(plain.items()))
    states = (plain, swapped, reshaped, retyped, {**plain, "c": torch.tensor(True)}, {**plain, "c": torch.zeros(0)})
    assert len({weights_sha256(state) for state in states}) == 6
    assert weights_sha256(reordered) == weights_sha256(plain)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", "./gone", "checkpoints/gone", "a b c"])
def test_a_checkpoint_that_is_nowhere_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"(?s){name}.*hf download"):
        DualEncoder.load(name)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path)


def test_pickled_weights_are_not_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("clip"), tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_tower_alone_is_no_dual_encoder(name: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="not a dual encoder"):
        load(checkpoint(name))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_code_in_a_checkpoint_is_never_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("clip"), folder)
    spring = f"from pathlib import Path\nPath({str(trap)!r}).touch()\n"
    (folder / "custom.py").write_text(spring + "from transformers import CLIPConfig as Config, CLIPModel as Model")
    auto_map = {"AutoConfig": "custom.Config", "AutoModel": "custom.Model"}
    edit_config(folder, auto_map=auto_map)
    load(folder)  # a family that transformers knows is loaded with transformers' own code
    edit_config(folder, auto_map=auto_map, model_type="custom")
    with pytest.raises(ValueError, match="never run"):
        load(folder)
    for file, key in (("tokenizer_config.json", "AutoTokenizer"), ("preprocessor_config.json", "AutoImageProcessor")):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {key: ["custom.Config"] * 2}}))
    edit_config(folder, model_type="clip", auto_map={})
    load(folder)
    assert not trap.exists()


def test_a_damaged_checkpoint_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("clip"), tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-1000], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b""):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"):
            load(tmp_path)
    weights.write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)


def test_missing_weights_are_not_made_up(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("clip"), tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights \(visual_projection\.weight\)"):
        load(tmp_path)


def test_a_checkpoint_without_its_tokenizer_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("clip"), tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        load(tmp_path)


def test_weights_may_lie_in_several_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("vit-bert"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    AutoModel.from_pretrained(checkpoint("vit-bert")).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert load(tmp_path).fingerprint == load(checkpoint("vit-bert")).fingerprint


def test_a_hub_id_and_its_revision_are_resolved(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache as huggingface_hub lays it out, which is all that is left of the Hub without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--dogs"
    for reference, family in (("main", "clip"), ("v1", "siglip2")):
        commit = f"{ord(family[0]):040x}"
        shutil.copytree(checkpoint(family), repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / reference).write_text(commit)
    newest, older = DualEncoder.load("someone/dogs"), DualEncoder.load("someone/dogs", revision="v1")
    assert (newest.module.config.model_type, older.module.config.model_type) == ("clip", "siglip")
    assert newest.name == "someone/dogs"
    with pytest.raises(FileNotFoundError, match="someone/dogs at revision v2"):
        DualEncoder.load("someone/dogs", revision="v2")


def test_loading_draws_nothing_on_the_terminal(checkpoint: Checkpoint, capfd: pytest.CaptureFixture) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    try:
        load(checkpoint("clip"))
        assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu", "", "cpu:x"])
def test_a_device_that_is_not_here_is_refused_in_one_sentence(name: str, checkpoint: Callable[[str], Path]) -> None:
    if not name:
        assert find_device(name).type == find_device().type == best_device()
        return
    with pytest.raises(ValueError, match=f"no device '{name}'"):
        DualEncoder.load(checkpoint("clip"), device=name)


def test_a_folder_has_no_revisions(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="leave --revision v1 out"):
        DualEncoder.load(checkpoint("clip"), revision="v1", device="cpu")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"modules.json": "[]", "0_CLIPModel/config.json": "{dual}"},
            "sentence-transformers .* say .*0_CLIPModel",
        ),
        ({"modules.json": "[]", "config.json": "{}", "model.safetensors": ""}, "sentence-transformers .*text alone"),
        ({"open_clip_config.json": "{}", "open_clip_model.safetensors": ""}, "an open_clip checkpoint"),
        ({"open_clip_pytorch_model.bin": ""}, "an open_clip checkpoint"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "an adapter .*merge_and_unload"),
        ({"model_index.json": "{}", "unet/config.json": "{}"}, "a diffusers pipeline"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_of_another_library_is_called_by_its_name(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content.replace("{dual}", '{"text_config": {}, "vision_config": {}}'))
    with pytest.raises(FileNotFoundError, match=said):
        DualEncoder.load(tmp_path, device="cpu")


def test_a_file_is_no_checkpoint(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(FileNotFoundError, match="is a file: name the folder"):
        DualEncoder.load(checkpoint("clip") / "model.safetensors", device="cpu")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_embeddings_that_are_no_numbers_are_refused(number: float, checkpoint: Callable[[str], Path]) -> None:
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    with torch.no_grad():
        for parameter in encoder.module.parameters():
            parameter.fill_(number)
    with pytest.raises(ValueError, match="no numbers"):
        encoder.encode_texts(["a cat"])
    with pytest.raises(ValueError, match="no numbers"):
        encoder.encode_images([Image.new("RGB", (32, 32))])
