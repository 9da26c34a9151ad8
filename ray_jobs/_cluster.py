"""Reach a Ray cluster and see, before anything is written, whether it can give what a stage needs.

    RAY_ADDRESS set (as inside `ray job submit`)  ─▶ that cluster, and no other
    not set                                       ─▶ a local Ray of our own, on loopback only, ended afterwards

A cluster that happens to run on this machine is never joined unasked: it may be somebody else's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyvlm.errors import ClusterError
from tinyvlm.storage import is_object

LOCAL_CPUS = 8
"""Logical CPUs of a local Ray: pools ask for fractions of them, and must fit beside Ray's own actors."""
LOCAL_STORE_BYTES = 256 * 1024**2
CONNECT_TIMEOUT_S = 5.0
FREE_TIMEOUT_S = 15.0
"""How long to wait for what the job before is just giving back."""

LOCAL_ENVIRONMENT = {
    # A cluster and a driver that disagree about token authentication hang Ray Data without a word.
    "RAY_AUTH_MODE": "disabled",
    # Keeps every listener on 127.0.0.1.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResources:
    """What each worker of a stage asks of the cluster."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory: int = 0
    """Bytes of main memory; 0 asks for none in particular."""
    gpu_optional: bool = False
    """True: on a cluster without any GPU the stage runs on CPUs."""

    @property
    def demand(self) -> dict[str, float]:
        """As Ray counts it, without zeros."""
        asked = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": float(self.memory)}
        return {name: amount for name, amount in asked.items() if amount}

    def __str__(self) -> str:
        memory = f", {self.memory / 1024**3:.1f} GiB" if self.memory else ""
        gpus = f", {self.num_gpus:g} GPU" if self.num_gpus else ""
        return f"{self.num_cpus:g} CPU{gpus}{memory}"


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """The `ray` module, connected as the drawing above says; what was started here is ended here.

    Raises:
        ClusterError: Ray is not installed, or the address does not lead to a cluster.
    """
    address = check_address()
    if address:
        with _environment({"RAY_BACKEND_LOG_LEVEL": "fatal"}), _initialised({"address": address}) as ray:
            yield ray
        return
    # The path of Ray's sockets must stay under 107 bytes, so this cannot live in the output folder.
    folder = tempfile.mkdtemp(prefix="tinyvlm-ray-")
    options = {
        "address": "local",
        "num_cpus": LOCAL_CPUS,
        "object_store_memory": LOCAL_STORE_BYTES,
        "include_dashboard": False,
        "_temp_dir": folder,
    }
    try:
        local = {**LOCAL_ENVIRONMENT, "RAY_BACKEND_LOG_LEVEL": "fatal"}
        with _environment(local), _initialised(options) as ray:
            yield ray
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pool_size(ray: Any, stage: str, workers: int | None, num_parts: int, resources: StageResources) -> int:
    """How many workers to start: those asked for, or by default as many as are useful and fit.

    Raises:
        ClusterError: the cluster cannot give them, ever or within a moment.
    """
    useful = min(workers or _default_workers(ray, resources), num_parts)
    most = _fitting(_totals(ray), resources)
    if most < (useful if workers else 1):
        have = _sum(_totals(ray))
        raise ClusterError(
            f"{stage} wants {useful} workers of {resources}, but the cluster has {_words(have, resources)} and room "
            f"for {most} of them; use --workers {most} or add nodes."
            if most
            else f"{stage} wants workers of {resources}, but no node of the cluster can ever give that: it has "
            f"{_words(have, resources)}; add a node that can."
        )
    useful = min(useful, most)
    deadline = time.monotonic() + FREE_TIMEOUT_S
    while (free := _fitting(_free(ray), resources)) < useful and time.monotonic() < deadline:
        time.sleep(0.25)
    if free < (useful if workers else 1):
        raise ClusterError(
            f"{stage} wants {useful} workers of {resources}, but other jobs leave room for {free}; wait for them"
            f"{f', or use --workers {free}' if free else ''}."
        )
    return min(useful, free)


def without_missing_gpu(ray: Any, stage: str, resources: StageResources) -> StageResources:
    """The same without GPU, where it is optional and the cluster has none."""
    if resources.num_gpus and resources.gpu_optional and not _sum(_totals(ray)).get("GPU"):
        log.info("%s: the cluster has no GPU, working on CPUs", stage)
        return StageResources(resources.num_cpus, 0.0, resources.memory)
    return resources


def threads_per_worker(ray: Any, size: int, resources: StageResources) -> int:
    """So many that the workers of one machine do not fight for its cores, and leave none idle."""
    fair = _local_cores() // size if len(_totals(ray)) == 1 else 0
    return max(1, int(resources.num_cpus), fair)


def require_shared(ray: Any, root: Path) -> None:
    """Raises ClusterError when some node does not see what this one writes to `root`; an object store is for all."""
    if is_object(root):
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = root.absolute()
    while not place.exists():
        place = place.parent
    probe = place / f".probe.{uuid.uuid4().hex}.tmp"
    probe.touch()
    try:
        look = ray.remote(num_cpus=0)(lambda path: Path(path).exists())
        asked = {
            node["NodeManagerAddress"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(str(probe))
            for node in nodes
        }
        blind = [address for address, answer in asked.items() if not ray.get(answer, timeout=60)]
    finally:
        probe.unlink(missing_ok=True)
    if blind:
        raise ClusterError(
            f"{place} cannot be seen from {len(blind)} of {len(nodes)} nodes (first {blind[0]}); "
            "give an --output on storage that all nodes share."
        )


@contextlib.contextmanager
def _initialised(options: Mapping[str, Any]) -> Iterator[Any]:
    import ray

    if ray.is_initialized():  # a caller's, who also ends it
        yield ray
        return
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises a dozen kinds here; each means that there is no cluster for us
        raise ClusterError(f"Ray at {options['address']!r} did not accept us: {_first_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_address() -> str:
    """The cluster's address, or "" for a Ray of our own.

    Raises:
        ClusterError: no Ray is installed, or none is at that address.  Told at once: Ray would try for a minute.
    """
    if importlib.util.find_spec("ray") is None:
        raise ClusterError("This stage needs Ray, which is not installed; run `pip install 'tinyvlm[ray]'`.")
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address not in ("", "auto", "local"):
        _require_reachable(address)
    if address and "RAY_AUTH_MODE" not in os.environ and Path("~/.ray/auth_token").expanduser().exists():
        log.warning("RAY_AUTH_MODE is not set; if this hangs, set it to what the cluster was started with.")
    return "" if address == "local" else address


def _require_reachable(address: str) -> None:
    hint = "set RAY_ADDRESS to the host:port of a running cluster, or unset it for a local Ray"
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS={address} is an address for `ray job submit`, not for the program it runs; {hint}."
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(f"There is no Ray at RAY_ADDRESS={address} ({_first_line(error)}); {hint}.") from None


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _local_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _totals(ray: Any) -> list[dict[str, float]]:
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _free(ray: Any) -> list[dict[str, float]]:
    from ray._private import state  # no public call tells it by node

    by_node: Any = getattr(state, "available_resources_per_node")()  # noqa: B009 (untyped)
    return [dict(free) for free in by_node.values()]


def _sum(nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU", "memory")}


def _fitting(nodes: Sequence[Mapping[str, float]], resources: StageResources) -> int:
    """Workers that fit, each whole on one node."""
    return sum(
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in resources.demand.items()) for node in nodes
    )


def _default_workers(ray: Any, resources: StageResources) -> int:
    """One for each GPU share where GPUs are asked for; else one for each core that really exists."""
    have = _sum(_totals(ray))
    if resources.num_gpus:
        return max(1, int(have["GPU"] / resources.num_gpus))
    cores = min(have["CPU"], _local_cores()) if len(_totals(ray)) == 1 else have["CPU"]
    return max(1, int(cores / max(resources.num_cpus, 1e-3)))


def _words(have: Mapping[str, float], resources: StageResources) -> str:
    parts = [f"{have['CPU']:g} CPU"]
    if resources.num_gpus:
        parts.append(f"{have['GPU']:g} GPU")
    if resources.memory:
        parts.append(f"{have['memory'] / 1024**3:.1f} GiB")
    return ", ".join(parts)
