"""Learning-rate schedule, optimizer, and gradients that lie in one flat tensor.

Every hot parameter's `.grad` is a view into `Gradients.flat`: the backward pass adds into it, and summing over workers,
dividing, clipping and clearing are each one operation, whatever the number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tinyvlm.errors import ConfigError
from tinyvlm.train.collective import Collective
from tinyvlm.train.freeze import FreezePolicy
from tinyvlm.train.settings import TrainConfig


def rate_factor(config: TrainConfig, step: int, num_steps: int) -> float:
    """What the peak rates are multiplied with in step `step` (from 0): linear warm-up, then the schedule down to 0."""
    warmup = min(config.warmup_steps, num_steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


class Gradients:
    """The gradients of all hot parameters, and three numbers more: summed loss, supervised tokens, wishes to stop."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        size = sum(parameter.numel() for parameter in self._parameters)
        self.flat = torch.zeros(size + 3, dtype=torch.float32, device=self._parameters[0].device)
        self.values, self.totals = self.flat[:size], self.flat[size:]
        start = 0
        for parameter in self._parameters:
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def clear(self) -> None:
        """Set everything to 0 for the next step."""
        self.flat.zero_()

    def before_backward(self, *, is_last: bool) -> None:
        """Nothing: gradients add up here, and are summed once a step."""

    def reduce(self, collective: Collective) -> None:
        """Sum over all workers."""
        collective.sum(self.flat)

    def add_loss(self, loss: Tensor, num_supervised: int) -> None:
        """Note a summed loss and how many tokens it covers."""
        self.totals[0] += loss.detach()
        self.totals[1] += num_supervised

    def add_wish_to_stop(self) -> None:
        """Have all workers know, after the sum, that one of them would stop."""
        self.totals[2] += 1

    def normalise(self, clip: float) -> tuple[Tensor, Tensor]:
        """Divide by the supervised tokens, clip, and return (mean loss, norm before clipping)."""
        supervised = self.totals[1].clamp(min=1.0)
        norm = self.values.norm() / supervised
        factor = 1.0 / supervised
        if clip > 0:
            factor = factor * (clip / (norm + 1e-6)).clamp(max=1.0)
        self.values.mul_(factor)
        return self.totals[0] / supervised, norm


def make_optimizer(policy: FreezePolicy, config: TrainConfig) -> torch.optim.Optimizer:
    """One group for each module and kind of weight; only matrices decay.

    Raises:
        ConfigError: the 8-bit optimizer is not installed.
    """
    groups: list[dict[str, Any]] = []
    for group in policy.groups:
        for decays in (True, False):
            members = [p for p in group.parameters.values() if (p.ndim >= 2) == decays]
            if members:
                decay = config.weight_decay if decays and group.module != "new_tokens" else 0.0
                groups.append({"params": members, "lr": group.rate, "peak": group.rate, "weight_decay": decay})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, fused=True)
    try:
        import bitsandbytes.optim as eight_bit
    except ImportError as error:
        raise ConfigError(
            f"optimizer='adamw8bit' wants bitsandbytes, which cannot be imported ({error}); "
            "install it with `pip install bitsandbytes`, or set optimizer='adamw'."
        ) from None
    keeper: Any = eight_bit.GlobalOptimManager.get_instance()  # type: ignore[attr-defined, no-untyped-call]
    for module in policy.model.modules():
        if isinstance(module, nn.Embedding):
            keeper.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer: torch.optim.Optimizer = eight_bit.AdamW8bit(  # type: ignore[attr-defined, no-untyped-call]
        groups, betas=config.betas
    )
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
