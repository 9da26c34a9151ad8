"""Pictures and their texts ─▶ conversations to train and test on: `python -m ray_jobs.prepare …`."""

from __future__ import annotations

from ray_jobs import _cli
from ray_jobs._cluster import StageResources
from tinyvlm.data.prepare import Prepare


def run(job: _cli.Job) -> None:
    """Text work: one core for each worker."""
    _cli.run_rows(job, Prepare.from_recipe(job.recipe), StageResources(num_cpus=1))


if __name__ == "__main__":
    _cli.main("prepare", run)
