"""What the kept answers come to: accuracy beside chance, BLEU, tables, and wrong answers with their pictures.

Everything is counted from two folders: `evaluate`'s answers and `prepare`'s conversations (training questions for the
blind guess, pictures to show, and how many questions never got their picture: those count as wrong).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tinyvlm import schema
from tinyvlm.data.conversations import messages_of
from tinyvlm.data.samples import rows_by_key, sheet_item
from tinyvlm.eval.captions import cider, corpus_bleu, mean_published_bleu, rouge_l
from tinyvlm.eval.vqa import BlindGuesser, is_right, normalise
from tinyvlm.folders import scan

Row = dict[str, Any]

_COLUMNS = ("status", "source_key", "family", "prompt", "truth", "answer", "correct", "condition", "meta")


def evaluation_statistics(answers: Path, prepared: Path) -> dict[str, Any]:
    """The statistics of a finished evaluation."""
    rows: list[Row] = [row for table in scan(answers, _COLUMNS) for row in table.to_pylist()]
    rows = [row for row in rows if row["status"] != schema.TAKEN_DOWN]
    for row in rows:
        row["meta"] = json.loads(row["meta"])
        row["answer_type"] = _first_of(row["meta"], "answer_types", "other")
        row["form"] = _first_of(row["meta"], "forms", row["prompt"])
    asked = [row for row in rows if row["family"] != "caption" and row["condition"] == "as_is"]
    shuffled = [row for row in rows if row["condition"] == "shuffled" and row["status"] == schema.OK]
    captions = [row for row in rows if row["family"] == "caption" and row["status"] == schema.OK]
    guesser = BlindGuesser(training_questions(prepared))
    told = {
        **_accuracies(asked, shuffled, guesser, _num_unasked(prepared)),
        **_caption_scores(captions),
        "answers_cut_short": sum(row["meta"].get("finish_reason") == "length" for row in rows),
        "by_answer_type": _table(asked, shuffled, "answer_type", guesser),
        "by_question": _table(asked, shuffled, "form", guesser),
        "commonest_mistakes": _mistakes(asked),
    }
    return {**told, "charts": _charts(told), "pictures": _sheet(asked, captions, prepared)}


def training_questions(prepared: Path) -> Iterator[tuple[str, str]]:
    """(question, answer) of every training turn with a picture; a question in two conversations counts once."""
    seen: set[tuple[str, int]] = set()
    for table in scan(prepared, ("family", "split", "messages", "meta"), only_ok=True):
        wanted = pc.and_(
            pc.is_in(table["family"], pa.array(["vqa", "multi_turn"])), pc.not_equal(table["split"], "test")
        )
        for row in table.filter(wanted).to_pylist():
            meta = json.loads(row["meta"])
            words = [message.text for message in messages_of(row["messages"]) if message.role != "system"]
            numbers = meta.get("questions") or [None] * (len(words) // 2)
            for number, question, answer in zip(numbers, words[::2], words[1::2], strict=True):
                if number is None or (meta.get("set", ""), number) not in seen:
                    seen.add((meta.get("set", ""), number))
                    yield question, answer


def _accuracies(
    asked: Sequence[Row], shuffled: Sequence[Row], guesser: BlindGuesser, num_unasked: int
) -> dict[str, Any]:
    total = len(asked) + num_unasked
    kinds = sorted({row["answer_type"] for row in asked})
    return {
        "accuracy": _share(sum(map(_is_right, asked)), total),
        "accuracy_by_answer_type": {
            kind: _accuracy(row for row in asked if row["answer_type"] == kind) for kind in kinds
        },
        "accuracy_shuffled": _accuracy(shuffled),
        "chance": {
            f"always “{guesser.commonest}”": _accuracy(asked, lambda row: is_right(guesser.commonest, row["truth"])),
            "best blind guess": _accuracy(asked, lambda row: _guess_is_right(row, guesser)),
        },
        "num_questions": total,
        "num_right": sum(map(_is_right, asked)),
        "num_not_asked": num_unasked,
        "num_failed": sum(row["status"] != schema.OK for row in asked),
        "how_answers_are_compared": "exact match after stripping, lower-casing and dropping a final full stop; "
        "questions that could not be asked count as wrong",
    }


def _num_unasked(prepared: Path) -> int:
    """Test questions of the source that `prepare` could not turn into rows, for lack of their picture."""
    try:
        told = json.loads((prepared / "stats.json").read_text())["questions"]["test"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return int(told["in_source"]) - int(told["prepared"])


def _caption_scores(captions: Sequence[Row]) -> dict[str, Any]:
    """BLEU and ROUGE-L on the 0 … 1 scale, CIDEr on its own; 0 when there are no captions."""
    answers = [row["answer"] for row in captions]
    references = [row["meta"].get("references") or [row["truth"]] for row in captions]
    scores = corpus_bleu(answers, references) if captions else (0.0,) * 4
    published = mean_published_bleu(answers, [row["truth"] for row in captions])
    exact = sum(
        normalise(answer) in map(normalise, options) for answer, options in zip(answers, references, strict=True)
    )
    return {
        **{f"bleu_{order}": round(score, 4) for order, score in enumerate(scores, 1)},
        "cider": round(cider(answers, references), 4),
        "rouge_l": round(rouge_l(answers, references), 4),
        "published_sentence_bleu": {f"bleu_{order}": round(score, 4) for order, score in enumerate(published, 1)},
        "num_captions": len(captions),
        "captions_equal_to_a_reference": _share(exact, len(captions)),
    }


def _table(asked: Sequence[Row], shuffled: Sequence[Row], column: str, guesser: BlindGuesser) -> list[dict[str, Any]]:
    """Accuracy by the values of a column, the commonest first, with the blind guess and shuffled pictures beside it."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    mixed: defaultdict[str, list[Row]] = defaultdict(list)
    for row in asked:
        groups[row[column]].append(row)
    for row in shuffled:
        mixed[row[column]].append(row)
    return [
        {
            {"form": "question", "answer_type": "answer"}[column]: value,
            "questions": len(members),
            "accuracy": _accuracy(members),
            "blind guess": _accuracy(members, lambda row: _guess_is_right(row, guesser)),
            "pictures shuffled": _accuracy(mixed[value]),
        }
        for value, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:60]
    ]


def _mistakes(asked: Sequence[Row], most: int = 20) -> list[dict[str, Any]]:
    wrong = Counter(
        (row["truth"], row["answer"][:80]) for row in asked if row["answer"] is not None and not row["correct"]
    )
    return [{"truth": truth, "answer": answer, "times": times} for (truth, answer), times in wrong.most_common(most)]


def _charts(told: dict[str, Any]) -> list[dict[str, Any]]:
    beside = {"the model": told["accuracy"], "pictures shuffled": told["accuracy_shuffled"], **told["chance"]}
    kinds = told["by_answer_type"]
    return [
        _bars("Questions answered rightly (%)", beside),
        _bars(
            "By kind of answer (%)",
            {
                f"{row['answer']}, {name}": row[column]
                for row in kinds
                for name, column in (("model", "accuracy"), ("blind guess", "blind guess"))
            },
        ),
        _bars("Captions: corpus BLEU (%)", {f"BLEU-{order}": told[f"bleu_{order}"] for order in (1, 2, 3, 4)}),
    ]


def _bars(title: str, shares: dict[str, float | None]) -> dict[str, Any]:
    known = {name: share for name, share in shares.items() if share is not None}
    values = [round(100 * share, 1) for share in known.values()]
    return {"kind": "bar", "title": title, "labels": list(known), "values": values}


def _sheet(asked: Sequence[Row], captions: Sequence[Row], prepared: Path) -> dict[str, Any]:
    """Wrong answers, as many of each kind as there is room for, then right ones and captions."""
    answered = [row for row in asked if row["answer"] is not None]
    wrong = [row for row in answered if not row["correct"]][:30]
    chosen = [*wrong, *_spread([row for row in answered if row["correct"]], 12), *_spread(captions, 12)]
    rows = rows_by_key(prepared, {row["source_key"] for row in chosen}, ("images",))
    items = []
    for row in chosen:
        mark = "" if row["correct"] is None else "✓ " if row["correct"] else "✗ "
        truth = f" (truth: {row['truth']})" if row["correct"] is False else ""
        pictures = rows.get(row["source_key"], {}).get("images") or [{"bytes": None}]
        items.append(sheet_item(f"{mark}{row['prompt']} → {row['answer']}{truth}", pictures[0]["bytes"]))
    return {"title": "Wrong answers first, then right ones and captions", "items": items}


def _spread(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many rows, evenly spread."""
    step = max(1, len(rows) // most)
    return list(rows[::step][:most])


def _first_of(meta: dict[str, Any], name: str, otherwise: str) -> str:
    values = meta.get(name)
    return str(values[-1]) if values else otherwise


def _is_right(row: Row) -> bool:
    return bool(row["correct"])


def _guess_is_right(row: Row, guesser: BlindGuesser) -> bool:
    return is_right(guesser.guess(row["prompt"]), row["truth"])


def _accuracy(rows: Iterable[Row], judge: Callable[[Row], bool] = _is_right) -> float | None:
    verdicts = [judge(row) for row in rows]
    return _share(sum(verdicts), len(verdicts)) if verdicts else None


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0
