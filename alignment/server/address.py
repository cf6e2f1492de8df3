"""Server, address: check host and port before a model is loaded."""

from __future__ import annotations

import argparse
import errno
import socket


def read_port(text: str) -> int:
    """Parse a port number; for argparse."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: choose a number from 1 to 65535, such as 7860")
    return int(text)


def host_in_url(host: str) -> str:
    """Write a host as in a URL: IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def check_address(host: str, port: int) -> None:
    """Make sure that the page can be served there.

    Raises:
        ValueError: when the host is no address of this machine, or the port is taken or not for this user.
    """
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
