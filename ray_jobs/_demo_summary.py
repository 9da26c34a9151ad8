"""What the demo says at the end: five questions over HTTP, summary.json and report.html."""

from __future__ import annotations

import base64
import io
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ray_jobs._demo_screen import summary_rows
from tinyvlm import report
from tinyvlm.folders import find_folder, part_paths
from tinyvlm.serve.client import ask

PACKAGES = ("tinyvlm", "torch", "transformers", "ray", "pyarrow", "pillow", "aiohttp", "bitsandbytes", "wandb")


def held_out_questions(root: Path, count: int) -> list[dict[str, Any]]:
    """`count` test questions about different pictures, from the prepared conversations."""
    folder = find_folder([root], "prepare", "the demo")
    found: dict[int, dict[str, Any]] = {}
    for path in part_paths(folder):
        rows = pq.read_table(path, filters=[("split", "=", "test"), ("family", "=", "vqa"), ("status", "=", "ok")])
        for row in rows.slice(0, 200).to_pylist():
            truth = row["messages"][-1]["parts"][0]["text"]
            # One yes/no question is enough to look at; the others should show that the model sees.
            kinds = [item["truth"] in ("yes", "no") for item in found.values()]
            if row["source_key"] in found or (truth in ("yes", "no") and any(kinds)):
                continue
            question = "".join(part["text"] or "" for part in row["messages"][0]["parts"])
            found[row["source_key"]] = {"question": question, "truth": truth, "picture": row["images"][0]["bytes"]}
            if len(found) == count:
                return list(found.values())
    return list(found.values())


def ask_questions(root: Path, url: str, model: str, count: int) -> list[dict[str, Any]]:
    """Ask the served endpoint, as any client would."""
    questions = held_out_questions(root, count)
    return [{**item, "answer": ask(url, item["question"], [item["picture"]], model=model)} for item in questions]


def summarise(
    root: Path, seconds: dict[str, float], peak_bytes: int, asked: list[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """The content of summary.json."""
    evaluated = _statistics(root, "evaluate")
    return {
        "minutes": round(sum(seconds.values()) / 60, 2),
        "minutes_by_stage": {stage: round(value / 60, 2) for stage, value in seconds.items()},
        "peak_memory_gib": round(peak_bytes / 1024**3, 2),
        "accuracy": evaluated["accuracy"],
        "accuracy_by_answer_type": evaluated["accuracy_by_answer_type"],
        "accuracy_shuffled": evaluated["accuracy_shuffled"],
        "chance": evaluated["chance"],
        "num_questions": evaluated["num_questions"],
        **{f"bleu_{n}": evaluated[f"bleu_{n}"] for n in (1, 2, 3, 4)},
        "download_statuses": _statistics(root, "download")["statuses"],
        "asked": [{key: item[key] for key in ("question", "answer", "truth")} for item in asked],
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def write_report(root: Path, summary: dict[str, Any], asked: list[dict[str, Any]]) -> None:
    """One self-contained page: the summary, the questions asked, and every stage's numbers and charts."""
    pictures = [
        {
            "caption": f"{item['question']} → {item['answer']} (truth: {item['truth']})",
            "jpeg_base64": base64.b64encode(_as_jpeg(item["picture"])).decode(),
        }
        for item in asked
    ]
    minutes = summary["minutes_by_stage"]
    first: dict[str, Any] = {
        "rows": summary_rows(summary),
        "charts": [
            {
                "kind": "bar",
                "title": "Accuracy beside chance (%)",
                "labels": ["the model", *summary["chance"], "pictures shuffled"],
                "values": [
                    round(100 * value, 1)
                    for value in (summary["accuracy"], *summary["chance"].values(), summary["accuracy_shuffled"])
                ],
            },
            {"kind": "bar", "title": "Minutes by stage", "labels": list(minutes), "values": list(minutes.values())},
        ],
        "pictures": {"title": "Asked over HTTP", "items": pictures},
    }
    stages = [name for name in minutes if name not in ("start", "serve")]
    sections = [("Summary", first), *((name, _statistics(root, name)) for name in stages)]
    (root / "report.html").write_text(report.run_report("TinyVLM demo", sections))


def _statistics(root: Path, stage: str) -> dict[str, Any]:
    folder = find_folder([root], stage, "the demo")
    content: dict[str, Any] = json.loads((folder / "stats.json").read_text())
    return content


def _as_jpeg(data: bytes) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(out, "JPEG", quality=92)
    return out.getvalue()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
