"""Where the tiny weights lie inside the installed package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

WeightsName = Literal["tokenizer", "clip", "llm"]


def weights_dir(name: WeightsName) -> Path:
    """Folder that `from_pretrained` reads: the tokenizer, the two CLIP towers (with processor), the LM."""
    return Path(__file__).parent / "weights" / name
