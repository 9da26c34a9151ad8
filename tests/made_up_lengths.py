"""Lengths of conversations that nobody wrote, as `train.data.measure` would give them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from tinyvlm.train import plan

Kinds = Mapping[tuple[str, str], int]


def lengths(kinds: Kinds, *, group_size: int = 20, groups_per_part: int = 10, seed: int = 0) -> pa.Table:
    """Usable training conversations: of each (source, family) so many, in row groups and parts of its own.

    Captions are about as long as those of a data set, text has no picture and a long tail, all else lies between.
    """
    random = np.random.default_rng(seed)
    tables, part = [], 0
    for number, ((source, family), rows) in enumerate(kinds.items()):
        place = np.arange(rows)
        group = place // group_size
        pictures = np.full(rows, 0 if family == "text" else 1)
        words = {"caption": (25, 0.38), "text": (90, 0.9)}.get(family, (60, 0.8))
        tokens = 17 + 66 * pictures + np.minimum(900, words[0] * random.lognormal(0, words[1], rows)).astype(int)
        columns = {
            "key": place + 1000 * number,
            "part": part + group // groups_per_part,
            "group": group % groups_per_part,
            "row": place % group_size,
            "source": [source] * rows,
            "family": [family] * rows,
            "split": ["train"] * rows,
            "status": ["ok"] * rows,
            "tokens": tokens,
            "pictures": pictures,
            "supervised": tokens // 3,
        }
        tables.append(as_lengths(columns))
        part += int(group[-1]) // groups_per_part + 1
    return pa.concat_tables(tables)


def as_lengths(columns: Mapping[str, object]) -> pa.Table:
    """A table of `plan.LENGTHS`."""
    names = ("source", "family", "split", "status")
    made = {
        field.name: pa.array(columns[field.name]).dictionary_encode()
        if field.name in names
        else pa.array(columns[field.name], field.type)
        for field in plan.LENGTHS
    }
    return pa.table(made, schema=plan.LENGTHS)
