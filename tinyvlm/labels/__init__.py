"""Label files for zero-shot exploration, written by this project (see each file's `about`).

{"version": 1, "about": "…", "categories": {"animals": {"tabby cat": "a tabby cat with striped fur", …}, …}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
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
    """A list of labels; `fingerprint` changes with every byte of it."""

    version: int
    labels: tuple[Label, ...]
    fingerprint: str


def load_labels(name: str) -> LabelFile:
    """A packaged label file by its name, or any file of that layout by its path.

    Raises:
        ConfigError: there is no such file, it is not of that layout, or a label occurs twice.
    """
    packaged = Path(__file__).parent / f"{name}.json"
    path = packaged if packaged.is_file() else Path(name)
    try:
        data = path.read_bytes()
        content = json.loads(data)
        labels = tuple(_labels(content["categories"]))
        version = int(content["version"])
    except OSError:
        known = ", ".join(sorted(file.stem for file in Path(__file__).parent.glob("*.json")))
        raise ConfigError(f"explore.labels is {name!r}, which is neither a file nor one of {known}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"The label file {path} cannot be used ({type(error).__name__}: {error}); "
            'it should hold {"version": …, "categories": {category: {label: description}}}.'
        ) from None
    return LabelFile(version, labels, hashlib.sha256(data).hexdigest())


def _labels(categories: dict[str, Any]) -> Iterator[Label]:
    seen: set[str] = set()
    for category, entries in categories.items():
        for name, description in entries.items():
            if name in seen:
                raise ValueError(f"the label {name!r} occurs twice")
            if not isinstance(description, str) or not description:
                raise ValueError(f"the label {name!r} has no description")
            seen.add(name)
            yield Label(name, description, category)
    if not seen:
        raise ValueError("there are no labels")
