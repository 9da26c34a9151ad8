"""What a finished training stage says of itself: curves, a summary, samples, what was left out.

metrics.jsonl · evaluations/ · result.json ──▶ Account ──┬─▶ statistics: stats.json, report.html
                                                         └─▶ facts: the same in words, also for the model card
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyvlm.charts import number
from tinyvlm.report import size
from tinyvlm.train import evaluations, metrics
from tinyvlm.train.run import TrainingRun

MAX_SOURCES = 6
"""Sources with a curve of their own: those with the most supervised tokens."""
JOULES_PER_KWH = 3.6e6

Series = dict[str, dict[str, list[Any]]]


@dataclass(frozen=True, kw_only=True)
class Account:
    """Everything that is known of a run whose workers are done."""

    run: TrainingRun
    result: Mapping[str, Any]
    numbers: metrics.Metrics
    evaluations: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, str]]

    @classmethod
    def of(cls, run: TrainingRun, result: Mapping[str, Any]) -> Account:
        """Read what the run's folder holds."""
        samples: list[Mapping[str, str]] = []
        path = run.folder / "evaluations" / "samples.json"
        if path.is_file():
            samples = json.loads(path.read_text())["items"]
        numbers = metrics.read(run.folder / "metrics.jsonl")
        return cls(run=run, result=result, numbers=numbers, evaluations=evaluations.read(run.folder), samples=samples)

    @property
    def bleu(self) -> Mapping[str, Any] | None:
        """The last evaluation that measured BLEU."""
        return next((told for told in reversed(self.evaluations) if "bleu" in told), None)

    @property
    def device_hours(self) -> float:
        """Working time of all workers."""
        return sum(int(line["workers"]) * seconds for line, seconds in self._attempts()) / 3600

    @property
    def kilowatt_hours(self) -> tuple[float, str] | None:
        """Energy and where it is known from; None where nobody measured and no power is given."""
        watts = self.run.config.show.watts
        if watts:
            return watts * self.device_hours / 1000, f"{number(watts)} W a worker"
        measured = [line for line in self.numbers.steps if "joules" in line]
        if not measured:
            return None
        workers = self.numbers.attempts[-1]["workers"]
        joules = workers * sum(line["joules"] for line in measured)
        return joules / JOULES_PER_KWH, f"NVML, worker 0's GPU times {workers}"

    def _attempts(self) -> list[tuple[Mapping[str, Any], float]]:
        """Each start of the run with the seconds that it worked."""
        return list(zip(self.numbers.attempts, self.numbers.attempt_seconds, strict=True))


def statistics(account: Account, seconds: float) -> dict[str, Any]:
    """The content of stats.json.  Numbers that the summary says in words are there for programs, not shown again."""
    result, totals = account.result, account.numbers.summary()
    if account.bleu is not None:
        totals |= {f"bleu_{order}": score for order, score in enumerate(account.bleu["bleu"], 1)}
    energy = account.kilowatt_hours
    if energy is not None:
        totals["kilowatt_hours"] = round(energy[0], 6)
    rows = sum(result["statuses"].values())
    told: dict[str, Any] = {
        "stage": account.run.stage,
        "rows_in": rows,
        "rows_out": rows,
        "statuses": result["statuses"],
        "seconds": round(seconds, 2),
        **totals,
        "hidden": list(totals),
        "tiles": tiles(account, seconds),
        "rows": facts(account),
        "parameters": result["parameters"],
        "charts": charts(account),
        "sections": {
            "data": {
                "plan": result["plan"],
                "remarks": result["remarks"],
                "reading": result["reading"],
                "mixture": result["mixture"],
                "planned_reading": result["planned_reading"],
                "folded": ["planned_reading"],
            },
        },
    }
    missing = left_out(account)
    if missing:
        told["left_out"] = missing
    if account.samples:
        told["pictures"] = {
            "title": "Held-out pictures: what was asked → the finished model's greedy answer (the truth)",
            "items": list(account.samples),
        }
    return told


def tiles(account: Account, seconds: float) -> list[tuple[str, str]]:
    """The numbers to see first."""
    totals, bleu, mfu = account.numbers.summary(), account.bleu, account.numbers.mfu
    told = [
        ("steps", f"{totals['steps']:,}"),
        ("samples", number(totals["samples_seen"])),
        ("loss", "" if totals["last_loss"] is None else f"{totals['last_loss']:.3f}"),
        ("held-out loss", "" if totals["held_out_loss"] is None else f"{totals['held_out_loss']:.3f}"),
        ("BLEU-4", "" if bleu is None else f"{bleu['bleu'][3]:.3f}"),
        ("tokens / s", number(totals["tokens_per_s"])),
        ("MFU", "" if mfu is None else f"{mfu:.0%}"),
        ("time", _duration(seconds)),
    ]
    return [(label, text) for label, text in told if text]


def left_out(account: Account) -> list[dict[str, Any]]:
    """What did not happen as planned; rows that were not used stand among the outcomes."""
    failed = [
        {"what": f"evaluation of step {told['step']}", "why": told["failed"]}
        for told in account.evaluations
        if "failed" in told
    ]
    skipped = account.numbers.summary().get("skipped")
    bad = [{"what": f"{skipped} steps", "why": "their loss or gradient was no finite number"}] if skipped else []
    no_captions = account.run.config.show.bleu_captions and account.bleu is None and not failed
    nothing = [{"what": "BLEU", "why": "no held-out captions among the conversations"}] if no_captions else []
    return [*failed, *bad, *nothing]


def facts(account: Account) -> list[tuple[str, str]]:
    """The summary as label and text, in the order in which a person asks."""
    run, totals = account.run, account.numbers.summary()
    start = "another stage's model" if run.init else "the parts of the recipe, with a new connector"
    lines = [
        ("started from", f"{start} ({run.inputs['init'][:12]})" if run.init else start),
        ("conversations", f"{run.config.mixture} ({run.inputs['prepare'][:12]})"),
        ("run", f"{run.fingerprint[:12]}; of its settings alone {_settings_hash(run)[:12]}"),
        ("devices", _devices(account)),
        ("working time", _time(account)),
        ("seen", _seen(account)),
        ("loss", _losses(totals)),
        ("captions", _bleu(account)),
        ("throughput", _throughput(totals)),
        ("model operations", _operations(account)),
        ("goodput", _goodput(totals)),
        ("memory", _memory(account)),
        ("energy and cost", _energy(account)),
    ]
    return [(name, text) for name, text in lines if text]


def _settings_hash(run: TrainingRun) -> str:
    from tinyvlm import config

    return config.fingerprint(run.config)


def _devices(account: Account) -> str:
    last = account.numbers.attempts[-1]
    if "device" not in last:
        return ""
    each = last["peak_flops"] / last["workers"] / 1e12
    return f"{last['workers']} × {last['device']}, {number(each)} TFLOP/s each ({last['peak_source']})"


def _time(account: Account) -> str:
    attempts = account.numbers.attempts
    again = f", in {len(attempts)} attempts" if len(attempts) > 1 else ""
    return f"{_duration(account.numbers.seconds)}{again}; {number(account.device_hours)} device hours"


def _seen(account: Account) -> str:
    totals, fill = account.numbers.summary(), account.result["plan"]["fill"]
    words = (
        f"{totals['samples_seen']:,} samples with {totals['pictures_seen']:,} pictures",
        f"{totals['tokens_seen']:,} tokens, {totals['supervised_seen']:,} of them supervised",
        f"{totals['steps']:,} steps, filled to {fill:.1%}",
    )
    return "; ".join(words)


def _losses(totals: Mapping[str, Any]) -> str:
    if totals["first_loss"] is None:
        return ""
    held_out = totals["held_out_loss"]
    after = "" if held_out is None else f", held out {number(held_out)}"
    return f"{number(totals['first_loss'])} → {number(totals['last_loss'])}{after}"


def _bleu(account: Account) -> str:
    told = account.bleu
    if told is None:
        return ""
    scores = "  ".join(f"BLEU-{order} {score:.3f}" for order, score in enumerate(told["bleu"], 1))
    return f"{scores} on {told['num_captions']:,} held-out ones, greedily, after step {told['step']:,}"


def _throughput(totals: Mapping[str, Any]) -> str:
    names = (
        ("samples", "samples"),
        ("tokens", "tokens"),
        ("supervised", "supervised tokens"),
        ("pictures", "pictures"),
    )
    return "  ".join(f"{number(totals[f'{key}_per_s'])} {name}/s" for key, name in names)


def _operations(account: Account) -> str:
    sums = account.numbers.flops
    whole = sum(sums.values())
    if not whole:
        return ""
    parts = "  ".join(f"{name} {value / whole:.0%}" for name, value in sums.items())
    mfu = account.numbers.mfu
    used = "" if mfu is None else f"; {mfu:.1%} of the devices' rate (MFU)"
    return f"{whole:.3g} ({parts}){used}"


def _goodput(totals: Mapping[str, Any]) -> str:
    if totals["goodput"] is None:
        return ""
    waited = f"{totals['data_wait']:.1%} of that waited for data"
    return f"{totals['goodput']:.1%} of the working time was in steps that count; {waited}"


def _memory(account: Account) -> str:
    own = max((line.get("memory_bytes", 0) for line in account.numbers.steps), default=0)
    device = max((line.get("device_bytes", 0) for line in account.numbers.steps), default=0)
    return f"{size(own)} in worker 0" + (f", {size(device)} on its GPU" if device else "")


def _energy(account: Account) -> str:
    words = []
    energy, price = account.kilowatt_hours, account.run.config.show.price_per_hour
    if energy is not None:
        words.append(f"{number(energy[0])} kWh ({energy[1]})")
    if price:
        words.append(f"{number(price * account.device_hours)} at {number(price)} a worker and hour")
    return "; ".join(words)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def charts(account: Account) -> list[dict[str, Any]]:
    """The curves; one without numbers is left out."""
    numbers = account.numbers
    steps = _thinned(numbers.steps)
    at = [line["step"] for line in steps]
    seconds = [max(line["seconds"], 1e-9) for line in steps]

    def over(name: str, values: list[Any]) -> Series:
        return {name: {"x": at, "y": values}} if any(value is not None for value in values) else {}

    loss = over("training", _smooth([line["loss"] for line in steps]))
    if numbers.held_out:
        held_out = numbers.held_out
        loss["held out"] = {"x": [line["step"] for line in held_out], "y": [line["held_out_loss"] for line in held_out]}
    rates = {
        name: {"x": at, "y": [line["rates"][name] for line in steps]} for name in (steps[0]["rates"] if steps else {})
    }
    speed = over("tokens", _smooth([line["tokens"] / s for line, s in zip(steps, seconds, strict=True)]))
    shares = over("MFU", _percent(_smooth([line.get("mfu") for line in steps])))
    waits = over(
        "waiting for data",
        _percent(_smooth([min(1.0, line["data_wait_s"] / s) for line, s in zip(steps, seconds, strict=True)])),
    )
    memory = {
        **over("worker 0", [line.get("memory_bytes", 0) / 2**30 or None for line in steps]),
        **over("its GPU", [line.get("device_bytes", 0) / 2**30 or None for line in steps]),
    }
    made = [
        _line("Loss", "loss per supervised token", loss),
        _by_kind("training", numbers.sources["train"]),
        _by_kind("held out", numbers.sources["held_out"]),
        _line("BLEU of held-out captions", "0 … 1", _bleu_curves(account.evaluations)),
        _line("Learning rate", "learning rate", rates),
        _line("Gradient", "norm before clipping", over("gradient", [line["gradient_norm"] for line in steps])),
        _line("Throughput", "tokens per second", speed),
        _line("Share of the devices' matrix rate that the model needs", "per cent", shares),
        _line("Share of each step that waited for data", "per cent", waits, y_range=[0, 100] if waits else None),
        _line("Memory", "GiB", memory),
    ]
    return [chart for chart in made if chart["series"]]


def _line(title: str, y_label: str, series: Series, y_range: list[float] | None = None) -> dict[str, Any]:
    told = {"kind": "line", "title": title, "x_label": "step", "y_label": y_label, "series": series}
    return told if y_range is None else {**told, "y_range": y_range}


def _by_kind(split: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The loss of each source; of each family where there is one source only."""
    curves, what = _curves(lines, "sources"), "source"
    if not curves:
        curves, what = _curves(lines, "families"), "family"
    return _line(f"Loss by {what}, {split}", "loss per supervised token", curves)


def _curves(lines: Sequence[Mapping[str, Any]], field: str) -> Series:
    """Of the largest sources or families, the losses over steps; none where there is only one, which is the loss."""
    tokens: dict[str, float] = {}
    curves: Series = {}
    for line in _thinned(lines):
        for name, told in line[field].items():
            tokens[name] = tokens.get(name, 0) + told["tokens"]
            curve = curves.setdefault(name, {"x": [], "y": []})
            curve["x"].append(line["step"])
            curve["y"].append(told["loss"])
    largest = sorted(tokens, key=lambda name: -tokens[name])[:MAX_SOURCES]
    return {name: curves[name] for name in sorted(largest)} if len(tokens) > 1 else {}


def _bleu_curves(evaluations: Sequence[Mapping[str, Any]]) -> Series:
    measured = [told for told in evaluations if "bleu" in told]
    at = [told["step"] for told in measured]
    return (
        {f"BLEU-{order}": {"x": at, "y": [told["bleu"][order - 1] for told in measured]} for order in (1, 2, 3, 4)}
        if at
        else {}
    )


def _thinned(lines: Sequence[Mapping[str, Any]], most: int = 400) -> list[Mapping[str, Any]]:
    return list(lines[:: max(1, -(-len(lines) // most))])


def _percent(values: list[Any]) -> list[Any]:
    return [None if value is None else 100 * value for value in values]


def _smooth(values: list[Any], share: float = 0.2) -> list[Any]:
    """Running mean in which the newest value has the weight `share`; what is None stays so."""
    smooth: list[Any] = []
    last: float | None = None
    for value in values:
        if value is not None:
            last = value if last is None else last + share * (value - last)
        smooth.append(None if value is None else float(f"{last:.6g}"))
    return smooth
