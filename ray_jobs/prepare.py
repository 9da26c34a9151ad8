"""A dataset ─▶ conversations to train and test on: `python -m ray_jobs.prepare --input PLACE … --set prepare.source=…`.

PLACE: for sources about the line's own pictures a root with an encode (or preprocess) folder; for `folder` what
`preprocess` reads; for the others the dataset's files, a folder of them, here or in an object store, or a dataset of
the Hugging Face hub.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ray_jobs import _cli
from ray_jobs._cluster import StageResources
from tinyvlm.data.prepare import Prepare
from tinyvlm.data.prepare_input import chosen, makes_folders, open_prepare, reading
from tinyvlm.folders import Input


def run(job: _cli.Job) -> None:
    """Words, and decoding of pictures that are not finished yet: one core for each worker."""
    recipe = replace(job.recipe, prepare=chosen(job.recipe.prepare, job.inputs))
    stage = reading(Prepare.from_recipe(recipe), job.inputs)

    def open_rows(root: Path) -> Input:
        return open_prepare(stage, job.inputs, root)

    job = replace(job, recipe=recipe)
    _cli.run_rows(job, stage, StageResources(num_cpus=1), open_rows if makes_folders(stage) else None)


if __name__ == "__main__":
    _cli.main("prepare", run)
