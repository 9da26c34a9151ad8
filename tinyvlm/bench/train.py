"""`tinyvlm bench train`: how fast the training loop is, beside transformers' Trainer with padded batches.

    made-up samples of mixed lengths ──┬── a process of its own: train/loop.py           ──▶ samples/s, losses
    the same weights, steps, optimizer ├── a process of its own: Trainer, padded         ──▶ samples/s, losses
                                       └── a process of its own: Trainer, grouped by length
    a product of two large matrices in the same precision                                ──▶ what the device can do

Without Ray.  Without a GPU, a small model in float32 on `--threads` threads.  On a GPU, the sizes of `base()` in bf16:
captions (130 tokens, language model frozen and hot) and instructions (256 and 512 tokens), with the tower live and from
given features.  Weights are random; the speed is the same.  `bench/training_work.py` says what the samples are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyvlm.errors import DataError

Case = tuple[str, dict[str, Any]]

ON_CPU: Sequence[Case] = (
    ("mixed lengths, tower frozen", {"hot": "no-tower"}),
    ("mixed lengths, all hot", {"hot": "all"}),
)
ON_GPU: Sequence[Case] = (
    ("captions, language frozen", {"hot": "all-but-language", "lengths": "130", "samples": 128}),
    ("captions, language frozen, cached", {"hot": "no-language", "lengths": "130", "samples": 128, "is_cached": True}),
    ("captions, language hot", {"hot": "no-tower", "lengths": "130", "samples": 128}),
    ("captions, language hot, cached", {"hot": "no-tower", "lengths": "130", "samples": 128, "is_cached": True}),
    ("SFT, 256 tokens", {"hot": "all", "lengths": "256", "samples": 64}),
    ("SFT, 256 tokens, cached", {"hot": "no-tower", "lengths": "256", "samples": 64, "is_cached": True}),
    ("SFT, 512 tokens", {"hot": "all", "lengths": "512", "samples": 64}),
    ("SFT, 512 tokens, cached", {"hot": "no-tower", "lengths": "512", "samples": 64, "is_cached": True}),
    ("mixed lengths, all hot", {"hot": "all", "lengths": "mixed", "samples": 64}),
)
GPU: Mapping[str, Any] = {"size": "base", "device": "cuda", "precision": "bf16", "pack_length": 4096, "batch": 32}
SIDES = ("ours", "padded", "grouped")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--size", choices=("small", "bench", "base"), help="of the model (small; on a GPU base)")
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases whose name has this in it")
    parser.add_argument("--sides", default="ours,padded,grouped", metavar="A,B", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="of each measurement, two of them unclocked")
    parser.add_argument("--samples", type=int, metavar="N", help="in one step (64)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of each process on a CPU (all cores)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    sides = [side for side in SIDES if side in options.sides.split(",")]
    if not sides or options.steps < 3:
        raise DataError(f"bench train wants --sides of {', '.join(SIDES)}, and --steps of 3 or more.")
    device = options.device or ("cuda" if _has_gpu() else "cpu")
    given: dict[str, Any] = {"threads": options.threads or os.cpu_count() or 1, "steps": options.steps, "samples": 64}
    given |= GPU if device == "cuda" else {}
    given |= {"size": options.size} if options.size else {}
    matrix = _alone({**given, "side": "matrix"})
    rows = []
    for name, case in ON_GPU if device == "cuda" else ON_CPU:
        if options.case not in name:
            continue
        case = {**given, **case, **({"samples": options.samples} if options.samples else {})}
        for side in sides:
            sys.stderr.write(f"{name}: {side} …\n")
            row = _alone({**case, "side": side, "with_parts": side == "ours"})
            rows.append({"case": name, **row, "share_of_matrix_rate": row["tflops"] / matrix["tflops"]})
    result = {"device": matrix["device"], "matrix_tflops": matrix["tflops"], "task": given, "rows": rows}
    sys.stdout.write((json.dumps(result, indent=2) if options.json else as_text(result)) + "\n")
    return 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _alone(task: Mapping[str, Any]) -> dict[str, Any]:
    """One side in a process of its own.

    Raises:
        DataError: it failed, with the last line that it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "tinyvlm.bench.training_sides", json.dumps(task), str(out)]
        threads = {"OMP_NUM_THREADS": str(task["threads"]), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
        if done.returncode or not out.is_file():
            said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            raise DataError(f"bench train: the side {task['side']!r} ended with code {done.returncode} ({said}).")
        answer: dict[str, Any] = json.loads(out.read_text())
        return answer


def as_text(result: Mapping[str, Any]) -> str:
    """Tables for a person."""
    head = ["case", "side", "samples/s", "× padded", "tokens/s", "supervised/s", "peak GiB", "loss, last 4 steps"]
    head += ["TFLOP/s", "of matrix rate", "MFU"]
    lines = [f"{result['device']}; matrix product {result['matrix_tflops']:.2f} TFLOP/s", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    slow = {row["case"]: row["samples_per_s"] for row in result["rows"] if row["side"] == "padded"}
    for row in result["rows"]:
        base = slow.get(row["case"])
        cells = [
            row["case"],
            row["side"],
            f"{row['samples_per_s']:.2f}",
            f"{row['samples_per_s'] / base:.2f}" if base else "–",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['supervised_per_s']:,.0f}",
            f"{row['peak_gib']:.2f}",
            " ".join(f"{loss:.4f}" for loss in row["losses"][-4:]),
            f"{row['tflops']:.3f}",
            f"{row['share_of_matrix_rate']:.1%}",
            f"{row['mfu']:.1%}" if row["mfu"] else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for row in result["rows"]:
        if row["parts"]:
            parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["parts"].items())
            lines += ["", f"{row['case']}, seconds of a step of ours: {parts}"]
    return "\n".join(lines)
