"""One worker's part in a training stage: lengths → plan → model → loop → saved model.

    every worker: measure its share of the files ─┐
    worker 0:     ───── plan.parquet, plan.json ◀─┘ ──▶ every worker: load plans, model, newest checkpoint; train
    worker 0:     model/ (temp + rename), then result.json

Nothing here knows who started the workers.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from tinyvlm import chat
from tinyvlm import config as settings
from tinyvlm.data import mixture
from tinyvlm.errors import StageError
from tinyvlm.folders import write_atomic
from tinyvlm.images import PictureConfig
from tinyvlm.lease import Lease
from tinyvlm.model import ModelConfig, TinyVLMProcessor, build, load
from tinyvlm.train import bad_steps, checkpoint, metrics, plan
from tinyvlm.train.bad_steps import BadStep
from tinyvlm.train.collective import Collective
from tinyvlm.train.data import Conversations, data_files, measure
from tinyvlm.train.kinds import Kinds, LossSums
from tinyvlm.train.ledger import Ledger
from tinyvlm.train.loop import Hooks, Trainer, Work
from tinyvlm.train.meter import device_rate
from tinyvlm.train.reading import Window, group_sizes, reading
from tinyvlm.train.run import WARNINGS_FILE, TrainingRun
from tinyvlm.train.stored import open_features

log = logging.getLogger(__name__)


def carry_out(
    run: TrainingRun,
    collective: Collective,
    lease_number: int,
    device: str = "cpu",
    on_held_out: Callable[[int, float], None] = lambda step, loss: None,
    wants_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train, or go on training, and leave `model/` and `result.json` in the run's folder.

    Args:
        run: the same on all workers.
        lease_number: the driver's lease; worker 0 writes nothing once it has moved on.
        on_held_out: called on every worker with each held-out loss and the steps done.
        wants_to_stop: asked on every worker in each step; a yes of one keeps a checkpoint and stops all.

    Raises:
        TinyVLMError: as a sentence; what was kept stays, and the same command continues.
    """
    with _warnings_kept(run.folder / WARNINGS_FILE, collective.rank):
        _carry_out(run, collective, lease_number, device, on_held_out, wants_to_stop)


def _carry_out(
    run: TrainingRun,
    collective: Collective,
    lease_number: int,
    device: str,
    on_held_out: Callable[[int, float], None],
    wants_to_stop: Callable[[], bool],
) -> None:
    started = time.time()
    torch.manual_seed(run.config.seed)
    model, processor = start_model(run)
    lengths = _measure(run, processor, collective)
    training, validation = _plans(run, lengths, collective)
    state = _agreed_state(run, training, collective, device)
    peak, about = _devices(collective, torch.device(device))
    numbers = None
    if collective.rank == 0:
        numbers = metrics.MetricsFile(run.folder / "metrics.jsonl", collective.world, about, started)
    config = run.config
    stored = None
    if run.features:
        picture, num_tokens = processor.picture, processor.num_image_tokens
        stored = open_features(run.features, model, picture, num_tokens, config.stored_features_mib << 20)
    source = Conversations(
        data_files(map(Path, run.prepare)),
        processor,
        window=Window.of(training, collective.rank, collective.world),
        cache_bytes=config.cache_mib << 20,
        skip_bad_pictures=config.on_bad_picture == "skip",
        stored=stored,
    )
    hooks = Hooks(
        on_held_out=lambda step, loss, seconds: on_held_out(step, loss),
        on_bad_step=lambda bad: _keep_bad_step(run, bad, collective.rank),
        wants_to_stop=wants_to_stop,
    )
    hooks = hooks if numbers is None else _writing_hooks(run, numbers, lease_number, hooks)
    hooks = _noting_hooks(Ledger(run.folder, collective, device), training, hooks) if config.ledger else hooks
    work = Work(
        plan=training,
        validation=validation,
        source=source,
        config=config,
        pad_token_id=processor.pad_id,
        new_token_ids=processor.tokenizer.convert_tokens_to_ids(list(chat.IMAGE_TOKENS)),
        kinds=Kinds(_read_lengths(lengths, Kinds.COLUMNS)) if config.show.sources_every_steps else None,
        peak_flops=peak,
        has_features=stored is not None,
        hooks=hooks,
    )
    trainer = Trainer(model.to(device), work, collective)
    if collective.rank == 0:
        for line in trainer.policy.lines():
            log.info("%s learns · %s", run.stage, line)
    trainer.run(state)
    hooks.settle()
    frozen = trainer.finish()
    if numbers is not None:
        try:
            numbers.close()
            Lease.check(run.folder, lease_number)
            _leave_result(run, trainer, source, lengths, frozen)
        except (OSError, SafetensorError) as error:
            _remove_unfinished_models(run)
            raise StageError(
                f"{run.stage} has done all steps, but its model cannot be written in {run.folder} "
                f"({getattr(error, 'strerror', None) or error}); free some space, and the same command continues from "
                "the last checkpoint."
            ) from error


@contextmanager
def _warnings_kept(path: Path, rank: int) -> Iterator[None]:
    """What this worker warns of is appended to a file in the run's folder: its own output may be seen by nobody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter(f"%(asctime)s\tworker {rank}: %(message)s"))
    library = logging.getLogger("tinyvlm")
    library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)
        handler.close()


def _devices(collective: Collective, device: torch.device) -> tuple[float, dict[str, Any]]:
    """Matrix rate of all workers' devices together, and what metrics.jsonl says of them."""
    rate = device_rate(device)
    total = torch.tensor([rate.flops], dtype=torch.float64, device=device)
    collective.sum(total)
    peak = float(total[0])
    return peak, {"device": rate.device, "peak_flops": peak, "peak_source": rate.source}


def start_model(run: TrainingRun) -> tuple[Any, TinyVLMProcessor]:
    """The model that the stage starts from, in float32, the same on every worker."""
    if run.init:
        return load(run.init)
    model = settings.from_dict(ModelConfig, run.recipe["model"], "model.")
    return build(model, settings.from_dict(PictureConfig, run.recipe["picture"], "picture."), run.config.seed)


def _writing_hooks(run: TrainingRun, numbers: metrics.MetricsFile, lease_number: int, told: Hooks) -> Hooks:
    """What worker 0 does besides: it alone writes."""

    def held_out(step: int, loss: float, seconds: float) -> None:
        numbers.held_out(step, loss, seconds)
        told.on_held_out(step, loss, seconds)

    def bad_step(bad: BadStep) -> None:
        told.on_bad_step(bad)
        numbers.skipped(bad.step, bad.loss, bad.norm)

    def sources(step: int, split: str, sums: LossSums) -> None:
        numbers.sources(step, split, sums.told())

    config, root = run.config, checkpoint.root_of(run.folder, run.config.checkpoints_at)
    checkpoint.clear(root)
    writer = checkpoint.Writer(
        root,
        checkpoint.Keep(newest=config.keep_checkpoints, best=config.keep_best_checkpoints),
        in_background=config.checkpoints_in_background,
        before_done=lambda: Lease.check(run.folder, lease_number),
    )
    return replace(
        told,
        on_step=numbers.step,
        on_held_out=held_out,
        on_sources=sources,
        on_bad_step=bad_step,
        save=writer.save,
        settle=writer.finish,
    )


def _noting_hooks(ledger: Ledger, training: plan.Plan, hooks: Hooks) -> Hooks:
    """The same, with a ledger."""

    def start(first_step: int, updates: int, skipped: int) -> None:
        hooks.on_start(first_step, updates, skipped)
        ledger.start(training.fingerprint, first_step, updates, skipped)

    return replace(hooks, on_start=start, entering=ledger.step)


def _keep_bad_step(run: TrainingRun, bad: BadStep, rank: int) -> None:
    try:
        bad_steps.keep(run.folder, bad, rank)
    except OSError as error:  # the loss itself is the news
        log.warning("the batches of step %d could not be kept (%s)", bad.step + 1, error.strerror or error)


def _agreed_state(
    run: TrainingRun, training: plan.Plan, collective: Collective, device: str
) -> checkpoint.State | None:
    """The newest checkpoint that worker 0 can read, on every worker.

    Raises:
        CheckpointError: another worker cannot read it.
    """
    root, state = checkpoint.root_of(run.folder, run.config.checkpoints_at), None
    if collective.rank == 0:
        state = checkpoint.load_newest(root, training.fingerprint, log.warning)
    step = torch.tensor([-1 if state is None else int(state["steps_done"])], device=device)
    collective.broadcast(step)
    if collective.rank > 0 and int(step) >= 0:
        state = checkpoint.load(checkpoint.place_of(root, int(step)))
    return state


def _measure(run: TrainingRun, processor: TinyVLMProcessor, collective: Collective) -> list[Path]:
    """Files with the lengths of all conversations, one for each data file; each worker measures its share of them.

    An interrupted run keeps what it has.  The stage before has measured the same conversations with the same tokenizer,
    and its numbers are taken over.
    """
    spelling, files = _spelling(processor), []
    for folder, identity in run.prepare.items():
        kept = settings.fingerprint([identity, spelling])[:12]
        for number, path in enumerate(data_files([Path(folder)])):
            files.append((path, f"lengths/{kept}/part-{number:05d}.parquet"))
    for data, name in files[collective.rank :: collective.world]:
        path, earlier = run.folder / name, Path(run.init).parent / name
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        if run.init and earlier.is_file():
            shutil.copyfile(earlier, temporary)
        else:
            pq.write_table(measure({0: data}, processor), temporary)
        os.replace(temporary, path)
    collective.barrier()
    return [run.folder / name for _, name in files]


def _read_lengths(files: Sequence[Path], columns: Sequence[str] = plan.LENGTHS.names) -> pa.Table:
    """The lengths of all data files, each with its number among all; `columns`, "part" among them, or all."""
    tables = [plan.LENGTHS.empty_table().select(list(columns))]
    place = tables[0].schema.get_field_index("part")
    for part, path in enumerate(files):
        table = pq.read_table(path, columns=list(columns))
        number = pa.array(np.full(table.num_rows, part, np.int32))
        tables.append(table.set_column(place, plan.LENGTHS.field("part"), number))
    return pa.concat_tables(tables)


def _spelling(processor: TinyVLMProcessor) -> str:
    """What decides a conversation's length: the tokenizer and the number of image tokens."""
    return settings.fingerprint([processor.tokenizer.backend_tokenizer.to_str(), processor.num_image_tokens])


def _plans(run: TrainingRun, lengths: Sequence[Path], collective: Collective) -> tuple[plan.Plan, plan.Plan]:
    """The plans of training and validation.  Worker 0 makes them once; after that the saved ones are what counts."""
    paths = run.folder / "validation.parquet", run.folder / "plan.parquet"
    if collective.rank == 0 and not paths[-1].is_file():
        table = _read_lengths(lengths)
        plan.build_validation(table, run.config).save(paths[0])
        training = plan.build(table, run.config)
        for line in mixture.lines(training.mixture, training.remarks):
            log.info("%s mixture · %s", run.stage, line)
        sizes = group_sizes(data_files(map(Path, run.prepare)))
        summary = training.summary() | {
            "mixture": training.mixture,
            "remarks": training.remarks,
            "reading": [asdict(reading(training, sizes, world)) for world in sorted({1, 2, 8, collective.world})],
        }
        write_atomic(run.folder / "plan.json", json.dumps(summary, indent=2))
        training.save(paths[-1])
    collective.barrier()
    validation, training = map(plan.Plan.load, paths)
    return training, validation


def _remove_unfinished_models(run: TrainingRun) -> None:
    for path in run.folder.glob(".model.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _leave_result(
    run: TrainingRun, trainer: Trainer, source: Conversations, lengths: Sequence[Path], frozen: Mapping[str, str]
) -> None:
    """Save the model in the shape in which others load it, then say so."""
    final, temporary = run.folder / "model", run.folder / f".model.{os.getpid()}.tmp"
    _remove_unfinished_models(run)
    trainer.model.eval()
    disable_progress_bar()
    trainer.model.save_pretrained(temporary)
    source.processor.save_pretrained(temporary)
    numbers = metrics.read(run.folder / "metrics.jsonl").summary()
    (temporary / "recipe.json").write_text(json.dumps(dict(run.recipe), indent=2))
    training = {"stage": run.stage, "fingerprint": run.fingerprint, "inputs": dict(run.inputs), "metrics": numbers}
    (temporary / "training.json").write_text(json.dumps(training, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    result = {
        "statuses": plan.count_statuses(_read_lengths(lengths), run.config),
        "parameters": trainer.policy.counts(),
        "frozen": dict(frozen),
        "plan": trainer.work.plan.summary(),
        "mixture": trainer.work.plan.mixture,
        "remarks": trainer.work.plan.remarks,
        "planned_reading": json.loads((run.folder / "plan.json").read_text())["reading"],
        "reading": source.account(),
        "files": sorted(path.name for path in final.iterdir()),
    }
    write_atomic(run.folder / "result.json", json.dumps(result, indent=2))
