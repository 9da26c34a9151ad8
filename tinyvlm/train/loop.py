"""The training loop: carries a plan out, step by step, on one worker or on several that do it together.

    packs of this rank ──▶ batches ──▶ summed loss, backward ──▶ gradients += …        (several batches a step)
    sum over workers ──▶ ÷ supervised tokens of the step ──▶ clip ──▶ optimizer         (once a step)

The sum and the division make the result independent of the number of workers and of how packs are put into batches,
up to rounding.  A worker that has no pack, or only text, adds zeros and hangs nobody.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from tinyvlm.errors import DataError, Interrupted
from tinyvlm.train.adapters import add_adapters, merge_adapters
from tinyvlm.train.average import Average
from tinyvlm.train.bad_steps import BadStep
from tinyvlm.train.batch import Batch, Sample, assemble, group, nothing, with_pixels
from tinyvlm.train.blocks import prepare_blocks
from tinyvlm.train.checkpoint import State
from tinyvlm.train.collective import Collective
from tinyvlm.train.features import FrozenTower
from tinyvlm.train.flops import FlopCounter
from tinyvlm.train.forward import Forward
from tinyvlm.train.freeze import FreezePolicy
from tinyvlm.train.kinds import Kinds, LossSums, Tally
from tinyvlm.train.meter import Meter
from tinyvlm.train.metrics import StepRecord
from tinyvlm.train.optim import Gradients, make_optimizer, rate_factor, set_rates
from tinyvlm.train.plan import Pack, Plan
from tinyvlm.train.seeds import seed_step
from tinyvlm.train.settings import TrainConfig
from tinyvlm.train.sharding import ShardedGradients, like, shard, shard_optimizer_state, unshard, whole_tensors

MAX_SKIPPED_IN_A_ROW = 10
"""So many bad steps one after another mean that it is the weights."""

log = logging.getLogger(__name__)


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
    on_sources: Callable[[int, str, LossSums], None] = lambda step, split, sums: None
    """Steps done, "train" or "held_out", the loss of each kind."""
    save: Callable[[int, State], None] = lambda step, state: None
    """Keep a checkpoint of `step` steps done; the state's tensors change as soon as this returns."""
    settle: Callable[[], bool] = lambda: True
    """Wait until what was to be kept is kept, and say whether it is; called before the run ends."""
    on_start: Callable[[int, int, int], None] = lambda first_step, updates, skipped: None
    """First step (from 0), updates as the optimizer has counted them, and steps that were skipped."""
    entering: Callable[[int, Sequence[Batch]], None] = lambda step, batches: None
    """What is about to enter the model in a step (from 0)."""
    on_bad_step: Callable[[BadStep], None] = lambda bad: None
    wants_to_stop: Callable[[], bool] = lambda: False
    """Asked in each step; a yes of one worker stops all of them after it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done, apart from the model."""

    plan: Plan
    validation: Plan
    source: Source
    config: TrainConfig
    pad_token_id: int
    new_token_ids: Sequence[int] = ()
    kinds: Kinds | None = None
    """Tells samples of the plans apart, for the loss of each source; None tells none apart."""
    peak_flops: float = 0.0
    """Matrix rate of all workers' devices, operations a second, for MFU; 0 where nobody measured."""
    has_features: bool = False
    """Samples bring what the tower made of their pictures."""
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
        names = work.kinds.names if work.kinds else []
        self.tally, self.held_out_tally = Tally(names, self.device), Tally(names, self.device)
        counter = FlopCounter(model.config, self.config.rates, cached=work.has_features, adapters=has_adapters)
        self.meter = Meter(self.device, counter, work.peak_flops, tower)
        self._picture_side = int(model.config.vision_config.image_size)
        self.steps_done = self.skipped = self._skipped_in_a_row = 0

    def run(self, state: State | None = None) -> None:
        """Carry the plan out, from its start or from a checkpoint's state.

        Raises:
            DataError: the loss is not a finite number, with the step and its samples.
            Interrupted: one of the workers wanted to stop, and a checkpoint was kept.
        """
        if state is not None:
            self.restore(state)
        self.model.train()
        with self.forward.ready():
            self._carry_out()

    def _carry_out(self) -> None:
        hooks, num_steps = self.work.hooks, self.work.plan.num_steps
        every_save, every_eval = self.config.checkpoint_every_steps, self.config.eval_every_steps
        every_sources = self.config.show.sources_every_steps
        hooks.on_start(self.steps_done, self._updates(), self.skipped)
        for batches, waited in self._stream(self.work.plan, self.steps_done):
            shall_stop = self._step(batches, waited)
            is_last = self.steps_done == num_steps
            if every_sources and (is_last or self.steps_done % every_sources == 0):
                self._tell_sources("train", self.tally)
            is_measured = is_last or (every_eval and self.steps_done % every_eval == 0)
            loss = self._held_out() if is_measured else None  # before saving, so that no resume leaves it out
            if not is_last and (shall_stop or (every_save and self.steps_done % every_save == 0)):
                hooks.save(self.steps_done, {**self.state(), "held_out_loss": loss})
            if shall_stop and not is_last:
                done = f"Asked to stop: {self.steps_done} of {num_steps} steps are done"
                kept = "and kept" if self._settle() else "but the last of them could not be kept"
                raise Interrupted(f"{done} {kept}; the same command continues.")

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
        """What a checkpoint holds; its tensors are the live ones.  Workers that share weights ask together."""
        state = {
            "steps_done": self.steps_done,
            "skipped": self.skipped,
            "plan": self.work.plan.fingerprint,
            "world": self.collective.world,
            "seed": self.config.seed,
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
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
        self.steps_done, self.skipped = int(state["steps_done"]), int(state["skipped"])

    def held_out_loss(self) -> float:
        """Mean loss over the supervised tokens of the validation plan, over all workers; nan without any."""
        totals = torch.zeros(2, dtype=torch.float64)
        was_training = self.model.training
        self.model.eval()
        averaged = nullcontext() if self.average is None else self.average.in_place()
        with torch.no_grad(), self.forward.ready(), averaged:
            for batches, _ in self._stream(self.work.validation, 0):
                for batch in batches:
                    loss, supervised = self._loss(batch, self.held_out_tally)
                    totals += torch.tensor([float(loss), float(supervised)], dtype=torch.float64)
        self.model.train(was_training)
        totals = totals.to(self.device)
        self.collective.sum(totals)
        return float(totals[0] / totals[1]) if totals[1] else math.nan

    def _step(self, batches: Sequence[Batch], waited: float) -> bool:
        """Do one step; whether a worker wants to stop after it."""
        step, started = self.steps_done, time.perf_counter()
        self.work.hooks.entering(step, batches)
        seed_step(self.config.seed, step, self.collective.rank)
        self.meter.start()
        self.tally.begin()
        self.gradients.clear()
        losses = []
        for number, batch in enumerate(batches, start=1):
            self.gradients.before_backward(is_last=number == len(batches))
            loss, supervised = self._loss(batch, self.tally)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            self.gradients.add_loss(loss, supervised)
            losses.append(loss.detach())
        if self.work.hooks.wants_to_stop():
            self.gradients.add_wish_to_stop()
        self.gradients.reduce(self.collective)
        mean_loss, norm = self.gradients.normalise(self.config.clip)
        loss_value, norm_value, wishes = torch.stack([mean_loss, norm, self.gradients.totals[2]]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._bad_step(BadStep(step, loss_value, norm_value, batches, [float(loss) for loss in losses]))
            return bool(wishes)
        self._skipped_in_a_row = 0
        set_rates(self.optimizer, rate_factor(self.config, step, self.work.plan.num_steps))
        self.optimizer.step()
        self.tally.keep()
        if self.average is not None:
            self.average.update()
        self.steps_done = step + 1
        seconds = waited + time.perf_counter() - started
        self.work.hooks.on_step(self._record(step, loss_value, norm_value, seconds, waited))
        return bool(wishes)

    def _loss(self, batch: Batch, tally: Tally) -> tuple[torch.Tensor, int]:
        """Summed loss and the number of tokens that it covers; each token's loss goes to its kind."""
        loss, each = self.forward.loss(batch)
        if batch.kinds is not None:
            tally.add(each, batch.kinds.to(self.device, non_blocking=True))
        return loss, len(each)

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
        made = []
        for one in groups:
            loaded = [(pack, samples) for pack in one if (samples := self.work.source.load(pack, at))]
            if loaded:
                made.append(self._batch(*zip(*loaded, strict=True)))
        if self.is_sharded:
            made += [nothing(self.work.pad_token_id)] * (self._most_batches(plan, step) - len(made))
            made = [with_pixels(batch, self._picture_side) for batch in made]
        if self.config.ledger and at is not None:
            for batch in made:
                batch.digests  # noqa: B018 (made here, in the thread that has time)
        return [batch.pin() for batch in made] if self.device.type == "cuda" else made

    def _most_batches(self, plan: Plan, step: int) -> int:
        """Batches of the worker that has most in a step."""
        world, most = self.collective.world, (self.config.packs_per_batch, self.config.tokens_per_batch)
        shares = ([pack for pack in plan.packs(step, rank, world) if pack] for rank in range(world))
        return max(len(group(share, *most)) for share in shares)

    def _batch(self, packs: Sequence[Pack], samples: Sequence[Sequence[Sample]]) -> Batch:
        batch, kinds = assemble(samples, self.work.pad_token_id, packs), self.work.kinds
        return batch if kinds is None else replace(batch, kinds=kinds.of_tokens(packs, samples))

    def _held_out(self) -> float | None:
        started = time.perf_counter()
        self.held_out_tally.begin()
        loss = self.held_out_loss()
        if not math.isnan(loss):
            self.work.hooks.on_held_out(self.steps_done, loss, time.perf_counter() - started)
        self.held_out_tally.keep()
        self._tell_sources("held_out", self.held_out_tally)
        return None if math.isnan(loss) else loss

    def _tell_sources(self, split: str, tally: Tally) -> None:
        """A meeting of all workers, each of which calls its hook."""
        if self.work.kinds is not None and (sums := tally.take(self.collective)).any:
            self.work.hooks.on_sources(self.steps_done, split, sums)

    def _bad_step(self, bad: BadStep) -> None:
        """Keep it for replay, then skip it or raise; all workers do the same, for loss and norm are the same for all.

        The optimizer has not seen it, so the weights are those before the step.
        """
        self.work.hooks.on_bad_step(bad)
        self._skipped_in_a_row += 1
        keys = self._suspects(bad)
        shown = f"keys {', '.join(map(str, keys[:8]))}{', …' if len(keys) > 8 else ''}"
        what = (
            f"Step {bad.step + 1} has a loss of {bad.loss} and a gradient norm of {bad.norm} "
            f"({len(keys)} conversations, {shown})"
        )
        if self.config.on_bad_loss == "skip" and self._skipped_in_a_row <= MAX_SKIPPED_IN_A_ROW:
            log.warning("%s; skipped", what)
            self.steps_done, self.skipped = bad.step + 1, self.skipped + 1
            return
        is_sound = all(bool(torch.isfinite(weights).all()) for weights in self.parameters.values())
        if bad.step and is_sound:
            self.work.hooks.save(self.steps_done, self.state())
        is_kept = self._settle() and is_sound
        kept = "the steps before it are kept" if is_kept else "the same command begins with the last checkpoint"
        raise DataError(
            f"{what}; its batches are in bad-steps/{bad.name}, and {kept}. Lower the learning rates, look at these "
            "conversations, or set on_bad_loss=skip."
        )

    def _suspects(self, bad: BadStep) -> list[int]:
        """Keys of the conversations that may be to blame, on any worker; of the whole step if no batch is alone."""
        packs, mine = self.work.plan.packs(bad.step), bad.suspects
        flags = torch.tensor([float(pack in mine) for pack in packs], device=self.device)
        self.collective.sum(flags)
        found = [pack for pack, flag in zip(packs, flags.tolist(), strict=True) if flag]
        return [item.key for pack in found or packs for item in pack]

    def _settle(self) -> bool:
        """Whether everything is kept; no worker ends before: whoever watches them might end worker 0 too."""
        unkept = torch.tensor([0.0 if self.work.hooks.settle() else 1.0], device=self.device)
        self.collective.sum(unkept)
        return not float(unkept)

    def _updates(self) -> int:
        """How often the optimizer has changed the weights, by its own count."""
        return max((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), default=0)

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
            **self.meter.step(items, seconds),
        )
