"""Shared fixtures: a tiny random checkpoint of every family, made from a config, and a few pictures."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores, and so do the processes that they start

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import pre_tokenizers

if "PYTEST_XDIST_WORKER" not in os.environ:  # graphs of one run are not those of another; its workers share them
    _CACHE = TemporaryDirectory(prefix="alignment-cache-")
    os.environ["ALIGNMENT_CACHE"] = _CACHE.name
gc.disable()  # imports and collection make a million objects and no garbage; see pytest_runtestloop
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

pytest.register_assert_rewrite("index_contract")

FAMILIES = ("clip", "siglip", "siglip2", "siglip2-naflex", "chinese-clip", "vit-bert", "clip-roberta", "composed")

SIDE = 32  # pixels of a tiny model's input
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**WIDTHS, "image_size": SIDE, "patch_size": 8}
TEXTS = ("a dog runs on the beach", "A PLATE of pasta", "two cats", "一只狗在海滩上奔跑")


# Files that take longest, those that wait for much among those that compute: a worker that begins with one of them last
# would be waited for.
LONGEST = (
    "test_quality.py", "test_train_run.py", "test_matrix_tab.py", "test_openvino.py", "test_page.py", "test_faults.py",
    "test_pictures_tab.py", "test_api.py", "test_photos_tab.py", "test_kills.py", "test_hostile_text.py",
    "test_gallery_distributed.py", "test_app.py", "test_evaluate_tab.py", "test_fuzz.py", "test_links.py",
    "test_preprocess_preprocessor.py", "test_explanation.py", "test_service_process.py", "test_evaluate_eccv.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that the workers end together."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage, but leave out what was imported: each full collection would take half a second longer."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def ports() -> None:
    """Let each worker look for free ports of its own: between the look and the use another could take one."""
    if server := sys.modules.get("gradio.http_server"):
        server.INITIAL_PORT_VALUE += server.TRY_NUM_PORTS * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])


@pytest.fixture
def free_port() -> str:
    """A port that nothing listens at: the default one may be taken by a developer's app or another worker's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Run the test once for every family."""
    return request.param


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random checkpoint by its key in BUILDERS (or "composed"): `checkpoint("clip")`."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def build(name: str) -> Path:
        torch.manual_seed(sum(map(ord, name)))
        folder = root / name
        if name == "composed":
            from alignment.model import DualEncoder

            DualEncoder.compose(build("vit"), build("bert"), embed_dim=24, projection="mlp", device="cpu").save(folder)
        else:
            model, *processors = BUILDERS[name]()
            for part in (_lively(model), *processors):
                part.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def compact_engine():
    """The bundled model with the bundled gallery; shared, so a test must not change it."""
    from alignment.bundled import GALLERY, MODEL, ROOT
    from alignment.engine import AlignmentEngine
    from alignment.gallery import Gallery
    from alignment.model import DualEncoder

    encoder = DualEncoder.load(ROOT / MODEL, device="cpu")
    return AlignmentEngine(encoder, Gallery.load(ROOT / GALLERY, encoder))


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Three pictures of different shapes, with content that depends on the place."""
    rng = np.random.default_rng(0)
    shapes = ((48, 64), (64, 40), (33, 33))
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).resize((96, 80)) for shape in shapes]


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """Encode a PIL image: `encoded(image, "PNG", **options)`."""

    def encode(image: Image.Image, format: str, **options: object) -> bytes:
        buffer = BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def first_answer(tmp_path: Path, free_port: str) -> Callable[..., dict]:
    """Start an app in a process of its own, ask it for pictures of a caption over HTTP, and interrupt it.

    It serves the first picture's thumbnail, and ends in order.
    """

    def ask(command: list[str], cwd: Path, caption: str = "a cat", **environment: str) -> dict:
        ours = ("ALIGNMENT_", "GRADIO_", "PYTHON")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        env |= {"ALIGNMENT_CACHE": os.environ["ALIGNMENT_CACHE"], "PYTHONDONTWRITEBYTECODE": "1"}
        env |= {"GRADIO_SERVER_PORT": free_port, "GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "no_proxy": "127.0.0.1"}
        with subprocess.Popen(command, cwd=cwd, env=env | environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                assert process.stdout.readline() == f"Open http://127.0.0.1:{free_port}/\n"
                with httpx.Client(base_url=f"http://127.0.0.1:{free_port}", trust_env=False) as client:
                    call = "/gradio_api/call"
                    asked = client.post(f"{call}/v2/search_images", json={"caption": caption, "k": 3}).json()
                    told = client.get(f"{call}/search_images/{asked['event_id']}", timeout=60).text
                    found = json.loads(told.partition("event: complete\ndata: ")[2])[0]
                    thumbnail = client.get(f"/thumbnails/{found['matches'][0]['id']}.webp")
                assert (thumbnail.status_code, thumbnail.headers["content-type"]) == (200, "image/webp")
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 0
                return found
            finally:
                process.kill()

    return ask


def _lively(model: torch.nn.Module) -> torch.nn.Module:
    """Spread the weights: at their usual scale a tiny model embeds everything alike, and a test could not tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if hasattr(model, "logit_scale"):
            model.logit_scale.fill_(2.5)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-3.0)
    return model


# ---------------------------------------------------------------- tokenizers


def _byte_vocab(*specials: str, ends: bool) -> dict[str, int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*specials, *letters, *(letter + "</w>" for letter in letters if ends)]
    return {token: index for index, token in enumerate(tokens)}


def _clip_tokenizer() -> transformers.CLIPTokenizer:
    vocab = _byte_vocab("<|startoftext|>", "<|endoftext|>", ends=True)
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _roberta_tokenizer() -> transformers.RobertaTokenizer:
    vocab = _byte_vocab("<s>", "<pad>", "</s>", "<unk>", "<mask>", ends=False)
    return transformers.RobertaTokenizer(vocab=vocab, merges=[])


def _bert_tokenizer() -> transformers.BertTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *("##" + c for c in letters),
        *"一只狗在海滩上奔跑猫",
    ]
    return transformers.BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


def _siglip_tokenizer() -> transformers.SiglipTokenizer:
    import sentencepiece

    buffer = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["a dog runs on the beach", "the quick brown fox jumps over two lazy cats", "pasta"] * 9
        ),
        model_writer=buffer,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with TemporaryDirectory() as folder:
        path = Path(folder, "spiece.model")
        path.write_bytes(buffer.getvalue())
        return transformers.SiglipTokenizer(str(path), model_input_names=["input_ids"])


def _gemma_tokenizer(kind: type) -> transformers.PreTrainedTokenizerBase:
    """Upper and lower case are different tokens here, as in Gemma's vocabulary."""
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    ]
    return kind(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        padding_side="right",
        model_input_names=["input_ids"],
    )


# ---------------------------------------------------------------- families


def _clip() -> tuple:
    tokenizer = _clip_tokenizer()
    text = {
        **WIDTHS,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    return transformers.CLIPModel(config), _clip_images(), tokenizer


def _clip_images() -> transformers.CLIPImageProcessorPil:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def _siglip(tokenizer: transformers.PreTrainedTokenizerBase | None = None) -> tuple:
    tokenizer = tokenizer or _siglip_tokenizer()
    text = {**WIDTHS, "vocab_size": len(tokenizer), "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    images = transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return transformers.SiglipModel(config), images, tokenizer


def _siglip2() -> tuple:
    """Build SigLIP2 of a fixed size as Google published it: SigLIP's architecture with Gemma's tokenizer."""
    return _siglip(_gemma_tokenizer(transformers.GemmaTokenizer))


def _naflex() -> tuple:
    tokenizer = _gemma_tokenizer(transformers.Siglip2Tokenizer)
    text = {**WIDTHS, "vocab_size": len(tokenizer)}
    config = transformers.Siglip2Config(text_config=text, vision_config={**WIDTHS, "patch_size": 16})
    return transformers.Siglip2Model(config), transformers.Siglip2ImageProcessorPil(), tokenizer


def _chinese_clip() -> tuple:
    tokenizer = _bert_tokenizer()
    config = transformers.ChineseCLIPConfig(
        text_config={**WIDTHS, "vocab_size": len(tokenizer)}, vision_config=VISION, projection_dim=24
    )
    images = transformers.ChineseCLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return transformers.ChineseCLIPModel(config), images, tokenizer


def _vit() -> tuple:
    images = transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return transformers.ViTModel(transformers.ViTConfig(**VISION)), images


def _bert() -> tuple:
    tokenizer = _bert_tokenizer()
    return transformers.BertModel(transformers.BertConfig(**WIDTHS, vocab_size=len(tokenizer))), tokenizer


def _roberta() -> tuple:
    tokenizer = _roberta_tokenizer()
    config = transformers.RobertaConfig(
        **WIDTHS, vocab_size=len(tokenizer), max_position_embeddings=66, type_vocab_size=1
    )
    return transformers.RobertaModel(config), tokenizer


def _distilbert() -> tuple:
    tokenizer = _bert_tokenizer()
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    return transformers.DistilBertModel(config), tokenizer


def _t5() -> tuple:
    tokenizer = _bert_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5Model(config), tokenizer


def _gpt2() -> tuple:
    vocab = _byte_vocab("<|endoftext|>", ends=False)
    config = transformers.GPT2Config(
        vocab_size=len(vocab), n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2Model(config), transformers.GPT2Tokenizer(vocab=vocab, merges=[])


def _convnext() -> tuple:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    images = transformers.ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_pct=1.0)
    return transformers.ConvNextModel(config), images


def _dual(vision: tuple, text: tuple) -> tuple:
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision[0].config, text[0].config, projection_dim=24
    )
    model = transformers.VisionTextDualEncoderModel(config, vision_model=vision[0], text_model=text[0])
    return model, vision[1], text[1]


def _clip_vision() -> tuple:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)), _clip_images()


BUILDERS: dict[str, Callable[[], tuple]] = {
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "siglip2-naflex": _naflex,
    "chinese-clip": _chinese_clip,
    "vit-bert": lambda: _dual(_vit(), _bert()),
    "clip-roberta": lambda: _dual(_clip_vision(), _roberta()),
    "vit": _vit,
    "convnext": _convnext,
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "t5": _t5,
    "gpt2": _gpt2,
}
