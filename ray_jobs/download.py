"""links ─▶ pictures as they were sent, or finished: `python -m ray_jobs.download --input links.parquet …`."""

from __future__ import annotations

from ray_jobs import _cli
from ray_jobs._cluster import StageResources
from tinyvlm.data.download import Download
from tinyvlm.data.links import open_links
from tinyvlm.errors import ConfigError


def run(job: _cli.Job) -> None:
    """One link list in, one download folder out."""
    if len(job.inputs) != 1:
        raise ConfigError(f"download wants one --input, the list of links, but got {len(job.inputs)}.")
    stage = Download.from_recipe(job.recipe)
    resources = StageResources(num_cpus=1)
    _cli.run_rows(job, stage, resources, lambda root: open_links(job.inputs[0], job.recipe.links, root))


if __name__ == "__main__":
    _cli.main("download", run, extra=("--retry", "--takedown", "--limit"))
