"""Several samples in one sequence, from lengths alone: packs that hold so many tokens and so many pictures at most.

    samples of a window, shuffled ──▶ the longest first, some in their order, the last two by best fit ──▶ full packs
                                      └── the few that would not fill packs well wait, and open the next window's

Filling a pack is a knapsack with two limits.  Long samples open packs while there are short ones to keep them
company; the middle is drawn in the shuffled order; at the end, two are looked for that fill the room together, so that
hardly a token is left.  Finding the longest that fits is one operation on an integer whose bit n says that a sample of
n tokens is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int32]

WAITING_PACKS = 4
"""So many packs' worth of tokens may wait for the next window, but not more than half of a window."""
CLOSING_SAMPLES, CLOSING_TRIES = 2.5, 4
"""Best fit takes over when the room left is that of so many average samples, and looks at so many pairs for the end."""
LOOK_AHEAD = 16
"""How many samples that have no room are passed over in the shuffled order before best fit takes over."""


@dataclass(frozen=True)
class Limits:
    """Of one pack."""

    tokens: int
    pictures: int
    samples: int = 0
    """0: no limit."""


class Packer:
    """Packs one window of samples after another.

    Samples have numbers of the caller's.  None is longer than a pack, none has more pictures than it may hold.
    """

    def __init__(self, limits: Limits, seed: Sequence[int]) -> None:
        self.limits = limits
        self._random = np.random.default_rng(list(seed))
        self._waiting: tuple[list[int], list[int], list[int]] = ([], [], [])

    def add(self, numbers: Numbers, tokens: Numbers, pictures: Numbers) -> list[list[int]]:
        """Full packs of a window's samples and of those that waited; the latter are in the first packs."""
        may_wait = min(WAITING_PACKS * self.limits.tokens, int(tokens.sum()) // 2)
        return self._pack(numbers.tolist(), tokens.tolist(), pictures.tolist(), may_wait)

    def finish(self) -> list[list[int]]:
        """Packs of what still waits, full or not."""
        return self._pack([], [], [], 0)

    def _pack(self, numbers: list[int], tokens: list[int], pictures: list[int], may_wait: int) -> list[list[int]]:
        num_waiting = len(self._waiting[0])
        numbers, tokens, pictures = (
            old + new for old, new in zip(self._waiting, (numbers, tokens, pictures), strict=True)
        )
        window = _Window(tokens, pictures, num_waiting, self.limits)
        late: list[list[int]] = []
        early: list[list[int]] = []
        while window.tokens_left > may_wait:
            pack = window.fill()
            (early if min(pack) < num_waiting else late).append(pack)
        left = [place for place in range(len(tokens)) if not window.taken[place]]
        self._waiting = tuple([column[place] for place in left] for column in (numbers, tokens, pictures))  # type: ignore[assignment]
        return [[numbers[place] for place in pack] for pack in early + self._in_pairs(late, pictures)]

    def _in_pairs(self, packs: list[list[int]], pictures: list[int]) -> list[list[int]]:
        """Shuffled, but one with many pictures beside one with few: neighbours, which one worker gets, are average."""
        by_pictures = sorted(packs, key=lambda pack: sum(pictures[place] for place in pack))
        half = len(packs) // 2
        pairs = [by_pictures[place : place + 1] + by_pictures[-1 - place :][:1] for place in range(half)]
        pairs += [by_pictures[half : half + 1]] if len(packs) % 2 else []
        return [pack for place in self._random.permutation(len(pairs)).tolist() for pack in pairs[place]]


class _Window:
    """Samples to choose from, by place, by length, and by number of pictures."""

    def __init__(self, tokens: list[int], pictures: list[int], num_waiting: int, limits: Limits) -> None:
        self.tokens, self.pictures, self.limits = tokens, pictures, limits
        self.tokens_left = sum(tokens)
        self.taken = bytearray(len(tokens))
        self._head = 0
        self._waiting = sorted(range(num_waiting), key=lambda place: tokens[place])
        self._mean = max(1, self.tokens_left // max(1, len(tokens)))
        self._places: dict[int, dict[int, list[int]]] = {}
        self._counts: dict[int, dict[int, int]] = {}
        for place in range(len(tokens) - 1, -1, -1):
            self._places.setdefault(pictures[place], {}).setdefault(tokens[place], []).append(place)
        self._lengths: dict[int, int] = {}
        """Number of pictures → an integer whose bit n says that a sample of n tokens is left."""
        for number, by_length in self._places.items():
            self._counts[number] = {length: len(places) for length, places in by_length.items()}
            self._lengths[number] = sum(1 << length for length in by_length)

    def fill(self) -> list[int]:
        """One pack."""
        self._room, self._pictures = self.limits.tokens, self.limits.pictures
        self._samples = self.limits.samples or len(self.tokens)
        self._pack: list[int] = []
        while self._waiting and not self._pack:
            if not self.taken[place := self._waiting.pop()]:
                self._take(place)
        if not self._pack:
            self._take_longest(*self._longest(self._room, self._pictures))
        self._take_in_order(int(CLOSING_SAMPLES * self._mean))
        while self._samples and self._room and self._close():
            pass
        return self._pack

    def _close(self) -> bool:
        """Take one sample such that it and one more fill the room as well as can be; False when none fits."""
        best, least = (-1, 0), self._room + 1
        for target in range(self._room, 0, -max(1, self._room // CLOSING_TRIES)):
            length, number = self._longest(target, self._pictures)
            if length < 0:
                break
            rest = self._room - length
            if rest and self._samples > 1:
                rest -= max(0, self._longest(rest, self._pictures - number)[0])
            if rest < least:
                best, least = (length, number), rest
            if not rest:
                break
        if best[0] < 0:
            return False
        self._take_longest(*best)
        return True

    def _take(self, place: int) -> None:
        length, number = self.tokens[place], self.pictures[place]
        self.taken[place] = 1
        self._pack.append(place)
        self._room -= length
        self._pictures -= number
        self._samples -= 1
        self.tokens_left -= length
        counts = self._counts[number]
        counts[length] -= 1
        if not counts[length]:
            self._lengths[number] ^= 1 << length

    def _longest(self, room: int, pictures: int) -> tuple[int, int]:
        """Tokens and pictures of the longest sample that fits; -1 tokens when none does."""
        below, best, chosen = (2 << room) - 1, -1, 0
        for number, lengths in self._lengths.items():
            if number <= pictures:
                longest = (lengths & below).bit_length() - 1
                if longest > best:
                    best, chosen = longest, number
        return best, chosen

    def _take_longest(self, length: int, number: int) -> None:
        places = self._places[number][length]
        while self.taken[places[-1]]:
            places.pop()
        self._take(places.pop())

    def _take_in_order(self, until: int) -> None:
        """Take samples as they come while more than `until` tokens of room are left."""
        taken, tokens, pictures = self.taken, self.tokens, self.pictures
        place, passed = self._head, 0
        while self._room > until and self._samples and passed < LOOK_AHEAD and place < len(tokens):
            if not taken[place]:
                if tokens[place] <= self._room and pictures[place] <= self._pictures:
                    self._take(place)
                else:
                    passed += 1
            elif place == self._head:
                self._head += 1
            place += 1
