"""Stage `pretrain`: build the model, teach its connector to speak the language model's language, with captions."""

from __future__ import annotations

import functools

from ray_jobs import _cli, _run_training

if __name__ == "__main__":
    _cli.main("pretrain", functools.partial(_run_training.run, "pretrain"), extra=("--workers MIN-MAX",))
