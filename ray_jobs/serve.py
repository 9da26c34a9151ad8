"""Deploy a model as an endpoint on Ray Serve: a web page and OpenAI's chat completions.

    python -m ray_jobs.serve --recipe tiny --input ROOT [--set serve.port=8000 ...] [--dry-run]

ROOT is a folder in which `instruct` has run, or a model folder itself.  On a cluster (`ray job submit`) the job ends as
soon as the endpoint answers, and the endpoint stays; the same command again replaces it without losing requests.  Where
this command starts a Ray of its own, it stays until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ray_jobs import _cli
from ray_jobs._cluster import connected
from tinyvlm import config
from tinyvlm.errors import CheckpointError, ClusterError, ConfigError
from tinyvlm.folders import find_folder
from tinyvlm.serve.settings import ServeConfig
from tinyvlm.storage import require_disk

APPLICATION = "tinyvlm"
START_TIMEOUT_S = 600.0
"""Generous: large models load slowly, and a failure is told long before."""
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30"}
"""Serve ends a proxy that is not up within 5 s, which on a busy laptop it is not."""
DEPLOYMENTS = ("ingress", "preprocess", "generate")

log = logging.getLogger(__name__)


def run(job: _cli.Job) -> None:
    """Deploy as the job asks, and stay where nothing else would keep the endpoint up."""
    settings, folder = job.recipe.serve, find_model(job.inputs)
    if job.dry_run:
        _cli.show_plan("serve", job, {"model_folder": str(folder), "resources": _resources(settings)})
        return
    stays_by_itself = bool(os.environ.get("RAY_ADDRESS", "").strip())
    if not stays_by_itself:
        require_free(settings)  # before a Ray is started for nothing
    with connected() as ray:
        url = deploy(ray, folder, settings)
        log.info("%s answers at %s", settings.model_name, url)
        if not stays_by_itself:
            log.info("Ctrl-C ends it")
            _wait_for_interrupt()


def find_model(inputs: Sequence[Path]) -> Path:
    """The model to serve: an input that is a model folder, else what `instruct` made in one of them.

    Raises:
        StageError: neither is there.
        CheckpointError: the stage folder has no model.
    """
    require_disk("serve", *inputs)
    for given in inputs:
        if (given / "config.json").is_file():
            return given.absolute()
    folder = find_folder(inputs, "instruct", "serve") / "model"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"serve wants the model of 'instruct', but {folder} is gone; run that stage again.")
    return folder.absolute()


def deploy(ray: Any, model_folder: Path, settings: ServeConfig) -> str:
    """Bring the endpoint up on the Ray that this process is connected to, and wait until it answers; gives its address.

    Raises:
        ConfigError: the port is taken by something else.
        ClusterError: the cluster is too small, or a deployment does not start; with Ray's reason.
    """
    from ray import serve

    from ray_jobs._deployments import application

    _require_room(ray, settings)
    # Serve waits a minute for its proxies and gives up; we see whether they come later, when we wait for the endpoint.
    with contextlib.suppress(TimeoutError):
        _open_port(serve, settings)
    target = serve.RunTarget(target=application(str(model_folder), settings), name=APPLICATION, route_prefix="/")
    with contextlib.suppress(TimeoutError):
        serve.run_many([target], wait_for_applications_running=False)
    deadline = time.monotonic() + START_TIMEOUT_S
    _wait_until_running(serve, deadline)
    url = address(settings)
    _wait_until_ready(url, deadline)
    return url


def address(settings: ServeConfig) -> str:
    """Where a browser on this machine finds the endpoint."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    return f"http://{host}:{settings.port}"


def require_free(settings: ServeConfig) -> None:
    """Raises ConfigError when something listens where the endpoint shall be."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigError(
                f"The endpoint wants {settings.host}:{settings.port}, but cannot have it ({error.strerror}); stop what "
                "holds it, or choose another with --set serve.port=8001."
            ) from None


def _open_port(serve: Any, settings: ServeConfig) -> None:
    """Have Serve listen where the settings say.  Its address is fixed at its start, so a new one needs a new start."""
    from ray.serve.context import _get_global_client  # no public call tells where a running Serve listens

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        listens = (client.http_config.host, client.http_config.port)
        if listens == (settings.host, settings.port):
            return
        others = sorted(set(serve.status().applications) - {APPLICATION})
        if others:
            raise ConfigError(
                f"The endpoint wants {settings.host}:{settings.port}, but this cluster's Serve listens at {listens[0]}:"
                f"{listens[1]} and holds {', '.join(others)}, too; use --set serve.host={listens[0]} --set "
                f"serve.port={listens[1]}, or end those."
            )
        require_free(settings)
        serve.shutdown()
    else:
        require_free(settings)
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": settings.host, "port": settings.port},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        controller_options={"runtime_env": {"env_vars": PATIENCE}},
    )


def _resources(settings: ServeConfig) -> dict[str, Any]:
    return {name: config.to_dict(getattr(settings, name)) for name in DEPLOYMENTS}


def _require_room(ray: Any, settings: ServeConfig) -> None:
    replicas = [getattr(settings, name) for name in DEPLOYMENTS]
    have = ray.cluster_resources()
    for kind, wanted in (
        ("CPU", sum(one.num_cpus * one.min_replicas for one in replicas)),
        ("GPU", sum(one.num_gpus * one.min_replicas for one in replicas)),
    ):
        if wanted > have.get(kind, 0.0) + 1e-6:
            raise ClusterError(
                f"serve wants {wanted:g} {kind} for its first replicas, but the cluster has {have.get(kind, 0.0):g}; "
                f"add nodes, or lower serve.generate.num_{kind.lower()}s."
            )


def _wait_until_running(serve: Any, deadline: float) -> None:
    while True:
        status = serve.status().applications[APPLICATION]
        if status.status == "RUNNING":
            return
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ClusterError(f"The endpoint did not start: {_reason(status)}")
        if time.monotonic() > deadline:
            raise ClusterError(f"The endpoint did not start in {START_TIMEOUT_S:.0f} s: {_reason(status)}")
        time.sleep(1.0)  # asking is not cheap: Ray answers with everything that it knows


def _reason(status: Any) -> str:
    """The last line of what Ray says about the deployment at fault."""
    messages = [f"{name}: {one.message}" for name, one in status.deployments.items() if one.message]
    lines = [line.strip() for line in (messages or [status.message or ""])[0].splitlines() if line.strip()]
    return f"{lines[0]} … {lines[-1]}" if len(lines) > 1 else (lines or ["Ray gives no reason."])[0]


def _wait_until_ready(url: str, deadline: float) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                if json.load(answer)["status"] == "ready":
                    return
            reason = "it is not ready"
        except (OSError, ValueError, KeyError) as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise ClusterError(f"The endpoint at {url} does not answer: {reason}")
        time.sleep(0.1)


def _wait_for_interrupt() -> None:
    """Until Ctrl-C or SIGTERM, which Ray would otherwise take for a crash."""

    def interrupt(signum: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    _cli.main("serve", run, writes=False)
