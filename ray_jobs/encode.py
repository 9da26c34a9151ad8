"""Pictures ─▶ pooled CLIP features, with 'image not available' pictures told apart: `python -m ray_jobs.encode …`.

A run that differs from a finished one in `encode.placeholder_threshold` alone encodes nothing again.
"""

from __future__ import annotations

import logging

from ray_jobs import _cli
from ray_jobs._cluster import StageResources
from tinyvlm.data.encode import Encode
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun

log = logging.getLogger(__name__)


def run(job: _cli.Job) -> None:
    """CLIP: a GPU for each worker where the cluster has any."""
    stage = Encode.from_recipe(job.recipe)
    source = open_input(stage, job.inputs)
    asked = StageRun(stage, source, job.output)
    stage.earlier = None if asked.is_finished else stage.find_earlier(job.output, source)
    if stage.earlier is not None:
        log.info("encode takes features and similarities from %s", stage.earlier)
    num_gpus = 0 if stage.earlier is not None and job.recipe.encode.placeholder_threshold is not None else 1
    _cli.run_rows(job, stage, StageResources(num_cpus=1, num_gpus=num_gpus, gpu_optional=True))


if __name__ == "__main__":
    _cli.main("encode", run, extra=("--retry",))
