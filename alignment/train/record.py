"""What a fine-tuning leaves to be read: the run as one JSON file, without the folders of the machine it ran on.

Place in the flow: `train -> record (here) -> report, model card -> publish`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from alignment.atomic import write_file

REPOSITORY = "USER/NAME"
"""What a new model card loads; `push_to_hub` puts the repository's id in its place."""

Interval = Mapping[str, float]
"""`value`, `low` and `high` of a figure with its 95 % interval."""

_START = r"(?:file:/{2,3}(?=[\w~.])|(?<![\w.])(?:~[\w-]*|\.\.)?[\\/]+(?=[\w~.])|\b[A-Za-z]:[\\/])"
_URL = r"\b(?!file:)[a-z][a-z0-9+]*://[^\s'\"`<>]+"
_LOCAL_START = re.compile(_START)
_LOCAL = re.compile(rf"(?P<url>{_URL})|{_START}[^\s'\"`,;:()\[\]<>|]*")


@dataclass(frozen=True)
class RunRecord:
    """One fine-tuning, finished or resumed, as `run.json` holds it.

    A record can be published: local folders never get in. Every path that is absolute or leaves the working folder is
    cut to its last part when the record is made, in the command, the settings and every text; addresses lose their
    passwords and queries. Numbers that are not finite become None, as JSON knows none.

    Attributes:
        command: as it was called, quoted for a shell.
        started: ISO 8601.
        seconds: from start to end, with the measurements.
        versions: package -> version.
        settings: every setting of the run; `license` of the result and `output`, its folder, are used if there.
        plan: train_images, train_captions, eval_images, eval_captions, steps, epochs, batch_size, chunk_size,
            processes, trainable_parameters, total_parameters, device, precision, estimated_seconds, peak_memory_bytes;
            what is not known is left out or None.
        data: what the check of the training data found.
        data_complete: whether all folders of the data could be listed and all files of captions could be read.
        base_model: where training started: the name of a folder, or a Hub id.
        base_fingerprint: of the start weights.
        fingerprint: of the weights that were written.
        history: what transformers' Trainer logged: each with step and epoch, and either loss, learning_rate, grad_norm,
            logit_scale, logit_bias, or the validation recalls `eval_...` in [0, 1].
        before: metric -> value, low, high of the start weights on the validation data, named as in `RetrievalReport`.
        after: the same of the weights that were written.
        stopped: why training ended, a sentence.
        best_step: the step whose weights were kept.
        difference: after minus before, by a paired bootstrap.
        second_data: what the second data set is, if one was measured.
        second_before: as `before`, on the second data set.
        second_after: as `after`.
        second_difference: as `difference`.
        interpolation: alpha in [0, 1] (0 the start weights, 1 the tuned ones), recall_sum, second_recall_sum or None.
        alpha: the one that was chosen.
        model_type: `model_type` of the written config.json; decides how the Hub files the model.
        data_name: what to call the training data: the name of its folder, or its Hub id.
        base_model_id: Hub id of the base model, if it came from there.
        dataset_id: Hub id of the training data, if it came from there.
    """

    command: str
    started: str
    seconds: float
    versions: dict[str, str]
    settings: dict[str, Any]
    plan: dict[str, Any]
    data: str
    base_model: str
    base_fingerprint: str
    fingerprint: str
    history: list[dict[str, Any]]
    before: dict[str, Interval]
    after: dict[str, Interval]
    stopped: str
    best_step: int
    difference: dict[str, Interval] | None = None
    second_data: str | None = None
    second_before: dict[str, Interval] | None = None
    second_after: dict[str, Interval] | None = None
    second_difference: dict[str, Interval] | None = None
    interpolation: list[dict[str, float | None]] = field(default_factory=list)
    alpha: float | None = None
    model_type: str = ""
    data_name: str = "own data"
    base_model_id: str | None = None
    dataset_id: str | None = None
    data_complete: bool = True

    def __post_init__(self) -> None:
        known = sorted(set(_local_paths(self.settings)) | set(_local_tokens(self.command)), key=len, reverse=True)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "command":
                value = _public_command(value)
            elif item.name in ("base_model", "data_name"):
                value = _public_name(value)
            object.__setattr__(self, item.name, _public(value, known))

    @property
    def name(self) -> str:
        """What to call the result: the name of the folder it was written to."""
        return Path(str(self.settings.get("output") or "fine-tuned")).name or "fine-tuned"

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the record; a crash leaves the file that was there before."""
        write_file(Path(path), json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> RunRecord:
        """Read a record back.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is no record, with the keys that are too many or missing.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not the record of a fine-tuning ({error}); train again to renew it."
            ) from error


# ---------------------------------------------------------------- what may be published


def is_local(text: str) -> bool:
    """Whether a text begins with a path that only means something on this machine."""
    return bool(_LOCAL_START.match(text))


def _public_name(text: str) -> str:
    """Cut a path to its last part if it is absolute or leaves the working folder."""
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1] if is_local(text) else text


def _public_command(command: str) -> str:
    """Cut the paths among the arguments; a path with spaces is one argument."""
    tokens = _tokens(command)
    return shlex.join(option + _public_name(value) for option, value in tokens) if tokens else command


def _tokens(command: str) -> list[tuple[str, str]]:
    """Split a command into ("--option=" or "", value); empty where its quotes do not close."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    parts = [re.fullmatch(r"(--?[\w-]+=)?(.*)", word, re.DOTALL) for word in words]
    return [(part[1] or "", part[2]) for part in parts if part]


def _local_tokens(command: str) -> Iterator[str]:
    return (value for _, value in _tokens(command) if is_local(value))


def _local_paths(value: Any) -> Iterator[str]:
    """Find the paths among the settings, so that texts which repeat them can be cut, too."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, str | Path):
        if is_local(str(value)):
            yield str(value)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _local_paths(item)


def _public(value: Any, known: Sequence[str]) -> Any:
    """Make a value that JSON holds, without local folders and without numbers that are not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _public(item, known) for key, item in value.items()}
    if isinstance(value, str | Path):
        return _public_text(str(value), known)
    if isinstance(value, Sequence | set | frozenset):
        return [_public(item, known) for item in value]
    if hasattr(value, "item"):  # a number of numpy's or torch's
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else _public_text(str(value), known)


def _public_text(text: str, known: Sequence[str]) -> str:
    """Cut every local path in a text: those of the settings to the letter, others up to the next space."""
    if known:
        either = "|".join(re.escape(path.rstrip("\\/")) for path in known)
        text = re.sub(rf"(?<![\w.])(?:{either})(?!\w)", lambda match: _public_name(match[0]), text)
    return _LOCAL.sub(_public_match, text)


def _public_match(match: re.Match[str]) -> str:
    if match["url"]:
        return re.sub(r"//[^/@]*@", "//", match[0].split("?")[0])
    return _public_name(match[0])
