"""The command line of the stages, and the same contract over Ray Data."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_stages import Double, DoubleConfig, Spread, rows_of, start, write_numbers

from ray_jobs import _cli, _cluster
from ray_jobs._cluster import StageResources
from ray_jobs._run_stage import MAX_ATTEMPTS, PartWorker, plan, run_stage
from tinyvlm.errors import ClusterError, ConfigError, StageError
from tinyvlm.lease import Lease
from tinyvlm.recipes import RECIPES
from tinyvlm.stage_run import run_local

SMALL = StageResources(num_cpus=0.5)


def double(**settings: Any) -> Double:
    return Double(DoubleConfig(**settings))


# --- over Ray


@pytest.mark.ray
def test_both_roads_make_the_same_folder(local_ray: Any, tmp_path: Path) -> None:
    stage = Spread(DoubleConfig())
    write_numbers(tmp_path, num_parts=5)
    local = start(tmp_path, stage, tmp_path / "local")
    over_ray = start(tmp_path, stage, tmp_path / "ray")
    one, other = run_local(local), run_stage(over_ray, 2, SMALL)

    assert over_ray.folder.name == local.folder.name
    assert rows_of(over_ray) == rows_of(local)
    assert other.identity == one.identity, "the stored bytes of all columns but the measured ones"
    assert (other.statuses, other.rows_in, other.rows_out) == (one.statuses, one.rows_in, one.rows_out)
    names = {path.name for path in over_ray.folder.iterdir()}
    assert names - {path.name for path in local.folder.iterdir()} == {"progress.json"}
    progress = json.loads((over_ray.folder / "progress.json").read_text())
    assert (progress["state"], progress["parts_done"], progress["rows"]) == ("done", 5, 20)


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_its_part_done_again(local_ray: Any, tmp_path: Path) -> None:
    write_numbers(tmp_path)
    stage = double(fault="kill", fault_key=11, once=str(tmp_path / "killed"))
    run = start(tmp_path, stage)
    manifest = run_stage(run, 2, SMALL)
    assert (tmp_path / "killed").exists()
    assert manifest.rows_out == 16
    assert not list(run.folder.rglob(".*")), "neither half parts nor counts of attempts are left"


@pytest.mark.ray
def test_a_stage_that_raises_says_one_sentence_and_continues(local_ray: Any, tmp_path: Path) -> None:
    write_numbers(tmp_path)
    stage = double(fault="raise", fault_key=11, once=str(tmp_path / "raised"))
    run = start(tmp_path, stage)
    with pytest.raises(StageError) as caught:
        run_stage(run, 1, SMALL)
    assert str(caught.value).startswith("double failed in part 2 (RuntimeError: the toy broke);")
    assert "the toy broke\nand said more" in (run.folder / "error.txt").read_text()
    assert json.loads((run.folder / "progress.json").read_text())["state"] == "stopped"
    before = {path.name: path.stat().st_mtime_ns for path in (run.folder / "data").glob("part-*.parquet")}
    assert before

    assert run_stage(run, 1, SMALL).rows_out == 16
    assert not (run.folder / "error.txt").exists()
    after = {path.name: path.stat().st_mtime_ns for path in (run.folder / "data").glob("part-*.parquet")}
    assert {name: after[name] for name in before} == before


@pytest.mark.ray
def test_what_the_cluster_cannot_give_is_refused_before_anything_is_written(local_ray: Any, tmp_path: Path) -> None:
    write_numbers(tmp_path / "in")
    run = start(tmp_path / "in", double(), tmp_path / "out")
    cases = [
        (
            4,
            StageResources(num_cpus=3),
            r"wants 4 workers of 3 CPU, but .* 8 CPU .*room for 2 of them; use --workers 2",
        ),
        (None, StageResources(num_cpus=1, num_gpus=1), r"no node .* can ever give that: it has 8 CPU, 0 GPU"),
        (None, StageResources(num_cpus=64), "no node"),
        (1, StageResources(memory=2**50), "no node"),
    ]
    for workers, resources, complaint in cases:
        with pytest.raises(ClusterError, match=complaint):
            run_stage(run, workers, resources)
    assert not (tmp_path / "out").exists()
    gpu = StageResources(num_cpus=1, num_gpus=1, gpu_optional=True)
    assert _cluster.without_missing_gpu(local_ray, "double", gpu) == StageResources(num_cpus=1)
    assert _cluster.pool_size(local_ray, "double", None, 1, StageResources()) == 1, "no more workers than parts"
    assert 1 <= _cluster.pool_size(local_ray, "double", None, 99, StageResources()) <= 8


@pytest.mark.ray
def test_a_second_driver_over_ray_is_refused(local_ray: Any, tmp_path: Path) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, double())
    with Lease.take(run.folder), pytest.raises(StageError, match="in use by process"):
        run_stage(run, 1, SMALL)


@pytest.mark.ray
def test_storage_that_a_node_does_not_see_is_refused(
    local_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = local_ray.nodes()
    monkeypatch.setattr(local_ray, "nodes", lambda: nodes * 2)
    _cluster.require_shared(local_ray, tmp_path / "not yet")
    real_get = local_ray.get
    monkeypatch.setattr(local_ray, "get", lambda answer, timeout: real_get(answer) and False)
    with pytest.raises(ClusterError, match=r"cannot be seen from .* of 2 nodes"):
        _cluster.require_shared(local_ray, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_finished_stage_needs_no_ray(tmp_path: Path, python: list[str]) -> None:
    write_numbers(tmp_path)
    run_local(start(tmp_path, double()))
    code = (
        "import sys, toy_stages; from pathlib import Path; from ray_jobs._run_stage import *\n"
        "stage = toy_stages.Double(toy_stages.DoubleConfig())\n"
        f"run_stage(toy_stages.start(Path({str(tmp_path)!r}), stage), None, StageResources())\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([*python, "-c", code], check=True)


# --- reaching a cluster


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("127.0.0.1:1", r"There is no Ray at RAY_ADDRESS=127\.0\.0\.1:1 .*unset it for a local Ray"),
        ("ray://127.0.0.1:1", "There is no Ray at"),
        ("nonsense", "There is no Ray at"),
        ("http://127.0.0.1:8265", r"is an address for `ray job submit`, not for the program it runs"),
    ],
)
def test_a_wrong_address_is_told_at_once(address: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=complaint):
        _cluster.check_address()


def test_without_ray_installed_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"pip install 'tinyvlm\[ray\]'"):
        _cluster.check_address()


# --- the command line


def test_there_are_these_options_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _cli.parse("encode", ["--help"], extra=("--retry", "--limit"))
    assert caught.value.code == 0
    words = capsys.readouterr().out.replace("[", " ").replace("]", " ").replace(",", " ").split()
    assert {word for word in words if word.startswith("--")} == {
        "--recipe", "--input", "--output", "--set", "--workers", "--dry-run", "--help", "--retry", "--limit",
    }  # fmt: skip


def test_a_command_line_becomes_a_job(tmp_path: Path) -> None:
    argv = ["--recipe", "tiny", "--input", str(tmp_path), "--input", "b", "--output", "out", "--workers", "3"]
    job = _cli.parse("encode", [*argv, "--set", "encode.num_image_tokens=16", "--dry-run"])
    assert job.inputs == (tmp_path, Path("b").absolute())
    assert (job.output, job.workers, job.dry_run) == (Path("out").absolute(), 3, True)
    assert job.recipe == RECIPES["tiny"]()


GOOD = {"--recipe": "tiny", "--input": "{root}", "--output": "{root}/out"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"--recipe": "tinny"}, "There is no recipe 'tinny'; choose one of tiny"),
        ({"--recipe": "none.json"}, "There is no recipe file none.json"),
        ({"--recipe": "{root}/broken.json"}, "is no JSON"),
        ({"--recipe": None}, "preprocess wants --recipe"),
        ({"--output": None}, "preprocess wants --output"),
        ({"--input": None}, "preprocess wants --input"),
        ({"--input": "{root}/nowhere"}, "There is nothing at"),
        ({"--input": "{root}/broken.json"}, "is neither .tar nor .parquet"),
        ({}, "see `python -m ray_jobs.download`"),
        ({"--set": "encode.num_image_tokns=1"}, "did you mean 'encode.num_image_tokens'?"),
        ({"--set": "picture.size=big"}, "picture.size wants int but got 'big'"),
        ({"--set": "picture.size"}, "wants name=value"),
        ({"--workers": "0"}, "wants a whole number from 1 up, but got '0'"),
        ({"--workers": "many"}, "but got 'many'"),
        ({"--wokers": "2"}, "There is no option '--wokers'; did you mean --workers?"),
        ({"--outp": "x"}, "did you mean --output?"),
    ],
)
def test_a_bad_command_line_gives_one_sentence_and_writes_nothing(
    changes: dict[str, str | None],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ray_jobs import preprocess

    (tmp_path / "broken.json").write_text("{")
    options = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    argv = [piece.format(root=tmp_path) for pair in options.items() for piece in pair]
    monkeypatch.setattr(sys, "argv", ["preprocess", *argv])
    with pytest.raises(SystemExit) as caught:
        _cli.main("preprocess", preprocess.run)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert complaint in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "error: double was interrupted; the same command continues.\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: double stopped: Permission denied (/x).\n"),
        (ConfigError("one\nsentence"), 2, "error: one sentence\n"),
    ],
)
def test_how_a_stage_ends(
    trouble: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def run(job: _cli.Job) -> None:
        raise trouble

    monkeypatch.setattr(sys, "argv", ["x", "--recipe", "tiny", "--input", str(tmp_path), "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        _cli.main("double", run)
    assert (caught.value.code, capsys.readouterr().err) == (code, said)


def test_a_dry_run_prints_recipe_plan_and_resources_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_numbers(tmp_path / "in")
    job = _cli.Job(RECIPES["tiny"](), (tmp_path / "in",), tmp_path / "out", None, True)
    assert _cli.run_rows(job, double(), SMALL) is None
    shown = json.loads(capsys.readouterr().out)
    assert shown["recipe"]["name"] == "tiny"
    assert shown["plan"]["folder"].startswith(str(tmp_path / "out" / "double-"))
    assert (shown["plan"]["parts"], shown["plan"]["parts_done"], shown["plan"]["finished"]) == (4, 0, False)
    assert shown["resources"]["each"]["num_cpus"] == 0.5
    assert not (tmp_path / "out").exists()
    run = start(tmp_path / "in", double(), tmp_path / "out")
    run_local(run)
    assert plan(run, None, SMALL)["plan"]["finished"]


def test_an_input_that_is_written_first_is_not_written_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a list of links: no folder of it, when the stage behind it cannot run."""
    opened: list[Path] = []
    open_rows: Callable[[Path], Any] = opened.append
    job = _cli.Job(RECIPES["tiny"](), (tmp_path,), tmp_path / "out", None, False)
    with pytest.raises(ConfigError):
        _cli.run_rows(job, double(fault="check"), SMALL, open_rows)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError):
        _cli.run_rows(job, double(), SMALL, open_rows)
    assert opened == []
    assert not (tmp_path / "out").exists()


def test_a_library_that_another_thread_is_importing_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, double())
    worker = PartWorker(pickle.dumps(run.for_worker(1)), Lease.take(run.folder).number, 1)
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    answer = json.loads(worker({"part": [json.dumps(dataclasses.asdict(run.source.parts[0]))]})["answer"][0])
    assert answer["rows_in"] == 4


def test_whatever_a_worker_meets_comes_back_as_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, double())
    worker = PartWorker(pickle.dumps(run.for_worker(1)), Lease.take(run.folder).number, 1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ray_jobs._run_stage.storage.touch", full)
    answer = json.loads(worker({"part": [json.dumps(dataclasses.asdict(run.source.parts[0]))]})["answer"][0])
    assert "No space left on device" in answer["error"]


def test_a_part_that_kills_every_worker_ends_the_run(tmp_path: Path) -> None:
    """Ray alone would start new workers for ever."""
    write_numbers(tmp_path)
    run = start(tmp_path, double())
    part = {"part": [json.dumps(dataclasses.asdict(run.source.parts[2]))]}
    worker = PartWorker(pickle.dumps(run.for_worker(1)), Lease.take(run.folder).number, 1)
    names = [f".part-00002.parquet.attempt{number}.tmp" for number in range(MAX_ATTEMPTS)]
    attempts = [run.folder / "data" / name for name in names]
    attempts[0].parent.mkdir()
    for path in attempts[:-1]:
        path.touch()
    assert json.loads(worker(part)["answer"][0])["rows_in"] == 4
    assert not any(path.exists() for path in attempts), "done, so no longer counted"
    for path in attempts:
        path.touch()
    answer = json.loads(worker(part)["answer"][0])
    assert answer["error"].startswith(f"double lost {MAX_ATTEMPTS} workers in part 2 (")
    assert "fewer --workers" in answer["error"]


def test_a_worker_that_cannot_load_the_stage_says_so_in_one_sentence() -> None:
    part = json.dumps({"index": 0, "path": "x", "offset": 0, "num_rows": 1})
    answer = json.loads(PartWorker(b"no pickle", 1, 1)({"part": [part]})["answer"][0])
    assert answer["kind"] == "StageError"
    assert answer["error"].startswith("The workers cannot load the stage (")
    assert "--working-dir" in answer["error"]
