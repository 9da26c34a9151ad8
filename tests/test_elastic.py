"""Long tests of a run between a fewest and a most workers: nodes go, come, and are about to be taken away."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_run_training import stage

from tinyvlm.train import ledger, metrics
from tinyvlm.train.run import TrainingRun

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

STEPS = 1200


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head with room for two workers; what is asked for every minute is asked for every few seconds."""
    import ray
    from ray.cluster_utils import Cluster

    from ray_jobs import _run_training

    monkeypatch.setattr(_run_training, "RESIZE_EVERY_S", 3.0)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "8")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def worlds(run: TrainingRun) -> list[int]:
    return [line["workers"] for line in metrics.read(run.folder / "metrics.jsonl").attempts]


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 150
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def in_background(do: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """A thread, and what it raised."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            do()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    return thread, failures


def steps_done(run: TrainingRun) -> int:
    return len(metrics.read(run.folder / "metrics.jsonl").steps)


def test_a_node_goes_and_another_comes(cluster: Any, tmp_path: Path) -> None:
    from ray_jobs import _run_training

    node = cluster.add_node(num_cpus=1)
    run = stage(tmp_path, steps=STEPS, epochs=2000, packs_per_step=6, checkpoint_every_steps=10, ledger=True)

    training, failures = in_background(lambda: _run_training.run_training(run, 3, 1))
    until(lambda: steps_done(run) >= 20)
    cluster.remove_node(node, allow_graceful=False)
    until(lambda: worlds(run)[-1] == 2)
    before = steps_done(run)
    until(lambda: steps_done(run) >= before + 20)
    cluster.add_node(num_cpus=1)  # in this thread, for a node takes signals
    training.join(300)
    assert failures == []
    assert worlds(run)[:3] == [3, 2, 3]
    verdict = ledger.judge(run.folder, STEPS)
    assert verdict.faults == []


def test_a_node_that_is_about_to_be_taken_costs_no_step(cluster: Any, tmp_path: Path) -> None:
    """As an autoscaler or a cloud tells it beforehand."""
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    from ray_jobs import _run_training

    node = cluster.add_node(num_cpus=1)
    run = stage(tmp_path, steps=STEPS // 2, epochs=2000, packs_per_step=6, checkpoint_every_steps=0, ledger=True)

    def drain() -> None:
        until(lambda: steps_done(run) >= 20)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + 60) * 1000)
        gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        accepted, said = gcs.drain_node(node.node_id, reason, "preemption", deadline_ms)
        assert accepted, said

    _, failures = in_background(drain)
    _run_training.run_training(run, 3, 1)
    assert failures == []
    assert len(worlds(run)) >= 2
    assert ledger.judge(run.folder, STEPS // 2).faults == []
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "rates" in line] == list(range(1, STEPS // 2 + 1))
