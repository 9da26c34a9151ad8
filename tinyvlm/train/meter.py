"""What one worker's device can do, holds and uses: the denominator of MFU, memory, energy.

name ──PEAK_BF16_TFLOPS──▶ rate; of a device that is not in the table, a matrix product is timed, once a process
NVML (nvidia-ml-py, where it is installed) ──▶ joules since the meter was made
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from tinyvlm.train.features import FrozenTower
from tinyvlm.train.flops import FlopCounter, peak_flops
from tinyvlm.train.plan import Item

CUDA_SIDE, CPU_SIDE = 8192, 1024
"""Side of the square matrices that are multiplied to measure a device's rate: bf16 on CUDA, fp32 on a CPU."""
REPEATS = 8


@dataclass(frozen=True)
class Rate:
    """A device and how fast it multiplies matrices."""

    device: str
    flops: float
    """Operations a second."""
    source: str
    """"data sheet, bf16", or what was measured."""


def device_rate(device: torch.device) -> Rate:
    """The rate of this process's device, with the threads that it has now."""
    return _rate(device, torch.get_num_threads())


@functools.cache
def _rate(device: torch.device, num_threads: int) -> Rate:
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else _cpu_name(num_threads)
    known = peak_flops(name) if on_cuda else None
    if known is not None:
        return Rate(name, known, "data sheet, bf16")
    side, dtype = (CUDA_SIDE, torch.bfloat16) if on_cuda else (CPU_SIDE, torch.float32)
    measured = matrix_rate(device, side, dtype)
    return Rate(name, measured, f"measured, {side}³ {'bf16' if on_cuda else 'fp32'}")


def matrix_rate(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """Operations a second of the best of a few products of two square matrices."""
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(1 + REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * side**3 / min(seconds[1:])


def _cpu_name(num_threads: int) -> str:
    threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
    return f"{platform.machine()} CPU, {threads}"


class Meter:
    """What each step needed and held on this worker.

    Args:
        counter: of the model's operations.
        peak: operations a second of all workers' devices together; 0 where nobody measured.
        tower: what remembers features, if anything does.
    """

    def __init__(self, device: torch.device, counter: FlopCounter, peak: float, tower: FrozenTower | None) -> None:
        self._device, self._counter, self._peak, self._tower = device, counter, peak, tower
        self._process = psutil.Process()
        self._energy = Energy(device)
        self._asked = self._encoded = 0

    def start(self) -> None:
        """A step begins."""
        if self._tower is not None:
            self._asked, self._encoded = self._tower.num_asked, self._tower.num_encoded

    def step(self, items: Sequence[Item], seconds: float) -> dict[str, Any]:
        """Fields of a `StepRecord`; `items` are those of the whole step, over all workers."""
        on_cuda = self._device.type == "cuda"
        pictures, supervised = (sum(getattr(item, name) for item in items) for name in ("pictures", "supervised"))
        needed = self._counter.step((item.tokens for item in items), pictures, supervised)
        flops = dict(zip(("vision", "connector", "language", "head"), needed.parts, strict=True))
        flops["vision"] *= self._encoded_share()
        return {
            "flops": flops,
            "mfu": sum(flops.values()) / seconds / self._peak if self._peak and seconds else None,
            "memory_bytes": self._process.memory_info().rss,
            "device_bytes": torch.cuda.max_memory_allocated(self._device) if on_cuda else 0,
            "joules": self._energy.since_last(),
        }

    def _encoded_share(self) -> float:
        """Of this worker's pictures in the step, those that the tower really saw; the others' share is taken alike."""
        asked = self._tower.num_asked - self._asked if self._tower else 0
        return (self._tower.num_encoded - self._encoded) / asked if self._tower and asked else 1.0


class Energy:
    """Joules that this worker's GPU has used, as NVML counts them."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        self._nvml: Any = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            identity = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity.removeprefix('GPU-')}")
            self._nvml, self._last = pynvml, pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except Exception:  # NVML raises kinds of its own, and old or shared cards do not count: then nothing is told
            self._handle = None

    def since_last(self) -> float | None:
        """Since this was asked last, or since the beginning; None where nothing is counted."""
        if self._handle is None:
            return None
        try:
            now = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)  # millijoules
        except Exception:  # a card that fell off the bus is somebody else's news
            self._handle = None
            return None
        used, self._last = (now - self._last) / 1000.0, now
        return float(used)
