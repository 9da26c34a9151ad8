"""A JSON array read piece by piece is what `json` reads at once."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest

from tinyvlm.data.json_array import ArrayError, read_array

VALUES: list[Any] = [
    {"id": 1, "words": 'a "quoted" \\ back\nslash, [brackets] and {braces}'},
    {"id": -12.5e-3, "words": "grüße 漢字 😀", "deep": [[], {}, [1, [2, [3]]], {"a": None}]},
    12345678901234567890,
    -7,
    "text that ends in a backslash \\",
    "",
    True,
    False,
    None,
    float("inf"),
    {},
    [],
    0.125,
]


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_pieces_of_any_size_give_the_same_values(read_bytes: int, style: dict[str, Any]) -> None:
    text = json.dumps(VALUES, **style).encode()
    assert list(read_array(io.BytesIO(text), read_bytes)) == VALUES
    assert list(read_array(io.BytesIO(b"\xef\xbb\xbf \n" + text + b"\n \n"), read_bytes)) == VALUES


@pytest.mark.parametrize("read_bytes", [1, 2, 64])
def test_what_python_writes_for_missing_numbers_is_read(read_bytes: int) -> None:
    text = json.dumps([{"input": math.nan}, -math.inf, 5]).encode()
    first, second, third = read_array(io.BytesIO(text), read_bytes)
    assert math.isnan(first["input"])
    assert (second, third) == (-math.inf, 5)


@pytest.mark.parametrize("read_bytes", [1, 5, 1 << 20])
@pytest.mark.parametrize("text", ["[]", " [ ] "])
def test_an_empty_array(text: str, read_bytes: int) -> None:
    assert list(read_array(io.BytesIO(text.encode()), read_bytes)) == []


@pytest.mark.parametrize("read_bytes", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("text", "good", "said"),
    [
        ("", 0, "an array was wanted"),
        ('{"a": 1}', 0, "an array was wanted"),
        ('[{"a": 1}, {"a"', 1, "ends within a value"),
        ('[{"a": 1}, "open', 1, "ends within a value"),
        ('[{"a": 1}', 1, "'the end' after a value"),
        ('[{"a": 1},', 1, "ends within a value"),
        ("[1 2]", 1, "'2' after a value"),
        ("[1, 2] [3]", 2, "something follows"),
        ("[1, oh no, this is no JSON at all]", 1, "Expecting value"),
    ],
)
def test_what_is_no_array_says_so_after_the_values_before_it(text: str, good: int, said: str, read_bytes: int) -> None:
    found: list[Any] = []
    with pytest.raises(ArrayError, match=said):
        found.extend(read_array(io.BytesIO(text.encode()), read_bytes))
    assert len(found) == good


def test_a_fault_in_a_large_file_is_told_at_once_and_with_its_place() -> None:
    raw = io.BytesIO(b'[{"a": 1}, {"a": nothing}' + b" " * 1_000_000 + b"]")
    with pytest.raises(ArrayError, match=r"Expecting value \(character 17\)"):
        list(read_array(raw, 1000))
    assert raw.tell() <= 2000


def test_nesting_that_python_cannot_follow_is_an_error_like_others() -> None:
    with pytest.raises(ArrayError, match="nested too deeply"):
        list(read_array(io.BytesIO(b"[1, " + b"[" * 100_000 + b"]" * 100_000 + b"]")))
