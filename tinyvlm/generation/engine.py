"""Answers from a model: batches of unequal prompts, prefilled together, then decoded one token a step over a cache.

    samples ──sort──▶ batch ──pictures──▶ features (each picture once, remembered)
                        │                     │
                        └───────prefill◀──────┘   (a beginning that several prompts share is read once)
                                   │ step · step · step   (finished rows leave the batch)
                                   ▼
                              Completion

Used by evaluation (`generate`), by the command line (`stream`) and by serving (`start`, which hands out the steps).
One engine serves one thread.

Shapes: B rows of the batch, T tokens, N pictures, S side in pixels, K tokens of one picture, Dv width of the tower.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from tinyvlm.errors import InputError
from tinyvlm.generation.sampling import Dice, Sampling, Transcript, choose
from tinyvlm.images import normalise
from tinyvlm.model import Sample, TinyVLMForConditionalGeneration, TinyVLMProcessor

PICTURES_AT_ONCE = 32
"""Pictures that go through the tower together; bounds its memory."""


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    text: str
    token_ids: tuple[int, ...]
    """Without the token that ended it."""
    finish_reason: Literal["stop", "length"]
    """"stop": the model ended its turn, or a stop text came; "length": cut at `max_new_tokens` or the context's end."""
    num_prompt_tokens: int
    num_image_tokens: int
    """Of the prompt's tokens, those that stand for pictures."""


@dataclass(frozen=True)
class Piece:
    """What one step added to one answer."""

    index: int
    """Which of the samples given to `Engine.start`."""
    text: str
    """May be empty: half a character, or the beginning of a stop text."""
    completion: Completion | None
    """Set when this was the last piece."""


class Engine:
    """Generates with one model.

    Args:
        model: moved to evaluation mode; stays on its device.
        processor: the model's own.
        batch_size: most rows decoded together by `generate`.
        feature_cache_bytes: memory for the features of pictures seen before.
    """

    def __init__(
        self,
        model: TinyVLMForConditionalGeneration,
        processor: TinyVLMProcessor,
        *,
        batch_size: int = 64,
        feature_cache_bytes: int = 128 * 2**20,
    ) -> None:
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self.num_pictures_encoded = 0
        """Pictures that went through the tower; less than those asked about when the cache helped."""
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._feature_bytes, self._feature_limit = 0, feature_cache_bytes
        self._silent = torch.tensor(processor.silent_ids, dtype=torch.long, device=model.device)
        self._ends = frozenset(processor.end_ids)

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return int(self.model.config.text_config.max_position_embeddings)

    def generate(
        self, samples: Sequence[Sample], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Completion]:
        """Answer every sample (encoded with `open_answer=True`), in the order given.

        Args:
            samples: any number; batches are made of questions about the same pictures, and of similar length.
            sampling: one for all, or one for each.  None = greedy.

        Raises:
            InputError: a prompt fills the whole context.
        """
        samplings = self._each(samples, sampling)
        order = _order(samples)
        answers: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch_size):
            members = order[start : start + self.batch_size]
            decoding = self.start([samples[i] for i in members], [samplings[i] for i in members])
            while not decoding.is_done:
                for piece in decoding.step():
                    if piece.completion is not None:
                        answers[members[piece.index]] = piece.completion
        return [answers[index] for index in range(len(samples))]

    def stream(self, sample: Sample, sampling: Sampling | None = None) -> Iterator[str | Completion]:
        """Pieces of text, whole characters each, as they are made; last of all the `Completion`.

        Closing the iterator ends the work.
        """
        decoding = self.start([sample], [sampling or Sampling()])
        while not decoding.is_done:
            for piece in decoding.step():
                if piece.text:
                    yield piece.text
                if piece.completion is not None:
                    yield piece.completion

    def start(self, samples: Sequence[Sample], samplings: Sequence[Sampling]) -> Decoding:
        """Begin a batch whose steps the caller takes.

        Raises:
            InputError: a prompt fills the whole context.
        """
        return Decoding(self, samples, samplings)

    def encode_pictures(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(N,S,S,3) → (N,K,Dv), each different picture once, and not at all if it is remembered."""
        keys = [hashlib.sha256(picture.tobytes()).digest() for picture in pixels]
        known: dict[bytes, Tensor] = {}
        new: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            if key in self._features:
                self._features.move_to_end(key)
                known[key] = self._features[key]
            else:
                new.setdefault(key, index)
        for start in range(0, len(new), PICTURES_AT_ONCE):
            chunk = list(new)[start : start + PICTURES_AT_ONCE]
            with torch.inference_mode():
                values = normalise(pixels[[new[key] for key in chunk]]).to(self.model.device, self.model.dtype)
                encoded = self.model.encode_pictures(values)
            self.num_pictures_encoded += len(chunk)
            for key, features in zip(chunk, encoded, strict=True):
                known[key] = features
                self._remember(key, features)
        return torch.stack([known[key] for key in keys])

    def _remember(self, key: bytes, features: Tensor) -> None:
        num_bytes = features.numel() * features.element_size()
        if num_bytes > self._feature_limit:
            return
        self._features[key] = features.clone()
        self._feature_bytes += num_bytes
        while self._feature_bytes > self._feature_limit:
            _, oldest = self._features.popitem(last=False)
            self._feature_bytes -= oldest.numel() * oldest.element_size()

    def _each(self, samples: Sequence[Sample], sampling: Sampling | Sequence[Sampling] | None) -> list[Sampling]:
        if sampling is None or isinstance(sampling, Sampling):
            return [sampling or Sampling()] * len(samples)
        if len(sampling) != len(samples):
            raise InputError(f"There are {len(samples)} samples but {len(sampling)} samplings; give one for each.")
        return list(sampling)


class _Row:
    """One answer under way."""

    def __init__(self, index: int, sample: Sample, sampling: Sampling, engine: Engine) -> None:
        self.index, self.sampling = index, sampling
        self.num_prompt_tokens = len(sample.input_ids)
        self.num_image_tokens = len(sample.pixels) * engine.processor.num_image_tokens
        room = engine.context_length - self.num_prompt_tokens
        if room < 1:
            raise InputError(
                f"The prompt has {self.num_prompt_tokens} tokens, which leaves no room for an answer in the model's "
                f"{engine.context_length}; shorten it or give fewer pictures.",
                field="messages",
            )
        self.limit = min(sampling.max_new_tokens, room)
        self.dice = Dice(sampling.seed)
        self.transcript = Transcript(engine.processor.tokenizer.backend_tokenizer.decode, sampling.stop)
        self.token_ids: list[int] = []

    def take(self, token: int, ends: frozenset[int]) -> Piece:
        """Add a token; says what became readable and whether the answer is over."""
        if token in ends:
            return self._finish("", "stop")
        self.token_ids.append(token)
        text = self.transcript.push(token)
        if self.transcript.is_cut:
            return self._finish(text, "stop")
        if len(self.token_ids) >= self.limit:
            return self._finish(text, "length")
        return Piece(self.index, text, None)

    def _finish(self, text: str, reason: Literal["stop", "length"]) -> Piece:
        text += self.transcript.flush()
        completion = Completion(
            self.transcript.text, tuple(self.token_ids), reason, self.num_prompt_tokens, self.num_image_tokens
        )
        return Piece(self.index, text, completion)


class Decoding:
    """A batch under way; every `step` adds one token to each answer that is not finished."""

    def __init__(self, engine: Engine, samples: Sequence[Sample], samplings: Sequence[Sampling]) -> None:
        self._engine = engine
        pairs = enumerate(zip(samples, samplings, strict=True))
        self._rows = [_Row(index, sample, sampling, engine) for index, (sample, sampling) in pairs]
        self._live = list(range(len(self._rows)))
        """Which rows of the cache are still being answered."""
        self._samples: Sequence[Sample] = samples
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._positions = torch.empty(0)
        self._last: list[int] = []

    @property
    def is_done(self) -> bool:
        """Every answer is finished or cancelled."""
        return not self._live

    def cancel(self, index: int) -> None:
        """Give up one answer; the others go on unchanged."""
        self._live = [row for row in self._live if self._rows[row].index != index]

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """One more token for every unfinished answer."""
        if self.is_done:
            return []
        logits = self._prefill() if self._cache is None else self._decode()
        rows = [self._rows[row] for row in self._live]
        logits = logits[self._live].index_fill(1, self._engine._silent, float("-inf"))
        tokens = choose(logits, [row.sampling for row in rows], [row.dice for row in rows])
        pieces = [row.take(token, self._engine._ends) for row, token in zip(rows, tokens, strict=True)]
        for row, token in zip(self._live, tokens, strict=True):
            self._last[row] = token
        self._live = [row for row, piece in zip(self._live, pieces, strict=True) if piece.completion is None]
        self._compact()
        return pieces

    def _prefill(self) -> Tensor:
        """Read all prompts: (B,V), the logits after the last token of each."""
        model, samples = self._engine.model, self._samples
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        length, owners = _shared_beginning(samples, self._engine.processor.image_token_id)
        if length:
            self._read_beginnings([samples[owner] for owner in dict.fromkeys(owners)], length, owners)
            no_pixels = samples[0].pixels[:0]
            samples = [Sample(one.input_ids[length:], one.supervised[length:], no_pixels) for one in samples]
        input_ids, mask = (tensor.to(model.device) for tensor in self._engine.processor.pad(samples))
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0) + length
        # Without padding no mask is needed, and attention takes its fastest road.
        is_padded = len({row.num_prompt_tokens for row in self._rows}) > 1
        self._mask = torch.nn.functional.pad(mask, (length, 0), value=1) if is_padded else None
        self._samples = ()
        self._positions, self._last = positions[:, -1:], [0] * len(self._rows)
        return self._forward(input_ids, positions, self._features(samples))

    def _read_beginnings(self, samples: Sequence[Sample], length: int, owners: Sequence[int]) -> None:
        """Read the first `length` tokens of each different beginning, and give every row a copy of its own."""
        device = self._engine.model.device
        input_ids = torch.from_numpy(np.stack([one.input_ids[:length] for one in samples]).astype(np.int64)).to(device)
        positions = torch.arange(length, device=device).expand(len(samples), -1)
        self._forward(input_ids, positions, self._features(samples))
        place = {owner: index for index, owner in enumerate(dict.fromkeys(owners))}
        self._cache.batch_select_indices(torch.tensor([place[owner] for owner in owners], device=device))

    def _features(self, samples: Sequence[Sample]) -> Tensor | None:
        pixels = np.concatenate([sample.pixels for sample in samples])
        return self._engine.encode_pictures(pixels) if len(pixels) else None

    def _decode(self) -> Tensor:
        """Read the token that each row got last: (B,V)."""
        self._positions = self._positions + 1
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        ids = torch.tensor(self._last, device=self._positions.device).unsqueeze(1)
        return self._forward(ids, self._positions, None)

    def _forward(self, input_ids: Tensor, positions: Tensor, features: Tensor | None) -> Tensor:
        output = self._engine.model(
            input_ids=input_ids,
            image_features=features,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cast(Tensor, output.logits[:, -1])

    def _compact(self) -> None:
        """Drop finished rows from the cache once they are half of it: steps for them are computed for nothing."""
        if self.is_done:
            self._cache = None
            return
        if 2 * len(self._live) > len(self._rows):
            return
        keep = torch.tensor(self._live, device=self._positions.device)
        self._cache.batch_select_indices(keep)
        self._positions = self._positions[keep]
        self._mask = None if self._mask is None else self._mask[keep]
        self._last = [self._last[row] for row in self._live]
        self._rows = [self._rows[row] for row in self._live]
        self._live = list(range(len(self._rows)))


def _order(samples: Sequence[Sample]) -> list[int]:
    """Longest first, so that memory is short at once or never; samples with the same pictures side by side."""
    longest: dict[bytes, int] = {}
    groups: list[bytes] = []
    for index, sample in enumerate(samples):
        group = hashlib.sha256(sample.pixels.tobytes()).digest() if len(sample.pixels) else index.to_bytes(8, "big")
        groups.append(group)
        longest[group] = max(longest.get(group, 0), len(sample.input_ids))
    return sorted(range(len(samples)), key=lambda i: (-longest[groups[i]], groups[i], -len(samples[i].input_ids)))


def _shared_beginning(samples: Sequence[Sample], image_token_id: int) -> tuple[int, list[int]]:
    """How many first tokens are worth reading once for several rows, and for each row the first one that begins alike.

    The beginning ends with the picture, where most questions about it part; 0 if there is too little to share.
    """
    lengths = {_end_of_pictures(sample, image_token_id) for sample in samples}
    length = lengths.pop()
    if lengths or length == 0:
        return 0, []
    first: dict[tuple[bytes, bytes], int] = {}
    owners = [
        first.setdefault((sample.input_ids[:length].tobytes(), sample.pixels.tobytes()), row)
        for row, sample in enumerate(samples)
    ]
    return (length, owners) if 2 * len(first) <= len(samples) else (0, [])


def _end_of_pictures(sample: Sample, image_token_id: int) -> int:
    places = np.flatnonzero(sample.input_ids == image_token_id)
    return int(places[-1]) + 1 if len(places) else 0
