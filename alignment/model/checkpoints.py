"""Find and read checkpoints: safetensors and JSON, from a folder or the Hugging Face Hub; no pickle, no foreign code.

Place in the flow: `folder or Hub id -> weights (here) -> DualEncoder`. Serving a known model builds none, so
what builds models is imported in the functions that do.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from alignment.preprocess.config import load_json

SMALL_FILES = ["*.json", "*.txt", "*.model"]  # configuration and vocabularies: no code, no pickle
TRAINING_FILES = ("recipe.json", "run.json", "trainer_state.json", "training_args.json")  # not part of a model
_INDEX = "model.safetensors.index.json"


def checkpoint_folder(name: str, revision: str | None, *, fetch: bool = True) -> Path:
    """Find a checkpoint on disk; a Hub id is fetched first: configuration, vocabulary, safetensors, nothing else.

    Without `fetch`, only what was fetched before is found. Raises FileNotFoundError when there is none or its weights
    are pickled, and ValueError when a folder is asked for a revision.
    """
    folder = Path(name)
    if folder.is_file():
        raise FileNotFoundError(f"{name} is a file: name the folder that holds config.json and model.safetensors.")
    if revision and folder.is_dir():
        raise ValueError(f"{name} is a folder here, and has no revisions: leave --revision {revision} out.")
    if not folder.is_dir():
        folder = _fetched(name, revision, fetch)
    if foreign := _foreign(folder, name):
        raise FileNotFoundError(foreign)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} is not a checkpoint: it has no config.json; check the path.")
    if not _has_weights(folder):
        raise FileNotFoundError(
            f"{name} has no model.safetensors, and pickled weights are not read: convert it once with transformers' "
            "`save_pretrained`, or choose a checkpoint or revision in safetensors."
        )
    return folder


def _has_weights(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("model.safetensors", _INDEX))


def _foreign(folder: Path, name: str) -> str:
    """Describe a folder that another library wrote, and what to do with it; "" for any other."""
    is_dual, has_weights = _is_dual(folder), _has_weights(folder)
    if (folder / "modules.json").is_file() and not is_dual:
        inner = next((path.parent for path in sorted(folder.glob("*/config.json")) if _is_dual(path.parent)), None)
        rest = f"its dual encoder lies in it: say {inner}" if inner else "it embeds text alone: choose a dual encoder"
        return f"{name} is a sentence-transformers model; {rest}."
    if any(folder.glob("open_clip_*")) and not (is_dual and has_weights):
        hub = "such as those of the Hub whose files are config.json and model.safetensors"
        convert = "or convert it with transformers' convert script for CLIP"
        return f"{name} is an open_clip checkpoint: take the model's version for transformers, {hub}, {convert}."
    if (folder / "adapter_config.json").is_file() and not has_weights:
        merge = "merge it with PEFT's `merge_and_unload`, and save that with `save_pretrained`"
        return f"{name} is an adapter (PEFT) without its model: {merge}."
    if (folder / "model_index.json").is_file():
        return f"{name} is a diffusers pipeline, which makes pictures: choose a dual encoder."
    return ""


def _is_dual(folder: Path) -> bool:
    """Whether a configuration has both sides, or is one of ours."""
    with suppress(OSError, ValueError):
        return {"text_config", "vision_config"} <= load_json(folder / "config.json").keys()
    return False


def checkpoint_files(folder: Path) -> list[str]:
    """Name the files of a checkpoint that `checkpoint_folder` would fetch, and nothing that lies beside them."""
    small = {path.name for pattern in SMALL_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted({*small.difference(TRAINING_FILES), *_weights(folder)})


def _weights(folder: Path) -> set[str]:
    index = folder / _INDEX
    if not index.is_file():
        return {"model.safetensors"}
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())


def _fetched(name: str, revision: str | None, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download

    get = partial(snapshot_download, name, revision=revision, local_files_only=not fetch)
    try:
        folder = Path(get(allow_patterns=SMALL_FILES))
        return Path(get(allow_patterns=[*SMALL_FILES, *sorted(_weights(folder))]))
    except (OSError, ValueError) as error:
        wanted = f"{name} at revision {revision}" if revision else name
        raise FileNotFoundError(
            f"No checkpoint {wanted}: there is no such folder, and the Hugging Face Hub did not provide it "
            f"({type(error).__name__}); check the spelling and the network, or fetch it with `hf download {name}`."
        ) from error


def load_dual_encoder(folder: Path, name: str) -> Any:
    """Read a dual encoder in float32; raises ValueError when it is none, is damaged, or would need code of its own."""
    from transformers import AutoModel

    from alignment.model import composition  # noqa: F401 - registers our own models

    module, missing = _load_weights(AutoModel, folder)
    if not all(hasattr(module, part) for part in ("get_image_features", "get_text_features", "logit_scale")):
        raise ValueError(
            f"{name} is a {module.config.model_type} model, not a dual encoder: choose a CLIP, SigLIP, "
            "SigLIP2, Chinese-CLIP or vision-text-dual-encoder checkpoint, or join two towers with `compose`."
        )
    if missing:
        raise ValueError(f"{name} lacks weights ({', '.join(missing[:3])}): train or download it again.")
    return module


def load_tower(folder: Path, side: Literal["vision", "text"], pooling: str) -> Any:
    """Load one tower, of a dual encoder the half; raises ValueError when it is damaged or its pooler never trained."""
    from transformers import AutoConfig, PreTrainedConfig

    from alignment.model.composition import auto_class, build_tower

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tower, missing = _load_weights(auto_class(config), folder)
    if isinstance(getattr(config, f"{side}_config", None), PreTrainedConfig):
        half = getattr(tower, f"{side}_model")
        half.config.architectures = [type(half).__name__]
        tower = build_tower(half.config)  # as it will be built when the composition is loaded again
        missing = tower.load_state_dict(half.state_dict(), strict=False).missing_keys
    if pooling == "pooler" and any("pooler" in part for part in missing):
        raise ValueError(f"{folder} holds no trained pooler for its {side} tower: choose pooling 'mean' or 'cls'.")
    return tower.float().eval()


def _load_weights(auto: Any, folder: Path) -> tuple[Any, list[str]]:
    """Read a checkpoint in float32; also the names of weights that it lacks, which are random."""
    try:
        with without_progress_bar():
            options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
            module, report = auto.from_pretrained(folder, **options, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{folder} cannot be loaded ({reason}): it is damaged, of another family, or needs code of its own, which "
            "is never run; download it again or choose another checkpoint."
        ) from error
    return module, sorted(report["missing_keys"])


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing on the terminal; library code logs."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
