"""Downloaded originals ─▶ square pictures of one size: `python -m ray_jobs.preprocess …`."""

from __future__ import annotations

from ray_jobs import _cli
from ray_jobs._cluster import StageResources
from tinyvlm.data.preprocess import Preprocess


def run(job: _cli.Job) -> None:
    """Decoding and scaling keep one core busy for each worker."""
    _cli.run_rows(job, Preprocess.from_recipe(job.recipe), StageResources(num_cpus=1))


if __name__ == "__main__":
    _cli.main("preprocess", run, extra=("--retry",))
