"""Pictures ─▶ what is on them, as charts for a person: `python -m ray_jobs.explore …`.  Nothing reads its folder."""

from __future__ import annotations

from ray_jobs import _cli
from ray_jobs._cluster import StageResources
from tinyvlm.data.explore import Explore


def run(job: _cli.Job) -> None:
    """CLIP: a GPU for each worker where the cluster has any."""
    _cli.run_rows(job, Explore.from_recipe(job.recipe), StageResources(num_cpus=1, num_gpus=1, gpu_optional=True))


if __name__ == "__main__":
    _cli.main("explore", run, extra=("--retry",))
