"""Server, settings: the limits of the service, by option or environment variable, and the address it is served at."""

from __future__ import annotations

import argparse
import errno
import os
import re
import socket
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, get_args, get_type_hints

from alignment.server.routes import OWN_NAMES

LOGS = ("human", "json")


@dataclass(frozen=True)
class Settings:
    """The limits of the service; a person who uses the page by hand never meets the defaults."""

    keep_minutes: Annotated[
        float, "minutes that uploads, and what the page remembers of a visitor, outlive their last use"
    ] = 60
    rate: Annotated[float, "requests a minute and address; 0: no limit"] = 600
    at_once: Annotated[int, "requests of an address open at the same time"] = 250
    queue: Annotated[int, "requests that may wait, of everybody together"] = 64
    request_mb: Annotated[float, "megabytes of a request without files"] = 64
    client_files: Annotated[int, "uploads of an address that may lie here at the same time"] = 500
    client_mb: Annotated[float, "their megabytes"] = 2000
    disk_mb: Annotated[float, "megabytes of everybody's uploads together"] = 8000
    sessions_mb: Annotated[float, "megabytes that the page remembers of everybody's pictures and results"] = 1000
    proxies: Annotated[int, "servers in front whose X-Forwarded-For is believed (on a Space: 1)"] = 0
    root_path: Annotated[
        str, "path below which a server in front shows the page, such as /search; it may strip it or not"
    ] = ""
    stop_seconds: Annotated[float, "seconds that a stop waits for requests under way"] = 10
    log: Annotated[str, "how to log: for people, or a JSON object a line"] = "human"

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
    elsewhere = {"root_path": os.environ.get("GRADIO_ROOT_PATH", ""), "proxies": int(bool(os.environ.get("SPACE_ID")))}
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        kind, text = get_args(hint)
        values = {"metavar": "PATH"} if kind is str else {"type": partial(_amount, kind), "metavar": "N"}
        group.add_argument(
            f"--{name.replace('_', '-')}",
            default=os.environ.get(variable(name)) or elsewhere.get(name, getattr(Settings, name)),
            help=f"{text} ({variable(name)}; default: %(default)s)",
            **({"choices": LOGS} if name == "log" else values),
        )


def _amount(kind: type[int] | type[float], text: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole number' if kind is int else 'number'} from 0 on")
    return value


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
    except PermissionError as error:
        reason = f"This user may not open port {port}: choose one from 1024 on, such as --port 7860."
        raise ValueError(reason) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            other = port + 1 if port < 65535 else port - 1
            reason = f"Port {port} is taken by another program, perhaps by this app: stop it, or say --port {other}."
        else:
            reason = f"{host} is no address of this machine ({error.strerror}): --host is 127.0.0.1 for this machine "
            reason += "alone, 0.0.0.0 or :: for everybody, or one of its own addresses."
        raise ValueError(reason) from error
