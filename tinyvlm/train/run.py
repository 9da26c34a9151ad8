"""A training stage's folder: what goes in, how it is named, how it is closed.

    {root}/pretrain-{fingerprint[:12]}/
        lengths/part-*.parquet, plan.parquet, plan.json     what will be seen, in which order
        checkpoints/step-…                                  how far it got
        metrics.jsonl                                       one line a step
        warnings.log                                        what the workers warned of
        ledger/, bad-steps/                                 what entered the model; steps whose loss was no number
        evaluations/step-….json, samples.json               BLEU of checkpoints, the finished model's answers
        tensorboard/, wandb/                                the same for those who look there
        model/                                              the result, a Hugging Face folder with its card
        result.json                                         the workers are done
        stats.json, report.html, manifest.json              closed (see folders.py)

`TrainingRun` is light and picklable: the driver makes one and closes its folder, workers carry it out (worker.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tinyvlm
from tinyvlm import config as settings
from tinyvlm.errors import StageError
from tinyvlm.folders import Manifest, close_folder, find_folder, find_folders, git_commit, point_latest, write_atomic
from tinyvlm.storage import require_disk
from tinyvlm.train.settings import TrainConfig

VERSION = 2
"""Raise it when the code changes the weights that come out."""

WARNINGS_FILE = "warnings.log"
"""What all workers warned of, one line each; it is only ever appended to."""

BEFORE = {"pretrain": "", "sft": "pretrain", "instruct": "sft"}
"""Each training stage and the one whose model it starts from; the first one builds its model."""


@dataclass(frozen=True)
class TrainingRun:
    """One training stage on one input.

    Attributes:
        stage: a key of `BEFORE`.
        recipe: the whole recipe as plain JSON types, kept with the model.
        prepare: folders of conversations and the identity of each, in the order in which they are read.
        init: the model folder to start from; "" builds one from `recipe["model"]`.
        inputs: what is read, by name, with its identity.
        features: encode folders, where features are stored ones.
    """

    stage: str
    config: TrainConfig
    recipe: Mapping[str, Any]
    prepare: Mapping[str, str]
    init: str
    inputs: Mapping[str, str]
    root: str
    features: tuple[str, ...] = ()
    folder: Path = field(init=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        made_of = {} if self.init else {name: self.recipe[name] for name in ("model", "picture")}
        identity = [self.stage, VERSION, settings.to_dict(self.config, with_speed=False), dict(self.inputs), made_of]
        object.__setattr__(self, "fingerprint", settings.fingerprint(identity))
        object.__setattr__(self, "folder", Path(self.root).absolute() / f"{self.stage}-{self.fingerprint[:12]}")

    @property
    def is_finished(self) -> bool:
        """The folder is closed."""
        return (self.folder / "manifest.json").is_file()

    @property
    def is_trained(self) -> bool:
        """The workers are done; only closing is left."""
        return (self.folder / "result.json").is_file()

    def finished_manifest(self) -> Manifest:
        """The manifest of a closed folder; also points `latest` at it."""
        manifest = Manifest.read(self.folder)
        point_latest(Path(self.root), self.stage, self.folder)
        return manifest

    def finish(self, seconds: float) -> Manifest:
        """Write statistics, report and manifest.

        Raises:
            StageError: the workers left no result.
        """
        try:
            result = json.loads((self.folder / "result.json").read_text())
        except (OSError, json.JSONDecodeError):
            raise StageError(f"{self.stage} left no model in {self.folder}; run the same command again.") from None
        from tinyvlm.train import card, report

        account = report.Account.of(self, result)
        statistics = report.statistics(account, seconds)
        write_atomic(self.folder / "model" / "README.md", card.model_card(account))
        statuses, rows = result["statuses"], statistics["rows_in"]
        manifest = Manifest(
            stage=self.stage,
            version=VERSION,
            fingerprint=self.fingerprint,
            settings=settings.to_dict(self.config),
            inputs={"fingerprint": settings.fingerprint(dict(self.inputs)), "folders": self._folders()},
            rows_in=rows,
            rows_out=rows,
            statuses=statuses,
            files={
                f"model/{name}": _describe(self.folder / "model" / name)
                for name in sorted({*result["files"], "README.md"})
            },
            seconds=round(seconds, 2),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tinyvlm_version=tinyvlm.__version__,
            git_commit=git_commit(),
            extra={
                "model": "model",
                "metrics": account.numbers.summary(),
                "frozen": result["frozen"],
                "plan": result["plan"],
            },
        )
        close_folder(self.folder, manifest, statistics)
        point_latest(Path(self.root), self.stage, self.folder)
        return manifest

    def _folders(self) -> dict[str, str]:
        folders = {"prepare": ", ".join(self.prepare), "init": self.init or "built"}
        return folders | ({"encode": ", ".join(self.features)} if self.features else {})


def open_run(
    stage: str, config: TrainConfig, recipe: Mapping[str, Any], inputs: Sequence[Path], root: Path
) -> TrainingRun:
    """Find what a training stage reads, and name its folder.

    Raises:
        StageError: a folder that it reads is not there.
    """
    require_disk(stage, *inputs, root)
    folders = [folder.absolute() for folder in find_folders(inputs, "prepare", stage)]
    prepare = {str(folder): Manifest.read(folder).identity for folder in folders}
    identities = {"prepare": settings.fingerprint(list(prepare.values()))}
    init = ""
    if config.init:
        init, identities["init"] = _given_model(stage, Path(config.init))
    elif BEFORE[stage]:
        before = find_folder(inputs, BEFORE[stage], stage).absolute()
        init, identities["init"] = str(before / "model"), Manifest.read(before).identity
    features: tuple[str, ...] = ()
    if config.features == "stored":
        encoded = [folder.absolute() for folder in find_folders(inputs, "encode", stage)]
        features = tuple(map(str, encoded))
        identities["encode"] = settings.fingerprint([Manifest.read(folder).identity for folder in encoded])
    return TrainingRun(stage, config, recipe, prepare, init, identities, str(root.absolute()), features)


def _given_model(stage: str, path: Path) -> tuple[str, str]:
    """A model named in the settings: the folder of a training stage, or a model folder."""
    if (path / "manifest.json").is_file():
        return str(path.absolute() / "model"), Manifest.read(path).identity
    if not (path / "config.json").is_file():
        raise StageError(f"{stage}.init wants a model folder (with config.json) or a training stage's, not {path}.")
    weights = sorted(path.glob("*.safetensors"))
    return str(path.absolute()), settings.fingerprint([_describe(file)["sha256"] for file in weights])


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def run_local(run: TrainingRun) -> Manifest:
    """Carry a training stage out in this process; the same folder comes out as over Ray, up to rounding."""
    from tinyvlm.lease import Lease
    from tinyvlm.train.collective import Alone
    from tinyvlm.train.evaluate import Subprocess, evaluate_finished
    from tinyvlm.train.follow import followed, shown
    from tinyvlm.train.stopping import sigterm_noticed
    from tinyvlm.train.worker import carry_out

    if run.is_finished:
        return run.finished_manifest()
    started = time.perf_counter()
    with Lease.take(run.folder) as lease:
        if not run.is_trained:
            with (
                shown(run, lambda: Subprocess(run)) as follower,
                followed(follower),
                sigterm_noticed() as asked,
            ):
                carry_out(run, Alone(), lease.number, wants_to_stop=asked.is_set)
                evaluate_finished(run)
        return run.finish(time.perf_counter() - started)
