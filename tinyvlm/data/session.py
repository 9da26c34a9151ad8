"""The HTTP session behind all downloads of a worker: one TLS context, connections kept alive, no cookies."""

from __future__ import annotations

import asyncio
import functools
import gc
import resource
import ssl
from contextlib import suppress

import aiohttp
from aiohttp import hdrs
from aiohttp.abc import AbstractResolver

from tinyvlm.errors import ConfigError

KEEP_ALIVE_S = 2.0
"""How long an idle connection waits for the next link of its host; each holds an open file, and most come once."""
MAX_FILES = 65_536
"""Open files that are asked of the system: connections are files."""
COLLECT_EVERY = 10_000
"""New objects after which Python looks for garbage."""
MAX_HEADER_BYTES = 32_768
"""Longest header line; content security policies are longer than aiohttp's own 8 KiB."""


def open_session(
    resolver: AbstractResolver,
    tls: ssl.SSLContext,
    *,
    user_agent: str,
    connect_timeout_s: float,
    read_timeout_s: float,
) -> aiohttp.ClientSession:
    """A session that connects only to addresses of `resolver`; how many at a time is its user's concern."""
    connector = aiohttp.TCPConnector(
        resolver=resolver, use_dns_cache=False, limit=0, ssl=tls, keepalive_timeout=KEEP_ALIVE_S
    )
    # `connect` is for all addresses of a host together, `sock_connect` would be for each.
    timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s, sock_read=read_timeout_s)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={hdrs.USER_AGENT: user_agent, hdrs.ACCEPT: "image/*", hdrs.ACCEPT_ENCODING: "identity"},
        max_field_size=MAX_HEADER_BYTES,
    )


@functools.cache
def tls_context(ca_file: str) -> ssl.SSLContext:
    """Trust in the system's certificates and those of a file, if one is named.  Made once: it takes 15 ms.

    Raises:
        ConfigError: the file cannot be read.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"fetch.ca_file wants a file of PEM certificates, but {ca_file} gave: {error}.") from None
    return context


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed, which takes 10 to 20 % less CPU for each new connection, else asyncio's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def tune_process() -> None:
    """Prepare the process for thousands of connections: as many open files as it may have, a less busy collector.

    Files: the usual 1024 are fewer than our connections.  Collector: Python's looks for garbage after every 700 new
    objects, and finds little among those of living connections; every 10,000 took 40 % off the CPU time of a link.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    youngest, *others = gc.get_threshold()
    if 0 < youngest < COLLECT_EVERY:  # 0: somebody has switched it off
        gc.set_threshold(COLLECT_EVERY, *others)
