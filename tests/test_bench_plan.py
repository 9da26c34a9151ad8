"""The bench of plans, with few samples: its numbers are there, and the made-up lengths are what its docstring says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinyvlm.bench import plan as bench


def test_a_small_run_has_all_numbers(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.parquet"
    bench.make({"samples": 20_000, "lengths": str(lengths)})
    task = {"lengths": str(lengths), "sources": bench.MIXES["everything"], "plan": str(tmp_path / "plan.parquet")}
    for padded in (0, 1):
        row = bench.build({**task, "pack_length": 2048, "samples_per_pack": padded})
        assert row["samples"] == row["conversations"] > 19_000
        assert row["fill"] > 0.9
        assert [one["workers"] for one in row["reading"]] == list(bench.WORLDS)
        assert "| everything | 2048" in bench._table([{"mix": "everything", **row}])


def test_captions_are_as_long_as_the_published_ones(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.parquet"
    bench.make({"samples": 40_000, "lengths": str(lengths)})
    table = pq.read_table(lengths)
    tokens = table.filter(pc.equal(table["source"].cast("string"), "captions"))["tokens"].to_numpy()
    layout = 11 + bench.TOKENS_PER_PICTURE
    median, high = ((np.quantile(tokens, share) - layout) / bench.TOKENS_PER_WORD - 4 for share in (0.5, 0.99))
    assert abs(median - 21) < 2
    assert abs(high - 51) < 6
