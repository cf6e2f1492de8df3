"""Server, settings: the limits of the service, by option or environment variable, and the address it is served at."""

from __future__ import annotations

import argparse
import errno
import os
import re
import socket
from dataclasses import dataclass, field, fields
from functools import partial
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
        """Normalise the root path to "/search" or ""; raise ValueError on what argparse does not check."""
        if self.log not in LOGS:
            raise ValueError(f"{variable('log')} is {self.log!r}; it may be {' or '.join(LOGS)}.")
        path = "/" + self.root_path.strip("/")
        if not re.fullmatch(r"(/[\w~-][\w.~-]*)+|/", path, re.ASCII) or path.split("/")[1] in OWN_NAMES:
            raise ValueError(
                f"--root-path is {self.root_path!r}; it is a path such as /search, without host and query, of letters, "
                "digits and '-', '_', '.', '~', and does not begin with one of "
                f"{', '.join(sorted(OWN_NAMES))}."
            )
        object.__setattr__(self, "root_path", path.rstrip("/"))

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
    kinds: dict[str, dict[str, Any]] = {
        "float": {"type": partial(_amount, float), "metavar": "N"},
        "int": {"type": partial(_amount, int), "metavar": "N"},
        "str": {"metavar": "PATH"},
    }
    for setting in fields(Settings):
        group.add_argument(
            f"--{setting.name.replace('_', '-')}",
            default=os.environ.get(variable(setting.name)) or _default(setting.name),
            help=f"{setting.metadata['help']} ({variable(setting.name)}; default: %(default)s)",
            **({"choices": LOGS} if setting.name == "log" else kinds[str(setting.type)]),
        )


def _default(name: str) -> object:
    if name == "proxies" and os.environ.get("SPACE_ID"):
        return 1
    return os.environ.get("GRADIO_ROOT_PATH", "") if name == "root_path" else getattr(Settings, name)


def _amount(kind: type[int] | type[float], text: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole number' if kind is int else 'number'} from 0 on")
    return value


# ---------------------------------------------------------------- host and port


def read_port(text: str) -> int:
    """Parse a port number; for argparse."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: choose a number from 1 to 65535, such as 7860")
    return int(text)


def host_in_url(host: str) -> str:
    """Write a host as in a URL: IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def check_address(host: str, port: int) -> None:
    """Raise ValueError when the host is no address of this machine, or the port is taken or not for this user."""
    bare = host.strip("[]")
    try:
        family = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself does
            probe.bind((bare, port))
    except OSError as error:
        raise ValueError(_reason(error, host, port)) from error


def _reason(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        other = port + 1 if port < 65535 else port - 1
        return f"Port {port} is taken by another program, perhaps by this app: stop it, or say --port {other}."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"This user may not open port {port}: choose one from 1024 on, such as --port 7860."
    return (
        f"{host} is no address of this machine ({error.strerror}): --host is 127.0.0.1 for this machine alone, 0.0.0.0 "
        "or :: for everybody, or one of its own addresses."
    )
