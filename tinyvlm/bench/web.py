"""A local web of photo-like pictures in the sizes that the web has, in a process of its own.

    python -m tinyvlm.bench.web FOLDER [--tls] [--small]        prints the port when it listens

The mix (`MIX`) is of sizes; what the pictures show is coloured noise with the spectrum of photographs, so that they
pack like photographs do.  Every host of `HOSTS` is this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from aiohttp import web
from PIL import Image

HOSTS = tuple(f"127.0.0.{number}" for number in range(1, 21))
MIX = (
    # share, shorter side px, formats
    (0.50, (225, 375)),
    (0.35, (600, 900)),
    (0.13, (1250, 1700)),
    (0.02, (2900, 3000)),
)
"""Share of the links, and the range of the shorter side in px: 300–500, 800–1200, 2–4 and 12 megapixels at 4:3."""
SMALL = ((1.0, (40, 60)),)
"""For runs of a million links, in which rows count and not pixels."""
RATIOS = (1.0, 4 / 3, 4 / 3, 4 / 3, 3 / 2, 3 / 2, 16 / 9, 2.2)
FORMATS = (*("JPEG",) * 18, "PNG", "WEBP")
NUM_PICTURES = 100


def make_pictures(folder: Path, mix: Sequence[tuple[float, tuple[int, int]]] = MIX, seed: int = 0) -> list[Path]:
    """`NUM_PICTURES` files in the shares of a mix; made once."""
    lot = random.Random(seed)
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [sides for share, sides in mix for _ in range(round(share * NUM_PICTURES))]
    for number, (least, most) in enumerate(sizes):
        short = lot.randint(least, most)
        long = round(short * (4 / 3 if short > 2000 else lot.choice(RATIOS)))
        size = (short, long) if lot.random() < 0.3 else (long, short)
        form = "JPEG" if short > 1000 else lot.choice(FORMATS)
        path = folder / f"{number:03d}.{form.lower()}"
        if not path.exists():
            photo(size, lot.randrange(1 << 30)).save(path, form, quality=lot.choice((75, 85, 85, 92)))
        paths.append(path)
    return paths


def photo(size: tuple[int, int], seed: int) -> Image.Image:
    """Coloured noise: each octave twice as fine and 0.74 times as strong as the one before."""
    rng = np.random.default_rng(seed)
    width, height = size
    total = np.zeros((height, width, 3), np.float32)
    cells, strength = 3, 90.0
    while cells < max(size):
        grid = rng.normal(0, strength, (max(2, cells * height // width), cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(0.75 * grid[..., 0] + 0.25 * grid[..., channel])
            total[..., channel] += np.asarray(layer.resize(size, Image.Resampling.BILINEAR))
        cells, strength = 2 * cells, 0.74 * strength
    return Image.fromarray(np.clip(total + 118, 0, 255).astype(np.uint8))


def link(base: str, number: int) -> str:
    """The address of link `number`: different for each, on one of the hosts, showing one of the pictures."""
    order = random.Random(number)
    return f"{base.format(host=order.choice(HOSTS))}/{number}/{order.randrange(NUM_PICTURES):03d}.jpg"


async def serve(pictures: Sequence[Path], context: ssl.SSLContext | None) -> None:
    """Until it is killed."""
    bodies = {path.stem: (path.read_bytes(), f"image/{path.suffix[1:]}") for path in pictures}

    async def answer(request: web.Request) -> web.Response:
        body, kind = bodies[request.match_info["picture"]]
        return web.Response(body=body, content_type=kind)

    app = web.Application()
    app.router.add_get("/{link}/{picture}.jpg", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    port = 0
    for host in HOSTS:
        site = web.TCPSite(runner, host, port, ssl_context=context, backlog=1024)
        await site.start()
        port = port or runner.addresses[0][1]
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def make_certificates(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate authority's file, for those who ask, and the server's side."""
    import certifi
    import trustme

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*HOSTS).configure_cert(context)
    path = folder / "authority.pem"
    # Beside the system's own, as on any machine: some programs read them all for every request.
    system = ssl.get_default_verify_paths().cafile or certifi.where()
    path.write_bytes(Path(system).read_bytes() + authority.cert_pem.bytes())
    return path, context


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    context = make_certificates(options.folder)[1] if options.tls else None
    name, mix = ("small", SMALL) if options.small else ("pictures", MIX)
    asyncio.run(serve(make_pictures(options.folder / name, mix), context))


if __name__ == "__main__":
    main(sys.argv[1:])
