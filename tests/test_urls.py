"""What a link's text asks for, and which addresses nobody asks."""

from __future__ import annotations

import ipaddress

import pytest
from yarl import URL

from tinyvlm.data.addresses import FetchError, is_public
from tinyvlm.data.urls import check_url, join, unescape


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://host.test/x.jpg", "http://host.test/x.jpg"),
        ("HTTP://HOST.test/X.JPG", "http://host.test/X.JPG"),
        (" \t http://host.test/x.jpg \r\n", "http://host.test/x.jpg"),
        ("http://host.test/a\n b\t.jpg", "http://host.test/a%20b.jpg"),
        ("//host.test/x.jpg", "http://host.test/x.jpg"),
        (r"http:\\host.test\a\b.jpg?c\d", r"http://host.test/a/b.jpg?c\d"),
        ("http://host.test", "http://host.test/"),
        ("http://host.test?q=1", "http://host.test/?q=1"),
        ("http://host.test/?", "http://host.test/"),
        ("http://host.test:80/x#part", "http://host.test/x"),
        ("https://user:secret@host.test/x", "https://host.test/x"),
        ("https://good.test@evil.test/x", "https://evil.test/x"),
        ("http://host.test/a b.jpg", "http://host.test/a%20b.jpg"),
        ("http://host.test/100%.jpg?50%&%zz", "http://host.test/100%.jpg?50%&%zz"),
        ("http://host.test/a%2fb%41%7e.jpg", "http://host.test/a%2fb%41%7e.jpg"),
        ("http://host.test/?sign=a+b%20c%2Bd=&e[]='", "http://host.test/?sign=a+b%20c%2Bd=&e[]=%27"),
        ("http://host.test/größe.jpg?ü=ö", "http://host.test/gr%C3%B6%C3%9Fe.jpg?%C3%BC=%C3%B6"),
        ('http://host.test/<a>"{b}`^|.jpg', "http://host.test/%3Ca%3E%22%7Bb%7D%60%5E|.jpg"),
        ("http://host.test/a\x00b\x7f", "http://host.test/a%00b%7F"),
        ("http://host.test/a/./b/../c/%2e%2E/d/..", "http://host.test/a/"),
        ("http://host.test/../../x.jpg", "http://host.test/x.jpg"),
        ("http://host.test//a//b.jpg", "http://host.test//a//b.jpg"),
        ("http://bücher.test/x", "http://xn--bcher-kva.test/x"),
        ("http://BÜCHER.test:8080/x", "http://xn--bcher-kva.test:8080/x"),
        ("http://under_score.host.test/x", "http://under_score.host.test/x"),
        ("http://[2606:4700::1111]:8080/x", "http://[2606:4700::1111]:8080/x"),
        ("http://8.8.8.8/x", "http://8.8.8.8/x"),
    ],
)
def test_links_are_read_as_browsers_read_them(text: str, url: str) -> None:
    assert str(check_url(text, ())) == url
    assert str(check_url(url, ())) == url, "a checked address stays what it is"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "not a url",
        "/x.jpg",
        "ftp://host.test/x.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "http:/host.test/x.jpg",
        "http://",
        "http:///x.jpg",
        "http://?x",
        "http://@/x",
        "http://host.test:99999/x",
        "http://host.test:x/x",
        "http://host.test:25/x",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://127.1/",
        "http://127.0.0.1./",
        "http://[::1/",
        "http://a b/",
        "http://a%00b/",
        "http://a..b/",
        "http://-a.test/",
        f"http://{'a' * 64}.test/",
        f"http://{'a.' * 130}test/",
        "http://host.test/\ud800",
        f"http://host.test/{'x' * 9000}",
    ],
)
def test_texts_that_ask_for_nothing(text: str) -> None:
    with pytest.raises(FetchError, match="bad_url"):
        check_url(text, ())


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 100.100.100.200 0.0.0.0 255.255.255.255
    224.0.0.1 240.0.0.1 168.63.129.16 ::1 :: fe80::1 fc00::1 fd00:ec2::254 ff02::1 ::ffff:127.0.0.1 64:ff9b::7f00:1
    2002:7f00:1::""".split(),
)
def test_addresses_that_are_not_the_web(address: str) -> None:
    assert not is_public(address)
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(FetchError, match="private_address"):
        check_url(f"http://{host}/x.jpg", ())
    check_url(f"http://{host}:25/x.jpg", (str(ipaddress.ip_address(address)),))


@pytest.mark.parametrize("host", ["１２７.0.0.1", "①②⑦.⓪.⓪.①", "127。0。0。1", "[::ffff:7f00:1]", "%31%32%37.0.0.1"])
def test_no_spelling_of_a_private_address_passes(host: str) -> None:
    with pytest.raises(FetchError, match=r"private_address|bad_url"):
        check_url(f"http://{host}/x.jpg", ())


def test_addresses_that_are_the_web() -> None:
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(address)


def test_html_escapes_of_a_list_are_undone() -> None:
    assert unescape("http://h/?a=1&amp;b=2&#038;c=3&#x26;d") == "http://h/?a=1&b=2&c=3&d"
    assert unescape("http://h/?a=1&b=2&ampere=3") == "http://h/?a=1&b=2&ampere=3"


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/b.jpg", "http://host.test/b.jpg"),
        ("c d.jpg", "http://host.test/a/c%20d.jpg"),
        ("../e.jpg?x", "http://host.test/e.jpg?x"),
        ("?q", "http://host.test/a/x?q"),
        ("//other.test/f", "http://other.test/f"),
        ("https://other.test:444/g#h", "https://other.test:444/g"),
        # A header's Latin-1 bytes, as aiohttp hands them over.
        ("/gr\udcf6\udcdfe.jpg", "http://host.test/gr%F6%DFe.jpg"),
        ("/größe.jpg", "http://host.test/gr%C3%B6%C3%9Fe.jpg"),
    ],
)
def test_where_redirects_lead(location: str, url: str) -> None:
    assert str(check_url(join(URL("http://host.test/a/x?y"), location), ())) == url
