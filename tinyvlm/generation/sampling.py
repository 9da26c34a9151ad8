"""How the next token is chosen, and when an answer is over.

    logits (B,V) ──silence control tokens──temperature──top-k──top-p──▶ one token a row ──▶ text, cut at stop strings

Each request draws from a random generator of its own, so its answer does not depend on its neighbours in the batch.
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyvlm.errors import InputError

UNFINISHED = "\ufffd"
"""What decoding writes for bytes that are no whole character (yet)."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request wants its answer."""

    max_new_tokens: int = 128
    """Tokens after which the answer is cut."""
    temperature: float = 0.0
    """0 = always the likeliest token; higher is more varied, at most 2."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw from so many likeliest tokens; 0 = all."""
    seed: int | None = None
    """Same seed, same answer; none = another one each time."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature <= 2.0, "between 0 and 2"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("stop", all(self.stop), "without empty texts"),
        )
        for name, is_right, wanted in checks:
            if not is_right:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.", field=name)


class Dice:
    """The random numbers of one request."""

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed % 2**63)

    def roll(self) -> float:
        """The next number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(logits: Tensor, samplings: Sequence[Sampling], dice: Sequence[Dice]) -> list[int]:
    """(B,V) → one token a row."""
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not drawn:
        return tokens
    settings = [samplings[row] for row in drawn]
    probabilities, order = _distribution(logits[drawn].float(), settings)
    # Points are drawn by inverse transform: the token under which the roll falls.
    rolls = torch.tensor([dice[row].roll() for row in drawn], dtype=torch.float64, device=logits.device)
    sums = probabilities.double().cumsum(dim=-1)
    places = torch.searchsorted(sums, (rolls * sums[:, -1]).unsqueeze(-1), right=True)
    places = places.clamp(max=sums.shape[-1] - 1)
    for row, token in zip(drawn, order.gather(-1, places).squeeze(-1).tolist(), strict=True):
        tokens[row] = token
    return tokens


def _distribution(logits: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """Probabilities in falling order, zero where top-k or top-p cut, and the tokens that they belong to."""

    def column(name: str) -> Tensor:
        return torch.tensor([float(getattr(one, name)) for one in samplings], device=logits.device).unsqueeze(-1)

    ranked, order = (logits / column("temperature")).sort(dim=-1, descending=True, stable=True)
    top_k = column("top_k")
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    ranked = ranked.masked_fill((top_k > 0) & (ranks >= top_k), float("-inf"))
    probabilities = ranked.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return probabilities.masked_fill((before >= column("top_p")) & (ranks > 0), 0.0), order


class Transcript:
    """The text of one answer while its tokens arrive: whole characters only, cut at the first stop text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._context = self._read = 0
        self._shown = 0
        self.text = ""
        """Everything so far; after `is_cut`, without the stop text and what followed."""
        self.is_cut = False
        """A stop text has come."""

    def push(self, token: int) -> str:
        """Take one token; give the text that can be shown now and will never be taken back."""
        self._ids.append(token)
        # A token's text can depend on the one before it, so both are decoded and the difference is what is new.
        known = self._decode(self._ids[self._context : self._read])
        whole = self._decode(self._ids[self._context :])
        if whole.endswith(UNFINISHED) or len(whole) <= len(known):
            return ""
        self._context, self._read = self._read, len(self._ids)
        start = len(self.text)
        self.text += whole[len(known) :]
        self._cut(start)
        return self._show(len(self.text) - (0 if self.is_cut else self._held_back()))

    def flush(self) -> str:
        """The answer is over: give what was held back because a stop text might have begun."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        shown = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return shown

    def _cut(self, start: int) -> None:
        """Look for stop texts that end in what came after `start`."""
        found = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop]
        places = [place for place in found if place >= 0]
        if places:
            self.text, self.is_cut = self.text[: min(places)], True

    def _held_back(self) -> int:
        """How many last characters could be the beginning of a stop text."""
        lengths = (n for stop in self._stop for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)
