"""What a stage promises about its rows, checked: same keys, known statuses, its own columns, nothing lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from tinyvlm import schema
from tinyvlm.errors import StageError

if TYPE_CHECKING:
    from tinyvlm.stage import Stage


def check_rows(stage: Stage, index: int, rows: pa.Table, out: pa.Table, left: Collection[int] = ()) -> None:
    """The contract of a row map, for part `index`: `rows` came, `out` went.

    `left`: keys of rows that came once, stay in the output, and were taken down in the input since.

    Raises:
        StageError: a promise is broken.
    """
    name, where = stage.name, f"in part {index}"
    if not out.schema.equals(stage.writes):
        raise StageError(f"{name} wrote other columns than its schema {where}: {_difference(out, stage)}.")
    if out["key"].null_count or out["status"].null_count:
        raise StageError(f"{name} left a key or a status empty {where}.")
    came, went = rows["key"].to_pylist(), out["key"].to_pylist()
    if len(set(went)) != len(went):
        twice = [key for key, count in Counter(went).items() if count > 1]
        raise StageError(f"{name} gave the same key to several rows {where}: {twice[:5]}.")
    if left:
        went = [key for key in went if key not in left]
    came, went = (set(came), set(out["source_key"].to_pylist())) if stage.fan_out else (came, went)
    if came != went:
        lost, new = sorted(set(came) - set(went))[:5], list(set(went) - set(came))[:5]
        said = f"lost keys {lost}, new keys {new}" if lost or new else "the rows are in another order"
        raise StageError(f"{name} lost, invented or moved rows {where}: {said}.")
    unknown = sorted(set(out["status"].to_pylist()) - set(schema.STATUSES))
    if unknown:
        raise StageError(f"{name} gave the status {unknown[0]!r} {where}, which is not in schema.STATUSES.")


def check_counts(stage: Stage, path: str, index: int, rows_in: int, counts: Mapping[str, int], rows_there: int) -> None:
    """The rows that lie in a part's file are those that were counted.

    Raises:
        StageError: they are not.
    """
    counted = sum(counts.values())
    if rows_there != counted or (not stage.fan_out and counted != rows_in):
        raise StageError(
            f"{stage.name} read {rows_in} rows in part {index} and counted {counted}, "
            f"but {path} holds {rows_there}; remove that file and run the same command again."
        )


def _difference(out: pa.Table, stage: Stage) -> str:
    """The columns that came, those that were wanted, and the first type that differs."""
    came, wanted = out.schema, stage.writes
    if came.names != wanted.names:
        return f"{came.names} instead of {wanted.names}"
    return next(
        f"{a.name} is {a.type} instead of {b.type}" for a, b in zip(came, wanted, strict=True) if not a.equals(b)
    )
