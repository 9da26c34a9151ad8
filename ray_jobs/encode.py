"""Pictures ─▶ pooled CLIP features, with 'image not available' pictures told apart: `python -m ray_jobs.encode …`."""

from __future__ import annotations

from ray_jobs import _cli
from ray_jobs._cluster import StageResources
from tinyvlm.data.encode import Encode


def run(job: _cli.Job) -> None:
    """CLIP: a GPU for each worker where the cluster has any."""
    _cli.run_rows(job, Encode.from_recipe(job.recipe), StageResources(num_cpus=1, num_gpus=1, gpu_optional=True))


if __name__ == "__main__":
    _cli.main("encode", run, extra=("--retry",))
