"""`tinyvlm bench plan`: what it costs to plan millions of samples, how full packs are, and how much is read in vain.

    a process of its own: lengths of every source, made up or from files ──▶ lengths.parquet       (not counted)
    a process of its own, on one core: read them, build the plan, save it  ──▶ seconds, peak memory, fill
                                       the plan and the sizes of row groups ──▶ bytes read ÷ bytes used, window

Lengths are estimated: four tokens for three words (the usual rule of thumb for English), the chat layout as `chat.py`
writes it (1 token and 5 for each message), 66 for each picture.  `--captions` and `--alpaca` take the words from files
(lists of objects as CapsFusion and Alpaca publish them, drawn from with replacement); without them, and for all else,
words are drawn from log-normal distributions around published sizes:

- captions: CapsFusion, words of 10,000 published records (median 21, 99th percentile 51), after prompts of 4 words.
- m3it: samples of each task as its card has them for training; instructions of about 20 words, answers from a few
  words (classification) to paragraphs (generation); NLVR shows 2 pictures, VIST 5.
- llava: the 665k mix: 40,688 records of text with long turns, descriptions and reasoning of 100 words, conversations of
  3 and lists of 8 short questions (VQA v2, GQA, OCR-VQA, Visual Genome).  Number of turns and words are assumptions.
- alpaca: 52,002 records, 40 % with input; medians of 10, 15 and 40 words.

Row groups are as `prepare` writes them: parts of 2,000 rows in groups of at most 1,024, a picture 55 kB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinyvlm.errors import DataError

Numbers = npt.NDArray[np.int32]

TOKENS_PER_WORD = 4 / 3
TOKENS_PER_MESSAGE, TOKENS_PER_PICTURE = 5, 66
ROWS_PER_PART, ROWS_PER_GROUP, PICTURE_BYTES, BYTES_PER_TOKEN = 2_000, 1_024, 55_000, 2
PACK_LENGTHS = (1024, 2048, 4096)
WORLDS = (1, 2, 3, 8)


class Recipe(NamedTuple):
    """How conversations of one kind are made up: their number, and medians of turns and words."""

    source: str
    family: str
    number: int
    turns: float
    asked: float
    answered: float
    pictures: int = 1
    spread: float = 0.45
    """Standard deviation of the logarithm of words."""


RECIPES = (
    Recipe("captions", "caption", 2_246_000, 1, 4, 21, spread=0.38),
    Recipe("m3it/coco", "caption", 566_747, 1, 18, 10.5, spread=0.25),
    Recipe("m3it/textcap", "caption", 97_765, 1, 18, 12, spread=0.3),
    Recipe("m3it/image-paragraph-captioning", "caption", 14_575, 1, 18, 60, spread=0.3),
    Recipe("m3it/imagenet", "classification", 238_303, 1, 30, 3),
    Recipe("m3it/vqa-v2", "vqa", 177_633, 1, 28, 5, spread=0.6),
    Recipe("m3it/okvqa", "knowledge_vqa", 39_981, 1, 35, 12, spread=0.6),
    Recipe("m3it/clevr", "reasoning", 67_000, 1, 45, 20, spread=0.6),
    Recipe("m3it/nlvr", "reasoning", 32_372, 1, 40, 2, pictures=2),
    Recipe("m3it/visual-dialog", "generation", 110_000, 1, 90, 8, spread=0.6),
    Recipe("m3it/vist", "generation", 35_000, 1, 30, 55, pictures=5, spread=0.4),
    Recipe("llava", "text", 40_688, 3, 40, 180, pictures=0, spread=0.9),
    Recipe("llava", "instruction", 100_512, 1, 12, 105, spread=0.4),
    Recipe("llava", "multi_turn", 157_000, 3, 10, 24, spread=0.6),
    Recipe("llava", "vqa", 367_098, 8, 9, 2, spread=0.5),
    Recipe("llavar", "multi_turn", 16_000, 2, 12, 25, spread=0.6),
    Recipe("alpaca", "text", 52_002, 1, 13, 40, pictures=0, spread=0.9),
)
MIXES: Mapping[str, Sequence[str]] = {
    "everything": ("captions", "m3it", "llava", "llavar", "alpaca"),
    "pretrain: captions": ("captions",),
    "sft: m3it": ("m3it",),
    "instruct: llava, llavar, alpaca": ("llava", "llavar", "alpaca"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tinyvlm bench plan`."""
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-plan"), help="where everything is written")
    parser.add_argument("--samples", type=int, default=4_000_000, help="of the largest mix")
    parser.add_argument("--captions", type=Path, help="a file of captions, as CapsFusion publishes them")
    parser.add_argument("--alpaca", type=Path, help="a file of instructions, as Alpaca publishes them")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """What the command does."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"samples": options.samples, "captions": _given(options.captions), "alpaca": _given(options.alpaca)}
    lengths = folder / "lengths.parquet"
    _alone("make", {**asked, "lengths": str(lengths)}, folder)
    rows = []
    for mix, sources in MIXES.items():
        for pack_length in PACK_LENGTHS:
            for samples_per_pack in (0, 1) if pack_length == PACK_LENGTHS[0] else (0,):
                sys.stderr.write(f"{mix}, {pack_length} …\n")
                task = {"lengths": str(lengths), "sources": sources, "pack_length": pack_length}
                task |= {"samples_per_pack": samples_per_pack, "plan": str(folder / "plan.parquet")}
                rows.append({"mix": mix, **_alone("build", task, folder)})
    (folder / "results.json").write_text(json.dumps(rows, indent=2))
    sys.stdout.write((json.dumps(rows, indent=2) if options.json else _table(rows)) + "\n")
    return 0


def _given(path: Path | None) -> str:
    if path is not None and not path.is_file():
        raise DataError(f"There is no file {path}.")
    return str(path or "")


def _alone(what: str, task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Do one thing in a process of its own, on one core."""
    threads = {
        name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS")
    }
    out = folder / f"{what}.json"
    command = [sys.executable, "-m", "tinyvlm.bench.plan", what, json.dumps(task), str(out)]
    subprocess.run(command, env={**os.environ, **threads}, check=True)
    answer: dict[str, Any] = json.loads(out.read_text())
    return answer


def make(task: Mapping[str, Any]) -> dict[str, Any]:
    """Lengths of all sources, written as `train/worker.py` writes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tinyvlm.train.plan import LENGTHS

    random = np.random.default_rng(0)
    scale = task["samples"] / sum(recipe.number for recipe in RECIPES)
    tables, part = [], 0
    for recipe in RECIPES:
        number = round(recipe.number * scale)
        tokens = _tokens(recipe, number, task, random)
        place = np.arange(number)
        columns = {
            "key": place,
            "part": (part + place // ROWS_PER_PART).astype(np.int32),
            "group": (place % ROWS_PER_PART // ROWS_PER_GROUP).astype(np.int32),
            "row": (place % ROWS_PER_PART % ROWS_PER_GROUP).astype(np.int32),
            "source": pa.array([recipe.source]).dictionary_encode().take(pa.array(np.zeros(number, np.int32))),
            "family": pa.array([recipe.family]).dictionary_encode().take(pa.array(np.zeros(number, np.int32))),
            "split": pa.array(["train"]).dictionary_encode().take(pa.array(np.zeros(number, np.int32))),
            "status": pa.array(["ok"]).dictionary_encode().take(pa.array(np.zeros(number, np.int32))),
            "tokens": tokens,
            "pictures": np.full(number, recipe.pictures, np.int32),
            "supervised": tokens // 4 + 1,
        }
        tables.append(pa.table(columns, schema=LENGTHS))
        part += -(-number // ROWS_PER_PART)
    pq.write_table(pa.concat_tables(tables), task["lengths"])
    return {}


def _tokens(recipe: Recipe, number: int, task: Mapping[str, Any], random: np.random.Generator) -> Numbers:
    """(number,) tokens of made-up conversations, or of ones from a file."""
    words = _file_words(recipe, task)
    if words is not None:
        words, turns = random.choice(words, number), np.ones(number)
    else:
        turns = np.maximum(1, np.round(recipe.turns * random.lognormal(0, 0.4 if recipe.turns > 1 else 0, number)))
        words = turns * (
            recipe.asked * random.lognormal(0, recipe.spread, number)
            + recipe.answered * random.lognormal(0, recipe.spread, number)
        )
    layout = 1 + 2 * turns * TOKENS_PER_MESSAGE + recipe.pictures * TOKENS_PER_PICTURE
    return np.asarray(layout + np.ceil(words * TOKENS_PER_WORD), np.int32)


def _file_words(recipe: Recipe, task: Mapping[str, Any]) -> npt.NDArray[np.float64] | None:
    """Words of each conversation in a file that was given for this source."""
    path = task.get(recipe.source)
    if not path:
        return None
    records = json.loads(Path(path).read_text())
    if recipe.source == "captions":
        name = next(name for name in records[0] if name.startswith("caps"))
        texts = [[record[name]] for record in records]
        asked = recipe.asked
    else:
        texts = [[record["instruction"], record["input"], record["output"]] for record in records]
        asked = 0.0
    return np.array([asked + sum(len(text.split()) for text in one) for one in texts])


def build(task: Mapping[str, Any]) -> dict[str, Any]:
    """One plan, with what it cost and what it is worth."""
    import pyarrow.parquet as pq

    from tinyvlm.data.mixture import MixtureConfig
    from tinyvlm.train import plan
    from tinyvlm.train.reading import reading
    from tinyvlm.train.settings import TrainConfig

    weights = dict.fromkeys(task["sources"], 1.0)
    config = TrainConfig(
        mixture=MixtureConfig(weights=weights),
        pack_length=task["pack_length"],
        samples_per_pack=task["samples_per_pack"],
        packs_per_step=128 if task["samples_per_pack"] == 1 else 32,
    )
    started = time.perf_counter()
    lengths = pq.read_table(task["lengths"], use_threads=False)
    read = time.perf_counter()
    made = plan.build(lengths, config)
    built = time.perf_counter()
    made.save(Path(task["plan"]))
    saved = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = _sizes(lengths)
    return {
        "pack_length": config.pack_length,
        "padded": config.samples_per_pack == 1,
        **made.summary(),
        "read_s": round(read - started, 1),
        "build_s": round(built - read, 1),
        "save_s": round(saved - built, 1),
        "peak_bytes": peak,
        "plan_bytes": Path(task["plan"]).stat().st_size,
        "too_long": plan.count_statuses(lengths, config).get("too_long", 0),
        "balance": {world: round(_balance(made, world), 3) for world in WORLDS},
        "reading": [asdict(reading(made, sizes, world)) for world in WORLDS],
    }


def _sizes(lengths: Any) -> dict[tuple[int, int], Any]:
    """Sizes of the made-up row groups."""
    from tinyvlm.train.reading import GroupSize

    place = lengths["part"].to_numpy().astype(np.int64) * 2 + lengths["group"].to_numpy()
    pictures, tokens = (np.bincount(place, lengths[name].to_numpy()) for name in ("pictures", "tokens"))
    num_bytes = PICTURE_BYTES * pictures + BYTES_PER_TOKEN * tokens
    rows = np.bincount(place)
    return {
        (number // 2, number % 2): GroupSize(int(rows[number]), int(num_bytes[number]))
        for number in np.flatnonzero(rows).tolist()
    }


def _balance(made: Any, world: int) -> float:
    """Pictures of an average worker ÷ pictures of the busiest, averaged over steps: pictures cost more than words."""
    shares = []
    before = np.concatenate([[0], np.cumsum(made.items["pictures"], dtype=np.int64)])
    for step in range(0, made.num_steps, 1 + made.num_steps // 2000):
        edges = [made.samples(step, rank, world) for rank in range(world)]
        pictures = [int(before[end] - before[begin]) for begin, end in edges]
        shares.append(sum(pictures) / world / max(1, *pictures))
    return float(np.mean(shares))


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["mix", "pack", "samples", "packs", "filled", "pictures", "seconds", "peak memory", "bytes read ÷ used"]
    head += ["window of 1, of 8 workers", "balance of 8"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        ratios = ", ".join(f"{one['workers']}: {one['ratio']:.2f}" for one in row["reading"])
        cells = [
            row["mix"],
            f"{row['pack_length']}{' padded' if row['padded'] else ''}",
            f"{row['samples']:,}",
            f"{row['packs']:,}",
            f"{row['fill']:.2%}",
            f"≤ {row['pictures_per_pack']}",
            f"{row['read_s'] + row['build_s'] + row['save_s']:.1f}",
            f"{row['peak_bytes'] / 2**30:.2f} GiB",
            ratios,
            f"{row['reading'][0]['window_bytes'] / 1e9:.1f} GB, {row['reading'][-1]['window_bytes'] / 1e9:.1f} GB",
            f"{row['balance'][max(row['balance'], key=int)]:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    done = {"make": make, "build": build}[sys.argv[1]](json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(done))
