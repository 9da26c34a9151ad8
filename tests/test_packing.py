"""Packing: full packs that keep their limits, each sample once, from lengths alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.compute as pc
import pytest
from made_up_lengths import lengths

from tinyvlm.data.packing import WAITING_PACKS, Limits, Packer


def pack(limits: Limits, tokens: np.ndarray, pictures: np.ndarray, window: int) -> list[list[int]]:
    packer = Packer(limits, [0])
    made = []
    for first in range(0, len(tokens), window):
        some = np.arange(first, min(first + window, len(tokens)), dtype=np.int32)
        made += packer.add(some, tokens[some], pictures[some])
    return made + packer.finish()


def mix(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Captions, questions and text in about the shares of the published stages, shuffled."""
    table = lengths({("c", "caption"): number // 2, ("q", "vqa"): number // 3, ("t", "text"): number // 6})
    order = np.random.default_rng(1).permutation(table.num_rows)
    return table["tokens"].to_numpy()[order], table["pictures"].to_numpy()[order]


@pytest.mark.parametrize("pack_length", [1024, 2048, 4096])
def test_packs_are_full_and_keep_their_limits(pack_length: int) -> None:
    tokens, pictures = mix(24_000)
    limits = Limits(pack_length, int(1.25 * pack_length * pictures.sum() / tokens.sum()) + 1)
    made = pack(limits, tokens, pictures, 2_000)
    assert Counter(number for one in made for number in one) == Counter(range(len(tokens)))
    assert max(tokens[one].sum() for one in made) <= pack_length
    assert max(pictures[one].sum() for one in made) <= limits.pictures
    assert tokens.sum() / (len(made) * pack_length) >= 0.97


def test_a_tight_limit_of_pictures_is_kept_by_mixing_text_in() -> None:
    tokens, pictures = mix(12_000)
    most = 1 + int(1024 * pictures.sum() / tokens.sum())
    made = pack(Limits(1024, most), tokens, pictures, 2_000)
    assert max(pictures[one].sum() for one in made) <= most
    assert tokens.sum() / (len(made) * 1024) > 0.9


@pytest.mark.parametrize("samples", [2, 5])
def test_samples_of_a_pack_can_be_limited(samples: int) -> None:
    tokens, pictures = mix(600)
    made = pack(Limits(4096, 99, samples), tokens, pictures, 200)
    assert max(map(len, made)) == samples
    assert Counter(number for one in made for number in one) == Counter(range(len(tokens)))


def test_long_samples_find_company_while_there_are_short_ones() -> None:
    tokens = np.array([700] * 50 + [300] * 50, np.int32)
    made = pack(Limits(1024, 2), tokens, np.ones(100, np.int32), 100)
    assert [tokens[one].sum() for one in made] == [1000] * 50


@pytest.mark.parametrize(("family", "pack_length"), [("vqa", 2048), ("multi_turn", 512), ("caption", 4096)])
def test_hardly_anything_waits_and_not_for_long(family: str, pack_length: int) -> None:
    """What waits keeps its row group in memory, so it must be in the first packs of the next window."""
    table = lengths({("s", family): 6_000}).filter(pc.field("tokens") <= pack_length)
    tokens, pictures = table["tokens"].to_numpy(), table["pictures"].to_numpy()
    packer = Packer(Limits(pack_length, 99), [0])
    waited = []
    for first in range(0, len(tokens), 1_000):
        some = np.arange(first, min(first + 1_000, len(tokens)), dtype=np.int32)
        made = packer.add(some, tokens[some], pictures[some])
        old = [place for place, one in enumerate(made) if min(one) < first]
        assert old == list(range(len(old)))
        assert len(old) <= len(made) // 3
        assert min(min(one) for one in made) >= first - 1_000
        waited.append(sum(int(tokens[number]) for one in made for number in one if number < first))
    assert max(waited) <= WAITING_PACKS * pack_length


def test_the_same_lengths_give_the_same_packs() -> None:
    tokens, pictures = mix(1_200)
    assert pack(Limits(1024, 9), tokens, pictures, 400) == pack(Limits(1024, 9), tokens, pictures, 400)


def test_nothing_gives_no_packs() -> None:
    empty = np.zeros(0, np.int32)
    packer = Packer(Limits(1024, 9), [0])
    assert packer.add(empty, empty, empty) == packer.finish() == []
