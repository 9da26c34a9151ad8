"""The least that links to finished pictures can cost: a bare fetch of every link, then images.py, in one process.

    python -m tinyvlm.bench.floor LINKS.parquet PICTURES

No rules, no retries, no rows; each picture's bytes are finished once for every link that leads to it.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import aiohttp
import pyarrow.parquet as pq

from tinyvlm import images

AT_ONCE = 64


async def _fetch(urls: list[str]) -> None:
    todo = iter(urls)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:

        async def some() -> None:
            for url in todo:
                async with session.get(url) as response:
                    await response.read()

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))


def main(argv: list[str]) -> None:
    urls = pq.read_table(argv[0], columns=["url"])["url"].to_pylist()
    asyncio.run(_fetch(urls))
    bodies = {path.stem: path.read_bytes() for path in Path(argv[1]).iterdir()}
    picture, limits = images.PictureConfig(), images.LimitConfig()
    for url in urls:
        images.finish(bodies[Path(url).stem], picture, limits)


if __name__ == "__main__":
    main(sys.argv[1:])
