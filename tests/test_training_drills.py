"""Long drills, run by hand: whatever fails while a model is trained over a real Ray, the run sees what it should see.

    pytest -m slow tests/test_training_drills.py            TINYVLM_DRILLS=3 for fewer of each kind

The commands are those that a person types, on a cluster of the tests' own.  Each drill is judged by the ledger
(train/ledger.py): without a fault, and equal to that of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from test_drills import disk as disk  # a fixture
from tiny_model import PICTURE, save_parts
from training_data import prepare_folder, rows

from ray_jobs._local_cluster import LocalCluster, free_port
from tinyvlm import config, recipes
from tinyvlm.data.mixture import MixtureConfig
from tinyvlm.folders import find_folder
from tinyvlm.train import checkpoint, ledger, metrics
from tinyvlm.train.settings import Rates, TrainConfig
from tinyvlm.upkeep import verify

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]

DRILLS = int(os.environ.get("TINYVLM_DRILLS", "10"))
STEPS, EVERY = 150, 10

CONFIG = TrainConfig(
    mixture=MixtureConfig(weights={"vqa": 1.0, "multi_turn": 1.0, "text": 1.0}),
    rates=Rates(vision=1e-4, connector=1e-4, language=1e-4),
    packs_per_step=6,
    pack_length=256,
    samples_per_pack=0,
    epochs=200,
    steps=STEPS,
    warmup_steps=2,
    precision="fp32",
    checkpoint_every_steps=EVERY,
    eval_every_steps=50,
    max_validation=4,
    ledger=True,
)


@dataclass
class Site:
    """A cluster, data, a recipe, and the folder of an undisturbed run."""

    cluster: LocalCluster
    root: Path
    wanted: ledger.Verdict

    def start(self, output: Path, log: Path, workers: str = "2", data: Path | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray_jobs.pretrain", "--recipe", str(self.root / "recipe.json")]
        command += ["--input", str(data or self.root), "--output", str(output), "--workers", workers]
        environment = {**self.cluster.environment, "RAY_ADDRESS": self.cluster.address}
        return subprocess.Popen(command, env=environment, stdout=log.open("ab"), stderr=subprocess.STDOUT)

    def finish(self, output: Path, log: Path, workers: str = "2", data: Path | None = None) -> None:
        assert self.start(output, log, workers, data).wait(300) == 0, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("drills")
    parts = save_parts(root / "parts")
    prepare_folder(root, rows())
    recipe = config.to_dict(recipes.base())
    recipe["model"] = {**config.to_dict(parts), "connector_width": 2048}  # a checkpoint takes a moment to write
    recipe["picture"], recipe["pretrain"] = config.to_dict(PICTURE), config.to_dict(CONFIG)
    recipe["encode"]["num_image_tokens"] = parts.num_image_tokens
    (root / "recipe.json").write_text(json.dumps(recipe))
    with LocalCluster(free_port(), root / "ray.log") as cluster:
        site = Site(cluster, root, ledger.Verdict({}, [], []))
        site.finish(root / "straight", root / "straight.log")
        site.wanted = ledger.judge(folder_of(root / "straight"), STEPS)
        assert site.wanted.faults == []
        yield site


def folder_of(output: Path) -> Path:
    return find_folder([output], "pretrain", "the drill")


def running_folder(output: Path) -> Path | None:
    return next((path for path in output.glob("pretrain-*") if path.is_dir()), None)


def wait_for(process: subprocess.Popen[bytes], is_so: Callable[[], Any], pause_s: float = 0.01) -> bool:
    """Until something is so; False when the process ended before."""
    while process.poll() is None:
        if is_so():
            return True
        time.sleep(pause_s)
    return False


def at_step(output: Path, step: int) -> Callable[[], bool]:
    def is_so() -> bool:
        folder = running_folder(output)
        return folder is not None and len(metrics.read(folder / "metrics.jsonl").steps) >= step

    return is_so


def workers_of(site: Site) -> list[psutil.Process]:
    found = []
    for process in site.cluster.processes():
        try:
            if "RayTrainWorker" in " ".join([*process.cmdline(), process.name()]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def first_worker(output: Path) -> int:
    folder = running_folder(output)
    assert folder is not None
    return int(metrics.read(folder / "metrics.jsonl").attempts[-1]["pid"])


def unfinished(output: Path) -> list[Path]:
    folder = running_folder(output)
    places = list(checkpoint.root_of(folder).glob("step-*")) if folder else []
    return [place for place in places if not (place / "done.json").exists() and list(place.glob("state-*"))]


def judge(site: Site, output: Path) -> ledger.Verdict:
    folder = folder_of(output)
    assert verify(folder) == []
    verdict = ledger.judge(folder, STEPS)
    assert verdict.faults == []
    assert verdict.steps == site.wanted.steps
    return verdict


def fill(disk: Path, but_for: int) -> Path:
    """A file that leaves so many bytes free."""
    path = disk / "filler"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - but_for))
    return path


Drill = Callable[[Site, Path, Path, random.Random, subprocess.Popen[bytes]], bool]
"""Disturbs a run that has begun; whether it came in time."""


def kill_worker(site: Site, output: Path, log: Path, lot: random.Random, process: subprocess.Popen[bytes]) -> bool:
    if not wait_for(process, at_step(output, lot.randint(1, STEPS - 10))):
        return False
    workers = workers_of(site)
    lot.choice(workers).send_signal(signal.SIGKILL)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    return True


def terminate_worker(site: Site, output: Path, log: Path, lot: random.Random, process: subprocess.Popen[bytes]) -> bool:
    if not wait_for(process, at_step(output, lot.randint(1, STEPS - 10))):
        return False
    lot.choice(workers_of(site)).send_signal(signal.SIGTERM)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    return True


def kill_driver(site: Site, output: Path, log: Path, lot: random.Random, process: subprocess.Popen[bytes]) -> bool:
    if not wait_for(process, at_step(output, lot.randint(1, STEPS // 2))):
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def terminate_driver(site: Site, output: Path, log: Path, lot: random.Random, process: subprocess.Popen[bytes]) -> bool:
    if not wait_for(process, at_step(output, lot.randint(1, STEPS // 2))):
        return False
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, log.read_text()[-3000:]
    assert "steps are done and kept; the same command continues" in log.read_text()
    return True


def kill_mid_checkpoint(
    site: Site, output: Path, log: Path, lot: random.Random, process: subprocess.Popen[bytes]
) -> bool:
    wait_for(process, at_step(output, lot.randrange(EVERY - 1, STEPS - 10, EVERY)))
    pid = first_worker(output)
    if not wait_for(process, lambda: unfinished(output), 0.0):
        return False
    os.kill(pid, signal.SIGKILL)
    came_in_time = bool(unfinished(output))
    assert process.wait(300) == 0, log.read_text()[-3000:]
    return came_in_time


def damage_checkpoint(
    site: Site, output: Path, log: Path, lot: random.Random, process: subprocess.Popen[bytes]
) -> bool:
    """The driver is killed, and the newest checkpoint turns out to be unreadable."""
    if not wait_for(process, at_step(output, lot.randint(3 * EVERY, STEPS // 2))):
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_gone(site)
    folder = running_folder(output)
    assert folder is not None
    path = next(checkpoint.complete(checkpoint.root_of(folder))[-1].glob("state-*"))
    content = bytearray(path.read_bytes())
    content[lot.randrange(len(content))] ^= 1 << lot.randrange(8)
    path.write_bytes(content)
    site.finish(output, log)
    assert "cannot be read (its content is not what was written). Going on from the one before it" in log.read_text()
    return True


def fill_disk_for_a_while(
    site: Site, output: Path, log: Path, lot: random.Random, process: subprocess.Popen[bytes]
) -> bool:
    """No room for a checkpoint, then again some: the run does not end."""
    if not wait_for(process, at_step(output, lot.randint(EVERY + 1, STEPS // 2))):
        return False
    filler = fill(output.parent, 1 << 20)
    came_in_time = wait_for(process, lambda: "could not be written (No space left" in log.read_text())
    filler.unlink()
    assert process.wait(300) == 0, log.read_text()[-3000:]
    return came_in_time


def fill_disk_to_the_end(
    site: Site, output: Path, log: Path, lot: random.Random, process: subprocess.Popen[bytes]
) -> bool:
    """No room for the model either: a sentence, and the same command continues."""
    if not wait_for(process, at_step(output, lot.randint(EVERY + 1, STEPS - EVERY))):
        return False
    filler = fill(output.parent, 1 << 20)
    code = process.wait(300)
    filler.unlink()
    assert code == 2, log.read_text()[-3000:]
    assert "has done all steps, but its model cannot be written" in log.read_text()
    return True


def wait_until_gone(site: Site) -> None:
    """A driver that was killed leaves its workers for a moment."""
    deadline = time.monotonic() + 60
    while workers_of(site) and time.monotonic() < deadline:
        time.sleep(0.1)


KINDS: list[Drill] = [
    kill_worker,
    kill_driver,
    kill_mid_checkpoint,
    terminate_worker,
    terminate_driver,
    damage_checkpoint,
    fill_disk_for_a_while,
    fill_disk_to_the_end,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whatever_fails_the_ledger_is_the_same(site: Site, disk: Path, tmp_path: Path, kind: Drill) -> None:
    lot = random.Random(kind.__name__)
    told: dict[str, Any] = {"kind": kind.__name__, "drills": DRILLS, "in time": 0, "steps repeated": [], "seconds": []}
    for drill in range(DRILLS):
        output, log, started = disk / f"drill-{drill}", tmp_path / f"{drill}.log", time.monotonic()
        output.mkdir()
        process = site.start(output, log)
        told["in time"] += kind(site, output, log, lot, process)
        if process.wait(300):
            wait_until_gone(site)
            site.finish(output, log, workers=lot.choice(["1", "2", "3"]))
        verdict = judge(site, output)
        lines = [len(attempt.steps) for attempt in verdict.attempts]
        told["steps repeated"].append(sum(lines) - STEPS)
        told.setdefault("attempts", []).append(len(lines))
        told["seconds"].append(round(time.monotonic() - started))
        shutil.rmtree(output)
    sys.stderr.write(json.dumps(told) + "\n")
    assert told["in time"] >= DRILLS * 0.7, "most of the failures came in time"


def test_a_picture_that_rots_in_the_middle_ends_with_its_key(site: Site, tmp_path: Path) -> None:
    """And once its file is what it was, the same command goes on."""
    data, output, log = tmp_path / "data", tmp_path / "out", tmp_path / "log"
    shutil.copytree(site.root / "parts", data / "parts")
    path = next((prepare_folder(data, rows()) / "data").glob("*.parquet"))
    whole = path.read_bytes()
    table = pq.read_table(path)
    made = table.to_pylist()
    row = next(row for row in made[12:] if row["images"] and row["split"] == "train" and row["status"] == "ok")
    row["images"][0]["bytes"] = row["images"][0]["bytes"][:200]
    pq.write_table(type(table).from_pylist(made, schema=table.schema), path, row_group_size=8)
    assert site.start(output, log, data=data).wait(300) == 2
    assert f"A picture of conversation {row['key']} in {path} cannot be decoded" in log.read_text()
    path.write_bytes(whole)
    site.finish(output, log, data=data)
    judge(site, output)
