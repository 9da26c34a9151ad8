"""Test conversations and a trained model ─▶ kept answers and their scores: `python -m ray_jobs.evaluate …`."""

from __future__ import annotations

from ray_jobs import _cli
from ray_jobs._cluster import StageResources
from tinyvlm.eval.answers import Evaluate
from tinyvlm.storage import require_disk


def run(job: _cli.Job) -> None:
    """The model answers: a GPU for each worker where the cluster has any."""
    require_disk("evaluate", *job.inputs, job.output)
    _cli.run_rows(job, Evaluate.from_recipe(job.recipe), StageResources(num_cpus=1, num_gpus=1, gpu_optional=True))


if __name__ == "__main__":
    _cli.main("evaluate", run)
