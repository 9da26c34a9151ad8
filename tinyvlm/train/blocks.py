"""What may be done to each layer of tower and language model: compute it twice to save memory, or compile it.

gradient_checkpointing   layer(x) keeps x alone, and is computed again in the backward pass; not those of a frozen tower
compile                  torch.compile for each layer, in place: names of weights stay, one graph serves all layers
"""

from __future__ import annotations

from typing import Any

import torch

from tinyvlm.train.settings import TrainConfig


def prepare_blocks(model: Any, config: TrainConfig, device: torch.device) -> bool:
    """Set up the layers, before they are sharded; says whether they are compiled."""
    if config.gradient_checkpointing:
        for module in (model.vision, model.language):
            if any(parameter.requires_grad for parameter in module.parameters()) or module is model.language:
                enable = (
                    getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
                )
                enable({"use_reentrant": False})
    is_compiled = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
    if is_compiled:
        for layer in (*model.vision.encoder.layers, *model.language.model.layers):
            layer.compile()
    return is_compiled
