"""New labels for a category, from wherever they come.

an endpoint's answers (endpoint.py) ─┐
a list: "name: description" or JSON ─┴─ candidates ──cleaned, compared (rules.py)──▶ added │ dropped, and why
                                                                                      └──▶ the next version
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tinyvlm.errors import DataError
from tinyvlm.labels import Label, LabelFile
from tinyvlm.labels.rules import Catalogue, clean_description, clean_name, key_of, only_repeats

Candidate = tuple[str, str]
"""Name and description; the description may be empty, and is refused then."""

_NAMES, _DESCRIPTIONS = ("name", "label"), ("description", "visual_description", "text")
_NO_LABELS = ("error", "message", "note", "category", "explanation")
"""What stands beside labels, or instead of them, when a model explains itself."""
_OPENING = re.compile(r"[\[{]")


class Growth:
    """A category being grown: candidates are offered, good ones added until there are `count` (None: all of them)."""

    def __init__(self, file: LabelFile, category: str, count: int | None = None) -> None:
        self.file, self.count = file, count
        known = dict.fromkeys(label.category for label in file.labels)
        same = [name for name in known if key_of(name) == key_of(category)]
        self.is_new = not same
        self.category = same[0] if same else clean_name(category)
        if not key_of(self.category):
            raise DataError(f"A category wants a name, got {category!r}.")
        self.added: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        """Name → why, of the last time it was offered."""
        self._catalogue = Catalogue(file.labels)

    @property
    def missing(self) -> int | None:
        """How many more are wanted; None without a limit."""
        return None if self.count is None else self.count - len(self.added)

    @property
    def names(self) -> list[str]:
        """All labels of the category, those before and those added."""
        return [*(label.name for label in self.file.labels if label.category == self.category), *self.added]

    def offer(self, candidates: Iterable[Candidate]) -> int:
        """Add the good ones; gives their number."""
        before = len(self.added)
        for raw_name, raw_description in candidates:
            name, description = clean_name(raw_name), clean_description(raw_description)
            if name in self.added:
                continue
            why = self._catalogue.refusal(name, description)
            if why is None and only_repeats(name, description):
                why = "its description only repeats the name"
            if why is None and self.missing == 0:
                why = "more than were asked for"
            if why is None:
                self._catalogue.add(Label(name, description, self.category))
                self.added[name] = description
                self.dropped.pop(name, None)
            else:
                self.dropped[name] = why
        return len(self.added) - before

    def next_version(self, source: str) -> dict[str, Any]:
        """The grown file: old labels where they were, new ones after them by name, and a note of where they came from.

        `source` goes into the note.
        """
        content, version = self.file.content, self.file.version + 1
        grown = {**content["categories"].get(self.category, {}), **dict(sorted(self.added.items()))}
        note = {"version": version, "category": self.category, "source": source, "added": sorted(self.added)}
        return {
            **content,
            "version": version,
            "categories": {**content["categories"], self.category: grown},
            "history": [*content.get("history", []), note],
        }


def to_text(content: Mapping[str, Any]) -> str:
    """A label file as it is written: one label a line, so that a difference can be reviewed."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_list(path: Path, category: str) -> list[Candidate]:
    """Candidates from a file: lines "name: description" (# begins a comment), JSON, or another label file's category.

    Raises:
        DataError: it cannot be read, or has nothing for this category.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = _in_json(json.loads(text), category) if path.suffix == ".json" else list(_in_lines(text))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"The list {path} cannot be read ({type(error).__name__}: {error}).") from None
    if not found:
        raise DataError(f'The list {path} has no labels for {category!r}; it wants lines "name: description" or JSON.')
    return found


def _in_lines(text: str) -> Iterator[Candidate]:
    for line in map(str.strip, text.splitlines()):
        if line and not line.startswith("#"):
            name, _, description = line.partition(":")
            yield name, description


def _in_json(content: Any, category: str) -> list[Candidate]:
    if isinstance(content, dict) and isinstance(content.get("categories"), dict):
        content = next((part for name, part in content["categories"].items() if key_of(name) == key_of(category)), {})
    return list(candidates_in(content))


def candidates_in(value: Any) -> Iterator[Candidate]:
    """Labels in a JSON value: objects with name and description, {name: description}, a list of names, or nested."""
    if isinstance(value, list):
        for item in value:
            yield from [(item, "")] if isinstance(item, str) else candidates_in(item)
    elif isinstance(value, dict):
        name = next((value[key] for key in _NAMES if isinstance(value.get(key), str)), None)
        nested = [item for item in value.values() if isinstance(item, (list, dict))]
        if name is not None:
            yield name, next((value[key] for key in _DESCRIPTIONS if isinstance(value.get(key), str)), "")
        elif nested:
            for item in nested:
                yield from candidates_in(item)
        else:
            yield from ((key, item) for key, item in value.items() if isinstance(item, str) and key not in _NO_LABELS)


def candidates_in_text(text: str, max_chars: int = 100_000) -> list[Candidate]:
    """Labels in what a model said: JSON among other words, in a code block, or cut off in the middle."""
    text, decoder, place = text[:max_chars], json.JSONDecoder(), 0
    found: list[Candidate] = []
    while opening := _OPENING.search(text, place):
        try:
            value, place = decoder.raw_decode(text, opening.start())
            found += candidates_in(value)
        except ValueError:  # no JSON here, or not all of it: there may be some inside
            place = opening.end()
        except RecursionError:
            break
    return found
