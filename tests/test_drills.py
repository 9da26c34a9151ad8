"""Long drills, run by hand: workers, drivers and disks fail at random points of the ingest stages, many times over.

    pytest -m slow tests/test_drills.py            TINYVLM_DRILLS=5 for fewer of each stage

Judged by the finished folder (equal to an undisturbed one), by its checksums, and by the web server's own log.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from aiohttp import web
from PIL import Image

from ray_jobs._local_cluster import LocalCluster, free_port
from tinyvlm import images
from tinyvlm.data.downloader import MAX_UNSAVED
from tinyvlm.folders import find_folder, read_rows
from tinyvlm.folders import part_paths as parts_of
from tinyvlm.schema import measured_columns
from tinyvlm.toy.web_server import running
from tinyvlm.upkeep import verify

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]

DRILLS = int(os.environ.get("TINYVLM_DRILLS", "20"))
ROWS, WORKERS = 1500, 2
STAGES = ("download", "preprocess", "explore", "encode")
DISK_MIB = 400


class Web:
    """Pictures, some missing, each after a moment; remembers what was asked for."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.app = web.Application()
        self.app.router.add_get("/{name}", self.answer)
        lot = random.Random(0)
        colours = [tuple(lot.randrange(256) for _ in range(3)) for _ in range(40)]
        self.bodies = [images.to_jpeg(Image.new("RGB", (80, 60), colour), 90) for colour in colours]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked[request.path] += 1
        number = int(request.match_info["name"].split(".")[0])
        if number % 9 == 0:
            return web.Response(status=404)
        return web.Response(body=self.bodies[number % len(self.bodies)], content_type="image/jpeg")


@dataclass
class Line:
    """A cluster, a list of links, and the undisturbed folders of all stages."""

    cluster: LocalCluster
    site: Web
    links: Path
    straight: Path

    def start(self, stage: str, output: Path, log: Path) -> subprocess.Popen[bytes]:
        settings = {
            "picture.size": 64, "picture.tower_size": 64, "links.url_column": "url", "links.caption_column": "caption",
            "links.rows_per_part": 100, "download.fetch.allow_hosts": "127.0.0.1", "download.fetch.rate_per_host": 150,
            "explore.model": "toy:clip", "explore.labels": "toy", "explore.dtype": "float32", "explore.batch_size": 16,
            "encode.vision": "toy:clip", "encode.dtype": "float32", "encode.batch_size": 16,
            "encode.num_image_tokens": 16, "model.num_image_tokens": 16, "encode.feature_width": 128,
            "encode.placeholder_threshold": 2, "encode.repeated_links": 0, "encode.similar_links": 0,
            "encode.redirect_links": 0, "encode.plain_levels": 0,
        }  # fmt: skip
        command = [sys.executable, "-m", f"ray_jobs.{stage}", "--recipe", "base", "--workers", str(WORKERS)]
        command += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        command += ["--input", str(self.links if stage == "download" else self.straight), "--output", str(output)]
        environment = {**self.cluster.environment, "RAY_ADDRESS": self.cluster.address}
        return subprocess.Popen(command, env=environment, stdout=log.open("ab"), stderr=subprocess.STDOUT)

    def finish(self, stage: str, output: Path, log: Path) -> None:
        assert self.start(stage, output, log).wait(300) == 0, log.read_text()[-2000:]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    root = tmp_path_factory.mktemp("drills")
    site = Web()
    with running(site.app) as base_url, LocalCluster(free_port(), root / "ray.log") as cluster:
        links = root / "links.jsonl"
        rows = [{"url": f"{base_url}/{number}.jpg", "caption": f"picture {number}"} for number in range(ROWS)]
        links.write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = Line(cluster, site, links, root / "straight")
        for stage in STAGES:
            line.finish(stage, line.straight, root / f"{stage}.log")
        yield line


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, which can be filled."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs wants root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def rows_of(root: Path, stage: str) -> pa.Table:
    folder = find_folder([root], stage, "the drill")
    assert verify(folder) == []
    table = pa.concat_tables([read_rows(str(path), 0, 10**9) for path in parts_of(folder)]).sort_by("key")
    return table.drop_columns(sorted(measured_columns(table.schema)))


def kill_worker(line: Line, lot: random.Random) -> bool:
    workers = [process for process in line.cluster.processes() if "MapWorker" in " ".join(_words(process))]
    if workers:
        lot.choice(workers).send_signal(signal.SIGKILL)
    return bool(workers)


def _words(process: psutil.Process) -> list[str]:
    try:
        return [*process.cmdline(), process.name()]
    except psutil.Error:
        return []


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        except OSError:
            pass


def wait_for_work(process: subprocess.Popen[bytes], output: Path, stage: str, share: float) -> None:
    """Until so much of the stage is done, as its folder shows; or until it ends."""
    while process.poll() is None:
        done = len(list(output.glob(f"{stage}-*/data/part-*.parquet")))
        if done >= share * ROWS / 100:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_whatever_fails_the_output_is_the_same(line: Line, disk: Path, tmp_path: Path, stage: str) -> None:
    lot, happened, repeated = random.Random(STAGES.index(stage)), Counter[str](), []
    wanted = rows_of(line.straight, stage)
    for drill in range(DRILLS):
        kind = ("worker", "driver", "disk")[drill % 3]
        output, log = disk / f"drill-{drill}", tmp_path / f"{drill}.log"
        output.mkdir()
        line.site.asked.clear()
        process = line.start(stage, output, log)
        wait_for_work(process, output, stage, lot.random() * 0.8)
        if process.poll() is None and kind == "worker" and kill_worker(line, lot):
            happened[kind] += 1
            assert process.wait(300) == 0, log.read_text()[-2000:]
        elif process.poll() is None and kind == "driver":
            happened[kind] += 1
            process.send_signal(signal.SIGKILL)
            process.wait()
        elif process.poll() is None and kind == "disk":
            fill(disk)
            code = process.wait(300)
            (disk / "filler").unlink()
            happened[kind if code else "disk, too late"] += 1
            assert code in (0, 2), log.read_text()[-2000:]
        process.wait(300)
        line.finish(stage, output, log)
        assert rows_of(output, stage).equals(wanted), (drill, kind)
        if stage == "download":
            repeated.append(line.site.asked.total() - len(line.site.asked))
            assert len(line.site.asked) == ROWS
            assert repeated[-1] <= MAX_UNSAVED * WORKERS, (drill, kind)
        asked = line.site.asked.total()
        line.finish(stage, output, log)
        assert "finished already" in log.read_text().splitlines()[-1]
        assert line.site.asked.total() == asked
        subprocess.run(["rm", "-rf", str(output)], check=True)
    report: dict[str, Any] = {"stage": stage, "drills": DRILLS, "failures": dict(happened), "asked twice": repeated}
    sys.stderr.write(json.dumps(report) + "\n")
    assert sum(happened.values()) >= DRILLS * 0.7, "most of the failures came in time"
