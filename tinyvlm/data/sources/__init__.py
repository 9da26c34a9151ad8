"""Where conversations come from: one reader per dataset, all with the same face.

    a record of the dataset ──Source.dialogues──▶ Dialogue, Dialogue, …      (prepare.py makes rows of them)

There are two kinds.  A `PictureSource` is given one finished picture's row of the line at a time and says what is
talked about it.  A `FileSource` reads files of its own: `outline` looks at each record once while they are listed
(data/records.py), and `dialogues` turns one record into conversations, in the workers.

Every choice (wording, order, split) is drawn by a hash of the row, never by a random generator's mood, so the same row
always says the same.  A record that cannot be used raises nothing: it becomes a Dialogue with the reason as its status.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tinyvlm import schema
from tinyvlm.chat import Message
from tinyvlm.errors import DataError
from tinyvlm.schema import Family, Split

CAPTION_PROMPTS = (
    "Describe this image.",
    "Write a caption for this image.",
    "What does this image show?",
    "Generate a caption describing this image.",
    "Provide a description of this image.",
    "What's depicted in this image?",
    "Write a description for this image.",
    "Generate text describing this image.",
    "Create a caption for this image.",
    "What can you see in this image?",
    "Describe what you observe in this image.",
    "Write text explaining this image.",
    "Generate a description of this image.",
    "What is shown in this image?",
    "Provide a caption for this image.",
    "Explain what this image depicts.",
    "Write what you see in this image.",
    "Describe the contents of this image.",
    "Generate text about this image.",
    "What appears in this image?",
)
"""The twenty prompts of the published system."""


@dataclass(frozen=True)
class StoredImage:
    """A picture in a file beside the file of its record, perhaps with hashes known from before it was finished."""

    name: str | None
    """The file's name; None: its bytes were not kept."""
    folder: str = ""
    """Where names lie that `prepare.images` does not know; "": nowhere."""
    sha256: str | None = None
    """This and `phash` are believed where the name says the sha256 of the file's own bytes, and they have it."""
    phash: int | None = None


GivenImage = bytes | str | StoredImage
"""A picture as a record gives it: a file's bytes, a `data:` address, or the name of a file (`prepare.images` says
where those are, or else the record's own folder)."""


@dataclass(frozen=True)
class Dialogue:
    """One conversation before it becomes a row; `status` other than ok says why it cannot be used."""

    family: Family
    split: Split
    messages: tuple[Message, ...]
    images: tuple[GivenImage, ...] = ()
    """The pictures that the messages' `Picture(0)`, `Picture(1)`, … are; a `PictureSource` leaves its row's out."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    status: str = schema.OK
    detail: str | None = None
    subset: str = ""
    """Which part of the source it is of; the row's `source` is then `name/subset`."""
    held_out_by: str = ""
    """Conversations with an equal one are on the same side of the held-out split; "": the hash of the pictures, or
    of the words where there are none."""
    keeps_split: bool = False
    """True: held out was already what is to be, and `split` stays as it is."""


@dataclass(frozen=True)
class SourceRow:
    """What a reader may know of a picture: its key, the link list's caption, and the parsed `meta`."""

    key: int
    caption: str | None
    meta: Mapping[str, Any]


class PictureSource(Protocol):
    """A reader of pictures' rows.  Heavy files are read on first use."""

    name: str
    reads: str
    """The rows: "encode", finished pictures of the line; "pictures", a listing of those that lie elsewhere."""

    def dialogues(self, row: SourceRow) -> Sequence[Dialogue]:
        """All that is said about one picture; at least one entry, with a status when nothing can be said."""

    def num_questions(self) -> Mapping[str, Mapping[int, int]]:
        """Split of the data set → picture → how many questions it has, asked or not; empty when there is no list."""


@dataclass(frozen=True)
class Outline:
    """What is found out about a record while the records are listed."""

    together: str | None = None
    """Records with an equal one are written together, so that a picture that they share is stored once."""
    pictures: Sequence[str] = ()
    """Names or digests of all pictures of a record: those that share some are on one side of the held-out split."""
    same: str | None = None
    """Of records with an equal one only the first is used; the others end as `duplicate`."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Given to `dialogues` with the record; JSON."""
    status: str = schema.OK
    detail: str | None = None


class FileSource:
    """Reads records from files.  Subclasses set the attributes and define `dialogues`; the constructor is light."""

    name: str
    """As `prepare.source` names it."""
    reads = "records"
    suffixes: tuple[str, ...] = (".json", ".jsonl", ".ndjson", ".parquet", ".csv")
    """Files that are read; in a folder others are passed over."""
    required: tuple[str, ...] = ()
    """Fields without which a file is not of this kind; the first record of each file is asked."""
    keeps_order: bool = False
    """True: records lie in the files' order, and `Outline.together` is not used."""

    def choose(self, files: Sequence[str]) -> Sequence[str]:
        """Of the files found at the given places those to read, in order."""
        return files

    def records(self, files: Sequence[str], rows: RowReader) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
        """(file, place in it, record) of each; a source that joins files has a way of its own.

        `place`: None for a record that was put together and lies nowhere as it is.
        """
        for file in files:
            for place, record in rows(file):
                yield file, place, record

    def outline(self, record: Mapping[str, Any], file: str) -> Outline:
        """What is known about a record without its pictures being looked at."""
        return Outline()

    def dialogues(self, record: Mapping[str, Any], about: Mapping[str, Any]) -> Sequence[Dialogue]:
        """The conversations of a record; at least one, with a status when nothing can be said.

        Anything in the record may be missing, empty or of a wrong type.
        """
        raise NotImplementedError

    def account(self) -> Mapping[str, Any]:
        """What `records` wants to say when it is through (rows joined, checksums); goes into the listing's report."""
        return {}


class RowReader(Protocol):
    """Reads the records of a file, each with its place."""

    def __call__(self, file: str) -> Iterable[tuple[Any, Mapping[str, Any]]]: ...


def require_fields(record: Mapping[str, Any], names: Sequence[str], where: str, fitting: Sequence[str] = ()) -> None:
    """Raises DataError when a field is missing, naming it, those that are there, and the sources that want those."""
    missing = [name for name in names if name not in record]
    if not missing:
        return
    remedy = (
        f"Such records are read with --set prepare.source={' or '.join(fitting)}"
        if fitting
        else ("Is prepare.source the right one")
    )
    raise DataError(
        f"{where} has no field {missing[0]!r}; it has {fields_of(record)}. "
        f"{remedy}{'.' if fitting else '?'}  A field with another name is told by, for example, "
        f'--set prepare.columns=\'{{"{missing[0]}": "its name"}}\'.'
    )


def fields_of(record: Mapping[str, Any]) -> str:
    """Names of a record's fields, for a sentence."""
    names = [str(name)[:40] for name in record]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return storable(", ".join(names[:12]) + more) or "none"


def storable(text: str) -> str:
    """Without halves of characters, which no file can store."""
    return text.encode("utf-8", "replace").decode()


def text_of(value: Any) -> str:
    """A field's words: "" for what is missing or not a number, never "None" or "nan"; numbers as they are written."""
    if isinstance(value, str) and value.isascii():  # nearly all there is
        return value.strip()
    if value is None or isinstance(value, (list, dict, bytes)) or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return storable(str(value)).strip()


def drawn(*parts: object) -> int:
    """A 64-bit number drawn from `parts` by hashing: the same on every machine and in every run."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def share(*parts: object) -> float:
    """A number in [0, 1) drawn from `parts`."""
    return drawn(*parts) / 2**64
