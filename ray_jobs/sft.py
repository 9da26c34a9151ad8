"""Stage `sft`: train the whole model on captions, questions and talks about pictures."""

from __future__ import annotations

import functools

from ray_jobs import _cli, _run_training

if __name__ == "__main__":
    _cli.main("sft", functools.partial(_run_training.run, "sft"), extra=("--workers MIN-MAX",))
