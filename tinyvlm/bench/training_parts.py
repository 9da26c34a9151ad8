"""Where the time of a training step goes, and how fast the device multiplies matrices.

Each part is awaited before the next begins, so their sum is a little more than a step that runs freely.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from tinyvlm.bench.training_work import Task
from tinyvlm.train.loop import Trainer

MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}
MATRIX_S = 2.0
"""How long the matrix rate is measured, after a first product."""
STEPS = 3
"""Over which the parts are averaged."""


def matrix_rate(task: Task) -> float:
    """FLOP/s of a square product in the task's precision."""
    side = MATRIX_SIDE[task.device]
    kind = torch.bfloat16 if task.precision == "bf16" else torch.float32
    one, other = (torch.randn(side, side, device=task.device, dtype=kind) for _ in range(2))
    wait = _waiter(task.device)
    product = one @ other
    wait()
    started, number = time.perf_counter(), 0
    while time.perf_counter() - started < MATRIX_S:
        for _ in range(10 if task.device == "cuda" else 1):
            torch.mm(one, other, out=product)
        number += 10 if task.device == "cuda" else 1
        wait()
    return 2.0 * side**3 * number / (time.perf_counter() - started)


def parts_of(trainer: Trainer) -> dict[str, float]:
    """Seconds of each part of a step, mean of the last `STEPS` steps of the plan, done once more."""
    wait, spent = _waiter(trainer.device.type), _Spent()
    model, plan = trainer.model, trainer.work.plan
    watched = {"vision forward": model.vision, "connector forward": model.connector}
    watched |= {"language forward": model.language.model, "head forward": model.language.lm_head}
    handles = [hook for name, module in watched.items() for hook in spent.watch(name, module, wait)]
    model.train()
    with trainer.forward.ready():
        for step in range(max(0, plan.num_steps - STEPS), plan.num_steps):
            batches = spent.of("samples to tensors (beside the step before)", lambda step=step: trainer.batches(step))  # type: ignore[misc]
            trainer.gradients.clear()
            for batch in batches:
                loss, each = spent.of("forward", lambda batch=batch: trainer.forward.loss(batch), wait)  # type: ignore[misc]
                spent.of("backward", loss.backward, wait)
                trainer.gradients.add_loss(loss, len(each))
            spent.of("clip", lambda: trainer.gradients.normalise(trainer.config.clip), wait)
            spent.of("optimizer", trainer.optimizer.step, wait)
    for handle in handles:
        handle.remove()
    return {name: round(seconds / min(STEPS, plan.num_steps), 4) for name, seconds in spent.seconds.items()}


class _Spent:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def of(self, name: str, do: Callable[[], Any], wait: Callable[[], None] = lambda: None) -> Any:
        """Do it, and add what it took."""
        started = time.perf_counter()
        done = do()
        wait()
        self._add(name, time.perf_counter() - started)
        return done

    def watch(self, name: str, module: torch.nn.Module, wait: Callable[[], None]) -> list[Any]:
        """Add what every forward pass of a module takes."""

        def begin(*_: Any) -> None:
            wait()
            self._began[name] = time.perf_counter()

        def end(*_: Any) -> None:
            wait()
            self._add(name, time.perf_counter() - self._began[name])

        return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def _waiter(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None
