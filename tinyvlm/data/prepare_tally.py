"""What a folder of conversations comes to, counted part by part in bounded memory.

    parts ─▶ Tally.add ─▶ counts by source, family, split and status · lengths · reasons · answers · places of examples

Columns are counted as columns: of millions of rows hardly one becomes a Python object.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tinyvlm import schema
from tinyvlm.data.record_files import parse
from tinyvlm.data.samples import Draw, Place, kinds_of
from tinyvlm.data.tallies import Distinct, Groups, Quantiles

Ints = npt.NDArray[np.int64]
Kind = tuple[str, str]
"""Source and family."""

COLUMNS = (
    *("key", "status", "detail", "source_key", "source", "family", "split", "messages", "tokens", "meta"),
    "images.list.element.sha256",
)

LENGTH_EDGES = (0, 16, 32, 64, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 1 << 31)
"""Edges of the bins of tokens a conversation."""
MOST = 12
"""Pictures and turns that are told apart; more are as many."""
SHORT_ANSWER = 40
"""Characters up to which an answer is counted as a whole."""
SAMPLED_ROWS = 50_000
"""Conversations whose answers are cut into words; of more, every n-th is."""
EXAMPLES_OF_EACH, EXTREMES = 6, 4
"""Rows that are looked at: of each source and family, and of the longest and the shortest each."""

QUESTIONS = ("vqa", "multi_turn")
"""Families in which easy-VQA's questions are asked about a picture."""

_NUMBERS = r"[0-9a-f]{8,}(-[0-9a-f]{4,})*|[0-9]+"
_FILE = r"/[^/\s]+\.(\w{3,4})(\s|$)"
"""What differs between reasons that are alike: numbers, hashes and the names of files in one folder."""

DULL_WORDS = frozenset(
    "a an and are as at be but by can for from has have he her his i if in is it its not of on or she so that the "
    "their there they this to was were which who will with you your we".split()
)
_PUNCTUATION = ".,;:!?\"'()[]{}<>*`“”‘’…-–—"


@dataclass
class Measures:
    """Sums over the usable conversations of one source and family."""

    rows: int = 0
    pictures: int = 0
    turns: int = 0
    tokens: Quantiles = field(default_factory=lambda: Quantiles(1))


class Tally:
    """Takes in the parts of a folder.

    Args:
        num_rows: of the whole folder.
        in_source: as `PictureSource.num_questions` tells it.
    """

    def __init__(self, num_rows: int, in_source: Mapping[str, Mapping[int, int]]) -> None:
        self.counted: Counter[tuple[str, str, str, str]] = Counter()
        """(source, family, split, status) → rows"""
        self.measures: dict[Kind, Measures] = {}
        self.lengths = np.zeros(len(LENGTH_EDGES) - 1, np.int64)
        self.pictures, self.turns = np.zeros(MOST + 1, np.int64), np.zeros(MOST + 1, np.int64)
        self.pictures_shown = self.num_inputs = 0
        self.distinct = Distinct()
        self.reasons, self.answers, self.words = Groups(1, 10_000), Groups(1), Groups(1)
        self.reason_examples: dict[str, tuple[int, str]] = {}
        """Of each of `reasons` the key of one row, and what it says."""
        self.drawn = Draw(EXAMPLES_OF_EACH)
        self.longest, self.shortest = Extreme(1), Extreme(-1)
        self.in_source, self.ledger = in_source, Ledger(in_source)
        self.step = -(-num_rows // SAMPLED_ROWS) or 1
        """Of so many conversations, one's answers are cut into words."""

    def num(self, *, source: str = "", family: str = "", split: str = "", status: str = schema.OK) -> int:
        """Rows of these; "": of all.  A family of statuses counts too."""
        return sum(
            number
            for (of_source, of_family, of_split, of_status), number in self.counted.items()
            if source in ("", of_source)
            and family in ("", of_family)
            and split in ("", of_split)
            and status in ("", of_status, of_status.split(".")[0])
        )

    def add(self, part: int, table: pa.Table) -> None:
        """Count one part; `part` is its position among the folder's."""
        for name in ("source", "family", "split", "detail"):
            table = table.set_column(table.column_names.index(name), name, pc.fill_null(table[name], ""))
        groups = table.group_by(["source", "family", "split", "status"]).aggregate([([], "count_all")]).to_pylist()
        for row in groups:
            self.counted[row["source"], row["family"], row["split"], row["status"]] += row["count_all"]
        usable = pc.equal(table["status"], schema.OK).to_numpy(zero_copy_only=False)
        self._add_reasons(table.filter(pa.array(~usable)))
        rows = np.flatnonzero(usable)
        table = table.take(rows)
        if not table.num_rows:
            return
        # An input row's conversations are all in one part, so parts may be counted apart.
        self.num_inputs += pc.count_distinct(table["source_key"]).as_py()
        self.distinct.add(pc.struct_field(pc.list_flatten(table["images"]), "sha256"))
        self._measure(part, rows, table)
        self._add_answers(table.filter(pc.not_equal(table["split"], "test")))
        self.drawn.add(part, table["key"], kinds_of(table, ("source", "family")), rows)
        if self.in_source:
            self.ledger.enter(table["family"].to_pylist(), table["meta"].to_pylist())

    def _add_reasons(self, table: pa.Table) -> None:
        """Reasons of rows that were set aside, alike ones together."""
        pattern = pc.replace_substring_regex(table["detail"], _FILE, r"/*.\1\2")
        pattern = pc.replace_substring_regex(pattern, _NUMBERS, "#")
        names = pc.binary_join_element_wise(table["status"], table["source"], pattern, "\t")
        grouped = pa.table({"name": names, "row": np.arange(table.num_rows)}).group_by("name")
        counted = grouped.aggregate([("row", "min"), ([], "count_all")])
        names = counted["name"].to_pylist()
        self.reasons.add(names, np.zeros(len(names), np.int64), counted["count_all"].to_numpy())
        examples = table.select(["key", "detail"]).take(counted["row_min"]).to_pylist()
        for name, example in zip(names, examples, strict=True):
            self.reason_examples.setdefault(name, (example["key"], example["detail"]))
        if len(self.reason_examples) > 4 * self.reasons.max_names:
            kept = set(self.reasons.names)
            self.reason_examples = {name: said for name, said in self.reason_examples.items() if name in kept}

    def _measure(self, part: int, rows: Ints, table: pa.Table) -> None:
        pictures = pc.fill_null(pc.list_value_length(table["images"]), 0).to_numpy().astype(np.int64)
        turns = pc.list_value_length(table["messages"]).to_numpy().astype(np.int64) // 2  # they alternate
        tokens = pc.fill_null(table["tokens"], -1).to_numpy().astype(np.int64)
        self.pictures_shown += int(pictures.sum())
        self.pictures += np.bincount(np.minimum(pictures, MOST), minlength=MOST + 1)
        self.turns += np.bincount(np.minimum(turns, MOST), minlength=MOST + 1)
        known = tokens >= 0
        self.lengths += np.histogram(tokens[known], bins=LENGTH_EDGES)[0]
        for extreme in (self.longest, self.shortest):
            extreme.add(part, rows[known], tokens[known])
        kinds = kinds_of(table, ("source", "family")).combine_chunks().dictionary_encode()
        codes = kinds.indices.to_numpy()
        for code in range(len(kinds.dictionary)):
            mine = codes == code
            first = int(np.argmax(mine))
            kind = table["source"][first].as_py(), table["family"][first].as_py()
            sums = self.measures.setdefault(kind, Measures())
            sums.rows += int(mine.sum())
            sums.pictures += int(pictures[mine].sum())
            sums.turns += int(turns[mine].sum())
            lengths = tokens[mine & known]
            sums.tokens.add(np.zeros(len(lengths), np.int64), lengths.astype(np.float64))

    def _add_answers(self, table: pa.Table) -> None:
        """Short answers as they are, and the words of some."""
        said = answers_of(table["messages"])
        short = pc.less_equal(pc.utf8_length(said), SHORT_ANSWER)
        _count(self.answers, said.filter(short))
        some = answers_of(table["messages"].take(np.arange(0, table.num_rows, self.step)))
        words = pc.list_flatten(pc.utf8_split_whitespace(pc.utf8_lower(some)))
        _count(self.words, pc.utf8_trim(words, _PUNCTUATION))


def answers_of(messages: pa.ChunkedArray) -> pa.Array:
    """The words of every message of the assistant in a column `messages`."""
    flat = pc.list_flatten(messages.combine_chunks())
    parts = pc.struct_field(flat, "parts").filter(pc.equal(pc.struct_field(flat, "role"), "assistant"))
    texts = pc.fill_null(pc.struct_field(pc.list_flatten(parts), "text"), "")
    lengths = pc.list_value_length(parts).to_numpy().astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), texts), "")


def _count(groups: Groups, texts: pa.Array) -> None:
    counted = texts.value_counts()
    names = counted.field("values").to_pylist()
    groups.add(names, np.zeros(len(names), np.int64), counted.field("counts").to_numpy())


def most_common(groups: Groups, number: int, without: frozenset[str] = frozenset()) -> list[tuple[str, int]]:
    """The names with the highest counts."""
    pairs = zip(groups.names, groups.counts[:, 0].tolist(), strict=True)
    return heapq.nsmallest(
        number, (pair for pair in pairs if pair[0] and pair[0] not in without), key=lambda pair: (-pair[1], pair[0])
    )


class Extreme:
    """Keeps the places of the rows with the largest (sign 1) or smallest (sign -1) numbers."""

    def __init__(self, sign: int) -> None:
        self.sign = sign
        self._kept: list[tuple[int, Place]] = []

    def add(self, part: int, rows: Ints, values: Ints) -> None:
        """Rows of a part and the number of each."""
        best = np.argsort(-self.sign * values, kind="stable")[:EXTREMES]
        found = [(-self.sign * int(values[place]), Place(part, int(rows[place]))) for place in best]
        self._kept = sorted([*self._kept, *found])[:EXTREMES]

    @property
    def places(self) -> list[Place]:
        return [place for _, place in self._kept]


class Ledger:
    """Where each question of the source's own list has gone.

    Args:
        in_source: split of the data set → picture → how many questions it has.
    """

    def __init__(self, in_source: Mapping[str, Mapping[int, int]]) -> None:
        self._in_source = in_source
        self._asked: dict[str, set[int]] = {split: set() for split in in_source}
        self._arrived: dict[str, set[int]] = {split: set() for split in in_source}

    def enter(self, families: Sequence[str], metas: Sequence[str | None]) -> None:
        """Note usable conversations."""
        for family, text in zip(families, metas, strict=True):
            meta = parse(text or "{}")
            if meta.get("set") in self._asked:
                self._arrived[meta["set"]].add(meta["image_id"])
                if family in QUESTIONS:
                    self._asked[meta["set"]].update(meta["questions"])

    def account(self) -> dict[str, dict[str, int]]:
        """`prepared` + `not_drawn` (left out by the settings) + `picture_missing` = `in_source`, for each split."""
        told = {}
        for split, pictures in self._in_source.items():
            missing = {picture: number for picture, number in pictures.items() if picture not in self._arrived[split]}
            total, prepared = sum(pictures.values()), len(self._asked[split])
            told[split] = {
                "in_source": total,
                "prepared": prepared,
                "not_drawn": total - sum(missing.values()) - prepared,
                "picture_missing": sum(missing.values()),
                "pictures_missing": len(missing),
            }
        return told
