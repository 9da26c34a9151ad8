"""Which addresses a download may speak to: public ones, and hosts that the settings name.

    "http://host/…" ──urls.check_url──▶ URL ──Resolver──▶ checked addresses ──▶ aiohttp connects to exactly these

A host name is looked up once, its addresses are checked, and the connection goes to a checked address: no second lookup
could lead elsewhere.  Each redirect passes the same gate.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from aiohttp.abc import AbstractResolver, ResolveResult

KEEP_S = 300.0
"""How long the answer to a lookup is believed, good or bad."""
MAX_KNOWN = 50_000
"""Answers remembered, the newest ones."""
MAX_ADDRESSES = 4
"""Addresses of one host that are tried."""
_METADATA = {"168.63.129.16"}
"""Public-looking addresses that are a cloud's own; other clouds' metadata addresses are link-local or private."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# "There is no such name" and "the name has no address"; other errors are the name server's, and may pass.
_NO_SUCH_NAME = {getattr(socket, name, None) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY")}


class FetchError(Exception):
    """Why a link gave no picture: a status of `schema.STATUSES`, some words, and whether trying again may help."""

    def __init__(self, status: str, detail: str, *, transient: bool = False, wait_s: float | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail, self.transient, self.wait_s = status, detail, transient, wait_s


class NotAsked(FetchError):
    """The link's host is dead or closed to us: no request was made."""


def is_public(address: str) -> bool:
    """Whether a numeric address belongs to the public internet, also when it wraps an IPv4 address.

    Raises:
        ValueError: not a numeric address.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and str(ip) not in _METADATA


def is_invalid(host: str) -> bool:
    """Whether a name exists nowhere by definition (RFC 6761 §6.4), and no name server is asked for it."""
    return f".{host.rstrip('.')}".lower().endswith(".invalid")


@dataclass(frozen=True)
class Known:
    """What a lookup said: addresses with their families, or why there are none."""

    until: float
    addresses: tuple[tuple[int, str], ...] = ()
    status: str = ""
    detail: str = ""


class Resolver(AbstractResolver):
    """Looks host names up in threads of its own, remembers the answers in `cache`, and gives out checked addresses."""

    def __init__(
        self, allow_hosts: Collection[str], cache: dict[str, Known], num_threads: int, timeout_s: float
    ) -> None:
        self._allow_hosts, self._cache, self._timeout_s = allow_hosts, cache, timeout_s
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="dns")
        self._running: dict[str, asyncio.Task[Known]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of `host` that may be spoken to.

        Raises:
            FetchError: `dead.dns`, `broken.dns` or `private_address`.
        """
        known = await self.look_up(host)
        tcp, flags = socket.IPPROTO_TCP, socket.AI_NUMERICHOST
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=tcp, flags=flags)
            for kind, address in known.addresses
        ]

    async def look_up(self, host: str) -> Known:
        """What is known of `host`, and a lookup if nothing is.

        Raises:
            FetchError: as for `resolve`.
        """
        known = self._cache.get(host)
        if known is None or known.until < time.monotonic():
            known = await self._shared_lookup(host)
        if known.status:
            raise FetchError(known.status, known.detail, transient=known.status == "broken.dns")
        return known

    async def close(self) -> None:
        """Leave lookups that still hang behind."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _shared_lookup(self, host: str) -> Known:
        if host not in self._running:
            task = asyncio.create_task(self._look_up(host))
            task.add_done_callback(lambda _: self._running.pop(host, None))
            self._running[host] = task
        # Shielded: one impatient row must not cancel the lookup for the others.
        return await asyncio.shield(self._running[host])

    async def _look_up(self, host: str) -> Known:
        until = time.monotonic() + KEEP_S
        if is_invalid(host):
            return self._remember(host, Known(until, status="dead.dns", detail=f"{host} does not exist"))
        try:
            async with asyncio.timeout(self._timeout_s):  # with the wait for a thread: a lookup not begun is dropped
                found = await asyncio.get_running_loop().run_in_executor(self._threads, _getaddrinfo, host)
        except TimeoutError:
            return Known(0.0, status="broken.dns", detail=f"{host}: no answer in {self._timeout_s:g} s")
        except (OSError, UnicodeError) as error:
            if isinstance(error, UnicodeError) or error.errno in _NO_SUCH_NAME:
                return self._remember(host, Known(until, status="dead.dns", detail=f"{host}: {error}"))
            return Known(0.0, status="broken.dns", detail=f"{host}: {error}")  # asked again next time
        return self._remember(host, self._checked(host, found, until))

    def _remember(self, host: str, known: Known) -> Known:
        self._cache.pop(host, None)
        self._cache[host] = known
        while len(self._cache) > MAX_KNOWN:
            del self._cache[next(iter(self._cache))]
        return known

    def _checked(self, host: str, found: list[tuple[int, str]], until: float) -> Known:
        allowed = tuple(pair for pair in found if host in self._allow_hosts or is_public(pair[1]))
        if not allowed:
            return Known(until, status="private_address", detail=f"{host} is {found[0][1] if found else 'nowhere'}")
        return Known(until, allowed[:MAX_ADDRESSES])


def _getaddrinfo(host: str) -> list[tuple[int, str]]:
    infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    # An address with a scope (fe80::1%eth0) is link-local: the scope is dropped, the check refuses it.
    return [(int(family), str(address[0]).partition("%")[0]) for family, _, _, _, address in infos]
