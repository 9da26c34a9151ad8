"""Two processes that train together over gloo, as Ray would start them; each writes down what it saw."""

from __future__ import annotations

import copy
import dataclasses
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SETTINGS_FILE = "settings.json"


def run(folder: Path, settings: list[dict[str, Any]], *, world: int = 2, samples: int = 60) -> list[dict[str, Any]]:
    """Train with each of the settings (changes of test_loop.GENTLE); what worker 0 saw of each."""
    (folder / SETTINGS_FILE).write_text(json.dumps({"settings": settings, "samples": samples}))
    mp.spawn(_work, (world, str(folder)), nprocs=world)
    answers = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    assert all(answer == answers[0] for answer in answers[1:]), "workers must agree"
    return list(answers[0])


def _work(rank: int, world: int, name: str) -> None:
    folder = Path(name)
    torch.set_num_threads(1)
    from test_loop import GENTLE, Bench
    from training_data import rows

    from tinyvlm.config import from_dict, to_dict
    from tinyvlm.train.collective import Group
    from tinyvlm.train.freeze import hash_tensors
    from tinyvlm.train.loop import Hooks
    from tinyvlm.train.settings import TrainConfig

    asked = json.loads((folder / SETTINGS_FILE).read_text())
    own = folder / str(rank)
    own.mkdir()
    bench, answers = Bench(own, rows(asked["samples"])), []  # before the group: transformers saves on rank 0 alone
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for changes in asked["settings"]:
        restarts = changes.pop("restart_at", 0)
        config = from_dict(TrainConfig, {**to_dict(GENTLE), **changes})
        records: list[list[float]] = []
        held_out: list[float] = []
        kept: list[Any] = []
        hooks = Hooks(
            on_step=lambda record, records=records: records.append([record.loss, record.gradient_norm]),  # type: ignore[misc]
            on_held_out=lambda step, loss, seconds, held_out=held_out: held_out.append(loss),  # type: ignore[misc]
            save=lambda step, state, kept=kept: kept.append(copy.deepcopy(state)),  # type: ignore[misc]
        )
        trainer = bench.trainer(dataclasses.replace(config, checkpoint_every_steps=restarts), Group(), hooks)
        trainer.run()
        if restarts:
            trainer = bench.trainer(config, Group())
            trainer.run(kept[0])
        trainer.finish()
        answers.append(
            {
                "losses": records,
                "held_out": held_out,
                "weights": hash_tensors(sorted(trainer.model.state_dict().items())),
                "sum": float(sum(value.double().abs().sum() for value in trainer.model.state_dict().values())),
            }
        )
    (folder / f"{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()
