"""How many floating-point operations a step needs, for this model: the numerator of its MFU.

    vision tower: each picture ─┐ forward;  + input gradients where something below is hot
    connector:    each picture  ├           + weight gradients where the module itself is hot
    language:     each token    │ attention: each sample by itself, causal, so half of its square
    head:         each supervised token ┘   (only those meet the vocabulary)

A matrix product of (m,k) and (k,n) counts 2·m·k·n; norms, softmax and other element-wise work count nothing, and
neither does what is computed twice.  Source: the appendix of A. Chowdhery et al., "PaLM", 2022, applied to each part by
itself; unlike there, a causal attention counts the half that is needed.

Shapes: P rows of the tower (patches and CLS), K tokens of one picture, Dv and Mv width and inner width of the tower, H
inner width of the connector, D and M of the language model, Dkv width of its keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tinyvlm.train.settings import Rates

PEAK_BF16_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense bf16 matrix rate with fp32 accumulation, TFLOP/s, by part of the device's name, the first that fits.

Source: NVIDIA's data sheets (half of the figures "with sparsity"); for the RTX cards the Ada and GA102 white papers.
"""


@dataclass(frozen=True)
class Flops:
    """Operations of some work, by part."""

    vision: float = 0.0
    connector: float = 0.0
    language: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """Of all parts."""
        return self.vision + self.connector + self.language + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(mine + theirs for mine, theirs in zip(self.parts, other.parts, strict=True)))

    @property
    def parts(self) -> tuple[float, float, float, float]:
        """In the order of the fields."""
        return self.vision, self.connector, self.language, self.head


class FlopCounter:
    """Counts for one model under one freeze policy.

    Args:
        config: of the whole model (`TinyVLMConfig`).
        cached: features come from a cache, so the tower does nothing.
        adapters: the language model learns through small matrices beside its own, whose operations are not counted.
        causal_share: how much of a causal attention's square is counted; 1.0 counts what a kernel without a notion of
            causality computes.
    """

    def __init__(
        self, config: Any, rates: Rates, *, cached: bool = False, adapters: bool = False, causal_share: float = 0.5
    ) -> None:
        self.rates, self.adapters, self.causal_share = rates, adapters, causal_share
        vision, language = config.vision_config, config.text_config
        patches = (vision.image_size // vision.patch_size) ** 2
        rows = patches + 1
        width, inner = vision.hidden_size, vision.intermediate_size
        layer = rows * (8 * width**2 + 4 * width * inner) + 4 * rows**2 * width
        patch_pixels = vision.num_channels * vision.patch_size**2
        self.tower = 0.0 if cached else float(vision.num_hidden_layers * layer)
        self.patches = 0.0 if cached else float(2 * patches * patch_pixels * width)
        matrices = 3 if config.connector == "swiglu" else 2
        into = (matrices - 1) * vision.hidden_size * config.connector_width
        self.connector_in = float(2 * config.num_image_tokens * into)
        self.connector_out = float(2 * config.num_image_tokens * config.connector_width * language.hidden_size)
        head_width = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
        queries = language.num_attention_heads * head_width
        keys = language.num_key_value_heads * head_width
        matrices_of_layer = language.hidden_size * (2 * queries + 2 * keys + 3 * language.intermediate_size)
        self.token = float(2 * language.num_hidden_layers * matrices_of_layer)
        self.square = float(4 * language.num_hidden_layers * queries)
        self.vocabulary = float(2 * language.hidden_size * language.vocab_size)

    def step(self, lengths: Iterable[int], num_pictures: int, num_supervised: int) -> Flops:
        """Forward and backward of samples of these lengths (image tokens included), each attending to itself alone."""
        lengths = list(lengths)
        squares = self.causal_share * self.square * float(sum(length**2 for length in lengths))
        tokens = self.token * float(sum(lengths))
        rates = self.rates
        below = bool(rates.vision or rates.connector or rates.language or rates.new_tokens)
        hot_language = bool(rates.language) and not self.adapters
        hot_connector, hot_vision = bool(rates.connector), bool(rates.vision)
        head = num_supervised * self.vocabulary * (1 + below + hot_language)
        # Attention has two operands in each product, and both take a gradient.
        language = tokens * (1 + below + hot_language) + squares * (1 + 2 * below)
        connector = num_pictures * (
            self.connector_out * (1 + (hot_connector or hot_vision) + hot_connector)
            + self.connector_in * (1 + hot_vision + hot_connector)
        )
        vision = num_pictures * (self.tower * (1 + 2 * hot_vision) + self.patches * (1 + hot_vision))
        return Flops(vision, connector, language, head)


def peak_flops(device_name: str) -> float | None:
    """The device's bf16 matrix rate from `PEAK_BF16_TFLOPS`, operations a second; None when it is not in the table."""
    for name, rate in PEAK_BF16_TFLOPS.items():
        if name in device_name:
            return rate * 1e12
    return None
