"""Pictures ─▶ square pictures of one size: `python -m ray_jobs.preprocess --input PLACE …`.

PLACE: a root with a download, a folder of picture files, WebDataset tars, Parquet with a column of pictures, or a
dataset of the Hugging Face hub; see `tinyvlm/data/pictures`.
"""

from __future__ import annotations

from ray_jobs import _cli
from ray_jobs._cluster import StageResources
from tinyvlm.data import hub
from tinyvlm.data.pictures import open_pictures, stage_given
from tinyvlm.data.preprocess import Preprocess


def run(job: _cli.Job) -> None:
    """Decoding and scaling keep one core busy for each worker."""
    stage, resources = Preprocess.from_recipe(job.recipe), StageResources(num_cpus=1)
    given = stage_given(job.inputs)
    if given:
        _cli.run_rows(job, stage.reading(given), resources)
    else:
        places = [hub.as_typed(path) for path in job.inputs]
        _cli.run_rows(job, stage, resources, lambda root: open_pictures(places, job.recipe.pictures, root))


if __name__ == "__main__":
    _cli.main("preprocess", run, extra=("--retry", "--takedown"))
