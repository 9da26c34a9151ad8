"""Attention of packed samples without a mask: all samples of a batch in one row, each attending to itself alone.

    one row:   [sample a .....][sample b ..][sample c ........]      no padding, whatever the lengths
    CPU:       a causal kernel call for each sample                  work ~ sum of squares, not the square of the sum
    CUDA:      one call of flash attention's varlen kernel (torch.nn.attention.varlen), told where samples begin

A masked kernel computes the whole square of the row and throws most of it away.

Shapes: H query heads, G key heads, T tokens of the row, S samples, W width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "tinyvlm_packed"
"""Under which transformers knows this attention; a name without a mask of its own, so none is made."""


@dataclass(frozen=True)
class Row:
    """Where the samples of a row lie."""

    lengths: tuple[int, ...]
    """Of each of S samples, padding at the end of the row as one sample more."""
    starts: Tensor
    """(S + 1,) int32: cumulative lengths; entries may repeat at the end."""
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], *, longest: int = 0, num_starts: int = 0) -> Row:
        """Args:
        longest: at least so many tokens; a constant keeps compiled kernels from being compiled again.
        num_starts: at least so many entries in `starts`, for the same reason.
        """
        starts = torch.zeros(max(len(lengths) + 1, num_starts), dtype=torch.int32)
        starts[1 : len(lengths) + 1] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        starts[len(lengths) + 1 :] = starts[len(lengths)].clone()
        return cls(tuple(lengths), starts, max(longest, *lengths))

    def to(self, device: torch.device) -> Row:
        """The same on a device."""
        return Row(self.lengths, self.starts.to(device, non_blocking=True), self.longest)


@contextmanager
def packed_attention(language: Any) -> Iterator[None]:
    """A language model that reads rows: within, `forward` must be given `packed_row`."""
    AttentionInterface.register(NAME, attend)
    before = language.config._attn_implementation
    language.set_attn_implementation(NAME)
    try:
        yield
    finally:
        language.set_attn_implementation(before)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_row: Row,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1,H,T,W), (1,G,T,W), (1,G,T,W) → (1,T,H,W), as transformers calls it."""
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, packed_row, scaling), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (side.repeat_interleave(repeats, dim=1) for side in (key, value))
    lengths = list(packed_row.lengths)
    each = zip(*(torch.split(side, lengths, dim=2) for side in (query, key, value)), strict=True)
    attended = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in each]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, row: Row, scaling: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (side[0].transpose(0, 1).contiguous() for side in (query, key, value))
    attended: Any = varlen_attn(
        *(q, k, v, row.starts, row.starts, row.longest, row.longest),
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return attended.unsqueeze(0)  # type: ignore[no-any-return]
