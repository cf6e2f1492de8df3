"""Top floor, who asks and how often: one bucket an address, and no more addresses in memory than are worth it."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from starlette.types import Scope

_REMEMBERED = 10_000  # addresses; of whoever has not come for longest it is forgotten that they ever came
_BURST = 0.5  # of a minute's requests may come in one go


class Rates:
    """How often each address asks: a bucket of half a minute's requests that fills steadily."""

    def __init__(self, a_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Count requests.

        Args:
            a_minute: how many an address has; 0 for any number.
            clock: tells the seconds.
        """
        self._per_second, self._full, self._clock = a_minute / 60, max(1.0, a_minute * _BURST), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address -> what is left, as of when

    def __len__(self) -> int:
        return len(self._buckets)

    def wait(self, address: str) -> float:
        """Take one request of an address; the seconds it has to wait if there is none left, else 0."""
        if not self._per_second:
            return 0.0
        now = self._clock()
        left, since = self._buckets.pop(address, (self._full, now))
        left = min(self._full, left + (now - since) * self._per_second)
        taken = left >= 1
        self._buckets[address] = (left - taken, now)
        if len(self._buckets) > _REMEMBERED:
            self._buckets.popitem(last=False)
        return 0.0 if taken else (1 - left) / self._per_second


class Open:
    """How many requests of each address are open; an address without any takes no memory."""

    def __init__(self, most: int) -> None:
        self._most, self._open = most, Counter[str]()

    @contextmanager
    def one(self, address: str) -> Iterator[bool]:
        """Count one more while it lasts; whether there was room for it."""
        if self._open[address] >= self._most > 0:
            yield False
            return
        self._open[address] += 1
        try:
            yield True
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]


def address_of(scope: Scope, proxies: int) -> str:
    """Find out where a request comes from; a network of IPv6 that is handed out as one counts as one.

    Args:
        scope: of the request.
        proxies: how many servers in front are believed. Each adds the address it was asked from to X-Forwarded-For;
            those of an inner network are skipped, since there the servers of a host ask each other.
    """
    peer = (scope.get("client") or ("",))[0]
    if not proxies:
        return _network(peer)
    told = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for").decode("latin-1")
    addresses = [address for part in told.split(",") if (address := _read(part))]
    outside = [address for address in addresses if not address.is_private] or addresses
    return _network(str(outside[-min(proxies, len(outside))])) if outside else _network(peer)


def _read(written: str) -> IPv4Address | IPv6Address | None:
    bare = written.strip().strip("[]")
    try:
        return ip_address(bare)
    except ValueError:
        host, _, _ = written.strip().rpartition(":")  # some write the port as well
        try:
            return ip_address(host.strip("[]"))
        except ValueError:
            return None


def _network(written: str) -> str:
    address = _read(written)
    if isinstance(address, IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped or ip_network((address, 64), strict=False).network_address)
    return str(address or "")
