"""What the loop asks of the processes that train together.  It needs no more than this, so it knows nothing of Ray."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Collective(Protocol):
    """A group of equal workers."""

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""

    @property
    def world(self) -> int:
        """How many there are."""

    def sum(self, tensor: Tensor) -> None:
        """Replace `tensor`, on every worker, by its sum over all workers."""

    def broadcast(self, tensor: Tensor) -> None:
        """Replace `tensor`, on every worker, by that of worker 0."""

    def barrier(self) -> None:
        """Wait until every worker is here."""


class Alone:
    """One process."""

    rank = 0
    world = 1

    def sum(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def broadcast(self, tensor: Tensor) -> None:
        """Nobody to tell."""

    def barrier(self) -> None:
        """Nobody to wait for."""


class Group:
    """The default group of `torch.distributed` (gloo on CPU, nccl on GPU), which someone else has set up."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def sum(self, tensor: Tensor) -> None:
        """All-reduce."""
        dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor) -> None:
        """From rank 0."""
        dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """All ranks."""
        dist.barrier()
