"""The download over Ray: one worker, two workers and no Ray make the same rows, and each link is asked for once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_download_resume import ROWS, Web, download, rows_of, write_list

from ray_jobs._cluster import StageResources
from ray_jobs._run_stage import run_stage
from tinyvlm.folders import Manifest
from tinyvlm.stage_run import run_local
from tinyvlm.takedown import Takedown
from tinyvlm.toy.web_server import running

pytestmark = pytest.mark.ray


def test_one_worker_two_workers_and_no_ray_make_the_same_rows(local_ray: Any, tmp_path: Path) -> None:
    site = Web()
    tables: list[pa.Table] = []
    with running(site.app) as base_url:
        links = write_list(tmp_path / "links.jsonl", base_url)
        for workers in (0, 1, 2):
            site.asked.clear()
            Takedown(hosts=frozenset(["no.test"]), links=frozenset([f"{base_url[7:]}/3.jpg"])).add_to(
                tmp_path / str(workers)
            )
            run = download(tmp_path / str(workers), links)
            if workers:
                run_stage(run, workers, StageResources(num_cpus=1))
            else:
                run_local(run)
            tables.append(rows_of(run))
            assert Manifest.read(run.folder).rows_out == ROWS
            assert set(site.asked.values()) == {1}
            assert "3.jpg" not in site.asked
            assert Manifest.read(run.folder).statuses["optout.takedown"] == 2, "it stands in the list twice"
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    assert any(tables[0]["image"].is_valid().to_pylist())
