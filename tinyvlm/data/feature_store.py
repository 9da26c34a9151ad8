"""Features as they are stored: half precision, or eight bits with a scale for each token.  Plain pyarrow reads both.

    (K, D) floats ──pack──▶ float16                                       feature_storage=float16
                            int8 × scale, the token's largest ÷ 127                       int8
                            bits of float8 e4m3fn × scale, largest ÷ 448                  fp8
    rows of an encode folder ──unpack──▶ (N, K, D) float32

Source of the eight-bit float: "FP8 Formats for Deep Learning", Micikevicius et al., 2022, table 1.
Shapes: B and N pictures, K image tokens, D width of the tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tinyvlm.errors import DataError
from tinyvlm.folders import Manifest, scan
from tinyvlm.schema import FeatureStorage

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = {"float16": 65504.0, "int8": 127.0, "fp8": 448.0}
"""The largest number that each storage holds."""


def pack(features: Tensor, storage: FeatureStorage) -> tuple[Tensor, Tensor | None]:
    """(B, K, D) → what is stored, float16, int8 or uint8 (B, K, D), and the scales (B, K), None in half precision."""
    import torch  # here, so that reading features needs no torch

    values = features.float()
    if storage == "float16":
        return values.clamp(-LARGEST[storage], LARGEST[storage]).half(), None
    scale = values.abs().amax(dim=-1) / LARGEST[storage]
    scaled = values / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    if storage == "int8":
        return scaled.round().to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale


def unpack_values(values: NDArray[np.generic], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """`pack` undone: stored values (…, K, D) and scales (…, K) → float32 (…, K, D)."""
    exact = _FLOAT8[values] if values.dtype == np.uint8 else values.astype(np.float32)
    return exact if scale is None else exact * scale[..., None].astype(np.float32)


def unpack(rows: pa.Table) -> NDArray[np.float32]:
    """Features (N, K, D) of rows of an encode folder, however they are stored.

    Raises:
        DataError: a row has none; its picture could not be decoded.
    """
    if rows["features"].null_count:
        raise DataError(
            f"{rows['features'].null_count} of {rows.num_rows} rows have no features; keep rows with status ok."
        )
    values = rows["features"].combine_chunks()
    kind = rows.schema.field("features").type
    if isinstance(values, pa.ChunkedArray):  # no rows at all
        return np.empty((0, *kind.shape), np.float32)
    scale = None
    if "feature_scale" in rows.column_names:
        flat = rows["feature_scale"].combine_chunks().flatten()
        scale = flat.to_numpy(zero_copy_only=False).reshape(rows.num_rows, kind.shape[0])
    return unpack_values(values.to_numpy_ndarray(), scale)


def read_features(folder: Path, encoder: str | None = None) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Keys (N,) and features (N, K, D) of the usable rows of an encode folder, one pair a part.

    Args:
        encoder: `towers.encoder_fingerprint` of the tower that the features are to stand in for.

    Raises:
        DataError: other weights or another preprocessing made them.
    """
    columns = ["key", "encoder", "features"]
    if Manifest.read(folder).settings["encode"]["feature_storage"] != "float16":
        columns.append("feature_scale")
    for rows in scan(folder, columns, only_ok=True):
        made_by = pc.unique(rows["encoder"]).to_pylist()
        if encoder is not None and any(name != encoder for name in made_by):
            raise DataError(
                f"{folder} holds features of the encoder {made_by[0]}, but those of {encoder} are wanted: other "
                "weights or another preprocessing; run `python -m ray_jobs.encode` with this tower."
            )
        yield rows["key"].to_numpy(), unpack(rows)


def _float8_values() -> NDArray[np.float32]:
    """What each of the 256 bit patterns of float8 e4m3fn stands for."""
    bits = np.arange(256)
    sign = np.where(bits & 0x80, -1.0, 1.0)
    exponent, fraction = (bits >> 3) & 0xF, (bits & 7) / 8
    value = sign * np.where(exponent, np.exp2(exponent - 7.0) * (1 + fraction), np.exp2(-6.0) * fraction)
    value[(bits & 0x7F) == 0x7F] = np.nan
    return np.asarray(value, np.float32)


_FLOAT8 = _float8_values()
