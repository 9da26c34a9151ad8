"""Stage `instruct`: the last polish, on questions as they are asked, text-only ones included."""

from __future__ import annotations

import functools

from ray_jobs import _cli, _run_training

if __name__ == "__main__":
    _cli.main("instruct", functools.partial(_run_training.run, "instruct"), extra=("--workers MIN-MAX",))
