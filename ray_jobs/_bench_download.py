"""For `tinyvlm bench ingest`: ray.data's own download() expression, then images.py, then Parquet.

python -m ray_jobs._bench_download LINKS.parquet OUT
"""

from __future__ import annotations

import os
import sys

import pyarrow as pa

from ray_jobs import _cluster
from tinyvlm import images


def _finish(table: pa.Table) -> pa.Table:
    picture, limits, good = images.PictureConfig(), images.LimitConfig(), []
    for place, body in enumerate(table["image"].to_pylist()):
        try:
            good.append((place, images.finish(body or b"", picture, limits).jpeg))
        except images.ImageError:
            continue
    rows = table.take([place for place, _ in good])
    return rows.set_column(
        rows.schema.get_field_index("image"), "image", pa.array([body for _, body in good], pa.binary())
    )


def main(links: str, out: str) -> None:
    os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = "1"
    with _cluster.connected():
        import ray.data
        from ray.data.expressions import download

        rows = ray.data.read_parquet(links).with_column("image", download("url"))
        rows.map_batches(_finish, batch_format="pyarrow", batch_size=250).write_parquet(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
