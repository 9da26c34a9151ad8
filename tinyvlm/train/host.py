"""What a process does once before it trains on a CPU."""

from __future__ import annotations

import contextlib
import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
LARGEST_KEPT_BYTES = 32 << 20
"""The most that glibc lets `M_MMAP_THRESHOLD` be."""


def prepare_host(num_threads: int) -> None:
    """Set the number of threads, and keep freed memory and denormal numbers from costing time.

    A step frees and asks for the same tensors again and again.  By default glibc hands large ones back to the kernel
    each time, which then has to fill new pages with zeros.
    """
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
