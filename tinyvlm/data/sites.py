"""Who stands behind a link: its host, the site that the host belongs to, and its top-level domain."""

from __future__ import annotations

import ipaddress
from functools import cache, lru_cache

import pyarrow as pa
import pyarrow.compute as pc
from publicsuffixlist import PublicSuffixList

_HOST = r"^\s*(?:[A-Za-z][A-Za-z0-9+.\-]*:)?//(?:[^/?#\\]*@)?(?P<host>\[[^\]/?#]*\]|[^/?#:\\\s]*)"
"""The host of an address, without user and port; see RFC 3986, section 3.2."""
_MAX_HOST = 253
"""Letters of a host name, as DNS allows."""
NO_HOST = "(no host)"


def hosts_of(urls: pa.ChunkedArray) -> pa.Array:
    """The host of each link, in lower case and without a last dot; `NO_HOST` where there is none."""
    found = pc.struct_field(pc.extract_regex(urls.combine_chunks(), _HOST), "host")
    hosts = pc.utf8_slice_codeunits(pc.utf8_lower(pc.utf8_rtrim(found, ".")), 0, _MAX_HOST)
    return pc.fill_null(pc.if_else(pc.equal(hosts, ""), None, hosts), NO_HOST)


def site_of(host: str) -> str:
    """The registered domain of a host name, by the public suffix list (its ICANN part): what one owner answers for."""
    return host if _is_address(host) else _registered(host)


def top_level_domain_of(host: str) -> str:
    """What stands behind the last dot."""
    return host if host == NO_HOST else "(numeric address)" if _is_address(host) else host.rpartition(".")[2]


@lru_cache(maxsize=1 << 16)
def _registered(host: str) -> str:
    return _suffixes().privatesuffix(host) or host


@cache
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList(only_icann=True)  # the list in the package: nothing is fetched


def _is_address(host: str) -> bool:
    if not host[-1:].isdigit() and host[-1:] != "]":
        return False
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
