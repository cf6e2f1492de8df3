"""Top floor, what whoever runs the service may set, by option or by environment variable."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, fields
from typing import Any

from alignment.ui.service.ways import OWN_NAMES

LOGS = ("human", "json")


@dataclass(frozen=True)
class Settings:
    """The limits of the service; the defaults never stop somebody who uses the page by hand.

    Attributes:
        keep_minutes: how long uploads, and what the page remembers of a visitor, outlive their last use.
        rate: requests that ask for something, a minute and address; 0 for as many as come.
        at_once: requests of one address that may be open at the same time.
        queue: requests that may wait for their turn, of everybody together.
        request_mb: a request without a file, such as the JSON of the API.
        client_files: uploads of one address that may lie here at the same time.
        client_mb: the same by their size.
        disk_mb: the same of everybody together.
        sessions_mb: what the page remembers of everybody's pictures and results; the longest unused goes first.
        proxies: servers in front that tell the visitor's address in X-Forwarded-For; 0: nobody is believed.
        root_path: where a server in front shows the page, as "/search"; "" for the top of its address.
        stop_seconds: how long a stop waits for what is under way.
        log: "human" or "json".
    """

    keep_minutes: float = 60
    rate: float = 600
    at_once: int = 250
    queue: int = 64
    request_mb: float = 64
    client_files: int = 500
    client_mb: float = 2000
    disk_mb: float = 8000
    sessions_mb: float = 1000
    proxies: int = 0
    root_path: str = ""
    stop_seconds: float = 10
    log: str = "human"

    def __post_init__(self) -> None:
        """Raise ValueError on what makes no sense; the command line itself does not look at its defaults."""
        if self.log not in LOGS:
            raise ValueError(f"{variable('log')} is {self.log!r}; it may be {' or '.join(LOGS)}.")
        object.__setattr__(self, "root_path", read_root_path(self.root_path))

    @classmethod
    def of(cls, args: argparse.Namespace) -> Settings:
        """Take them from parsed options."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


_HELP = {
    "keep_minutes": "minutes that uploads, and what the page remembers of a visitor, outlive their last use",
    "rate": "requests a minute and address; 0: no limit",
    "at_once": "requests of an address open at the same time",
    "queue": "requests that may wait, of everybody together",
    "request_mb": "megabytes of a request without files",
    "client_files": "uploads of an address that may lie here at the same time",
    "client_mb": "their megabytes",
    "disk_mb": "megabytes of everybody's uploads together",
    "sessions_mb": "megabytes that the page remembers of everybody's pictures and results",
    "proxies": "servers in front whose X-Forwarded-For is believed (on a Space: 1)",
    "root_path": "path below which a server in front shows the page, such as /search; it may strip it or not",
    "stop_seconds": "seconds that a stop waits for requests under way",
    "log": "how to log: for people, or a JSON object a line",
}


def variable(name: str) -> str:
    """Name the environment variable of a setting."""
    return f"ALIGNMENT_{name.upper()}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Let a command line set them; where it does not the environment does.

    Args:
        parser: `Settings.of` understands what it parses.
    """
    group = parser.add_argument_group("service", "limits, for a page that others can reach; each has its variable")
    for field in fields(Settings):
        kinds: dict[str, dict[str, Any]] = {
            "float": {"type": _amount, "metavar": "N"},
            "int": {"type": _count, "metavar": "N"},
            "str": {"choices": LOGS} if field.name == "log" else {"metavar": "PATH"},
        }
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=os.environ.get(variable(field.name)) or _default(field.name),
            help=f"{_HELP[field.name]} ({variable(field.name)}; default: %(default)s)",
            **kinds[str(field.type)],
        )


def _default(name: str) -> object:
    if name == "proxies" and os.environ.get("SPACE_ID"):
        return 1
    return os.environ.get("GRADIO_ROOT_PATH", "") if name == "root_path" else getattr(Settings, name)


def read_root_path(written: str) -> str:
    """Bring a path to the form "/search"; "" for the top.

    Raises:
        ValueError: when it is no path, or begins like an address of the page's own.
    """
    path = "/" + written.strip("/")
    if not re.fullmatch(r"(/[\w~-][\w.~-]*)+|/", path, re.ASCII) or path.split("/")[1] in OWN_NAMES:
        raise ValueError(
            f"--root-path is {written!r}; it is a path such as /search, without host and query, of letters, digits and "
            f"'-', '_', '.', '~', and does not begin with one of {', '.join(sorted(OWN_NAMES))}."
        )
    return path.rstrip("/")


def _amount(written: str) -> float:
    value = float(written)
    if not 0 <= value < float("inf"):
        raise ValueError("neither less than nothing nor endless")
    return int(value) if value == int(value) else value


def _count(written: str) -> int:
    value = int(written)
    if value < 0:
        raise ValueError("not less than nothing")
    return value
