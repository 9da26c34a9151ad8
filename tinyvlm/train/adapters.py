"""LoRA: small matrices beside the language model's frozen ones, added to them when training is over.

    y = W x + (alpha / rank) · B A x      A: normal, B: zero at first, so the first step starts from the model as it is

The saved model is of the same kind and size as without.  Needs peft (`pip install "tinyvlm[lora]"`).
Source: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

from typing import Any

import torch

from tinyvlm.errors import ConfigError
from tinyvlm.train.settings import LoraConfig

MARK = "lora_"
"""Every adapter weight has this in its name."""


def add_adapters(language: Any, config: LoraConfig, seed: int) -> None:
    """Put adapters beside the linear layers named in the settings; the same ones on every worker.

    Raises:
        ConfigError: peft is not installed, or no layer has such a name.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"lora.rank={config.rank} wants peft, which cannot be imported ({error}); "
            "install it with `pip install 'tinyvlm[lora]'`, or set lora.rank=0."
        ) from None
    names = {
        name.rpartition(".")[2] for name, module in language.named_modules() if isinstance(module, torch.nn.Linear)
    }
    names.discard("lm_head")
    unknown = sorted(set(config.targets) - names)
    if unknown:
        raise ConfigError(f"lora.targets has {unknown[0]!r}; the language model has {', '.join(sorted(names))}.")
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number will do
        target_modules=list(config.targets),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(wanted, language)


def merge_adapters(language: Any) -> None:
    """Add the adapters to the weights beside them, and take them out."""
    from peft.tuners.lora import LoraLayer

    found = [(name, module) for name, module in language.named_modules() if isinstance(module, LoraLayer)]
    for name, module in found:
        module.merge()
        above, _, own = name.rpartition(".")
        setattr(language.get_submodule(above), own, module.get_base_layer())
    if hasattr(language, "peft_config"):
        del language.peft_config
