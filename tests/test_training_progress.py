"""The live line and Ray's metrics of a training stage say what metrics.jsonl says."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from test_progress import Recorder

from ray_jobs._training_metrics import COUNTERS, GAUGES, SECONDS_LEFT, TAGGED, TrainingMetrics
from ray_jobs._training_progress import TrainingProgress

STEP = {
    **{"step": 1, "loss": 2.0, "gradient_norm": 1.5, "rates": {"connector": 1e-3}, "samples": 8, "tokens": 1000},
    **{"supervised": 100, "pictures": 8, "seconds": 2.0, "data_wait_s": 0.5, "mfu": 0.4, "goodput": 0.9},
    **{"memory_bytes": 2**30, "device_bytes": 0},
}
LINES = (
    {"attempt": 1, "workers": 2},
    STEP,
    {**STEP, "step": 2, "loss": 1.0, "mfu": 0.5},
    {
        "step": 2,
        "split": "train",
        "sources": {"a/x": {"loss": 1.5, "tokens": 3}, "ö": {"loss": 1.0, "tokens": 1}},
        "families": {},
    },
    {"step": 2, "split": "held_out", "sources": {"a/x": {"loss": 1.75, "tokens": 3}}, "families": {}},
    {"step": 2, "held_out_loss": 1.25, "seconds": 0.1},
    {"step": 2, "bleu": [0.4, 0.3, 0.2, 0.1], "num_captions": 3},
    {"skipped": 3, "loss": "nan", "gradient_norm": "nan"},
)


def plan(folder: Path, steps: int) -> None:
    (folder / "plan.json").write_text(json.dumps({"steps": steps, "mixture": [], "remarks": []}))


def test_the_line_has_speed_mfu_and_what_is_left(tmp_path: Path) -> None:
    plan(tmp_path, 4000)
    with TrainingProgress("sft", tmp_path) as progress:
        assert progress.line() == "sft starting"
        progress._read_plan()
        for line in LINES:
            progress.take(line)
        assert progress.line() == "sft step 2/4000 · loss 1.0000 · 500 tokens/s · MFU 45% · 2:13:16 left"
        progress.take({**STEP, "step": 2, "mfu": None})
        assert progress.line() == "sft step 2/4000 · loss 2.0000 · 500 tokens/s · 2:13:16 left", "a restart"
    told = json.loads((tmp_path / "progress.json").read_text())
    assert (told["state"], told["step"], told["steps"], told["loss"]) == ("done", 2, 4000, 2.0)


def test_metrics_say_what_the_lines_say(tmp_path: Path) -> None:
    plan(tmp_path, 4)
    recorder = TaggedRecorder()
    with TrainingProgress("sft", tmp_path, TrainingMetrics("sft", recorder)) as progress:
        progress._read_plan()
        for line in LINES:
            progress.take(line)
        progress._write()
        values = recorder.values
        assert values["tinyvlm_train_samples", ""] == 16
        assert values["tinyvlm_train_tokens", ""] == 2000
        assert (values["tinyvlm_train_step", ""], values["tinyvlm_train_steps", ""]) == (2, 4)
        assert (values["tinyvlm_train_loss", ""], values["tinyvlm_train_mfu", ""]) == (1.0, 0.5)
        assert values["tinyvlm_train_data_wait", ""] == 0.25
        assert values["tinyvlm_train_held_out_loss", ""] == 1.25
        assert values["tinyvlm_train_source_loss", "a/x"] == 1.5
        assert values["tinyvlm_train_held_out_source_loss", "a/x"] == 1.75
        assert values["tinyvlm_train_learning_rate", "connector"] == 1e-3
        assert values["tinyvlm_train_bleu", "4"] == 0.1
        assert values[SECONDS_LEFT, ""] == 4
    assert values[SECONDS_LEFT, ""] == 0
    assert {name for name, _ in values} == {*COUNTERS, *GAUGES, *TAGGED, SECONDS_LEFT}


def test_every_metric_stands_in_the_documentation() -> None:
    text = (Path(__file__).parent.parent / "cluster" / "README.md").read_text()
    assert [name for name in (*COUNTERS, *GAUGES, *TAGGED) if f"`ray_{name}" not in text] == []


class TaggedRecorder(Recorder):
    """Tells values apart by the tag besides the stage."""

    def _make(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        assert description
        made = super()._make(name, description, ("stage",))
        (extra,) = [key for key in tag_keys if key != "stage"] or [""]

        class Tagged:
            def set(_, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(tag_keys)
                self.values[name, tags.get(extra, "")] = value

            inc = staticmethod(made.inc)

        return Tagged()

    Counter = Gauge = _make


@pytest.mark.ray
def test_metrics_are_on_the_nodes_port(quick_metrics: Any, tmp_path: Path) -> None:
    node = quick_metrics.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = [f"ray_{name}" for name in (*COUNTERS, *GAUGES, *TAGGED, SECONDS_LEFT)]
    plan(tmp_path, 4)
    with TrainingProgress("sft", tmp_path, TrainingMetrics("sft")) as progress:
        progress._read_plan()
        for line in LINES:
            progress.take(line)
        progress._write()
        deadline, text = time.monotonic() + 60, ""
        while time.monotonic() < deadline and not all(name in text for name in wanted):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(address, timeout=5) as answer:
                    text = answer.read().decode()
            except OSError:
                continue
    assert [name for name in wanted if name not in text] == []
    told = [line for line in text.splitlines() if line.startswith("ray_tinyvlm_train_source_loss{")]
    (line,) = [line for line in told if 'source="a/x"' in line]
    assert 'stage="sft"' in line
    assert any('source="?"' in line for line in told)
    assert float(line.split()[-1]) == 1.5
