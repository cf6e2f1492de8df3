"""Server, settings: the limits of the service, by option or by environment variable."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, field, fields
from typing import Any

from alignment.server.routes import OWN_NAMES

LOGS = ("human", "json")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """The limits of the service; a person who uses the page by hand never meets the defaults."""

    keep_minutes: float = _setting(
        60, "minutes that uploads, and what the page remembers of a visitor, outlive their last use"
    )
    rate: float = _setting(600, "requests a minute and address; 0: no limit")
    at_once: int = _setting(250, "requests of an address open at the same time")
    queue: int = _setting(64, "requests that may wait, of everybody together")
    request_mb: float = _setting(64, "megabytes of a request without files")
    client_files: int = _setting(500, "uploads of an address that may lie here at the same time")
    client_mb: float = _setting(2000, "their megabytes")
    disk_mb: float = _setting(8000, "megabytes of everybody's uploads together")
    sessions_mb: float = _setting(1000, "megabytes that the page remembers of everybody's pictures and results")
    proxies: int = _setting(0, "servers in front whose X-Forwarded-For is believed (on a Space: 1)")
    root_path: str = _setting(
        "", "path below which a server in front shows the page, such as /search; it may strip it or not"
    )
    stop_seconds: float = _setting(10, "seconds that a stop waits for requests under way")
    log: str = _setting("human", "how to log: for people, or a JSON object a line")

    def __post_init__(self) -> None:
        """Raise ValueError on values that argparse does not check: defaults from the environment."""
        if self.log not in LOGS:
            raise ValueError(f"{variable('log')} is {self.log!r}; it may be {' or '.join(LOGS)}.")
        object.__setattr__(self, "root_path", read_root_path(self.root_path))

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Settings:
        """Take them from parsed options."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def variable(name: str) -> str:
    """Name the environment variable of a setting."""
    return f"ALIGNMENT_{name.upper()}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting, whose default is its environment variable; `Settings.from_args` reads them."""
    group = parser.add_argument_group("service", "limits, for a page that others can reach; each has its variable")
    for setting in fields(Settings):
        kinds: dict[str, dict[str, Any]] = {
            "float": {"type": _amount, "metavar": "N"},
            "int": {"type": _count, "metavar": "N"},
            "str": {"choices": LOGS} if setting.name == "log" else {"metavar": "PATH"},
        }
        group.add_argument(
            f"--{setting.name.replace('_', '-')}",
            default=os.environ.get(variable(setting.name)) or _default(setting.name),
            help=f"{setting.metadata['help']} ({variable(setting.name)}; default: %(default)s)",
            **kinds[str(setting.type)],
        )


def _default(name: str) -> object:
    if name == "proxies" and os.environ.get("SPACE_ID"):
        return 1
    return os.environ.get("GRADIO_ROOT_PATH", "") if name == "root_path" else getattr(Settings, name)


def read_root_path(text: str) -> str:
    """Normalise a path to the form "/search"; "" for the top.

    Raises:
        ValueError: when it is no path, or begins like an address of the page's own.
    """
    path = "/" + text.strip("/")
    if not re.fullmatch(r"(/[\w~-][\w.~-]*)+|/", path, re.ASCII) or path.split("/")[1] in OWN_NAMES:
        raise ValueError(
            f"--root-path is {text!r}; it is a path such as /search, without host and query, of letters, digits and "
            f"'-', '_', '.', '~', and does not begin with one of {', '.join(sorted(OWN_NAMES))}."
        )
    return path.rstrip("/")


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError("neither negative nor infinite")
    return int(value) if value == int(value) else value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("not negative")
    return value
