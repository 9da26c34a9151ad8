"""How fast this machine encodes pictures, and what share of its matrix rate that is: `tinyvlm bench encode`.

    matrix     two large matrices, in the same precision                          ──▶ TFLOP/s that the device can do
    compute    pixels on the device ─▶ tower, pooling, similarity ──copy out─▶    ──▶ pictures/s, TFLOP/s, share of it
    copies     pixels on the host ──copy in─▶ the same, each batch awaited        ──▶ pictures/s
    stage      JPEG rows ──the stage as it is: decode, cheap signs, tower─▶ table ──▶ pictures/s
    written    the same, and Parquet with zstd in the end                         ──▶ pictures/s

All in one run of one process, without Ray.  The matrix rate is taken before and after, and the higher one counts.
Weights are random unless a checkpoint is named; the speed is the same.

Shapes: B pictures of a batch, T = 1 + P tokens of a picture, D width, F inner width, L layers.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvlm.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

    from tinyvlm.data.clip import Tower
    from tinyvlm.data.encode import Encode

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

LAYOUTS: dict[str, dict[str, Any]] = {
    "L/14": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
    "B/16": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16},
    "B/32": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32},
}
"""Published shapes of CLIP's vision towers; inner width: four times the width; positions: 336 px for L/14, else 224."""

WARM_UP = 3
"""Batches before a measurement."""


@dataclass(frozen=True)
class Measured:
    """How many pictures went through in what time."""

    pictures: int
    seconds: float

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.pictures / self.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--vision", metavar="CLIP", help="a checkpoint: local folder, hub id or toy:clip")
    parser.add_argument("--random", choices=LAYOUTS, help="this layout with random weights (L/14; without a GPU B/32)")
    parser.add_argument("--size", type=int, metavar="PX", help="side that the tower reads (its own)")
    parser.add_argument("--batch", type=int, metavar="N", help="pictures in a batch (128; without a GPU 8)")
    parser.add_argument("--dtype", choices=DTYPES, help="precision (bf16; without a GPU fp32)")
    parser.add_argument("--storage", choices=("float16", "int8", "fp8"), default="float16", help="of features")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on a GPU)")
    parser.add_argument("--decode-threads", type=int, default=4, metavar="N")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="length of each measurement")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    result = measure(options)
    sys.stdout.write((json.dumps(result, indent=2) if options.json else _as_text(result)) + "\n")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The numbers, as JSON types.

    Raises:
        ConfigError: options that contradict each other.
        CheckpointError: the checkpoint cannot be loaded.
    """
    import torch

    if options.vision and options.random:
        raise ConfigError("bench encode takes --vision or --random, not both.")
    if options.seconds <= 0 or (options.batch is not None and options.batch < 1):
        raise ConfigError("bench encode wants --seconds above 0 and a --batch of 1 or more.")
    stage = _stage(options)
    tower, config = stage.tower, stage.config
    rows = _rows(4 * config.batch_size, stage.picture.size)
    flops = flops_of_picture(tower.model.config.to_dict(), stage.picture.tower_size)

    pixels = np.stack([tower.pixels(image) for image in _images(config.batch_size, stage.picture.tower_size)])
    on_host, on_device = tower.stage(pixels), torch.from_numpy(pixels).to(tower.device)
    matrix = matrix_rate(tower, options.seconds / 2)
    compute = _measure(lambda: tower.submit(on_device), tower, options.seconds)
    copies = _measure_copies(tower, on_host, options.seconds)
    whole = _measure(lambda: stage(rows), tower, options.seconds, rows.num_rows)
    with tempfile.TemporaryDirectory(prefix="tinyvlm-bench-") as scratch:
        target = Path(scratch) / "part.parquet"
        written = _measure(lambda: _write(stage(rows), target), tower, options.seconds, rows.num_rows)
        num_bytes = target.stat().st_size
    matrix = max(matrix, matrix_rate(tower, options.seconds / 2))
    achieved = compute.rate * flops
    return {
        "device": torch.cuda.get_device_name()
        if tower.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "tower": options.vision or f"{_layout(options)}, random weights",
        "size_px": stage.picture.tower_size,
        "batch": config.batch_size,
        "dtype": config.dtype,
        "compiled": config.compile,
        "feature_storage": config.feature_storage,
        "gflop_per_picture": round(flops / 1e9, 2),
        "matrix_tflops": round(matrix / 1e12, 3),
        "compute_tflops": round(achieved / 1e12, 3),
        "share_of_matrix_rate": round(achieved / matrix, 4),
        "pictures_per_s": {
            "compute": round(compute.rate, 2),
            "with copies to and from the device": round(copies.rate, 2),
            "whole stage, decoding included": round(whole.rate, 2),
            "whole stage, written as Parquet": round(written.rate, 2),
        },
        "stored_bytes_per_picture": round(num_bytes / rows.num_rows),
        "decode_threads": config.decode_threads,
        "peak_device_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if tower.device.type == "cuda" else None,
    }


def flops_of_picture(shape: dict[str, Any], side: int) -> float:
    """Floating-point operations of one picture, a multiply-add counted as two; norms and activations are left out.

    Per layer 4·D²·T for the projections, 2·D·F·T for the two inner layers and 2·T²·D for attention, and 3·p²·D·P for
    the patches, all times two.
    """
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    patches = (side // shape["patch_size"]) ** 2
    tokens = 1 + patches
    layer = 4 * width**2 * tokens + 2 * width * inner * tokens + 2 * tokens**2 * width
    return 2.0 * float(shape["num_hidden_layers"] * layer + 3 * shape["patch_size"] ** 2 * width * patches)


def matrix_rate(tower: Tower, seconds: float) -> float:
    """Floating-point operations a second of products of two large square matrices, on the tower's device."""
    import torch

    side = 8192 if tower.device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=tower.device, dtype=tower.model.dtype) for _ in range(2))
    out = torch.empty_like(left)
    found = _measure(lambda: torch.mm(left, right, out=out), tower, seconds, 1)
    return found.rate * (2.0 * float(side) ** 3)


def _measure(work: Callable[[], object], tower: Tower, seconds: float, pictures: int | None = None) -> Measured:
    """Repeat `work`, which handles so many pictures (a batch), for about `seconds`."""
    pictures = tower.config.batch_size if pictures is None else pictures
    for _ in range(WARM_UP if tower.device.type == "cuda" else 1):
        work()
    _wait(tower)
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        work()
        times += 1
        if times % 8 == 0:  # the queue of a GPU is long: without waiting too much would be begun
            _wait(tower)
    _wait(tower)
    return Measured(pictures * times, time.perf_counter() - started)


def _measure_copies(tower: Tower, on_host: Any, seconds: float) -> Measured:
    """As the stage does it: a batch's results are awaited when the next one is under way."""
    waiting = [tower.submit(on_host)]

    def work() -> None:
        waiting.append(tower.submit(on_host))
        waiting.pop(0).result()

    return _measure(work, tower, seconds)


def _wait(tower: Tower) -> None:
    if tower.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def _stage(options: argparse.Namespace) -> Encode:
    """The stage with a tower as the options say; no picture counts as a placeholder."""
    import torch

    from tinyvlm.data.clip import Tower, load_vision
    from tinyvlm.data.encode import Encode, EncodeConfig
    from tinyvlm.images import PictureConfig

    on_gpu = torch.cuda.is_available()
    model = load_vision(options.vision) if options.vision else _random_tower(_layout(options))
    shape = model.config
    side = options.size or shape.image_size
    picture = PictureConfig(size=max(64, min(448, 2 * side)), tower_size=side)
    config = EncodeConfig(
        vision=options.vision or "random",
        num_image_tokens=_num_tokens(side // shape.patch_size),
        feature_width=shape.hidden_size,
        interpolate_positions=True,
        feature_storage=options.storage,
        placeholder_threshold=2.0,
        dtype=DTYPES[options.dtype or ("bf16" if on_gpu else "fp32")],  # type: ignore[arg-type]
        compile=on_gpu if options.compile is None else options.compile,
        batch_size=options.batch or (128 if on_gpu else 8),
        decode_threads=options.decode_threads,
    )
    stage = Encode(config, picture)
    stage.tower = Tower(config, picture, model)
    return stage


def _layout(options: argparse.Namespace) -> str:
    import torch

    return str(options.random or ("L/14" if torch.cuda.is_available() else "B/32"))


def _random_tower(name: str) -> Any:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    layout = LAYOUTS[name]
    side = 336 if name == "L/14" else 224
    inner = 4 * layout["hidden_size"]
    torch.manual_seed(0)
    model = CLIPVisionModel(
        CLIPVisionConfig(**layout, intermediate_size=inner, image_size=side, hidden_act="quick_gelu")
    )
    return model.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _num_tokens(grid: int) -> int:
    """The largest square of 64 at most whose root divides the grid."""
    return max(n * n for n in range(1, 9) if grid % n == 0)


def _images(count: int, side: int) -> list[Any]:
    """Pictures as detailed as photographs: soft colour fields, some grain."""
    from PIL import Image

    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        field = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        soft = np.asarray(field.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        made.append(Image.fromarray((soft + rng.normal(0, 6, soft.shape)).clip(0, 255).astype(np.uint8)))
    return made


def _rows(count: int, side: int) -> pa.Table:
    """Rows as `preprocess` leaves them; 64 pictures take turns."""
    import pyarrow as pa

    from tinyvlm import schema

    jpegs = []
    for image in _images(min(count, 64), side):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        jpegs.append(buffer.getvalue())
    rows = [{"key": key, "status": schema.OK, "image": jpegs[key % len(jpegs)]} for key in range(count)]
    return pa.Table.from_pylist(rows, schema=schema.PREPROCESSED)


def _write(rows: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(rows, path, compression="zstd", row_group_size=1024)


def _as_text(result: dict[str, Any]) -> str:
    rates = result["pictures_per_s"]
    lines = [
        f"{result['tower']}, {result['size_px']} px, batches of {result['batch']}, {result['dtype']}"
        f"{', compiled' if result['compiled'] else ''}, on {result['device']} (torch {result['torch']})",
        f"  matrix rate          {result['matrix_tflops']:10.2f} TFLOP/s",
        f"  tower                {result['compute_tflops']:10.2f} TFLOP/s = {result['share_of_matrix_rate']:.1%} of it "
        f"({result['gflop_per_picture']:.1f} GFLOP a picture)",
    ]
    width = max(map(len, rates))
    lines += [f"  {name:<{width}} {rate:10.1f} pictures/s" for name, rate in rates.items()]
    lines.append(f"  stored: {math.ceil(result['stored_bytes_per_picture'] / 1024)} KiB a picture")
    return "\n".join(lines)
