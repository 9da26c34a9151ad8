"""How close captions come to reference captions: corpus BLEU, CIDEr and ROUGE-L, and a BLEU of another kind.

    text ──tokenise──▶ tokens ─┬─▶ corpus_bleu      counts summed over all captions, closest reference length
                               ├─▶ cider            n-grams weighted by how rare they are among the references
                               ├─▶ rouge_l          longest common subsequence, averaged
                               └─▶ published_bleu   the published system's way: a sentence score, averaged

The first three are what the COCO caption tools compute, on tokens in the manner of the Penn Treebank with punctuation
dropped; they are the figures to compare with others.  `published_bleu` is NLTK's sentence BLEU with its smoothing
method 1; a mean of it is neither corpus BLEU nor comparable to it, and is reported under its own name only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

ORDERS = (1, 2, 3, 4)
CIDER_SIGMA = 6.0
"""Width of CIDEr-D's penalty for captions of another length."""
ROUGE_BETA = 1.2
"""How much more recall weighs than precision."""

Bleu = tuple[float, float, float, float]
"""BLEU-1 to BLEU-4, each 0 … 1."""

_TOKEN = re.compile(
    r"""
      [a-z]+(?=n't\b)                          # "does" of "doesn't"
    | n't\b | '(?:s|m|d|re|ve|ll)\b            # the clipped halves
    | https?://\S*[\w/]
    | (?:[a-z]\.){2,}                          # u.s.
    | (?:mr|mrs|ms|dr|st|ave|mt|jr|sr|co|inc|ltd|vs)\.
    | -?\d+(?:[.,:/-]\d+)*(?![\w/.-]*\w)       # 1,000  3.5  10:30  3/4
    | \w+(?:[-'&/.]\w+)*                       # words, black-and-white, o'clock, 8th, example.com
    | \.{3} | --
    | [^\w\s]                                  # each other sign is a token of its own
    """,
    re.VERBOSE,
)
_CLIPPED = re.compile(r"(n't|'(?:s|m|d|re|ve|ll))$")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
"""The Treebank's names.  The COCO tools mean to drop brackets but do not (they compare capitals): kept here too."""
_DROPPED = frozenset("' ` . ? ! , : - -- ... ; \" “ ” ‘ ’".split())


def tokenise(text: str, *, punctuation: bool = False) -> list[str]:
    """Lower-case words as the Penn Treebank cuts them (`it's`: `it`, `'s`); `punctuation` keeps signs as tokens."""
    tokens: list[str] = []
    for token in _TOKEN.findall(text.lower().replace("’", "'")):
        clipped = _CLIPPED.search(token)
        pieces = [token[: clipped.start()], clipped.group()] if clipped and clipped.start() else [token]
        tokens += [_BRACKETS.get(piece, piece) for piece in pieces if punctuation or piece not in _DROPPED]
    return tokens


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Bleu:
    """Corpus BLEU-1..4 of predictions, each against its own list of references.

    Raises:
        ValueError: the lists differ in length, or a prediction has no reference.
    """
    _check_lists(predictions, references)
    matched, offered = [0] * 4, [0] * 4
    length = wanted_length = 0
    for prediction, options in zip(predictions, references, strict=True):
        tokens, others = tokenise(prediction), [tokenise(option) for option in options]
        length += len(tokens)
        wanted_length += _closest_length(len(tokens), others)
        for order in ORDERS:
            right, total = _clipped_matches(tokens, others, order)
            matched[order - 1] += right
            offered[order - 1] += total
    # The COCO tools' guards against 0 ÷ 0, kept so that figures agree to the last digit.
    tiny, small = 1e-15, 1e-9
    ratio = (length + tiny) / (wanted_length + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precisions = [(right + tiny) / (total + small) for right, total in zip(matched, offered, strict=True)]
    return _four([math.prod(precisions[:order]) ** (1 / order) * penalty for order in ORDERS])


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a corpus, 0 … 10: TF-IDF vectors of 1- to 4-grams, clipped, with a penalty for another length.

    How rare an n-gram is, is counted over the references given here, so the figure belongs to this set of captions;
    for a single caption every weight is zero.

    Raises:
        ValueError: as `corpus_bleu`.
    """
    _check_lists(predictions, references)
    tokens = [
        ([tokenise(option) for option in options], tokenise(mine))
        for mine, options in zip(predictions, references, strict=True)
    ]
    seen_in: Counter[tuple[str, ...]] = Counter()
    for others, _ in tokens:
        seen_in.update({ngram for other in others for order in ORDERS for ngram in _ngrams(other, order)})
    most = math.log(max(1, len(predictions)))

    def weigh(words: Sequence[str], order: int) -> dict[tuple[str, ...], float]:
        return {n: count * (most - math.log(max(1, seen_in[n]))) for n, count in _ngrams(words, order).items()}

    total = 0.0
    for others, mine in tokens:
        vectors = [weigh(mine, order) for order in ORDERS]
        for other in others:
            close = sum(
                _clipped_cosine(vector, weigh(other, order)) for order, vector in zip(ORDERS, vectors, strict=True)
            )
            # The COCO tools measure length in pairs of words.
            difference = max(0, len(mine) - 1) - max(0, len(other) - 1)
            total += close / 4 * math.exp(-(difference**2) / (2 * CIDER_SIGMA**2)) / len(others)
    return 10 * total / max(1, len(predictions))


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L, 0 … 1: best precision and best recall among the references, recall weighing more.

    Raises:
        ValueError: as `corpus_bleu`.
    """
    _check_lists(predictions, references)
    total = 0.0
    for prediction, options in zip(predictions, references, strict=True):
        tokens = tokenise(prediction) or [""]
        pairs = [
            (_common_length(tokens, other), len(other)) for other in (tokenise(option) or [""] for option in options)
        ]
        precision = max(common for common, _ in pairs) / len(tokens)
        recall = max(common / length for common, length in pairs)
        if precision and recall:
            total += (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
    return total / max(1, len(predictions))


def published_bleu(prediction: str, reference: str) -> Bleu:
    """Sentence BLEU-1..4 with NLTK's smoothing method 1, as the published system reports it (punctuation kept)."""
    tokens, other = tokenise(prediction, punctuation=True), tokenise(reference, punctuation=True)
    counts = [_clipped_matches(tokens, [other], order) for order in ORDERS]
    if not tokens or counts[0][0] == 0:
        return (0.0, 0.0, 0.0, 0.0)
    penalty = 1.0 if len(tokens) > len(other) else math.exp(1 - len(other) / len(tokens))
    precisions = [(right or 0.1) / max(1, total) for right, total in counts]
    return _four([penalty * math.prod(precisions[:order]) ** (1 / order) for order in ORDERS])


def mean_published_bleu(predictions: Sequence[str], references: Sequence[str]) -> Bleu:
    """The mean over captions of `published_bleu`; zeros for no captions."""
    scores = [published_bleu(mine, theirs) for mine, theirs in zip(predictions, references, strict=True)]
    return _four([sum(score[order - 1] for score in scores) / max(1, len(scores)) for order in ORDERS])


def _check_lists(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"{len(predictions)} predictions came with {len(references)} lists of references, or one is empty."
        )


def _clipped_cosine(mine: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    """Cosine of two vectors in which no entry of the first counts for more than the second's."""
    product = sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in mine.items() if ngram in other)
    norm = math.sqrt(sum(w * w for w in mine.values()) * sum(w * w for w in other.values()))
    return product / norm if norm else 0.0


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for column, candidate in enumerate(other, 1):
            before, row[column] = row[column], before + 1 if word == candidate else max(row[column], row[column - 1])
    return row[-1]


def _four(values: Sequence[float]) -> Bleu:
    one, two, three, four = values
    return (one, two, three, four)


def _clipped_matches(tokens: Sequence[str], others: Sequence[Sequence[str]], order: int) -> tuple[int, int]:
    """(n-grams found in a reference, each at most as often as in the reference that has it most; n-grams in all)."""
    allowed: Counter[tuple[str, ...]] = Counter()
    for other in others:
        allowed |= _ngrams(other, order)
    mine = _ngrams(tokens, order)
    return (mine & allowed).total(), mine.total()


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def _closest_length(length: int, others: Sequence[Sequence[str]]) -> int:
    """Length of the reference nearest in length; the shorter of two equally near."""
    return min((abs(len(other) - length), len(other)) for other in others)[1]
