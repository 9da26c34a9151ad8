"""Label files for zero-shot exploration: categories of labels, each with a few words on what one sees.

    {"version": 2, "about": "…", "categories": {"animals": {"parrot": "a bright bird with a hooked beak", …}, …},
     "history": [{"version": 2, "category": "animals", "source": "list birds.txt", "added": ["parrot"]}, …]}

`base` and `toy` lie here, written by this project.  What makes a label a good one is in rules.py, where new ones come
from in grow.py and endpoint.py, and `tinyvlm labels` in command.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyvlm.errors import ConfigError


@dataclass(frozen=True)
class Label:
    """One thing that a picture may show."""

    name: str
    description: str
    category: str


@dataclass(frozen=True)
class LabelFile:
    """A list of labels."""

    name: str
    """As it was asked for: a packaged name or a path."""
    version: int
    labels: tuple[Label, ...]
    fingerprint: str
    """Changes with every byte of the file."""
    content: Mapping[str, Any]
    """The file's JSON object, whatever else it holds."""


def load_labels(name: str) -> LabelFile:
    """A packaged label file by its name, or any file of that layout by its path.

    Raises:
        ConfigError: there is no such file, it is not of that layout, or a label occurs twice.
    """
    path = path_of(name)
    try:
        data = path.read_bytes()
        content = json.loads(data, object_pairs_hook=_without_repeats)
        labels = tuple(_labels(content["categories"]))
        version = int(content["version"])
    except OSError:
        raise ConfigError(
            f"The label file {name!r} (setting explore.labels) is neither a file nor one of {', '.join(packaged())}."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"The label file {path} cannot be used ({type(error).__name__}: {error}); "
            'it should hold {"version": …, "categories": {category: {label: description}}}.'
        ) from None
    return LabelFile(name, version, labels, hashlib.sha256(data).hexdigest(), content)


def packaged() -> list[str]:
    """Names of the label files that come with this package."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.json"))


def path_of(name: str) -> Path:
    """Where a label file lies."""
    return Path(__file__).parent / f"{name}.json" if name in packaged() else Path(name)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a later key of the same name replace an earlier one; here nothing disappears unseen."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the label {key!r} occurs twice" if isinstance(value, str) else f"{key!r} occurs twice")
        content[key] = value
    return content


def _labels(categories: dict[str, Any]) -> Iterator[Label]:
    seen: set[str] = set()
    for category, entries in categories.items():
        for name, description in entries.items():
            if name in seen:
                raise ValueError(f"the label {name!r} occurs twice")
            if not isinstance(description, str) or not description.strip():
                raise ValueError(f"the label {name!r} has no description")
            seen.add(name)
            yield Label(name, description, category)
    if not seen:
        raise ValueError("there are no labels")
