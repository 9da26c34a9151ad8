"""What all tests share: a clean environment, and a local Ray of the tests' own."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

# Before any library is imported: these are read once.
os.environ.pop("RAY_ADDRESS", None)
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_USAGE_STATS_ENABLED="0",
    # For the processes that tests start, Ray's workers among them: the checkout, and the stages of toy_stages.py.
    PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
)

_FOREIGN = ("TINYVLM_", "RAY_ADDRESS", "RAY_JOB_", "HF_TOKEN", "WANDB_", "OPENAI_")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the person who runs the tests decides how they end."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN) or name.lower() in _PROXIES:
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    """The module `ray`, connected to a local cluster that lives as long as the test file."""
    pytest.importorskip("ray")
    from ray_jobs import _cluster

    assert "RAY_ADDRESS" not in os.environ, "the tests would join somebody's cluster"
    with _cluster.connected() as ray:
        yield ray


@pytest.fixture
def python() -> list[str]:
    """The command of a fresh interpreter that can import this checkout."""
    return [sys.executable, "-u"]


@pytest.fixture(scope="session")
def object_store() -> Iterator[None]:
    """An S3 of the tests' own on this machine, which the environment points to."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "the-tests-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "the-tests-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    server.stop()


@pytest.fixture
def bucket(object_store: None) -> Path:
    """An empty bucket of `object_store`."""
    from tinyvlm.storage import address

    place: Any = address(f"s3://test-{uuid.uuid4().hex}")
    place.fs.mkdir(place.path)
    return place


@pytest.fixture
def quick_metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray of our own that reports every second instead of every ten."""
    pytest.importorskip("ray")
    from ray_jobs import _cluster

    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    with _cluster.connected() as ray:
        yield ray
