"""The shape of a TinyVLM, as transformers saves it in config.json."""

from __future__ import annotations

import math
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig
from transformers.configuration_utils import PretrainedConfig

from tinyvlm.errors import ConfigError

CONNECTORS = ("swiglu", "mlp")


class TinyVLMConfig(PretrainedConfig):  # type: ignore[misc]
    """A CLIP vision tower, a connector and a Llama language model.

    Attributes:
        vision_config: the tower (`CLIPVisionConfig`, or a dict of its fields).
        text_config: the language model (`LlamaConfig`, or a dict of its fields).
        num_image_tokens: K, how many tokens stand for one picture; a square number whose root divides the patch grid.
        connector: "swiglu" (gated, no biases) or "mlp" (two layers, GELU).
        connector_width: inner width of the connector.
        image_token_id: the token whose positions the picture features take.
    """

    model_type = "tinyvlm"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": LlamaConfig}  # noqa: RUF012 transformers' name

    vision_config: Any = None
    text_config: Any = None
    num_image_tokens: int = 64
    connector: str = "swiglu"
    connector_width: int = 8192
    image_token_id: int = -1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _sub_config(CLIPVisionConfig, self.vision_config)
        self.text_config = _sub_config(LlamaConfig, self.text_config)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        kwargs.pop("tie_word_embeddings", None)
        super().__post_init__(**kwargs)
        if self.connector not in CONNECTORS:
            raise ConfigError(f"model.connector must be one of {', '.join(CONNECTORS)}, not {self.connector!r}.")
        check_grid(self.num_image_tokens, self.num_patches_per_side)

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the picture."""
        return int(self.vision_config.image_size) // int(self.vision_config.patch_size)


def check_grid(num_image_tokens: int, num_patches_per_side: int) -> None:
    """Refuse a K that does not cut the patch grid into equal squares.

    Raises:
        ConfigError: naming the numbers that fit.
    """
    side = math.isqrt(max(num_image_tokens, 0))
    if side < 1 or side * side != num_image_tokens or num_patches_per_side % side:
        fitting = [n * n for n in range(1, num_patches_per_side + 1) if num_patches_per_side % n == 0]
        raise ConfigError(
            f"model.num_image_tokens is {num_image_tokens}, but the vision tower has {num_patches_per_side}×"
            f"{num_patches_per_side} patches; use one of {', '.join(map(str, fitting))}."
        )


def _sub_config(kind: type[Any], given: Any) -> Any:
    return given if isinstance(given, PretrainedConfig) else kind(**(given or {}))
