"""An exponential moving average of the hot weights.

after each step:  average += (1 - decay) · (weights - average)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tinyvlm.train.sharding import like


class Average:
    """Averages of parameters, each where its parameter lies and sharded as it is."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.values: dict[str, Tensor] = {name: value.detach().clone() for name, value in parameters.items()}

    def update(self) -> None:
        """Once a step, behind the optimizer."""
        with torch.no_grad():
            averages = [_local(value) for value in self.values.values()]
            torch._foreach_lerp_(averages, [_local(value) for value in self._parameters.values()], 1.0 - self._decay)

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Go back to a checkpoint's averages."""
        for name, parameter in self._parameters.items():
            self.values[name].copy_(like(parameter, values[name]))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averages for weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def keep(self) -> None:
        """The model keeps the averages: training is over."""
        self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                weight, average = _local(parameter), _local(self.values[name])
                held = weight.clone()
                weight.copy_(average)
                average.copy_(held)


def _local(value: Tensor) -> Tensor:
    found: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return found
