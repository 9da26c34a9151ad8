"""Submit a stage with `ray job submit` and follow it until it ends."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyvlm.errors import ClusterError, StageError

POLL_S = 0.5
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class JobClient:
    """Where jobs go: the dashboard's address, the environment of the command, and the folder to ship with each job."""

    dashboard_url: str
    environment: Mapping[str, str]
    working_dir: Path | None
    """Uploaded with every job; None: the installed packages are used as they are."""

    def submit(self, stage: str, arguments: Sequence[str], job_environment: Mapping[str, str]) -> str:
        """`ray job submit … -- python -m ray_jobs.<stage> …`; returns the submission id.

        Raises:
            ClusterError: the cluster refused it.
        """
        submission_id = f"{stage}-{time.strftime('%H%M%S')}-{time.time_ns() % 1_000_000:06d}"
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait"),
            *("--address", self.dashboard_url, "--submission-id", submission_id),
            *(("--working-dir", str(self.working_dir)) if self.working_dir else ()),
            *("--runtime-env-json", json.dumps({"env_vars": dict(job_environment)})),
            *("--", "python", "-m", f"ray_jobs.{stage}", *arguments),
        ]
        answer = subprocess.run(command, env=dict(self.environment), capture_output=True, text=True)
        if answer.returncode != 0:
            lines = [line for line in _ANSI.sub("", answer.stdout + answer.stderr).splitlines() if line.strip()]
            raise ClusterError(f"`ray job submit` of {stage} was refused: {lines[-1] if lines else 'no reason given'}")
        return submission_id

    def info(self, submission_id: str) -> dict[str, Any]:
        """What Ray knows of a job: status, driver_exit_code, message …"""
        with urllib.request.urlopen(f"{self.dashboard_url}/api/jobs/{submission_id}", timeout=10) as answer:
            content: dict[str, Any] = json.load(answer)
            return content

    def logs(self, submission_id: str) -> str:
        """Everything the job's driver has printed, without colours."""
        with urllib.request.urlopen(f"{self.dashboard_url}/api/jobs/{submission_id}/logs", timeout=10) as answer:
            return _ANSI.sub("", str(json.load(answer).get("logs", "")))

    def follow(self, stage: str, submission_id: str, on_tick: Callable[[], None], log_path: Path) -> None:
        """Wait for a job; keep its log.

        Raises:
            StageError: it failed, with its own last words.
        """
        while (info := self.info(submission_id))["status"] in ("PENDING", "RUNNING"):
            on_tick()
            time.sleep(POLL_S)
        log = self.logs(submission_id)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.write_text(log)
        if info["status"] != "SUCCEEDED":
            raise StageError(f"{stage} ended as {info['status']}: {last_words(log, info)} (its log: {log_path})")


def last_words(log: str, info: Mapping[str, Any]) -> str:
    """The sentence that a failed stage ended with, else what Ray says of it."""
    for line in reversed(log.splitlines()):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    lines = [line.strip() for line in log.splitlines() if line.strip()] or [str(info.get("message") or "no output")]
    return lines[-1]


def command_line(stage: str, arguments: Sequence[str]) -> str:
    """The same stage as a person would type it."""
    return f"python -m ray_jobs.{stage} " + " ".join(shlex.quote(argument) for argument in arguments)
