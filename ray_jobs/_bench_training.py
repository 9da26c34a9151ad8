"""What Ray costs a training run: its time to start, its share of a step, and how two workers compare with one.

    python -m ray_jobs._bench_training [--steps 200] [--workers 1,2] [--json]

    plain, half of the steps ──▶ Ray Train, all steps ──▶ plain, the other half      the same loop, steps, threads
    1 worker, then 2 workers with as many samples each                               (weak scaling)

Plain workers are processes joined by gloo, without Ray; its daemons are not there while they run.  The median step is
compared: other work on the machine moves the mean.  Each worker has one thread, and equally long samples.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyvlm.bench.training_work import Task

TOKENS, SAMPLES_PER_PACK, PACKS_PER_WORKER = 130, 7, 1
"""A step of the small model takes more than half a second with these on a core of 2024."""
WARM_UP = 2
TIMEOUT_S = 1800


def task(world: int, steps: int) -> Task:
    """Equally many samples for each worker."""
    from tinyvlm.bench.training_work import Task

    return Task(
        side="ours",
        lengths=str(TOKENS),
        samples=SAMPLES_PER_PACK * PACKS_PER_WORKER * world,
        steps=steps,
        warm_up=WARM_UP,
        pack_length=TOKENS * SAMPLES_PER_PACK,
        settings={"packs_per_batch": PACKS_PER_WORKER},
    )


def train(settings: Mapping[str, Any]) -> None:
    """One worker of a group that someone has joined; leaves when it began, and the seconds of its steps."""
    began = time.time()
    from tinyvlm.bench.training_sides import loop_of
    from tinyvlm.bench.training_work import Task
    from tinyvlm.train.collective import Group
    from tinyvlm.train.host import prepare_host

    prepare_host(1)
    group = Group()
    records = loop_of(Task(**settings["task"]), group)
    if group.rank == 0:
        first = records[0].time - records[0].seconds
        line = {"began": began, "first_step": first, "seconds": [record.seconds for record in records]}
        Path(settings["out"]).write_text(json.dumps(line | {"losses": [record.loss for record in records]}))


def plain(rank: int, world: int, settings: Mapping[str, Any]) -> None:
    """One process of a run without Ray."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{settings['store']}", rank=rank, world_size=world)
    train(settings)
    dist.destroy_process_group()


def run_plain(world: int, steps: int, folder: Path) -> dict[str, Any]:
    """Start the processes and wait for them."""
    out, store = folder / "plain.json", folder / "store"
    store.unlink(missing_ok=True)
    settings = {"task": asdict(task(world, steps)), "out": str(out), "store": str(store)}
    started = time.time()
    command = [sys.executable, "-m", "ray_jobs._bench_training", "--worker", json.dumps(settings)]
    place = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([*command, f"{rank}/{world}"], env=place) for rank in range(world)]
    codes = [worker.wait(TIMEOUT_S) for worker in workers]
    if any(codes):
        raise SystemExit(f"plain workers ended with {codes}")
    return {"started": started, **json.loads(out.read_text())}


def run_ray(world: int, steps: int, folder: Path) -> dict[str, Any]:
    """The same through Ray Train, on a cluster of its own."""
    from ray_jobs import _cluster

    out = folder / "ray.json"
    settings = {"task": asdict(task(world, steps)), "out": str(out)}
    started = time.time()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    with _cluster.connected():
        import ray.train
        import ray.train.torch

        connected = time.time()
        ray.train.torch.TorchTrainer(
            train,
            train_loop_config=settings,
            scaling_config=ray.train.ScalingConfig(num_workers=world, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name=f"bench-{world}-{steps}", storage_path=str(folder / "ray")),
        ).fit()
    return {"started": started, "connected": connected, **json.loads(out.read_text())}


def measure(steps: int, worlds: Sequence[int]) -> dict[str, Any]:
    """Each number of workers, with and without Ray; a row is told as soon as it is there."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tinyvlm-bench-") as name:
        folder = Path(name)
        for world in worlds:
            before = run_plain(world, steps // 2, folder)
            through = run_ray(world, steps, folder)
            after = run_plain(world, steps - steps // 2, folder)
            without = before["seconds"][WARM_UP:] + after["seconds"][WARM_UP:]
            rows.append(_row(world, without, through))
            sys.stderr.write(f"{json.dumps(rows[-1])}\n")
    for row in rows:
        row["weak_scaling"] = round(row["samples_per_s"] / row["workers"] / rows[0]["samples_per_s"], 4)
    return {"steps": steps, "tokens": TOKENS, "rows": rows}


def _row(world: int, without: Sequence[float], through: Mapping[str, Any]) -> dict[str, Any]:
    steps = through["seconds"][WARM_UP:]
    plain_s, ray_s = statistics.median(without), statistics.median(steps)
    return {
        "workers": world,
        "plain_step_s": round(plain_s, 4),
        "ray_step_s": round(ray_s, 4),
        "plain_mean_s": round(statistics.fmean(without), 4),
        "ray_mean_s": round(statistics.fmean(steps), 4),
        "overhead": round(ray_s / plain_s - 1, 4),
        "overhead_of_means": round(statistics.fmean(steps) / statistics.fmean(without) - 1, 4),
        "cluster_start_s": round(through["connected"] - through["started"], 1),
        "workers_start_s": round(through["began"] - through["connected"], 1),
        "first_step_s": round(through["first_step"] - through["began"], 1),
        "start_s": round(through["first_step"] - through["started"], 1),
        "samples_per_s": round(SAMPLES_PER_PACK * PACKS_PER_WORKER * world / ray_s, 3),
    }


def as_text(result: Mapping[str, Any]) -> str:
    """A table for a person."""
    head = ["workers", "plain step", "through Ray", "overhead", "start: cluster", "workers", "first step", "in all"]
    head += ["samples/s", "weak scaling"]
    lines = [f"{result['steps']} steps, samples of {result['tokens']} tokens, medians", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        cells = [
            str(row["workers"]),
            f"{row['plain_step_s']:.3f} s",
            f"{row['ray_step_s']:.3f} s",
            f"{row['overhead']:+.1%} (means {row['overhead_of_means']:+.1%})",
            *(f"{row[name]:.1f} s" for name in ("cluster_start_s", "workers_start_s", "first_step_s", "start_s")),
            f"{row['samples_per_s']:.2f}",
            f"{row['weak_scaling']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Measure and print; with --worker, be one plain process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of each measurement (200)")
    parser.add_argument("--workers", default="1,2", metavar="N,N", help="numbers of workers (1,2)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        rank, world = map(int, options.worker[1].split("/"))
        plain(rank, world, json.loads(options.worker[0]))
        return
    result = measure(options.steps, [int(number) for number in options.workers.split(",")])
    sys.stdout.write((json.dumps(result, indent=2) if options.json else as_text(result)) + "\n")


if __name__ == "__main__":
    # Under its own name: Ray sends `train` to its workers, who import it from there.
    from ray_jobs._bench_training import main as bench

    bench(sys.argv[1:])
