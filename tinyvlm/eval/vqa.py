"""When an answer counts as right, and how many would be right without looking.

An answer is right when it equals the truth after both are stripped, lower-cased and freed of a full stop at the end:
nothing is parsed out of longer sentences.  Two chance lines stand beside every accuracy: the commonest training answer
given always, and for each question the answer that its exact words had most often in training.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable


def normalise(answer: str) -> str:
    """What is compared: `" Yes. "` and `"yes"` are the same."""
    return answer.strip().lower().removesuffix(".").rstrip()


def is_right(answer: str, truth: str) -> bool:
    """Exact match after `normalise`."""
    return normalise(answer) == normalise(truth)


class BlindGuesser:
    """Answers questions from their words alone, having seen training questions with their answers."""

    def __init__(self, seen: Iterable[tuple[str, str]]) -> None:
        by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for question, answer in seen:
            by_question[normalise(question)][normalise(answer)] += 1
            overall[normalise(answer)] += 1
        self.commonest = _first(overall) if overall else ""
        """The answer that training gave most often."""
        self._best = {question: _first(answers) for question, answers in by_question.items()}

    def guess(self, question: str) -> str:
        """The commonest answer to exactly this question, or the commonest of all where it never came up."""
        return self._best.get(normalise(question), self.commonest)


def _first(answers: Counter[str]) -> str:
    """The commonest; of equally common ones the first in the alphabet, so that the order of rows does not matter."""
    return min(answers, key=lambda answer: (-answers[answer], answer))
