"""The record of a run as one JSON file, without local paths of the machine it ran on.

Place in the flow: `run -> record (here) -> report, model card -> publish`.
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
"""Placeholder in a model card; `push_to_hub` replaces it with the repository's id."""

Interval = Mapping[str, float]
"""`value`, `low` and `high` of a metric with its 95 % interval."""

_START = r"(?:file:/{2,3}(?=[\w~.])|(?<![\w.])(?:~[\w-]*|\.\.)?[\\/]+(?=[\w~.])|\b[A-Za-z]:[\\/])"
_URL = r"\b(?!file:)[a-z][a-z0-9+]*://[^\s'\"`<>]+"
_LOCAL_START = re.compile(_START)
_LOCAL = re.compile(rf"(?P<url>{_URL})|{_START}[^\s'\"`,;:()\[\]<>|]*")


@dataclass(frozen=True)
class RunRecord:
    """One fine-tuning, as `run.json` holds it.

    A record can be published: when it is made, every path in the command, the settings and all texts that is absolute
    or leaves the working folder is cut to its last part, URLs lose passwords and queries, and numbers that are not
    finite become None, which JSON can hold.

    Attributes:
        command, started, seconds: of the call: quoted for a shell, ISO 8601, and from start to end.
        settings: every setting of the run; `license` of the result and `output`, its folder, are used if there.
        plan: the fields of `Plan`; unknown ones are left out or None.
        data, data_complete: report of the check of the training data, and whether all of it could be read.
        base_model, base_fingerprint, fingerprint: start model, its weights, and the written weights.
        history: log of transformers' Trainer: entries with step and epoch, and either loss, learning_rate, grad_norm,
            logit_scale, logit_bias, or the validation recalls `eval_...` in [0, 1].
        before, after, difference: metric -> value, low, high on the validation data, named as in `RetrievalReport`;
            likewise `second_...` on the second data set.
        stopped, best_step: why training ended, a sentence, and the step of the best weights.
        interpolation, alpha: alpha in [0, 1] (0 the start weights, 1 the tuned ones), recall_sum, second_recall_sum or
            None; and the alpha that was chosen.
        model_type: of the written config.json; decides how the Hub files the model.
        data_name, base_model_id, dataset_id: name of the data's folder, and Hub ids, if they came from there.
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
        paths = {value for _, value in _arguments(self.command) if is_local(value)} | set(_local_paths(self.settings))
        known = sorted(paths, key=len, reverse=True)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "command" and (arguments := _arguments(value)):
                value = shlex.join(option + _last_part(argument) for option, argument in arguments)
            elif item.name in ("base_model", "data_name"):
                value = _last_part(value)
            object.__setattr__(self, item.name, _public(value, known))

    @property
    def name(self) -> str:
        """Display name of the result: the name of its folder."""
        return Path(str(self.settings.get("output") or "fine-tuned")).name or "fine-tuned"

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the record atomically."""
        write_file(Path(path), json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> RunRecord:
        """Read a record; raises ValueError when it is none, naming unknown or missing keys."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not the record of a fine-tuning ({error}); train again to renew it."
            ) from error


def is_local(text: str) -> bool:
    """Whether a text begins with a path that is absolute or leaves the working folder."""
    return bool(_LOCAL_START.match(text))


def _last_part(text: str) -> str:
    """Cut a local path to its last part; another text stays as it is."""
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1] if is_local(text) else text


def _arguments(command: str) -> list[tuple[str, str]]:
    """Split a command into ("--option=" or "", value); empty when a quotation is not closed."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    parts = [re.fullmatch(r"(--?[\w-]+=)?(.*)", word, re.DOTALL) for word in words]
    return [(part[1] or "", part[2]) for part in parts if part]


def _local_paths(value: Any) -> Iterator[str]:
    """Yield the local paths in the settings, which are then cut in other texts, too."""
    if isinstance(value, str | Path):
        if is_local(str(value)):
            yield str(value)
    elif isinstance(value, Mapping | Sequence):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _local_paths(item)


def _public(value: Any, known: Sequence[str]) -> Any:
    """Convert to a JSON value without local paths and without numbers that are not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _public(item, known) for key, item in value.items()}
    if not isinstance(value, str) and isinstance(value, Sequence | set | frozenset):
        return [_public(item, known) for item in value]
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else _public_text(str(value), known)


def _public_text(text: str, known: Sequence[str]) -> str:
    """Cut every local path in a text: those in `known` exactly, others up to the next space."""
    if known:
        either = "|".join(re.escape(path.rstrip("\\/")) for path in known)
        text = re.sub(rf"(?<![\w.])(?:{either})(?!\w)", lambda match: _last_part(match[0]), text)
    return _LOCAL.sub(_public_match, text)


def _public_match(match: re.Match[str]) -> str:
    return re.sub(r"//[^/@]*@", "//", match[0].split("?")[0]) if match["url"] else _last_part(match[0])
