"""Upload a result folder to the Hugging Face Hub: the end of a run with `--push-to-hub`."""

import json
import logging
import os
import re
from collections.abc import Iterator
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi

from alignment.hub import check_login, check_repo_id, translate_hub_errors
from alignment.model import DualEncoder
from alignment.train.record import REPOSITORY, RunRecord, is_local

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_REPORT = ("README.md", "report.md", "run.json")
_CONFIGURATION = (
    "config.json", "preprocessor_config.json", "image_processor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
# Weights of an earlier push under other names would be loaded in place of the new ones, or beside them.
_OLD_WEIGHTS = ["model.safetensors", _INDEX, "model-?????-of-?????.safetensors"]


def push_to_hub(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool = False, api: HfApi | None = None
) -> str:
    """Upload a result folder as a model repository, which is created if needed; returns its address.

    Files are selected by name: configuration, tokenizer, image processor, weights, README.md, report.md, run.json and
    the plots; never checkpoints, optimizer states or logs. In README.md, `USER/NAME` becomes the repository's id, on
    disk too.

    The checkpoint is loaded before anything is sent. `private` is for a repository that is created; an existing one
    stays as it is. `api` is the Hub and token to use, if not the public Hub and the token of `hf auth login`.

    Raises:
        FileNotFoundError: when the folder holds no checkpoint, or no card.
        ValueError: on a malformed id, a damaged or changed checkpoint, a file that names a local folder, a missing
            login or a missing right.
        ConnectionError: when the Hub cannot be reached or the connection breaks.
    """
    folder, api = Path(folder), api or HfApi()
    check_repo_id(repo_id)
    files = _files_to_send(folder)
    check_login(api)
    with translate_hub_errors(repo_id):
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8")
        if (placeholder := f'DualEncoder.load("{REPOSITORY}")') in text:
            card.write_text(text.replace(placeholder, f'DualEncoder.load("{repository.repo_id}")'), encoding="utf-8")
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            allow_patterns=[escape(name) for name in files],
            delete_patterns=_OLD_WEIGHTS,
            commit_message="Upload the fine-tuned model, its card and its report",
        )
    logger.info("Sent %d files to %s.", len(files), repository.url)
    return repository.url


def _files_to_send(folder: Path) -> list[str]:
    """Load the checkpoint, and list the files to send by path within the folder."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model (no config.json): give the folder that training wrote.")
    encoder = DualEncoder.load(folder, device="cpu")
    if not (folder / "README.md").is_file():
        raise FileNotFoundError(f"{folder} has no README.md, the model card; train again, or write one.")
    if (folder / "run.json").is_file() and RunRecord.from_json(folder / "run.json").fingerprint != encoder.fingerprint:
        raise ValueError(
            f"The weights in {folder} are not those that its run.json measured: delete README.md, report.md and "
            "run.json, and write a card of your own, or train again."
        )
    plots = [f"plots/{path.name}" for path in sorted((folder / "plots").glob("*.png"))]
    names = dict.fromkeys([*_CONFIGURATION, *_weights(folder), *_REPORT, *plots])
    files = [name for name in names if (folder / name).is_file()]
    for file in (folder / name for name in files if name.endswith("config.json")):
        for text in _texts(json.loads(file.read_text(encoding="utf-8"))):
            if is_local(text) and len(re.split(r"[\\/]+", text)) > 2:  # a token may begin with "/"
                raise ValueError(f"{file} names a folder of this machine ({text}); take it out and push again.")
    return files


def _weights(folder: Path) -> list[str]:
    """List the files of the weights that `DualEncoder.load` reads."""
    if (folder / "model.safetensors").is_file() or not (folder / _INDEX).is_file():
        return ["model.safetensors"]
    shards = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    return [_INDEX, *sorted(name for name in shards if Path(name).name == name and name.endswith(".safetensors"))]


def _texts(value: object) -> Iterator[str]:
    """Yield all strings in a JSON value, but for keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
