"""Server, limits: the rate of each client address, in bounded memory, and what its address is."""

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from starlette.types import Scope

_MAX_ADDRESSES = 10_000  # beyond it the address that was idle for longest is forgotten
_BURST = 0.5  # share of a minute's requests that may come at once


class TokenBucket:
    """Rate limit per client address: a bucket of half a minute's requests that refills steadily."""

    def __init__(
        self, per_minute: float, clock: Callable[[], float] = time.monotonic, max_addresses: int = _MAX_ADDRESSES
    ) -> None:
        """Allow `per_minute` requests of an address, 0 for any number; keep at most `max_addresses` buckets."""
        self._interval_s = 60 / per_minute if per_minute else 0.0  # between two tokens
        self._filling_s = max(1.0, per_minute * _BURST) * self._interval_s  # of an empty bucket
        self._clock, self._max_addresses = clock, max_addresses
        self.full_at = OrderedDict[str, float]()  # address -> when its bucket is full again

    def wait(self, address: str) -> float:
        """Take a token; returns 0, or the seconds until there is one."""
        if not self._interval_s:
            return 0.0
        now = self._clock()
        full_at = max(now, self.full_at.pop(address, now))
        missing_s = max(0.0, full_at + self._interval_s - now - self._filling_s)
        self.full_at[address] = full_at if missing_s else full_at + self._interval_s
        if len(self.full_at) > self._max_addresses:
            self.full_at.popitem(last=False)
        return missing_s


def client_address(scope: Scope, proxies: int) -> str:
    """Return the address that a request counts for; of IPv6 its /64 network, which one household has.

    Each of so many trusted reverse proxies appends its peer to X-Forwarded-For; private addresses are skipped, since
    the servers of a host forward to each other.
    """
    header = b",".join(value for name, value in scope["headers"] if proxies and name == b"x-forwarded-for")
    addresses = [address for part in header.decode("latin-1").split(",") if (address := _parse(part))]
    public = [address for address in addresses if not address.is_private] or addresses
    address = public[-min(proxies, len(public))] if public else _parse((scope.get("client") or ("",))[0])
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or ip_network((address, 64), strict=False).network_address)
    return str(address or "")


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    for written in (text, text.rpartition(":")[0]):  # some proxies append the port
        with suppress(ValueError):
            return ip_address(written.strip().strip("[]"))
    return None
