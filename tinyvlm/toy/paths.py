"""Where the tiny weights lie inside the installed package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast, get_args

from tinyvlm.errors import ConfigError

WeightsName = Literal["tokenizer", "clip", "llm"]


def weights_dir(name: WeightsName) -> Path:
    """Folder that `from_pretrained` reads: the tokenizer, the two CLIP towers (with processor), the LM."""
    return Path(__file__).parent / "weights" / name


def resolve(name: str) -> Path | str:
    """The folder of packaged weights that "toy:clip", "toy:llm" or "toy:tokenizer" means; any other name unchanged."""
    kind, colon, part = name.partition(":")
    if kind != "toy" or not colon:
        return name
    if part not in get_args(WeightsName):
        known = ", ".join(f"toy:{one}" for one in get_args(WeightsName))
        raise ConfigError(f"There are no packaged weights {name!r}; use one of {known}, a folder or a hub id.")
    return weights_dir(cast(WeightsName, part))
