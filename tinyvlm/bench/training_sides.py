"""One side of `tinyvlm bench train`, in a process of its own.

    ours       train/loop.py: packs, one row a batch, only supervised tokens meet the vocabulary
    padded     transformers' Trainer as people write it: the longest of a batch decides its width, an attention mask,
               all logits, and the loss that transformers gives a causal language model
    grouped    the same with train_sampling_strategy="group_by_length", which Trainer offers against padding

All start from the same weights and see the same samples in the same steps (grouped: in steps of its own).  Batches of
padded samples have `batch` of them, accumulated to a step.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from tinyvlm.bench.training_parts import matrix_rate, parts_of
from tinyvlm.bench.training_work import PAD, MadeUpSource, Task, build_model, make_plan, model_config, steps_of, task_of
from tinyvlm.images import normalise
from tinyvlm.model.modeling import TinyVLMForConditionalGeneration
from tinyvlm.train.batch import IGNORED
from tinyvlm.train.collective import Alone, Collective
from tinyvlm.train.flops import FlopCounter, peak_flops
from tinyvlm.train.host import prepare_host
from tinyvlm.train.loop import Hooks, Trainer, Work
from tinyvlm.train.metrics import StepRecord
from tinyvlm.train.plan import Item, Plan

Outcome = tuple[list[float], list[float], dict[str, float] | None]
"""Losses of the steps, their seconds, and those of the parts of one."""


class Padded(TinyVLMForConditionalGeneration):
    """The model with the loss that transformers' own models have."""

    def forward(self, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        """All logits, in float32, shifted against the labels."""
        output = super().forward(**kwargs, use_cache=False)
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            output.loss = ForCausalLMLoss(
                output.logits, labels, vocabulary, num_items_in_batch=num_items_in_batch, ignore_index=IGNORED
            )
        return output


class _Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """The steps' samples, one after another."""

    def __init__(self, items: Sequence[Item], source: MadeUpSource) -> None:
        self._items, self._source = items, source
        self.lengths = [item.tokens for item in items]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: int) -> dict[str, Any]:
        (sample,) = self._source.load([self._items[place]], None)
        labels = np.where(sample.supervised, sample.input_ids, IGNORED)
        return {
            "input_ids": torch.from_numpy(sample.input_ids).long(),
            "labels": torch.from_numpy(labels).long(),
            "pixels": torch.from_numpy(sample.pixels),
            "features": sample.features,
        }


def _pad(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """What people write as a collator."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([one["input_ids"] for one in samples], batch_first=True, padding_value=PAD)
    labels = pad([one["labels"] for one in samples], batch_first=True, padding_value=IGNORED)
    mask = pad([torch.ones_like(one["input_ids"]) for one in samples], batch_first=True)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if samples[0]["features"] is not None:
        batch["image_features"] = torch.from_numpy(np.concatenate([one["features"] for one in samples]))
    elif sum(len(one["pixels"]) for one in samples):
        batch["pixel_values"] = normalise(torch.cat([one["pixels"] for one in samples]))
    return batch


def _freeze(model: Any, task: Task) -> None:
    for name in ("vision", "connector", "language"):
        getattr(model, name).requires_grad_(getattr(task.rates, name) > 0)


def padded(task: Task) -> Outcome:
    """Through transformers' Trainer."""
    import transformers

    model = build_model(task.size, Padded)
    _freeze(model, task)
    source = MadeUpSource(model.config, is_cached=task.is_cached)
    items = [item for step in steps_of(make_plan(task)) for item in step]
    clock = _Clock(task.device)

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.end()

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if task.side == "grouped":
                return super()._get_train_sampler(train_dataset)
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=task.batch,
            gradient_accumulation_steps=task.samples // task.batch,
            max_steps=task.steps,
            learning_rate=task.rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=task.precision == "bf16",
            use_cpu=task.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            train_sampling_strategy="group_by_length" if task.side == "grouped" else "random",
            dataloader_num_workers=0 if task.device == "cpu" else 4,
        )
        data = _Samples(items, source)
        trainer = InOrder(model, arguments, train_dataset=data, data_collator=_pad, callbacks=[Watch()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, clock.seconds, None


def ours(task: Task) -> Outcome:
    """Through the loop."""
    parts: dict[str, float] = {}
    records = loop_of(task, Alone(), lambda trainer: parts.update(parts_of(trainer) if task.with_parts else {}))
    return [record.loss for record in records], [record.seconds for record in records], parts or None


def loop_of(
    task: Task, collective: Collective, then: Callable[[Trainer], None] = lambda trainer: None
) -> list[StepRecord]:
    """Carry the task out as one worker; `then` is given the trainer when it is done."""
    model, plan = build_model(task.size), make_plan(task)
    records: list[StepRecord] = []
    work = Work(
        plan=plan,
        validation=Plan(plan.items[:0], np.zeros(1, np.int64), plan.shape, [], []),
        source=MadeUpSource(model.config, is_cached=task.is_cached),
        config=task.config,
        pad_token_id=PAD,
        hooks=Hooks(on_step=records.append),
    )
    trainer = Trainer(model.to(task.device), work, collective)
    trainer.run()
    then(trainer)
    return records


class _Clock:
    """Seconds from step to step, waiting for data included: each step ends where the device is done."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self._device, self._last = device, 0.0

    def begin(self) -> None:
        self._last = self._last or time.perf_counter()

    def end(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def measure(task: Task) -> dict[str, Any]:
    """The numbers of one side."""
    if task.device == "cpu":
        prepare_host(task.threads) if task.side == "ours" else torch.set_num_threads(task.threads)
    if task.side == "matrix":
        return {"side": task.side, "tflops": matrix_rate(task) / 1e12, "device": _device(task)}
    losses, seconds, parts = (ours if task.side == "ours" else padded)(task)
    plan = make_plan(task)
    counted = list(steps_of(plan))[task.warm_up :]
    spent = sum(seconds[task.warm_up :])
    items = [item for step in counted for item in step]
    counter = FlopCounter(model_config(task.size), task.rates, cached=task.is_cached)
    flops = counter.step(
        [item.tokens for item in items], sum(item.pictures for item in items), sum(item.supervised for item in items)
    )
    on_gpu = task.device == "cuda"
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    return {
        "side": task.side,
        "samples_per_s": len(items) / spent,
        "tokens_per_s": sum(item.tokens for item in items) / spent,
        "supervised_per_s": sum(item.supervised for item in items) / spent,
        "seconds_per_step": spent / len(counted),
        "tflops": flops.total / spent / 1e12,
        "mfu": flops.total / spent / peak if peak else None,
        "gflop_per_sample": {
            name: round(part / len(items) / 1e9, 3)
            for name, part in zip(("vision", "connector", "language", "head"), flops.parts, strict=True)
        },
        "peak_gib": _peak_bytes(on_gpu) / 2**30,
        "parts": parts,
        "losses": losses,
    }


def _device(task: Task) -> str:
    return torch.cuda.get_device_name() if task.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _peak_bytes(on_gpu: bool) -> int:
    """Of the device, or of the whole process on a CPU."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(task_of(sys.argv[1]))))
