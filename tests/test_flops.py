"""The formula of a step's operations against torch's own counter, for every freeze policy."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_model import ask, picture, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from tinyvlm.chat import Message
from tinyvlm.images import normalise
from tinyvlm.train.flops import FlopCounter, peak_flops
from tinyvlm.train.freeze import FreezePolicy
from tinyvlm.train.settings import Rates


@pytest.mark.parametrize(("vision", "connector", "language"), [hot for hot in product((0, 1), repeat=3) if any(hot)])
def test_the_formula_is_what_torch_counts(tmp_path: Path, vision: int, connector: int, language: int) -> None:
    model, processor = tiny_model(tmp_path)
    model.train()
    model.set_attn_implementation("eager")  # torch does not count the operations of its fused attention on a CPU
    rates = Rates(vision=vision, connector=connector, language=language)
    FreezePolicy(model, rates, ())
    messages = [*ask(), Message("assistant", ("a red circle.",))]
    sample = processor.encode(messages, [picture(1)])
    ids = torch.from_numpy(sample.input_ids).long()[None]
    labels = ids.where(torch.from_numpy(sample.supervised)[None], -100)
    with FlopCounterMode(display=False) as counted:
        output = model(input_ids=ids, pixel_values=normalise(sample.pixels), labels=labels)
        output.loss.backward()
    counter = FlopCounter(model.config, rates, causal_share=1.0)
    told = counter.step([ids.shape[1]], 1, int(output.num_supervised))
    assert told.total == counted.get_total_flops()
    cached = FlopCounter(model.config, rates, causal_share=1.0, cached=True).step([ids.shape[1]], 1, 1)
    assert cached.vision == 0


def test_adapters_need_input_gradients_alone(tmp_path: Path) -> None:
    config, hot = tiny_model(tmp_path)[0].config, Rates(vision=0.0, connector=1e-4, language=1e-4)
    adapted = FlopCounter(config, hot, adapters=True).step([40], 1, 5)
    assert adapted == FlopCounter(config, Rates(vision=0.0, connector=1e-4)).step([40], 1, 5)


def test_packed_samples_attend_to_themselves_alone(tmp_path: Path) -> None:
    counter = FlopCounter(tiny_model(tmp_path)[0].config, Rates())
    apart = counter.step([10], 0, 1) + counter.step([30], 0, 1)
    assert counter.step([10, 30], 0, 2) == apart
    assert counter.step([40], 0, 2).language > apart.language


def test_devices_are_found_by_part_of_their_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("Some CPU") is None
