"""What a model is made of.  Apart from the code that makes it, so that reading a recipe does not load torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinyvlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is made of.  Names are local folders, hub ids, or "toy:…" for the packaged tiny weights."""

    vision: str = "openai/clip-vit-large-patch14-336"
    """A CLIP checkpoint; its text tower, if any, is left out."""
    language: str = "meta-llama/Llama-3.2-1B-Instruct"
    """A checkpoint of the Llama family."""
    tokenizer: str | None = None
    """Where the tokenizer is; none = with the language model."""
    num_image_tokens: int = 64
    """Tokens that stand for one picture: a square number whose root divides the patch grid."""
    connector: Literal["swiglu", "mlp"] = "swiglu"
    """A gated MLP without biases, or two plain layers with GELU."""
    connector_width: int = 8192
    """Inner width of the connector."""

    def __post_init__(self) -> None:
        root = int(max(self.num_image_tokens, 0) ** 0.5 + 0.5)
        if root < 1 or root * root != self.num_image_tokens:
            raise ConfigError(
                f"model.num_image_tokens is {self.num_image_tokens}, which is no square number; use for example "
                f"{max(root, 1) ** 2}."
            )
        if self.connector_width < 1:
            raise ConfigError(f"model.connector_width is {self.connector_width}; it must be at least 1.")
