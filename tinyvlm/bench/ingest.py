"""`tinyvlm bench ingest`: from links to finished pictures, by several programs, side by side in one run.

    web.py, a process of its own   ◀── ours: python -m ray_jobs.download, Ray included
    that is not counted            ◀── img2dataset, from an environment of its own
                                   ◀── ray.data's download(), then the same images.py
                                   ◀── the floor (floor.py): a bare fetch, then images.py on the same bytes

Of each: good pictures a second, CPU milliseconds a good picture, peak memory of all that it started (measure.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinyvlm import config
from tinyvlm.bench import web
from tinyvlm.bench.measure import Cost, measure
from tinyvlm.errors import ConfigError
from tinyvlm.folders import find_folder, scan

CONTENDERS = ("floor", "ours", "img2dataset", "ray_download")


@dataclass(frozen=True)
class Setup:
    """One run of the bench."""

    folder: Path
    links: Path
    num_links: int
    workers: int
    authority: Path | None
    """File of the certificate authority to trust; None: plain HTTP."""
    img2dataset: Path | None
    """The python of the environment that has it."""
    small: bool
    """Pictures of a kilobyte, to see how rows and not pixels cost."""

    @property
    def environment(self) -> dict[str, str]:
        return {"SSL_CERT_FILE": str(self.authority)} if self.authority else {}


def run(options: argparse.Namespace) -> int:
    """What the command does."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for scheme in options.schemes:
        with _web(folder, tls=scheme == "https", small=options.small) as (port, authority):
            links = folder / f"links-{scheme}.parquet"
            _write_links(links, f"{scheme}://{{host}}:{port}", options.links)
            setup = Setup(folder, links, options.links, options.workers, authority, options.img2dataset, options.small)
            for name in options.only:
                if name == "img2dataset" and not options.img2dataset:
                    continue
                sys.stderr.write(f"{scheme}: {name} …\n")
                rows.append({"scheme": scheme, "program": name, **RUNNERS[name](setup)})
    sys.stdout.write((json.dumps(rows, indent=2) if options.json else _table(rows)) + "\n")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tinyvlm bench ingest`."""
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-ingest"), help="where everything is written")
    parser.add_argument("--links", type=int, default=10_000, help="how many")
    parser.add_argument("--workers", type=int, default=2, help="processes of each program")
    parser.add_argument("--schemes", nargs="+", choices=("http", "https"), default=["http", "https"])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--img2dataset", type=Path, metavar="PYTHON", help="python of an environment that has it")
    parser.add_argument("--small", action="store_true", help="pictures of a kilobyte, for very many links")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


@contextlib.contextmanager
def _web(folder: Path, *, tls: bool, small: bool = False) -> Iterator[tuple[int, Path | None]]:
    command = [
        sys.executable,
        "-m",
        "tinyvlm.bench.web",
        str(folder),
        *(["--tls"] if tls else []),
        *(["--small"] if small else []),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = server.stdout.readline() if server.stdout else ""
        if not said.strip().isdigit():
            raise ConfigError("The bench's web server did not start; see what it said above.")
        yield int(said), folder / "authority.pem" if tls else None
    finally:
        server.kill()
        server.wait()


def _write_links(path: Path, base: str, number: int) -> None:
    urls = [web.link(base, index) for index in range(number)]
    pq.write_table(pa.table({"url": urls, "caption": [f"picture {index}" for index in range(number)]}), path)


def _fresh(setup: Setup, name: str) -> Path:
    folder = setup.folder / "out" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _row(cost: Cost, num_good: int) -> dict[str, Any]:
    return {
        "good": num_good,
        "pictures_per_s": round(num_good / cost.seconds, 1),
        "cpu_ms_per_good": round(1000 * cost.cpu_seconds / max(1, num_good), 2),
        "peak_mib": round(cost.peak_bytes / 2**20),
        "seconds": round(cost.seconds, 1),
    }


def _ours(setup: Setup) -> dict[str, Any]:
    from tinyvlm import recipes

    out = _fresh(setup, "ours")
    settings = ["links.url_column=url", "links.caption_column=caption", "download.fetch.rate_per_host=0"]
    settings += [f"download.fetch.allow_hosts={','.join(web.HOSTS)}"]
    recipe = setup.folder / "recipe.json"
    recipe.write_text(json.dumps(config.to_dict(recipes.load("base", settings))))
    command = [sys.executable, "-m", "ray_jobs.download", "--recipe", str(recipe), "--input", str(setup.links)]
    command += ["--output", str(out), "--workers", str(setup.workers)]
    cost = measure(command, setup.folder / "ours.log", setup.environment)
    tables = scan(find_folder([out], "download", "the bench"), ["status", "finished_at"])
    rows = pa.concat_tables(tables)
    good = int(pc.sum(pc.equal(rows["status"], "ok")).as_py() or 0)
    return {**_row(cost, good), "rows_per_s_by_fifth": _pace(rows["finished_at"])}


def _pace(finished_at: pa.ChunkedArray, num_pieces: int = 5) -> str:
    """Rows a second in each fifth of the rows, in the order in which they were finished: does it get slower?"""
    times = np.sort(finished_at.cast(pa.int64()).to_numpy()) / 1000
    edges = times[np.linspace(0, len(times) - 1, num_pieces + 1).astype(int)]
    return " ".join(f"{len(times) / num_pieces / max(1e-3, seconds):.0f}" for seconds in np.diff(edges))


def _img2dataset(setup: Setup) -> dict[str, Any]:
    assert setup.img2dataset is not None
    out = _fresh(setup, "img2dataset")
    arguments = {
        "url_list": setup.links, "input_format": "parquet", "url_col": "url", "caption_col": "caption",
        "output_format": "parquet", "output_folder": out, "processes_count": setup.workers, "thread_count": 64,
        "image_size": 448, "resize_mode": "center_crop", "encode_quality": 95, "number_sample_per_shard": 1000,
        "incremental_mode": "incremental", "enable_wandb": False, "compute_hash": "sha256",
    }  # fmt: skip
    command = [
        str(setup.img2dataset.with_name("img2dataset")),
        *(f"--{name}={value}" for name, value in arguments.items()),
    ]
    cost = measure(command, setup.folder / "img2dataset.log", setup.environment)
    good = sum(json.loads(path.read_text())["successes"] for path in out.glob("*_stats.json"))
    return _row(cost, good)


def _ray_download(setup: Setup) -> dict[str, Any]:
    out = _fresh(setup, "ray_download")
    command = [sys.executable, "-m", "ray_jobs._bench_download", str(setup.links), str(out)]
    cost = measure(command, setup.folder / "ray_download.log", setup.environment)
    good = sum(pq.read_metadata(path).num_rows for path in out.glob("*.parquet"))
    return _row(cost, good)


def _floor(setup: Setup) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "tinyvlm.bench.floor",
        str(setup.links),
        str(setup.folder / ("small" if setup.small else "pictures")),
    ]
    return _row(measure(command, setup.folder / "floor.log", setup.environment), setup.num_links)


RUNNERS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "floor": _floor,
    "ours": _ours,
    "img2dataset": _img2dataset,
    "ray_download": _ray_download,
}


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows)])
