"""The values of a JSON array of any size, one after the other, a few megabytes in memory at a time.

    bytes ──4 MiB at a time──▶ text ──json's own decoder, value by value──▶ value, value, …

Why not `ijson`, which is there for arrays inside other objects: files that Python wrote have NaN and Infinity, which
make it give up the whole file, and `json` is several times as fast on records of words.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"[-+.0-9eE]*")
"""What may still belong to a number when the text ends there."""
_LONGEST_WORD = len("-Infinity")
"""What stops nearer to the end of the text than this may be a word that is cut in two."""


class ArrayError(ValueError):
    """The text is no JSON array."""


def read_array(raw: BinaryIO, read_bytes: int = 4 << 20) -> Iterator[Any]:
    """The array's values.

    Args:
        raw: where a JSON array in UTF-8 begins, a byte order mark allowed.
        read_bytes: how much is read at a time; a longer value is read in larger and larger pieces.

    Raises:
        ArrayError: it is none, or ends too early, or something follows it; UnicodeDecodeError: it is not UTF-8.
    """
    text = _Text(raw, read_bytes)
    if text.next() != "[":
        raise text.error("an array was wanted")
    text.at += 1
    if text.next() == "]":
        text.at += 1
    else:
        while True:
            text.next()
            yield text.value()
            separator = text.next()
            text.at += 1
            if separator == "]":
                break
            if separator != ",":
                raise text.error(f"{separator or 'the end'!r} after a value", back=1)
    if text.next():
        raise text.error("something follows the array")


class _Text:
    """A piece of the text that moves on."""

    def __init__(self, raw: BinaryIO, read_bytes: int) -> None:
        self.text, self.at = "", 0
        self._before = 0
        self._raw, self._read_bytes, self._is_all = raw, read_bytes, False
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder().raw_decode

    def next(self) -> str:
        """The next character that is no space, which stays; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches everywhere
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = self._scan(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _LONGEST_WORD
                if not is_cut:
                    raise self.error(error.msg, back=self.at - error.pos) from None
                if not self._more():
                    raise self.error("it ends within a value") from None
                continue
            except RecursionError:
                raise self.error("nested too deeply") from None
            if _NUMBER.match(self.text, end).end() < len(self.text) or not self._more():  # type: ignore[union-attr]
                self.at = end
                return value

    def error(self, what: str, back: int = 0) -> ArrayError:
        """What is wrong, and where."""
        return ArrayError(f"{what} (character {self._before + self.at - back:,})")

    def _more(self) -> bool:
        """Read on; False: there is no more."""
        if self._is_all:
            return False
        piece = self._raw.read(max(self._read_bytes, len(self.text) - self.at))
        self._is_all = not piece
        self._before += self.at
        self.text, self.at = self.text[self.at :] + self._decode(piece, final=self._is_all), 0
        return True
