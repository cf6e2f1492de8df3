"""The record of a run as one JSON file, without local paths: `run -> record (here) -> report -> publish`."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
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
_LOCAL = re.compile(rf"{_URL}|{_START}[^\s'\"`,;:()\[\]<>|]*")


@dataclass(frozen=True)
class RunRecord:
    """One fine-tuning, as `run.json` holds it.

    A record can be published: when it is made, every path in the command, the settings and all texts that is absolute
    or leaves the working folder is cut to its last part, URLs lose passwords and queries, and numbers that are not
    finite become None, which JSON can hold.

    Attributes:
        command, started, seconds: of the call: quoted for a shell, ISO 8601, and from start to end.
        data, data_complete: report of the check of the training data, and whether all of it could be read.
        base_model, base_fingerprint, fingerprint: start model, its weights, and the written weights.
        history: log of transformers' Trainer; recalls `eval_...` in [0, 1].
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
    difference: dict[str, Interval]
    stopped: str
    best_step: int
    second_data: str | None = None
    second_before: dict[str, Interval] | None = None
    second_after: dict[str, Interval] | None = None
    second_difference: dict[str, Interval] | None = None
    interpolation: list[dict[str, Any]] = field(default_factory=list)
    alpha: float | None = None
    model_type: str = ""
    data_name: str = "own data"
    base_model_id: str | None = None
    dataset_id: str | None = None
    data_complete: bool = True

    def __post_init__(self) -> None:
        words: list[str] = []
        with suppress(ValueError):  # a quotation that is not closed
            words = shlex.split(self.command)
        texts = [self.base_model, self.data_name, *words, *(word.partition("=")[2] for word in words)]
        texts += [value for value in self.settings.values() if isinstance(value, str)]
        known = sorted(filter(is_local, texts), key=len, reverse=True)
        for item in fields(self):
            object.__setattr__(self, item.name, _public(getattr(self, item.name), known))
        if words:
            object.__setattr__(self, "command", shlex.join(_public(words, known)))

    @property
    def name(self) -> str:
        """Display name of the result: the name of its folder."""
        return Path(self.settings["output"]).name or "fine-tuned"

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


def _public(value: Any, known: Sequence[str]) -> Any:
    """Drop local paths and numbers that are not finite; paths in `known` are found whole, others up to a space."""
    if isinstance(value, Mapping):
        return {key: _public(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item, known) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, str):
        return value
    if known:
        either = "|".join(re.escape(path.rstrip("\\/")) for path in known)
        value = re.sub(rf"(?<![\w.])(?:{either})[\\/]?(?!\w)", _shorten, value)
    return _LOCAL.sub(_shorten, value)


def _shorten(match: re.Match[str]) -> str:
    """Cut a path to its last part, and login and query out of a URL."""
    if "://" in match[0] and not match[0].startswith("file:"):
        return re.sub(r"//[^/@]*@", "//", match[0].split("?")[0])
    return re.split(r"[\\/]", match[0].rstrip("\\/"))[-1]
