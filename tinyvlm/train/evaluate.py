"""A model's greedy answers on held-out conversations: BLEU of its captions, and a sheet of samples.

    validation.parquet ──a fixed shuffle──▶ captions, pictures for the sheet ──▶ Questions
    the newest checkpoint's weights over the first ones, or model/ ──Engine, greedy──▶ answers ──▶ evaluations/

Run as a program (`python -m tinyvlm.train.evaluate`), it takes a pickled TrainingRun on its input: this is how
`run_local` evaluates beside the training.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from tinyvlm import chat
from tinyvlm.chat import Message
from tinyvlm.data.conversations import messages_of
from tinyvlm.data.samples import Place, rows_at, sheet_item
from tinyvlm.errors import CheckpointError, InputError
from tinyvlm.eval.captions import corpus_bleu
from tinyvlm.folders import write_atomic
from tinyvlm.generation import Engine, Sampling
from tinyvlm.images import ImageError
from tinyvlm.model import Sample, load
from tinyvlm.train import checkpoint, evaluations
from tinyvlm.train.adapters import add_adapters, merge_adapters
from tinyvlm.train.data import data_files
from tinyvlm.train.freeze import FreezePolicy
from tinyvlm.train.plan import Plan
from tinyvlm.train.run import TrainingRun
from tinyvlm.train.worker import start_model

log = logging.getLogger(__name__)

TRIES = 3
"""How often the newest checkpoint is looked for: the training deletes old ones, at times while they are being read."""
_COLUMNS = ("family", "messages", "images", "meta")


@dataclass(frozen=True)
class Question:
    """A held-out conversation up to its first answer."""

    messages: list[Message]
    pictures: list[bytes]
    truth: str
    references: list[str]
    family: str

    @property
    def asked(self) -> str:
        """What the last message before the answer says."""
        return self.messages[-1].text.strip()


def evaluate_newest(run: TrainingRun) -> None:
    """Measure BLEU with the newest checkpoint's weights, and write it down.

    Raises:
        CheckpointError: there is none that can be read.
    """
    started = time.perf_counter()
    step, model, processor = newest_model(run)
    engine = Engine(model.to("cuda" if torch.cuda.is_available() else "cpu"), processor)
    captions, _ = held_out_questions(run, run.config.show.bleu_captions, 0)
    evaluations.write(run.folder, step, _bleu(run, engine, captions, started))


def evaluate_finished(run: TrainingRun, device: str = "cpu") -> None:
    """Measure BLEU with the finished model, and let it answer about some held-out pictures.

    A model that took days is not lost to its sheet: what goes wrong here is written down, and the report tells it.
    """
    started = time.perf_counter()
    step = Plan.load(run.folder / "plan.parquet").num_steps
    show = run.config.show
    if not show.bleu_captions and not show.sample_pictures:
        return
    try:
        model, processor = load(run.folder / "model")
        engine = Engine(model.to(device), processor)
        captions, shown = held_out_questions(run, show.bleu_captions, show.sample_pictures)
        if shown:
            _write_samples(run, step, shown, _answers(run, engine, shown))
        if show.bleu_captions:
            evaluations.write(run.folder, step, _bleu(run, engine, captions, started))
    except Exception as error:
        log.warning("the finished model was not evaluated", exc_info=True)
        evaluations.write(run.folder, step, {"failed": f"{type(error).__name__}: {error}"})


def held_out_questions(run: TrainingRun, num_captions: int, num_shown: int) -> tuple[list[Question], list[Question]]:
    """Captions for BLEU, and questions about pictures, some of each family: the same in every evaluation of a run."""
    plan, files = Plan.load(run.folder / "validation.parquet"), data_files(map(Path, run.prepare))
    order = np.random.default_rng([run.config.seed, 1]).permutation(len(plan.items))
    items = plan.items[order]
    families, places = _families_and_places(files, items)
    seen = [place for place, pictures in zip(places, items["pictures"].tolist(), strict=True) if pictures]
    captions = [place for place in seen if families[place] == "caption"][:num_captions]
    by_family = [[place for place in seen if families[place] == name] for name in sorted(set(families.values()))]
    rounds = chain.from_iterable(zip_longest(*(members[:num_shown] for members in by_family)))
    shown = [place for place in rounds if place is not None][:num_shown]
    rows = rows_at(files, {*captions, *shown}, _COLUMNS)
    asked = {place: _question(row) for place, row in rows.items()}
    return [asked[place] for place in captions], [asked[place] for place in shown]


def _families_and_places(files: Sequence[Path], items: Any) -> tuple[dict[Place, str], list[Place]]:
    """Where each item's row lies in its file, and of which family it is."""
    families: dict[Place, str] = {}
    places: list[Place] = [Place(0, 0)] * len(items)
    for part in np.unique(items["part"]).tolist():
        with pq.ParquetFile(files[part], read_dictionary=["family"]) as file:
            groups = range(file.metadata.num_row_groups)
            starts = [0, *accumulate(file.metadata.row_group(group).num_rows for group in groups)]
            column = file.read(["family"])["family"]
        for number in np.flatnonzero(items["part"] == part).tolist():
            place = Place(part, starts[items["group"][number]] + int(items["row"][number]))
            places[number], families[place] = place, column[place.row].as_py()
    return families, places


def _question(row: dict[str, Any]) -> Question:
    messages = messages_of(row["messages"])
    first = next(number for number, message in enumerate(messages) if message.role == "assistant")
    asked, truth = messages[:first], messages[first].text
    shown = sum(isinstance(part, chat.Picture) for message in asked for part in message.parts)
    meta = json.loads(row.get("meta") or "{}")
    pictures = [picture["bytes"] for picture in (row["images"] or [])[:shown]]
    return Question(asked, pictures, truth, meta.get("references") or [truth], row["family"] or "")


def _answers(run: TrainingRun, engine: Engine, questions: Sequence[Question]) -> list[str | None]:
    """Greedy answers; None where a question cannot be asked."""
    encoded = [_encode(engine, question) for question in questions]
    ready = [sample for sample in encoded if sample is not None]
    made = iter(engine.generate(ready, Sampling(max_new_tokens=run.config.show.max_new_tokens)))
    return [None if sample is None else next(made).text.strip() for sample in encoded]


def _encode(engine: Engine, question: Question) -> Sample | None:
    processor = engine.processor
    try:
        ids, supervised = processor.tokens(question.messages, len(question.pictures), open_answer=True)
        if len(ids) >= engine.context_length:
            return None
        return Sample(ids, supervised, processor.pixels(question.pictures))
    except (ImageError, InputError):
        return None


def _bleu(run: TrainingRun, engine: Engine, captions: Sequence[Question], started: float) -> dict[str, Any]:
    answers = _answers(run, engine, captions)
    pairs = [(answer, one.references) for answer, one in zip(answers, captions, strict=True) if answer is not None]
    told: dict[str, Any] = {"num_captions": len(pairs), "device": str(engine.model.device)}
    if pairs:
        told["bleu"] = [round(score, 4) for score in corpus_bleu([a for a, _ in pairs], [r for _, r in pairs])]
    return {**told, "seconds": round(time.perf_counter() - started, 2)}


def _write_samples(run: TrainingRun, step: int, shown: Sequence[Question], answers: Sequence[str | None]) -> None:
    items = []
    for question, answer in zip(shown, answers, strict=True):
        said = "(could not be asked)" if answer is None else answer or "(nothing)"
        caption = f"{question.asked} → {said} (truth: {question.truth.strip()})"
        items.append(sheet_item(caption, question.pictures[0] if question.pictures else None))
    (run.folder / "evaluations").mkdir(parents=True, exist_ok=True)
    write_atomic(run.folder / "evaluations" / "samples.json", json.dumps({"step": step, "items": items}))


def newest_model(run: TrainingRun) -> tuple[int, Any, Any]:
    """Step, model and processor: the model that the run started from, with the newest weights in their places.

    Raises:
        CheckpointError: there is no checkpoint that can be read.
    """
    model, processor = start_model(run)
    state, has_adapters = _newest_state(run), run.config.lora.rank > 0
    if has_adapters:
        add_adapters(model.language, run.config.lora, run.config.seed)
    new_tokens = processor.tokenizer.convert_tokens_to_ids(list(chat.IMAGE_TOKENS))
    policy = FreezePolicy(model, run.config.rates, new_tokens, adapters_only=has_adapters)
    weights = state["average"] or state["weights"]
    with torch.no_grad():
        for name, parameter in policy.parameters().items():
            parameter.copy_(weights[name])
    if policy.new_rows is not None:
        policy.new_rows.merge()
    if has_adapters:
        merge_adapters(model.language)
    return int(state["steps_done"]), model.eval(), processor


def _newest_state(run: TrainingRun) -> checkpoint.State:
    fingerprint = Plan.load(run.folder / "plan.parquet").fingerprint
    root = checkpoint.root_of(run.folder, run.config.checkpoints_at)
    for _ in range(TRIES):
        state = checkpoint.load_newest(root, fingerprint, log.info)
        if state is not None:
            return state
    raise CheckpointError(f"{run.folder} has no checkpoint that can be read.")


class Subprocess:
    """`beside` in a process of its own."""

    def __init__(self, run: TrainingRun) -> None:
        run.folder.joinpath("evaluations").mkdir(exist_ok=True)
        self._log = run.folder / "evaluations" / "log.txt"
        with self._log.open("ab") as log_file:
            command = [sys.executable, "-m", "tinyvlm.train.evaluate"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log_file, stderr=log_file)
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(pickle.dumps(run))

    def is_running(self) -> bool:
        return self._process.poll() is None

    def failure(self) -> str:
        return f"exit code {self._process.returncode}, see {self._log}" if self._process.returncode else ""

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def beside(run: TrainingRun) -> None:
    """`evaluate_newest`, giving way to everything else on this machine."""
    os.nice(10)
    torch.set_num_threads(1)
    evaluate_newest(run)


if __name__ == "__main__":
    beside(pickle.load(sys.stdin.buffer))
