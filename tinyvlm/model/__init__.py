"""The model and its processor, known to transformers' Auto classes once this package is imported."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from tinyvlm.architecture import ModelConfig
from tinyvlm.model.build import build, load
from tinyvlm.model.configuration import TinyVLMConfig
from tinyvlm.model.modeling import TinyVLMForConditionalGeneration
from tinyvlm.model.processing import Sample, TinyVLMProcessor

AutoConfig.register("tinyvlm", TinyVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(TinyVLMConfig, TinyVLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(TinyVLMConfig, TinyVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(TinyVLMConfig, TinyVLMProcessor, exist_ok=True)

__all__ = [
    "ModelConfig",
    "Sample",
    "TinyVLMConfig",
    "TinyVLMForConditionalGeneration",
    "TinyVLMProcessor",
    "build",
    "load",
]
