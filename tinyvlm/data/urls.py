"""What a link's text asks for: text ──check_url──▶ the URL that is requested, or why none is.

Lists of links are scraped from pages on which a browser understood them, so they are read as a browser reads them
(WHATWG URL Standard): what may stand in a request line is sent byte for byte, a signed address keeps its signature.

- blanks and control characters around it go, tabs and line breaks inside too; `HTTP://HOST` becomes lower case;
  `\\` before the query counts as `/`; `//host/x.jpg` is taken as http: https-only hosts redirect, others cannot;
- spaces, quotes, braces and letters beyond ASCII are percent-encoded (UTF-8), `%` stays whatever follows it;
- `.` and `..` segments are resolved; an IDN host becomes `xn--…`; a fragment is dropped, an empty path is `/`;
- user names and passwords are dropped: nobody logs in;
- `&amp;`, which a browser would have read as `&` in the page, is undone by `unescape`, for the links of a list only.

Refused: other schemes, over-long ones, host names that no name server can know, numbers that are no plain IPv4 address
(2130706433, 127.1), private addresses, and ports on which other services than the web live.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from yarl import URL

from tinyvlm.data.addresses import FetchError, is_public

MAX_LENGTH = 8192
"""Longest link, characters; servers refuse longer request lines."""
_AMPERSAND = re.compile(r"&(?:amp|#0*38|#x0*26);", re.IGNORECASE)
_AROUND = "".join(map(chr, range(0x21)))
_LINK = re.compile(r"(?i)(https?):[/\\]{2}([^/\\?#]*)([^?#]*)(\?[^#]*)?")
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_HOST = re.compile(r"(?!.{254})(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,62})\.?")
_ENDS_IN_A_NUMBER = re.compile(r"(^|\.)(\d+|0[xX][0-9a-fA-F]*)\.?$")
_UNSAFE_IN_PATH = re.compile(r'[^!-~]|["#<>?^`{}]')
_UNSAFE_IN_QUERY = re.compile(r"""[^!-~]|["#'<>]""")
_DOT = re.compile(r"(?i)/(?:\.|%2e)")
_BAD_PORTS = """
    0 1 7 9 11 13 15 17 19 20 21 22 23 25 37 42 43 53 69 77 79 87 95 101 102 103 104 109 110 111 113 115 117 119
    123 135 137 139 143 161 179 389 427 465 512 513 514 515 526 530 531 532 540 548 554 556 563 587 601 636 989
    990 993 995 1719 1720 1723 2049 3659 4045 4190 5060 5061 6000 6566 6665 6666 6667 6668 6669 6679 6697 10080
"""
_BLOCKED = frozenset(map(int, _BAD_PORTS.split()))
"""WHATWG Fetch Standard, "port blocking"."""


def unescape(link: str) -> str:
    """`&amp;` and its kin as `&`: links of a list were often cut out of HTML unread."""
    return _AMPERSAND.sub("&", link) if "&" in link else link


def check_url(text: str, allow_hosts: Collection[str]) -> URL:
    """The address to request; hosts in `allow_hosts` may be private and have any port.

    Raises:
        FetchError: `bad_url`, or `private_address` if it names one outright.
    """
    if len(text) > MAX_LENGTH:
        raise FetchError("bad_url", f"{len(text)} characters, {MAX_LENGTH} allowed")
    try:
        return _checked(text, allow_hosts)
    except ValueError as error:  # yarl's, and letters that UTF-8 cannot write
        raise FetchError("bad_url", str(error)) from None


def join(base: URL, location: str) -> str:
    """Where a redirect from `base` leads, still to be checked.

    Raises:
        ValueError: it cannot be read.
    """
    return str(base.join(URL(location.strip(_AROUND), encoded=True)))


def _checked(text: str, allow_hosts: Collection[str]) -> URL:
    text = text.strip(_AROUND)
    if not text.isprintable():
        text = text.replace("\t", "").replace("\n", "").replace("\r", "")
    if text.startswith(("//", "\\\\")):
        text = f"http:{text}"
    parts = _LINK.match(text)
    if parts is None or not parts[2]:
        raise FetchError("bad_url", "wants http:// or https:// and a host")
    scheme, authority, path, query = parts[1].lower(), parts[2].rpartition("@")[2], parts[3], parts[4] or ""
    if _PLAIN.fullmatch(authority):  # what IDNA would leave as it is; asking it takes longer than all the rest
        origin = URL(f"{scheme}://{authority.lower()}/", encoded=True)
    else:
        origin = URL(f"{scheme}://{authority}/")
    # The host as it will be connected to: yarl has mapped look-alikes such as １２７ to plain digits in this one.
    host, port = origin.raw_host or "", origin.port
    _check_host(host, port, allow_hosts)
    path = _UNSAFE_IN_PATH.sub(_percent, path.replace("\\", "/")) or "/"
    if _DOT.search(path):
        path = _without_dots(path)
    query = _UNSAFE_IN_QUERY.sub(_percent, query)
    return URL(f"{scheme}://{origin.raw_authority}{path}{query}", encoded=True)


def _check_host(host: str, port: int | None, allow_hosts: Collection[str]) -> None:
    if host in allow_hosts:
        return
    try:
        public = is_public(host)
    except ValueError:  # a name, not a number
        # inet_aton reads 2130706433, 0x7f.1 and 127.1 as addresses; honest links write all four numbers.
        if not _HOST.fullmatch(host) or _ENDS_IN_A_NUMBER.search(host):
            raise FetchError("bad_url", f"{host[:80]!r} is no host name") from None
    else:
        if not public:
            raise FetchError("private_address", host)
    if port in _BLOCKED:
        raise FetchError("bad_url", f"port {port} is not for the web")


def _percent(found: re.Match[str]) -> str:
    # Headers arrive with bytes that are no UTF-8 as surrogates; they go out as the bytes that they were.
    return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogateescape"))


def _without_dots(path: str) -> str:
    """RFC 3986 §5.2.4, with `%2e` read as a dot as browsers do."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for index, segment in enumerate(segments):
        plain = segment.lower().replace("%2e", ".")
        if plain == ".." and kept:
            kept.pop()
        if plain not in (".", ".."):
            kept.append(segment)
        elif index == len(segments) - 1:
            kept.append("")
    return "/" + "/".join(kept)
