"""The columns of every dataset, and the closed list of row statuses.

Each row of each stage has an int64 `key` that survives, a `status` and a `detail`.  Columns marked *measured* (time,
attempts) may differ between two runs of the same work; two runs are equal when all other columns are, sorted by key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, get_args

import pyarrow as pa

from tinyvlm.errors import ConfigError

FeatureStorage = Literal["float16", "int8", "fp8"]

Family = Literal[
    "caption", "classification", "vqa", "knowledge_vqa", "reasoning", "generation", "instruction", "multi_turn", "text"
]
Split = Literal["train", "validation", "test"]
FAMILIES: tuple[Family, ...] = get_args(Family)
"""Kinds of conversation.  `instruction`: one request about a picture of no kind of its own; `text`: no picture."""
SPLITS: tuple[Split, ...] = get_args(Split)

OK = "ok"
TAKEN_DOWN = "optout.takedown"

STATUSES: dict[str, str] = {
    OK: "usable by the next stage",
    "bad_url": "not an http(s) address",
    "private_address": "resolves to a private, loopback or metadata address that is not on the allow-list",
    "dead.dns": "the host name does not resolve",
    "dead.host": "not asked: its host had failed too often",
    "dead.refused": "nothing listens at that address",
    "dead.tls": "no secure connection: certificate or protocol refused",
    "dead.protocol": "the answer is not HTTP",
    "dead.http404": "HTTP 404 or 410: gone",
    "dead.http": "another permanent error status",
    "dead.redirects": "the redirect limit was reached, or they go in a circle",
    "blocked.401": "HTTP 401: a password is wanted",
    "blocked.403": "HTTP 403: forbidden",
    "blocked.451": "HTTP 451: unavailable for legal reasons",
    "broken.reset": "the connection was reset or closed early, after the last retry",
    "broken.http5xx": "a server error, after the last retry",
    "broken.dns": "the name server did not answer, after the last retry",
    "broken.network": "no way to that address from here, after the last retry",
    "throttled": "429 or 503 after the last retry, or a longer wait asked than allowed",
    "timeout.connect": "no connection in time",
    "timeout.read": "a pause in the answer was too long",
    "timeout.total": "the answer was not complete in time",
    "optout.header": "the server asks with X-Robots-Tag not to be used",
    "optout.tdm": "the server reserves text and data mining",
    "optout.robots": "robots.txt disallows the address",
    TAKEN_DOWN: "on a takedown list; its picture, words and features are removed",
    "too_large": "more bytes than allowed",
    "unreadable": "the file is gone, has changed, or may not be read",
    "not_image": "the bytes are no image of an allowed format",
    "corrupt": "an image, but damaged",
    "crashed": "the decoder crashed on it or never ended",
    "bomb": "more pixels than allowed (decompression bomb)",
    "too_small": "fewer pixels than allowed",
    "placeholder.clip": "looks like a reference 'image not available' picture",
    "placeholder.repeated": "the same bytes stand behind many links",
    "placeholder.similar": "nearly the same picture stands behind many links",
    "placeholder.redirect": "many links were redirected to the same address",
    "placeholder.plain": "nearly one colour: there is nothing to see",
    "no_picture": "the conversation's picture is not in the input",
    "bad_record": "the record is damaged, or lacks what its kind has",
    "bad_turns": "the roles do not take turns, or the assistant does not have the last word",
    "bad_count": "the text does not refer to each of its pictures once",
    "bad_text": "the conversation's text is empty or unusable",
    "too_long": "more tokens than the model may read",
    "duplicate": "the same conversation stands in the input before",
    "contaminated.same": "a picture of an evaluation set",
    "contaminated.similar": "nearly a picture of an evaluation set",
    "internal_error": "our own failure on this row; the run went on",
}
"""Every status that a row may have, and what it means.  What stands before a dot is its family."""

TRANSIENT = ("throttled", "timeout", "broken", "dead.host", "internal_error")
"""Statuses and families that may be other ones tomorrow: what `--retry transient` tries again."""

KEPT_OF_TAKEN = frozenset(
    (
        *("key", "source_key", "url", "final_url", "sha256", "image_sha256", "duplicate_of", "http_status"),
        *("source", "family", "split", "condition", "attempts", "milliseconds", "finished_at"),
        *("file", "column", "offset", "length", "modified"),
    )
)
"""What a row keeps, besides `status` and `detail`, when it is taken down: which one it is, and not what it holds."""

MEASURED = {b"measured": b"true"}
"""Field metadata of columns that two equal runs may disagree in."""


def statuses_of(names: Iterable[str]) -> tuple[str, ...]:
    """The statuses that names mean: statuses, families (`timeout`), "transient", or "failed" (all but ok).

    What was taken down is meant by its own full name alone.

    Raises:
        ConfigError: a name that is none of these, with the nearest one.
    """
    groups = {"transient": TRANSIENT, "failed": tuple(STATUSES.keys() - {TAKEN_DOWN})}
    found: set[str] = set()
    for name in names:
        for wanted in groups.get(name, (name,)):
            family = {status for status in STATUSES if status.startswith(f"{wanted}.")} - {TAKEN_DOWN}
            fitting = family | ({wanted} & STATUSES.keys()) - {OK}
            if not fitting and wanted != OK:
                known = [*groups, *STATUSES, *(status.split(".")[0] for status in STATUSES)]
                near = difflib.get_close_matches(wanted, known, n=1, cutoff=0)[0]
                raise ConfigError(f"There is no status {wanted!r}; did you mean {near!r}?")
            found |= fitting
    return tuple(status for status in STATUSES if status in found)


def _row(*fields: pa.Field) -> pa.Schema:
    outcome = (
        pa.field("key", pa.int64(), False),
        pa.field("status", pa.string(), False),
        pa.field("detail", pa.string()),
    )
    return pa.schema([*outcome, *fields])


_CARRIED = (pa.field("url", pa.string()), pa.field("caption", pa.string()), pa.field("meta", pa.string()))
"""`meta` is a JSON object with whatever else the link list says of the row (split, image id, …)."""

LINKS = pa.schema([pa.field("key", pa.int64(), False), *_CARRIED])

PICTURES = _row(
    *_CARRIED,
    pa.field("file", pa.string()),
    pa.field("column", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("length", pa.int64()),
    pa.field("modified", pa.int64()),
)
"""Where pictures lie that are already there: `length` bytes at `offset` of `file`, or row `offset` of its `column`.

`modified`: the file's time of change when it was listed, ns.  A status other than ok: a piece of input is damaged.
"""

DOWNLOADED = _row(
    *_CARRIED,
    pa.field("image", pa.binary()),
    pa.field("sha256", pa.string()),
    pa.field("phash", pa.uint64()),
    pa.field("format", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("bytes", pa.int64()),
    pa.field("http_status", pa.int32()),
    pa.field("final_url", pa.string()),
    pa.field("duplicate_of", pa.int64()),
    pa.field("attempts", pa.int32(), metadata=MEASURED),
    pa.field("milliseconds", pa.float32(), metadata=MEASURED),
    pa.field("finished_at", pa.timestamp("ms", "UTC"), metadata=MEASURED),
)
"""`image`: the bytes as sent (`store=original`) or the finished picture.

`bytes`, `sha256`, `width`, `height` (upright): of the file as sent.  `phash`: see `images.perceptual_hash`.
`duplicate_of`: the key of the row with the same link that was fetched for this one too.
"""

PREPROCESSED = _row(
    *_CARRIED,
    pa.field("image", pa.binary()),
    pa.field("sha256", pa.string()),
    pa.field("phash", pa.uint64()),
    pa.field("final_url", pa.string()),
    pa.field("original_width", pa.int32()),
    pa.field("original_height", pa.int32()),
    pa.field("fit", pa.string()),
)
"""`image`: JPEG of the finished square picture; `fit`: "crop" or "pad"."""

_LIKELY = pa.struct([pa.field("label", pa.string(), False), pa.field("confidence", pa.float32(), False)])

EXPLORED = _row(
    pa.field("label", pa.string()),
    pa.field("category", pa.string()),
    pa.field("confidence", pa.float32()),
    pa.field("top", pa.list_(_LIKELY)),
)
"""`confidence`: the label's share of the softmax over all labels; `top`: the likeliest labels, `label` first."""


def encoded(num_tokens: int, width: int, storage: FeatureStorage = "float16") -> pa.Schema:
    """Preprocessed rows with what the vision tower says of them.

    `similarity`: cosine to `reference`, the nearest reference placeholder.  `encoder`: fingerprint of the tower's
    weights and of the preprocessing (`towers.encoder_fingerprint`).  `features`: K×D numbers, float16, int8 or the bits
    of float8 (e4m3fn); in eight bits each token's are to be multiplied by its `feature_scale`, and `feature_error`
    (relative L2) and `feature_cosine` say how near that comes (`feature_store.unpack` gives floats back).
    """
    value = {"float16": pa.float16(), "int8": pa.int8(), "fp8": pa.uint8()}[storage]
    eight_bits = (
        pa.field("feature_scale", pa.list_(pa.float32(), num_tokens)),
        pa.field("feature_error", pa.float32()),
        pa.field("feature_cosine", pa.float32()),
    )
    return _row(
        *_CARRIED,
        pa.field("image", pa.binary()),
        pa.field("sha256", pa.string()),
        pa.field("phash", pa.uint64()),
        pa.field("similarity", pa.float32()),
        pa.field("reference", pa.string()),
        pa.field("encoder", pa.string()),
        pa.field("features", pa.fixed_shape_tensor(value, (num_tokens, width))),
        *(() if storage == "float16" else eight_bits),
    )


RECORDS = _row(
    pa.field("record", pa.string()),
    pa.field("file", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("length", pa.int64()),
    pa.field("meta", pa.string()),
    pa.field("group", pa.uint64()),
)
"""Records of a dataset's files: as JSON in `record`, or where they lie, when they are long.

There, `length` bytes at `offset` of `file` are the JSON, or, without a `length`, row `offset` is it.  `meta`: what the
reader already found out about the record.  `group`: of records that share pictures (data/picture_groups.py).
"""

_PART = pa.struct([pa.field("text", pa.string()), pa.field("image", pa.int32())])
_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("sha256", pa.string()), pa.field("phash", pa.uint64())])
_MESSAGE = pa.struct([pa.field("role", pa.string(), False), pa.field("parts", pa.list_(_PART), False)])

CONVERSATIONS = _row(
    pa.field("source_key", pa.int64()),
    pa.field("source", pa.string()),
    pa.field("family", pa.string()),
    pa.field("split", pa.string()),
    pa.field("messages", pa.list_(_MESSAGE)),
    pa.field("images", pa.list_(_IMAGE)),
    pa.field("tokens", pa.int32()),
    pa.field("meta", pa.string()),
)
"""One conversation a row.  A part has `text` or `image` (an index into `images`), never both.

`source_key`: the input row's key.  `source` may have a subset after a slash.  `images`: finished pictures; `sha256` and
`phash` are of the picture as its source has it.  `tokens`: image tokens included; null where they were not counted.
"""

ANSWERS = _row(
    pa.field("source_key", pa.int64()),
    pa.field("source", pa.string()),
    pa.field("family", pa.string()),
    pa.field("split", pa.string()),
    pa.field("prompt", pa.string()),
    pa.field("truth", pa.string()),
    pa.field("answer", pa.string()),
    pa.field("correct", pa.bool_()),
    pa.field("image_sha256", pa.string()),
    pa.field("condition", pa.string()),
    pa.field("meta", pa.string()),
)
"""Kept answers.  `source_key`: the conversation's key.  `condition`: "as_is", or "shuffled" (another row's picture)."""


def measured_columns(schema: pa.Schema) -> set[str]:
    """Names of the columns in which two equal runs may differ."""
    return {field.name for field in schema if field.metadata and b"measured" in field.metadata}
