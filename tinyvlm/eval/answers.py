"""The stage `evaluate`: every held-out question is asked, greedily, and every answer is kept.

    prepare's rows (ok, test) ──┬─ as_is: with their own picture ───────────────────┐
                                └─ shuffled: with another picture of the same part ─┴─▶ engine ──▶ one row an answer

The shuffled answers tell how much is known without looking: each picture's place is taken by the next one of the part,
in the order of their hashes.  What the answers come to (accuracy, chance lines, BLEU) is counted in report.py, from the
kept rows alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from tinyvlm import config as settings_of
from tinyvlm import schema
from tinyvlm.chat import Message
from tinyvlm.data.conversations import messages_of
from tinyvlm.errors import ConfigError, InputError
from tinyvlm.eval.vqa import is_right
from tinyvlm.images import ImageError
from tinyvlm.stage import Stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tinyvlm.generation import Completion, Engine
    from tinyvlm.model import Sample
    from tinyvlm.recipes import Recipe

Condition = Literal["as_is", "shuffled"]
CONDITIONS: tuple[Condition, ...] = ("as_is", "shuffled")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the held-out questions are asked; always greedily."""

    max_new_tokens: int = 64
    """Tokens after which an answer is cut."""
    shuffle_pictures: bool = True
    """Ask every question a second time with another picture."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model; in float32 an answer does not depend on its neighbours in the batch."""
    batch_size: int = settings_of.speed(128)
    """Questions that are answered together."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluate.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass
class Ask:
    """One question under one condition, and what became of it."""

    row: dict[str, Any]
    condition: Condition
    messages: list[Message]
    truth: str
    pictures: list[dict[str, Any]]
    status: str = schema.OK
    detail: str | None = None
    completion: Completion | None = None

    def fail(self, status: str, detail: str) -> None:
        """Keep the row, with its reason."""
        self.status, self.detail = status, detail


class Evaluate(Stage):
    """Asks the final model.  `engine` stands in for the trained model in tests."""

    name = "evaluate"
    reads = ("prepare", "instruct")
    fan_out = True
    writes = schema.ANSWERS
    bytes_per_row = 1_000

    def __init__(self, config: EvaluateConfig, engine: Engine | None = None) -> None:
        self.settings = config
        self._given_engine = engine

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Evaluate:
        """The stage with a recipe's settings."""
        return cls(recipe.evaluate)

    @cached_property
    def engine(self) -> Engine:
        """The trained model, loaded when the first rows come."""
        if self._given_engine is not None:
            return self._given_engine
        import torch

        from tinyvlm.generation import Engine
        from tinyvlm.model import load

        folder = Path(self.folders["instruct"]) / "model"
        model, processor = load(folder, getattr(torch, self.settings.dtype))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Engine(model.to(device), processor, batch_size=self.settings.batch_size)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "engine"}

    def select(self, rows: pa.Table) -> pa.Table:
        """Usable rows of the test split."""
        return rows.filter(pc.and_(pc.equal(rows["status"], schema.OK), pc.equal(rows["split"], "test")))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Map held-out conversations to answers; a question that cannot be asked keeps its reason."""
        asks = self._asks(rows.to_pylist())
        ready = [(ask, sample) for ask in asks if (sample := self._sample(ask)) is not None]
        if ready:
            from tinyvlm.generation import Sampling

            sampling = Sampling(max_new_tokens=self.settings.max_new_tokens)
            completions = self.engine.generate([sample for _, sample in ready], sampling)
            for (ask, _), completion in zip(ready, completions, strict=True):
                ask.completion = completion
        self._pixels.clear()
        return pa.Table.from_pylist([_row(ask) for ask in asks], schema=self.writes)

    def statistics(self, folder: Path) -> dict[str, Any]:
        """Accuracy beside chance, captions, and wrong answers to look at."""
        from tinyvlm.eval.report import evaluation_statistics

        return evaluation_statistics(folder, Path(self.folders["prepare"]))

    def _asks(self, rows: Sequence[dict[str, Any]]) -> list[Ask]:
        """Each row as it is and, if it has a picture and an exact answer, with another picture."""
        others = _rotation(rows) if self.settings.shuffle_pictures else {}
        asks: list[Ask] = []
        for row in rows:
            *asked, answered = messages_of(row["messages"])
            asks.append(Ask(row, "as_is", asked, answered.text, row["images"]))
            if self.settings.shuffle_pictures and row["images"] and row["family"] != "caption":
                swapped = [others[picture["sha256"]] for picture in row["images"]]
                ask = Ask(row, "shuffled", asked, answered.text, swapped)
                if any(new["sha256"] == old["sha256"] for new, old in zip(swapped, row["images"], strict=True)):
                    ask.fail("no_picture", "this part has no other picture to show instead")
                asks.append(ask)
        return asks

    @cached_property
    def _pixels(self) -> dict[str, NDArray[np.uint8]]:
        """Pixels by hash, so that ten questions about one picture decode it once."""
        return {}

    def _sample(self, ask: Ask) -> Sample | None:
        """What the model reads, or None with the reason in `ask`."""
        if ask.status != schema.OK:
            return None
        from tinyvlm.model import Sample

        processor = self.engine.processor
        try:
            ids, supervised = processor.tokens(ask.messages, len(ask.pictures), open_answer=True)
            if len(ids) + self.settings.max_new_tokens > self.engine.context_length:
                ask.fail("too_long", f"{len(ids)} tokens, of {self.engine.context_length} that the model reads")
                return None
            return Sample(ids, supervised, self._pixels_of(ask.pictures))
        except ImageError as error:
            ask.fail(error.status, error.detail)
        except InputError as error:
            ask.fail("bad_text", str(error))
        return None

    def _pixels_of(self, pictures: Sequence[dict[str, Any]]) -> NDArray[np.uint8]:
        """(N, S, S, 3)"""
        import numpy as np

        processor = self.engine.processor
        for picture in pictures:
            if picture["sha256"] not in self._pixels:
                self._pixels[picture["sha256"]] = processor.pixels([picture["bytes"]])
        shown = [self._pixels[picture["sha256"]] for picture in pictures]
        return shown[0] if len(shown) == 1 else np.concatenate(shown) if shown else processor.pixels([])


def _rotation(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For the hash of each picture, the picture that takes its place."""
    pictures = {picture["sha256"]: picture for row in rows for picture in row["images"]}
    hashes = sorted(pictures)
    return {here: pictures[there] for here, there in zip(hashes, hashes[1:] + hashes[:1], strict=True)}


def _row(ask: Ask) -> dict[str, Any]:
    row, done = ask.row, ask.completion
    meta = json.loads(row["meta"] or "{}")
    if done is not None:
        meta.update(finish_reason=done.finish_reason, num_tokens=len(done.token_ids))
    return {
        "key": row["key"] * len(CONDITIONS) + CONDITIONS.index(ask.condition),
        "status": ask.status,
        "detail": ask.detail,
        "source_key": row["key"],
        "source": row["source"],
        "family": row["family"],
        "split": row["split"],
        "prompt": "\n".join(message.text for message in ask.messages),
        "truth": ask.truth,
        "answer": done.text if done else None,
        "correct": is_right(done.text, ask.truth) if done and row["family"] != "caption" else None,
        "image_sha256": ask.pictures[0]["sha256"] if ask.pictures else None,
        "condition": ask.condition,
        "meta": json.dumps(meta, separators=(",", ":")),
    }
