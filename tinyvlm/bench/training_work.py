"""What the benches of training work on: models of random weights, and made-up samples of given lengths.

    lengths of the published mix (bench/plan.py) ──draw──▶ steps of equally many samples ──pack──▶ a plan
    key of a sample ──random numbers──▶ tokens, flags, pixels: the same wherever and whenever it is made

Every step has the same number of samples, so that a loop that packs and one that pads do the same steps.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinyvlm.bench import plan as made_up
from tinyvlm.data.packing import Limits, Packer
from tinyvlm.model.configuration import TinyVLMConfig
from tinyvlm.model.modeling import TinyVLMForConditionalGeneration
from tinyvlm.train.order import Shape
from tinyvlm.train.plan import Item, Pack, Plan
from tinyvlm.train.settings import Rates, TrainConfig

PAD, IMAGE, FIRST_WORD = 0, 1, 2
"""Token ids of the made-up vocabulary."""

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "vision": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 224},
        "language": {"hidden_size": 320, "num_hidden_layers": 6, "num_attention_heads": 10, "vocab_size": 8_192},
        "connector_width": 1_280,
    },
    "bench": {
        "vision": {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "image_size": 224},
        "language": {"hidden_size": 512, "num_hidden_layers": 7, "num_attention_heads": 16, "vocab_size": 16_384},
        "connector_width": 2_048,
    },
    "base": {
        "vision": {"hidden_size": 1_024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448},
        "language": {"hidden_size": 2_048, "num_hidden_layers": 16, "num_attention_heads": 32, "vocab_size": 128_259},
        "connector_width": 8_192,
    },
}
"""`base` is CLIP ViT-L/14 at the stored pictures' 448 pixels with Llama-3.2-1B; the others keep its proportions (inner
widths four times the width, a quarter as many keys as queries, a vocabulary of about a quarter of the layers' weights),
with about 15 and 45 million weights."""

HOT: dict[str, tuple[int, int, int]] = {
    "all": (1, 1, 1),
    "no-tower": (0, 1, 1),
    "all-but-language": (1, 1, 0),
    "no-language": (0, 1, 0),
}
"""Which of tower, connector and language model learn."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One measurement, as JSON types."""

    side: str
    """ours, padded, grouped, or matrix: see `bench/training_sides.py`."""
    size: str = "small"
    hot: str = "no-tower"
    lengths: str = "mixed"
    """"mixed", or the number of tokens that every sample has."""
    samples: int = 32
    """In one step."""
    steps: int = 16
    warm_up: int = 2
    """Steps before the clock starts; their losses count."""
    pack_length: int = 512
    batch: int = 8
    """Padded samples, or as many tokens' worth of packs, in one forward pass."""
    rate: float = 1e-3
    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 1
    is_cached: bool = False
    """The tower's features are given."""
    with_parts: bool = False
    """Also find out which part of a step takes how long; for our side."""
    settings: dict[str, Any] = field(default_factory=dict)
    """More of `TrainConfig`, for our side."""

    @property
    def rates(self) -> Rates:
        """As the loop wants them."""
        vision, connector, language = (self.rate * hot for hot in HOT[self.hot])
        return Rates(vision=vision, connector=connector, language=language)

    @property
    def config(self) -> TrainConfig:
        """Of the loop."""
        given = {
            "rates": self.rates,
            "schedule": "constant",
            "warmup_steps": 0,
            "precision": self.precision,
            "pack_length": self.pack_length,
            "samples_per_pack": 0,
            "packs_per_batch": max(1, self.batch * self.mean_tokens // self.pack_length),
            "checkpoint_every_steps": 0,
            "eval_every_steps": 0,
            "cache_mib": 0,
        }
        return TrainConfig(**{**given, **self.settings})

    @functools.cached_property
    def mean_tokens(self) -> int:
        """Of a sample, about."""
        return 256 if self.lengths == "mixed" else int(self.lengths)


def model_config(size: str) -> TinyVLMConfig:
    """The shape of a model of `SIZES`."""
    shape = SIZES[size]
    vision, language = dict(shape["vision"]), dict(shape["language"])
    vision |= {"intermediate_size": 4 * vision["hidden_size"], "patch_size": 14, "projection_dim": 64}
    language |= {
        "intermediate_size": 4 * language["hidden_size"],
        "num_key_value_heads": -(-language["num_attention_heads"] // 4),
        "max_position_embeddings": 8_192,
        "tie_word_embeddings": True,
        "rope_theta": 500_000.0,
    }
    if language["num_attention_heads"] % language["num_key_value_heads"]:
        language["num_key_value_heads"] = language["num_attention_heads"] // 5
    return TinyVLMConfig(
        vision_config=vision,
        text_config=language,
        num_image_tokens=64,
        connector="swiglu",
        connector_width=shape["connector_width"],
        image_token_id=IMAGE,
    )


def build_model(size: str, kind: Any = TinyVLMForConditionalGeneration) -> Any:
    """A model of random weights, in float32, the same every time."""
    torch.manual_seed(0)
    config = model_config(size)
    config.dtype = torch.float32
    return kind(config)


@dataclass(frozen=True)
class MadeUp:
    """A sample; see `tinyvlm.train.batch.Sample`."""

    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    pixels: npt.NDArray[np.uint8]
    features: npt.NDArray[np.float16] | None = None


class MadeUpSource:
    """Samples by their key.  Words follow each other with some regularity, so that there is something to learn."""

    def __init__(self, config: TinyVLMConfig, *, is_cached: bool = False) -> None:
        self._vocabulary = int(config.text_config.vocab_size)
        self._image_tokens, self._side = config.num_image_tokens, config.vision_config.image_size
        self._width, self._is_cached = config.vision_config.hidden_size, is_cached

    def load(self, pack: Pack, step: int | None) -> Sequence[MadeUp]:
        """The samples of a pack."""
        return [self._sample(item) for item in pack]

    def _sample(self, item: Item) -> MadeUp:
        random = np.random.default_rng(item.key)
        words = np.cumsum(random.integers(1, 4, item.tokens)) * 7 % (self._vocabulary - FIRST_WORD) + FIRST_WORD
        ids = words.astype(np.int32)
        ids[1 : 1 + item.pictures * self._image_tokens] = IMAGE
        supervised = np.zeros(item.tokens, bool)
        supervised[item.tokens - item.supervised :] = True
        shape = (item.pictures, self._side, self._side, 3)
        if not self._is_cached:
            return MadeUp(ids, supervised, random.integers(0, 256, shape, np.uint8))
        features = random.standard_normal((item.pictures, self._image_tokens, self._width), np.float32)
        return MadeUp(ids, supervised, np.zeros((0, *shape[1:]), np.uint8), features.astype(np.float16))


def make_plan(task: Task) -> Plan:
    """Steps of `task.samples` samples each, in packs; steps of fewer packs are filled up with empty ones."""
    items = _draw(task)
    steps = []
    for start in range(0, len(items), task.samples):
        numbers = np.arange(start, start + task.samples, dtype=np.int32)
        limits = Limits(task.pack_length, 10**6)
        packer = Packer(limits, [start])
        tokens, pictures = (np.ascontiguousarray(items[name][numbers]) for name in ("tokens", "pictures"))
        steps.append(packer.add(numbers, tokens, pictures) + packer.finish())
    most = max(map(len, steps))
    packs = [pack for step in steps for pack in step + [[]] * (most - len(step))]
    starts = np.concatenate([[0], np.cumsum([len(pack) for pack in packs])]).astype(np.int64)
    members = np.array([number for pack in packs for number in pack])
    return Plan(items[members], starts, Shape(most, task.pack_length, 10**6, 0, 1, 1), [], [])


def steps_of(plan: Plan) -> Iterator[list[Item]]:
    """The samples of each step, in the order of their keys."""
    for step in range(plan.num_steps):
        yield sorted(item for pack in plan.packs(step) for item in pack)


def _draw(task: Task) -> npt.NDArray[np.void]:
    number = task.samples * task.steps
    items = np.zeros(number, np.dtype([(name, np.int64 if name == "key" else np.int32) for name in Item._fields]))
    items["key"] = np.arange(number)
    if task.lengths != "mixed":
        tokens, pictures = np.full(number, int(task.lengths), np.int32), np.ones(number, np.int32)
        items["tokens"], items["pictures"], items["supervised"] = tokens, pictures, (tokens - 66) // 2
        return items
    with tempfile.TemporaryDirectory() as folder:
        import pyarrow.parquet as pq

        lengths = Path(folder) / "lengths.parquet"
        made_up.make({"samples": 100_000, "lengths": str(lengths)})
        table = pq.read_table(lengths)
    fitting = np.flatnonzero(table["tokens"].to_numpy() <= task.pack_length)
    drawn = np.random.default_rng(1).choice(fitting, number, replace=False)
    for name in ("tokens", "pictures"):
        items[name] = table[name].to_numpy()[drawn]
    items["supervised"] = np.maximum(1, (items["tokens"] - 66 * items["pictures"]) // 2)
    return items


def task_of(text: str) -> Task:
    """From JSON."""
    return Task(**json.loads(text))
