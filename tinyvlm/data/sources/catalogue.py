"""Every source by the name that `prepare.source` has for it; its module is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from tinyvlm.data.sources import FileSource, PictureSource
from tinyvlm.errors import ConfigError

if TYPE_CHECKING:
    from tinyvlm.data.prepare import PrepareConfig

SourceName = Literal[
    "auto",
    "alpaca",
    "captions",
    "csv",
    "easy_vqa",
    "folder",
    "llava",
    "llavar",
    "m3it",
    "messages",
    "sharegpt",
    "vqa_v2",
]

SOURCES: Mapping[str, str] = {
    "messages": "messages:Messages",
    "sharegpt": "messages:ShareGPT",
    "folder": "folder:Folder",
    "captions": "captions:Captions",
    "easy_vqa": "easy_vqa:EasyVQA",
    "m3it": "m3it:M3IT",
    "llava": "llava:Llava",
    "llavar": "llavar:Llavar",
    "alpaca": "alpaca:Alpaca",
    "vqa_v2": "vqa_v2:VQAv2",
    "csv": "table:Table",
}
"""Name → module in this folder and class; of several that fit a file, `auto` (prepare_input.py) takes the first."""


def source_class(name: str) -> type[Any]:
    """The class of a source."""
    module, class_name = SOURCES[name].split(":")
    found: type[Any] = getattr(importlib.import_module(f"tinyvlm.data.sources.{module}"), class_name)
    return found


def open_source(config: PrepareConfig) -> PictureSource | FileSource:
    """The reader that the settings name.

    Raises:
        ConfigError: they say "auto", and nobody has looked.
    """
    if config.source not in SOURCES:
        raise ConfigError(f"prepare.source={config.source} wants `prepare_input.chosen` asked first.")
    source: PictureSource | FileSource = source_class(config.source)(config)
    return source


def fitting(record: Mapping[str, Any]) -> list[str]:
    """Names of the sources whose fields a record has all, those that want most of them first."""
    wanted = {name: set(required_fields(name)) for name in SOURCES}
    fits = [name for name, fields in wanted.items() if fields and fields <= set(record)]
    return sorted(fits, key=lambda name: -len(wanted[name]))


def required_fields(name: str) -> tuple[str, ...]:
    """Fields of a record without which it is not of that source; none for sources that read pictures."""
    found = source_class(name)
    return found.required if issubclass(found, FileSource) else ()
