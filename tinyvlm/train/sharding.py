"""FSDP2: weights, gradients and optimizer state cut into as many shards as there are workers.

    fully_shard(each decoder layer), fully_shard(each layer of a hot tower), fully_shard(all the rest)
    forward, backward:  all-gather a layer, use it, let go of it        weights: fp32 shards, bf16 when gathered
    last batch of a step: reduce-scatter of summed gradients            before it they add up unsharded, unsent

Every worker must pass the same modules equally often, or the others wait forever: in a step all have as many batches as
the one that has most (`Trainer._batches`), and each batch passes the tower, with a grey picture if it has none.

A checkpoint holds whole tensors, the same as without sharding, so any number of workers continues either.
Source: torch.distributed.fsdp.fully_shard, PyTorch 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tinyvlm.train.collective import Collective
from tinyvlm.train.freeze import FreezePolicy
from tinyvlm.train.settings import TrainConfig


def shard(model: Any, policy: FreezePolicy, config: TrainConfig) -> None:
    """Shard a model over the default process group, in place; the policy's parameters become the shards."""
    mixed = MixedPrecisionPolicy()
    if config.precision == "bf16":
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole: set[nn.Parameter] = set()
    if config.rates.vision > 0:
        for layer in model.vision.encoder.layers:
            fully_shard(layer, mp_policy=mixed)
    else:  # asked outside of the model's forward pass, and it has no gradients or optimizer state to save room for
        whole = set(model.vision.parameters())
    for layer in model.language.model.layers:
        fully_shard(layer, mp_policy=mixed)
    fully_shard(model, mp_policy=mixed, ignored_params=whole, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums: the loop divides once, by the supervised tokens
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.shows_every_batch = True
    shards = dict(model.named_parameters())
    for group in policy.groups:
        group.parameters.update({name: shards[name] for name in group.parameters if name in shards})


def unshard(model: Any) -> None:
    """Put whole weights back, on every worker, so that the model can be saved; it is trained no more."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                kept = nn.Parameter(parameter.full_tensor().detach(), requires_grad=parameter.requires_grad)
                setattr(module, name, kept)
    model.tie_weights()


class ShardedGradients:
    """As `optim.Gradients`, where each worker holds its shards of most gradients."""

    def __init__(self, model: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model, self._parameters = model, list(parameters.values())
        self.totals = torch.zeros(3, dtype=torch.float32, device=self._parameters[0].device)
        self._squares = torch.zeros((), dtype=torch.float32, device=self.totals.device)

    def clear(self) -> None:
        """Forget the step before."""
        self.totals.zero_()
        for parameter in self._parameters:
            parameter.grad = None

    def before_backward(self, *, is_last: bool) -> None:
        """Send gradients only behind the last batch of a step."""
        self._model.set_requires_gradient_sync(is_last)

    def add_loss(self, loss: Tensor, num_supervised: int) -> None:
        """Note a summed loss and how many tokens it covers."""
        self.totals[0] += loss.detach()
        self.totals[1] += num_supervised

    def add_wish_to_stop(self) -> None:
        """Have all workers know, after the sum, that one of them would stop."""
        self.totals[2] += 1

    def reduce(self, collective: Collective) -> None:
        """Sum what FSDP has not summed: totals, squares of the shards, and gradients of weights that are whole."""
        collective.sum(self.totals)
        sharded = [p.grad.to_local() for p in self._parameters if isinstance(p.grad, DTensor)]
        self._squares = _sum_of_squares(sharded, self.totals)
        collective.sum(self._squares)
        for parameter in self._parameters:
            if not isinstance(parameter, DTensor):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                collective.sum(parameter.grad)

    def normalise(self, clip: float) -> tuple[Tensor, Tensor]:
        """Divide by the supervised tokens, clip by the norm over all shards, and return (mean loss, norm before)."""
        sharded = [p.grad.to_local() for p in self._parameters if isinstance(p.grad, DTensor)]
        whole = [p.grad for p in self._parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        supervised = self.totals[1].clamp(min=1.0)
        norm = (self._squares + _sum_of_squares(whole, self.totals)).sqrt() / supervised
        factor = 1.0 / supervised
        if clip > 0:
            factor = factor * (clip / (norm + 1e-6)).clamp(max=1.0)
        if sharded + whole:
            torch._foreach_mul_(sharded + whole, factor)
        return self.totals[0] / supervised, norm


def _sum_of_squares(tensors: list[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=like.device)
    for norm in torch._foreach_norm(tensors) if tensors else ():
        total = total + norm.float().square()
    return total


def whole_tensors(value: Any) -> Any:
    """A state with every shard replaced by the whole tensor on the CPU; all workers must ask together."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, Mapping):
        return {name: whole_tensors(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole_tensors(inner) for inner in value)
    return value


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor as the parameter is: the worker's shard of it, or itself."""
    if not isinstance(parameter, DTensor):
        return whole
    given = whole.to(parameter.device)
    return distribute_tensor(given, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """After whole states were loaded: keep this worker's shards of them."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == parameter.shape:
                state[name] = like(parameter, value)
