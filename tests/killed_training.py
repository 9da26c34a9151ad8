"""Training in processes that are killed: a server that has imported everything once forks workers, joined by gloo.

    test ──one case a line──▶ server ──fork──▶ worker 0 … n-1: carry_out(run) ──▶ SIGKILL at a chosen point, or the end

A worker that dies takes the others with it, as Ray would end them.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from tinyvlm.train import checkpoint, optim, worker
from tinyvlm.train.collective import Alone, Collective, Group
from tinyvlm.train.loop import Trainer
from tinyvlm.train.run import TrainingRun

FINISHED, KILLED, FAILED = "finished", "killed", "failed"

POINTS = ("entering", "computed", "updated", "copied", "writing", "written", "evaluating")
"""Where a worker can die: the ledger has the step; gradients are there; weights have changed; a checkpoint was given to
its writer; half of its file is written; all but `done.json` is; the held-out loss is being measured."""


@dataclass(frozen=True)
class Case:
    """`run` on `world` workers; worker `rank` dies at `point` of step `at` (from 0), if it ever gets there."""

    run: TrainingRun
    world: int = 1
    point: str = ""
    at: int = -1
    rank: int = 0
    sabotage: str = ""
    """`step+1`, `step-1`, `data+1`: a resume that is off by one."""
    after_s: float = 0.0
    """Instead of a point: all workers die after so many seconds of work."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _before(owner: Any, name: str, do: Callable[..., None]) -> None:
    """Have something done before a function is called."""
    function = getattr(owner, name)

    def replaced(*arguments: Any, **named: Any) -> Any:
        do(*arguments)
        return function(*arguments, **named)

    setattr(owner, name, replaced)


def _after(owner: Any, name: str, do: Callable[..., None]) -> None:
    function = getattr(owner, name)

    def replaced(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        do(*arguments)
        return result

    setattr(owner, name, replaced)


def _arm(case: Case) -> None:
    """Have this worker die where the case says.  It is a forked process, so nobody else is changed."""
    now = {"step": -1, "written": -1}

    def if_due(*_: Any) -> None:
        if now["step"] == case.at:
            die()

    def begins(trainer: Trainer, *_: Any) -> None:
        now["step"] = trainer.steps_done

    _before(Trainer, "_step", begins)
    if case.point == "entering":
        _before(worker.Trainer, "_loss", if_due)
    elif case.point == "computed":
        _before(optim.Gradients, "normalise", if_due)
    elif case.point == "updated":
        _after(Trainer, "_step", if_due)
    elif case.point == "copied":
        _after(checkpoint.Writer, "save", if_due)
    elif case.point == "writing":  # the writer may be behind the loop: what counts is the step that it writes
        _before(checkpoint, "_write", lambda path, state: now.update(written=state["steps_done"] - 1))
        is_due = lambda file: now["written"] == case.at and file.size > 10_000  # noqa: E731
        _after(checkpoint._Hashing, "write", lambda file, *_: die() if is_due(file) else None)
    elif case.point == "written":
        _after(checkpoint, "_write", lambda path, state: die() if state["steps_done"] - 1 == case.at else None)
    elif case.point == "evaluating":
        _before(Trainer, "held_out_loss", if_due)


def _sabotage(kind: str) -> None:
    restore, stream = Trainer.restore, Trainer._stream
    if kind.startswith("step"):

        def shifted(trainer: Trainer, state: Any) -> None:
            restore(trainer, state)
            trainer.steps_done += 1 if kind == "step+1" else -1

        Trainer.restore = shifted  # type: ignore[method-assign]
    elif kind:

        def late(trainer: Trainer, plan: Any, first_step: int) -> Any:
            return stream(trainer, plan, first_step + (plan is trainer.work.plan and first_step > 0))

        Trainer._stream = late  # type: ignore[method-assign]


def _work(case: Case, rank: int, meeting: str) -> None:
    collective: Collective = Alone()
    if case.world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=case.world,
            timeout=datetime.timedelta(seconds=60),
        )
        collective = Group()
    if rank == case.rank and case.point:
        _arm(case)
    _sabotage(case.sabotage)
    worker.carry_out(case.run, collective, 0)


def _fork(case: Case, rank: int, meeting: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        _work(case, rank, meeting)
        code = 0
    except BaseException:
        (Path(case.run.root) / f"failure-{rank}.txt").write_text(traceback.format_exc())
        code = 1
    os._exit(code)


def carry_out(case: Case) -> str:
    """Run a case's workers to their end."""
    meeting = f"/tmp/meeting-{uuid.uuid4().hex}"
    pids = {_fork(case, rank, meeting) for rank in range(case.world)}
    deadline = time.monotonic() + case.after_s if case.after_s else float("inf")
    outcome = FINISHED
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid and time.monotonic() < deadline:
            time.sleep(0.005)
            continue
        pids.discard(pid)
        if not pid:
            outcome, deadline = KILLED, float("inf")
        elif os.WIFSIGNALED(status) and outcome == FINISHED:
            outcome = KILLED
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) and outcome == FINISHED:
            outcome = FAILED
        if outcome != FINISHED:
            for other in pids:
                os.kill(other, signal.SIGKILL)
    Path(meeting).unlink(missing_ok=True)
    return outcome


class Server:
    """The process that forks.  Use as a context manager."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-u", __file__]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def carry_out(self, case: Case) -> str:
        """How it ended; what a worker raised lies in `{root}/failure-{rank}.txt`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(base64.b64encode(pickle.dumps(case)).decode() + "\n")
        self._process.stdin.flush()
        outcome: str = json.loads(self._process.stdout.readline())
        return outcome


def serve() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.modules["killed_training"] = sys.modules["__main__"]
    random.seed(0)
    for line in sys.stdin:
        print(json.dumps(carry_out(pickle.loads(base64.b64decode(line)))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
