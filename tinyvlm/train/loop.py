"""The training loop: carries a plan out, step by step, on one worker or on several that do it together.

    packs of this rank ──▶ batches ──▶ summed loss, backward ──▶ gradients += …        (several batches a step)
    sum over workers ──▶ ÷ supervised tokens of the step ──▶ clip ──▶ optimizer         (once a step)

The sum and the division make the result independent of the number of workers and of how packs are put into batches,
up to rounding.  A worker that has no pack, or only text, adds zeros and hangs nobody.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tinyvlm.errors import DataError
from tinyvlm.train.adapters import add_adapters, merge_adapters
from tinyvlm.train.average import Average
from tinyvlm.train.batch import Batch, Sample, assemble, group, nothing, with_pixels
from tinyvlm.train.blocks import prepare_blocks
from tinyvlm.train.checkpoint import State
from tinyvlm.train.collective import Collective
from tinyvlm.train.features import FrozenTower
from tinyvlm.train.forward import Forward
from tinyvlm.train.freeze import FreezePolicy
from tinyvlm.train.metrics import StepRecord
from tinyvlm.train.optim import Gradients, make_optimizer, rate_factor, set_rates
from tinyvlm.train.plan import Pack, Plan
from tinyvlm.train.settings import TrainConfig
from tinyvlm.train.sharding import ShardedGradients, like, shard, shard_optimizer_state, unshard, whole_tensors


class Source(Protocol):
    """Where samples come from."""

    def load(self, pack: Pack, step: int | None) -> Sequence[Sample]:
        """The samples of a pack, for a step of the plan; None: for a held-out loss."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop tells others.  Every worker calls its own, at the same steps."""

    on_step: Callable[[StepRecord], None] = lambda record: None
    on_held_out: Callable[[int, float, float], None] = lambda step, loss, seconds: None
    """Steps done, loss, seconds that measuring took."""
    save: Callable[[int, State], None] = lambda step, state: None
    """Keep a checkpoint of `step` steps done."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done, apart from the model."""

    plan: Plan
    validation: Plan
    source: Source
    config: TrainConfig
    pad_token_id: int
    new_token_ids: Sequence[int] = ()
    hooks: Hooks = field(default_factory=Hooks)


class Trainer:
    """One worker's side of the training of one stage.

    Args:
        model: on its device already; all workers have the same weights.
    """

    def __init__(self, model: Any, work: Work, collective: Collective) -> None:
        self.model, self.work, self.config, self.collective = model, work, work.config, collective
        self.device: torch.device = next(model.parameters()).device
        has_adapters = self.config.lora.rank > 0
        if has_adapters:
            add_adapters(model.language, self.config.lora, self.config.seed)
        self.policy = FreezePolicy(model, self.config.rates, work.new_token_ids, adapters_only=has_adapters)
        is_compiled = prepare_blocks(model, self.config, self.device)
        self.is_sharded = self.config.parallel == "fsdp" and collective.world > 1
        if self.is_sharded:
            shard(model, self.policy, self.config)
        self.parameters = self.policy.parameters()
        self.gradients: Gradients | ShardedGradients = (
            ShardedGradients(model, self.parameters) if self.is_sharded else Gradients(self.parameters.values())
        )
        self.optimizer = make_optimizer(self.policy, self.config)
        remembers = self.config.rates.vision == 0 and self.config.feature_cache_mib > 0
        tower = FrozenTower(model, self.config.feature_cache_mib << 20) if remembers else None
        self.forward = Forward(model, self.config, self.device, tower, is_compiled=is_compiled)
        self.average = Average(self.parameters, self.config.ema_decay) if self.config.ema_decay else None
        self._picture_side = int(model.config.vision_config.image_size)
        self.steps_done = 0

    def run(self, state: State | None = None) -> None:
        """Carry the plan out, from its start or from a checkpoint's state.

        Raises:
            DataError: the loss is not a finite number, with the step and its samples.
            CheckpointError: frozen weights have changed.
        """
        if state is not None:
            self.restore(state)
        self.model.train()
        with self.forward.ready():
            self._carry_out()

    def _carry_out(self) -> None:
        every_save, every_eval = self.config.checkpoint_every_steps, self.config.eval_every_steps
        for batches, waited in self._stream(self.work.plan, self.steps_done):
            self._step(batches, waited)
            is_last = self.steps_done == self.work.plan.num_steps
            if every_save and self.steps_done % every_save == 0 and not is_last:
                self.work.hooks.save(self.steps_done, self.state())
            if is_last or (every_eval and self.steps_done % every_eval == 0):
                self._held_out()

    def finish(self) -> dict[str, str]:
        """Behind the last step: a whole model with learned rows in their places; hashes of the frozen modules.

        Raises:
            CheckpointError: frozen weights have changed.
        """
        if self.average is not None:
            self.average.keep()
        if self.is_sharded:
            unshard(self.model)
        frozen = self.policy.finish()
        if self.config.lora.rank:
            merge_adapters(self.model.language)
        return frozen

    def state(self) -> State:
        """What a checkpoint holds."""
        on_gpu = self.device.type == "cuda"
        random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if on_gpu else []}
        state = {
            "steps_done": self.steps_done,
            "plan": self.work.plan.fingerprint,
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "random": random,
            "average": self.average.values if self.average is not None else {},
        }
        return whole_tensors(state) if self.is_sharded else state

    def restore(self, state: State) -> None:
        """Go back to a checkpoint's state."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(like(parameter, state["weights"][name]))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.is_sharded:
            shard_optimizer_state(self.optimizer)
        if self.average is not None:
            self.average.restore(state["average"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        self.steps_done = int(state["steps_done"])

    def held_out_loss(self) -> float:
        """Mean loss over the supervised tokens of the validation plan, over all workers; nan without any."""
        totals = torch.zeros(2, dtype=torch.float64)
        was_training = self.model.training
        self.model.eval()
        averaged = nullcontext() if self.average is None else self.average.in_place()
        with torch.no_grad(), self.forward.ready(), averaged:
            for batches, _ in self._stream(self.work.validation, 0):
                for batch in batches:
                    loss, supervised = self.forward.loss(batch)
                    totals += torch.tensor([float(loss), float(supervised)], dtype=torch.float64)
        self.model.train(was_training)
        totals = totals.to(self.device)
        self.collective.sum(totals)
        return float(totals[0] / totals[1]) if totals[1] else math.nan

    def _step(self, batches: Sequence[Batch], waited: float) -> None:
        step, started = self.steps_done, time.perf_counter()
        self.gradients.clear()
        for number, batch in enumerate(batches, start=1):
            self.gradients.before_backward(is_last=number == len(batches))
            loss, supervised = self.forward.loss(batch)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            self.gradients.add_loss(loss, supervised)
        self.gradients.reduce(self.collective)
        mean_loss, norm = self.gradients.normalise(self.config.clip)
        loss_value, norm_value = torch.stack([mean_loss, norm]).tolist()
        self._check_finite(step, loss_value, norm_value)
        set_rates(self.optimizer, rate_factor(self.config, step, self.work.plan.num_steps))
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        self.steps_done = step + 1
        seconds = waited + time.perf_counter() - started
        self.work.hooks.on_step(self._record(step, loss_value, norm_value, seconds, waited))

    def _stream(self, plan: Plan, first_step: int) -> Iterator[tuple[list[Batch], float]]:
        """This worker's batches of each step, made while the step before is at work, and seconds waited for them."""
        with ThreadPoolExecutor(1, thread_name_prefix="samples") as pool:
            coming = deque([pool.submit(self._batches, plan, first_step)] if first_step < plan.num_steps else [])
            for step in range(first_step, plan.num_steps):
                started = time.perf_counter()
                batches = coming.popleft().result()
                waited = time.perf_counter() - started
                if step + 1 < plan.num_steps:
                    coming.append(pool.submit(self._batches, plan, step + 1))
                yield batches, waited

    def batches(self, step: int) -> list[Batch]:
        """This worker's batches of a step of the plan."""
        return self._batches(self.work.plan, step)

    def _batches(self, plan: Plan, step: int) -> list[Batch]:
        """This worker's share of a step, as tensors."""
        packs = [pack for pack in plan.packs(step, self.collective.rank, self.collective.world) if pack]
        groups = group(packs, self.config.packs_per_batch, self.config.tokens_per_batch)
        at = step if plan is self.work.plan else None
        loaded = ([self.work.source.load(pack, at) for pack in one] for one in groups)
        made = [assemble(one, self.work.pad_token_id) for one in loaded]
        if self.is_sharded:
            made += [nothing(self.work.pad_token_id)] * (self._most_batches(plan, step) - len(made))
            made = [with_pixels(batch, self._picture_side) for batch in made]
        return [batch.pin() for batch in made] if self.device.type == "cuda" else made

    def _most_batches(self, plan: Plan, step: int) -> int:
        """Batches of the worker that has most in a step."""
        world, most = self.collective.world, (self.config.packs_per_batch, self.config.tokens_per_batch)
        shares = ([pack for pack in plan.packs(step, rank, world) if pack] for rank in range(world))
        return max(len(group(share, *most)) for share in shares)

    def _held_out(self) -> None:
        started = time.perf_counter()
        loss = self.held_out_loss()
        if not math.isnan(loss):
            self.work.hooks.on_held_out(self.steps_done, loss, time.perf_counter() - started)

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        keys = list(_keys(self.work.plan.packs(step)))
        raise DataError(
            f"Step {step + 1} has a loss of {loss} and a gradient norm of {norm}; nothing after the last checkpoint "
            f"was kept. Lower the learning rates, or look at its {len(keys)} conversations (keys {keys[:8]}, …)."
        )

    def _record(self, step: int, loss: float, norm: float, seconds: float, waited: float) -> StepRecord:
        items = [item for pack in self.work.plan.packs(step) for item in pack]
        factor = rate_factor(self.config, step, self.work.plan.num_steps)
        return StepRecord(
            step=step + 1,
            loss=loss,
            gradient_norm=norm,
            rates={group.module: group.rate * factor for group in self.policy.groups},
            samples=len(items),
            tokens=sum(item.tokens for item in items),
            supervised=sum(item.supervised for item in items),
            pictures=sum(item.pictures for item in items),
            seconds=seconds,
            data_wait_s=waited,
        )


def _keys(packs: Sequence[Pack]) -> Iterator[int]:
    return (item.key for pack in packs for item in pack)
